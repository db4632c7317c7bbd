"""What is done about bad steps, decided on the host, from what all processes of a run read alike.

`Watch` is given the metrics of one step after the other. It knows nothing of the loop, and touches no device.

A roll back changes what a run has already done, so it is written down: `interventions.json` in the workdir, a list of
stretches of batches that are left out. A run that was killed, and a second run with a copy of that file, leaves out the
same ones. Batches that are left out one at a time need no record: the step finds them again.
"""

import collections
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxmodels import guard, storage
from flaxmodels.guard import Guard
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.state import TrainState

FILE = "interventions.json"
# Steps whose losses and gradient norms a capsule gets.
HISTORY = 256


@dataclasses.dataclass(frozen=True)
class RollBack:
    """One roll back: the batches `first` up to, not with, `stop` are left out.

    Attributes:
      first: the step to go back to; its batch is the first one left out.
      stop: the step to go on from.
      loss: of the spike, which was at batch `stop` - 1.
    """

    first: int
    stop: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Trip:
    """A bad step. The state is held at `step`, as it was before.

    Attributes:
      step: of the held state; also the number of the batch.
      code: `guard.NOT_FINITE` or `guard.SPIKE`.
      loss: mean of the batch.
      grad_norm: of the batch.
      said: what is bad, in words.
    """

    step: int
    code: int
    loss: float
    grad_norm: float
    said: str


class RolledBackError(Exception):
    """The run goes back to `first`: checkpoints after it are worth nothing, and the run starts as one that resumes."""

    def __init__(self, first: int) -> None:
        super().__init__(first)
        self.first = first


class Watch:
    """The bad steps of one call of `fit`.

    Args:
      options: what is done.
      names: of the metrics in a row.
      rollbacks: from `read`.
      state: to start from; its guard's numbers are read here.
      capsules: steps of the capsules that there are.

    Attributes:
      history: (step, loss, gradient norm) of the last `HISTORY` good steps.
      skipped: steps left out since the run began.
    """

    def __init__(
        self,
        options: Guard,
        names: Sequence[str],
        rollbacks: Sequence[RollBack],
        state: TrainState,
        capsules: Sequence[int] = (),
    ) -> None:
        self.options, self.rollbacks, self.capsules = options, tuple(rollbacks), list(capsules)
        self.history: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=HISTORY)
        held = state.opt_state
        self.skipped, self._streak, self._resumed = map(int, jax.device_get((held.skipped, held.streak, held.resumed)))
        self._bad = names.index(guard.BAD) if guard.BAD in names else None
        self._loss, self._norm = names.index("loss"), names.index("grad_norm")

    def see(self, step: int, row: Sequence[Sequence[float]]) -> Trip | None:
        """Look at the metrics of one step.

        Args:
          step: of the state before it; also the number of the batch.
          row: (names, 2), a (sum, count) pair for each name.

        Returns:
          What to do something about. Then what follows, of steps that were under way, is to be thrown away.
        """
        loss, norm = float(ratio_of(row[self._loss])), float(row[self._norm][0])
        code = int(row[self._bad][0]) if self._bad is not None else guard.GOOD
        if code == guard.GOOD:
            self.history.append((step, loss, norm))
            return None
        if code == guard.HELD:
            raise FaultError(f"batch {step} found the state held, and the bad step before it was not seen.")
        return Trip(step, code, loss, norm, self._said(step, code, loss, norm))

    def _said(self, step: int, code: int, loss: float, norm: float) -> str:
        if code == guard.NOT_FINITE:
            return f"batch {step} is not finite: loss {loss:.6g}, gradient norm {norm:.6g}"
        before = [past for _, past, _ in self.history][-self.options.window :]
        usual = f", after {statistics.fmean(before):.6g} on average" if before else ""
        return f"batch {step} is a spike: loss {loss:.6g}{usual}"

    def wants_capsule(self, step: int) -> bool:
        """Whether a capsule of `step` is to be written; the same in all processes. It then counts as written."""
        if step in self.capsules or len(self.capsules) >= self.options.capsules:
            return False
        self.capsules.append(step)
        return True

    def decide(self, trip: Trip, workdir: Path) -> int:
        """The step to go on from.

        Args:
          trip: from `see`.
          workdir: where a roll back is written down, by process 0; and where the capsule is, for the message.

        Raises:
          FaultError: too many bad steps, one after the other.
          RolledBackError: go back first.
        """
        streak = (self._streak if self._resumed == trip.step else 0) + 1
        if streak >= self.options.max_bad_steps:
            first = trip.step + 1 - streak
            there = [step for step in self.capsules if first <= step <= trip.step]
            look = f"\nWhat went wrong: flaxmodels replay {workdir / 'capsules' / str(there[0])}" if there else ""
            raise FaultError(
                f"{trip.said}. It is the last of {streak} bad steps in a row, {first} to {trip.step}, which is "
                f"guard.max_bad_steps. The checkpoints hold none of them.{look}"
            )
        if trip.code == guard.SPIKE and self.options.spikes == "roll back":
            first = max(trip.step - self.options.back, 0)
            while earlier := [past.first for past in self.rollbacks if past.first < first < past.stop]:
                first = min(earlier)  # the state is that of its start all along
            self.rollbacks += (RollBack(first, trip.step + 1, trip.loss),)
            if jax.process_index() == 0:
                write(workdir, self.rollbacks)
            raise RolledBackError(first)
        return trip.step + 1

    def told(self, trip: Trip, workdir: Path) -> str:
        """A line for the log."""
        back = trip.code == guard.SPIKE and self.options.spikes == "roll back"
        done = f"going back {self.options.back} steps" if back else "left out"
        replay = f": flaxmodels replay {workdir / 'capsules' / str(trip.step)}" if trip.step in self.capsules else ""
        return f"warning: {trip.said}; {done}{replay}"

    def jump(self, step: int) -> int:
        """The step to go on from at `step`: behind the batches that a roll back leaves out, else `step` itself."""
        while further := [past.stop for past in self.rollbacks if past.first <= step < past.stop]:
            step = max(further)
        return step

    def limit(self, step: int, total: int) -> int:
        """The step up to which dispatches may go from `step`: where batches are left out, or `total`."""
        return min([total, *(past.first for past in self.rollbacks if past.first > step)])

    def moved(self, before: int, step: int) -> None:
        """Keep count as `guard.moved` does: the state was at `before`, and goes on from `step`."""
        self._streak = (self._streak if self._resumed == before else 0) + 1
        self.skipped, self._resumed = self.skipped + step - before, step


