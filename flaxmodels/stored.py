"""The arrays of one stored step by their paths, without the model and the optimizer that they belong to."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from flaxmodels import fitting, storage
from flaxmodels.fitting import Leaf
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.runtime.lease import answered

# Item of a step -> what its paths begin with.
ITEMS = {"params": "params/", "rest": ""}
# Bytes that are read at a time where the host shall never hold a whole model.
PORTION = 2**28


def tree(folder: Path) -> dict[str, Leaf]:
    """Path -> leaf of all that a step holds, such as "params/head/kernel"; no array is read.

    Raises:
      UserError: the folder is not that of a step, or can't be read.
      FaultError: its bucket does not answer.
    """
    found: dict[str, Leaf] = {}
    for item, prefix in ITEMS.items():
        found |= {prefix + path: leaf for path, leaf in fitting.leaves(_metadata(folder, item)).items()}
    return found


def arrays(folder: Path, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Path -> array on the host, of the paths that are named."""
    return _read(folder, {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})


def sharded(folder: Path, places: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Path -> array, whole or in shards as `places` says of each, whatever mesh it was saved from."""
    return _read(folder, {path: ocp.ArrayRestoreArgs(sharding=place) for path, place in places.items()})


def portions(leaves: Mapping[str, Leaf], limit: int = PORTION) -> Iterator[list[str]]:
    """The paths in their order, in lists whose arrays take at most `limit` bytes, or one array."""
    portion: list[str] = []
    held = 0
    for path, leaf in leaves.items():
        if portion and held + leaf.nbytes > limit:
            yield portion
            portion, held = [], 0
        portion.append(path)
        held += leaf.nbytes
    if portion:
        yield portion


def raw(folder: Path, item: str) -> Any:
    """One item of a step as dicts, lists and arrays on the host."""
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(folder, item))
    return _restored(folder, item, ocp.args.PyTreeRestore(restore_args=wanted))


def _read(folder: Path, wanted: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item, prefix in ITEMS.items():
        args = jax.tree.map_with_path(
            lambda keys, _, prefix=prefix: wanted.get(prefix + path_of(keys), ocp.PLACEHOLDER),
            _metadata(folder, item),
        )
        if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(args)):
            continue
        # A placeholder in the tree is not read at all.
        tree = jax.tree.map(lambda leaf: leaf if leaf is ocp.PLACEHOLDER else 0, args)
        restored = _restored(folder, item, ocp.args.PyTreeRestore(item=tree, restore_args=args))
        leaves = ((prefix + path_of(keys), x) for keys, x in jax.tree.leaves_with_path(restored))
        found |= {path: x for path, x in leaves if x is not ocp.PLACEHOLDER}
    return {path: found[path] for path in wanted}


def _metadata(folder: Path, item: str) -> Any:
    try:
        return ocp.PyTreeCheckpointHandler().metadata(storage.for_orbax(folder / item)).tree
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error


def _restored(folder: Path, item: str, args: ocp.args.PyTreeRestore) -> Any:
    try:
        return ocp.PyTreeCheckpointHandler().restore(storage.for_orbax(folder / item), args=args)
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    """What is wrong with a step that can't be read. Raises FaultError where its bucket does not answer, which is no
    damage: what Orbax says of both is the same kind of error.
    """
    if storage.is_object(folder):
        with answered(folder.parent.parent):
            folder.exists()
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"step {folder.name} in {str(folder.parent)!r} can't be read: {said[:300]}\n"
        f"`flaxmodels checkpoint verify --workdir={folder.parent.parent} {folder.name}` names what is damaged."
    )
