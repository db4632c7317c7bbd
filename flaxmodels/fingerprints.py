"""Fingerprints of arrays that lie on a mesh, made where they lie."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from flaxmodels import sharding


def of(tree: Mapping[str, Any]) -> str:
    """What tells a tree of arrays from others, whatever mesh it lies on.

    It is the SHA-256 of its paths, shapes and dtypes, and of sums of all bits.
    Each element's bits are mixed with its place, and added up modulo 2^32, twice, where the array lies: nothing is
    gathered. It finds mistakes, not malice.
    """
    flat = flatten_dict(tree, sep="/")
    mesh = next(
        (x.sharding.mesh for x in flat.values() if isinstance(getattr(x, "sharding", None), NamedSharding)), None
    )
    # Whole in every process of a run.
    sums = jax.device_get(jax.jit(_sums, out_shardings=mesh and sharding.replicated(mesh))(flat))
    lines = [f"{path} {flat[path].shape} {flat[path].dtype} {np.asarray(sums[path]).tolist()}" for path in sorted(flat)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sums(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _bits(x) for path, x in flat.items()}


def _bits(x: jax.Array) -> jax.Array:
    """Two sums modulo 2^32 of the elements' bits, each mixed with its place, (2,) uint32."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits, place = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32), jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Not linear in the bits: else the signs of two elements could change and leave the sum as it was.
    mixed = [_mixed(bits ^ _mixed(place + np.uint32(seed))) for seed in (1, 2**31)]
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in mixed])


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit integers that looks random (the finalizer of MurmurHash3, Appleby 2011)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
