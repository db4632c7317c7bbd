"""Where the seconds of a run go: data, dispatch, the device, evaluations, saves. A *window* ends at a line of the log.

The thread that trains says what it has just done (`Windows.spent`), so the parts add up to the whole; that reads the
clock, and costs nothing else. Nor does anything wait for the device to be measured, but for one case: where results
are there before they are asked for, nobody saw when the device ended. Then one dispatch a second, at most, is awaited.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

PARTS = ("data", "transfer", "dispatch", "device", "host", "evaluation", "checkpoint")
TRAINING = PARTS[:5]
LOOK = 1.0  # seconds without having seen how long a dispatch takes the device


@dataclasses.dataclass
class Spent:
    """Seconds of the thread that trains, by what it did.

    Attributes:
      data: it waited for batches that were being read or made.
      transfer: it waited for batches that were being sent to the devices.
      dispatch: it handed the program to the devices. On a CPU this can include a part of the program's work.
      device: it waited for the devices.
      host: all else between steps: metrics, the log, the guard.
      evaluation: in evaluations.
      checkpoint: in saves, as far as training waited for them.
      busy: that the devices worked on training, an estimate: all dispatches, times the mean of those that were seen to
        begin and end; NaN where none was.
    """

    data: float = 0.0
    transfer: float = 0.0
    dispatch: float = 0.0
    device: float = 0.0
    host: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    busy: float = math.nan

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def training(self) -> float:
        """All but evaluations and saves."""
        return sum(getattr(self, part) for part in TRAINING)

    @property
    def idle(self) -> float:
        """Share of `training` in which the devices had nothing to do, 0 to 1; NaN where that is not known."""
        return max(1 - self.busy / self.training, 0.0) if self.training > 0 else math.nan

    def shares(self) -> dict[str, float]:
        """Each part by name, as its share of `total`, and "idle" where that is known; to four decimals."""
        found = {part: round(getattr(self, part) / max(self.total, 1e-9), 4) for part in PARTS}
        return found if math.isnan(self.idle) else found | {"idle": round(self.idle, 4)}


class Windows:
    """Counts the seconds of one run.

    Args:
      fed: says for how many seconds, since it began, the feed has (read or made batches, sent them). A wait for data is
        divided by that, since the loop can't see what it waits for.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        fed: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fed, self._clock = fed, clock
        self._parts, self._closed = dict.fromkeys(PARTS, 0.0), Spent()
        self._since = self._ticked = clock()
        self._fed_before = fed()
        self._steps, self._seconds = 0, 0.0  # since the last `speed`
        self._ended = self._looked = -math.inf  # the last end that was seen
        self._dispatches, self._seen, self._busy = 0, 0, 0.0  # of the window; how many were seen, and their seconds
        self._mean = math.nan  # seconds of a dispatch, in the last window where one was seen

    def skip(self) -> None:
        """What was done since the last call counts nowhere: compiling, say, or the first batch."""
        now = self._clock()
        self._since, self._ticked = now, self._ticked + now - self._since

    def spent(self, part: str) -> float:
        """All since the last call was `part`, one of `PARTS`. Returns the present time."""
        now = self._clock()
        self._parts[part] += now - self._since
        if part == "evaluation" or part == "checkpoint":
            self._ticked += now - self._since
        self._since = now
        return now

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What goes on inside counts nowhere."""
        self.spent("host")
        try:
            yield
        finally:
            self.skip()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What goes on inside is `part`."""
        self.spent("host")
        try:
            yield
        finally:
            self.spent(part)

    def ended(self, began: float, steps: int, *, seen: bool) -> float:
        """A dispatch of `steps` steps has ended, and everything since the last call was waiting for it.

        Args:
          began: when it was handed to the devices.
          steps: how many.
          seen: it was waited for now, so this is when it ended.

        Returns:
          The seconds that each of its steps took, evaluations and saves left out.
        """
        now = self.spent("device")
        self._dispatches += 1
        if seen:
            self._count(began, now)
        each, self._ticked = (now - self._ticked) / steps, now
        return each

    def unseen(self) -> bool:
        """Whether it is time to wait for a dispatch just to see when it ends: see `look`."""
        return self._since - self._looked > LOOK

    def look(self, began: float) -> None:
        """A dispatch has ended that was waited for at once; everything since the last call was that."""
        self._count(began, self.spent("device"))

    def _count(self, began: float, now: float) -> None:
        self._busy += now - max(began, self._ended)
        self._seen += 1
        self._ended = self._looked = now

    def step(self, seconds: float) -> None:
        """Count one step, for `speed`."""
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds

    def speed(self) -> float:
        """Steps a second since the last call."""
        found = self._steps / max(self._seconds, 1e-9)
        self._steps, self._seconds = 0, 0.0
        return found

    def close(self) -> Spent:
        """End this window: what it held. The next one begins."""
        self.spent("host")
        if self._seen:
            self._mean = self._busy / self._seen
        window = Spent(**self._parts, busy=self._dispatches * self._mean)
        made, sent = (now - before for now, before in zip(self._fed(), self._fed_before))
        if made + sent > 0:
            window.transfer = window.data * sent / (made + sent)
            window.data -= window.transfer
        self._fed_before = self._fed()
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._dispatches, self._seen, self._busy = 0, 0, 0.0
        self._closed = _sum(self._closed, window)
        return window

    def whole(self) -> Spent:
        """The run up to now. Ends the present window."""
        self.close()
        return self._closed


def _sum(one: Spent, other: Spent) -> Spent:
    total = Spent(**{part: getattr(one, part) + getattr(other, part) for part in PARTS})
    known = [spent.busy for spent in (one, other) if not math.isnan(spent.busy)]
    total.busy = sum(known) if known else math.nan
    return total
