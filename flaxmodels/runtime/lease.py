"""The lock of a workdir in a bucket: an object that its owner writes again and again, and that no two can write.

Each write names the generation that it takes the place of: of two that want the lock one gets it. An owner that stopped
renewing is dead, and whoever comes next waits only as long as it takes to see that. One that was only asleep, such as a
machine that was suspended, finds another's lock when it renews its own or is about to commit a step, and ends at once.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from flaxmodels import mirror, storage
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits
from flaxmodels.runtime.exits import FaultError

EVERY, DEAD = 5.0, 30.0  # seconds between two renewals; without one, till the owner counts as dead
LOOK = 1.0  # seconds between two looks at another's lock
_HELD = list["_Lease"]()  # by this process
_TOKENS = set[str]()  # of locks that this process holds, or is about to


@contextlib.contextmanager
def held(file: Path) -> Iterator[str]:
    """Hold the lock that is the object `file`.

    Yields:
      A line for the log.

    Raises:
      UserError: another process holds it; the message names it. Or the bucket can't be used.
      FaultError: the bucket does not answer, now or while it is held.
    """
    token = uuid.uuid4().hex
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "boot": _boot(), "token": token}
    data = json.dumps(owner).encode()
    _TOKENS.add(token)  # before the lock is there: another thread may look at it at once
    try:
        with answered(file.parent):
            generation = _taken(file, data)
        with _renewed(_Lease(file, data, generation)), answered(file.parent):
            yield f"lock: {file}, renewed every {EVERY:g} s, keeps out other runs"
    finally:
        _TOKENS.remove(token)


@contextlib.contextmanager
def _renewed(lease: "_Lease") -> Iterator[None]:
    """Renew a lock that is held, and let go of it at the end."""
    thread = threading.Thread(target=lease.keep, name="lock", daemon=True)
    thread.start()
    _HELD.append(lease)
    try:
        yield
    finally:
        lease.over.set()
        thread.join(DEAD)  # storage may not answer
        _HELD.remove(lease)
        with contextlib.suppress(OSError):
            storage.objects(lease.file).unlink(missing_ok=True, generation=lease.generation)


def confirm(workdir: Path) -> None:
    """End this process at once where another one has taken the lock that this one holds of a workdir.

    Raises:
      OSError: the bucket does not answer.
    """
    for lease in [*_HELD]:
        if lease.file.parent == workdir:
            lease.confirm()


@contextlib.contextmanager
def answered(workdir: Path) -> Iterator[None]:
    """Raises FaultError where the storage of a workdir in a bucket fails, in place of an OSError."""
    if not storage.is_object(workdir):
        yield
        return
    from flaxmodels.buckets import UnansweredError

    try:
        yield
    except UnansweredError as error:
        raise FaultError(f"{workdir}: {error.strerror}. When it does, the same command goes on.") from error


def _taken(file: Path, data: bytes) -> int:
    """Write the lock: the generation of it. Raises UserError where another process renews it."""
    there, generation = _read(file)
    deadline = time.monotonic() + DEAD + LOOK
    while generation and not _gone(there) and time.monotonic() < deadline:
        time.sleep(LOOK)
        before, (there, generation) = generation, _read(file)
        if generation not in (0, before):
            _refuse(file, there)
    try:
        return storage.objects(file).write_bytes(data, generation=generation)
    except FileExistsError:
        there, generation = _read(file)
        if there == data:  # the answer to our own first try was lost
            return generation
        _refuse(file, there)


def _read(file: Path) -> tuple[bytes, int]:
    """(the lock, its generation); (b"", 0) where there is none."""
    try:
        return storage.objects(file).read()
    except FileNotFoundError:
        return b"", 0


def _gone(there: bytes) -> bool:
    """Whether the owner ran here, and is dead."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(there)
        if (owner["host"], owner["boot"]) != (socket.gethostname(), _boot()):
            return False
        if int(owner["pid"]) == os.getpid():  # a container counts its processes anew
            return owner["token"] not in _TOKENS
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
    return False


def _boot() -> str:
    """Which start of which machine this is, and which container: where process numbers mean the same."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _refuse(file: Path, there: bytes) -> NoReturn:
    try:
        owner = json.loads(there)
        who = f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        who = "it has just started"
    raise UserError(
        f"--workdir={str(file.parent)!r} belongs to another running process: {who}. "
        "Wait for it, stop it, or choose another --workdir."
    )


class _Lease:
    """Writes the lock again and again, until it is over.

    Args:
      file: the lock.
      data: what stands in it.
      generation: that is there.
    """

    def __init__(self, file: Path, data: bytes, generation: int) -> None:
        self.file, self.data, self.generation = file, data, generation
        self.over = threading.Event()

    def keep(self) -> None:
        """Renew. Without storage the next time may work; but where another process has the lock, this one ends."""
        while not self.over.wait(EVERY):
            try:
                self.generation = storage.objects(self.file).write_bytes(self.data, generation=self.generation)
            except FileExistsError:
                self._lost()
            except OSError:
                continue

    def confirm(self) -> None:
        """Leave where the lock is another's. Raises OSError."""
        if _read(self.file)[0] not in (self.data, b""):
            self._leave()

    def _lost(self) -> None:
        with contextlib.suppress(OSError):
            there, generation = _read(self.file)
            if there in (self.data, b""):  # the answer to our own write was lost; or it was deleted by hand
                self.generation = generation
            else:
                self._leave()

    def _leave(self) -> None:
        mirror.forsake(self.file.parent)
        exits.leave(
            FaultError(
                f"{self.file} is another's: this process did not renew it for {DEAD:g} s, and another run took the "
                "workdir. Nothing more is written by this one."
            )
        )
