"""Classes of texts, from the features that a transformer has of their tokens."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxmodels.models.blocks import INIT, Layout
from flaxmodels.models.transformer import Transformer


class TextClassifier(Transformer):
    """A transformer whose outputs are classes of a whole row; its blocks have the paths of `Transformer`.

    So parameters of one that was trained on text alone fit (`start.workdir`). Padding is of segment 0.

    Attributes:
      classes: how many there are.
      pool: which features stand for the row: those of its "last" token, which a decoder computes from all of it, of its
        "first" (BERT), or the "mean" of all.
      pooler: a dense layer of them with this activation: "tanh" (BERT), "relu" (DistilBERT), or None.
      head_bias: of each class.

    The others are those of `Transformer`; what it says of logits and the head does not apply.
    """

    classes: int = dataclasses.field(kw_only=True)
    pool: Literal["last", "first", "mean"] = "last"
    pooler: Literal["tanh", "relu"] | None = None
    head_bias: bool = True

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        if self.classes < 1:
            raise ValueError(f"classes={self.classes} must be at least 1.")
        for name in ("split_head", "head_softcap"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is of logits of tokens, and these are of classes.")
        super().__post_init__()

    def _outputs(self, x_BxTxD: jax.Array, table_VxD: jax.Array, layout: Layout, train: bool) -> Any:
        """Logits (B, classes) float32."""
        B, T, D = x_BxTxD.shape
        real_BxT = layout["segments"] > 0 if "segments" in layout else jnp.ones((B, T), bool)
        place_1xT = jnp.arange(T)[None]
        if self.pool == "mean":
            share_BxT = real_BxT / jnp.maximum(real_BxT.sum(1, keepdims=True), 1)
        else:
            last_Bx1 = jnp.max(jnp.where(real_BxT, place_1xT, 0), axis=1, keepdims=True)
            share_BxT = place_1xT == (last_Bx1 if self.pool == "last" else jnp.zeros_like(last_Bx1))
        x_BxD = jnp.sum(x_BxTxD.astype(jnp.float32) * share_BxT[..., None], axis=1).astype(self.dtype)
        if self.pooler is not None:
            dense = nn.Dense(D, kernel_init=INIT, dtype=self.dtype, name="pooler")
            x_BxD = getattr(nn, self.pooler)(dense(x_BxD))
        x_BxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxD)
        head = nn.Dense(self.classes, use_bias=self.head_bias, kernel_init=INIT, dtype=self.dtype, name="head")
        return head(x_BxD).astype(jnp.float32)
