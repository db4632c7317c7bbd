"""What a train step keeps in memory between its forward and its backward pass, by tracing it; nothing is compiled."""

import re
from collections import Counter
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.extend

from flaxmodels import sharding, step
from flaxmodels.job import Job


def kept(job: Job) -> list[tuple[str, int, int]]:
    """What a microbatch keeps for its backward pass, as the model is written: (array, bytes, count).

    An array is named as in "float32[128,4096] of MLP/hidden_0", and whole: over all devices. Largest in all come first.
    Those of a scanned layer are one array. The compiler may keep less, where computing again costs nothing.
    """
    apply, loss = step.make_apply(job.model, job.policy), job.losses[0]
    index, at = jax.ShapeDtypeStruct((job.train.batch_size,), "int32"), jax.ShapeDtypeStruct((), "int32")
    whole = jax.eval_shape(job.augment, job.train.example(), index, at)
    parts = job.cadence.microbatches
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), whole)

    def backward(params: Any, extra: Any, batch: Any, at: Any) -> Any:
        rngs = step.streams(job.seed, at)
        return jax.vjp(partial(_loss, apply, loss, extra=extra, batch=batch, rngs=rngs), params)[1]

    with jax.set_mesh(job.mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        jaxpr = jax.make_jaxpr(backward)(job.abstract.params, job.abstract.extra, batch, at).jaxpr
    made = {var: _origin(eqn, place) for eqn in jaxpr.eqns for place, var in enumerate(eqn.outvars)}
    arrays = Counter[tuple[str, int]]()
    for var in {var for var in jaxpr.outvars if isinstance(var, jax.extend.core.Var)} & set(made):
        aval: Any = var.aval
        name = f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"
        arrays[name + (f" of {made[var]}" if made[var] else ""), aval.size * aval.dtype.itemsize] += 1
    rows = [(name, size, number) for (name, size), number in arrays.items()]
    return sorted(rows, key=lambda row: (-row[1] * row[2], row[0]))


def _origin(eqn: Any, place: int) -> str:
    """The module that computes the result of an equation at a place, such as "Transformer/blocks/mlp"."""
    within = eqn.params.get("jaxpr")
    inner = getattr(within, "jaxpr", within)
    found = ""
    if inner is not None and len(inner.outvars) == len(eqn.outvars):
        places = (
            (other, i) for other in inner.eqns for i, var in enumerate(other.outvars) if var is inner.outvars[place]
        )
        found = next((_origin(other, i) for other, i in places), "")
    return found or re.sub(r"\w+\((.*?)\)", r"\1", str(eqn.source_info.name_stack)).strip("/")


def _loss(apply: step.Apply, loss: Any, params: Any, *, extra: Any, batch: Any, rngs: Any) -> jax.Array:
    outputs, _ = apply(params, extra, batch["inputs"], train=True, rngs=rngs)
    return loss(outputs, batch)["loss"][0]
