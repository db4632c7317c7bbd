"""Ours: `fit`, as users call it, or the compiled step that it calls, alone; and `Generator`, where a work generates."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from flaxmodels import loop, models, sharding, version, writers
from flaxmodels.inference import weights
from flaxmodels.inference.generate import Generator
from flaxmodels.inference.sampling import Sampling
from flaxmodels.job import assemble
from flaxmodels.models.presets import PRESETS
from flaxmodels.perf.peers.trainer import Trainer, repeating, stepping
from flaxmodels.perf.peers.works import WARM, Work
from flaxmodels.runtime import compiles, heap, progress


def start(work: Work, folder: Path, cores: int, bare: bool = False, precision: weights.Precision = "given") -> Trainer:
    """Set up; `bare` is the compiled step in a loop, `precision` that of the weights that text is generated with."""
    versions = {"flaxmodels": version.__version__, "jax": jax.__version__}
    if work.tokens:
        return _text(work, folder, versions, precision)
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


def _text(work: Work, folder: Path, versions: dict[str, str], precision: weights.Precision) -> Trainer:
    heap.keep("cpu")
    prompts = np.load(folder / "inputs.npy")[: work.batch_size]
    name, fields = PRESETS[work.config["model"]["name"]]
    whole, mesh = models.build(name, **fields), sharding.make_mesh()
    init = jax.jit(lambda: whole.init(jax.random.key(0), prompts)["params"], out_shardings=sharding.replicated(mesh))
    params = init()
    size = sum(x.size for x in jax.tree.leaves(params))
    model, params = weights.prepare(whole, params, precision)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        with weights.reading():
            logits = model.apply({"params": params}, prompts)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], prompts[:, 1:]).mean()

    found, length = float(loss(params)), prompts.shape[1] + work.tokens
    generator = Generator(model, params, batch=len(prompts), length=length, mesh=mesh)
    return repeating(
        lambda: generator.complete(prompts.tolist(), Sampling(temperature=0), work.tokens), found, versions, size
    )
