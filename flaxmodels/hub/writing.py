"""Write a model of ours as a directory that the `transformers` library reads, one array in memory at a time."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmodels import fitting, models, registry
from flaxmodels.fitting import PARAMS, Leaf
from flaxmodels.hub import families, tensor_files
from flaxmodels.hub.directory import CONFIG, INDEX, TOKENIZER, WEIGHTS
from flaxmodels.hub.families import ARCHITECTURES, Architecture
from flaxmodels.hub.links import BLOCKS, Link
from flaxmodels.paths import path_of
from flaxmodels.precision import Float
from flaxmodels.registry import UserError

# Bytes of a file of weights, as others have it.
SHARD = 5 * 10**9
# Path of ours -> the array, on a device or on the host.
Fetch = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor that will be written: parts of it, one after the other along its last axis.

    Attributes:
      name: theirs.
      links: to our arrays, in the order of their parts.
      block: the number of the block, None where it is of none.
      leaf: shape and dtype as written.
    """

    name: str
    links: tuple[Link, ...]
    block: int | None
    leaf: Leaf


def write(
    folder: Path,
    model: Mapping[str, Any],
    params: Any,
    *,
    tokenizer: str | None = None,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD,
    dtype: Float | None = None,
) -> list[Path]:
    """Write a directory; config.json comes last, so that what is cut off is no model.

    Args:
      folder: new, or empty.
      model: "name" and fields of ours.
      params: tree of arrays, on devices of this process or the host.
      tokenizer: the content of tokenizer.json.
      extra: more for config.json, such as "eos_token_id".
      shard_bytes: the most bytes of a file of weights, unless one tensor has more.
      dtype: of the tensors; None: as they are.

    Returns:
      The files.

    Raises:
      UserError: no architecture there computes what the model does, the parameters are not the model's, or the folder
        can't be written.
    """
    leaves = {PARAMS + path: leaf for path, leaf in fitting.leaves(params).items()}
    arrays = {PARAMS + path_of(keys): array for keys, array in jax.tree.leaves_with_path(params)}
    return write_fetched(
        folder, model, leaves, arrays.__getitem__, tokenizer=tokenizer, extra=extra, shard_bytes=shard_bytes,
        dtype=dtype,
    )  # fmt: skip


