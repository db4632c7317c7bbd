"""A way to compute the update, under way: its state, and batches that are used over and over."""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxmodels.job import Job
from flaxmodels.perf.ways import Way

# Steps whose results are compared, and dispatches whose batches are made beforehand, to be used over and over.
STEPS = 5
# Dispatches for which the numbers that a thread of a run would send are sent ahead.
AHEAD = 256


def first_feeds(job: Job) -> list[dict[str, Any]]:
    """Of the first `STEPS` dispatches, on the host."""
    most = job.cadence.steps_per_dispatch
    plan = [(number * most, most) for number in range(STEPS)]
    with contextlib.closing(job.train.dispatches(job.seed, plan, most)) as feeds:
        return [jax.device_get(feed) for feed in feeds]


class Run:
    """A way under way.

    Args:
      way: compiled.
      feeds: of the first dispatches, on the host.

    Attributes:
      state: the train state; None before `results`.
      step: its number.
      first_seconds: of the first step, from its submission to its end.
    """

    def __init__(self, way: Way, feeds: Sequence[dict[str, Any]]) -> None:
        self.way, self.step, self.first_seconds = way, 0, 0.0
        self.state: Any = None
        every = way.place({"every": feeds[0]["every"]})
        self._feeds = [way.place({"each": feed["each"]}) | every for feed in feeds]
        self._most = int(feeds[0]["count"])
        # The row of its first step in each feed: those of a resident split share one piece.
        self._rows = [i * self._most - int(feed["first"]) for i, feed in enumerate(feeds)]
        self._number = 0
        self._ready: deque[tuple[int, dict[str, Any]]] = deque()

    def results(self, *, whole: bool) -> tuple[dict[str, np.ndarray], Any, Any]:
        """Of the first `STEPS` steps: metric -> its mean at each; parameters; other collections. To be called first.

        Args:
          whole: read the last two; else they are None.
        """
        self.state = jax.block_until_ready(self.way.start())
        packed: list[np.ndarray] = []
        while self.step < STEPS:
            which, row = divmod(self.step, self._most)
            count = min(self._most - row, STEPS - self.step) if self.step else 1
            feed, begun = self._feed(which, self.step - row, count), time.perf_counter()
            found = jax.block_until_ready(self._go(count, feed))
            self.first_seconds = self.first_seconds or time.perf_counter() - begun
            packed += list(self.way.read(found))[:count]
        pairs = dict(zip(self.way.names, np.stack(packed, axis=1).astype(np.float64), strict=True))
        means = {name: pair[:, 0] / pair[:, 1] for name, pair in pairs.items()}
        return means, *(self.way.read((self.state.params, self.state.extra)) if whole else (None, None))

    def prepare(self) -> int:
        """Send ahead what the next `AHEAD` dispatches are given; how many that are."""
        while len(self._ready) < AHEAD:
            first = self.step + len(self._ready) * self._most
            self._ready.append((self._most, self._feed(self._number % len(self._feeds), first, self._most)))
            self._number += 1
        return len(self._ready)

    def dispatch(self) -> jax.Array:
        """Make the steps of one dispatch that is prepared; their metrics, which are not waited for."""
        return self._go(*self._ready.popleft())

    def _feed(self, which: int, first: int, count: int) -> dict[str, Any]:
        """A feed whose first row is for step `first`, whatever step it was made for."""
        now = {"count": np.int32(count), "first": np.int32(first - self._rows[which])}
        return {**self._feeds[which], **self.way.place(now)}

    def _go(self, count: int, feed: dict[str, Any]) -> jax.Array:
        self.state, packed = self.way.program(self.state, feed)
        self.step += count
        return packed
