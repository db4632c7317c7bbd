"""Batches made ahead of need, by threads of this process or by worker processes, and always in order.

Threads are Grain's. Its worker processes (`mp_prefetch`, Grain 0.2.18) are not used: one that hangs, is stopped, or
exits with 0 is waited for without end, in a wait that nothing can interrupt; and when the main process is killed they
live on, and so do their named blocks of shared memory. Here the kernel ends a worker with the process that started it,
and batches travel in memory that has no name, so that nothing can stay behind. A worker runs Grain's threads in turn.

Read `stream` first.
"""

import atexit
import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import jax
import numpy as np

from flaxmodels.data.threads import SLOW, Loading, LoadingError, bounded, threaded, within
from flaxmodels.registry import UserError

__all__ = ["Loading", "LoadingError", "stream"]

# How the name of a worker process begins.
WORKER = "Data worker"
# Seconds that a worker process may take to start, at the least: it imports JAX, Grain and the user's script first.
START = 60.0
# Seconds in which the kernel ends a killed process, unless it waits for a disk.
KILLED = 5.0
# Bytes of the longest message of a worker, which describes a batch or an error; characters of an error in it.
MESSAGE, TEXT = 2**17, 10_000
# From Linux's sys/prctl.h.
PR_SET_PDEATHSIG = 1
# Streams to close at exit, in order, while all of Python is still there.
_OPEN: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


def stream(make: Callable[[int], Any], numbers: range, loading: Loading) -> Generator[Any]:
    """`map(make, numbers)`, in order, made ahead of need. Closing it early ends all threads and processes of it.

    Args:
      make: number -> numpy arrays in a dict, or in dicts of dicts. Thread-safe. For worker processes it can be pickled,
        and what it does with JAX runs on the CPU there.
      numbers: of the batches.
      loading: by whom.

    Raises:
      LoadingError: no batch came within the time; or a worker process ended, was killed, or failed.
      UserError: as `make` raised it; or worker processes can't be started with this `make`, or on this system.
    """
    made = _processes(make, numbers, loading) if loading.workers else _in_threads(make, numbers, loading)
    _OPEN.add(made)
    return made


@atexit.register
def _close() -> None:
    for made in list(_OPEN):
        with contextlib.suppress(ValueError):  # a daemon thread is in it
            made.close()


def _in_threads(make: Callable[[int], Any], numbers: range, loading: Loading) -> Generator[Any]:
    with bounded(make, loading.timeout) as call, threaded(call, numbers, loading.threads, loading.ahead) as made:
        yield from made


def _processes(make: Callable[[int], Any], numbers: range, loading: Loading) -> Generator[Any]:
    """Batch i is made by worker i modulo their number."""
    if sys.platform != "linux":
        raise UserError(f"data.workers={loading.workers} needs Linux. data.workers=0 reads in threads, on any system.")
    count = min(loading.workers, len(numbers))
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_worker(f"{WORKER} {i} of {count}", make, numbers[i::count], loading))
            for i in range(count)
        ]
        for i in range(len(numbers)):
            yield workers[i % count]()