def write_fetched(
    folder: Path,
    model: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    fetch: Fetch,
    *,
    tokenizer: str | None = None,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD,
    dtype: Float | None = None,
) -> list[Path]:
    """As `write`, of arrays that need not be in memory.

    Args:
      leaves: path ("params/...") -> leaf.
      fetch: path -> array; of each it is asked once, or a few times where several tensors share a file with it.
    """
    leaves, fetch = _stacked(leaves, fetch)
    name, fields, config = translated(model, leaves)
    architecture = ARCHITECTURES[name]
    sizes = families.sizes(fields)
    plan = _plan(architecture, fields, leaves, dtype)
    shards = _shards(plan, shard_bytes)
    folder = new(folder)
    written = []
    try:
        for i, shard in enumerate(shards, 1):
            file = folder / (WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors")
            tensor_files.write(file, {tensor.name: tensor.leaf for tensor in shard}, _arrays(shard, fetch, sizes))
            written.append(file)
        if len(shards) > 1:
            names = {tensor.name: file.name for file, shard in zip(written, shards) for tensor in shard}
            size = {"total_size": sum(tensor.leaf.nbytes for tensor in plan)}
            written.append(_json(folder / INDEX, {"metadata": size, "weight_map": names}))
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
            written.append(folder / TOKENIZER)
        kept = {leaf.dtype for tensor in plan if (leaf := tensor.leaf)}
        said = {"architectures": [name], "model_type": architecture.kind, "torch_dtype": min(kept)}
        written.append(_json(folder / CONFIG, {**said, **config, **(extra or {})}))
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be written: {error.strerror}. Choose another --to.") from error
    return written


def translated(model: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, our complete fields, config.json) of a model of ours.

    The architecture is the first whose config.json, read again, gives the same fields.

    Raises:
      UserError: there is none; names the nearest one, and what it can't say.
    """
    options = registry.plain(models.expand(model))
    ours = options.pop("name")
    fields = families.complete(options, ours)
    fields = families.complete({**options, **families.shown(leaves, fields)}, ours)
    nearest: tuple[int, str, list[str]] | None = None
    for name, architecture in ARCHITECTURES.items():
        if architecture.model != ours:
            continue
        config = architecture.config(fields)
        again = families.complete(architecture.fields(config), ours)
        differ = [f"{key}={fields[key]!r}" for key in fields if again[key] != fields[key]]
        if not differ:
            return name, fields, config
        if nearest is None or len(differ) < nearest[0]:
            nearest = (len(differ), name, differ)
    if nearest is None:
        known = ", ".join(sorted({architecture.model for architecture in ARCHITECTURES.values()}))
        raise UserError(f"model.name={model['name']!r} has no like there: expected one of {known}.")
    raise UserError(
        f"no architecture of `transformers` that is known here computes what this model does. {nearest[1]} comes "
        f"nearest, and has no {', '.join(nearest[2])}. See models/presets.py for shapes that others have."
    )


def _plan(
    architecture: Architecture, fields: Mapping[str, Any], leaves: Mapping[str, Leaf], dtype: str | None
) -> list[Tensor]:
    """All tensors to write, in the order of our arrays."""
    sizes, layers = families.sizes(fields), fields["layers"]
    links = architecture.links(fields)
    wanted = {}
    for link in links:
        lead = (layers,) if link.of_blocks else ()
        path = PARAMS + link.ours
        wanted[path] = Leaf((*lead, *link.our_shape(sizes)), leaves[path].dtype if path in leaves else "float32")
    if lines := fitting.differences(leaves, wanted):
        raise UserError(fitting.refusal("these parameters are not those of the model", lines, "Was another one saved?"))
    parts: dict[str, tuple[Link, ...]] = {}
    for link in links:
        parts[link.theirs] = (*parts.get(link.theirs, ()), link)
    plan = []
    for theirs, of_tensor in parts.items():
        leaf = Leaf(of_tensor[0].their_shape(sizes), dtype or wanted[PARAMS + of_tensor[0].ours].dtype)
        blocks = range(layers) if of_tensor[0].of_blocks else (None,)
        plan += [Tensor(theirs if i is None else theirs.format(i), of_tensor, i, leaf) for i in blocks]
    return plan


def _stacked(leaves: Mapping[str, Leaf], fetch: Fetch) -> tuple[Mapping[str, Leaf], Fetch]:
    """The same with blocks under one path each, where they are "blocks_0", "blocks_1", ..."""
    blocks = PARAMS + BLOCKS
    first = f"{blocks[:-1]}_0/"
    inner = {path.removeprefix(first): leaf for path, leaf in leaves.items() if path.startswith(first)}
    if not inner:
        return leaves, fetch
    layers = sum(path.startswith(f"{blocks[:-1]}_") for path in leaves) // len(inner)
    others = {path: leaf for path, leaf in leaves.items() if not path.startswith(f"{blocks[:-1]}_")}
    stacked = {blocks + path: Leaf((layers, *leaf.shape), leaf.dtype) for path, leaf in inner.items()}

    def each(path: str) -> Any:
        if path in others:
            return fetch(path)
        return [fetch(f"{blocks[:-1]}_{i}/{path.removeprefix(blocks)}") for i in range(layers)]

    return {**others, **stacked}, each


def _shards(plan: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in plan:
        if shards[-1] and held + tensor.leaf.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.leaf.nbytes
    return shards


def _arrays(shard: Sequence[Tensor], fetch: Fetch, sizes: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    held: dict[str, Any] = {}
    for tensor in shard:
        paths = [PARAMS + link.ours for link in tensor.links]
        held = {path: held[path] if path in held else fetch(path) for path in paths}
        parts = []
        for path, link in zip(paths, tensor.links):
            array = held[path] if tensor.block is None else held[path][tensor.block]
            parts.append(link.to_theirs(np.asarray(array), sizes))
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        with np.errstate(over="ignore"):
            cast = joined.astype(tensor.leaf.dtype, copy=False)
        if not np.isfinite(cast).all() and np.isfinite(joined).all():
            raise UserError(f"{tensor.name} holds values that are too large for {tensor.leaf.dtype}: choose another.")
        yield tensor.name, cast


def _json(file: Path, content: Mapping[str, Any]) -> Path:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def new(folder: Path) -> Path:
    """Make a folder, or take an empty one (UserError)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={str(folder)!r} is there already: name a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to={str(folder)!r} can't be made: {error.strerror}.") from error
    return folder
