"""The training loop: `fit` a config in a workdir.

Read `fit`; `Run` is what happens around its steps. A *step* is one optimizer update. A *dispatch* is one call of the
compiled program, of one or several steps. The loop never waits for the device by accident: it reads the metrics of a
dispatch when the next one has been submitted, which also bounds the dispatches in flight to two.

The same command again resumes. What makes that exact: the state and its step (the position in the data, and all
randomness), and `Memory`, the few host-side numbers that lines of the log depend on.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from flaxmodels import metrics, optim, registry, resume, sections, sharding, together
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data.loading import WORKER
from flaxmodels.evaluate import StoppedError, evaluate
from flaxmodels.job import Job, assemble
from flaxmodels.registry import UserError
from flaxmodels.resume import Memory
from flaxmodels.runtime import agreement, exits, peers
from flaxmodels.runtime.lock import workdir_lock
from flaxmodels.runtime.signals import Stop
from flaxmodels.runtime.stopwatch import Stopwatch
from flaxmodels.state import TrainState
from flaxmodels.writers import Writers


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended.

    Attributes:
      state: the last state.
      step: its number.
      metrics: of the last evaluation, "eval/loss" and so on.
      finished: why the run is over; "" where a signal stopped it, and the same call would go on.
      exit_code: for the process.
    """

    state: TrainState
    step: int
    metrics: dict[str, float]
    finished: str
    exit_code: int


