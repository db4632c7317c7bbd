"""Google Cloud Storage's JSON API on this machine, in memory, with faults that a test plants.

    with fake_gcs.serving("bucket") as cloud:
        subprocess.run(command, env={**os.environ, **cloud.environment()})
        cloud.objects("bucket")  # name -> bytes

What clients use of https://cloud.google.com/storage/docs/json_api/v1: listing by prefix, delimiter and glob in pages;
reads of ranges; simple, multipart and resumable uploads; rewriting; deleting, in batches too; and preconditions on
generations. An object is there whole or not at all, as there.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import re
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

PAGE = 100  # objects of one answer to a listing: small, so that tests meet several


@dataclasses.dataclass(frozen=True)
class Stored:
    """One object."""

    data: bytes
    generation: int
    updated: float


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests: with the first `times` whose "METHOD KIND NAME" the pattern is found in.

    KIND is bucket, read, stat, list, write, delete or copy. `what` is an HTTP status; "cut": the connection is closed
    without an answer, and nothing is done; "half": and within an answer; "slow": an answer after `seconds`.
    """

    pattern: str
    what: int | str
    times: int = 10**9
    seconds: float = 0.0


class Cloud:
    """The buckets, and what was asked of them.

    Attributes:
      url: where it listens.
      faults: planted by tests.
      requests: "METHOD KIND NAME" of each request.
      page: objects of one answer to a listing.
    """

    def __init__(self, buckets: Sequence[str]) -> None:
        self.url = ""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.page = PAGE
        self._stored: dict[str, dict[str, Stored]] = {bucket: {} for bucket in buckets}
        self._uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self._generation = time.time_ns() // 1000
        self._lock = threading.RLock()

    def environment(self) -> dict[str, str]:
        """What sends clients here: Google's own, fsspec's and TensorStore's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",
        }

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Name -> bytes of what is there, in order."""
        with self._lock:
            return {name: one.data for name, one in sorted(self._stored[bucket].items()) if name.startswith(prefix)}

    def put(self, bucket: str, name: str, data: bytes) -> Stored:
        """Store an object, as anyone with access may."""
        with self._lock:
            self._generation += 1
            self._stored[bucket][name] = Stored(data, self._generation, time.time())
            return self._stored[bucket][name]

    def delete(self, bucket: str, name: str) -> None:
        """Delete an object."""
        with self._lock:
            del self._stored[bucket][name]

    def named(self, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> str:
        """The object, or the prefix, that a request is about."""
        inside = path.partition("/o/")[2].partition("/rewriteTo/")[0].partition("/copyTo/")[0]
        found = urllib.parse.unquote(inside) or query.get("name") or query.get("prefix") or query.get("matchGlob", "")
        if found or not path.startswith("/upload/"):
            return found
        if "upload_id" in query:
            return self._uploads[query["upload_id"]][1]
        facts = _parts(body, headers["content-type"])[0] if query.get("uploadType") == "multipart" else body
        return str(json.loads(facts)["name"])

    def struck(self, request: str) -> Fault | None:
        """Write a request down; the fault that it meets, if one is planted."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> Any:
        """(status, headers, body) of one request."""
        with self._lock:
            return self._answer(method, path, query, headers, body)

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/(.+))?)?)?", path)
        if found is None:
            return _failed(404, f"no such method: {path}")
        kind, bucket, name = found[1] or "", found[2], urllib.parse.unquote(found[3] or "")
        if bucket not in self._stored:
            return _failed(404, "The specified bucket does not exist.")
        stored = self._stored[bucket]
        if kind == "upload/":
            return self._upload(method, bucket, query, headers, body)
        if not path.partition(f"/b/{bucket}")[2]:
            return _said({"kind": "storage#bucket", "name": bucket, "location": "US", "storageClass": "STANDARD"})
        if not name:
            return self._list(bucket, query)
        if found[4]:
            return self._copy(bucket, name, found[4], query)
        one = stored.get(name)
        if (refused := _refused(one, query, reading=method == "GET")) is not None:
            return refused
        if one is None:
            return _failed(404, f"No such object: {bucket}/{name}")
        if method == "DELETE":
            del stored[name]
            return 204, {}, b""
        return _read(one, headers) if query.get("alt") == "media" else _said(_described(bucket, name, one))

    def _list(self, bucket: str, query: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        glob = re.compile(_pattern(query["matchGlob"])) if "matchGlob" in query else None
        after, low, high = query.get("pageToken", ""), query.get("startOffset", ""), query.get("endOffset")
        items: dict[str, Stored | None] = {}
        for name, one in sorted(self._stored[bucket].items()):
            if not name.startswith(prefix) or name < low or (high and name >= high):
                continue
            if glob is not None and not glob.fullmatch(name):
                continue
            inner, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            key = prefix + inner + cut if cut else name
            items.setdefault(key, None if cut else one)
        keys = [key for key in items if key > after]
        most = min(int(query.get("maxResults", 1000)), self.page)
        shown = keys[:most]
        content: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [_described(bucket, key, one) for key in shown if (one := items[key]) is not None],
            "prefixes": [key for key in shown if items[key] is None],
        }
        if len(keys) > most:
            content["nextPageToken"] = shown[-1]
        return _said(content)

    def _copy(self, bucket: str, name: str, rest: str, query: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        verb, _, bucket_to, _, name_to = rest.split("/")
        one, to = self._stored[bucket].get(name), urllib.parse.unquote(name_to)
        if one is None or bucket_to not in self._stored:
            return _failed(404, f"No such object: {bucket}/{name}")
        if (refused := _refused(self._stored[bucket_to].get(to), query)) is not None:
            return refused
        made = _described(bucket_to, to, self.put(bucket_to, to, one.data))
        size = str(len(one.data))
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return _said(made if verb == "copyTo" else {**done, "resource": made})

    def _upload(
        self, method: str, bucket: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        kind = query.get("uploadType", "media")
        if "upload_id" in query:
            return self._go_on(query["upload_id"], headers, body)
        if kind == "resumable":
            told = json.loads(body or b"{}")
            token = uuid.uuid4().hex
            self._uploads[token] = (bucket, query.get("name") or told["name"], dict(query), bytearray())
            where = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={token}"
            return 200, {"Location": where}, b""
        if kind == "multipart":
            facts, data = _parts(body, headers["content-type"])[:2]
            return self._store(bucket, query.get("name") or json.loads(facts)["name"], query, data)
        return self._store(bucket, query["name"], query, body)

    def _go_on(self, token: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        bucket, name, query, got = self._uploads[token]
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("content-range", "bytes 0-0/*"))
        assert found is not None, headers
        if "content-range" not in headers:
            got[:] = body
        elif found[1] is not None:
            got[int(found[1]) :] = body
        if "content-range" in headers and (found[3] == "*" or len(got) < int(found[3])):
            return 308, {"Range": f"bytes=0-{len(got) - 1}"} if got else {}, b""
        return self._store(bucket, name, query, bytes(got))

    def _store(
        self, bucket: str, name: str, query: Mapping[str, str], data: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if (refused := _refused(self._stored[bucket].get(name), query)) is not None:
            return refused
        return _said(_described(bucket, name, self.put(bucket, name, data)))


def _refused(
    one: Stored | None, query: Mapping[str, str], *, reading: bool = False
) -> tuple[int, dict[str, str], bytes] | None:
    now = 0 if one is None else one.generation
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
        return _failed(412, "At least one of the pre-conditions you specified did not hold.")
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
        return (304, {}, b"") if reading else _failed(412, "At least one of the pre-conditions did not hold.")
    return None


def _described(bucket: str, name: str, one: Stored) -> dict[str, Any]:
    stamp = datetime.datetime.fromtimestamp(one.updated, datetime.UTC).isoformat().replace("+00:00", "Z")
    return {
        "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(one.data)), "metageneration": "1",
        "generation": str(one.generation), "updated": stamp, "timeCreated": stamp, "storageClass": "STANDARD",
        "contentType": "application/octet-stream", **_sums(one.data),
    }  # fmt: skip


def _sums(data: bytes) -> dict[str, str]:
    import google_crc32c  # of the extra gcs, as all that comes here

    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    found = {"crc32c": google_crc32c.Checksum(data).digest(), "md5Hash": md5}
    return {name: base64.b64encode(digest).decode() for name, digest in found.items()}


def _read(one: Stored, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
    size = len(one.data)
    sums = ",".join(f"{name.removesuffix('Hash')}={value}" for name, value in _sums(one.data).items())
    facts = {"X-Goog-Generation": str(one.generation), "X-Goog-Hash": sums}
    facts |= {"Content-Type": "application/octet-stream", "X-Goog-Stored-Content-Length": str(size)}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
    if found is None:
        return 200, facts, one.data
    first = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
    if first >= size:
        return 416, {"Content-Range": f"bytes */{size}"}, b""
    return 206, {**facts, "Content-Range": f"bytes {first}-{last}/{size}"}, one.data[first : last + 1]


def _said(content: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(content).encode()


def _failed(code: int, message: str) -> tuple[int, dict[str, str], bytes]:
    error = {"code": code, "message": message, "errors": [{"message": message}]}
    return code, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps({"error": error}).encode()


def _pattern(glob: str) -> str:
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", glob))


def _parts(body: bytes, kind: str) -> list[bytes]:
    """The contents of a multipart body."""
    boundary = re.search(r'boundary="?([^";]+)"?', kind)
    assert boundary is not None, kind
    parts = body.split(b"--" + boundary[1].encode())[1:-1]
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r") for part in parts]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    cloud: Cloud

    def serve(self) -> None:
        """Answer one request, of any method."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        headers = {key.lower(): value for key, value in self.headers.items()}
        size = int(headers.get("content-length", 0))
        body = self._chunks() if headers.get("transfer-encoding") == "chunked" else self.rfile.read(size)
        name = self.cloud.named(url.path, query, headers, body)
        fault = self.cloud.struck(f"{self.command} {_kind(self.command, url.path, query)} {name}")
        if fault is not None and fault.what == "cut":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault is not None and fault.what == "slow":
            time.sleep(fault.seconds)
        if fault is not None and isinstance(fault.what, int):
            answer = _failed(fault.what, HTTPStatus(fault.what).phrase)
        elif url.path.startswith("/batch/"):
            answer = self._batch(headers["content-type"], body)
        else:
            answer = self.cloud.answer(self.command, url.path, query, headers, body)
        self._send(*answer, cut=fault is not None and fault.what == "half")

    def _chunks(self) -> bytes:
        found = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(found)

    def _batch(self, kind: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        answers = []
        for part in _parts(body, kind):
            method, path, *_ = part.decode().split()
            url = urllib.parse.urlsplit(path)
            query = dict(urllib.parse.parse_qsl(url.query))
            name = self.cloud.named(url.path, query, {}, b"")
            fault = self.cloud.struck(f"{method} {_kind(method, url.path, query)} {name}")
            code, headers, said = (
                _failed(fault.what, "planted")
                if fault is not None and isinstance(fault.what, int)
                else self.cloud.answer(method, url.path, query, {}, b"")
            )
            lines = [f"HTTP/1.1 {code} {HTTPStatus(code).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
            answers.append("\r\n".join(["--part", "Content-Type: application/http", "", *lines, "", said.decode()]))
        return 200, {"Content-Type": "multipart/mixed; boundary=part"}, "\r\n".join([*answers, "--part--", ""]).encode()

    def _send(self, code: int, headers: Mapping[str, str], body: bytes, *, cut: bool) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # a client that was killed
            super().handle_one_request()
            return
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def _kind(method: str, path: str, query: Mapping[str, str]) -> str:
    if method == "GET" and re.search("/b/[^/]+$", path):
        return "bucket"
    if method == "GET":
        return "read" if query.get("alt") == "media" else "stat" if "/o/" in path else "list"
    if method == "DELETE":
        return "delete"
    return "copy" if "/rewriteTo/" in path or "/copyTo/" in path else "write"


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[Cloud]:
    """A cloud with these buckets, till the end of the block."""
    cloud = Cloud(buckets)
    verbs = {f"do_{verb}": _Handler.serve for verb in ("GET", "POST", "PUT", "DELETE")}
    handler = type("Handler", (_Handler,), {"cloud": cloud, **verbs})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        cloud.url = f"http://localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield cloud
        finally:
            server.shutdown()
            thread.join()
