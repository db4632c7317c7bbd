"""Arrays of a directory of Hugging Face, straight to where they lie on a mesh, one after the other."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from flaxmodels import fitting
from flaxmodels.fitting import PARAMS
from flaxmodels.hub.directory import Described, Place, describe
from flaxmodels.hub.links import BLOCKS
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError

Index = tuple[slice, ...]


def read(path: str | Path, abstract: Any, *, cast: Sequence[str] | None = None) -> Any:
    """The parameters of a directory, as a tree of arrays; the host holds one of them at a time, or its shards.

    Args:
      path: a directory of Hugging Face.
      abstract: tree of `jax.ShapeDtypeStruct` of the parameters, with shardings; blocks stacked or not.
      cast: regexes of paths ("params/...") of floats that may come in another dtype than they are stored in; None lets
        all of them.

    Raises:
      UserError: as `describe`; the directory holds other parameters than `abstract`; or a number is too large for the
        dtype that it is cast to.
    """
    described = describe(path)
    wanted = {PARAMS + path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(abstract)}
    places = laid(described, wanted)
    saved = {name: place.leaf for name, place in places.items()}
    allowed = (".",) if cast is None else cast
    if lines := fitting.differences(saved, fitting.leaves({"params": abstract}), allowed, where="cast"):
        what = f"{described} can't be read into this model"
        raise UserError(fitting.refusal(what, lines, "Build the model that its config.json describes."))
    found = {name: array(name, places[name], leaf.sharding, leaf.dtype) for name, leaf in wanted.items()}
    return jax.tree.map_with_path(lambda keys, _: found[PARAMS + path_of(keys)], abstract)


def laid(described: Described, wanted: Iterable[str]) -> Mapping[str, Place]:
    """Path of ours -> where it stands; with blocks by themselves, "blocks_0/...", where the `wanted` paths say so."""
    blocks = PARAMS + BLOCKS
    first = f"{blocks[:-1]}_0/"
    if not any(path.startswith(first) for path in wanted):
        return described.places
    apart = dict[str, Place]()
    for path, place in described.places.items():
        if place.stacked:
            apart |= {f"{blocks[:-1]}_{i}/{path.removeprefix(blocks)}": one for i, one in enumerate(place.apart())}
        else:
            apart[path] = place
    return apart


def sharded(described: Described, places: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Path -> array in its stored dtype, whole or in shards as `places` says of each."""
    found = laid(described, places)
    return {path: array(path, found[path], sharding, found[path].leaf.dtype) for path, sharding in places.items()}


def array(path: str, place: Place, sharding: Sharding, dtype: Any) -> jax.Array:
    """One array on its mesh, when it is whole there. UserError where a finite number would not stay one."""
    shape, held = place.leaf.shape, dict[Any, np.ndarray]()

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple(which.indices(size) for which, size in zip(index, shape))
        if key not in held:  # devices that hold the same are asked one after the other
            held.clear()
            held[key] = _part(path, place, index, jnp.dtype(dtype))
        return held[key]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def _part(path: str, place: Place, index: Index, dtype: np.dtype[Any]) -> np.ndarray:
    """A part of an array, on the host; of the files nothing else is read."""
    which = index[0] if place.stacked else slice(None)
    inner = index[1:] if place.stacked else index
    shape = tuple(len(range(*which.indices(size))) for which, size in zip(index, place.leaf.shape))
    part = np.empty(shape, dtype)
    for out, tensor in zip(part if place.stacked else [part], place.tensors[which]):
        view = place.link.to_ours(tensor.view(), place.sizes)[inner]
        with np.errstate(over="ignore"):
            out[...] = view
        if lost := _lost(view, out):
            raise UserError(f"{path}: {lost} values of {tensor.leaf.dtype} are too large for {dtype}. Do not cast it.")
    return part


def _lost(old: np.ndarray, new: np.ndarray) -> int:
    """How many finite numbers are not finite any more."""
    if old.dtype == new.dtype or jnp.finfo(new.dtype).max >= jnp.finfo(old.dtype).max:
        return 0
    return int(np.sum(np.isfinite(old) & ~np.isfinite(new)))
