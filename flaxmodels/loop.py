"""The training loop: `fit` a config in a workdir.

Read `fit`, then `Run.train`. A *step* is one optimizer update. A *dispatch* is one call of the compiled program, of one
or several steps. The loop never waits for the device by accident: it reads the metrics of a dispatch when the next one
has been submitted, which also bounds the dispatches in flight to two.

The same command again resumes. What makes that exact: the state and its step (the position in the data, and all
randomness), and `Memory`, the few host-side numbers that lines of the log depend on.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from flaxmodels import metrics, optim, registry, sections, sharding
from flaxmodels.checkpoint import Checkpoints, versions
from flaxmodels.evaluate import StoppedError, evaluate
from flaxmodels.job import Job, assemble
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits
from flaxmodels.runtime.lock import workdir_lock
from flaxmodels.runtime.signals import Stop
from flaxmodels.state import TrainState
from flaxmodels.writers import Writers

# Keys that a resumed run may change: they decide when and where things happen, not what is computed.
FREE_KEYS = (
    "train.log_every", "train.eval_every", "train.patience", "train.metric", "train.mode",
    "checkpoint.", "mesh.", "sharding.", "data.placement", "data.eval_batch_size", "data.data_dir", "data.manual_dir",
)  # fmt: skip


@dataclasses.dataclass
class Memory:
    """What a resumed run must know beside its arrays, saved as JSON in each checkpoint.

    Attributes:
      pending: sums and counts of training metrics since the last line of the log, float64.
      evaluated: the last step that was evaluated.
      best: the best value of the watched metric.
      stale: evaluations since then.
      finished: why the run is over; "" while it is not.
    """

    pending: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    evaluated: int = 0
    best: float | None = None
    stale: int = 0
    finished: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended.

    Attributes:
      state: the last state.
      step: its number.
      metrics: of the last evaluation, "eval/loss" and so on.
      finished: why the run is over; "" where a signal stopped it and the same call would go on.
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
    devices: Sequence[jax.Device] | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Train, evaluate and checkpoint what a config says; resume what the workdir holds.

    Args:
      config: sections "model", "loss", "optim", "data", "mesh", "sharding", "train", "checkpoint", and "seed".
      workdir: everything is written here.
      allow_config_change: resume although the config differs from the one that the workdir was trained with.
      devices: to train on; None takes all that there are.
      stream: where to print; None is standard output.

    Raises:
      UserError: bad input of any kind, before the first step.
    """
    workdir = Path(workdir)
    resolved = {key: value for key, value, _ in sections.resolved(config)}
    devices = sharding.find_devices(resolved["mesh.platform"]) if devices is None else devices
    with Stop() as stop, _first_process(workdir_lock(workdir)):
        _same_config(workdir, resolved, allow_config_change)
        job = assemble(config, devices)
        evaluation = _evaluation(job)
        checkpoints = Checkpoints(workdir / "checkpoints", best_mode=job.cadence.mode, **job.checkpoint)
        with contextlib.closing(checkpoints):
            state, memory = _start(job, checkpoints)
            start = int(state.step)
            _write_config(workdir, resolved)
            with Writers(
                workdir,
                total_steps=job.total_steps,
                start_step=start,
                examples_per_step=job.train.batch_size,
                stream=stream,
                enabled=jax.process_index() == 0,
            ) as writers:
                for note in (*job.notes, f"workdir: {workdir}" + (f", resumed at step {start}" if start else "")):
                    writers.note(note)
                writers.parameter_table(parameter_rows(job.abstract.params))
                return Run(job, checkpoints, writers, stop, memory, resolved, evaluation).train(state)


def evaluate_checkpoint(job: Job, workdir: str | Path, which: str = "best") -> tuple[int, dict[str, float], float]:
    """Evaluate a checkpoint on the whole evaluation split, with the averaged parameters where there are some.

    Args:
      job: of the config that the workdir was trained with.
      workdir: of a run; only read.
      which: "best", "latest", or a step.

    Returns:
      (step, metrics, the weight that counted).

    Raises:
      UserError: there is no such checkpoint, or it does not fit the config.
    """
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--workdir={str(workdir)!r} has no checkpoints: train first, or name the workdir of a run.")
    checkpoints = Checkpoints(folder, best_mode=job.cadence.mode, read_only=True, **job.checkpoint)
    with contextlib.closing(checkpoints):
        steps = checkpoints.steps()
        named = {"best": checkpoints.best() or checkpoints.latest(), "latest": checkpoints.latest()}
        step = named.get(which, int(which) if which.isdecimal() else None)
        if step is None or step not in steps:
            known = [*named, *map(str, steps)]
            raise UserError(f"--step={which!r} is not in {str(folder)!r}. {registry.suggest(which, known)}")
        state, _ = checkpoints.restore(step, job.abstract)
    lowered, names = job.lower_eval()
    params = optim.parameters_average(state.opt_state, state.params)
    return step, *evaluate(lowered.compile(), params, state.extra, job.test.evaluation(), names)


