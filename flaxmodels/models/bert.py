"""BERT and DistilBERT: encoders on the blocks of the transformer, to guess masked tokens or to classify texts."""

from typing import Any, Literal

import flax.linen as nn
import jax

from flaxmodels.models.blocks import INIT, Layout
from flaxmodels.models.classifier import TextClassifier
from flaxmodels.models.transformer import Transformer


class Bert(Transformer):
    """BERT (https://arxiv.org/abs/1810.04805): what each token was, from all that are around it.

    Every token sees all of its segment; norms come after the sums. DistilBERT (https://arxiv.org/abs/1910.01108) is
    `types=0`. The head transforms features before it multiplies them with the embedding.

    Attributes: those of `Transformer`, with BERT's values where they differ.
    """

    norm: Literal["rms", "layer"] = "layer"
    norm_eps: float = 1e-12
    norm_place: Literal["pre", "post"] = "post"
    positions: Literal["rope", "learned"] = "learned"
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "gelu_exact"
    causal: bool = False
    use_bias: bool = True
    types: int = 2
    embed_norm: bool = True
    tied_head: bool = True
    head_bias: bool = True

    def _outputs(self, x_BxTxD: jax.Array, table_VxD: jax.Array, layout: Layout, train: bool) -> Any:
        dense = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype, name="transform")
        x_BxTxD = nn.gelu(dense(x_BxTxD), approximate=self.mlp != "gelu_exact")
        x_BxTxD = self._make_norm()(name="transform_norm")(x_BxTxD)
        return super()._outputs(x_BxTxD, table_VxD, layout, train)


class BertClassifier(Bert, TextClassifier):
    """Classes of texts, as BERT has them: from the first token, by a dense layer and tanh.

    Attributes: those of `TextClassifier`, with BERT's values where they differ.
    """

    pool: Literal["last", "first", "mean"] = "first"
    pooler: Literal["tanh", "relu"] | None = "tanh"

    _outputs = TextClassifier._outputs
