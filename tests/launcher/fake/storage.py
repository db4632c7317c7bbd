"""The fake cloud's `gcloud storage`: what its `ls` and `cp` do with a server of Cloud Storage's JSON API.

The variable STORAGE_EMULATOR_HOST names the server, as it does for Google's own clients; ../../gcs/fake_gcs.py is one.

    ls gs://BUCKET/PATTERN ...                  "*", "?" and "[...]" stay within a part of the name
    cp FILE ... gs://BUCKET/NAME                or gs://BUCKET/FOLDER/
    cp gs://BUCKET/PATTERN ... FILE             or FOLDER, where there is one
    cp --recursive gs://BUCKET/FOLDER ... FOLDER    makes FOLDER/FOLDER/...

Other forms are refused. What they do: https://docs.cloud.google.com/sdk/gcloud/reference/storage/ls, .../cp and
https://docs.cloud.google.com/storage/docs/wildcards; in which order, and in which words they refuse:
googlecloudsdk/command_lib/storage of the Google Cloud SDK 528 (list_util.py, name_expansion.py, wildcard_iterator.py,
tasks/cp/copy_task_iterator.py) and googlecloudsdk/api_lib/storage/errors.py.
"""

import fnmatch
import http.client
import json
import os
import re
import sys
import urllib.parse
from pathlib import Path, PurePosixPath

from fake import documented

VARIABLE = "STORAGE_EMULATOR_HOST"
SCHEME = "gs://"
WILD = re.compile(r"[*?\[]")
RECURSIVE = {"--recursive", "-R", "-r"}
SILENT = "--no-user-output-enabled"
FLAGS = {"storage ls": set(), "storage cp": RECURSIVE}  # of those that are documented
ANYWHERE = {"--quiet", "-q", "--project", SILENT}
LIMIT = 60.0  # seconds for an answer


class StorageError(Exception):
    """The service says no; its words."""


def run(command):
    """Run a command that is of its documented form; its exit code."""
    if VARIABLE not in os.environ:
        raise documented.UsageError(f"({command.dotted}) the fake cloud has no buckets: say a folder for --bucket")
    if command.name not in FLAGS:
        raise _unknown(command, f"`{command.name}`")
    for flag in command.flags.keys() - FLAGS[command.name] - ANYWHERE:
        raise _unknown(command, flag)
    for word in command.words:
        if "**" in word:
            raise _unknown(command, f"'**' of {word!r}")
    return _ls(command) if command.name == "storage ls" else _cp(command)


def steps(workdir):
    """The committed checkpoints of a run in a bucket."""
    bucket, name = _parts(workdir)
    found = _listed(bucket, prefix=f"{name}/checkpoints/", matchGlob=f"{name}/checkpoints/*/MANIFEST.json")
    return [int(step) for step in (name.split("/")[-2] for name in found) if step.isdecimal()]


def _unknown(command, what):
    return documented.UsageError(f"({command.dotted}) the fake cloud does not know {what}")


def _parts(url):
    """(bucket, name) of a URL."""
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    return bucket, name


def _ls(command):
    if not command.words:
        raise _unknown(command, "a list of all buckets")
    for url in command.words:
        if not url.startswith(SCHEME):
            raise StorageError(f"Ls only works for cloud URLs. Error for: {url}")
        bucket, pattern = _parts(url)
        found = _named(bucket, pattern) if pattern else [""]
        if not found:
            raise StorageError("One or more URLs matched no objects.")
        lines = []
        for name in found:
            if name and not name.endswith("/"):
                lines.append(f"{SCHEME}{bucket}/{name}")
                continue
            lines += ["", f"{SCHEME}{bucket}/{name}:"] if len(found) > 1 else []
            lines += [f"{SCHEME}{bucket}/{one}" for one in _listed(bucket, prefix=name, delimiter="/")]
        for line in lines[1:] if lines[:1] == [""] else lines:
            print(line)
    return 0


def _cp(command):
    *sources, target = command.words
    recursive = bool(RECURSIVE & command.flags.keys())
    clouds = {source.startswith(SCHEME) for source in sources}
    if clouds != {not target.startswith(SCHEME)}:
        raise _unknown(command, "any copy but one between a file and a bucket")
    if True not in clouds:
        if recursive:
            raise _unknown(command, "an upload of a folder")
        missing = _upload(command, sources, target)
    elif any(not _parts(source)[1] for source in sources):
        raise _unknown(command, "a copy of a whole bucket")
    else:
        missing = _download(command, sources, target, recursive)
    if missing:
        raise StorageError("\n".join(["The following URLs matched no objects or files:", *missing]))
    return 0


