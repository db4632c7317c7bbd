"""Metrics are (sum, count) pairs: merging is addition, and the mean is taken once, at the end.

So accumulation over steps, microbatches, hosts and a padded last evaluation batch is exact, also when counts differ.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# name -> (sum, count), both float32 scalars.
Metrics = dict[str, tuple[jax.Array, jax.Array]]

# What a mean is turned into, by name. The pair of "perplexity" is (sum of -log p, tokens): the mean of exponentials is
# not the exponential of the mean, so it can only be taken at the end. "bits_per_byte" is (sum of -log p, UTF-8 bytes).
FINISH: Mapping[str, Callable[[float], float]] = {
    "perplexity": lambda nats: math.exp(min(nats, 700.0)),
    "bits_per_byte": lambda nats: nats / math.log(2),
}


def weighted(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`values` and `weights` of one shape -> (sum of value x weight, sum of weights), float32 scalars.

    Where a weight is 0 its value does not count, not even when it is not finite.

    Raises:
      ValueError: the shapes differ.
    """
    if values.shape != weights.shape:  # broadcasting here would be silent nonsense
        raise ValueError(f"values have shape {values.shape}, weights {weights.shape}: expected the same.")
    weights = weights.astype(jnp.float32)
    return jnp.sum(jnp.where(weights == 0, 0.0, values.astype(jnp.float32) * weights)), jnp.sum(weights)


def once(value: Any) -> tuple[jax.Array, jax.Array]:
    """A pair for what there is one of in a step, such as a norm or the learning rate."""
    return jnp.asarray(value, jnp.float32), jnp.float32(1)


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """Total / count, and 0 where nothing counted."""
    return total / jnp.where(count == 0, 1, count)


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves of a pytree, float32 scalar.

    A contraction of all axes as they are: vectorised on a CPU, and a sharded array is not gathered. In full precision,
    which on accelerators is not the default of contractions.
    """
    highest = jax.lax.Precision.HIGHEST
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum((jnp.tensordot(x, x, axes=x.ndim, precision=highest) for x in leaves), jnp.float32(0)))


def pack(metrics: Metrics) -> jax.Array:
    """All pairs as one float32 array (names, 2), names sorted: one transfer to the host instead of many."""
    return jnp.stack([jnp.stack([jnp.asarray(x, jnp.float32) for x in metrics[name]]) for name in sorted(metrics)])


def means(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Take the mean of each pair, and finish it (see `FINISH`). A name that nothing counted towards is NaN."""
    found = {}
    for name, (total, count) in totals.items():
        mean = float(total) / float(count) if count else math.nan
        found[name] = FINISH.get(name, float)(mean)
    return found
