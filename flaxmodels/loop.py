"""The training loop: `fit` a config in a workdir.

Read `fit`, then `_stretch`; `run.Run` is what happens around its steps. A *step* is one optimizer update. A *dispatch*
is one call of the compiled program, of one or several steps.

The same command again resumes. What makes that exact: the state and its step (the position in the data, and all
randomness), and `Memory`, the few host-side numbers that lines of the log depend on.
"""

import contextlib
import dataclasses
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from flaxmodels import banner, capsule, memory, mirror, registry, resume, sections, sharding, storage, together, watch
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data.loading import WORKER
from flaxmodels.inference import samples
from flaxmodels.inference.samples import Sampler
from flaxmodels.job import Job, assemble
from flaxmodels.paths import path_of
from flaxmodels.programs import Profiler, Programs
from flaxmodels.registry import UserError
from flaxmodels.run import Run, open_checkpoints
from flaxmodels.runtime import agreement, compile_cache, exits, goodput, heap, peers, preemption, progress
from flaxmodels.runtime.lease import answered
from flaxmodels.runtime.lock import workdir_lock
from flaxmodels.runtime.signals import Stop
from flaxmodels.state import TrainState
from flaxmodels.watch import RollBack, RolledBackError, Watch
from flaxmodels.writers import Writers

# Seconds: where batches do not come, what loads them knows more of it than a watchdog, and shall have said so before.
AFTER_DATA = 5.0


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
    profiler: Profiler | None = None,
) -> Outcome:
    """Train, evaluate and checkpoint what a config says; resume what the workdir holds.

    In a run of several processes all call it alike, after `jax.distributed` has started; see `runtime.distributed`.

    Args:
      config: sections "model", "loss", "optim", "data", "mesh", "sharding", "precision", "train", "guard",
        "checkpoint", "start", "samples", and "seed".
      workdir: everything is written here; one folder that all processes see, or "gs://BUCKET/NAME".
      allow_config_change: resume although the config differs from the one that the workdir was trained with.
      allow_data_change: resume although the data are not those that the workdir was trained on.
      devices: to train on; None takes all that there are.
      stream: where to print; None is standard output.
      profiler: what watches some of the steps, such as `perf.profile.Profile`.

    Raises:
      UserError: bad input of any kind, before the first step; or the processes of the run differ.
      FaultError: another process of the run failed; a save failed; memory does not suffice; too many steps were bad.
    """
    if multiprocessing.current_process().name.startswith(WORKER):
        raise UserError(
            "fit was called by a data worker, which imports the script that started it: call fit below "
            '`if __name__ == "__main__":`, or set data.workers=0.'
        )
    peers.begin()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(together.end))
        stop.rest()  # nothing is computed yet: a signal ends the run at once
        stack.enter_context(preemption.watched(stop.ask))
        stack.enter_context(peers.telling())
        workdir, rows = storage.place(workdir), sections.resolved(config)
        resolved = {key: value for key, value, _ in rows}
        devices = sharding.find_devices(resolved["mesh.platform"]) if devices is None else devices
        if exits.commanding():  # a program that calls `fit` has its own use for the memory that it frees
            heap.keep(devices[0].platform)
        first = together.first()  # that one writes; Orbax saves from all
        if first:
            banner.ahead()
        stack.enter_context(answered(workdir))  # in all processes
        locked = stack.enter_context(workdir_lock(workdir) if first else contextlib.nullcontext(""))
        folder = stack.enter_context(mirror.kept(workdir, peers.me()))
        attempt = stack.enter_context(goodput.recorded(folder if first else None))
        allowed = {"allow_config_change": allow_config_change, "allow_data_change": allow_data_change}
        together.same_start(workdir, resolved, devices, **allowed)
        resume.same_config(workdir, rows, allow_config_change)
        removed = stack.enter_context(compile_cache.verified())  # before anything is compiled
        with progress.phase("data"):
            job = assemble(config, devices)
        sampler = samples.make(job)
        if profiler is not None:
            profiler.check(job.total_steps)
            stack.callback(profiler.stop)
        progress.allow(job.train.loading.timeout + AFTER_DATA)
        with progress.phase("compile"):
            evaluation, train = _evaluation(job), job.lower_train()
        together.same_programs(job, {"of the train step": train[0], "of the evaluation": evaluation[0]})
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(job, workdir)))
        stack.enter_context(peers.telling())  # closing checkpoints may wait for the others
        programs = Programs(job, train, evaluation, stack.enter_context(memory.explained(job)))
        context = Context(
            job, workdir, folder, programs, checkpoints, stop, attempt, resolved, allow_data_change,
            (locked, *removed), stream, profiler, sampler,
        )  # fmt: skip
        while True:
            try:
                return _stretch(context)
            except RolledBackError as back:
                checkpoints.discard(back.first)


