"""The memory of generation: keys and values of the tokens so far, in a ring of fixed shape.

The attention over it is in `masked.py`. A token of position p lies in slot p % S, so that what a window of attention no
longer sees is written over, and no shape ever changes. A row in which another text begins need not be emptied: places
of the old one are written over when the new one comes to them, and no token sees places after its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels.meshes import BATCH_AXES
from flaxmodels.registry import UserError

EMPTY = -1  # the place of a slot that holds nothing; the position of padding


def check(model: Any) -> None:
    """UserError for a model that can't generate: it keeps no cache, gives classes, or its tokens see what follows."""
    classes = hasattr(model, "classes")
    if not hasattr(model, "windows") or not model.causal or classes:
        what = (
            "keeps no cache" if not hasattr(model, "windows") else "gives classes" if classes else "sees what follows"
        )
        raise UserError(f"model {type(model).__name__} can't generate text: it {what}. Use a causal transformer.")


def slots(model: Any, length: int) -> int:
    """How many slots rows of `length` positions need: as many, or fewer where every layer has a window.

    Args:
      model: a `Transformer`.
      length: positions are below it.
    """
    return min(length, max(model.windows)) if all(model.windows) else length


def abstract(model: Any, rows: int, slots: int, mesh: Mesh) -> Any:
    """What a cache is like: a tree of `jax.ShapeDtypeStruct` with shardings.

    Rows lie over the mesh's `data` and `fsdp`, heads over `tensor`, each where that divides them.

    Args:
      model: a `Transformer`.
      rows: B.
      slots: S.
      mesh: that the model's parameters lie on.

    Returns:
      {"places": (B, S) int32, the position that each slot holds, "blocks": {"key", "value"} of (L, B, K, S, H) in the
      model's dtype}; of a model that is not `stacked`, "blocks" is a tuple over the layers, of (B, K, S, H).

    Raises:
      UserError: as `check`.
    """
    check(model)
    heads = model.kv_heads or model.heads
    shape: tuple[int, ...] = (rows, heads, slots, model.head_size or model.width // model.heads)
    batch = _dividing(mesh, BATCH_AXES, rows)
    spec: tuple[Any, ...] = (batch, _dividing(mesh, ("tensor",), heads), None, None)
    if model.stacked:
        shape, spec = (model.layers, *shape), (None, *spec)
    array = jax.ShapeDtypeStruct(shape, model.dtype, sharding=NamedSharding(mesh, P(*spec)))
    block = {"key": array, "value": array}
    places = jax.ShapeDtypeStruct((rows, slots), jnp.int32, sharding=NamedSharding(mesh, P(batch, None)))
    return {"places": places, "blocks": block if model.stacked else (block,) * model.layers}


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    return axes if size % parts == 0 else None


def empty(like: Any) -> Any:
    """A cache that holds nothing.

    Args:
      like: of `abstract`.
    """

    def make() -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return {**zeros, "places": jnp.full_like(zeros["places"], EMPTY)}

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))()


def reorder(cache: Any, rows: jax.Array) -> Any:
    """The cache with other rows: row i becomes what row `rows[i]` (B,) was."""
    blocks = cache["blocks"]
    axis = 0 if isinstance(blocks, tuple) else 1  # after the layers, where these are stacked
    return {
        "places": cache["places"][rows],
        "blocks": jax.tree.map(lambda x: jnp.take(x, rows, axis=axis, mode="clip"), blocks),
    }
