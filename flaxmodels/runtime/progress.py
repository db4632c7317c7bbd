"""What this process is doing now, and where its seconds went: a phase, a step, and beats that say something moved on.

One record per process, written by the thread that trains and read by others, such as `watchdog`, `pulse` and the
account of lost time. Nearly free: no lock, since only one thread writes, and each name is set in one go.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

from flaxmodels import registry

PHASES = ("start", "data", "compile", "restore", "training", "evaluation", "save", "end")


@dataclasses.dataclass(frozen=True)
class Now:
    """What a process is doing.

    Attributes:
      phase: one of `PHASES`; "" outside of all.
      step: the last step that was seen to end, or None.
      beats: how often something moved on: beats, and phases that began or ended.
      since: when the phase began, on the monotonic clock, in seconds.
    """

    phase: str
    step: int | None
    beats: int
    since: float


_phase, _step, _beats, _since = "", None, 0, time.monotonic()  # of `Now`
_counted = _since  # up to here `_totals` is right
_totals = dict.fromkeys(PHASES, 0.0)
_paces = dict.fromkeys(("", *PHASES), 0)
_depth, _owner = 0, 0
_allowed = 0.0


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What goes on inside is `name`, one of `PHASES`; afterwards it is again what it was before.

    Counts in the thread that is in a phase already, or in any if none is: what another one does in the background
    holds nothing up.
    """
    global _depth, _owner
    if name not in PHASES:
        raise ValueError(f"phase {name!r}: {registry.suggest(name, PHASES)}")
    me = threading.get_ident()
    if _depth and me != _owner:
        yield
        return
    before, _owner, _depth = _phase, me, _depth + 1
    _enter(name)
    try:
        yield
    finally:
        _depth -= 1
        _enter(before)


def _enter(name: str) -> None:
    global _phase, _since, _counted, _beats
    now = time.monotonic()
    _totals[_phase or "start"] += now - _counted
    _phase, _since, _counted = name, now, now
    _beats += 1


def beat(step: int | None = None) -> None:
    """Something moved on.

    Args:
      step: that was seen to end, where it was a step.
    """
    global _beats, _step
    _beats += 1
    _paces[_phase] += 1
    if step is not None:
        _step = step


def now() -> Now:
    """What this process is doing; from any thread."""
    return Now(_phase, _step, _beats, _since)


def paces(name: str) -> int:
    """How many beats there were in all phases called `name`: whether it moves by itself yet."""
    return _paces[name]


def totals() -> dict[str, float]:
    """Seconds by phase since `reset`, the present one included, and outside of all as "start"; monotonic clock.

    A phase inside another one is counted for itself alone, so that they add up to the whole.
    """
    found, begun, current = dict(_totals), _counted, _phase
    found[current or "start"] += time.monotonic() - begun
    return found


def allow(seconds: float) -> None:
    """So long may training or an evaluation stand still, as something else has a time limit of its own."""
    global _allowed
    _allowed = seconds


def allowed() -> float:
    """Seconds; see `allow`."""
    return _allowed


def reset() -> None:
    """Start counting anew, as for another run in the same process; the phase it is in stays."""
    global _step, _beats, _since, _counted, _allowed
    _step, _beats, _allowed = None, 0, 0.0
    _since = _counted = time.monotonic()
    _totals.update(dict.fromkeys(_totals, 0.0))
    _paces.update(dict.fromkeys(_paces, 0))
