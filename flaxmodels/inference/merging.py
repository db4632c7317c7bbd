"""A run that trained factors (`lora`), written as one that has them in its matrices: a workdir like any other."""

import contextlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxmodels import resume, shelf, storage
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data import tokenizer as tokenizers
from flaxmodels.hub import directory, writing
from flaxmodels.inference import loading
from flaxmodels.precision import Float
from flaxmodels.registry import UserError
from flaxmodels.state import TrainState


def merge(workdir: Path, which: str | int, to: Path, mesh: Mesh, dtype: Float | None = None) -> shelf.Entry:
    """Write a workdir of one checkpoint, with parameters only, that `export`, `generate` and `start.workdir` take.

    Args:
      workdir: of a run with `lora.rank`; it, and what it began from, are only read.
      which: "best", "latest", or a step. Averaged factors are taken, where the run kept some.
      to: new, or empty.
      mesh: over which the parameters lie meanwhile.
      dtype: of the parameters; None: that of the base.

    Raises:
      UserError: the run trained no factors, what it began from is not to be found, or `to` is there.
    """
    loaded = loading.load(workdir, which, mesh=mesh, dtype=dtype)
    if not loaded.config.get("lora.rank"):
        raise UserError(f"{loaded.where} has no factors: its config has no lora.rank. Use it as it is.")
    entry = shelf.find(workdir, loaded.step)
    config = {key: value for key, value in loaded.config.items() if not key.startswith(("lora.", "start."))}
    meta = {**entry.meta, "config": config, "memory": {}}
    state = TrainState(jnp.asarray(entry.step, jnp.int32), loaded.params, loaded.extra, ())
    writing.new(to)
    with contextlib.closing(Checkpoints(to / shelf.CHECKPOINTS, every_seconds=0.0)) as checkpoints:
        facts = {"time": time.time(), "parent": f"{workdir}:{entry.step}"}
        checkpoints.save(jax.block_until_ready(state), entry.step, meta, entry.metric, facts=facts)
    for name in (tokenizers.FILE, *directory.SETTINGS):
        if (workdir / name).is_file():
            storage.copy(workdir / name, to / name)
    resume.write_config(to, config)
    return shelf.find(to, entry.step)