@contextlib.contextmanager
def _worker(name: str, make: Callable[[int], Any], numbers: range, loading: Loading) -> Iterator[Callable[[], Any]]:
    """A worker process that makes `numbers`; called, what is given returns the next batch. It ends on leaving."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # messages arrive whole or not at all
    with ours:
        with theirs:
            process = _started(name, (theirs, os.getpid(), make, numbers, loading), loading)
        who, ready, left = f"{name} (pid {process.pid})", False, len(numbers)

        def message(wait: float) -> tuple[bytes, list[int]] | None:
            ours.settimeout(wait)
            for _ in range(2):
                try:
                    return socket.recv_fds(ours, MESSAGE, 1)[:2]
                except TimeoutError:
                    return None
                except ConnectionResetError:  # it ended before it read all of ours: what it wrote is still there
                    continue
            return b"", []

        def receive(seconds: float) -> tuple[dict[str, Any], list[int]]:
            found = within(seconds, message)
            if found is None:
                raise LoadingError(f"{who} gave no {'batch' if ready else 'sign of life'} in {seconds:g} s. {SLOW}")
            if not found[0]:
                process.join(KILLED)
                raise _ended(who, process.exitcode, ready=ready)
            said = json.loads(found[0])
            if "error" in said:
                if said["user"]:
                    raise UserError(said["error"])
                failed = LoadingError(f"{who} failed: {said['error']}")
                failed.add_note(said["trace"])
                raise failed
            return said, found[1]

        def grant(batches: int) -> None:
            nonlocal left
            granted, left = min(batches, left), left - min(batches, left)
            with contextlib.suppress(OSError):  # where it has ended, `receive` says so
                for _ in range(granted):
                    ours.send(b"1")

        def take() -> Any:
            nonlocal ready
            if not ready:
                receive(max(START, loading.timeout))
                ready = True
                grant(loading.ahead)
            said, (file,) = receive(loading.timeout)
            grant(1)
            with os.fdopen(file, "rb") as memory:
                return _read(said["rows"], memory)

        # At exit multiprocessing asks, by SIGTERM, which a worker does not hear, what is left to end, and waits for it.
        atexit.register(process.kill)
        try:
            yield take
        finally:
            process.kill()  # also what is stopped or hangs
            process.join(KILLED)
            atexit.unregister(process.kill)


def _started(name: str, arguments: tuple[Any, ...], loading: Loading) -> BaseProcess:
    """A process that runs `_work(*arguments)` and does not hear of Ctrl-C and SIGTERM: main decides when it ends."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments, name=name, daemon=True)
    resource_tracker.ensure_running()  # which `start` does, too, and then lets these signals through
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # a child inherits this
    try:
        process.start()
    except (OSError, RuntimeError):
        raise
    except Exception as error:  # what pickle raises is of many types
        raise UserError(
            f"data.workers={loading.workers}: what makes batches can't be sent to a worker process: {error}. "
            "Use functions of a module, not lambdas or functions in functions; or data.workers=0."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    return process


def _ended(who: str, code: int | None, *, ready: bool) -> Exception:
    if code is not None and code < 0:
        memory = " Did memory run out? Fewer data.workers, data.threads or data.prefetch need less."
        return LoadingError(
            f"{who} was killed by signal {-code} ({signal.strsignal(-code)}).{memory * (-code == signal.SIGKILL)}"
        )
    text = f"{who} ended with exit code {code}"
    if ready:
        return LoadingError(
            f"{text}, before its last batch. What it printed stands above; data.workers=0 has no workers."
        )
    return UserError(
        f"{text} before it began; what it printed stands above. Worker processes import your script again: what starts "
        'the run must stand below `if __name__ == "__main__":`. Or use data.workers=0.'
    )


def _work(channel: socket.socket, parent: int, make: Callable[[int], Any], numbers: range, loading: Loading) -> None:
    """What a worker process does: a batch for each byte that comes through `channel`."""
    _end_with(parent)
    jax.config.update("jax_platforms", "cpu")  # other devices are the main process's
    try:
        with threaded(make, numbers, loading.threads, ahead=0) as made:
            _say(channel, {"ready": True})
            for rows in made:
                if not channel.recv(1):
                    return
                with os.fdopen(os.memfd_create("batch"), "wb") as memory:
                    described = _write(rows, memory)
                    memory.flush()
                    memory.seek(0)  # main reads from where this one stands
                    _say(channel, {"rows": described}, memory.fileno())
    except Exception as error:
        kind = "" if (user := isinstance(error, UserError)) else f"{type(error).__name__}: "
        trace = traceback.format_exc()
        _say(channel, {"error": f"{kind}{error}"[: TEXT // 2], "user": user, "trace": trace[-TEXT // 2 :]})


def _end_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends, even if it hangs or is stopped."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it ended before this
        os._exit(1)


def _say(channel: socket.socket, message: dict[str, Any], *files: int) -> None:
    socket.send_fds(channel, [json.dumps(message).encode()], files)


def _write(rows: Any, memory: io.BufferedWriter) -> Any:
    """Append the arrays of `rows` to `memory`; returns what `_read` needs, ready for JSON."""
    if isinstance(rows, dict):
        return {name: _write(value, memory) for name, value in rows.items()}
    if not isinstance(rows, np.ndarray) or rows.dtype.hasobject or rows.dtype.names:
        raise TypeError(f"Worker processes can send dicts of numpy arrays of numbers, and no {type(rows).__name__}.")
    memory.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return [rows.shape, rows.dtype.name if rows.dtype.kind == "V" else rows.dtype.str]  # "V": bfloat16 and its like


def _read(described: Any, memory: io.BufferedReader) -> Any:
    if isinstance(described, dict):
        return {name: _read(value, memory) for name, value in described.items()}
    shape, dtype = described
    array = np.empty(shape, dtype)
    memory.readinto(array.reshape(-1).view(np.uint8).data)
    return array
