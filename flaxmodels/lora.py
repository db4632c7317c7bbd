"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): matrices stay, and small factors beside them train.

A matrix W of the model becomes W + alpha / rank * A B, of which A and B alone are trained. `Adapted` is a module around
any other. What trains, the factors and what is trained itself, is its collection "params", so gradients, moments and
averages are as small. All else is its collection "base": in a train state that is `extra["base"]`, which the step hands
through.

Beside a matrix NAME stand the factors NAME_lora_a (*layers, *inputs, rank) and NAME_lora_b (*layers, rank, *outputs).
Where a `Dense` or `DenseGeneral` holds it, what passes through them is added to what the layer gives, and no gradient
of W is ever computed. What other modules hold becomes W + alpha / rank * A B before they see it, over the last two axes
of W; these factors are NAME_lora_sum_a and NAME_lora_sum_b.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxmodels import fitting, precision
from flaxmodels.precision import Float
from flaxmodels.registry import Fraction, Steps, UserError, suggest
from flaxmodels.state import BASE, TrainState, parameters, takes_train

# Ends of names of factors, of the two kinds.
BESIDE, SUMMED = ("_lora_a", "_lora_b"), ("_lora_sum_a", "_lora_sum_b")
# Parameters of these names are no matrices, also where `nn.scan` gives them a leading axis of layers.
VECTORS = ("bias", "scale")
Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how: the section `lora` of a config.

    Attributes:
      rank: of the factors; 0 makes none, and trains all parameters.
      alpha: factors count alpha / rank times.
      targets: regexes of the paths of matrices that get factors. The default is all linear maps of the blocks of a
        transformer (Dettmers et al. 2023, arXiv:2305.14314, sec. 4).
      whole: regexes of the paths of parameters that are trained themselves, such as a new head.
      dropout: share of the inputs of factors that training drops; of factors beside a `Dense` or `DenseGeneral` only.
      dtype: in which is kept what does not train. No update is ever added to it: bfloat16 halves it, and rounds once.

    Raises:
      UserError: a regex is none, nothing would train, or other keys are set without `rank`.
    """

    rank: Steps = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"(attention|mlp)/\w+/kernel$",)
    whole: tuple[str, ...] = ()
    dropout: Fraction = 0.0
    dtype: Float = "float32"

    def __post_init__(self) -> None:
        fitting.compiled(self.targets, "lora.targets")
        fitting.compiled(self.whole, "lora.whole")
        asked = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if asked and not self.rank:
            raise UserError(f"lora.{asked[0]} is set, but lora.rank is not: choose a rank, such as 8.")
        if self.rank and not (self.targets or self.whole):
            raise UserError("lora.targets=() and lora.whole=() leave nothing to train: name some matrices.")

    @property
    def scale(self) -> float:
        """What the product of two factors is multiplied by."""
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether the matrix at `path` gets factors."""
        return any(re.search(pattern, path) for pattern in self.targets) and not self.trains(path)

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` trains itself."""
        return is_factor(path) or any(re.search(pattern, path) for pattern in self.whole)


def is_factor(path: str) -> bool:
    """Whether the parameter at `path` is one of two factors."""
    return path.endswith((*BESIDE, *SUMMED))


class Adapted(nn.Module):
    """A module with factors beside its matrices; it is called as `inner` is.

    Attributes:
      inner: the module.
      options: which matrices, and how.
      dtype: of the computation, where `inner` has no field `dtype`, so casts nothing by itself; else None.
    """

    inner: nn.Module
    options: Lora
    dtype: Float | None = None

    @nn.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        """What `inner` gives for inputs, with the factors.

        Raises:
          UserError: (when parameters are made) a regex of the options matches nothing.
        """
        inner = self.inner.clone(parent=None, name=None)
        inputs = precision.cast(inputs, self.dtype)
        told: dict[str, Any] = {"train": train} if takes_train(inner) else {}
        rate = self.options.dropout if train else 0.0
        with nn.intercept_methods(functools.partial(_beside, options=self.options, rate=rate)):
            if self.is_initializing():
                key = self.make_rng("params")
                outputs, made = inner.init_with_output(key, inputs, **told)
                params, base = separate(_completed(made.get("params", {}), self.options, key), self.options)
                after: Tree = {**made, "params": params, BASE: base}
            else:
                held = dict(self.variables)
                params = precision.cast(_summed(parameters(held.pop("params"), held), self.options.scale), self.dtype)
                held.pop(BASE, None)
                rngs = {name: self.make_rng(name) for name in ("dropout", "params") if self.has_rng(name)}
                mutable = [name for name in held if self.is_mutable_collection(name)]
                outputs, after = inner.apply({"params": params, **held}, inputs, **told, rngs=rngs, mutable=mutable)
        for collection, tree in after.items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)
        return outputs

    def chosen(self, mesh: jax.sharding.Mesh, inputs: Any) -> tuple[str, ...]:
        """Lines for a log, of `inner`, where that has some."""
        lines: tuple[str, ...] = self.inner.chosen(mesh, inputs) if hasattr(self.inner, "chosen") else ()
        return lines


def adapted(model: nn.Module, options: Lora, compute: Float) -> nn.Module:
    """`model` with factors; itself where the rank is 0.

    Args:
      model: any Linen module.
      options: what is adapted.
      compute: dtype of the computation, for a model that has no field `dtype`.
    """
    itself = "dtype" in {field.name for field in dataclasses.fields(model)}
    return Adapted(model, options, None if itself else compute) if options.rank else model


def separate(params: Tree, options: Lora) -> tuple[Tree, Tree]:
    """Parameters as (those that train, the others in `options.dtype`)."""
    flat = flatten_dict(params, sep="/")
    trained = {path: x for path, x in flat.items() if options.trains(path)}
    base = {path: _stored(x, options) for path, x in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(base, sep="/")


def _stored(x: jax.Array, options: Lora) -> jax.Array:
    return x.astype(options.dtype) if x.dtype == jnp.float32 else x


def _beside(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: Any,
    *,
    options: Lora,
    rate: float,
) -> Any:
    """An interceptor of `nn.intercept_methods`: what a linear layer gives, and what passes through its factors."""
    y, layer = call(*args, **kwargs), context.module
    called = context.method_name == "__call__" and type(layer) in (nn.Dense, nn.DenseGeneral)
    if not called or getattr(layer, "batch_dims", None) or not options.adapts("/".join((*layer.path, "kernel"))):
        return y
    x = args[0] if args else kwargs["inputs"]
    axes, outputs = (_tuple(value) for value in (getattr(layer, "axis", -1), layer.features))
    inputs = tuple(x.shape[axis] for axis in axes)
    a, b = (f"kernel{end}" for end in BESIDE)
    a = layer.param(a, _uniform(len(inputs)), (*inputs, options.rank), layer.param_dtype)
    b = layer.param(b, nn.initializers.zeros, (options.rank, *outputs), layer.param_dtype)
    x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=layer.dtype)
    if rate:
        kept = jax.random.bernoulli(layer.make_rng("dropout"), 1 - rate, x.shape)
        x = jnp.where(kept, x / (1 - rate), 0)
    narrow = jnp.tensordot(x, a, (axes, tuple(range(len(axes)))), precision=layer.precision)
    return y + options.scale * jnp.tensordot(narrow, b, 1, precision=layer.precision)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _uniform(inputs: int, layers: int = 0) -> Callable[..., jax.Array]:
    """How A (*layers, *inputs, rank) begins: uniform, up to 1 / sqrt(number of inputs). B begins as zero."""
    axes = tuple(range(layers + inputs))
    return nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=axes[layers:], out_axis=-1, batch_axis=axes[:layers]
    )


def _completed(params: Tree, options: Lora, key: jax.Array) -> Tree:
    """Parameters, with factors also for matrices that no linear layer holds (UserError: a regex matches nothing)."""
    flat: dict[str, jax.Array] = flatten_dict(params, sep="/")
    plain = [path for path in flat if not is_factor(path)]
    matrices = [path for path in plain if flat[path].ndim >= 2 and path.rsplit("/", 1)[-1] not in VECTORS]
    for key_name, what, patterns, known in (
        ("targets", "matrix", options.targets, matrices),
        ("whole", "parameter", options.whole, plain),
    ):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in known):
                raise UserError(f"lora.{key_name}: {pattern!r} matches no {what}. {suggest(pattern, known)}")
    for path in matrices:
        if options.adapts(path) and path + BESIDE[0] not in flat:
            *layers, inputs, outputs = flat[path].shape
            a, b = (path + end for end in SUMMED)
            own, dtype = jax.random.fold_in(key, zlib.crc32(path.encode())), flat[path].dtype
            flat[a] = _uniform(1, len(layers))(own, (*layers, inputs, options.rank), dtype)
            flat[b] = jnp.zeros((*layers, options.rank, outputs), dtype)
    return unflatten_dict(flat, sep="/")


def _summed(params: Tree, scale: float, kinds: tuple[tuple[str, str], ...] = (SUMMED,), sign: int = 1) -> Tree:
    """Parameters with the factors of `kinds` multiplied out into their matrices, and gone."""
    flat: dict[str, jax.Array] = flatten_dict(params, sep="/")
    for path in [path for path in flat if not is_factor(path)]:
        for a, b in kinds:
            if path + a in flat:
                product = _product(flat.pop(path + a), flat.pop(path + b), flat[path].shape)
                flat[path] = (flat[path] + sign * scale * product).astype(flat[path].dtype)
    return unflatten_dict(flat, sep="/")


def _product(a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A B as a matrix of `shape`; how many axes are of layers follows from the ranks of the three arrays."""
    layers = a.shape[: a.ndim + b.ndim - 2 - len(shape)]
    return (a.reshape(*layers, -1, a.shape[-1]) @ b.reshape(*layers, b.shape[len(layers)], -1)).reshape(shape)


def merged(params: Tree, base: Tree, options: Lora) -> Tree:
    """All parameters of the bare model, with the factors in their matrices, in the dtypes of these; traceable.

    Args:
      params: what trains.
      base: all else.
      options: of the section `lora`.
    """
    return _summed(parameters(params, {BASE: base}), options.scale, (BESIDE, SUMMED))


def unmerged(plain: Tree, params: Tree, options: Lora) -> Tree:
    """The base that `merged` made `plain` of, but for rounding; traceable.

    Args:
      plain: parameters of the bare model.
      params: what trained, with the factors that are in `plain`.
      options: of the section `lora`.
    """
    factors = {path: x for path, x in flatten_dict(params, sep="/").items() if is_factor(path)}
    both = unflatten_dict({**flatten_dict(plain, sep="/"), **factors}, sep="/")
    return separate(_summed(both, options.scale, (BESIDE, SUMMED), sign=-1), options)[1]


def merge(model: nn.Module, params: Tree, extra: Tree) -> tuple[nn.Module, Tree, Tree]:
    """The bare module of an `Adapted` one, its parameters and other collections, as they lie; of others what is given.

    Args:
      model: any module.
      params: of a train state, or their average; arrays, or `jax.ShapeDtypeStruct` with shardings.
      extra: of a train state.
    """
    if not isinstance(model, Adapted):
        return model, params, extra
    flat = flatten_dict(parameters(params, extra), sep="/")
    places = unflatten_dict({path: x.sharding for path, x in flat.items() if not is_factor(path)}, sep="/")
    whole: Tree
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in flat.values()):
        shapes = jax.eval_shape(functools.partial(merged, options=model.options), params, extra[BASE])
        whole = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    else:
        multiply = jax.jit(merged, static_argnames="options", out_shardings=places)
        whole = multiply(params, extra[BASE], options=model.options)
    return model.inner, whole, {name: tree for name, tree in extra.items() if name != BASE}


def bare(model: nn.Module) -> nn.Module:
    """The module without factors."""
    return model.inner if isinstance(model, Adapted) else model


def lean(state: TrainState) -> TrainState:
    """A state, or what describes one, without its base."""
    return state.replace(extra={name: tree for name, tree in state.extra.items() if name != BASE})


def report(trained: Tree, extra: Tree) -> tuple[str, ...]:
    """A line for a log: how much of the model trains; none where all of it does.

    Args:
      trained: the parameters of a train state, or their shapes.
      extra: its other collections.
    """
    few, others = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, extra.get(BASE, {})))
    share = few / max(few + others, 1)
    return (f"lora: {few:,} of {few + others:,} parameters train ({share:.2%})",) if BASE in extra else ()
