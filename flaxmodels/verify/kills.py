"""Kills of a run: drawn at random, over all of it and where it is most easily hurt; and struck.

A run is seen from outside only: by what its processes report of their steps, and by the names in its folder of
checkpoints.
"""

import dataclasses
import math
import random
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flaxmodels import manifest
from flaxmodels.verify.crew import Crew

# Kind -> its share, of eight.
KINDS = {"in a step": 3, "in a save": 2, "in a deletion": 1, "SIGTERM": 1, "in the start": 1}
# Longest delays, in seconds, after a save or a deletion has begun to show.
SAVE, DELETION = 0.3, 0.05
PAUSE = 0.002


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      kind: one of `KINDS`; all but "SIGTERM" are by SIGKILL.
      step: it is made after the run has come to this step; in the start, before its first step after a restart.
      delay: 0 to 1: when, of the time that the kind goes on for.
      processes: which it hits.
    """

    kind: str
    step: int
    delay: float
    processes: tuple[int, ...]

    @property
    def signal(self) -> signal.Signals:
        """What is sent."""
        return signal.SIGTERM if self.kind == "SIGTERM" else signal.SIGKILL

    def __str__(self) -> str:
        what = self.kind if self.kind == "SIGTERM" else f"kill -9 {self.kind}"
        return f"{what} after step {self.step}" if self.kind != "in the start" else what


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a run takes without kills: seconds to its first step, and for each."""

    start: float
    step: float


def draw(rng: random.Random, count: int, steps: int, every: int, hosts: int) -> list[Kill]:
    """Draw kills, in the order of their steps.

    Args:
      rng: draws all of it.
      count: how many.
      steps: of the run.
      every: steps between saves: after a kill in a save or deletion is due, there must be one to come.
      hosts: processes; one of them or all are hit.
    """
    each = [kind for kind, share in KINDS.items() for _ in range(share)]
    kinds = [kind for _ in range(math.ceil(count / len(each))) for kind in rng.sample(each, len(each))][:count]
    kills = []
    for kind in kinds:
        last = steps - (2 * every if kind in ("in a save", "in a deletion") else 1)
        all_of_them = hosts == 1 or rng.random() < 0.5
        hit = tuple(range(hosts)) if all_of_them else (rng.randrange(hosts),)
        kills.append(Kill(kind, rng.randint(1, max(last, 1)), rng.random(), hit))
    return sorted(kills, key=lambda kill: kill.step)


def strike(kill: Kill, crew: Crew, checkpoints: Path, pace: Pace, limit: float) -> bool:
    """Wait for the moment of a kill, and send its signal.

    Args:
      kill: what to do.
      crew: the processes; they have just been started.
      checkpoints: the folder of the run.
      pace: of the run.
      limit: seconds to wait for the moment.

    Returns:
      Whether it was sent; False where a process ended before, or the moment did not come.
    """
    deadline = time.monotonic() + limit

    def until(condition: Callable[[], bool]) -> bool:
        while not condition():
            if any(code is not None for code in crew.codes) or time.monotonic() > deadline:
                return False
            time.sleep(PAUSE)
        return True

    longest = {"in a save": SAVE, "in a deletion": DELETION, "in the start": pace.start}.get(kill.kind, 2 * pace.step)
    if kill.kind != "in the start":
        if not until(lambda: max(steps(crew.reports()), default=0) >= kill.step):
            return False
        there = _names(checkpoints)
        shows = {"in a save": _saves, "in a deletion": _deletes}.get(kill.kind)
        if shows is not None and not until(lambda: shows(there, _names(checkpoints))):
            return False
    time.sleep(kill.delay * longest)
    if None not in crew.codes:
        return False
    crew.signal(kill.signal, kill.processes)
    return True


def steps(reports: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> when it was begun, on the monotonic clock, of what a process reports; of each the first time."""
    found: dict[int, float] = {}
    for line in reports:
        if (step := step_of(line)) is not None:
            found.setdefault(step, line["at"])
    return found


def step_of(line: Mapping[str, Any]) -> int | None:
    """The step that a line of a report is about; None where it is about something else."""
    what, _, number = line["phase"].partition(" ")
    return int(number) if what == "step" else None


def on_disk(checkpoints: Path) -> str:
    """What lies in a folder of checkpoints, in words: committed steps, and saves that are not finished."""
    names = [name for name in _names(checkpoints) if _of_step(name)]
    steps = {int(name) for name in names if name.isdecimal() and manifest.committed(checkpoints / name)}
    half = {int(name.partition(".")[0]) for name in names} - steps
    said = ", ".join(map(str, sorted(steps))) or "nothing"
    return said + (f", and half of {', '.join(map(str, sorted(half)))}" if half else "")


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def _of_step(name: str) -> bool:
    return name.partition(".")[0].isdecimal()  # Orbax writes 12.orbax-checkpoint-tmp, then renames it to 12


def _saves(before: set[str], now: set[str]) -> bool:
    return any(_of_step(name) for name in now - before)


def _deletes(before: set[str], now: set[str]) -> bool:
    return any(name.isdecimal() for name in before - now)
