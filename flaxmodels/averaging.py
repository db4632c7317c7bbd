"""The uniform average of the parameters of several checkpoints, as a checkpoint of its own (arXiv:1803.05407)."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import fitting, shelf, storage, stored, tensors
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.fitting import Leaf
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.shelf import Entry
from flaxmodels.state import TrainState
from flaxmodels.warm import AVERAGE

# What a manifest says of one state only.
OWN = ("step", "watched", "seconds", "meta", "time", "parent", "git")


def average(found: Sequence[Entry], to: Path) -> Entry:
    """Write the average of several checkpoints as the only one of a new workdir, which `eval` and `start` can use.

    Parameters, the optimizer's average of them, and floats of other collections are summed in float64 and rounded once.
    The rest, such as moments and the step, is that of the newest. Statistics of BatchNorm are averaged like parameters:
    they are not quite those of the averaged parameters.

    Args:
      found: at least two different ones, of one model and optimizer.
      to: the new workdir.

    Raises:
      UserError: they are not of one model and optimizer, one is damaged or holds what is not finite, or `to` is there.
    """
    if len({entry.folder.resolve() for entry in found}) < 2:
        raise UserError("average: name at least two different steps.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to={str(to)!r} is there already: name a new folder.")
    for entry in found:
        shelf.check(entry)
    newest = max(found, key=lambda entry: entry.step)
    leaves = stored.tree(newest.folder)
    for entry in found:
        if lines := tensors.unlike(stored.tree(entry.folder), leaves):
            what = f"{entry} (A) and {newest} (B) can't be averaged"
            raise UserError(
                fitting.refusal(what, lines, "Name steps of one run, or of runs of one model and optimizer.")
            )
    values = _mean(found, {path: leaf for path, leaf in leaves.items() if _is_averaged(path, leaf)})
    params, rest = (_replaced(stored.raw(newest.folder, item), at, values) for item, at in stored.ITEMS.items())
    parents = [f"{entry.workdir}:{entry.step}" for entry in found]
    with contextlib.closing(Checkpoints(to / shelf.CHECKPOINTS, every_seconds=0.0)) as checkpoints:
        facts = {key: value for key, value in newest.facts.items() if key not in OWN}
        facts |= {"time": time.time(), "parent": ", ".join(parents), "average of": parents}
        meta = {**newest.meta, "memory": {}}  # nothing of it was evaluated
        checkpoints.save(TrainState(params=params, **rest), newest.step, meta, facts=facts)
    config = newest.workdir / "config.json"
    if config.exists():
        storage.copy(config, to / config.name)
    return shelf.find(to, newest.step)


def _is_averaged(path: str, leaf: Leaf) -> bool:
    floats = jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating)
    return floats and (path.startswith(("params/", "extra/")) or AVERAGE in path)


def _mean(found: Sequence[Entry], leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Path -> mean over the checkpoints."""
    values: dict[str, np.ndarray] = {}
    for portion in stored.portions(leaves):
        sums: dict[str, Any] = dict.fromkeys(portion, 0.0)
        for entry in found:
            for path, array in stored.arrays(entry.folder, portion).items():
                sums[path] = sums[path] + array.astype(np.float64)
                if not np.isfinite(sums[path]).all():
                    raise UserError(f"{path} of {entry} is not finite: average others.")
        values |= {path: (total / len(found)).astype(jnp.dtype(leaves[path].dtype)) for path, total in sums.items()}
    return values


def _replaced(tree: Any, prefix: str, values: Mapping[str, np.ndarray]) -> Any:
    return jax.tree.map_with_path(lambda keys, x: values.get(prefix + path_of(keys), x), tree)
