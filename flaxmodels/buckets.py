"""A path in a bucket of Google Cloud Storage, with the few methods of `pathlib.Path` that a workdir needs.

A bucket has objects and no folders: one object is written whole or not at all, can't be appended to, and a name that
ends in "/" says nothing. What a listing or a read says is what was last written, by anyone. Everything here asks the
storage each time; Orbax, which is given the same paths, goes its own way, through `gcsfs` and TensorStore.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from etils.epath import gpath

from flaxmodels.registry import UserError

SCHEME = "gs://"
NEEDED = ("gcsfs", "google.cloud.storage")
# Requests at a time: each waits for the network, not for a core. urllib3 keeps ten connections.
THREADS = 8
TIMEOUT = (10.0, 60.0)  # seconds: to connect, and without a byte
PATIENCE, FIRST = 120.0, 1.0  # seconds for which a request that it has no time for is made again; of the first pause
# TensorFlow's own way to buckets would be taken wherever it is installed, and fails in other ways.
os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs would ask whether a bucket has folders, for which one more permission is needed. All serve objects the same.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


class BucketError(OSError, UserError):
    """A bucket that is not there, or that this account may not use, or no account at all: with the remedy."""

    def __str__(self) -> str:
        return str(self.strerror)


class UnansweredError(OSError):
    """The storage, or the way to it, fails: nobody's input is wrong, and the same may work later."""


