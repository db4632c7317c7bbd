"""SIGTERM and Ctrl-C: the first asks to finish the step, save and leave; the second ends the process at once."""

import signal
import threading
import types
from typing import Any, Self

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the process was asked to stop; a context manager that listens while it is open.

    Attributes:
      signal: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        # Python lets only the main thread listen; elsewhere (a notebook's worker, say) the embedding program decides.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in CAUGHT}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: types.FrameType | None) -> None:
        if self:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