@dataclasses.dataclass(frozen=True)
class Context:
    """What stays the same while a run goes back and starts again; fields as the variables of `fit`."""

    job: Job
    workdir: Path
    folder: Path  # for what is appended to
    programs: Programs
    checkpoints: Checkpoints
    stop: Stop
    attempt: goodput.Attempt
    resolved: Mapping[str, Any]
    allow_data_change: bool
    found: tuple[str, ...]
    stream: TextIO | None
    profiler: Profiler | None
    sampler: Sampler | None


def _stretch(of: Context) -> Outcome:
    """Train from the newest checkpoint, or a fresh state, to the end.

    Raises:
      RolledBackError: an earlier checkpoint is to go on from.
    """
    job, first = of.job, together.first()
    found = [dataclasses.astuple(entry) for entry in watch.read(of.workdir)] if first else []
    # Of process 0, which writes the file: the others may not see the last of it yet.
    rollbacks = tuple(RollBack(*entry) for entry in peers.told(found))
    with progress.phase("restore"):
        state, remembered, changes = resume.start(job, of.checkpoints, allow_data_change=of.allow_data_change)
    if (behind := watch.stale(state, rollbacks)) is not None:
        raise RolledBackError(behind)
    looking = Watch(job.guard, of.programs.names, rollbacks, state, capsule.steps(of.workdir))
    start = int(state.step)
    of.stop.rest(start)
    of.attempt.start(start)
    progress.beat(start)
    if first:
        resume.write_config(of.workdir, of.resolved)
        resume.write_tokenizer(of.workdir, job.source.tokenizer)
    with Writers(
        of.folder,
        total_steps=job.total_steps,
        start_step=start,
        examples_per_step=job.train.batch_size,
        stream=of.stream,
        enabled=first,
    ) as writers:
        lines = banner.lines(job, of.workdir, start) if first else []
        for line in filter(None, (*lines, *of.found, *changes, *of.checkpoints.notes())):
            writers.note(line)
        writers.parameter_table(parameter_rows(job.abstract.params))
        decision = agreement.make(of.stop, of.checkpoints.late, job.mesh)
        run = Run(
            job, of.workdir, of.programs, of.checkpoints, writers, decision, looking, remembered, of.resolved,
            of.profiler, of.sampler,
        )  # fmt: skip
        step, going = run.begin(state), True
        while going:
            with progress.phase("training"), contextlib.closing(run.dispatches(step)) as dispatches:
                for program, step, feed in dispatches:
                    state, packed = program(state, feed)
                    if not run.after(state, step, packed):
                        break
            state, step, going = run.turn(state, step)
        with progress.phase("end"):
            finished = run.end(state, step)
        code = exits.SIGNALLED + decision.signal if decision.signal and not finished else exits.DONE
        for line in of.attempt.end(code):
            writers.note(line)
        return Outcome(state, step, dict(run.evaluation), finished, code)


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
        yield path_of(keys), x.shape, x.dtype.name, axes, size, size * x.dtype.itemsize
