"""A transformer language model: a decoder, unless its fields say otherwise.

Letters in names of arrays: B batch, T length, D width, N query heads, K key and value heads, H size of a head,
F width of the MLP, V vocabulary, S slots of a cache.

Read `Transformer` first, then `Block` in `blocks.py`. Sizes and switches of published models are in `presets.py`.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxmodels.models.blocks import INIT, KERNELS, MLP, Attention, Layout, UnitNorm, mark, run_blocks

_SEGMENTS = {"segments", "positions"}


class Transformer(nn.Module):
    """Blocks of attention (https://arxiv.org/abs/1706.03762) and an MLP, causal and with norms before them.

    The defaults are those of LLaMA (https://arxiv.org/abs/2302.13971): RMS norm, rotary positions, SwiGLU, no biases.
    GPT-2 (Radford et al., 2019) is `norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True`.
    The parameters of all blocks are stacked on a leading axis of size `layers`.

    Attributes:
      vocab_size: how many tokens there are. A multiple of 128 is faster on most accelerators.
      layers: how many blocks.
      width: of the residual stream.
      heads: of the queries; divides `width` unless `head_size` is set.
      kv_heads: of the keys and values (https://arxiv.org/abs/2305.13245); divides `heads`. None: as many as `heads`.
      head_size: None: width / heads.
      mlp_width: None: 4 x width, or where it is gated and has three matrices, 8/3 x width rounded up to a multiple
        of 64.
      max_length: the most tokens in a sequence.
      norm: RMS (https://arxiv.org/abs/1910.07467) or layer norm (https://arxiv.org/abs/1607.06450).
      norm_eps: added to the variance.
      norm_plus_one: RMS norms multiply by 1 + scale (Gemma, https://arxiv.org/abs/2403.08295).
      norm_place: "pre": before a branch, and at the end of all; "post": of the sum after it (BERT).
      post_norms: of the end of each branch, too (Gemma 2, https://arxiv.org/abs/2408.00118).
      positions: rotary (https://arxiv.org/abs/2104.09864) or a learned embedding.
      rope_base: the longest wavelength of rotary positions is about 2 pi times this.
      rope_scaling: stretches rotary positions to longer sequences as Llama 3.1 does (https://arxiv.org/abs/2407.21783):
        (factor, low, high, length of training). Pairs that turn less than `low` times in that length turn slower by
        `factor`, those that turn more than `high` times stay, in between is a mixture.
      mlp: SwiGLU or GeGLU (https://arxiv.org/abs/2002.05202), or GELU (https://arxiv.org/abs/1606.08415), by its tanh
        formula, as in GeGLU, or "gelu_exact" (BERT, ViT).
      causal: whether a token sees no later ones; an encoder's sees all (BERT, https://arxiv.org/abs/1810.04805).
      windows: how many tokens each sees back to, itself among them, cycled over the layers; 0 for all. Mistral
        (https://arxiv.org/abs/2310.06825) has (4096,), Gemma 2 has (4096, 0).
      softcap: of attention's scores, softcap x tanh(score / softcap); 0 for none (Gemma 2).
      query_scale: of attention's scores; None: head_size^-0.5.
      qk_norm: RMS norms of each query and key, before rotation (Qwen 3, https://arxiv.org/abs/2505.09388).
      use_bias: in the projections of the blocks and in layer norms.
      qkv_bias: in those of queries, keys and values (Qwen 2.5, https://arxiv.org/abs/2412.15115); None: as `use_bias`.
      types: of tokens, with an embedding each, such as the two sentences of a pair (BERT); 0 for none.
      embed_scale: multiply the embedding of tokens by sqrt(width) (Gemma).
      embed_norm: a norm after the embedding (BERT).
      tied_head: the head is the embedding (https://arxiv.org/abs/1608.05859).
      head_bias: of each token, added to the logits (BERT).
      head_softcap: of logits, as `softcap`; 0 for none (Gemma 2).
      dropout: the rate after the embedding and at the end of each residual branch; 0 is off.
      attention: the kernel. "xla" works everywhere; "cudnn" is flash attention on Nvidia GPUs, for bfloat16, "splash"
        on TPUs; "ring" splits keys and values, too, over a mesh's `sequence`. "auto" picks: see `chosen`.
      remat: what a block's backward pass finds saved (https://arxiv.org/abs/1604.06174): "none" recomputes nothing,
        "dots" all but products with parameters, "nothing" everything; "offload" is "dots", saved in the host's memory.
      split_head: return what the head would multiply instead of logits, for a loss that never holds all of them.
      unroll: blocks that one turn of the compiled loop over layers computes; more runs faster and compiles longer.
      stacked: False: blocks with parameters of their own, "blocks_0", "blocks_1", ..., and no loop; compiles longer,
        and generates faster. `stack` and `unstack` turn parameters of one into those of the other.
      dtype: of the computation. Parameters, softmax, statistics and rotations are float32.
    """

    vocab_size: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    mlp_width: int | None = None
    max_length: int = 256
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    norm_place: Literal["pre", "post"] = "pre"
    post_norms: bool = False
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    causal: bool = True
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    query_scale: float | None = None
    qk_norm: bool = False
    use_bias: bool = False
    qkv_bias: bool | None = None
    types: int = 0
    embed_scale: bool = False
    embed_norm: bool = False
    tied_head: bool = False
    head_bias: bool = False
    head_softcap: float = 0.0
    dropout: float = 0.0
    attention: Literal["auto", "xla", "cudnn", "splash", "ring"] = "auto"
    remat: Literal["none", "dots", "nothing", "offload"] = "none"
    split_head: bool = False
    unroll: int = 1
    stacked: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        sizes = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "mlp_width", "max_length", "unroll")
        for name in sizes:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size!r} must be at least 1.")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}: heads share it evenly.")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}: each serves equally many.")
        if self.positions == "rope" and self._head_size % 2:
            said = f"head_size = {self.head_size}" if self.head_size else f"width / heads = {self._head_size}"
            raise ValueError(
                f"{said} must be even: rotary positions turn pairs. "
                f'Change {"head_size" if self.head_size else "width or heads"}, or set positions="learned".'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1): it is the share that is dropped; 0 is off.")
        self._check_switches()
        super().__post_init__()

    def _check_switches(self) -> None:
        if not self.windows or min(self.windows) < 0:
            raise ValueError(f"windows={self.windows} must be of at least one number, none below 0; 0 is no window.")
        if any(self.windows) and not self.causal:
            raise ValueError(f"windows={self.windows} look back: they need causal=True. Leave them out.")
        if self.norm_plus_one and self.norm != "rms":
            raise ValueError(f"norm_plus_one=True is of RMS norms, and norm={self.norm!r}. Leave one of them out.")
        if self.post_norms and self.norm_place == "post":
            raise ValueError('post_norms=True adds norms to those of norm_place="pre", not "post". Leave one out.')
        if not self.rope_base > 0:
            raise ValueError(f"rope_base={self.rope_base!r} must be over 0: it is the base of wavelengths.")
        if self.rope_scaling is not None:
            factor, low, high, length = self.rope_scaling
            if not (factor >= 1 and 0 < low < high and length > 0):
                raise ValueError(
                    f"rope_scaling={self.rope_scaling} must be (factor, low, high, length): a factor of at least 1, "
                    "turns with 0 < low < high, and the length of training, such as (8, 1, 4, 8192)."
                )
        if self.split_head and self.head_softcap:
            raise ValueError(
                f"head_softcap={self.head_softcap} is of logits, which split_head=True (loss.chunks over 1) leaves to "
                "the loss: it would be lost. Leave one of them out."
            )

    @property
    def _head_size(self) -> int:
        return self.head_size or self.width // self.heads

    @nn.compact
    def __call__(self, inputs: jax.Array | Mapping[str, jax.Array], train: bool = False, cache: Any = None) -> Any:
        """Map tokens (B, T), an integer dtype, to logits (B, T, vocab_size) float32; those at t see inputs up to t.

        With `split_head`, to {"features": (B, T, width), "kernel": (width, vocab_size)}, both in `dtype`, whose product
        the logits are. (With `head_bias` both have another column and row, for it.)

        Inputs are the tokens, or a dict of "tokens" and what else is known of them, each (B, T) of an integer dtype.
        Where a row holds several documents, "segments" and "positions": then those at t see inputs of their own segment
        only, and positions, below `max_length`, are as given. Padding is a segment, too. "prefix" is not 0 at tokens
        that all of their segment see. "types" are those of tokens, below `types`; without them all are 0.

        With a cache (see `masked.py`), inputs are {"tokens", "positions"}, where position -1 is padding, and the result
        is (outputs, cache): tokens see what the cache holds of earlier positions, and are then in it themselves.

        With `train` and `dropout`, `apply` needs `rngs={"dropout": key}`. A token outside the vocabulary gives NaN.

        Raises:
          ValueError: T is more than `max_length`, inputs are not (B, T) integers or have other keys, or the kernel that
            `attention` names can't compute this here.
        """
        tokens_BxT, layout = self._read(inputs, cache)
        # Parameters do not depend on the kernel, and are often made where the mesh is not set.
        kernel = "xla" if self.is_initializing() or cache is not None else self._pick(tokens_BxT.shape, layout)[0]
        embed = functools.partial(nn.Embed, features=self.width, embedding_init=INIT, dtype=self.dtype)
        table = embed(self.vocab_size, name="embed")
        # The table's width is gathered, as other parameters are: else the compiler splits, then regroups, the result.
        table_VxD = mark(table.embedding.astype(self.dtype), "vocab", "embed")
        x_BxTxD = jnp.take(table_VxD, tokens_BxT, axis=0)
        if self.embed_scale:
            x_BxTxD *= jnp.asarray(self.width**0.5, self.dtype)
        if self.positions == "learned":
            places = embed(self.max_length, name="embed_positions")
            given = layout.get("positions")
            x_BxTxD += places(jnp.arange(tokens_BxT.shape[1]))[None] if given is None else places(given)
        if self.types:
            x_BxTxD += embed(self.types, name="embed_types")(layout.get("types", jnp.zeros_like(tokens_BxT)))
        if self.embed_norm:
            x_BxTxD = self._make_norm()(name="embed_norm")(x_BxTxD)
        x_BxTxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxTxD)
        x_BxTxD, added = self._blocks(mark(x_BxTxD, "batch", "length", "embed"), layout, train, kernel, cache)
        if self.norm_place == "pre":
            x_BxTxD = self._make_norm()(name="norm")(x_BxTxD)
        outputs = self._outputs(x_BxTxD, table_VxD, layout, train)
        if cache is None:
            return outputs
        return outputs, importlib.import_module(KERNELS).store(cache, added, layout["positions"])

    def _outputs(self, x_BxTxD: jax.Array, table_VxD: jax.Array, layout: Layout, train: bool) -> Any:
        """What the model returns for the residual stream at its end."""
        kernel_DxV, bias_V = Head(self.vocab_size, self.tied_head, self.head_bias, name="head")(self.width)
        kernel_DxV = (table_VxD.T if kernel_DxV is None else kernel_DxV).astype(self.dtype)
        if self.split_head:
            if bias_V is not None:
                ones_BxTx1 = jnp.ones_like(x_BxTxD[..., :1])
                x_BxTxD = jnp.concatenate([x_BxTxD, ones_BxTx1], axis=-1)
                kernel_DxV = jnp.concatenate([kernel_DxV, bias_V[None].astype(self.dtype)])
            return {"features": x_BxTxD, "kernel": mark(kernel_DxV, "embed", "vocab")}
        logits_BxTxV = mark(x_BxTxD @ kernel_DxV, "batch", "length", "vocab").astype(jnp.float32)
        if bias_V is not None:
            logits_BxTxV += bias_V[None, None]
        if self.head_softcap:
            logits_BxTxV = self.head_softcap * jnp.tanh(logits_BxTxV / self.head_softcap)
        return logits_BxTxV

    def _read(self, inputs: Any, cache: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The tokens, and what else is known of them."""
        layout = dict(inputs) if isinstance(inputs, Mapping) else {"tokens": inputs}
        known = set(layout) - {"tokens", "prefix"} - ({"types"} if self.types else set())
        expected = {"positions"} if cache is not None else _SEGMENTS
        if "tokens" not in layout or ((known or cache is not None) and known != expected):
            types = ", types" if self.types else ""
            raise ValueError(
                f"inputs have the keys {sorted(layout)}: expected tokens, {', '.join(sorted(expected, reverse=True))}"
                + (", as a cache asks for." if cache is not None else f", and perhaps prefix{types}.")
            )
        if cache is not None and ("prefix" in layout or not self.causal):
            raise ValueError("a cache holds what later tokens see: it needs causal=True, and inputs without a prefix.")
        tokens = layout.pop("tokens")
        whole = jnp.issubdtype(tokens.dtype, jnp.integer)
        if not whole or tokens.ndim != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"inputs of shape {tokens.shape} and {tokens.dtype}: expected integers, (batch, length) with length at "
                f"most max_length={self.max_length}. Cut the sequences, or raise max_length."
            )
        if cache is not None:
            layout["places"] = cache["places"]
        return tokens, layout

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
        layout = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
        return (self._pick(layout["tokens"].shape, layout, mesh)[1],)

    def _pick(
        self, shape: tuple[int, ...], layout: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None
    ) -> tuple[str, str]:
        """The kernel for tokens of `shape` (B, T), and a line for a log; on the mesh that is set if none is given."""
        attention = importlib.import_module(KERNELS)
        sizes, kv_heads = (*shape, self.heads, self._head_size), self.kv_heads or self.heads
        case = attention.Case(
            sizes, kv_heads, self.dtype, "segments" in layout, *attention.place(mesh),
            causal=self.causal, window=max(self.windows), softcap=self.softcap, prefix="prefix" in layout,
        )  # fmt: skip
        picked: tuple[str, str] = attention.pick(self.attention, case)
        return picked

    def _blocks(
        self, x_BxTxD: jax.Array, layout: Layout, train: bool, kernel: str, cache: Any
    ) -> tuple[jax.Array, Any]:
        """All blocks: the residual stream after them, and what they add to a cache."""
        # What ends a residual branch starts smaller, so that the sum of all branches does not grow with depth (GPT-2).
        out_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
        common: dict[str, Any] = {"use_bias": self.use_bias, "out_init": out_init, "dtype": self.dtype}
        attention = functools.partial(
            Attention,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_size=self._head_size,
            kernel=kernel,
            qkv_bias=self.use_bias if self.qkv_bias is None else self.qkv_bias,
            rope={"base": self.rope_base, "scaling": self.rope_scaling} if self.positions == "rope" else None,
            make_norm=self._make_norm("rms") if self.qk_norm else None,
            causal=self.causal,
            windows=tuple(sorted(set(self.windows))),
            softcap=self.softcap,
            scale=self.query_scale,
            **common,
        )
        gated = self.mlp in ("swiglu", "geglu")
        width = self.mlp_width or (-(-8 * self.width // 192) * 64 if gated else 4 * self.width)
        mlp = functools.partial(MLP, width=width, kind=self.mlp, **common)
        rate = self.dropout if train else 0.0

        def block(kind: Callable[..., Any], name: str) -> Any:
            return kind(attention, mlp, self._make_norm(), rate, self.norm_place, self.post_norms, name=name)

        return run_blocks(
            block, x_BxTxD, layout, self.windows, None if cache is None else cache["blocks"],
            layers=self.layers, stacked=self.stacked, remat=self.remat, unroll=self.unroll,
        )  # fmt: skip

    def _make_norm(self, kind: str | None = None) -> Callable[..., Any]:
        kind = kind or self.norm
        if kind == "layer":
            return functools.partial(nn.LayerNorm, epsilon=self.norm_eps, use_bias=self.use_bias, dtype=self.dtype)
        return functools.partial(
            UnitNorm if self.norm_plus_one else nn.RMSNorm, epsilon=self.norm_eps, dtype=self.dtype
        )


class Head(nn.Module):
    """The kernel of the last map, which is a product and nothing else, and perhaps a bias.

    Attributes:
      vocab_size: V.
      tied: there is no kernel: the embedding is it.
      use_bias: whether there is a bias.
    """

    vocab_size: int
    tied: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array | None, jax.Array | None]:
        """(width, vocab_size) and (vocab_size,), float32; None for what there is not."""
        kernel = None if self.tied else self.param("kernel", INIT, (width, self.vocab_size))
        return kernel, self.param("bias", nn.initializers.zeros, (self.vocab_size,)) if self.use_bias else None


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, or what has their paths, for `stacked=False`: "blocks" (layers, ...) becomes "blocks_0", ..."""
    blocks = params["blocks"]
    layers = jax.tree.leaves(blocks)[0].shape[0]
    each = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(layers)}
    return {**{name: x for name, x in params.items() if name != "blocks"}, **each}


def stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `unstack` was given, of what it returned."""
    layers = sum(name.startswith("blocks_") for name in params)
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"blocks_{i}"] for i in range(layers)))
    return {**{name: x for name, x in params.items() if not name.startswith("blocks_")}, "blocks": blocks}
