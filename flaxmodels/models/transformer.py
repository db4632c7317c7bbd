"""A decoder-only transformer language model.

Letters in names of arrays: B batch, T length, D width, N query heads, K key and value heads, H size of a head,
F width of the MLP, V vocabulary.

Read `Transformer` first, then `Block`. `mark` says what an axis is; it does nothing unless a mesh is set.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

_INIT = nn.initializers.normal(0.02)
# Where a row holds several documents: {"segments": (B, T), "positions": (B, T)}. None: one, from its start.
Layout = Mapping[str, jax.Array] | None


class Transformer(nn.Module):
    """Pre-norm blocks of causal attention (https://arxiv.org/abs/1706.03762) and an MLP.

    The defaults are those of LLaMA (https://arxiv.org/abs/2302.13971): RMS norm, rotary positions, SwiGLU, no biases.
    GPT-2 (Radford et al., 2019) is `norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True`.
    The parameters of all blocks are stacked on a leading axis of size `layers`.

    Attributes:
      vocab_size: how many tokens there are. A multiple of 128 is faster on most accelerators.
      layers: how many blocks.
      width: of the residual stream.
      heads: of the queries; divides `width`.
      kv_heads: of the keys and values (https://arxiv.org/abs/2305.13245); divides `heads`. None: as many as `heads`.
      mlp_width: None: 4 x width, or for SwiGLU, which has three matrices, 8/3 x width rounded up to a multiple of 64.
      max_length: the most tokens in a sequence.
      norm: RMS (https://arxiv.org/abs/1910.07467) or layer norm (https://arxiv.org/abs/1607.06450).
      positions: rotary (https://arxiv.org/abs/2104.09864) or a learned embedding.
      mlp: GELU (https://arxiv.org/abs/1606.08415), by its tanh formula, or SwiGLU (https://arxiv.org/abs/2002.05202).
      tied_head: the head is the embedding (https://arxiv.org/abs/1608.05859).
      use_bias: in the projections of the blocks and in layer norms.
      dropout: the rate after the embedding and at the end of each residual branch; 0 is off.
      rope_base: the longest wavelength of rotary positions is about 2 pi times this.
      attention: "xla" works everywhere; "cudnn" is flash attention on Nvidia GPUs, for bfloat16.
      unroll: blocks that one turn of the compiled loop over layers computes; more runs faster and compiles longer.
      dtype: of the computation. Parameters, softmax, statistics and rotations are float32.
    """

    vocab_size: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    max_length: int = 256
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    tied_head: bool = False
    use_bias: bool = False
    dropout: float = 0.0
    rope_base: float = 10000.0
    attention: Literal["xla", "cudnn"] = "xla"
    unroll: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        sizes = ("vocab_size", "layers", "width", "heads", "kv_heads", "mlp_width", "max_length", "unroll")
        for name in sizes:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}: heads share it evenly.")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}: each serves equally many.")
        if self.positions == "rope" and self.width // self.heads % 2:
            raise ValueError(
                f"width / heads = {self.width // self.heads} must be even: rotary positions turn pairs. "
                'Change width or heads, or set positions="learned".'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1): it is the share that is dropped; 0 is off.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array | Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        """Map tokens (B, T), an integer dtype, to logits (B, T, vocab_size) float32; those at t see inputs up to t.

        Inputs are the tokens, or, where a row holds several documents, {"tokens", "segments", "positions"}, each (B, T)
        of an integer dtype. Then those at t see inputs of their own segment only, and positions, below `max_length`,
        are as given. Padding is a segment, too.

        With `train` and `dropout`, `apply` needs `rngs={"dropout": key}`. A token outside the vocabulary gives NaN.

        Raises:
          ValueError: T is more than `max_length`, or inputs are not (B, T), or have other keys.
        """
        layout = None
        if isinstance(inputs, Mapping):
            if set(inputs) != {"tokens", "segments", "positions"}:
                raise ValueError(f"inputs have the keys {sorted(inputs)}: expected tokens, segments, positions.")
            layout = {name: inputs[name] for name in ("segments", "positions")}
            inputs = inputs["tokens"]
        if inputs.ndim != 2 or inputs.shape[1] > self.max_length:
            raise ValueError(
                f"inputs of shape {inputs.shape}: expected (batch, length) with length at most "
                f"max_length={self.max_length}. Cut the sequences, or raise max_length."
            )
        if self.attention == "cudnn" and (self.dtype != "bfloat16" or jax.default_backend() != "gpu"):
            raise ValueError(
                f'attention="cudnn" needs an Nvidia GPU and dtype="bfloat16"; here are {jax.default_backend()} and '
                f'{self.dtype}. Use attention="xla".'
            )
        embed = functools.partial(nn.Embed, features=self.width, embedding_init=_INIT, dtype=self.dtype)
        tokens = embed(self.vocab_size, name="embed")
        x_BxTxD = tokens(inputs)
        if self.positions == "learned":
            places = embed(self.max_length, name="embed_positions")
            x_BxTxD += places(jnp.arange(inputs.shape[1]))[None] if layout is None else places(layout["positions"])
        x_BxTxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxTxD)
        x_BxTxD, _ = self._blocks(train)(mark(x_BxTxD, "batch", "length", "embed"), layout)
        x_BxTxD = self._make_norm()(name="norm")(x_BxTxD)
        if self.tied_head:
            logits_BxTxV = tokens.attend(x_BxTxD)
        else:
            head = nn.Dense(self.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype, name="head")
            logits_BxTxV = head(x_BxTxD)
        return mark(logits_BxTxV, "batch", "length", "vocab").astype(jnp.float32)

    def _blocks(self, train: bool) -> nn.Module:
        """All blocks as one module, called as `(x_BxTxD, layout)`; returns `(x_BxTxD, None)`."""
        # What ends a residual branch starts smaller, so that the sum of all branches does not grow with depth (GPT-2).
        out_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
        common: dict[str, Any] = {"use_bias": self.use_bias, "out_init": out_init, "dtype": self.dtype}
        rope_base = self.rope_base if self.positions == "rope" else None
        kv_heads = self.kv_heads or self.heads
        attention = functools.partial(Attention, self.heads, kv_heads, rope_base, self.attention, **common)
        width = self.mlp_width or (4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 192) * 64)
        mlp = functools.partial(MLP, width, self.mlp == "swiglu", **common)
        scan = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.layers,
            unroll=self.unroll,
        )
        rate = self.dropout if train else 0.0
        return scan(attention, mlp, self._make_norm(), rate, name="blocks")

    def _make_norm(self) -> Callable[..., Any]:
        if self.norm == "rms":
            return functools.partial(nn.RMSNorm, dtype=self.dtype)
        return functools.partial(nn.LayerNorm, use_bias=self.use_bias, dtype=self.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout at the end of each branch.

    Attributes:
      make_attention, make_mlp, make_norm: called with a name, they return the modules.
      dropout: the rate; 0 is off.
    """

    make_attention: Callable[..., Any]
    make_mlp: Callable[..., Any]
    make_norm: Callable[..., Any]
    dropout: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, layout: Layout = None) -> tuple[jax.Array, None]:
        """Map (B, T, D) to the same shape and dtype; the None is what `nn.scan` would give per layer."""
        dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0)
        y_BxTxD = self.make_norm(name="norm_attention")(x_BxTxD)
        x_BxTxD += dropout(self.make_attention(name="attention")(y_BxTxD, layout))
        x_BxTxD = mark(x_BxTxD, "batch", "length", "embed")
        y_BxTxD = self.make_norm(name="norm_mlp")(x_BxTxD)
        x_BxTxD += dropout(self.make_mlp(name="mlp")(y_BxTxD))
        return mark(x_BxTxD, "batch", "length", "embed"), None


class Attention(nn.Module):
    """Causal attention; query heads share key and value heads in groups of `heads / kv_heads`, in order.

    Attributes: as in `Transformer`; `rope_base` None for no rotation, `out_init` for the last projection.
    """

    heads: int
    kv_heads: int
    rope_base: float | None
    implementation: Literal["xla", "cudnn"]
    use_bias: bool
    out_init: Callable[..., Any]
    dtype: str

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, layout: Layout = None) -> jax.Array:
        """Map (B, T, D) to the same shape, in `dtype`; with a layout, each segment by itself."""
        positions_BxT, mask_Bx1xTxT = None, None
        if layout is not None:
            positions_BxT, segments_BxT = layout["positions"], layout["segments"]
            mask_Bx1xTxT = (segments_BxT[:, :, None] == segments_BxT[:, None, :])[:, None]
        D = x_BxTxD.shape[-1]
        dense = functools.partial(nn.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype)
        project = functools.partial(dense, kernel_init=_INIT)
        H = D // self.heads
        q_BxTxNxH = project((self.heads, H), name="query")(x_BxTxD)
        k_BxTxKxH = project((self.kv_heads, H), name="key")(x_BxTxD)
        v_BxTxKxH = project((self.kv_heads, H), name="value")(x_BxTxD)
        if self.rope_base is not None:
            q_BxTxNxH, k_BxTxKxH = (rotate(x, self.rope_base, positions_BxT) for x in (q_BxTxNxH, k_BxTxKxH))
        y_BxTxNxH = jax.nn.dot_product_attention(
            mark(q_BxTxNxH, "batch", "length", "heads", None),
            mark(k_BxTxKxH, "batch", "length", "kv_heads", None),
            mark(v_BxTxKxH, "batch", "length", "kv_heads", None),
            mask=mask_Bx1xTxT,
            is_causal=True,
            implementation=self.implementation,
        )
        y_BxTxNxH = mark(y_BxTxNxH, "batch", "length", "heads", None)
        return dense(D, axis=(-2, -1), kernel_init=self.out_init, name="out")(y_BxTxNxH)


class MLP(nn.Module):
    """down(gelu(up(x))), or, `gated`, down(silu(gate(x)) * up(x)).

    Attributes: `width` F; the others as in `Attention`.
    """

    width: int
    gated: bool
    use_bias: bool
    out_init: Callable[..., Any]
    dtype: str

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Map (B, T, D) to the same shape, in `dtype`."""
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        h_BxTxF = mark(dense(self.width, kernel_init=_INIT, name="up")(x_BxTxD), "batch", "length", "mlp")
        if self.gated:
            g_BxTxF = dense(self.width, kernel_init=_INIT, name="gate")(x_BxTxD)
            h_BxTxF *= nn.silu(mark(g_BxTxF, "batch", "length", "mlp"))
        else:
            h_BxTxF = nn.gelu(h_BxTxF, approximate=True)
        return dense(x_BxTxD.shape[-1], kernel_init=self.out_init, name="down")(h_BxTxF)


def rotate(x_BxTxNxH: jax.Array, base: float, positions_BxT: jax.Array | None = None) -> jax.Array:
    """Rotary positions: turn the pair (i, i + H/2) at place t by the angle t * base^(-2i/H); same shape and dtype.

    Places are counted from 0, or those of `positions_BxT`.
    """
    T, H = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3]
    # In float32, since bfloat16 can't count past 256.
    frequency_H = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if positions_BxT is None:
        angle_TxH = jnp.arange(T, dtype=jnp.float32)[:, None] * frequency_H[None]
        cos, sin = (f(angle_TxH)[None, :, None] for f in (jnp.cos, jnp.sin))
    else:
        angle_BxTxH = positions_BxT.astype(jnp.float32)[:, :, None] * frequency_H[None, None]
        cos, sin = (f(angle_BxTxH)[:, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxH.dtype)


def mark(x: jax.Array, *axes: str | None) -> jax.Array:
    """Name the axes of an activation for the rules of a mesh (`nn.logical_axis_rules`); without a mesh, nothing."""
    marked: jax.Array = nn.with_logical_constraint(x, axes)
    return marked
