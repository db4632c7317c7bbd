"""SIGTERM and Ctrl-C: the first asks to finish the step, save and leave; the second ends the process at once.

While there is nothing to save (`Stop.rest`), the first ends it at once, too. Python's own handlers wait until the main
thread is between two instructions, and XLA may compile for minutes. So where the process is a command of ours a thread
listens, which a signal wakes whatever the main thread is in.
"""

import contextlib
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

from flaxmodels.runtime import exits
from flaxmodels.runtime.exits import SignalledError

CAUGHT = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a second signal is the first one told twice: a scheduler signals all processes of a job, and a
# supervisor among them passes on what it hears.
SAME = 1.0
NOTICE = "preemption notice"
_OPEN: list["Stop"] = []


class Stop:
    """Whether the process was asked to stop; a context manager that listens while it is open.

    Args:
      end: ends the process at once with an error; called in a thread of its own.

    Attributes:
      signal: the first signal that came, or None.
      notice: what asked in place of a signal, in words; else "".
    """

    def __init__(self, end: Callable[[SignalledError], object] = exits.leave) -> None:
        self.signal: signal.Signals | None = None
        self.notice = ""
        self._end, self._ours = end, False
        self._came = 0.0  # when the first signal was heard, on the monotonic clock; a notice is none
        self._saved = ""  # says that nothing would be lost; "" where something would
        self._turn = threading.Lock()
        self._previous: dict[signal.Signals, Any] = {}
        self._stack = contextlib.ExitStack()

    def __bool__(self) -> bool:
        return self.signal is not None

    def rest(self, step: int = 0) -> None:
        """All that was computed is on disk: from now on the first signal ends the process at once.

        Args:
          step: the newest on disk; 0 where there is none, or none was looked for yet.
        """
        since = f"nothing had been computed since step {step}, which is on disk; the same command goes on from there"
        self._saved = since if step else "nothing had been computed yet; the same command starts again"

    def working(self) -> None:
        """From now on there is something to save. Never returns where a signal has begun to end the process."""
        with self._turn:
            self._saved = ""

    def ask(self, number: signal.Signals, notice: str = "") -> None:
        """What a signal does; from any thread.

        Args:
          number: the signal.
          notice: what asks in its place, in words.
        """
        with self._turn:
            again = self._again() and not notice
            self._note(number, notice)
            if self._ours and again:
                self._end(SignalledError(f"{number.name} once more: left at once, without a save", number))
            elif self._ours and self._saved:
                self._end(SignalledError(f"{notice or number.name}: {self._saved}", number))

    def _again(self) -> bool:
        return self._came > 0 and time.monotonic() - self._came > SAME

    def _note(self, number: signal.Signals, notice: str = "") -> None:
        if self.signal is None:
            self.notice, self.signal = notice, number
        if not notice:  # a machine that gave notice sends a signal too, when it shuts down: that one is the first
            self._came = self._came or time.monotonic()

    def __enter__(self) -> Self:
        # Python lets only the main thread listen; elsewhere (a notebook's worker, say) the embedding program decides.
        if threading.current_thread() is threading.main_thread():
            self._ours = exits.commanding()
            if self._ours:
                self._stack.enter_context(self._listening())
            self._previous = {number: signal.signal(number, self._catch) for number in CAUGHT}
            _OPEN.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _OPEN:
            _OPEN.remove(self)
        self._restore()
        self._stack.close()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: types.FrameType | None) -> None:
        """In the main thread, between two instructions, which may be long after the signal."""
        if self._ours:  # the thread that listens hears it too, perhaps later: that is no second one
            self.signal = self.signal or signal.Signals(number)
            return
        if self._saved or self._again():  # as if nobody listened
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
        self._note(signal.Signals(number))

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """A thread that hears each signal as it comes."""
        ours, theirs = socket.socketpair()

        def listen() -> None:
            while number := ours.recv(1)[0]:
                if number in CAUGHT:
                    self.ask(signal.Signals(number))

        with ours, theirs:
            theirs.setblocking(False)
            thread = threading.Thread(target=listen, name="signals", daemon=True)
            thread.start()
            before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)
                theirs.send(b"\0")
                thread.join()


def _forked() -> None:
    """In a child that other code forked: signals to it are none to us, and the thread that listens is not there."""
    for stop in _OPEN:
        stop._restore()
        signal.set_wakeup_fd(-1)
    _OPEN.clear()


os.register_at_fork(after_in_child=_forked)
