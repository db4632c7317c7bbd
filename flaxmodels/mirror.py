"""Files that a run appends to, where its workdir is in a bucket, which knows no appending.

They are kept in a local folder, and what has changed of them is copied to the bucket from there: now and then, at the
end, and before a checkpoint is committed, so that no line of the log before a committed step is lost. The bucket is the
truth: a process takes from there what it goes on with, and never what another one left on this machine.
"""

import atexit
import contextlib
import hashlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flaxmodels import storage

EVERY = 15.0  # seconds between two copies; ten times as long as the last one took, where that is more
SOON = 2.0  # seconds till the first
# What process 0 reads again when a run goes on.
CONTINUED = ("metrics.jsonl", "samples.jsonl", "goodput.jsonl")
_OPEN: dict[str, "_Mirror"] = {}


def local(workdir: Path, process: int = 0) -> Path:
    """Where this process keeps the files that it appends to: the workdir, or a folder of this machine. It need not be
    there: see `folder`.

    Args:
      workdir: of the run.
      process: number of this process in the run; several may share a machine.
    """
    return _local(workdir, f"{process}.{os.getpid()}") if storage.is_object(workdir) else workdir


def folder(workdir: Path, process: int = 0, continued: Sequence[str] = ()) -> Path:
    """`local`, made; from now on, to the end of this process, what is written there is copied to the bucket.

    Args:
      workdir: of the run.
      process: number of this process in the run.
      continued: files that are to be there as they are in the bucket.

    Raises:
      OSError: the bucket can't be read, or the folder not be made.
    """
    if not storage.is_object(workdir):
        return workdir
    if (mirror := _OPEN.get(str(workdir))) is None:
        where = local(workdir, process)
        _forget(where.parent)
        where.mkdir(parents=True, exist_ok=True)
        mirror = _OPEN[str(workdir)] = _Mirror(workdir, where)
        threading.Thread(target=mirror.keep, name="mirror", daemon=True).start()
        atexit.register(mirror.last)
    mirror.fetch(continued)
    return mirror.where


@contextlib.contextmanager
def kept(workdir: Path, process: int = 0) -> Iterator[Path]:
    """`folder` for a run, whose lock process 0 holds; at the end all of it is in the bucket."""
    where = folder(workdir, process, () if process else CONTINUED)
    try:
        yield where
    finally:
        if (mirror := _OPEN.get(str(workdir))) is not None:
            mirror.last()


def remote(file: Path) -> Path:
    """Where in a bucket a file is copied to, for who is told of it; itself, where it is not copied."""
    for mirror in _OPEN.values():
        if file.is_relative_to(mirror.where):
            return mirror.workdir / file.relative_to(mirror.where)
    return file


def flush(workdir: Path) -> None:
    """Copy what has changed now, where this process keeps files of that workdir elsewhere. Raises OSError."""
    if (mirror := _OPEN.get(str(workdir))) is not None:
        mirror.push()


def forsake(workdir: Path) -> None:
    """Copy nothing more to a workdir that another run has taken: what this process has would replace newer files."""
    if (mirror := _OPEN.pop(str(workdir), None)) is not None:
        mirror.over.set()
        shutil.rmtree(mirror.where, ignore_errors=True)


def rescue(workdir: Path, pid: int, last: Callable[[Path], None]) -> None:
    """Copy what a process of this machine left, which was killed before it could. Raises OSError.

    Args:
      workdir: of the run.
      pid: of the process, which has ended.
      last: called with its folder, to write there what the process could not.
    """
    if not storage.is_object(workdir):
        last(workdir)
        return
    for where in sorted(_local(workdir, "").glob(f"*.{pid}")):
        last(where)
        _Mirror(workdir, where).push()


def _local(workdir: Path, name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
    return cache / "flaxmodels" / "workdirs" / digest / socket.gethostname() / name


def _forget(parent: Path) -> None:
    """Delete the folders of processes that are no more."""
    for old in parent.glob("*.*"):
        number = old.name.rpartition(".")[2]
        if number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                shutil.rmtree(old, ignore_errors=True)
            except OSError:
                continue


class _Mirror:
    """Copies what has changed in a local folder.

    Args:
      workdir: in a bucket.
      where: the folder.
    """

    def __init__(self, workdir: Path, where: Path) -> None:
        self.workdir, self.where = workdir, where
        self.over = threading.Event()
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.RLock()
        self._told = False

    def fetch(self, names: Sequence[str]) -> None:
        """Make files what they are in the bucket. Raises OSError."""
        with self._lock:
            for name in names:
                file = self.where / name
                try:
                    data = (self.workdir / name).read_bytes()
                except FileNotFoundError:
                    file.unlink(missing_ok=True)
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                self._copied[name] = _stamp(file)

    def push(self) -> None:
        """Copy all that has changed since the last time. Raises OSError."""
        with self._lock:
            for name in self._names():
                with contextlib.suppress(FileNotFoundError):  # it has gone since
                    stamp = _stamp(self.where / name)  # before it is read, so that nothing is missed
                    if self._copied.get(name) != stamp:
                        (self.workdir / name).write_bytes((self.where / name).read_bytes())
                        self._copied[name] = stamp

    def keep(self) -> None:
        """Copy now and then, till it is over."""
        pause = SOON
        while not self.over.wait(pause):
            begun = time.monotonic()
            self._try("they are copied there when it answers again")
            pause = max(EVERY, 10 * (time.monotonic() - begun))

    def last(self) -> None:
        """Copy at an end, and say so where that is not possible."""
        self._told = False
        self._try(f"they are in {self.where}")

    def _try(self, then: str) -> None:
        try:
            self.push()
            self._told = False
        except OSError as error:
            if not self._told:
                said = f"warning: lines of the log are not in {self.workdir} yet: {error.strerror}; {then}"
                print(said, file=sys.stderr, flush=True)
            self._told = True

    def _names(self) -> list[str]:
        files = (Path(top, name) for top, _, names in os.walk(self.where) for name in names)
        return sorted(file.relative_to(self.where).as_posix() for file in files if file.suffix != ".tmp")


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file does: size and time."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns
