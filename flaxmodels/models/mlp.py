"""A multi-layer perceptron.

Letters in names of arrays: B batch, F features.
"""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Dense layers with an activation after each, then a linear head (Rumelhart et al., 1986, doi:10.1038/323533a0).

    Attributes:
      classes: width of the output.
      hidden: widths of the hidden layers; empty for a linear model.
      activation: what follows each hidden layer.
      dropout: the rate after each activation (https://jmlr.org/papers/v15/srivastava14a.html); 0 is off.
      dtype: of the computation. Parameters are float32.
    """

    classes: int
    hidden: tuple[int, ...] = (128,)
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        for name, sizes in (("classes", (self.classes,)), ("hidden", self.hidden)):
            if min(sizes, default=1) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1: it is the width of a layer.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1): it is the share that is dropped; 0 is off.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Map inputs (B, ...), any numeric dtype, to logits (B, classes) float32.

        With `train` and `dropout`, `apply` needs `rngs={"dropout": key}`.

        Raises:
          ValueError: the inputs are a dict.
        """
        if isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs are a dict with the keys {', '.join(inputs)}: this model takes one array. "
                "For tokens use the transformer, for anything else a module of your own."
            )
        x_BxF = inputs.reshape(inputs.shape[0], -1).astype(self.dtype)
        for i, width in enumerate(self.hidden):
            x_BxF = nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(x_BxF)
            x_BxF = getattr(nn, self.activation)(x_BxF)
            x_BxF = nn.Dropout(self.dropout, deterministic=not train)(x_BxF)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x_BxF).astype(jnp.float32)
