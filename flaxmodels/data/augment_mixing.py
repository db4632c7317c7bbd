"""Augmentations that mix examples of a batch, and their targets: mixup, cutmix. See `augment.py`.

The partner of an example is the one before it in the global batch, which is in random order. So each example has a
partner of its own, never itself, and shards of a batch exchange one example (a reversed batch would travel whole).
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from flaxmodels.data.augment import images_of
from flaxmodels.data.augment_images import box, grid, mix
from flaxmodels.data.split import Batch
from flaxmodels.registry import Fraction, Positive, Range, UserError

Alpha = Annotated[float, Range(0.001, 1000)]
# What the key of an example is split for.
MIXED, SHARE, BOX = range(3)


def mixup(
    batch: Batch,
    keys: jax.Array,
    *,
    alpha: Alpha = 0.2,
    probability: Fraction = 1.0,
    classes: Positive | None = None,
) -> Batch:
    """Mix each image and its target with another of the batch (Zhang et al. 2018, arXiv:1710.09412).

    The share of an example itself is drawn from Beta(alpha, alpha), for each example. Padding is never mixed in.

    Args:
      batch: images; targets (B,) integer, or (B, ...) float such as those mixed before.
      keys: (B,).
      alpha: of the distribution: small ones mix little, 1 is uniform.
      probability: that an example is mixed at all.
      classes: number of classes; None takes what the data say.

    Returns:
      The batch with float32 targets: (B, classes) probabilities, from integers.
    """
    images, targets = images_of(batch, "mixup"), _soft_targets(batch, classes, "mixup")
    other = _partner_share(batch, keys, alpha, probability)
    mixed = mix(images.astype(jnp.float32), _partner(images).astype(jnp.float32), _along(other, images))
    return {
        **batch,
        "inputs": mixed.astype(images.dtype),
        "targets": mix(targets, _partner(targets), _along(other, targets)),
    }


def cutmix(
    batch: Batch,
    keys: jax.Array,
    *,
    alpha: Alpha = 1.0,
    probability: Fraction = 1.0,
    classes: Positive | None = None,
) -> Batch:
    """Put a box of another image of the batch into each (Yun et al. 2019, arXiv:1905.04899).

    The sides of the box are those of the image times sqrt(1 - share), the share from Beta(alpha, alpha); its centre is
    anywhere in the image, and what is outside is lost. Targets are mixed by the pixels that were replaced.

    Args:
      batch: as in `mixup`.
      keys: (B,).
      alpha: of the distribution.
      probability: that an example is mixed at all.
      classes: number of classes; None takes what the data say.

    Returns:
      The batch with float32 targets: (B, classes) probabilities, from integers.
    """
    images, targets = images_of(batch, "cutmix"), _soft_targets(batch, classes, "cutmix")
    sides = jnp.sqrt(_partner_share(batch, keys, alpha, probability))
    shape = images.shape[1:]

    def replaced(key: jax.Array, side: jax.Array) -> jax.Array:
        return box(shape, jax.random.fold_in(key, BOX), [jnp.round(side * n).astype(jnp.int32) for n in shape[:2]])

    boxes = jax.vmap(replaced)(keys, sides)
    other = jnp.sum(boxes, axis=(1, 2, 3)) * jnp.float32(1 / (shape[0] * shape[1]))
    return {
        **batch,
        "inputs": jnp.where(boxes, _partner(images), images),
        "targets": mix(targets, _partner(targets), _along(other, targets)),
    }


def _partner(values: jax.Array) -> jax.Array:
    return jnp.roll(values, 1, axis=0)


def _along(values: jax.Array, other: jax.Array) -> jax.Array:
    """(B,) as (B, 1, ...), to go with `other`."""
    return values.reshape(-1, *[1] * (other.ndim - 1))


def _partner_share(batch: Batch, keys: jax.Array, alpha: float, probability: float) -> jax.Array:
    """(B,) share of the partner in each example, 0 where that is padding."""

    def share(key: jax.Array) -> jax.Array:
        mixed = jax.random.uniform(jax.random.fold_in(key, MIXED)) < probability
        return jnp.where(mixed, grid(symmetric_beta(jax.random.fold_in(key, SHARE), alpha)), 0.0)

    return jnp.where(_partner(batch["weights"]) == 0, 0.0, jax.vmap(share)(keys))


def symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    """One draw from Beta(alpha, alpha), a float32 scalar, from two uniform ones and without a loop.

    `jax.random.beta` rejects in loops, which all devices would have to end together. Here: if T is Student's t with 2
    alpha degrees of freedom, (1 + T / sqrt(2 alpha + T^2)) / 2 is Beta(alpha, alpha); T by Bailey 1994, "Polar
    generation of random variates with the t-distribution"; together Devroye 1996, "Random variate generation in one
    line of code", sec. 5.
    """
    radius, angle = jax.random.uniform(key, (2,))
    power = jnp.log1p(-radius) / alpha
    cosine = jnp.cos(2 * math.pi * angle)
    far = -jnp.expm1(power) * cosine**2
    return 0.5 + 0.5 * jnp.sign(cosine) * jnp.sqrt(far / (jnp.exp(power) + far))


def _soft_targets(batch: Batch, classes: int | None, name: str) -> jax.Array:
    targets, weights = batch["targets"], batch["weights"]
    if jnp.issubdtype(targets.dtype, jnp.floating) and weights.ndim == 1:
        return targets.astype(jnp.float32)
    if targets.ndim != 1 or weights.ndim != 1:
        raise UserError(
            f"data.augment has {name!r}, which is for one target an example. "
            f"The targets are {targets.dtype} {targets.shape}, the weights {weights.shape}: leave it out."
        )
    if classes is None:
        raise UserError(
            f"data.augment has {name!r}, but the data do not say how many classes there are: set 'classes'."
        )
    return jax.nn.one_hot(targets, classes, dtype=jnp.float32)
