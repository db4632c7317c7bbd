"""Whether ways to compute an update agree: the differences of their first steps, and whether these are rounding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxmodels.perf.running import STEPS

# Who ways are held against that differ from a run by design: the parts of all devices, one after the other.
IN_TURN = "in turn"
# Relative differences that rounding may make, by the dtype of the computation.
ROUNDING = {"float32": 2e-5, "bfloat16": 2e-2}


def difference(results: tuple[Any, ...], others: tuple[Any, ...], compute: str) -> dict[str, Any]:
    """How far results of `Run.results` are from those of another, ready for JSON.

    Args:
      results: of the one, whole.
      others: of the other, whole.
      compute: dtype of the computation.

    Returns:
      {"steps", "loss", "grad_norm", "params", "extra", "equal"}: the largest relative differences in `STEPS` steps, the
      relative distances of the parameters and of the other collections after them, and whether all this is rounding.
    """
    (means, *trees), (other_means, *other_trees) = results, others
    found = {
        name: float(np.max(np.abs(means[name] - other_means[name]) / np.abs(other_means[name])))
        for name in ("loss", "grad_norm")
    }
    for name, tree, other in zip(("params", "extra"), trees, other_trees):
        found[name] = _norm(jax.tree.map(np.subtract, tree, other)) / (_norm(other) or 1.0)
    return {"steps": STEPS, **found, "equal": all(value <= ROUNDING[compute] for value in found.values())}


def agree(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all differences are rounding, or meant."""
    return all(found["equal"] or meant(row, found) for row in rows for found in row["agreement"])


def meant(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a difference is one of those that "by_design" explains."""
    return bool(row["by_design"]) and "jit" in (row["name"], found["against"])


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in jax.tree.leaves(tree)))
