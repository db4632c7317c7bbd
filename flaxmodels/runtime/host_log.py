"""What each process of a run prints, in a file of its own: WORKDIR/logs/host-0003.log, every line with its time (UTC).

What goes through Python's `sys.stdout` and `sys.stderr`: lines, warnings, errors, tracebacks, and where all threads
stood when a watchdog ended the process. What C++ writes straight to the terminal is not there. Starts are appended;
nothing here ever stops training: what there is no room for is left out, and counted.
"""

import atexit
import contextlib
import datetime
import faulthandler
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from flaxmodels import mirror, storage
from flaxmodels.runtime import exits

FOLDER = "logs"
MOST = 16 * 2**20  # bytes of a file; then it becomes ".old.log", in place of the one before
LONGEST = 2**16  # characters of a line, above which it is broken
PAUSE = 5.0  # seconds till a file that could not be written is tried again
LAST = 10.0  # seconds to copy it to a bucket, where the process ends at once
# What moves the cursor and colours text. A carriage return starts the line anew, as a live line does.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def path(folder: Path, process: int) -> Path:
    """The log of a process, in the folder of its run on this machine."""
    return folder / FOLDER / f"host-{process:04}.log"


class HostLog:
    """The end of one log, which takes lines from any thread, and never raises OSError.

    Args:
      file: made with its folder when the first line comes; a longer one than `MOST` becomes `old`.

    Attributes:
      old: where the lines before these are.
      lost: bytes that there was no room for, since the last line that there was.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.old, self.lost = file, file.with_suffix(".old.log"), 0
        self.turn = threading.RLock()  # a signal's handler prints, too
        self._number: int | None = None
        self._size, self._next = 0, 0.0

    def write(self, lines: Iterable[str]) -> None:
        """Append lines, each with the time of now."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = "".join(f"{now} {line}\n" for line in lines)
        with self.turn:
            self._append(text.encode("utf-8", "backslashreplace"))

    def stacks(self) -> None:
        """Append where every thread of this process stands."""
        self.write(["where all threads stand:"])
        with self.turn, contextlib.suppress(OSError):
            if self._number is not None:
                faulthandler.dump_traceback(self._number, all_threads=True)

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        with self.turn:
            number, self._number = self._number, None
            if number is not None:
                with contextlib.suppress(OSError):
                    os.close(number)

    def _append(self, data: bytes) -> None:
        if time.monotonic() < self._next:  # else each line of a full disk would wait for the disk
            self.lost += len(data)
            return
        if self.lost:
            data = f"... {self.lost:,} bytes are missing here: there was no room for them\n".encode() + data
        try:
            number = self._opened()
            left = data
            while left:  # a nearly full disk takes a part
                left = left[os.write(number, left) :]
            self._size, self.lost = self._size + len(data), 0
        except OSError:
            self.close()
            self.lost, self._next = self.lost + len(data), time.monotonic() + PAUSE

    def _opened(self) -> int:
        if self._number is not None and self._size > MOST:
            self.close()
            self.file.replace(self.old)
        if self._number is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._number = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._size = os.fstat(self._number).st_size
        return self._number


class Copied:
    """A stream that also writes its lines to a log; all else is the stream's own.

    Args:
      stream: such as `sys.stdout`.
      log: of this process.
    """

    def __init__(self, stream: TextIO, log: HostLog) -> None:
        self._stream, self._log, self._begun = stream, log, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream, and whole lines to the log, which comes first: the stream may raise."""
        with self._log.turn:
            *lines, self._begun = (self._begun + text).split("\n")
            while len(self._begun) > LONGEST:
                lines.append(self._begun[:LONGEST])
                self._begun = self._begun[LONGEST:]
            if lines:
                self._log.write(map(plain, lines))
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`, of each."""
        for line in lines:
            self.write(line)

    def rest(self) -> None:
        """Write what is left of a line to the log."""
        with self._log.turn:
            begun, self._begun = plain(self._begun), ""
            if begun:
                self._log.write([begun])


def plain(line: str) -> str:
    """A line without what moves the cursor or colours: what a reader of the terminal would have seen of it last."""
    return _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]


_current: HostLog | None = None


def current() -> HostLog | None:
    """The log of this process, if it keeps one."""
    return _current


def keep(workdir: Path, process: int, processes: int) -> HostLog:
    """From now on, to the end of this process, write what it prints to its log, too.

    Not a context manager: the last words of a command come when all that it opened is closed.

    Args:
      workdir: of the run. Of one in a bucket, the log is in `mirror.folder`, which is copied there.
      process: the number of this one.
      processes: how many the run has.

    Raises:
      OSError: the bucket can't be read.
    """
    global _current
    folder = mirror.folder(workdir, process, [path(Path(), process).as_posix()])
    _current = log = HostLog(path(folder, process))
    copies = [Copied(stream, log) for stream in (sys.stdout, sys.stderr)]
    sys.stdout, sys.stderr = (cast(TextIO, copy) for copy in copies)
    words = shlex.join([*map(os.path.basename, sys.argv[:1]), *sys.argv[1:]])
    log.write([f"=== process {process} of {processes}, {socket.gethostname()}, pid {os.getpid()}: {words}"])

    def end() -> None:
        for copy in copies:
            copy.rest()
        log.write(["=== ends"])

    def end_at_once() -> None:
        end()
        mirror.flush(workdir)

    exits.before_end(end_at_once, LAST if storage.is_object(workdir) else 0.0)
    atexit.register(end)  # after which the mirror copies what there is
    return log


def _forked() -> None:
    """In a child that other code forked, another thread may have held the lock."""
    if _current is not None:
        _current.turn = threading.RLock()


os.register_at_fork(after_in_child=_forked)