def fit(
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    devices: Sequence[jax.Device] | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Train, evaluate and checkpoint what a config says; resume what the workdir holds.

    In a run of several processes all call it alike, after `jax.distributed` has started; see `runtime.distributed`.

    Args:
      config: sections "model", "loss", "optim", "data", "mesh", "sharding", "precision", "train", "checkpoint", and
        "seed".
      workdir: everything is written here; one folder that all processes see.
      allow_config_change: resume although the config differs from the one that the workdir was trained with.
      allow_data_change: resume although the data are not those that the workdir was trained on.
      devices: to train on; None takes all that there are.
      stream: where to print; None is standard output.

    Raises:
      UserError: bad input of any kind, before the first step; or the processes of the run differ.
      FaultError: another process of the run failed.
    """
    if multiprocessing.current_process().name.startswith(WORKER):
        raise UserError(
            "fit was called by a data worker, which imports the script that started it: call fit below "
            '`if __name__ == "__main__":`, or set data.workers=0.'
        )
    workdir, rows = Path(workdir), sections.resolved(config)
    resolved = {key: value for key, value, _ in rows}
    devices = sharding.find_devices(resolved["mesh.platform"]) if devices is None else devices
    first = together.first()  # that one writes; Orbax saves from all
    with peers.telling(), workdir_lock(workdir) if first else contextlib.nullcontext():
        allowed = {"allow_config_change": allow_config_change, "allow_data_change": allow_data_change}
        together.same_start(workdir, resolved, devices, **allowed)
        resume.same_config(workdir, rows, allow_config_change)
        job = assemble(config, devices)
        evaluation, train = _evaluation(job), job.lower_train()
        together.same_programs(job, {"of the train step": train[0], "of the evaluation": evaluation[0]})
        # From here on there may be something to save; before, a signal simply ends the process.
        with Stop() as stop, contextlib.closing(_checkpoints(job, workdir)) as checkpoints, peers.telling():
            state, memory, changes = resume.start(job, checkpoints, allow_data_change=allow_data_change)
            start = int(state.step)
            if first:
                resume.write_config(workdir, resolved)
            with Writers(
                workdir,
                total_steps=job.total_steps,
                start_step=start,
                examples_per_step=job.train.batch_size,
                stream=stream,
                enabled=first,
            ) as writers:
                resumed = f", resumed at step {start}" if start else ""
                other = (f"going on with other data: {changes}",) if changes else ()
                for note in (*together.note(), *job.notes, f"workdir: {workdir}{resumed}", *other):
                    writers.note(note)
                writers.parameter_table(parameter_rows(job.abstract.params))
                decision = agreement.make(stop, checkpoints.late, job.mesh)
                run = Run(job, checkpoints, writers, decision, memory, resolved, train, evaluation)
                step = run.begin(state)
                with contextlib.closing(run.dispatches(step)) as dispatches:
                    for program, step, feed in dispatches:
                        with jax.transfer_guard("disallow"):
                            state, packed = program(state, feed)
                        run.after(state, step, packed)
                return run.end(state, step)


def _checkpoints(job: Job, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    options = {**job.checkpoint, "best_mode": job.cadence.mode, "read_only": read_only}
    return Checkpoints(workdir / "checkpoints", **options)


def evaluate_checkpoint(
    job: Job, workdir: str | Path, which: str = "best", *, allow_data_change: bool = False
) -> tuple[int, dict[str, float], float]:
    """Evaluate a checkpoint on the whole evaluation split, with the averaged parameters where there are some.

    Args:
      job: of the config that the workdir was trained with.
      workdir: of a run; only read.
      which: "best", "latest", or a step.
      allow_data_change: evaluate on other data than those that the workdir was trained with.

    Returns:
      (step, metrics, the weight that counted).

    Raises:
      UserError: there is no such checkpoint, or it does not fit the config.
    """
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--workdir={str(workdir)!r} has no checkpoints: train first, or name the workdir of a run.")
    with contextlib.closing(_checkpoints(job, Path(workdir), read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        named = {"best": checkpoints.best() or checkpoints.latest(), "latest": checkpoints.latest()}
        step = named.get(which, int(which) if which.isdecimal() else None)
        if step is None or step not in steps:
            known = [*named, *map(str, steps)]
            raise UserError(f"--step={which!r} is not in {str(folder)!r}. {registry.suggest(which, known)}")
        changes = resume.data_changes(job, checkpoints.meta(step), resume.EVALUATED)
        if changes and not allow_data_change:
            raise UserError(
                f"data {job.source.name!r} is not what the workdir was trained with: {changes}. "
                "Restore the data, or evaluate on these with --allow_data_change."
            )
        peers.compare({"checkpoint": {"--step": step}})
        lowered, names = job.lower_eval()
        together.same_programs(job, {"of the evaluation": lowered})
        state = checkpoints.restore(step, job.abstract)
    params = optim.parameters_average(state.opt_state, state.params)
    return step, *evaluate(lowered.compile(), params, state.extra, job.test.evaluation(), names)


def _evaluation(job: Job) -> tuple[jax.stages.Lowered, list[str]]:
    """`job.lower_eval()`, if it measures what the config wants watched (UserError)."""
    lowered, names = job.lower_eval()
    watched = [f"eval/{name}" for name in names]
    if job.cadence.metric not in watched:
        raise UserError(
            f"train.metric={job.cadence.metric!r} is not measured. {registry.suggest(job.cadence.metric, watched)}"
        )
    return lowered, names


def parameter_rows(params: Any) -> Iterator[tuple[str, Sequence[int], str, str, int, int]]:
    """(path, shape, dtype, spec, elements, bytes) of each parameter of an abstract tree."""
    for keys, x in jax.tree.leaves_with_path(params):
        spec = ((axis,) if isinstance(axis, str) else axis or ("-",) for axis in x.sharding.spec)
        axes = ", ".join("+".join(names) for names in spec)
        size = math.prod(x.shape)
        yield optim.path_of(keys), x.shape, x.dtype.name, axes, size, size * x.dtype.itemsize


def stretches(start: int, total: int, most: int, marks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut `start` to `total` into dispatches (first, number), none over `most`, none across a multiple of a mark."""
    while start < total:
        end = min([total, start + most, *(start // mark * mark + mark for mark in marks if mark)])
        yield start, end - start
        start = end


class Run:
    """What happens around the steps of one call of `fit`: logging, evaluation, saves, and when it is over.

    Args:
      job: what to train.
      checkpoints: where to save.
      writers: where to log.
      decision: when to stop, and when to save because of the time; the same in all processes.
      memory: of the restored checkpoint, or new.
      resolved: the config, for the checkpoints.
      train: of `job.lower_train()`.
      evaluation: of `job.lower_eval()`.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        writers: Writers,
        decision: agreement.Alone | agreement.Together,
        memory: Memory,
        resolved: Mapping[str, Any],
        train: tuple[jax.stages.Lowered, list[str]],
        evaluation: tuple[jax.stages.Lowered, list[str]],
    ) -> None:
        self.job, self.checkpoints, self.writers, self.memory = job, checkpoints, writers, memory
        self.decision, self.resolved = decision, dict(resolved)
        self.train_program, self.names = train
        lowered, self.eval_names = evaluation
        self.eval_program, self.norm_program = lowered.compile(), job.lower_norm().compile()
        self.evaluation: dict[str, float] = {}
        self._unread: tuple[int, int, jax.Array] | None = None
        self._watch, self._begun, self._step = Stopwatch(), time.monotonic(), 0
        self._waits: list[float] = []
        self._unreadable = 0

    def begin(self, state: TrainState) -> int:
        """The step to go on from. Evaluates it where that is still to do, or all that there is to do."""
        self._step = int(state.step)
        if self._step and self._evaluation_due(self._step):
            # A signal came in this evaluation. The step is on disk without its result, which may make it the best.
            self._evaluate(state, self._step, replace=True)
        elif self._finished(self._step):
            self.writers.note(f"finished at step {self._step} already: evaluating only")
            with contextlib.suppress(StoppedError):
                self._measure(state)
        return self._step

    def dispatches(self, step: int) -> Generator[tuple[Callable[..., Any], int, Any]]:
        """From `step` on: (compiled program, the step it ends at, its feed), till the run is over or a signal comes."""
        if self.decision.stop() or self._finished(step):
            return
        job, begun = self.job, time.monotonic()
        program = self.train_program.compile()
        self.writers.note(f"compiled in {time.monotonic() - begun:.1f} s")
        marks = (job.cadence.eval_every, self.checkpoints.every)
        plan = functools.partial(stretches, step, job.total_steps, job.cadence.steps_per_dispatch, marks)
        self._watch = Stopwatch()
        with contextlib.closing(job.train.dispatches(job.seed, plan(), job.cadence.steps_per_dispatch)) as feeds:
            for (first, count), feed in zip(plan(), self._timed(feeds)):
                if self.decision.stop() or self._finished(first):
                    return
                yield program, first + count, feed

    def _timed(self, feeds: Iterator[Any]) -> Iterator[Any]:
        """`feeds`, counting the seconds that the loop waits for the first one, and for all others."""
        self._waits = [0.0, 0.0]
        for number in itertools.count():
            begun = time.monotonic()
            feed = next(feeds, None)
            self._waits[number > 0] += time.monotonic() - begun
            if feed is None:
                return
            yield feed

    def after(self, state: TrainState, step: int, packed: jax.Array) -> None:
        """What is due after a dispatch that ended at `step`: read the one before, log, evaluate, save."""
        self._read()
        self._unread, self._step = (self._step, step - self._step, packed), step
        self.writers.progress(step)
        if self._evaluation_due(step):
            self._evaluate(state, step)
        if self.decision.late() or self.checkpoints.due(step):
            self._save(state, step)

    def end(self, state: TrainState, step: int) -> Outcome:
        """Save, and say how it ended."""
        self._save(state, step)
        self.checkpoints.wait()  # what is said to be saved, is
        finished, code = self._finished(step), exits.DONE
        seconds = time.monotonic() - self._begun
        self._warn_of_unreadable()
        if finished:
            self.writers.note(f"finished: {finished}")
            if self._waits:
                first, others = self._waits
                share = f"{others:.2f} s of {seconds:.1f} s, {others / seconds:.1%}"
                self.writers.note(f"waited for data: {share}; and {first:.2f} s for the first of them")
            self.writers.final(self.evaluation, seconds)
        elif (came := self.decision.signal) is not None:
            code = exits.SIGNALLED + came
            name, total = came.name, self.job.total_steps
            self.writers.note(f"{name}: saved step {step} of {total}; the same command goes on from there")
        return Outcome(state, step, dict(self.evaluation), finished, code)

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
        (first, count, packed), self._unread = self._unread, None
        rows = jax.device_get(packed)[:count].tolist()
        seconds = self._watch.tick(count)
        for step, row in enumerate(rows, first + 1):
            for name, (total, weight) in zip(self.names, row):
                pair = self.memory.pending.setdefault(name, [0.0, 0.0])
                pair[0] += total
                pair[1] += weight
            self._watch.add(seconds)
            if step % self.job.cadence.log_every == 0 or step == self.job.total_steps:
                self._log(step)

    def _log(self, step: int) -> None:
        means = metrics.means({name: (pair[0], pair[1]) for name, pair in self.memory.pending.items()})
        self.memory.pending = {}
        self.checkpoints.check()
        self._warn_of_unreadable()
        speed = self._watch.lap() * self.job.train.batch_size
        self.writers.write(step, {f"train/{k}": v for k, v in means.items()} | {"perf/examples_per_second": speed})

    def _warn_of_unreadable(self) -> None:
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
        with contextlib.suppress(StoppedError):
            with self._watch.paused():
                self._measure(state)
            memory, cadence = self.memory, self.job.cadence
            self.writers.write(step, self.evaluation)
            value = self.evaluation[cadence.metric]
            sign = 1 if cadence.mode == "min" else -1
            better = math.isfinite(value) and (memory.best is None or sign * value < sign * memory.best)
            memory.best, memory.stale = (value, 0) if better else (memory.best, memory.stale + 1)
            memory.evaluated = step
            if replace or (better and self.checkpoints.keep_best):
                self._save(state, step, replace=replace)

    def _measure(self, state: TrainState) -> None:
        params = optim.parameters_average(state.opt_state, state.params)
        found, _ = evaluate(
            self.eval_program, params, state.extra, self.job.test.evaluation(), self.eval_names, self.decision.stop
        )
        norm = float(jax.device_get(self.norm_program(params)))
        self.evaluation = {f"eval/{name}": value for name, value in (found | {"param_norm": norm}).items()}

    def _save(self, state: TrainState, step: int, *, replace: bool = False) -> None:
        self._read()
        with self._watch.paused():
            found = self.evaluation.get(self.job.cadence.metric, math.nan)
            watched = found if self.memory.evaluated == step and math.isfinite(found) else None
            details = resume.meta(self.job, self.memory, self.resolved)
            self.checkpoints.save(state, step, details, watched, replace=replace)
