"""Weights as generation reads them: each layer by itself, and, where asked for, rounded to 8 bits.

A new token reads every weight once, so memory's bandwidth is what it costs; four times fewer bytes take less time, even
though more is computed. `prepare` makes such parameters, `reading` makes modules of Flax understand them.

A rounded kernel is `codes` int8, of output features x input features, and `scale` float32 of each output feature:
what it stands for is codes * scale (symmetric, as LLM.int8, https://arxiv.org/abs/2208.07339, without its outliers).
Activations are not rounded to 8 bits: each is two digits of 8 bits, so that the product is one of integers, exact but
for the 15 bits that an activation keeps, and no float32 kernel is ever made.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels.models.transformer import Head, unstack

Precision = Literal["given", "int8"]
CODES, SCALE = "codes", "scale"
_DIGIT = 128  # of activations, in the base of which they have two
# The kernels' input axes; all others are of the output. What is not named here has one.
_INPUTS = {"out": 2}


def prepare(model: Any, params: Mapping[str, Any], precision: Precision = "given") -> tuple[Any, dict[str, Any]]:
    """A model and its parameters, laid out for generation.

    Args:
      model: a `Transformer`.
      params: its parameters, on any mesh, stacked or not. They stay as they are.
      precision: "given" keeps numbers as they are; "int8" rounds kernels of products, the head's among them.
        Embeddings, of which a token reads a row, norms and biases stay.

    Returns:
      The model that is not `stacked`, and parameters for it, which lie on the mesh as those given do. Rounded ones work
      inside of `reading`.
    """
    if getattr(model, "stacked", False):
        model, params = model.clone(stacked=False), unstack(params)
    if precision == "given":
        return model, dict(params)
    rounded = _rounded(params)
    if model.tied_head:
        codes = round_kernel(params["embed"]["embedding"], inputs=1, transposed=True)
        rounded["head"] = {**rounded.get("head", {}), **codes}
    return model, rounded


def _rounded(params: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            made[key] = _rounded(value, key)
        elif key == "kernel":
            made |= round_kernel(value, _INPUTS.get(name, 1))
        else:
            made[key] = value
    return made


def round_kernel(kernel: jax.Array, inputs: int, transposed: bool = False) -> dict[str, jax.Array]:
    """A kernel in 8 bits.

    Args:
      kernel: (inputs..., outputs...) float.
      inputs: how many axes those of the input are.
      transposed: it is (outputs..., inputs...).

    Returns:
      {"codes": (outputs..., inputs...) int8 from -127 to 127, "scale": (outputs...) float32}, which lie on the mesh as
      the kernel does. The scale of an output without a weight is 0.
    """
    outputs = kernel.ndim - inputs
    order = tuple(range(kernel.ndim)) if transposed else (*range(inputs, kernel.ndim), *range(inputs))
    out = None
    if isinstance(sharding := kernel.sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (kernel.ndim - len(sharding.spec)))
        spec = tuple(spec[axis] for axis in order)
        out = {CODES: NamedSharding(sharding.mesh, P(*spec)), SCALE: NamedSharding(sharding.mesh, P(*spec[:outputs]))}

    @functools.partial(jax.jit, out_shardings=out)
    def rounded(kernel: jax.Array) -> dict[str, jax.Array]:
        kernel = kernel.astype(jnp.float32).transpose(order)
        axes = tuple(range(outputs, kernel.ndim))
        scale = jnp.max(jnp.abs(kernel), axis=axes) / 127
        parts = kernel / jnp.where(scale == 0, 1.0, scale).reshape(*scale.shape, *(1,) * inputs)
        return {CODES: jnp.round(parts).astype(jnp.int8), SCALE: scale}

    made: dict[str, jax.Array] = rounded(kernel)
    return made


def reading() -> contextlib.AbstractContextManager[Any]:
    """Within it, modules read rounded kernels where their parameters have them, and others as ever."""
    return nn.intercept_methods(_read)


def _read(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    kinds = nn.Dense, nn.DenseGeneral, Head
    if context.method_name != "__call__" or not isinstance(module, kinds) or not module.has_variable("params", CODES):
        return call(*args, **kwargs)
    own = module.variables["params"]
    if isinstance(module, Head):
        return (own[CODES] * own[SCALE][:, None]).T, own.get("bias")
    x = args[0]
    return _biased(product(x, own[CODES], own[SCALE]), own).astype(module.dtype or x.dtype)


def logits(features: jax.Array, params: Mapping[str, Any], kernel: jax.Array) -> jax.Array:
    """What a head makes of features.

    Args:
      features: (..., D) of `split_head`.
      params: of the whole model.
      kernel: (D, V) of `split_head`; not read, and so not made, where that of `params` is rounded.

    Returns:
      (..., V), float32.
    """
    head = params.get("head", {})
    if CODES not in head:
        return (features @ kernel).astype(jnp.float32)
    return _biased(product(features[..., : head[CODES].shape[-1]], head[CODES], head[SCALE]), head)


def _biased(y: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
    bias = own.get("bias")
    return y if bias is None else y + bias.reshape(*(1,) * (y.ndim - bias.ndim), *bias.shape)


def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The product of x and a rounded kernel.

    Args:
      x: (..., inputs...) float.
      codes: (outputs..., inputs...) int8 from -127 to 127, with up to 2^17 inputs in all: sums are int32.
      scale: (outputs...) float32.

    Returns:
      (..., outputs...), float32. On CPUs activations keep 15 bits, counted from the largest of a row.
    """
    outputs, inputs = codes.shape[: scale.ndim], codes.shape[scale.ndim :]
    rows = x.shape[: x.ndim - len(inputs)]
    codes_OxI, scale_O = codes.reshape(scale.size, -1), scale.reshape(-1)
    x_RxI = x.reshape(-1, codes_OxI.shape[1])
    y_RxO = jax.lax.platform_dependent(x_RxI, codes_OxI, cpu=_by_digits, default=_by_floats)
    return (y_RxO * scale_O[None]).reshape(*rows, *outputs)


def _by_digits(x_RxI: jax.Array, codes_OxI: jax.Array) -> jax.Array:
    """XLA has fast kernels on CPUs for int8 x int8, of two rows or more, and for no other product with int8."""
    x_RxI = x_RxI.astype(jnp.float32)
    step_Rx1 = jnp.max(jnp.abs(x_RxI), axis=1, keepdims=True) / (127 * _DIGIT)
    number_RxI = jnp.round(x_RxI / jnp.where(step_Rx1 == 0, 1.0, step_Rx1))
    high_RxI = jnp.round(number_RxI / _DIGIT)
    digits_2RxI = jnp.concatenate([high_RxI, number_RxI - _DIGIT * high_RxI]).astype(jnp.int8)
    sums_2RxO = jax.lax.dot_general(
        digits_2RxI, codes_OxI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    high_RxO, low_RxO = jnp.split(sums_2RxO, 2)
    return (_DIGIT * high_RxO + low_RxO) * step_Rx1


def _by_floats(x_RxI: jax.Array, codes_OxI: jax.Array) -> jax.Array:
    kernel_IxO = codes_OxI.astype(x_RxI.dtype).T  # exact in bfloat16, too; the compiler reads it as int8
    return jnp.matmul(x_RxI, kernel_IxO, preferred_element_type=jnp.float32)