def _first_process(context: contextlib.AbstractContextManager[None]) -> contextlib.AbstractContextManager[None]:
    """`context` on process 0; nothing on the others, which share its workdir."""
    return context if jax.process_index() == 0 else contextlib.nullcontext()


def _start(job: Job, checkpoints: Checkpoints) -> tuple[TrainState, Memory]:
    """The newest checkpoint, or a fresh state."""
    newest = checkpoints.latest()
    if newest is None:
        return job.fresh(), Memory()
    if newest > job.total_steps:
        raise UserError(
            f"train.duration is {job.total_steps} steps, but the workdir is at step {newest} already: "
            "choose a longer duration, or another --workdir."
        )
    state, meta = checkpoints.restore(newest, job.abstract)
    if meta["fingerprint"] != job.source.fingerprint:
        raise UserError(
            f"data {job.source.name!r} has fingerprint {job.source.fingerprint}, but the workdir was trained on "
            f"{meta['fingerprint']}: the content differs. Restore the data, or choose another --workdir."
        )
    return state, Memory(**meta["memory"])


def _same_config(workdir: Path, resolved: Mapping[str, Any], allowed: bool) -> None:
    """Refuse a workdir of another config, unless that one never came to save a step."""
    file, now = workdir / "config.json", json.loads(json.dumps(resolved))
    if file.exists() and any(folder.name.isdecimal() for folder in (workdir / "checkpoints").glob("*")):
        old = json.loads(file.read_text())["config"]
        keys = [k for k in sorted({*old, *now}) if not k.startswith(FREE_KEYS) and old.get(k) != now.get(k)]
        if keys and not allowed:
            changes = "; ".join(f"{k} was {old.get(k)!r}, is {now.get(k)!r}" for k in keys[:5])
            raise UserError(
                f"--workdir={str(workdir)!r} belongs to another config: {changes}. "
                "Choose another --workdir, or resume all the same with --allow_config_change."
            )


def _write_config(workdir: Path, resolved: Mapping[str, Any]) -> None:
    """Write the config beside the checkpoints, with versions."""
    if jax.process_index() == 0:
        new = workdir / "config.tmp"
        new.write_text(json.dumps({"config": resolved, "versions": versions()}, indent=1) + "\n")
        new.replace(workdir / "config.json")


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
        axes = ", ".join("-" if axis is None else str(axis) for axis in x.sharding.spec)
        size = math.prod(x.shape)
        yield optim.path_of(keys), x.shape, x.dtype.name, axes, size, size * x.dtype.itemsize


