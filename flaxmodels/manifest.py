"""A folder that is whole or not there: `MANIFEST.json` holds the size and SHA-256 of each of its files, and facts.

Writing it is the commit. All files and folders are forced to storage first, then the manifest is written under another
name, forced to storage too, and renamed: so what a crash leaves is a folder without a manifest, which was never
committed, or one whose manifest describes files that are there. In a bucket, where an object is there whole or not at
all, the manifest is one object, written last; and what it says of the others is what was read back from there. Orbax's
arrays carry no checksum: without this a flipped bit comes back as another weight, and no one is told.

The manifest holds the SHA-256 of itself and is written in one way only: no byte of it can change unseen.
"""

import concurrent.futures
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flaxmodels import storage
from flaxmodels.registry import UserError, storable
from flaxmodels.storage import sync

NAME = "MANIFEST.json"
FORMAT = 1
# hashlib lets go of the interpreter's lock, so threads hash at the speed of the cores.
THREADS = min(16, os.cpu_count() or 1)


def committed(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    return (folder / NAME).is_file()


def write(folder: Path, facts: Mapping[str, Any], before: Callable[[], object] = lambda: None) -> None:
    """Commit a folder: hash each file, force all to storage, then write the manifest.

    Args:
      folder: whole, and written to by no one else.
      facts: what to store of it; anything that is not JSON becomes a name.
      before: called when all but the manifest is done: what it raises is raised, and nothing is committed.

    Raises:
      OSError: a file can't be read or forced to storage, or the manifest can't be written. Nothing is committed.
    """
    names = _files(folder)
    with _threads(folder) as threads:
        found = dict(zip(names, threads.map(lambda name: _described(folder / name, durable=True), names)))
    if not storage.is_object(folder):
        for inner in sorted({folder / parent for name in names for parent in Path(name).parents}, reverse=True):
            sync(inner)
    before()
    _replace(folder, facts, found)
    sync(folder.parent)  # the folder's own name


def amend(folder: Path, facts: Mapping[str, Any]) -> None:
    """Replace the facts of a committed folder, whose files stay: the new manifest takes the place of the old at once.

    Raises:
      UserError: the manifest is damaged.
      OSError: the new one can't be written; the old one stays.
    """
    _replace(folder, facts, _content(folder)["files"])


def read(folder: Path) -> dict[str, Any]:
    """The facts of a committed folder.

    Raises:
      UserError: there is no manifest, or it is damaged; names the file.
      OSError: a bucket does not answer.
    """
    return dict(_content(folder)["facts"])


def verify(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a committed folder, a line each, naming the file; [] where every byte is as it was written.

    Args:
      folder: with a manifest.
      part: verify this share of the files only: several processes split the work.
      parts: how many shares there are.

    Raises:
      OSError: a bucket does not answer, which says nothing of what is in it.
    """
    try:
        listed = _content(folder)["files"]
    except UserError as error:
        if isinstance(error, OSError):  # a bucket that may not be read
            raise
        return [str(error)] if part == 0 else []
    there = set(_files(folder))
    problems = [f"{name} is missing" for name in listed if name not in there]
    problems += [f"{name} was not there when it was written" for name in sorted(there - set(listed))]
    problems = problems if part == 0 else []
    # The largest first, in turns: so the shares are even.
    names = sorted(there & set(listed), key=lambda name: (-listed[name]["size"], name))[part::parts]
    with _threads(folder) as threads:
        return problems + [p for p in threads.map(lambda name: _problem(folder / name, name, listed[name]), names) if p]


def _threads(folder: Path) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(storage.threads(folder, THREADS))


def _problem(file: Path, name: str, listed: Mapping[str, Any]) -> str:
    try:
        if not storage.is_object(file) and not stat.S_ISREG(file.lstat().st_mode):
            return f"{name} is not a plain file any more"
        found = _described(file, durable=False)
    except OSError as error:
        if storage.is_object(file) and not isinstance(error, FileNotFoundError):
            raise
        return f"{name} can't be read: {error.strerror}"
    if found["size"] != listed["size"]:
        return f"{name} has {found['size']:,} bytes, {listed['size']:,} were written"
    return f"{name} is damaged: its SHA-256 is another one" if found["sha256"] != listed["sha256"] else ""


def _described(file: Path, *, durable: bool) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is forced to storage where `durable`."""
    if storage.is_object(file):
        return storage.objects(file).sha256()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        size = opened.tell()
        if durable:
            os.fsync(opened.fileno())
    return {"size": size, "sha256": digest}


def _files(folder: Path) -> list[str]:
    """All files below a folder, manifests aside: names with "/", in order."""
    if storage.is_object(folder):
        return [name for name in storage.objects(folder).below() if name != NAME]
    found = (Path(top, name).relative_to(folder).as_posix() for top, _, names in os.walk(folder) for name in names)
    return sorted(name for name in found if name not in (NAME, _new(NAME)))


def _new(name: str) -> str:
    return f"{name}.tmp"


def _replace(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    text = _text({"format": FORMAT, "facts": storable(facts), "files": files})
    if storage.is_object(folder):
        storage.objects(folder / NAME).write_text(text)
        return
    new = folder / _new(NAME)
    try:
        with new.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(folder / NAME)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync(folder)


def _text(content: Mapping[str, Any]) -> str:
    """The only way to write a manifest, with the SHA-256 of itself."""
    bare = json.dumps(content, indent=1)
    return json.dumps({**content, "sha256": hashlib.sha256(bare.encode()).hexdigest()}, indent=1) + "\n"


def _content(folder: Path) -> dict[str, Any]:
    file = folder / NAME
    try:
        text = file.read_bytes().decode("ascii")
        found = json.loads(text)
        same = _text({key: found[key] for key in ("format", "facts", "files")}) == text
    except FileNotFoundError as error:
        raise UserError(f"{NAME} is missing from {str(folder)!r}: it was never committed.") from error
    except OSError as error:
        if storage.is_object(file):
            raise
        raise UserError(f"{NAME} in {str(folder)!r} can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        same = False
    if not same:
        raise UserError(f"{NAME} in {str(folder)!r} is damaged: it does not have the SHA-256 that it names.")
    if found["format"] != FORMAT:
        raise UserError(f"{NAME} in {str(folder)!r} has format {found['format']!r}, which is newer: expected {FORMAT}.")
    return dict(found)
