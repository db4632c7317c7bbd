"""Timing compiled steps fairly: they take turns in one run, so that whatever else the machine does slows all alike.

Read `measure`, then `figures` and `against`. Beside the clock on the wall there is the processor time of this process,
which another process on the same machine hardly changes; on a busy machine that is the one to quote.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from flaxmodels.perf.energy import Counter

# Turns of each where nobody says; each of so many dispatches at the least, after some that do not count.
TURNS, SHORTEST, SETTLED = 7, 3, 2
# Quartiles of the turns that are further apart, as a part of the median, say nothing: the machine was too busy.
SPREAD = 0.15
# Ratios this close to 1 mean nothing either.
ALIKE = 0.05


class Steps(Protocol):
    """What can be timed: see `running.Run`."""

    step: int

    def prepare(self) -> int:
        """Make ready what the next dispatches are given, which is not timed; how many they are."""

    def dispatch(self) -> Any:
        """Submit the steps of one dispatch; what comes of them, which is not waited for."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
      seconds: of a step, by the clock on the wall; one for each dispatch.
      calls: seconds that the host took to submit a dispatch, for each.
      cpu: seconds of a step, of all processors, that this process used.
      joules: of a step, of the whole machine; None where they are not counted.
    """

    seconds: tuple[float, ...]
    calls: tuple[float, ...]
    cpu: float
    joules: float | None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def measure(
    runs: Mapping[str, Steps], seconds: float, turns: int, energy: Counter | None = None
) -> dict[str, list[Turn]]:
    """Let several take turns: a, b, b, a, a, b, ...

    Args:
      runs: name -> what to time.
      seconds: for each of them, all turns together.
      turns: of each.
      energy: of `energy.counter`.
    """
    found: dict[str, list[Turn]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(_turn(runs[name], seconds / turns, energy))
    return found


def _turn(run: Steps, seconds: float, energy: Counter | None) -> Turn:
    """As the loop does it: a dispatch is waited for when the next one has been submitted."""
    spans: list[float] = []
    calls: list[float] = []
    taken = cpu = joules = 0.0
    made = 0
    while len(spans) < SHORTEST or taken < seconds:
        ready, before = run.prepare(), None
        for _ in range(SETTLED + 1):
            before, count, _, then = _go(run, before)
        used, spent = time.process_time(), energy() if energy else 0.0
        for _ in range(ready - SETTLED - 1):
            before, steps, called, now = _go(run, before)
            spans.append((now - then) / count)
            calls.append(called)
            taken, made = taken + now - then, made + count
            count, then = steps, now
            if len(spans) >= SHORTEST and taken >= seconds:
                break
        cpu += time.process_time() - used
        joules += energy() - spent if energy else 0.0
        jax.block_until_ready(before)
    return Turn(tuple(spans), tuple(calls), cpu / made, joules / made if energy else None)


def _go(run: Steps, before: Any) -> tuple[Any, int, float, float]:
    """Submit a dispatch and wait for `before`: (its result, its steps, seconds to submit it, when the wait ended)."""
    first, begun = run.step, time.perf_counter()
    packed = run.dispatch()
    called = time.perf_counter() - begun
    jax.block_until_ready(before)
    return packed, run.step - first, called, time.perf_counter()


def figures(turns: Sequence[Turn]) -> dict[str, Any]:
    """Of one thing, all turns together, ready for JSON.

    Returns:
      "step_ms" and "p95_ms" of a step, "spread" between the turns (`spread`), "cpu_ms" and "cpu_spread" likewise,
      "dispatch_us" (to submit one), "joules" (of a step, or None), "dispatches" and "turns".
    """
    spans = [seconds for turn in turns for seconds in turn.seconds]
    cpu = [turn.cpu for turn in turns]
    joules = [turn.joules for turn in turns if turn.joules is not None]
    return {
        "step_ms": round(1e3 * statistics.median(spans), 4),
        "p95_ms": round(1e3 * float(np.percentile(spans, 95)), 4),
        "spread": spread([turn.median for turn in turns]),
        "cpu_ms": round(1e3 * statistics.median(cpu), 4),
        "cpu_spread": spread(cpu),
        "dispatch_us": round(1e6 * statistics.median([call for turn in turns for call in turn.calls]), 1),
        "joules": float(f"{statistics.median(joules):.4g}") if joules else None,
        "dispatches": len(spans),
        "turns": len(turns),
    }


def against(turns: Sequence[Turn], first: Sequence[Turn], platform: str) -> dict[str, Any]:
    """One thing held against another one that it took turns with, ready for JSON.

    Args:
      turns: of the one.
      first: of the other.
      platform: of the devices; on a CPU the processor time may judge where the clock on the wall can't.

    Returns:
      "ratio" (median over turns of its time by the other's), "ratio_spread", "cpu_ratio", "cpu_ratio_spread", and the
      "verdict" in words.
    """
    wall = [a.median / b.median for a, b in zip(turns, first)]
    cpu = [a.cpu / b.cpu for a, b in zip(turns, first)]
    found = {"wall time": (statistics.median(wall), spread(wall))}
    if platform == "cpu":
        found["CPU time"] = (statistics.median(cpu), spread(cpu))
    return {
        "ratio": round(statistics.median(wall), 3),
        "ratio_spread": spread(wall),
        "cpu_ratio": round(statistics.median(cpu), 3),
        "cpu_ratio_spread": spread(cpu),
        "verdict": _verdict(found),
    }


def _verdict(found: Mapping[str, tuple[float, float]]) -> str:
    """By the first that is steady enough."""
    for of, (ratio, apart) in found.items():
        if apart <= SPREAD:
            if abs(ratio - 1) < ALIKE:
                return f"no difference by {of} (under {ALIKE:.0%})"
            return f"{max(ratio, 1 / ratio):.2f} x {'slower' if ratio > 1 else 'faster'} by {of}"
    said = " and ".join(f"{apart:.0%} of {of}" for of, (_, apart) in found.items())
    return f"not judged: a spread of {said}, over {SPREAD:.0%}; the machine is busy, or --seconds too few"


def spread(values: Sequence[float]) -> float:
    """How far apart the quartiles of some values are, as a part of their median."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return round(float((high - low) / middle), 3)
