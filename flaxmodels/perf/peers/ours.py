"""Ours: `fit`, as users call it, or the compiled step that it calls, alone."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmodels import loop, version, writers
from flaxmodels.job import assemble
from flaxmodels.perf.peers.trainer import Trainer, stepping
from flaxmodels.perf.peers.works import WARM, Work
from flaxmodels.runtime import compiles, heap, progress


def start(work: Work, folder: Path, cores: int, bare: bool = False) -> Trainer:
    """Set up; `bare` is the compiled step in a loop."""
    versions = {"flaxmodels": version.__version__, "jax": jax.__version__}
    return _bare(work, versions) if bare else _fit(work, folder, versions)


def _fit(work: Work, folder: Path, versions: dict[str, str]) -> Trainer:
    workdir, compiled = folder / "workdir", list[compiles.Compile]()

    heap.keep("cpu")  # as a command does

    def run() -> None:
        nonlocal compiled
        with Path(os.devnull).open("w") as nowhere, compiles.heard() as compiled:
            loop.fit(work.config, workdir, stream=nowhere)

    def loss() -> float | None:
        if (progress.now().step or 0) < WARM:
            return None
        rows = writers.read_metrics(workdir / "metrics.jsonl")
        return next((row["train/loss"] for row in rows if row["step"] == WARM and "train/loss" in row), None)

    return Trainer(run, lambda: progress.now().step or 0, loss, versions, compiles=lambda: len(compiled))


def _bare(work: Work, versions: dict[str, str]) -> Trainer:
    """Fed with batches that lie on the device already: what `fit` does beside this is what it costs."""
    job = assemble(work.config)
    heap.keep(job.mesh.devices.flat[0].platform)
    lowered, names = job.lower_train()
    program, state = lowered.compile(), job.fresh()
    size = sum(x.size for x in jax.tree.leaves(job.abstract.params))
    most, number = job.cadence.steps_per_dispatch, names.index("loss")
    turn = job.train.rows(most) // most  # dispatches whose batches lie in one piece
    with contextlib.closing(job.train.dispatches(job.seed, [(i * most, most) for i in range(turn)], most)) as feeds:
        feed = next(feeds)
    where, before = feed["first"].sharding, None

    def step(i: int) -> Any:
        nonlocal state, before
        if i % turn == 0:  # the same batches again
            feed["first"] = jax.device_put(np.int32(i * most), where)
        state, packed = program(state, feed)
        jax.block_until_ready(before)  # at most two dispatches under way, as in a run
        before = packed
        return packed

    def mean(losses: Sequence[Any]) -> float:
        rows = np.concatenate(jax.device_get(losses))[:WARM, number]
        return float(np.mean(rows[:, 0] / rows[:, 1]))

    return stepping(step, mean, versions, size, most)
