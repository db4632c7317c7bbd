"""Exit codes, and errors as a user should see them."""

import contextlib
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import logging

from flaxmodels.registry import UserError

DONE = 0
FAULT = 1
BAD_INPUT = 2
STUCK = 75  # a watchdog ended a process that no longer moved on: it says where; the same command may well go on
# As a shell reports a process that a signal ended: 128 + its number. The run was saved; the same command goes on.
SIGNALLED = 128
INTERRUPTED = SIGNALLED + 2
_INTERRUPTED = "interrupted before there was anything to save"
# Seconds for the last words of a process that leaves at once: whoever reads them may have stopped to.
LAST_WORDS = 2.0
_COMMAND = threading.Event()  # set while `reported` runs
_ABANDONED = threading.Event()
_LAST: list[tuple[Callable[[], object], float]] = []  # of `before_end`


class FaultError(RuntimeError):
    """Something broke that is no fault of the config: shown without a traceback, and the process leaves with code 1."""


class SignalledError(FaultError):
    """A signal ended the run before there was anything to save.

    Args:
      text: what a user should read.
      number: the signal; the process leaves with 128 + its number.
    """

    def __init__(self, text: str, number: signal.Signals) -> None:
        super().__init__(text)
        self.signal = number


def from_code(code: int, text: str) -> UserError | FaultError:
    """The error of another process of the run, which left or leaves with `code`, as this one should raise it."""
    if code == BAD_INPUT:
        return UserError(text)
    signals = {SIGNALLED + number: number for number in (signal.SIGINT, signal.SIGTERM)}
    return SignalledError(text, signals[code]) if code in signals else FaultError(text)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds: Ctrl-C leaves at once, since KeyboardInterrupt can crash one half way."""

    def leave(number: int, frame: types.FrameType | None) -> None:
        print(_INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():  # only that one can listen
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def reported(main: Callable[[], int], *, debug: bool) -> int:
    """Run `main`; bad input becomes a message and exit code 2, Ctrl-C exit code 130. Unknown errors pass through.

    Args:
      main: returns an exit code.
      debug: show the traceback of errors that are known, too; the exit code stays.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax warns of what we ask for on purpose, and logs errors that it raises
    _COMMAND.set()
    _ABANDONED.clear()
    try:
        code = main()
    except (UserError, FaultError, BrokenPipeError, KeyboardInterrupt) as error:
        code = _told(error, debug=debug)
    except BaseException as error:
        if _ABANDONED.is_set():
            leave(error, debug=debug)
        raise
    finally:
        _COMMAND.clear()
    if _ABANDONED.is_set():
        leave(SystemExit(code))
    return code


def commanding() -> bool:
    """Whether this process is a command's own, and may be ended by it; not a notebook, say, that called `fit`."""
    return _COMMAND.is_set()


def abandon() -> None:
    """A thread may never end, such as one that writes to storage that has gone: a command leaves without it."""
    if commanding():
        _ABANDONED.set()


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends with `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAULT
    if isinstance(error, SignalledError):
        return SIGNALLED + error.signal
    codes = {UserError: BAD_INPUT, BrokenPipeError: SIGNALLED + signal.SIGPIPE, KeyboardInterrupt: INTERRUPTED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), FAULT)


def _told(error: BaseException, *, debug: bool) -> int:
    """Print what a user should see of an error that is known; its exit code."""
    if isinstance(error, BrokenPipeError):  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code_of(error)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print(_INTERRUPTED, file=sys.stderr)
    else:
        # JAX adds a note on its own frames to a UserError that comes up while tracing.
        notes = [] if isinstance(error, UserError) else getattr(error, "__notes__", [])
        said = str(error) if isinstance(error, SignalledError) else f"error: {error}"
        print("\n".join([said, *notes]), file=sys.stderr)
    return code_of(error)


def before_end(call: Callable[[], object], seconds: float = 0.0) -> None:
    """Have `leave` call this after the last words, too: what `atexit` does where a process ends in the ordinary way.

    Args:
      call: in a thread of its own; what it raises is of no interest.
      seconds: that the end may wait for it, beside `LAST_WORDS`.
    """
    _LAST.append((call, seconds))


def leave(error: BaseException, *, debug: bool = False) -> NoReturn:
    """End the process with `error` at once, from any thread, without waiting for anyone; as `reported` would end it."""

    def say() -> None:
        if isinstance(error, UserError | FaultError | BrokenPipeError | KeyboardInterrupt):
            _told(error, debug=debug)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # the cursor, which a live line hides
            sys.stdout.flush()
        for call, _ in _LAST:
            with contextlib.suppress(Exception):
                call()

    try:
        words = threading.Thread(target=say, daemon=True)
        words.start()
        words.join(LAST_WORDS + sum(seconds for _, seconds in _LAST))
    finally:
        os._exit(code_of(error))
