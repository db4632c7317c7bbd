"""A residual network for small images (8 x 8 to 32 x 32).

Letters in names of arrays: B batch, H height, W width, C channels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResNet(nn.Module):
    """Residual blocks of two 3 x 3 convolutions with batch norm (He et al., 2015, https://arxiv.org/abs/1512.03385).

    The stem is one 3 x 3 convolution without pooling, as that paper has for CIFAR. Each stage but the first halves the
    sides and doubles the channels. `stages=(n, n, n)` with `width=16` is its ResNet-(6n + 2).

    Attributes:
      classes: width of the output.
      stages: blocks in each stage.
      width: channels of the stem and the first stage.
      dtype: of the computation. Parameters and statistics are float32.
    """

    classes: int
    stages: tuple[int, ...] = (1, 1, 1)
    width: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        for name, sizes in (("classes", (self.classes,)), ("stages", self.stages), ("width", (self.width,))):
            if min(sizes, default=0) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1, and there must be a stage.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Map images (B, H, W, C), any numeric dtype, to logits (B, classes) float32.

        With `train` the statistics of this batch are used, and `apply` needs `mutable=["batch_stats"]` to return the
        running averages; without it, the averages are used and left as they are.

        Raises:
          ValueError: the inputs are not images.
        """
        if isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs are a dict with the keys {', '.join(inputs)}: this model takes one array. "
                "For tokens use the transformer, for anything else a module of your own."
            )
        if inputs.ndim != 4:
            raise ValueError(f"inputs of shape {inputs.shape}: expected (batch, height, width, channels).")
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x_BxHxWxC = conv(self.width, (3, 3), name="stem")(inputs.astype(self.dtype))
        x_BxHxWxC = nn.relu(norm(name="norm_stem")(x_BxHxWxC))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x_BxHxWxC = Block(self.width * 2**i, stride, conv, norm, name=f"stage_{i}_block_{j}")(x_BxHxWxC)
        # In float32: a mean over many places in bfloat16 would lose what it sums.
        x_BxC = x_BxHxWxC.mean(axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x_BxC).astype(jnp.float32)


class Block(nn.Module):
    """Two convolutions and a shortcut; the shortcut is projected where the shape changes.

    Attributes:
      width: channels of the output.
      stride: of the first convolution.
      make_conv, make_norm: called for each layer with what differs.
    """

    width: int
    stride: int
    make_conv: Callable[..., Any]
    make_norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H / stride, W / stride, width), rounded up, in the dtype of the convolutions."""
        strides = (self.stride, self.stride)
        y_BxHxWxC = self.make_conv(self.width, (3, 3), strides, name="conv_0")(x_BxHxWxC)
        y_BxHxWxC = nn.relu(self.make_norm(name="norm_0")(y_BxHxWxC))
        y_BxHxWxC = self.make_conv(self.width, (3, 3), name="conv_1")(y_BxHxWxC)
        # A scale of zero makes each block an identity at first (https://arxiv.org/abs/1706.02677, section 5.1).
        y_BxHxWxC = self.make_norm(scale_init=nn.initializers.zeros, name="norm_1")(y_BxHxWxC)
        if x_BxHxWxC.shape != y_BxHxWxC.shape:
            x_BxHxWxC = self.make_conv(self.width, (1, 1), strides, name="conv_shortcut")(x_BxHxWxC)
            x_BxHxWxC = self.make_norm(name="norm_shortcut")(x_BxHxWxC)
        return nn.relu(x_BxHxWxC + y_BxHxWxC)
