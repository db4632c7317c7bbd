"""The base of a run that trains factors (`lora`), which its checkpoints leave out where `start` brings it again.

Beside such a checkpoint's factors stands the fingerprint of the base that they were trained with. Who restores it reads
the base from where the run began, and is refused any other.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from flaxmodels import fingerprints, fitting, lora, precision, sharding, warm
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.lora import Adapted, Lora
from flaxmodels.precision import Float
from flaxmodels.registry import UserError
from flaxmodels.shelf import Entry
from flaxmodels.state import BASE, TrainState
from flaxmodels.warm import Origin


def described(origin: Origin, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of a base that it leaves out, ready for JSON; {} where it must hold the base itself.

    Args:
      origin: the section `start`.
      extra: of the first state.

    Returns:
      {"fingerprint": of the base, "leaves": path -> (shape, dtype)}; {} where there is none, or not all of it came from
      where the section says.
    """
    if BASE not in extra or origin.workdir is None:
        return {}
    leaves = fitting.leaves(extra[BASE])
    names, fresh = [fitting.PARAMS + path for path in leaves], fitting.compiled(origin.fresh, "start.fresh")
    if not all(re.search(origin.only, name) and not fitting.selects(fresh, name) for name in names):
        return {}
    kinds = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return {"fingerprint": fingerprints.of(extra[BASE]), "leaves": kinds}


def read(origin: Origin, memory: Mapping[str, Any], abstract: Any) -> Any:
    """The base that a checkpoint left out.

    Args:
      origin: the section `start`; where it names no workdir, the one that the run began from is taken.
      memory: of the checkpoint's meta: "origin" says where the run began, "base" is of `described`.
      abstract: of the base: `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: it is not there, or another one is.
    """
    tree = {"extra": {BASE: abstract}}
    names = [warm.outside(path) for path in fitting.leaves(tree)]
    workdir, *step = re.split(r":(?=\d+$)", memory["origin"])
    origin = dataclasses.replace(
        origin,
        workdir=origin.workdir or workdir,
        step=int(step[0]) if step else Origin.step,
        fresh=(),
        cast=tuple(pattern for pattern in origin.cast if any(re.search(pattern, name) for name in names)),
    )
    entry = warm.find(origin)
    found, _ = warm.read(origin, entry, tree)
    base = warm.filled(tree, found)["extra"][BASE]
    now, was = fingerprints.of(base), memory["base"]["fingerprint"]
    if now != was:
        raise UserError(
            f"start.workdir: {entry} is not the base that these factors were trained with: its fingerprint is "
            f"{now[:12]}, was {was[:12]}. Name the run that this one began from, as it was then."
        )
    return base


def restored(checkpoints: Checkpoints, step: int, abstract: TrainState, origin: Origin) -> TrainState:
    """`checkpoints.restore`, with the base where the checkpoint left it out.

    Args:
      checkpoints: of a run.
      step: one of the steps on disk.
      abstract: `jax.ShapeDtypeStruct` with shardings, the tree of `state.init`.
      origin: the section `start` of the run's config.

    Raises:
      UserError: the checkpoint is damaged, does not hold such a state, or its base is not to be found.
    """
    memory = checkpoints.meta(step).get("memory", {})
    if not memory.get("base") or BASE not in abstract.extra:
        return checkpoints.restore(step, abstract)
    state = checkpoints.restore(step, lora.lean(abstract))  # before the base is read, which may take long
    return state.replace(extra={**state.extra, BASE: read(origin, memory, abstract.extra[BASE])})


def merged(
    model: nn.Module, params: Any, extra: Any, entry: Entry, mesh: Mesh, dtype: Float | None = None
) -> tuple[nn.Module, Any, Any]:
    """What a checkpoint of a run holds as a bare model: factors in their matrices, which come from where it began.

    Args:
      model: the bare module.
      params: of the checkpoint.
      extra: of the checkpoint.
      entry: the checkpoint.
      mesh: where the base shall lie, by the built-in rules.
      dtype: of the result's floats; None: that of the base.

    Returns:
      (model, params, extra): these very ones where the run trained no factors.

    Raises:
      UserError: the base is not to be found.
    """
    config, memory = entry.meta.get("config", {}), entry.meta.get("memory", {})
    options = Lora(**_section(config, "lora"))
    if not options.rank:
        return model, params, extra
    if BASE not in extra:
        kinds = {path: (tuple(shape), kind) for path, (shape, kind) in memory["base"]["leaves"].items()}
        places = {path: NamedSharding(mesh, sharding.spec_of(path, shape, mesh)) for path, (shape, _) in kinds.items()}
        leaves = {path: jax.ShapeDtypeStruct(*kind, sharding=places[path]) for path, kind in kinds.items()}
        base = read(Origin(**_section(config, "start")), memory, unflatten_dict(leaves, sep="/"))
        extra = {**extra, BASE: base}
    model, params, extra = lora.merge(Adapted(model, options), params, extra)
    return model, precision.cast(params, dtype), extra


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a stored config, with the tuples that JSON made lists of."""
    found = {key.removeprefix(f"{name}."): value for key, value in config.items() if key.startswith(f"{name}.")}
    return {key: _tuples(value) for key, value in found.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
