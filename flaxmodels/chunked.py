"""The logits of a few tokens at a time: sums over tokens, and their gradient, that never hold all logits at once.

Letters in names of arrays: N tokens of one device, n those of one chunk, D width, V vocabulary.

The gradient of each chunk is computed right after its logits, in the forward pass, and kept until it is asked for:
the loss is a sum, so that its cotangent is one number to multiply by. To compute the logits again in the backward pass,
as `jax.checkpoint` would, is one matrix product in four more. What is kept is the gradient of the features, as large as
they are, and that of the kernel, added up in float32.

On a mesh each device cuts the tokens that it has, and the gradient of the kernel is summed over devices once, after the
last chunk. Left to the partitioner, it would be after each.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxmodels.metrics import Metrics

Batch = Mapping[str, jax.Array]
# Logits (n, V) float32, and of the batch what belongs to them, (n, ...) each -> metrics.
Measure = Callable[[jax.Array, Batch], Metrics]


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of features (..., D) and a kernel (D, V), accumulated in float32."""
    return jnp.einsum("...d,dv->...v", features, kernel, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(measure: Measure, chunks: int, features: jax.Array, kernel: jax.Array, batch: Batch) -> Metrics:
    """The metrics of `product(features, kernel)`, from the logits of one chunk at a time.

    Only the sum of "loss" has a gradient, and only by `features` and `kernel`.

    Args:
      measure: metrics of some tokens; those of all are the sum of those of the chunks.
      chunks: into which each device cuts its tokens, evenly; where that does not work out, the last one is filled up
        with tokens of weight 0. Of more chunks than tokens, those without any are left out.
      features: (B, ..., D). On a mesh, its rules for "batch" and "length" say where the first two axes lie.
      kernel: (D, V), of the dtype of the features.
      batch: (B, ...) each, "weights" among them.

    Returns:
      (sum, count) pairs, float32.
    """

    def local(features: jax.Array, kernel: jax.Array, batch: Batch) -> tuple[Metrics, None]:
        def one(total: Metrics, part: tuple[jax.Array, Batch]) -> tuple[Metrics, None]:
            return jax.tree.map(jnp.add, total, measure(product(part[0], kernel), part[1])), None

        parts = _cut(features, batch, chunks)
        return jax.lax.scan(one, _zeros(measure, kernel, parts), parts)

    return _on_each_device(local, features, kernel, batch)[0]


def _forward(measure: Measure, chunks: int, features: jax.Array, kernel: jax.Array, batch: Batch) -> tuple[Any, Any]:
    def local(features: jax.Array, kernel: jax.Array, batch: Batch) -> tuple[Any, jax.Array]:
        def one(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
            def objective(logits_nxV: jax.Array) -> tuple[jax.Array, Metrics]:
                found = measure(logits_nxV, part[1])
                return found["loss"][0], found

            x_nxD = part[0]
            d_nxV, found = jax.grad(objective, has_aux=True)(product(x_nxD, kernel))
            d_nxV = d_nxV.astype(kernel.dtype)  # as of logits in that dtype; matrix units want both operands in it
            d_x_nxD = jnp.einsum("nv,dv->nd", d_nxV, kernel, preferred_element_type=jnp.float32)
            d_kernel_DxV = jnp.einsum("nd,nv->dv", x_nxD, d_nxV, preferred_element_type=jnp.float32)
            return jax.tree.map(jnp.add, total, (found, d_kernel_DxV)), d_x_nxD.astype(x_nxD.dtype)

        parts = _cut(features, batch, chunks)
        start = (_zeros(measure, kernel, parts), jnp.zeros(kernel.shape, jnp.float32))
        total, d_features = jax.lax.scan(one, start, parts)
        kept = d_features.reshape(-1, features.shape[-1])[: features.size // features.shape[-1]]
        return total, kept.reshape(features.shape)

    (found, d_kernel), d_features = _on_each_device(local, features, kernel, batch)
    return found, (d_features, d_kernel.astype(kernel.dtype))


def _backward(measure: Measure, chunks: int, kept: tuple[jax.Array, jax.Array], cotangent: Metrics) -> tuple[Any, ...]:
    d_features, d_kernel = ((cotangent["loss"][0] * x).astype(x.dtype) for x in kept)
    return d_features, d_kernel, None


summed.defvjp(_forward, _backward)


def _cut(features: jax.Array, batch: Batch, chunks: int) -> tuple[jax.Array, Batch]:
    """All of (B, ..., more) -> (chunks, n, more), tokens in their order; filled up with zeros."""
    axes, N = features.ndim - 1, features.size // features.shape[-1]
    n = -(-N // chunks)
    count = -(-N // n)

    def one(x: jax.Array) -> jax.Array:
        more = x.shape[axes:]
        flat = x.reshape(N, *more)
        padded = jnp.pad(flat, [(0, count * n - N)] + [(0, 0)] * len(more)) if N % n else flat
        return padded.reshape(count, n, *more)

    return one(features), jax.tree.map(one, batch)


def _zeros(measure: Measure, kernel: jax.Array, parts: tuple[jax.Array, Batch]) -> Metrics:
    """Metrics of nothing, to add to."""
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda x, batch: measure(product(x, kernel), batch), *first)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _on_each_device(local: Callable[..., tuple[Any, Any]], features: jax.Array, kernel: jax.Array, batch: Batch) -> Any:
    """`local` of the tokens of each device: its first result is summed over devices, its second is by token.

    Axes of the mesh over which tokens do not lie, such as "tensor", remain the partitioner's.
    """
    tokens = _places(features.shape[:-1])
    axes = tuple(name for names in tokens for name in names)
    if not axes:
        return local(features, kernel, batch)

    def one(features: jax.Array, kernel: jax.Array, batch: Batch) -> tuple[Any, Any]:
        total, kept = local(features, kernel, batch)
        return jax.lax.psum(total, axes), kept

    # The kernel, whole along these axes, is gathered here, before the loop.
    place = P(*tokens)
    wrapped = jax.shard_map(
        one, in_specs=(place, P(), place), out_specs=(P(), place), axis_names=set(axes), check_vma=False
    )
    return wrapped(features, kernel, batch)


def _places(shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Axes of the mesh over which each axis of the tokens lies: those that divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    found = []
    for size, entry in zip(shape, nn.logical_to_mesh_axes(("batch", "length")) or ()):
        names: tuple[str, ...] = ()
        for name in (entry,) if isinstance(entry, str) else entry or ():
            parts = mesh.shape[name] if name in free else 1
            if parts > 1 and size % parts == 0:
                names, size = (*names, name), size // parts
        found.append(names)
    return found
