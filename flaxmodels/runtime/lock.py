"""One run a workdir: two that write the same checkpoints would destroy each other silently."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from flaxmodels.registry import UserError

LOCK = ".lock"  # JSON: who holds it


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Make `workdir` and hold it. The kernel lets go when the process ends, however it ends, so no lock is ever stale.

    A folder that this made, and into which nothing was written before an error, is removed again.

    Raises:
      UserError: the folder can't be written, or another process holds it; the message names it.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"--workdir={str(workdir)!r} can't be written: {error.strerror}. Choose another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # its owner failed, and removed the folder, since we opened it
        except BlockingIOError as error:
            raise UserError(
                f"--workdir={str(workdir)!r} belongs to another running process: {_owner(workdir)}. "
                "Wait for it, stop it, or choose another --workdir."
            ) from error
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
        file.flush()
        try:
            yield
        except BaseException:
            if made and [entry.name for entry in workdir.iterdir()] == [LOCK]:
                (workdir / LOCK).unlink()
                with contextlib.suppress(OSError):  # something else came to lie there
                    for folder in made:
                        folder.rmdir()
            raise


def _owner(workdir: Path) -> str:
    try:
        owner = json.loads((workdir / LOCK).read_text())
        return f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it took the lock a moment ago and has not written its name yet
        return "it has just started"
