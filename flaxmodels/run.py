"""What happens around the steps of a run: logging, evaluation, saves, bad steps, and when it is over.

`Run` is asked by `loop.fit`, which makes the steps. It never waits for the device by accident: it reads the metrics of
a dispatch when the next one has been submitted, which also bounds the dispatches in flight to two.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmodels import bottleneck, capsule, guard, lora, metrics, optim, resume
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.evaluate import StoppedError, evaluate
from flaxmodels.inference.samples import Sampler
from flaxmodels.job import Job
from flaxmodels.programs import Profiler, Programs
from flaxmodels.registry import UserError
from flaxmodels.resume import Memory
from flaxmodels.runtime import agreement, progress
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.windows import Windows
from flaxmodels.state import TrainState
from flaxmodels.step import strict
from flaxmodels.watch import Trip, Watch
from flaxmodels.writers import Writers


def open_checkpoints(job: Job, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of a workdir, with the options of a job."""
    options = {**job.checkpoint, "best_mode": job.cadence.mode, "read_only": read_only}
    return Checkpoints(workdir / "checkpoints", **options)


def stretches(start: int, total: int, most: int, marks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut `start` to `total` into dispatches (first, number), none over `most`, none across a multiple of a mark."""
    while start < total:
        end = min([total, start + most, *(start // mark * mark + mark for mark in marks if mark)])
        yield start, end - start
        start = end


class Run:
    """What happens around the steps of one stretch of a run, which begins at a checkpoint or with a fresh state.

    Args:
      job: what to train.
      workdir: of the run.
      programs: of the job.
      checkpoints: where to save.
      writers: where to log.
      decision: when to stop, and when to save because of the time; the same in all processes.
      watch: what is done about bad steps.
      memory: of the restored checkpoint, or new.
      resolved: the config, for the checkpoints.
      profiler: what watches some of the dispatches, or None.
      sampler: what writes texts at each evaluation, or None.

    Attributes:
      trip: the bad step that was seen last and is not dealt with yet, or None. Until it is, nothing is logged,
        evaluated or saved.
    """

    def __init__(
        self,
        job: Job,
        workdir: Path,
        programs: Programs,
        checkpoints: Checkpoints,
        writers: Writers,
        decision: agreement.Alone | agreement.Together,
        watch: Watch,
        memory: Memory,
        resolved: Mapping[str, Any],
        profiler: Profiler | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.job, self.workdir, self.programs, self.memory = job, workdir, programs, memory
        self.checkpoints, self.writers, self.decision, self.watch = checkpoints, writers, decision, watch
        self.resolved, self.profiler, self.sampler = dict(resolved), profiler, sampler
        self.trip: Trip | None = None
        self.evaluation: dict[str, float] = {}
        self._unread: tuple[int, int, Any, float] | None = None
        self._windows, self._begun, self._step = Windows(job.train.fed), time.monotonic(), 0
        self._handed = math.nan  # when the last dispatch was about to be made
        self._first_wait = math.nan
        self._shares: dict[str, float] = {}  # of the window before this dispatch
        self._unreadable = 0
        self._sampled = False

    def begin(self, state: TrainState) -> int:
        """The step to go on from. Evaluates it where that is still to do, or all that there is to do."""
        self._step = int(state.step)
        if self._step and self._evaluation_due(self._step):
            # A signal came in this evaluation. The step is on disk without its result, which may make it the best.
            self._evaluate(state, self._step, replace=True)
            self.checkpoints.wait()
            self.decision.rest(self._step)
        elif self._finished(self._step):
            self.writers.note(f"finished at step {self._step} already: evaluating only")
            with contextlib.suppress(StoppedError):
                self._measure(state)
        return self._step

    def dispatches(self, step: int) -> Generator[tuple[Callable[..., Any], int, Any]]:
        """From `step` on: (compiled program, the step it ends at, its feed).

        Until the run is over, a signal comes, or batches are left out.
        """
        if self.decision.stop() or self._finished(step) or self.watch.jump(step) > step:
            return
        job, compiled = self.job, self.programs.train(self.writers.note)
        program = strict(compiled)
        marks = (job.cadence.eval_every, self.checkpoints.every)
        end, most = self.watch.limit(step, job.total_steps), job.cadence.steps_per_dispatch
        plan = functools.partial(stretches, step, end, most, marks)
        with contextlib.closing(job.train.dispatches(job.seed, plan(), most)) as feeds:
            for (first, count), feed in zip(plan(), self._timed(feeds)):
                if self.decision.stop() or self._finished(first):
                    return
                self.decision.working()
                if self.profiler is not None:
                    with self._windows.uncounted():
                        self.profiler.before(first, first + count, compiled)
                yield program, first + count, feed

    def _timed(self, feeds: Iterator[Any]) -> Iterator[Any]:
        """`feeds`, counting the seconds that the loop waits for them; those for the first one apart."""
        begun = time.monotonic()
        with progress.phase("data"):
            feed = next(feeds, None)
        if math.isnan(self._first_wait):
            self._first_wait = time.monotonic() - begun
        self._windows.skip()
        spent = self._windows.spent
        while feed is not None:
            self._handed = spent("data")
            yield feed
            spent("host")
            feed = next(feeds, None)

    def after(self, state: TrainState, step: int, packed: jax.Array) -> bool:
        """What is due after a dispatch that ended at `step`: read the one before, log, evaluate, save.

        Returns:
          Whether all is well; else a step before was bad, and this dispatch has changed nothing.
        """
        self._windows.spent("dispatch")
        self._read()
        if not self.trip:
            if self._windows.unseen():
                packed.block_until_ready()
                self._windows.look(self._handed)
            self._unread, self._step = (self._step, step - self._step, packed, self._handed), step
            self.writers.progress(step)
            if self.profiler is not None:
                # A long trace takes its time to read: the phase has a limit of its own.
                with self._windows.uncounted(), progress.phase("save"):
                    self._say(self.profiler.after(step, packed))
            self.checkpoints.check()
            if self._evaluation_due(step):
                self._evaluate(state, step)
            if self.trip is None and (self.decision.late() or self.checkpoints.due(step)):
                self._save(state, step)
        return self.trip is None

    def turn(self, state: TrainState, step: int) -> tuple[TrainState, int, bool]:
        """When dispatches have ended: deal with a bad step, or leave out what is to be left out.

        Args:
          state: the last one.
          step: that its dispatch was to end at.

        Returns:
          (state, its step, whether there is more to do).

        Raises:
          FaultError: there were too many bad steps.
          RolledBackError: the run goes on from an earlier checkpoint.
        """
        self._read()
        before, trip = step, self.trip
        if trip is not None:
            self.trip, self._unread, before = None, None, trip.step
            if self.watch.wants_capsule(trip.step):
                with progress.phase("save"):
                    capsule.write(self.workdir, state, capsule.facts(self.job, trip, self.watch))
            self.writers.note(self.watch.told(trip, self.workdir))
            to = self.watch.decide(trip, self.workdir)
        else:
            to = self.watch.jump(step)
            if to == step:
                return state, step, False
        to = min(to, self.job.total_steps)
        state = self.programs.move(state, to, len(self.watch.rollbacks))
        self.watch.moved(before, to)
        self._step = to
        if self._evaluation_due(to):  # saves are due after steps that were made: these would rotate good ones out
            self._evaluate(state, to)
        return state, to, True

    def end(self, state: TrainState, step: int) -> str:
        """Save, and say how it ended: why it is over, or "" where a signal stopped it."""
        self._save(state, step)
        self.checkpoints.wait()  # what is said to be saved, is
        finished, seconds = self._finished(step), time.monotonic() - self._begun
        self._warn()
        if self.profiler is not None:
            self._say(self.profiler.close())
        if self.watch.skipped:
            self.writers.note(f"{self.watch.skipped} steps were left out, for batches that gave bad numbers")
        if finished:
            self.writers.note(f"finished: {finished}")
            if not math.isnan(self._first_wait):
                self._say(bottleneck.lines(self.job, self._windows.whole(), self._first_wait))
            self.writers.final(self.evaluation, seconds)
        elif self.decision.signal is not None:
            total = self.job.total_steps
            self.writers.note(f"{self.decision.why}: saved step {step} of {total}; the same command goes on from there")
        return finished

    def _finished(self, step: int) -> str:
        """Why the run is over after `step`, or ""."""
        memory, cadence = self.memory, self.job.cadence
        if cadence.patience and memory.stale >= cadence.patience:
            return f"no better {cadence.metric} in {memory.stale} evaluations"
        return "all steps made" if step == self.job.total_steps == memory.evaluated else ""

    def _read(self) -> None:
        """Wait for the dispatch before this one; add its metrics up, and log the lines that are complete."""
        if self._unread is None:
            return
        (first, count, packed, began), self._unread = self._unread, None
        # Read alone, the result of a program that ran out of memory hangs, or aborts (JAX 0.10.2, CPU).
        if waited := not packed.is_ready():
            packed.block_until_ready()
        seconds = self._windows.ended(began, count, seen=waited)
        # Not by `jax.device_get`: the host comes to this with cold caches after every step, and pays for each function.
        rows = np.asarray(packed)[:count].tolist()
        progress.beat(first + count)
        self._shares = {}
        for step, row in enumerate(rows, first + 1):
            self.trip = self.watch.see(step - 1, row)
            if self.trip:
                return  # the steps after it were held
            for name, (total, weight) in zip(self.programs.names, row):
                if name != guard.BAD:
                    pair = self.memory.pending.setdefault(name, [0.0, 0.0])
                    pair[0] += total
                    pair[1] += weight
            self._windows.step(seconds)
            if step % self.job.cadence.log_every == 0 or step == self.job.total_steps:
                self._log(step)

    def _log(self, step: int) -> None:
        means = metrics.means({name: (pair[0], pair[1]) for name, pair in self.memory.pending.items()})
        self.memory.pending = {}
        self._warn()
        # Lines of the log that one dispatch makes share a window.
        self._shares = self._shares or self._windows.close().shares()
        perf = {"examples_per_second": self._windows.speed() * self.job.train.batch_size, **self._shares}
        rows = {"train": means, "perf": perf}
        self.writers.write(step, {f"{group}/{key}": v for group, row in rows.items() for key, v in row.items()})

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.writers.note(line)

    def _warn(self) -> None:
        """Log what came up beside the steps: with checkpoints, and with examples that can't be read."""
        for line in self.checkpoints.notes():
            self.writers.note(line)
        feeds = (self.job.train, self.job.test)
        found, seen = sum(feed.skipped for feed in feeds), sum(feed.seen for feed in feeds)
        if found > 2 * self._unreadable:  # else every line of the log would be followed by one
            self._unreadable = found
            self.writers.note(f"warning: {found:,} of {seen:,} examples could not be read so far, and were left out")
        if any(feed.seen == feed.skipped > 0 for feed in feeds):
            raise UserError("not one example could be read: `flaxmodels data --verify` names what is damaged.")

    def _evaluation_due(self, step: int) -> bool:
        every = self.job.cadence.eval_every
        due = step == self.job.total_steps or (every > 0 and step % every == 0)
        return due and self.memory.evaluated < step

    def _evaluate(self, state: TrainState, step: int, *, replace: bool = False) -> None:
        """Evaluate, log, keep count of what is best, and save that; nothing of it where a signal comes in between."""
        self._read()
        if self.trip:
            return
        with contextlib.suppress(StoppedError):
            self._measure(state)
            memory, cadence = self.memory, self.job.cadence
            self.writers.write(step, self.evaluation)
            self._sample(state, step)
            value = self.evaluation[cadence.metric]
            sign = 1 if cadence.mode == "min" else -1
            better = math.isfinite(value) and (memory.best is None or sign * value < sign * memory.best)
            memory.best, memory.stale = (value, 0) if better else (memory.best, memory.stale + 1)
            memory.evaluated = step
            if replace or (better and self.checkpoints.keep_best):
                self._save(state, step, replace=replace)

    def _measure(self, state: TrainState) -> None:
        params = optim.parameters_average(state.opt_state, state.params)
        with self._windows.uncounted():  # compiling
            (program, norm_of), names = self.programs.evaluation, self.programs.eval_names
        with self._windows.during("evaluation"), progress.phase("evaluation"):
            found, _ = evaluate(program, params, state.extra, self.job.test.evaluation(), names, self.decision.stop)
            norm = float(jax.device_get(norm_of(params)))
        self.evaluation = {f"eval/{name}": value for name, value in (found | {"param_norm": norm}).items()}

    def _sample(self, state: TrainState, step: int) -> None:
        """Log what the model writes, as it was evaluated."""
        if self.sampler is None:
            return
        params = optim.parameters_average(state.opt_state, state.params)
        # The first time it compiles.
        counted = self._windows.during("evaluation") if self._sampled else self._windows.uncounted()
        with counted, progress.phase("evaluation" if self._sampled else "compile"):
            self._sampled = True
            try:
                self.writers.samples(step, self.sampler(params, state.extra))
            except FaultError as error:  # NaN, which `guard` judges, and not what is only looked at
                self.writers.note(f"warning: no samples at step {step}: {error}")

    def _save(self, state: TrainState, step: int, *, replace: bool = False) -> None:
        self._read()
        if self.trip:
            return
        self.decision.working()
        with self._windows.during("checkpoint"), progress.phase("save"):
            if bad := self.programs.unsound(state):
                overflowed = ", though every gradient was finite: the optimizer's update overflowed"
                raise FaultError(
                    f"step {step} is not saved: {', '.join(bad[:5])}{' and others' * (len(bad) > 5)} hold NaN or "
                    f"infinity{overflowed if self.job.guard.finite else ', and guard.finite is off'}. The last "
                    "checkpoint is from before that. Lower optim.learning_rate, or set optim.clip_norm."
                )
            found = self.evaluation.get(self.job.cadence.metric, math.nan)
            watched = found if self.memory.evaluated == step and math.isfinite(found) else None
            details = resume.meta(self.job, self.memory, self.resolved)
            facts = resume.facts(self.job, self.resolved, self.memory.origin or None)
            kept = lora.lean(state) if self.memory.base else state
            self.checkpoints.save(kept, step, details, watched, facts=facts, replace=replace)