class Objects(gpath.PosixGPath):
    """A path "gs://BUCKET/NAME": of one object, or of all objects whose names go on with "/" from there."""

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return str(self.parts[2])

    @property
    def key(self) -> str:
        """The name inside the bucket; "" of the bucket itself."""
        return "/".join(self.parts[3:])

    @property
    def _inside(self) -> str:
        return f"{self.key}/" if self.key else ""

    def absolute(self) -> Self:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Itself: there are no links."""
        return self

    def expanduser(self) -> Self:
        """Itself."""
        return self

    def is_absolute(self) -> bool:
        """Always."""
        return True

    def exists(self) -> bool:
        """Whether there is such an object, or any below."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return bool(self.key) and _ask(self, lambda: _blob(self).exists(retry=_retry(), timeout=TIMEOUT))

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        return bool(_listed(self, prefix=self._inside, max_results=1)[0])

    def iterdir(self) -> Iterator[Self]:
        """What is right below: objects, and what more objects begin with."""
        blobs, prefixes = _listed(self, prefix=self._inside, delimiter="/")
        names = {name.removeprefix(self._inside).rstrip("/") for name in (*(blob.name for blob in blobs), *prefixes)}
        yield from (self / name for name in sorted(names - {""}))

    def glob(self, pattern: str) -> Iterator[Self]:
        """The objects, in order, that a pattern of `*` and `**` names; of folders none."""
        for blob in _listed(self, prefix=self._inside, match_glob=f"{self._inside}{pattern}")[0]:
            yield self / blob.name.removeprefix(self._inside)

    def below(self) -> dict[str, Any]:
        """Name -> what the storage says of it (`size`, `updated`, `generation`), of all objects below, in order."""
        blobs = _listed(self, prefix=self._inside)[0]
        return {name: blob for blob in blobs if (name := blob.name.removeprefix(self._inside)) and name[-1] != "/"}

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def stat(self) -> Any:
        """Size and time (`st_size`, `st_mtime`) of the object. Raises FileNotFoundError."""
        blob = _ask(self, lambda: _client().bucket(self.bucket).get_blob(self.key, retry=_retry(), timeout=TIMEOUT))
        if blob is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return os.stat_result((0, 0, 0, 0, 0, 0, blob.size, 0, blob.updated.timestamp(), 0))

    def read_bytes(self) -> bytes:
        """The object. Raises FileNotFoundError."""
        return self.read()[0]

    def read(self) -> tuple[bytes, int]:
        """(the object, its generation). Raises FileNotFoundError."""
        blob = _blob(self)
        data = _ask(self, lambda: blob.download_as_bytes(retry=_retry(), timeout=TIMEOUT))
        return bytes(data), int(blob.generation or 0)

    def read_text(self, encoding: str | None = None) -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes, generation: int | None = None) -> int:
        """Put the object in the place of what is there, at once.

        Args:
          data: whole.
          generation: only where this is the generation of what is there; 0 only where nothing is.

        Returns:
          Its generation.

        Raises:
          FileExistsError: another generation is there.
        """
        blob, given = _blob(self), {} if generation is None else {"if_generation_match": generation}
        upload = functools.partial(blob.upload_from_string, data, "application/octet-stream", checksum="auto")
        _ask(self, lambda: upload(retry=_retry(), timeout=TIMEOUT, **given))
        return int(blob.generation)

    def write_text(self, text: str, encoding: str | None = None, errors: str | None = None) -> int:
        """`write_bytes` of text."""
        return self.write_bytes(text.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        """Delete the object, only of that generation where one is named.

        Raises:
          FileNotFoundError: there is none, unless that is fine.
          FileExistsError: it has another generation.
        """
        given = {} if generation is None else {"if_generation_match": generation}
        try:
            _ask(self, lambda: _blob(self).delete(retry=_retry(), timeout=TIMEOUT, **given))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def copy_to(self, other: "Objects") -> None:
        """Copy the object; its bytes stay inside the storage."""
        to, token = _blob(other), None
        while True:
            step = functools.partial(to.rewrite, _blob(self), token=token, retry=_retry(), timeout=TIMEOUT)
            token = _ask(self, step)[0]
            if token is None:
                return

    def sha256(self) -> dict[str, Any]:
        """{"size", "sha256"} of the object, which is read as it lies there. Raises FileNotFoundError."""
        blob, digest = _blob(self), _Digest()
        read = functools.partial(blob.download_to_file, digest, raw_download=True, checksum="auto")
        _ask(self, lambda: read(retry=_retry(), timeout=TIMEOUT))
        return {"size": digest.size, "sha256": digest.hash.hexdigest()}


class _Digest:
    """A file that only remembers the SHA-256 of what is written to it."""

    def __init__(self) -> None:
        self.hash, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return len(data)


def all_of(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, several at a time; raises what the first of them raised."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, items))


def _blob(path: Objects) -> Any:
    return _client().bucket(path.bucket).blob(path.key)


def _listed(path: Objects, **asked: Any) -> tuple[list[Any], list[str]]:
    """(objects, prefixes) of a listing."""

    def ask() -> tuple[list[Any], list[str]]:
        found = _client().list_blobs(path.bucket, retry=_retry(), timeout=TIMEOUT, **asked)
        return list(found), sorted(found.prefixes)

    return _ask(path, ask)


@functools.cache
def _retry() -> Any:
    """When to ask again: after what the storage says when it is busy, and where the network broke."""
    from google.cloud.storage import retry

    return retry.DEFAULT_RETRY.with_timeout(PATIENCE).with_delay(initial=FIRST)


@functools.cache
def _client() -> Any:
    """Google's client. Raises UserError: what it needs is not installed; BucketError: nobody says who we are."""
    if missing := [name for name in NEEDED if not _there(name)]:
        raise UserError(f"a workdir on {SCHEME} needs {missing[0]}, which is not installed: pip install -e '.[gcs]'")
    import fsspec
    import google.auth
    from gcsfs import core
    from google.auth import credentials
    from google.cloud import storage

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also prints each error that it raises
    # What gcsfs remembers of a folder would be what it held before another process wrote to it.
    for name in ("gcs", "gs"):
        fsspec.register_implementation(name, core.GCSFileSystem, clobber=True)
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client("none", credentials.AnonymousCredentials())
    try:
        found, project = google.auth.default(["https://www.googleapis.com/auth/devstorage.full_control"])
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise BucketError(
            errno.EACCES,
            "there are no Google credentials here. On your own machine: gcloud auth application-default login. On a "
            "Cloud TPU VM or in a pod: give it a service account that may use the bucket.",
        ) from error
    return storage.Client(project or "none", found)


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _ask(path: Objects, ask: Callable[[], Any]) -> Any:
    """`ask()`, with what can go wrong as an OSError that says so in a few words."""
    with _as_oserror(path):
        return ask()


@contextlib.contextmanager
def _as_oserror(path: Objects) -> Iterator[None]:
    client = _client()  # before the imports: it says what is missing
    import google.auth.exceptions
    import requests
    from google.api_core import exceptions
    from google.cloud.storage import exceptions as storage

    del client
    where = f"{SCHEME}{path.bucket}"
    try:
        yield
    except exceptions.NotFound as error:
        if "bucket does not exist" in str(error.message) or not path.key:
            raise BucketError(
                errno.ENOENT,
                f"the bucket {where} does not exist. Check its name, or make it: gcloud storage buckets create {where} "
                "--location=REGION, in the region of the machines",
                str(path),
            ) from error
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise BucketError(
            errno.EACCES,
            f"this account may not do that in {where} ({_brief(error)}). Let it: gcloud storage buckets "
            f"add-iam-policy-binding {where} --member=serviceAccount:ACCOUNT --role=roles/storage.objectUser",
            str(path),
        ) from error
    except exceptions.PreconditionFailed as error:
        raise FileExistsError(errno.EEXIST, "another process wrote it meanwhile", str(path)) from error
    except (
        exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, requests.RequestException,
        storage.InvalidResponse, storage.DataCorruption,
    ) as error:  # fmt: skip
        said = f"{where} does not answer as it should: {_brief(error)}"
        raise UnansweredError(errno.EIO, said, str(path)) from error


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
