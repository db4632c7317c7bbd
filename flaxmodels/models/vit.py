"""The vision transformer: patches of an image are the tokens."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxmodels.models.blocks import INIT, KERNELS, MLP, Attention, mark, run_blocks


class ViT(nn.Module):
    """ViT (https://arxiv.org/abs/2010.11929), laid out as in Hugging Face's library.

    Letters in names of arrays beside those of `blocks.py`: T tokens, which are the patches and the class token.

    Attributes:
      classes: how many there are.
      patch: side of a patch, in pixels; divides those of the images.
      layers: how many blocks.
      width: of the residual stream.
      heads: of attention; divides `width`.
      mlp_width: None: 4 x width.
      pool: which features the classes are of: those of a learned "class" token that stands first, or the "mean".
      norm_eps: added to the variance.
      dropout: the rate after the embedding and at the end of each residual branch; 0 is off.
      attention: the kernel, as in `Transformer`.
      remat: what a block's backward pass finds saved, as in `Transformer`.
      unroll: blocks that one turn of the compiled loop over layers computes.
      stacked: whether the blocks are one module in a loop, as in `Transformer`.
      dtype: of the computation. Parameters, softmax and statistics are float32.
    """

    classes: int
    patch: int = 16
    layers: int = 12
    width: int = 192
    heads: int = 3
    mlp_width: int | None = None
    pool: Literal["class", "mean"] = "class"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: Literal["none", "dots", "nothing", "offload"] = "none"
    unroll: int = 1
    stacked: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        for name in ("classes", "patch", "layers", "width", "heads", "mlp_width", "unroll"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}: heads share it evenly.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1): it is the share that is dropped; 0 is off.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Map images (B, H, W, C), any numeric dtype, to logits (B, classes) float32.

        Positions are learned for images of one size: that of the first.

        With `train` and `dropout`, `apply` needs `rngs={"dropout": key}`.

        Raises:
          ValueError: the inputs are not images, `patch` does not divide their sides, or the kernel that `attention`
            names can't compute this here.
        """
        if isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs are a dict with the keys {', '.join(inputs)}: this model takes one array. "
                "For tokens use the transformer, for anything else a module of your own."
            )
        if inputs.ndim != 4 or inputs.shape[1] % self.patch or inputs.shape[2] % self.patch:
            raise ValueError(
                f"inputs of shape {inputs.shape}: expected (batch, height, width, channels), with sides that "
                f"patch={self.patch} divides. Reshape them, or change patch."
            )
        B, height, width, C = inputs.shape
        p, kernel = self.patch, "xla" if self.is_initializing() else self._pick(inputs.shape)[0]
        # A product with patches, not a convolution: the same numbers, and every device and mesh can do it well.
        x_BxhxpxwxpxC = inputs.astype(self.dtype).reshape(B, height // p, p, width // p, p, C)
        x_BxTxP = x_BxhxpxwxpxC.swapaxes(2, 3).reshape(B, -1, p * p * C)
        x_BxTxD = nn.Dense(self.width, kernel_init=INIT, dtype=self.dtype, name="patches")(x_BxTxP)
        if self.pool == "class":
            first_D = self.param("class_token", INIT, (self.width,)).astype(self.dtype)
            x_BxTxD = jnp.concatenate([jnp.broadcast_to(first_D[None, None], (B, 1, self.width)), x_BxTxD], axis=1)
        T = x_BxTxD.shape[1]
        places = nn.Embed(T, self.width, embedding_init=INIT, dtype=self.dtype, name="embed_positions")
        x_BxTxD += places(jnp.arange(T))[None]
        x_BxTxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxTxD)
        x_BxTxD = self._blocks(mark(x_BxTxD, "batch", "length", "embed"), train, kernel)
        x_BxTxD = self._make_norm()(name="norm")(x_BxTxD)
        x_BxD = x_BxTxD[:, 0] if self.pool == "class" else x_BxTxD.mean(1)
        head = nn.Dense(self.classes, kernel_init=INIT, dtype=self.dtype, name="head")
        return head(x_BxD).astype(jnp.float32)

    def chosen(self, mesh: jax.sharding.Mesh, inputs: Any) -> tuple[str, ...]:
        """Lines for a log: the kernel of attention for such images (arrays or their shapes) on a mesh, and why.

        Raises:
          ValueError: `attention` names a kernel that can't compute this.
        """
        return (self._pick(inputs.shape, mesh)[1],)

    def _pick(self, shape: tuple[int, ...], mesh: jax.sharding.Mesh | None = None) -> tuple[str, str]:
        """The kernel for images of `shape` (B, H, W, C), and a line for a log."""
        attention = importlib.import_module(KERNELS)
        tokens = (shape[1] // self.patch) * (shape[2] // self.patch) + (self.pool == "class")
        sizes = (shape[0], tokens, self.heads, self.width // self.heads)
        case = attention.Case(sizes, self.heads, self.dtype, False, *attention.place(mesh), causal=False)
        picked: tuple[str, str] = attention.pick(self.attention, case)
        return picked

    def _blocks(self, x_BxTxD: jax.Array, train: bool, kernel: str) -> jax.Array:
        out_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)  # see `Transformer`
        common: dict[str, Any] = {"use_bias": True, "out_init": out_init, "dtype": self.dtype}
        attention = functools.partial(
            Attention,
            heads=self.heads,
            kv_heads=self.heads,
            head_size=self.width // self.heads,
            kernel=kernel,
            qkv_bias=True,
            causal=False,
            **common,
        )
        mlp = functools.partial(MLP, width=self.mlp_width or 4 * self.width, kind="gelu_exact", **common)

        def block(kind: Callable[..., Any], name: str) -> Any:
            return kind(attention, mlp, self._make_norm(), self.dropout if train else 0.0, name=name)

        return run_blocks(
            block, x_BxTxD, {}, (0,), None,
            layers=self.layers, stacked=self.stacked, remat=self.remat, unroll=self.unroll,
        )[0]  # fmt: skip

    def _make_norm(self) -> Callable[..., Any]:
        return functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
