"""Orbax behind one small class: asynchronous saves that are committed whole, verified, restored onto any mesh.

A checkpoint is a folder of two items, `params` and `rest` (step, other collections, optimizer state), and a manifest,
whose rename is the commit: see `manifest`. It holds what a resume needs beside arrays, too. The step is the position in
the data. What is on disk, and what of it goes, is in `disk`.
"""

import contextlib
import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from flaxmodels import disk, fitting, manifest, storage
from flaxmodels.registry import Positive, Steps, UserError
from flaxmodels.runtime import peers
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.lease import answered
from flaxmodels.saving import Saving
from flaxmodels.state import TrainState

VERSIONED = ("flaxmodels-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; a package that is not installed as a distribution is left out."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: holds one folder a step; made if missing.
      best_mode: "min" or "max": which value of the watched metric is best.
      every: save every so many steps; 0 saves by time, by metric and at the end only.
      every_seconds: save when the last save is longer ago; 0 never saves by time.
      keep: newest checkpoints kept.
      keep_best: how many of those with the best metric are kept too.
      keep_every: keep for each multiple of so many steps the checkpoint nearest to it too; 0 none.
      keep_every_seconds: keep one for so many seconds of training too; 0 none.
      busy: what a save does that is due while one is still in flight: "wait", or "skip" it.
      failed: what a save that failed does: "stop" the run, or "go on" without it, in a run of one process.
      deadline_seconds: a save that takes longer has failed.
      damaged: what to do about a newest checkpoint whose files are not as they were written: "refuse" to start, or
        "pass over": move it aside and take the one before.
      cast: regexes of the paths of floats that may be restored in another float dtype.
      read_only: only look: nothing is made, cleaned up, moved or deleted.

    Raises:
      UserError: the directory can't be made, or an option can't be had.
    """

    def __init__(
        self,
        directory: Path,
        *,
        best_mode: str = "min",
        every: Steps = 0,
        every_seconds: float = 600.0,
        keep: Positive = 2,
        keep_best: int = 1,
        keep_every: Steps = 0,
        keep_every_seconds: float = 0.0,
        busy: Literal["wait", "skip"] = "wait",
        failed: Literal["stop", "go on"] = "stop",
        deadline_seconds: float = 1200.0,
        damaged: Literal["refuse", "pass over"] = "refuse",
        cast: tuple[str, ...] = (),
        read_only: bool = False,
    ) -> None:
        if failed == "go on" and peers.count() > 1:
            raise UserError(
                "checkpoint.failed='go on' works in a run of one process: of several, one alone may know of a failure. "
                "Leave it at 'stop'; with --max_restarts the run goes on from the step before."
            )
        fitting.compiled(cast, "checkpoint.cast")
        self.directory, self.best_mode, self.cast = directory.absolute(), best_mode, cast
        self.every, self.every_seconds, self.keep_best = every, every_seconds, keep_best
        self.busy, self.failed, self.damaged = busy, failed, damaged
        self.retention = disk.Retention(keep, keep_best, best_mode, keep_every, keep_every_seconds)
        self._read_only, self._versions = read_only, versions()
        self._notes: list[str] = []
        self._verified: set[int] = set()
        try:
            if not read_only and peers.me() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._notes += disk.tidy(self.directory)
        except OSError as error:
            raise UserError(f"{directory} can't be written: {error.strerror}. Choose another --workdir.") from error
        self._saving: Saving | None = None
        # Of the steps that this run saved or found, the last; the others look when process 0 has tidied up.
        self._newest: int | None = None
        if not read_only:
            self._newest = peers.told(self.latest())
            self._saving = Saving(self.directory, self.retention, deadline_seconds)
        self._begun = self._saved_at = time.monotonic()
        self._before = self._seconds_before()

    def _seconds_before(self) -> float:
        """Seconds of training up to the newest step. Monotonic, and counted on over restarts."""
        steps = disk.readable(self.directory)
        return (steps[-1].time - disk.EPOCH).total_seconds() if steps else 0.0

    def due(self, step: int) -> bool:
        """Whether a save is due after `step`, by steps; with busy="skip" none is while another is in flight."""
        if not (self.every > 0 and step % self.every == 0) or step == self._newest:  # saved for another reason
            return False
        self.check()
        if self.busy == "skip" and peers.told(self._in_flight is not None):
            self._skipped(step)
            return False
        return True

    def late(self) -> bool:
        """Whether a save is due by time (monotonic: a clock that jumps changes nothing)."""
        late = self.every_seconds > 0 and time.monotonic() - self._saved_at >= self.every_seconds
        return late and not (self.busy == "skip" and self._in_flight is not None)

    @property
    def _in_flight(self) -> int | None:
        return None if self._saving is None else self._saving.step

    def steps(self) -> list[int]:
        """All committed steps on disk, whether their files are whole or not."""
        return disk.committed(self.directory)

    def latest(self) -> int | None:
        """The newest committed step on disk."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best metric on disk; None where none has one."""
        sign = 1 if self.best_mode == "min" else -1
        scored = [(sign * s.metrics["watched"], s.step) for s in disk.readable(self.directory) if s.metrics]
        return min(scored)[1] if scored else None

    def good(self) -> int | None:
        """The newest committed step whose files are as they were written; None where no step is committed.

        Raises:
          UserError: the newest is damaged and `damaged` is "refuse", or all are; names step and files.
        """
        damaged: dict[int, list[str]] = {}
        steps: list[int] = peers.told(self.steps())
        for step in reversed(steps):
            if not (problems := self._problems(step)):
                self._pass_over(damaged, step)
                return step
            if self.damaged == "refuse":
                raise UserError(self._refusal(step, problems))
            damaged[step] = problems
        if damaged:
            newest = max(damaged)
            raise UserError(f"all checkpoints are damaged. {self._refusal(newest, damaged[newest])}")
        return None

    def _problems(self, step: int) -> list[str]:
        """What is wrong with the files of a step; each process reads its share, and all get the same answer."""
        if step in self._verified:
            return []
        with answered(self.directory):
            problems = manifest.verify(self.directory / str(step), peers.me(), peers.count())
        if peers.count() > 1:
            try:
                peers.settle("\n".join(problems))
            except UserError as error:
                if peers.failed() is not None:  # no answer: another process ended
                    raise
                problems = str(error).splitlines()
        if not problems:
            self._verified.add(step)
        return problems

    def _refusal(self, step: int, problems: list[str]) -> str:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        return (
            f"checkpoint {step} in {str(self.directory)!r} is damaged: {'; '.join(problems[:3])}{more}. Nothing of it "
            "was read. Put a copy of it in its place (`flaxmodels checkpoint verify` looks at all of them), or go on "
            "from the newest step that is whole with --config.checkpoint.damaged='pass over'."
        )

    def _pass_over(self, damaged: Mapping[int, list[str]], good: int) -> None:
        for step, problems in damaged.items():
            where = disk.DAMAGED
            if not self._read_only and peers.me() == 0:
                moved = disk.move(self.directory / str(step), self.directory / disk.DAMAGED)
                where = str(moved.relative_to(self.directory))
            self._notes.append(
                f"warning: checkpoint {step} is damaged: {problems[0]}"
                + (f"; and {len(problems) - 1} more" if problems[1:] else "")
                + ("" if self._read_only else f"; moved to {where}")
                + f"; going on from step {good}"
            )
        if damaged and not self._read_only:
            self._newest = peers.told(good)
            self._writer.manager.reload()

    def save(
        self,
        state: TrainState,
        step: int,
        meta: Mapping[str, Any],
        watched: float | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        """Save `state`; returns when its arrays are copied, and writes on in the background. One at a time does.

        Args:
          state: after `step` updates.
          step: its number.
          meta: JSON data.
          watched: the watched metric of this state, where it was evaluated.
          facts: more for the manifest, for whoever looks at it. Of a "parent" the newest step takes the place.
          replace: where the step is on disk, put its `meta`, `watched` and `facts` in the place of those that it has,
            all at once. Its arrays stay: a step has one state. Without it such a step stays as it is.

        Raises:
          FaultError: this save, or the one before, failed, and `failed` is "stop".
        """
        saving = self._writer
        self._report(saving.wait())
        mine = {
            "step": step, "watched": watched, "seconds": self._before + time.monotonic() - self._begun,
            "meta": {**meta, "versions": self._versions},
        }  # fmt: skip
        whole = {**(facts or {}), **mine}
        if "parent" in whole and self._newest is not None:
            whole["parent"] = self._newest
        if saving.step is not None:
            self._skipped(step)
        elif step == self._newest:
            if replace and peers.me() == 0:
                before = disk.facts(self.directory, step)
                kept: dict[str, Any] = {key: before[key] for key in ("seconds", "parent") if key in before}
                manifest.amend(self.directory / str(step), {**whole, **kept})
        elif self._newest is not None and step < self._newest:
            raise ValueError(f"step {step} is below the newest one, {self._newest}: discard what comes after it first.")
        else:
            self._saved_at = time.monotonic()
            rest = {"step": state.step, "extra": state.extra, "opt_state": state.opt_state}
            items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(rest)}
            self._newest = step
            self._verified.discard(step)
            self._report(saving.begin(step, ocp.args.Composite(**items), whole))

    def check(self) -> None:
        """See whether the save in flight has ended, and how; cheap. Called after every dispatch.

        Raises:
          FaultError: it failed, and `failed` is "stop".
        """
        if self._saving is not None:
            self._report(self._saving.look())

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
          FaultError: it failed, or takes longer than `deadline_seconds`.
        """
        if self._saving is None:
            return
        error = self._saving.wait()
        if error is not None or self._saving.step is not None:
            raise error or self._saving.slow()

    def notes(self) -> list[str]:
        """Lines for the log that came up since the last call."""
        if self._saving is not None:
            new, self._saving.notes = self._saving.notes, []
            self._notes += new
        found, self._notes = self._notes, []
        return found

    def discard(self, after: int) -> None:
        """Delete all steps above `after`, when what is in flight has landed. Raises FaultError, as `wait` does."""
        self.wait()
        if peers.me() == 0:
            disk.delete(self.directory, [step for step in self.steps() if step > after])
        self._newest = peers.told(self.latest())
        self._writer.manager.reload()

    @property
    def _writer(self) -> Saving:
        if self._saving is None:
            raise ValueError(f"the checkpoints in {str(self.directory)!r} were opened to be looked at only.")
        return self._saving

    def _skipped(self, step: int) -> None:
        self._notes.append(f"step {step} was not saved: {self._saving} is still under way")

    def _report(self, error: FaultError | None) -> None:
        """Raise an error of a save, or make a note of it and go on."""
        if error is None:
            return
        with contextlib.suppress(OSError):  # of a bucket that does not answer
            self._newest = self._in_flight or self.latest()
        if self.failed == "stop":
            raise error
        self._notes.append(f"warning: {str(error).partition('. ')[0]}; going on without it")

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data that a committed step was saved with. Raises UserError: its manifest is damaged."""
        return dict(disk.facts(self.directory, step)["meta"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Verify a step, and read it onto the mesh of `abstract`, whatever mesh it was saved from.

        Args:
          step: one of the steps on disk.
          abstract: `jax.ShapeDtypeStruct` with shardings, the tree of `state.init`.

        Raises:
          UserError: the checkpoint is damaged, or does not hold such a state.
        """
        if problems := self._problems(step):
            raise UserError(self._refusal(step, problems))
        rest = {"step": abstract.step, "extra": abstract.extra, "opt_state": abstract.opt_state}
        folder, reader = storage.for_orbax(self.directory / str(step)), ocp.StandardCheckpointHandler()
        # Before any array is read: Orbax would cast dtypes silently, and leave reads under way on another shape.
        saved = {"params": reader.metadata(folder / "params").tree, **reader.metadata(folder / "rest").tree}
        wanted = {"params": abstract.params, **rest}
        if lines := fitting.differences(fitting.leaves(saved), fitting.leaves(wanted), self.cast):
            what = f"checkpoint {step} in {str(self.directory)!r} can't be restored into this model and optimizer"
            raise UserError(fitting.refusal(what, lines, fitting.fix(lines)))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reading:
            found = reading.restore(
                folder,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    rest=ocp.args.StandardRestore(rest),
                ),
            )
        return TrainState(params=found["params"], **found["rest"])

    def close(self) -> None:
        """Wait for the save in flight, and let go.

        Raises:
          FaultError: it failed, or takes longer than `deadline_seconds`.
        """
        try:
            self.wait()
        finally:
            if self._saving is not None:
                self._saving.close()