def _upload(command, sources, target):
    """Copy files to a bucket; those that are none."""
    bucket, name = _parts(target)
    there = _named(bucket, name) if name else []
    inside = not name or name.endswith("/") or there == [f"{name}/"] or len(sources) > 1
    files = [source for source in sources if Path(source).is_file()]
    for source in files:
        to = f"{name.rstrip('/')}/{Path(source).name}".lstrip("/") if inside else name
        _say(command, f"Copying file://{source} to {SCHEME}{bucket}/{to}")
        query = urllib.parse.urlencode({"uploadType": "media", "name": to})
        _asked("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", bucket, Path(source).read_bytes())
    return [source for source in sources if source not in files]


def _download(command, sources, target, recursive):
    """Copy objects to files; the sources that named none."""
    found, missing, nested = [], [], False  # of the first: (bucket, name, path in the target)
    for source in sources:
        bucket, pattern = _parts(source)
        before = len(found)
        for name in _named(bucket, pattern):
            if not name.endswith("/"):
                found.append((bucket, name, PurePosixPath(name).name))
            elif recursive:
                above, nested = len(name.removesuffix("/").rpartition("/")[0]), True
                found += [(bucket, one, one[above:].lstrip("/")) for one in _listed(bucket, prefix=name)]
            else:
                what = f"{SCHEME}{bucket}/{name} because it is a container, and recursion is not enabled."
                print(f"WARNING: Omitting {what}", file=sys.stderr)
        if len(found) == before:
            missing.append(source)
    folder = Path(target).is_dir()
    if not folder and (nested or len(found) > 1):
        raise StorageError(f"Destination URL must name an existing directory. Provided: {target}.")
    if not folder and target.endswith("/"):
        said = "Destination URL must name an existing directory if it ends with a delimiter."
        raise StorageError(f"{said} Provided: {target}.")
    for bucket, name, inner in found:
        place = Path(target, inner) if folder else Path(target)
        _say(command, f"Copying {SCHEME}{bucket}/{name} to file://{place}")
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        data = _asked("GET", path, f"{bucket}/{name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return missing


def _say(command, text):
    if SILENT not in command.flags:
        print(text, file=sys.stderr)


def _named(bucket, pattern):
    """What a pattern names: objects, and folders, whose names end with "/"; part after part of the name."""
    queue, found = [pattern.removesuffix("/")], []
    while queue:
        path = queue.pop(0)
        wild = WILD.search(path)
        start = wild.start() if wild else len(path)
        part, deeper, rest = path[start:].partition("/")
        for name in _listed(bucket, prefix=path[:start], delimiter="/"):
            if not fnmatch.fnmatchcase(name[start:].removesuffix("/"), part):
                continue
            if deeper:
                queue += [name + rest] if name.endswith("/") else []
            elif name.endswith("/") or not pattern.endswith("/"):
                found.append(name)
    return [pattern] if pattern in found else found  # an object is not taken for the folder of its name


def _listed(bucket, **query):
    """Names of a listing: objects, then folders, page after page."""
    while True:
        path = f"/storage/v1/b/{bucket}/o?{urllib.parse.urlencode(query)}"
        page = json.loads(_asked("GET", path, bucket))
        yield from (item["name"] for item in page.get("items", ()))
        yield from page.get("prefixes", ())
        if "nextPageToken" not in page:
            return
        query["pageToken"] = page["nextPageToken"]


def _asked(method, path, about, data=None):
    """What the server answers to a request about a bucket, or an object of it."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(os.environ[VARIABLE]).netloc, timeout=LIMIT)
    try:
        connection.request(method, path, data)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"ConnectionError: {error}") from error
    finally:
        connection.close()
    if answer.status == 200:
        return body
    if answer.status == 404:
        raise StorageError(f"{SCHEME}{about} not found: 404.")
    message = json.loads(body)["error"]["message"]
    if answer.status == 403:
        bucket = about.partition("/")[0]
        who = "[somebody@example.com] does not have permission to access b instance"
        raise StorageError(f"{who} [{bucket}] (or it may not exist): {message}")
    raise StorageError(f"HTTPError {answer.status}: {message}")
