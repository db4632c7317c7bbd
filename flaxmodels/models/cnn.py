"""A small convolutional network; its defaults are the net of the MNIST examples.

Letters in names of arrays: B batch, H height, W width, C channels, F features, h and w pooled height and width,
p side of a pooling window.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class CNN(nn.Module):
    """Convolution, norm, activation, max-pool, once for each of `features`; a dense layer; a linear head.

    After LeCun et al., 1998 (doi:10.1109/5.726791), with max-pooling, and dropout before the dense layers.

    Attributes:
      classes: width of the output.
      features: channels of each convolution.
      kernel: side of the convolution's window; the input is padded so that its size stays.
      norm: after each convolution: none, batch norm (state in `batch_stats`), or layer norm over the channels.
      pool: side of the max-pool windows, which do not overlap; 1 is off.
      dropout: the rate before the dense layer and before the head; 0 is off.
      dense: width of the dense layer.
      activation: what follows each convolution and the dense layer.
      dtype: of the computation. Parameters and the norms' statistics are float32.
    """

    classes: int
    features: tuple[int, ...] = (32, 64)
    kernel: int = 3
    norm: Literal["none", "batch", "layer"] = "none"
    pool: int = 2
    dropout: float = 0.0
    dense: int = 128
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        for name in ("classes", "features", "kernel", "pool", "dense"):
            size = getattr(self, name)
            if min(size if isinstance(size, tuple) else (size,), default=1) < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1): it is the share that is dropped; 0 is off.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Map images (B, H, W, C), any numeric dtype, to logits (B, classes) float32.

        With `train`, `apply` needs `rngs={"dropout": key}` for dropout and `mutable=["batch_stats"]` for batch norm.

        Raises:
          ValueError: the inputs are not images, or too small for so many poolings.
        """
        if isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs are a dict with the keys {', '.join(inputs)}: this model takes one array. "
                "For tokens use the transformer, for anything else a module of your own."
            )
        smallest = self.pool ** len(self.features)
        if inputs.ndim != 4 or min(inputs.shape[1:3]) < smallest:
            raise ValueError(
                f"inputs of shape {inputs.shape}: expected (batch, height, width, channels), and sides of at least "
                f"pool**len(features)={smallest}. Reshape them, or lower pool or the number of features."
            )
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        activation = getattr(nn, self.activation)
        x_BxHxWxC = inputs.astype(self.dtype)
        for i, width in enumerate(self.features):
            x_BxHxWxC = self._convolution(i, width, x_BxHxWxC, train)
            x_BxHxWxC = max_pool(activation(x_BxHxWxC), self.pool)
        x_BxF = dropout(x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1))
        x_BxF = dropout(activation(nn.Dense(self.dense, dtype=self.dtype, name="dense")(x_BxF)))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x_BxF).astype(jnp.float32)

    def _convolution(self, i: int, width: int, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        window = (self.kernel, self.kernel)
        # A norm subtracts the mean or adds a bias of its own: one before it would be a parameter without effect.
        bias = self.norm == "none"
        x_BxHxWxC = nn.Conv(width, window, use_bias=bias, dtype=self.dtype, name=f"conv_{i}")(x_BxHxWxC)
        if self.norm == "batch":
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm_{i}")
            return norm(x_BxHxWxC)
        if self.norm == "layer":
            return nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x_BxHxWxC)
        return x_BxHxWxC


def max_pool(x_BxHxWxC: jax.Array, p: int) -> jax.Array:
    """The maximum of each p x p window; windows do not overlap, and what is left at the far edges is dropped.

    Returns (B, H // p, W // p, C) in the dtype of the input, as `nn.max_pool` does, with the same gradients.
    """
    tiled = x_BxHxWxC.shape[1] % p == 0 and x_BxHxWxC.shape[2] % p == 0
    if tiled and p <= 16:  # a window has at most 256 places: their numbers fit into uint8
        return _tiled_max_pool(x_BxHxWxC, p)
    return nn.max_pool(x_BxHxWxC, window_shape=(p, p), strides=(p, p))


# XLA's own gradient of max-pool (select_and_scatter) was over half of this network's train step on CPU. This one keeps
# a byte a window, the place of its first maximum, and compares with it: 2.5 times as fast a step, and 1.3 times as
# fast as through the gradient of jnp.max. Ties have one winner, as in select_and_scatter. Comparing x with its
# maximum would do as well on CPU, but loses gradients where XLA keeps one of the two in a higher precision.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tiled_max_pool(x_BxHxWxC: jax.Array, p: int) -> jax.Array:
    return _windows(x_BxHxWxC, p).max(axis=(2, 4))


def _windows(x_BxHxWxC: jax.Array, p: int) -> jax.Array:
    B, H, W, C = x_BxHxWxC.shape
    return x_BxHxWxC.reshape(B, H // p, p, W // p, p, C)


def _pool_forward(x_BxHxWxC: jax.Array, p: int) -> tuple[jax.Array, jax.Array]:
    x_BxhxpxwxpxC = _windows(x_BxHxWxC, p)
    best_BxhxwxC = x_BxhxpxwxpxC[:, :, 0, :, 0]
    place_BxhxwxC = jnp.zeros(best_BxhxwxC.shape, jnp.uint8)
    for k in range(1, p * p):
        next_BxhxwxC = x_BxhxpxwxpxC[:, :, k // p, :, k % p]
        place_BxhxwxC = jnp.where(next_BxhxwxC > best_BxhxwxC, jnp.uint8(k), place_BxhxwxC)
        best_BxhxwxC = jnp.maximum(next_BxhxwxC, best_BxhxwxC)
    return _tiled_max_pool(x_BxHxWxC, p), place_BxhxwxC


def _pool_backward(p: int, place_BxhxwxC: jax.Array, gradient_BxhxwxC: jax.Array) -> tuple[jax.Array]:
    B, h, w, C = place_BxhxwxC.shape
    row, column = (jax.lax.broadcasted_iota(jnp.uint8, (B, h, p, w, p, C), axis) for axis in (2, 4))
    place, gradient = (jnp.expand_dims(x, (2, 4)) for x in (place_BxhxwxC, gradient_BxhxwxC))
    return (jnp.where(row * p + column == place, gradient, 0).reshape(B, h * p, w * p, C),)


_tiled_max_pool.defvjp(_pool_forward, _pool_backward)
