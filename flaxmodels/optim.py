"""Optimizers and schedules: optax only, composed.

`make` chains, in this order: clip by global norm -> direction of the optimizer -> decoupled weight decay -> learning
rate times the parameter's multiplier -> average of parameters. Decay is decoupled for every optimizer, as in AdamW
(Loshchilov and Hutter 2017, arXiv:1711.05101): it never enters the moments.

All of it is computed, and kept, in float32, whatever the dtype of the parameters; first moments can be kept in
bfloat16. Second moments can't: they change by a share of 1 - b2 in a step, 0.001 by default, which is under half the
distance between neighbours in bfloat16 (1/256): they would stop where they are, however small gradients become.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxmodels import precision, registry
from flaxmodels.paths import path_of
from flaxmodels.precision import Float
from flaxmodels.registry import Fraction, Positive, Steps, UserError
from flaxmodels.schedules import SCHEDULES, Schedule, rated

Rules = tuple[tuple[str, dict[str, Any]], ...]


def adam(
    b1: Fraction = 0.9, b2: Fraction = 0.999, eps: float = 1e-8, nesterov: bool = False, *, moments: Float
) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba 2014, arXiv:1412.6980)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov, mu_dtype=moments)


def sgd(momentum: Fraction = 0.9, nesterov: bool = False, *, moments: Float) -> optax.GradientTransformation:
    """Stochastic gradient descent, with momentum unless that is 0."""
    trace = optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=moments)
    return trace if momentum else optax.identity()


def lion(b1: Fraction = 0.9, b2: Fraction = 0.99, *, moments: Float) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a momentum. Wants about a tenth of Adam's rate."""
    return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=moments)


def muon(
    momentum: Fraction = 0.95,
    ns_steps: Positive = 5,
    b1: Fraction = 0.9,
    b2: Fraction = 0.95,
    eps: float = 1e-8,
    *,
    moments: Float,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024; scaled to Adam's RMS as Liu et al. 2025, arXiv:2502.16982) for kernels, Adam else.

    Kernels are what linear maps and convolutions multiply by; embeddings, heads, biases and scales go through Adam
    with Nesterov momentum, with b1 and b2. A layer axis of `nn.scan` is a batch of matrices.
    """
    both = optax.contrib.muon(
        learning_rate=1.0, ns_steps=ns_steps, beta=momentum, eps=eps, adam_b1=b1, adam_b2=b2, consistent_rms=0.2,
        mu_dtype=moments,
        muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(_matrix_axes, params),
    )  # fmt: skip
    return optax.chain(both, optax.scale(-1.0))  # optax's alias descends; here a direction is what later links scale


def adafactor(
    decay_rate: Fraction = 0.8, clip_update: float = 1.0, min_factored: Positive = 128
) -> optax.GradientTransformation:
    """Adafactor's direction (Shazeer and Stern 2018, arXiv:1804.04235), scaled by the parameter's RMS."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_factored),
        optax.clip_by_block_rms(clip_update),
        optax.scale_by_param_block_rms(),
    )


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam, "adamw": adam, "sgd": sgd, "lion": lion, "muon": muon, "adafactor": adafactor,
}  # fmt: skip
# What each decays by when a config does not say; the others do not decay.
DEFAULT_DECAY = {"adamw": 0.01, "lion": 0.1, "muon": 0.01}


