"""One run a workdir: two that write the same checkpoints would destroy each other silently.

The lock is the kernel's, which lets go when the process ends, however it ends, so it is never stale. Some file systems
have none, or one that other hosts don't see, such as a mounted bucket: there the owner renews a file besides, and an
owner that no longer does is dead. A workdir in a bucket has a lock of its own kind: see `lease`.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from flaxmodels import storage
from flaxmodels.registry import UserError
from flaxmodels.runtime import lease
from flaxmodels.runtime.exits import FaultError

LOCK = ".lock"  # JSON: who holds it
BEAT = ".lock_beat"  # renewed by its owner, where the kernel's lock is not enough; removed when it lets go
EVERY, DEAD = 1.0, 10.0  # seconds between two renewals; without one, till the owner counts as dead
SETTLED = 2.0  # seconds after which of two that begin at the same moment one is seen to have written last
MOUNTS = Path("/proc/self/mountinfo")
# File systems, and options of others, whose locks may hold on one host only.
LOCAL_TYPES = ("fuse", "9p", "virtiofs")
LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
# What a file system says that has no locks; and what says that storage fails, which is nobody's choice.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
FAILING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[str]:
    """Make `workdir` and hold it.

    A folder that this made, and into which no file was written before an error, is removed again.

    Yields:
      A line for the log where the kernel's lock does not reach other hosts, on what stands in; else "".

    Raises:
      UserError: the folder can't be written, or another process holds it; the message names it.
      FaultError: the storage failed.
    """
    if storage.is_object(workdir):
        with lease.held(workdir / LOCK) as line:
            yield line
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, file)
            held = _locked(file)
            if not os.fstat(file).st_nlink:
                raise BlockingIOError  # its owner failed, and removed the folder, since we opened it
            why = "has no locks" if not held else _local(workdir)
            if why:
                stack.enter_context(_renewed(workdir, held))
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now})
            os.ftruncate(file, 0)
            os.pwrite(file, owner.encode(), 0)
        except BlockingIOError as error:
            _refuse(workdir, error)
        except OSError as error:
            said = f"--workdir={str(workdir)!r} can't be written: {error.strerror}."
            raise FaultError(said) if error.errno in FAILING else UserError(f"{said} Choose another.") from error
        try:
            yield (
                f"lock: the file system of the workdir {why}; {BEAT}, renewed every {EVERY:g} s, keeps out other runs"
                * bool(why)
            )
        except BaseException:
            others = [entry for entry in workdir.iterdir() if entry.name not in (LOCK, BEAT)] if made else []
            if made and all(entry.is_dir() and not any(entry.iterdir()) for entry in others):
                for entry in others:
                    entry.rmdir()
                (workdir / BEAT).unlink(missing_ok=True)
                (workdir / LOCK).unlink()
                with contextlib.suppress(OSError):  # something else came to lie there
                    for folder in made:
                        folder.rmdir()
            raise


def _locked(file: int) -> bool:
    """Take the kernel's lock; False where the file system has none. Raises BlockingIOError where another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _local(workdir: Path) -> str:
    """Why a lock may hold on this host only, in words; "" where it reaches all, as far as Linux tells."""
    mounts = dict[Path, tuple[str, str]]()
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text().splitlines():
            left, _, right = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), left.split()[4])  # a space is \040
            kind, _, options = right.split(maxsplit=2)
            mounts[Path(point)] = kind, f"{left.split()[5]},{options}"
    whole = workdir.resolve()
    kind, options = next((mounts[folder] for folder in (whole, *whole.parents) if folder in mounts), ("", ""))
    if kind.startswith(LOCAL_TYPES) or LOCAL_OPTIONS & set(options.split(",")):
        return f"({kind}) may have locks that other hosts don't see"
    return ""


@contextlib.contextmanager
def _renewed(workdir: Path, held: bool) -> Iterator[None]:
    """Own `BEAT`, and renew it; removed at the end.

    Args:
      workdir: of the run.
      held: this process has the kernel's lock, so that no other one of this host lives.

    Raises:
      BlockingIOError: another process does so.
    """
    file, token, over = workdir / BEAT, uuid.uuid4().hex, threading.Event()
    before, deadline = _text(file), time.monotonic() + DEAD
    while before and not _gone(workdir, held) and time.monotonic() < deadline:
        time.sleep(EVERY / 4)
        if _text(file) not in ("", before):
            raise BlockingIOError
    file.write_text(token)
    time.sleep(SETTLED)
    if _text(file) != token:
        raise BlockingIOError

    def renew() -> None:
        count = 0
        while not over.wait(EVERY):
            count += 1
            with contextlib.suppress(OSError):  # the next one may work
                file.write_text(f"{token} {count}")

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEAD)  # storage may not answer
        with contextlib.suppress(OSError):
            file.unlink()


def _gone(workdir: Path, held: bool) -> bool:
    """Whether the last owner ran on this host and is dead."""
    try:
        owner = json.loads(_text(workdir / LOCK))
        if owner["host"] != socket.gethostname():
            return False
        if not held:
            os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return held


def _text(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return file.read_text()
    return ""


def _refuse(workdir: Path, error: OSError) -> NoReturn:
    try:
        owner = json.loads((workdir / LOCK).read_text())
        who = f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it took the lock a moment ago and has not written its name yet
        who = "it has just started"
    raise UserError(
        f"--workdir={str(workdir)!r} belongs to another running process: {who}. "
        "Wait for it, stop it, or choose another --workdir."
    ) from error