def stretches(start: int, total: int, most: int, marks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut `start` to `total` into dispatches (first, number), none over `most`, none across a multiple of a mark."""
    while start < total:
        end = min([total, start + most, *(start // mark * mark + mark for mark in marks if mark)])
        yield start, end - start
        start = end


class Run:
    """One call of `fit` at work.

    Args:
      job: what to train.
      checkpoints: where to save.
      writers: where to log.
      stop: whether a signal came.
      memory: of the restored checkpoint, or new.
      resolved: the config, for the checkpoints.
      evaluation: of `job.lower_eval()`.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        writers: Writers,
        stop: Stop,
        memory: Memory,
        resolved: Mapping[str, Any],
        evaluation: tuple[jax.stages.Lowered, list[str]],
    ) -> None:
        self.job, self.checkpoints, self.writers, self.stop, self.memory = job, checkpoints, writers, stop, memory
        self.resolved = dict(resolved)
        lowered, self.eval_names = evaluation
        self.eval_program, self.norm_program = lowered.compile(), job.lower_norm().compile()
        self.names: list[str] = []
        self.evaluation: dict[str, float] = {}
        self._unread: tuple[int, int, jax.Array] | None = None
        self._watch = _Stopwatch()

    def train(self, state: TrainState) -> Outcome:
        """From `state` to the end of the run, or to a signal."""
        job, memory, begun = self.job, self.memory, time.monotonic()
        step = int(state.step)
        if memory.finished or step == job.total_steps:
            self.writers.note(f"finished at step {step} already ({memory.finished}): evaluating only")
            with contextlib.suppress(StoppedError):
                self._measure(state)
            return self._end(state, step, begun)
        lowered, self.names = job.lower_train()
        program = lowered.compile()
        self.writers.note(f"compiled in {time.monotonic() - begun:.1f} s")
        marks = (job.cadence.eval_every, self.checkpoints.every)
        plan = functools.partial(stretches, step, job.total_steps, job.cadence.steps_per_dispatch, marks)
        if step and self._evaluation_due(step):
            self._evaluate(state, step)  # the signal that ended the last process came in this evaluation
        feeds = job.train.dispatches(job.seed, plan(), job.cadence.steps_per_dispatch)
        with contextlib.closing(feeds):
            for (first, count), feed in zip(plan(), feeds):
                if self.stop or memory.finished:
                    break
                with jax.transfer_guard("disallow"):
                    state, packed = program(state, feed)
                step = first + count
                self._read()
                self._unread = (first, count, packed)
                self.writers.progress(step)
                if self._evaluation_due(step):
                    self._evaluate(state, step)
                if self.checkpoints.due(step):
                    self._save(state, step)
        self._read()
        if step == job.total_steps:
            memory.finished = memory.finished or "all steps made"
        self._save(state, step)
        return self._end(state, step, begun)

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
        speed = self._watch.lap() * self.job.train.batch_size
        self.writers.write(step, {f"train/{k}": v for k, v in means.items()} | {"perf/examples_per_second": speed})

    def _evaluation_due(self, step: int) -> bool:
        every = self.job.cadence.eval_every
        due = step == self.job.total_steps or (every > 0 and step % every == 0)
        return due and self.memory.evaluated < step

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Evaluate, log, and keep count of what is best."""
        self._read()
        with self._watch.paused(), contextlib.suppress(StoppedError):
            self._measure(state)
            memory, cadence = self.memory, self.job.cadence
            memory.evaluated = step
            self.writers.write(step, self.evaluation)
            value = self.evaluation[cadence.metric]
            sign = 1 if cadence.mode == "min" else -1
            better = math.isfinite(value) and (memory.best is None or sign * value < sign * memory.best)
            memory.best, memory.stale = (value, 0) if better else (memory.best, memory.stale + 1)
            if cadence.patience and memory.stale >= cadence.patience:
                memory.finished = f"no better {cadence.metric} in {memory.stale} evaluations"
                self.writers.note(f"stopping early: {memory.finished}")
        if self.memory.evaluated == step and self.memory.stale == 0 and self.checkpoints.keep_best:
            self._save(state, step)

    def _measure(self, state: TrainState) -> None:
        params = optim.parameters_average(state.opt_state, state.params)
        found, _ = evaluate(
            self.eval_program, params, state.extra, self.job.test.evaluation(), self.eval_names, lambda: bool(self.stop)
        )
        norm = float(jax.device_get(self.norm_program(params)))
        self.evaluation = {f"eval/{name}": value for name, value in (found | {"param_norm": norm}).items()}

    def _save(self, state: TrainState, step: int) -> None:
        self._read()
        with self._watch.paused():
            meta = {
                "memory": dataclasses.asdict(self.memory),
                "fingerprint": self.job.source.fingerprint,
                "config": self.resolved,
            }
            watched = self.evaluation.get(self.job.cadence.metric) if self.memory.evaluated == step else None
            self.checkpoints.save(state, step, meta, watched if watched is None or math.isfinite(watched) else None)

    def _end(self, state: TrainState, step: int, begun: float) -> Outcome:
        self.checkpoints.check()
        if self.memory.finished:
            self.writers.final(self.evaluation, time.monotonic() - begun)
        code = exits.DONE
        if not self.memory.finished and self.stop.signal is not None:
            code = 128 + self.stop.signal
            name = self.stop.signal.name
            self.writers.note(
                f"{name}: saved step {step} of {self.job.total_steps}; the same command goes on from there"
            )
        return Outcome(state, step, dict(self.evaluation), self.memory.finished, code)


class _Stopwatch:
    """Steps a second of training proper: evaluations and saves are not counted. Monotonic clock."""

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
