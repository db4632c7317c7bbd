"""How fast training proper is: evaluations and saves are not counted."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Steps a second, on the monotonic clock; starts when it is made."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0
        self._since = time.monotonic()

    def tick(self, steps: int) -> float:
        """`steps` were seen to end now; the seconds that each of them took."""
        now = time.monotonic()
        each, self._since = (now - self._since) / steps, now
        return each

    def add(self, seconds: float) -> None:
        """Count one step."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def lap(self) -> float:
        """Steps a second since the last lap."""
        speed = self._steps / max(self._seconds, 1e-9)
        self._seconds, self._steps = 0.0, 0
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted."""
        ran = time.monotonic() - self._since
        try:
            yield
        finally:
            self._since = time.monotonic() - ran
