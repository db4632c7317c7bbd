"""The train step: a pure function of arguments you can see, the same for every model family.

Read `train_step`. Around it, from the inside out: `make_gradient` (model and loss -> gradients), `train_step` (one
update), `repeated` (several steps a dispatch), `compile_step` (jit, shardings, donation), `strict` (what is compiled,
and its refusals explained). A feature enters as an optax transform, a loss, or a function that wraps a gradient
function and has its signature; never as an `if` in the step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxmodels import metrics as metric
from flaxmodels import precision, sharding
from flaxmodels.losses import Loss, is_head
from flaxmodels.metrics import Metrics
from flaxmodels.paths import path_of
from flaxmodels.precision import Policy
from flaxmodels.runtime.exits import FaultError
from flaxmodels.state import TrainState, base_key, takes_train

Batch = dict[str, Any]
# (params, extra, batch, rngs) -> (gradient of the *sum* of losses, extra, metrics). Sums add up over microbatches.
Gradient = Callable[[Any, Any, Batch, Any], tuple[Any, Any, Metrics]]
Step = Callable[[TrainState, Any], tuple[TrainState, Any]]
Schedule = Callable[[Any], jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    gradient: Gradient,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    seed: int,
) -> tuple[TrainState, Metrics]:
    """One optimizer update.

    Args:
      state: the state before.
      batch: {"inputs": (B, ...), "targets": (B, ...), "weights": (B, ...) float32}, B the global batch.
      gradient: from `make_gradient`, or what wraps it.
      tx: the optimizer.
      schedule: step -> learning rate; for the log, the optimizer has its own copy.
      seed: of the run.

    Returns:
      (state after, metrics as (sum, count) pairs).
    """
    grads, extra, metrics = gradient(state.params, state.extra, batch, streams(seed, state.step))
    grads = jax.tree.map(lambda g: metric.ratio(g, metrics["loss"][1]).astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = metric.once(metric.norm(grads))
    metrics["learning_rate"] = metric.once(schedule(state.step))
    return TrainState(state.step + 1, params, extra, opt_state), metrics


def eval_step(params: Any, extra: Any, batch: Batch, *, apply: "Apply", loss: Loss) -> Metrics:
    """Metrics of one batch as (sum, count) pairs; nothing is updated, nothing is random."""
    outputs, _ = apply(params, extra, batch["inputs"], train=False)
    return loss(outputs, batch)


def streams(seed: int, step: Any) -> dict[str, jax.Array]:
    """Keys of one step: a fold for the step, then one a purpose. A Linen stream of another name falls to "params"."""
    key = jax.random.fold_in(base_key(seed), step)
    return {"dropout": jax.random.fold_in(key, 0), "params": jax.random.fold_in(key, 1)}


Apply = Callable[..., tuple[Any, Any]]


def make_apply(model: nn.Module, policy: Policy | None = None) -> Apply:
    """(params, extra, inputs, *, train, rngs=None) -> (outputs, extra after).

    A module whose `__call__` takes `train` is told; one that does not is the same in training and evaluation.

    With a `policy`, floating outputs are in `policy.output`, but for the parts of a split head. A module with a field
    `dtype` casts by itself, and best knows what not to; any other gets its parameters and floating inputs in
    `policy.compute`, and their gradients come back in the dtype that they have. Collections other than the parameters,
    such as BatchNorm's statistics, are given and kept as they are.
    """
    told = takes_train(model)
    itself = "dtype" in {field.name for field in dataclasses.fields(model)}
    compute = None if policy is None or itself else policy.compute

    def apply(params: Any, extra: Any, inputs: Any, *, train: bool, rngs: Any = None) -> tuple[Any, Any]:
        call = partial(model.apply, train=train) if told else model.apply
        params, inputs = precision.cast((params, inputs), compute)
        outputs, after = call({"params": params, **extra}, inputs, rngs=rngs, mutable=list(extra) if train else [])
        after = precision.cast_like(after, extra) if train else after
        return outputs if is_head(outputs) else precision.cast(outputs, policy and policy.output), after

    return apply


def make_gradient(apply: Apply, loss: Loss) -> Gradient:
    """The gradient of the sum of a batch's losses, with the model's other collections and the metrics."""

    def objective(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
        outputs, extra = apply(params, extra, batch["inputs"], train=True, rngs=rngs)
        metrics = loss(outputs, batch)
        return metrics["loss"][0], (extra, metrics)

    def gradient(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[Any, Any, Metrics]:
        grads, (extra, metrics) = jax.grad(objective, has_aux=True)(params, extra, batch, rngs)
        return grads, extra, metrics

    return gradient


def accumulated(gradient: Gradient, parts: int) -> Gradient:
    """The same gradient, from `parts` microbatches in turn: sums and counts add up, so unequal weights are exact.

    The sums are float32, and so is the gradient, also where parameters are not.

    Microbatch `i` has the examples i, i + parts, i + 2 parts, ...: on a mesh each device keeps its own. Other
    collections, such as BatchNorm's statistics, are those after the last one; each has random streams of its own.
    """
    if parts == 1:
        return gradient

    def summed(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[Any, Any, Metrics]:
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(extra: Any, i: Any) -> tuple[Any, Any, Metrics]:
            keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
            grads, extra, metrics = gradient(params, extra, jax.tree.map(lambda x: x[i], micro), keys)
            return precision.cast(grads, jnp.float32), extra, metrics

        def body(i: Any, carry: tuple[Any, Any, Metrics]) -> tuple[Any, Any, Metrics]:
            grads, extra, metrics = one(carry[1], i)
            total = jax.tree.map(jnp.add, (carry[0], carry[2]), (grads, metrics))
            return total[0], extra, total[1]

        return jax.lax.fori_loop(1, parts, body, one(extra, 0))

    return summed


def repeated(step: Step, most: int) -> Step:
    """Several steps in one dispatch: (state, feed) -> (state, outputs), both stacked over up to `most` steps.

    `feed` is {"count": steps to make, "first": the step that row 0 of `each` is for (int32 scalars), "each": pytree of
    (rows, ...), "every": pytree that all steps see}. Only `count` steps are made, so one compiled program serves every
    stretch between two events, with the same bits however the steps are cut into dispatches; and the rows of many
    dispatches can lie on the device in one piece. With `most` = 1 it is the bare step: XLA runs convolutions in a loop
    on CPU 5 to 14 times slower (jax issue 12868).
    """

    def one(state: TrainState, feed: Any) -> tuple[TrainState, Any]:
        row = state.step - feed["first"]
        return step(state, (jax.tree.map(lambda x: x[row], feed["each"]), feed["every"]))

    def single(state: TrainState, feed: Any) -> tuple[TrainState, Any]:
        state, outputs = one(state, feed)
        return state, jax.tree.map(lambda x: x[None], outputs)

    def several(state: TrainState, feed: Any) -> tuple[TrainState, Any]:
        shapes = jax.eval_shape(one, state, feed)[1]
        empty = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)

        def body(i: Any, carry: Any) -> Any:
            state, outputs = carry
            state, new = one(state, feed)
            return state, jax.tree.map(lambda old, x: old.at[i].set(x), outputs, new)

        return jax.lax.fori_loop(0, feed["count"], body, (state, empty))

    return single if most == 1 else several


def compile_step(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: Mesh,
    out_shardings: Any = None,
    donate: tuple[int, ...] = (),
) -> jax.stages.Lowered:
    """Lower `function` for `mesh`; `.compile()` the result and call it. The one way to a compiled step.

    A compiled program takes arguments of one shape, dtype and sharding, and refuses all others: it never recompiles.
    `strict` makes a clear error of that.

    Args:
      function: pure, such as a `partial` of `train_step`.
      *arguments: `jax.ShapeDtypeStruct` trees with shardings (or arrays); nothing is allocated.
      mesh: also the context in which models' logical constraints mean something.
      out_shardings: of the results; None lets the compiler choose.
      donate: positions of arguments whose memory the results reuse.
    """
    places = jax.tree.map(lambda x: x.sharding, arguments)
    jitted = jax.jit(function, in_shardings=places, out_shardings=out_shardings, donate_argnums=donate)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        return jitted.lower(*arguments)


class RecompileError(FaultError):
    """A compiled step was given what it was not compiled for: another shape, dtype, sharding or tree."""


def strict(program: jax.stages.Compiled, names: Sequence[str] = ("state", "feed")) -> Callable[..., Any]:
    """`program`, which never recompiles: what it would have to be compiled again for is a `RecompileError`.

    It costs the call one Python frame. Where it refuses, nothing has run and nothing is donated.

    Args:
      program: of `compile_step(...).compile()`.
      names: of its arguments, for the message.
    """

    def call(*arguments: Any) -> Any:
        try:
            return program(*arguments)
        except (TypeError, ValueError) as error:
            if lines := list(_differences(program, arguments, names)):
                raise RecompileError(_refusal(lines)) from error
            raise

    return call


# Differences that a message lists: where a batch has another size, so have all its parts.
LISTED = 8


def _refusal(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    listed = "\n  ".join([*lines[:LISTED], *more])
    return (
        f"a compiled step was given what it was not compiled for, and would have to be compiled again:\n  {listed}\n"
        "Each step's arguments have one shape, dtype and sharding: fill a short batch up with examples of weight 0, "
        "put arrays where they were when it was lowered (jax.device_put), or compile a second program for the others."
    )


def _differences(program: jax.stages.Compiled, arguments: Sequence[Any], names: Sequence[str]) -> Iterator[str]:
    """How arguments differ from those that a program was compiled for, a line for each array."""

    def leaves(trees: Sequence[Any]) -> dict[str, Any]:
        named = {names[i] if i < len(names) else f"argument {i}": tree for i, tree in enumerate(trees)}
        return {path_of(keys): x for keys, x in jax.tree.leaves_with_path(named)}

    wanted, places, given = leaves(program.args_info[0]), leaves(program.input_shardings[0]), leaves(arguments)
    yield from (f"{path} is missing, was {_typed(x)}" for path, x in wanted.items() if path not in given)
    for path, x in given.items():
        try:
            kind = jax.typeof(x)
        except TypeError:
            yield f"{path} is no array, but of type {type(x).__name__}"
            continue
        if path not in wanted:
            yield f"{path} is new: {_typed(kind)}"
        elif _typed(kind) != _typed(wanted[path]):
            yield f"{path} was {_typed(wanted[path])}, is {_typed(kind)}"
        elif path in places and isinstance(x, jax.Array) and not x.sharding.is_equivalent_to(places[path], x.ndim):
            yield f"{path}, {_typed(kind)}, was {_placed(places[path])}, is {_placed(x.sharding)}"


def _typed(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _placed(where: jax.sharding.Sharding) -> str:
    if not isinstance(where, jax.sharding.NamedSharding):
        return f"on {', '.join(sorted(map(str, where.device_set)))}"
    axes = ", ".join(f"{name}={size}" for name, size in where.mesh.shape.items() if size > 1) or "one device"
    return f"{where.spec} on a mesh of {axes}"
