"""A decoder-only transformer language model.

Letters in names of arrays: B batch, T length, D width, N query heads, K key and value heads, H size of a head,
F width of the MLP, V vocabulary.

Read `Transformer` first, then `Block`. `mark` says what an axis is; it does nothing unless a mesh is set.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

_KERNELS = "flaxmodels.attention"  # loaded when it is needed
_INIT = nn.initializers.normal(0.02)
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
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
      attention: the kernel. "xla" works everywhere; "cudnn" is flash attention on Nvidia GPUs, for bfloat16, "splash"
        on TPUs; "ring" splits keys and values, too, over a mesh's `sequence`. "auto" picks: see `chosen`.
      remat: what a block's backward pass finds saved (https://arxiv.org/abs/1604.06174): "none" recomputes nothing,
        "dots" all but products with parameters, "nothing" everything; "offload" is "dots", saved in the host's memory.
      split_head: return what the head would multiply instead of logits, for a loss that never holds all of them.
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
    attention: Literal["auto", "xla", "cudnn", "splash", "ring"] = "auto"
    remat: Literal["none", "dots", "nothing", "offload"] = "none"
    split_head: bool = False
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
    def __call__(self, inputs: jax.Array | Mapping[str, jax.Array], train: bool = False) -> Any:
        """Map tokens (B, T), an integer dtype, to logits (B, T, vocab_size) float32; those at t see inputs up to t.

        With `split_head`, to {"features": (B, T, width), "kernel": (width, vocab_size)}, both in `dtype`, whose product
        the logits are.

        Inputs are the tokens, or, where a row holds several documents, {"tokens", "segments", "positions"}, each (B, T)
        of an integer dtype. Then those at t see inputs of their own segment only, and positions, below `max_length`,
        are as given. Padding is a segment, too.

        With `train` and `dropout`, `apply` needs `rngs={"dropout": key}`. A token outside the vocabulary gives NaN.

        Raises:
          ValueError: T is more than `max_length`, inputs are not (B, T) integers or have other keys, or the kernel that
            `attention` names can't compute this here.
        """
        layout = None
        if isinstance(inputs, Mapping):
            if set(inputs) != {"tokens", "segments", "positions"}:
                raise ValueError(f"inputs have the keys {sorted(inputs)}: expected tokens, segments, positions.")
            layout = {name: inputs[name] for name in ("segments", "positions")}
            inputs = inputs["tokens"]
        whole = jnp.issubdtype(inputs.dtype, jnp.integer)
        if not whole or inputs.ndim != 2 or inputs.shape[1] > self.max_length:
            raise ValueError(
                f"inputs of shape {inputs.shape} and {inputs.dtype}: expected integers, (batch, length) with length at "
                f"most max_length={self.max_length}. Cut the sequences, or raise max_length."
            )
        # Parameters do not depend on the kernel, and are often made where the mesh is not set.
        kernel = "xla" if self.is_initializing() else self._pick(inputs.shape, layout is not None)[0]
        embed = functools.partial(nn.Embed, features=self.width, embedding_init=_INIT, dtype=self.dtype)
        tokens = embed(self.vocab_size, name="embed")
        # The table's width is gathered, as other parameters are: else the compiler splits, then regroups, the result.
        table_VxD = mark(tokens.embedding.astype(self.dtype), "vocab", "embed")
        x_BxTxD = jnp.take(table_VxD, inputs, axis=0)
        if self.positions == "learned":
            places = embed(self.max_length, name="embed_positions")
            x_BxTxD += places(jnp.arange(inputs.shape[1]))[None] if layout is None else places(layout["positions"])
        x_BxTxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxTxD)
        x_BxTxD, _ = self._blocks(train, kernel)(mark(x_BxTxD, "batch", "length", "embed"), layout)
        x_BxTxD = self._make_norm()(name="norm")(x_BxTxD)
        kernel_DxV = table_VxD.T if self.tied_head else Head(self.vocab_size, name="head")(self.width)
        kernel_DxV = kernel_DxV.astype(self.dtype)
        if self.split_head:
            return {"features": x_BxTxD, "kernel": mark(kernel_DxV, "embed", "vocab")}
        return mark(x_BxTxD @ kernel_DxV, "batch", "length", "vocab").astype(jnp.float32)

    def chosen(self, mesh: jax.sharding.Mesh, inputs: Any) -> tuple[str, ...]:
        """Lines for a log: the kernel of attention for such inputs (arrays or their shapes) on a mesh, and why.

        Raises:
          ValueError: `attention` names a kernel that can't compute this, or `remat` memory that devices don't have.
        """
        kinds = sorted(memory.kind for memory in mesh.devices.flat[0].addressable_memories())
        if self.remat == "offload" and "pinned_host" not in kinds:
            raise ValueError(
                f'remat="offload" needs the memory "pinned_host", and {mesh.devices.flat[0].device_kind} has {kinds}. '
                'Use remat="dots" or remat="nothing".'
            )
        packed = isinstance(inputs, Mapping)
        return (self._pick((inputs["tokens"] if packed else inputs).shape, packed, mesh)[1],)

    def _pick(self, shape: tuple[int, ...], packed: bool, mesh: jax.sharding.Mesh | None = None) -> tuple[str, str]:
        """The kernel for tokens of `shape` (B, T), and a line for a log; on the mesh that is set if none is given."""
        attention = importlib.import_module(_KERNELS)
        sizes = (*shape, self.heads, self.width // self.heads)
        case = attention.Case(sizes, self.kv_heads or self.heads, self.dtype, packed, *attention.place(mesh))
        picked: tuple[str, str] = attention.pick(self.attention, case)
        return picked

    def _blocks(self, train: bool, kernel: str) -> nn.Module:
        """All blocks as one module, called as `(x_BxTxD, layout)`; returns `(x_BxTxD, None)`."""
        # What ends a residual branch starts smaller, so that the sum of all branches does not grow with depth (GPT-2).
        out_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
        common: dict[str, Any] = {"use_bias": self.use_bias, "out_init": out_init, "dtype": self.dtype}
        rope_base = self.rope_base if self.positions == "rope" else None
        kv_heads = self.kv_heads or self.heads
        attention = functools.partial(Attention, self.heads, kv_heads, rope_base, kernel, **common)
        width = self.mlp_width or (4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 192) * 64)
        mlp = functools.partial(MLP, width, self.mlp == "swiglu", **common)
        block = Block
        if self.remat != "none":
            # Where the loop has one turn there is none after compilation, and equal work would be merged.
            block = nn.remat(Block, policy=_POLICIES[self.remat], prevent_cse=self.unroll >= self.layers)
        scan = nn.scan(
            block,
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


class Head(nn.Module):
    """The kernel of the last map, which is a product and nothing else."""

    vocab_size: int

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        """(width, vocab_size), float32."""
        kernel: jax.Array = self.param("kernel", _INIT, (width, self.vocab_size))
        return kernel


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
    kernel: str
    use_bias: bool
    out_init: Callable[..., Any]
    dtype: str

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, layout: Layout = None) -> jax.Array:
        """Map (B, T, D) to the same shape, in `dtype`; with a layout, each segment by itself."""
        positions_BxT, segments_BxT, same_Bx1xTxT = None, None, None
        if layout is not None:
            positions_BxT, segments_BxT = layout["positions"], layout["segments"]
            same_Bx1xTxT = segments_BxT[:, None, :, None] == segments_BxT[:, None, None]
        D = x_BxTxD.shape[-1]
        dense = functools.partial(nn.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype)
        project = functools.partial(dense, kernel_init=_INIT)
        H = D // self.heads
        q_BxTxNxH = project((self.heads, H), name="query")(x_BxTxD)
        k_BxTxKxH = project((self.kv_heads, H), name="key")(x_BxTxD)
        v_BxTxKxH = project((self.kv_heads, H), name="value")(x_BxTxD)
        k_BxTxKxH, v_BxTxKxH = (mark(x, "batch", "length", "kv_heads", None) for x in (k_BxTxKxH, v_BxTxKxH))
        if self.rope_base is not None:
            q_BxTxNxH, k_BxTxKxH = (rotate(x, self.rope_base, positions_BxT) for x in (q_BxTxNxH, k_BxTxKxH))
        q_BxTxNxH = mark(q_BxTxNxH, "batch", "length", "heads", None)
        if self.kernel != "ring":  # where a mesh splits the length, each query's device gathers the keys of all of it
            k_BxTxKxH, v_BxTxKxH = (mark(x, "batch", "kv_length", "kv_heads", None) for x in (k_BxTxKxH, v_BxTxKxH))
        if self.kernel in ("xla", "cudnn"):
            plain = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=self.kernel)
            attend = functools.partial(plain, mask=same_Bx1xTxT)
        else:
            attend = functools.partial(getattr(importlib.import_module(_KERNELS), self.kernel), segments=segments_BxT)
        y_BxTxNxH = attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH)
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
    """Name the axes of an activation for the rules of a mesh (`nn.logical_axis_rules`); without a mesh, nothing.

    An axis that the mesh does not divide stays whole: padded parts would be moved about.
    """
    sizes, places = jax.sharding.get_abstract_mesh().shape, nn.logical_to_mesh_axes(axes) or ()
    parts = [math.prod(sizes.get(n, 1) for n in ((p,) if isinstance(p, str) else p or ())) for p in places]
    whole = [i for i, part in enumerate(parts) if x.shape[i] % part]
    kept = tuple(None if i in whole else axis for i, axis in enumerate(axes))
    marked: jax.Array = nn.with_logical_constraint(x, kept)
    return marked