def make(
    name: str = "adamw",
    *,
    learning_rate: float,
    total_steps: int,
    schedule: str = "constant",
    warmup: Steps = 0,
    weight_decay: float | None = None,
    decay_mask: str = "matrices",
    clip_norm: float | None = None,
    rules: tuple[tuple[str, dict], ...] = (),
    average: Fraction | None = None,
    moments: Float = "float32",
    **options: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """An optimizer and its schedule.

    Args:
      name: a key of `OPTIMIZERS`, or "package.module:function" that returns an optax transform giving a direction of
        ascent (what `optax.scale_by_adam` gives).
      learning_rate: the peak, reached after `warmup`.
      total_steps: steps of the whole run, which the schedule spans.
      schedule: a key of `SCHEDULES`.
      warmup: steps of a linear rise from 0.
      weight_decay: decoupled, times the learning rate; None is the optimizer's own default.
      decay_mask: which parameters decay: "matrices" (rank 2 and more, without biases and scales), "all", or a regex
        that is searched for in the parameter's path.
      clip_norm: largest global norm of the gradients; None does not clip.
      rules: ((regex, {"learning_rate": multiplier, "weight_decay": value, "freeze": bool}), ...); the first rule whose
        regex is found in a parameter's path holds. Frozen parameters have no optimizer state, and a job computes no
        gradient of them (`frozen`).
      average: decay of an exponential moving average of the parameters, which evaluation then uses (with BatchNorm's
        running statistics as they are: these are averages already).
      moments: dtype in which first moments, or momentum, are kept. "bfloat16" saves a quarter of Adam's state, and half
        of that of sgd and lion. An optimizer of your own is told if it takes `moments`.
      **options: keyword arguments of the optimizer and of the schedule.

    Returns:
      (tx, schedule): an optax transform, and step -> learning rate.

    Raises:
      UserError: a name or an option does not exist, a value is out of range, or (when `tx.init` sees the parameters) a
        rule matches none of them; or `moments` where the optimizer keeps no first moment.
    """
    direction, curve = targets(name, schedule)
    options = registry.bind([direction, curve], options, where="optim", provided=("steps", "moments"))
    own = registry.parameters([direction])
    if "moments" in own:
        options["moments"] = registry.check(moments, Float, "optim.moments")
    elif moments != "float32":
        raise UserError(
            f"optim.moments={moments!r}: optim.name={name!r} has no first moments, or does not take `moments`. "
            "Leave it out."
        )
    if warmup >= max(total_steps, 1) and warmup > 0:
        raise UserError(
            f"optim.warmup={warmup} steps is not shorter than the run of {total_steps} steps. "
            "Shorten it, or lengthen train.duration."
        )
    rate = rated(
        learning_rate,
        curve(total_steps - warmup, **{k: v for k, v in options.items() if k not in own}),
        warmup,
    )
    ascent = direction(**{k: v for k, v in options.items() if k in own})
    if not isinstance(ascent, optax.GradientTransformation):
        raise UserError(f"optim.name={name!r} returned {ascent!r}: expected an optax.GradientTransformation.")
    decay = DEFAULT_DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    table = tuple(_Rule.parse(pattern, settings) for pattern, settings in rules)
    links = [
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else None,
        ascent,
        _decayed(decay, _decay_mask(decay_mask), table),
        optax.scale_by_learning_rate(rate),
        _multiplied(table) if any(r.learning_rate != 1 for r in table) else None,
    ]
    tx = optax.chain(*(link for link in links if link is not None))
    if any(rule.freeze for rule in table):
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, lambda params: _labels(params, table))
    tx = optax.chain(tx, averaged(average)) if average is not None else tx
    return _in_float32(optax.GradientTransformation(lambda params: tx.init(_matched(params, table)), tx.update)), rate


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with parameters and gradients in float32, whatever these are in; updates are float32."""

    def init(params: Any) -> Any:
        return tx.init(precision.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, params = precision.cast((updates, params), jnp.float32)
        return tx.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def targets(name: str, schedule: str) -> tuple[Callable[..., optax.GradientTransformation], Callable[..., Schedule]]:
    """The functions that `name` and `schedule` stand for; their signatures hold the options (UserError if unknown)."""
    return registry.pick(OPTIMIZERS, name, "optim.name"), registry.pick(SCHEDULES, schedule, "optim.schedule")


def frozen(rules: Rules) -> Callable[[str], bool]:
    """Path of a parameter -> whether it is frozen by the option `rules` of `make`, whose first match holds."""
    table = tuple(_Rule.parse(pattern, settings) for pattern, settings in rules)
    return lambda path: _first(path, table).freeze


class _Rule(NamedTuple):
    pattern: str
    learning_rate: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False

    @classmethod
    def parse(cls, pattern: str, settings: Mapping[str, Any]) -> "_Rule":
        _compiled(pattern, "optim.rules")
        return cls(pattern, **registry.bind(cls, settings, where=f"optim.rules[{pattern!r}]", provided=("pattern",)))


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}.") from error


def _rule_of(keys: tuple[Any, ...], table: tuple[_Rule, ...]) -> _Rule:
    return _first(path_of(keys), table)


def _first(path: str, table: tuple[_Rule, ...]) -> _Rule:
    return next((rule for rule in table if re.search(rule.pattern, path)), _Rule(""))


def _matched(params: Any, table: tuple[_Rule, ...]) -> Any:
    paths = [path_of(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    for rule in table:
        if not any(re.search(rule.pattern, path) for path in paths):
            raise UserError(
                f"optim.rules: {rule.pattern!r} matches no parameter. {registry.suggest(rule.pattern, paths)}"
            )
    if paths and all(_first(path, table).freeze for path in paths):
        raise UserError(f"optim.rules freeze all {len(paths)} parameters, so nothing would train: leave some out.")
    return params


def _labels(params: Any, table: tuple[_Rule, ...]) -> Any:
    return jax.tree.map_with_path(lambda keys, _: "freeze" if _rule_of(keys, table).freeze else "train", params)


def _decay_mask(mask: Literal["matrices", "all"] | str) -> Callable[[str, Any], bool]:
    if mask == "matrices":
        # By name too: under nn.scan a bias has a leading layer axis, and rank 2.
        return lambda path, x: x.ndim >= 2 and path.rsplit("/", 1)[-1] not in ("bias", "scale")
    if mask != "all":
        _compiled(mask, "optim.decay_mask")
    return lambda path, x: mask == "all" or re.search(mask, path) is not None


def _decayed(decay: float, mask: Callable[[str, Any], bool], table: tuple[_Rule, ...]) -> optax.GradientTransformation:
    def one(keys: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        own = _rule_of(keys, table).weight_decay
        rate = own if own is not None else decay * mask(path_of(keys), param)
        return update + rate * param if rate else update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))


def _multiplied(table: tuple[_Rule, ...]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map_with_path(lambda k, u: u * _rule_of(k, table).learning_rate, updates)
    )


class AverageState(NamedTuple):
    """updates: how many there were, int32; parameters_average: same tree as the parameters."""

    updates: jax.Array
    parameters_average: Any


def averaged(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the parameters after each update; the last link of a chain.

    The decay starts low, as min(decay, (1 + step) / (10 + step)), so that the first, untrained parameters do not stay.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        now = jnp.minimum(decay, (1.0 + state.updates) / (10.0 + state.updates))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: (a + (1 - now) * (p - a)).astype(a.dtype), state.parameters_average, new)
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def parameters_average(opt_state: Any, params: Any) -> Any:
    """The averaged parameters, in the dtypes of `params`, where the optimizer keeps an average, else `params`."""
    average = optax.tree.get(opt_state, "parameters_average")
    return params if average is None else precision.cast_like(average, params)


def _matrix_axes(keys: tuple[Any, ...], x: Any) -> Any:
    """Which axes of a kernel are the input and the output of its matrix; None is not a kernel, and goes to Adam."""
    path = path_of(keys)
    layered = int("blocks/" in path)  # a leading axis of layers, from nn.scan
    rank = x.ndim - layered
    if not path.endswith("kernel") or "head/" in path or rank < 2:
        return None
    # (in, out), (in, heads, size), convolutions (h, w, in, out); an attention's output is (heads, size, out)
    inputs = {2: 1, 3: 2 if "out/" in path else 1}.get(rank, rank - 1)
    axes = tuple(range(layered, x.ndim))
    return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])