def ratio_of(pair: Sequence[float]) -> float:
    """Mean of a (sum, count) pair; NaN stays NaN."""
    total, count = pair
    return total / count if count else total


def stale(state: TrainState, rollbacks: Sequence[RollBack]) -> int | None:
    """The step after which checkpoints are worth nothing, if `state` is of them: it knows nothing of a roll back.

    So it is where a run was killed between writing down a roll back and going back.
    """
    step, known = map(int, jax.device_get((state.step, state.opt_state.rollbacks)))
    behind = [past.first for past in rollbacks[known:] if past.first < step]
    return min(behind) if behind else None


def read(workdir: Path) -> tuple[RollBack, ...]:
    """The roll backs of a workdir, in the order in which they came.

    Raises:
      UserError: the file is not what `write` makes.
    """
    file = workdir / FILE
    try:
        found = json.loads(file.read_text())["rollbacks"]
        return tuple(_checked(entry) for entry in found)
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{file} can't be read ({type(error).__name__}: {error}). It says which batches this run leaves out: "
            "bring it back, or choose another --workdir."
        ) from error


def _checked(entry: Mapping[str, Any]) -> RollBack:
    first, stop, loss = entry["first"], entry["stop"], entry["loss"]
    if not (isinstance(first, int) and isinstance(stop, int) and 0 <= first < stop):
        raise ValueError(f"{dict(entry)} is no stretch of batches")
    return RollBack(first, stop, float.fromhex(loss))


def write(workdir: Path, rollbacks: Sequence[RollBack]) -> None:
    """Write them down, whole or not at all, and on the disk before anything is done about them.

    Raises:
      FaultError: they can't be written.
    """
    try:
        _write(workdir, rollbacks)
    except OSError as error:
        raise FaultError(
            f"{workdir / FILE} can't be written: {error.strerror}. It says which batches a roll back leaves out: the "
            "run ends before going back. Make room, and the same command goes on."
        ) from error


def _write(workdir: Path, rollbacks: Sequence[RollBack]) -> None:
    rows = [{"first": past.first, "stop": past.stop, "loss": past.loss.hex()} for past in rollbacks]
    storage.write(workdir / FILE, f"{json.dumps({'rollbacks': rows}, indent=1)}\n".encode())
