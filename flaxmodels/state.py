"""The train state: arrays only, born sharded."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flaxmodels import precision, sharding
from flaxmodels.precision import Float


class TrainState(flax.struct.PyTreeNode):
    """All that a run is, beside its config and its data.

    Attributes:
      step: number of updates made, int32 scalar. The position in the data, and the randomness, follow from it.
      params: the model's "params" collection.
      extra: its other collections, such as BatchNorm's {"batch_stats": ...}, or a "base" of parameters that do not
        train; {} for most models.
      opt_state: the state of the optax transform.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any


# The collection in which a module keeps parameters that do not train (`lora.Adapted`).
BASE = "base"


def parameters(params: Any, extra: Mapping[str, Any]) -> Any:
    """All parameters of the model in one tree: those that train, and those that a module keeps in its "base".

    Args:
      params: of a train state.
      extra: of it.
    """
    if BASE not in extra:
        return params
    return unflatten_dict({**flatten_dict(extra[BASE], sep="/"), **flatten_dict(params, sep="/")}, sep="/")


def base_key(seed: int) -> jax.Array:
    """The key of a run. Threefry, whose bits do not depend on how an array is sharded; `rbg` bits do."""
    return jax.random.key(seed, impl="threefry2x32")


def takes_train(model: nn.Module) -> bool:
    """Whether the module's `__call__` is told if it is training; one that is not is the same in both."""
    return "train" in inspect.signature(type(model).__call__).parameters


def create(
    model: nn.Module, tx: optax.GradientTransformation, inputs: Any, seed: int, param_dtype: Float = "float32"
) -> TrainState:
    """A fresh state; pure and traceable.

    Args:
      model: a Linen module.
      tx: the optimizer.
      inputs: pytree of arrays or `jax.ShapeDtypeStruct` of one batch; only shapes and dtypes matter, and not the
        number of examples.
      seed: initial parameters are a function of it and of nothing else.
      param_dtype: of parameters that the model makes in float32; "bfloat16" rounds these. What it makes in another
        dtype by itself stays so, and so do its other collections.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), inputs)
    start = partial(model.init, train=False) if takes_train(model) else model.init
    variables = dict(start(base_key(seed), zeros))
    made = variables.pop("params", {})
    params = jax.tree.map(lambda x: precision.cast(x, param_dtype) if x.dtype == jnp.float32 else x, made)
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params))


def init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    inputs: Any,
    seed: int,
    mesh: Mesh,
    rules: sharding.Rules = (),
    param_dtype: Float = "float32",
) -> tuple[Callable[[], TrainState], TrainState]:
    """How to make a state that is born sharded, and what it will look like.

    Returns:
      (make, abstract): `make()` gives the state, each device computing its own shard only; `abstract` is the same tree
      of `jax.ShapeDtypeStruct` with shardings, which is all that lowering a step or restoring a checkpoint needs.

    Raises:
      UserError: a sharding rule does not fit.
    """

    def fresh() -> TrainState:
        return create(model, tx, inputs, seed, param_dtype)

    shapes = jax.eval_shape(fresh)
    places = sharding.shard_tree(shapes, mesh, rules, parameters(shapes.params, shapes.extra))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    return jax.jit(fresh, out_shardings=places), abstract
