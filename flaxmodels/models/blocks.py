"""The block of every transformer here: attention and an MLP, each with a norm, added to the residual stream.

Letters in names of arrays: B batch, T length, D width, N query heads, K key and value heads, H size of a head,
F width of the MLP, V vocabulary, S slots of a cache.

Read `Block` first; `run_blocks` is how a model has several. `mark` says what an axis is; it does nothing unless a mesh
is set.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

KERNELS = "flaxmodels.attention"  # loaded when it is needed
INIT = nn.initializers.normal(0.02)
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
# What else there is to know of the tokens of a row, each (B, T) of an integer dtype; what is missing is one document,
# from its start. "segments" number documents, "positions" count in each. "prefix" is not 0 at tokens that all of their
# segment see, also what is before them. With a cache there are "positions", and "places" (B, S), those of its slots.
Layout = Mapping[str, jax.Array]
# Keys and values of one layer: {"key": (B, K, S, H), "value": the same}.
Slots = Mapping[str, jax.Array]


def run_blocks(
    block: Callable[..., Any],
    x_BxTxD: jax.Array,
    layout: Layout,
    windows: tuple[int, ...],
    cache: Any,
    *,
    layers: int,
    stacked: bool,
    remat: str,
    unroll: int,
) -> tuple[jax.Array, Any]:
    """Call `layers` blocks, one after the other. To be used inside of a compact method, whose module gets them.

    Args:
      block: called with a class, `Block` or what wraps it, and a name, it returns the module.
      x_BxTxD: the residual stream.
      layout: what is known of the tokens.
      windows: of attention, cycled over the layers.
      cache: `Slots` of all layers, with a leading axis if stacked, else a tuple; or None.
      layers: how many.
      stacked: one module "blocks" with parameters stacked on a leading axis, in a loop that is compiled once; else
        modules "blocks_0", "blocks_1", ...
      remat: what the backward pass finds saved; see `Transformer`.
      unroll: blocks that one turn of the loop computes.

    Returns:
      (x_BxTxD, what each layer adds to the cache, {"key": (B, T, K, H), "value": the same}, laid out as `cache` is).
    """
    kind = Block
    if remat != "none":
        # Where the loop has one turn there is none after compilation, and equal work would be merged.
        kind = nn.remat(Block, policy=_POLICIES[remat], prevent_cse=not stacked or unroll >= layers)
    several = sorted(set(windows))
    if not stacked:
        added = []
        for i in range(layers):
            slots = None if cache is None else cache[i]
            which = several.index(windows[i % len(windows)])
            x_BxTxD, new = block(kind, name=f"blocks_{i}")(x_BxTxD, layout, which, slots)
            added.append(new)
        return x_BxTxD, tuple(added)
    scan = nn.scan(
        kind,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0, 0),
        length=layers,
        unroll=unroll,
    )
    which_L = None
    if len(several) > 1:
        which_L = jnp.asarray([several.index(windows[i % len(windows)]) for i in range(layers)], jnp.int32)
    found: tuple[jax.Array, Any] = block(scan, name="blocks")(x_BxTxD, layout, which_L, cache)
    return found


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout at the end of each branch.

    Attributes:
      make_attention, make_mlp, make_norm: called with a name, they return the modules.
      dropout: the rate; 0 is off.
      norm_place: "pre" as above; "post" norms the sums instead, norm(x + attention(x)).
      post_norms: of the end of each branch, too, x + norm(attention(norm(x))).
    """

    make_attention: Callable[..., Any]
    make_mlp: Callable[..., Any]
    make_norm: Callable[..., Any]
    dropout: float
    norm_place: str = "pre"
    post_norms: bool = False

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, layout: Layout, which: Any = None, slots: Slots | None = None
    ) -> tuple[jax.Array, Any]:
        """Map (B, T, D) to the same shape and dtype; and what this layer adds to a cache, None without `slots`."""
        dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0)
        added = None
        for branch in ("attention", "mlp"):
            norm = functools.partial(self.make_norm, name=f"norm_{branch}")
            y_BxTxD = norm()(x_BxTxD) if self.norm_place == "pre" else x_BxTxD
            if branch == "attention":
                y_BxTxD, added = self.make_attention(name=branch)(y_BxTxD, layout, which, slots)
            else:
                y_BxTxD = self.make_mlp(name=branch)(y_BxTxD)
            if self.post_norms:
                y_BxTxD = self.make_norm(name=f"norm_{branch}_out")(y_BxTxD)
            x_BxTxD += dropout(y_BxTxD)
            if self.norm_place == "post":
                x_BxTxD = norm()(x_BxTxD)
            x_BxTxD = mark(x_BxTxD, "batch", "length", "embed")
        return x_BxTxD, added


class Attention(nn.Module):
    """Attention; query heads share key and value heads in groups of `heads / kv_heads`, in order.

    Attributes: as in `Transformer`, but
      rope: arguments of `rotate`, {"base": ..., "scaling": ...}; None for no rotation.
      kernel: one that `attention.pick` picked.
      windows: the different ones.
      make_norm: of each query and key before rotation; None for none.
      out_init: for the last projection.
    """

    heads: int
    kv_heads: int
    head_size: int
    kernel: str
    use_bias: bool
    qkv_bias: bool
    out_init: Callable[..., Any]
    dtype: str
    rope: Mapping[str, Any] | None = None
    make_norm: Callable[..., Any] | None = None
    causal: bool = True
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    scale: float | None = None

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, layout: Layout, which: Any = None, slots: Slots | None = None
    ) -> tuple[jax.Array, Any]:
        """Map (B, T, D) to the same shape, in `dtype`; and, with `slots`, keys and values to be added to them.

        `which` of the windows is a layer's own: an index, traced where layers are stacked; None for the first.
        """
        D = x_BxTxD.shape[-1]
        dense = functools.partial(nn.DenseGeneral, dtype=self.dtype)
        project = functools.partial(dense, use_bias=self.qkv_bias, kernel_init=INIT)
        q_BxTxNxH = project((self.heads, self.head_size), name="query")(x_BxTxD)
        k_BxTxKxH = project((self.kv_heads, self.head_size), name="key")(x_BxTxD)
        v_BxTxKxH = project((self.kv_heads, self.head_size), name="value")(x_BxTxD)
        k_BxTxKxH, v_BxTxKxH = (mark(x, "batch", "length", "kv_heads", None) for x in (k_BxTxKxH, v_BxTxKxH))
        if self.make_norm is not None:
            q_BxTxNxH = self.make_norm(name="query_norm")(q_BxTxNxH)
            k_BxTxKxH = self.make_norm(name="key_norm")(k_BxTxKxH)
        if self.rope is not None:
            places = layout.get("positions")
            q_BxTxNxH, k_BxTxKxH = (rotate(x, positions_BxT=places, **self.rope) for x in (q_BxTxNxH, k_BxTxKxH))
        q_BxTxNxH = mark(q_BxTxNxH, "batch", "length", "heads", None)
        if self.kernel != "ring":  # where a mesh splits the length, each query's device gathers the keys of all of it
            k_BxTxKxH, v_BxTxKxH = (mark(x, "batch", "kv_length", "kv_heads", None) for x in (k_BxTxKxH, v_BxTxKxH))
        branches = [self._kernel(window, layout, slots) for window in self.windows]
        arrays = (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH)
        if isinstance(which, jax.Array):
            y_BxTxNxH = jax.lax.switch(which, branches, *arrays)
        else:
            y_BxTxNxH = branches[which or 0](*arrays)
        y_BxTxNxH = mark(y_BxTxNxH, "batch", "length", "heads", None)
        out = dense(D, axis=(-2, -1), use_bias=self.use_bias, kernel_init=self.out_init, name="out")
        added = None if slots is None else {"key": k_BxTxKxH, "value": v_BxTxKxH}
        return out(y_BxTxNxH), added

    def _kernel(self, window: int, layout: Layout, slots: Slots | None) -> Callable[..., Any]:
        kernels = importlib.import_module(KERNELS)
        form = {"window": window, "softcap": self.softcap, "scale": self.scale}
        if slots is not None:
            places = {"positions": layout["positions"], "places": layout["places"]}
            return functools.partial(kernels.cached, slots=slots, **places, **form)
        seen = {name: layout.get(name) for name in ("segments", "prefix")}
        return functools.partial(kernels.run, self.kernel, causal=self.causal, **seen, **form)


class MLP(nn.Module):
    """down(gelu(up(x))), or, gated, down(f(gate(x)) * up(x)), where f is silu or gelu.

    Attributes: `width` F; `kind` is `mlp` of `Transformer`; the others as in `Attention`.
    """

    width: int
    kind: str
    use_bias: bool
    out_init: Callable[..., Any]
    dtype: str

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Map (B, T, D) to the same shape, in `dtype`."""
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        h_BxTxF = mark(dense(self.width, kernel_init=INIT, name="up")(x_BxTxD), "batch", "length", "mlp")
        if self.kind in ("swiglu", "geglu"):
            g_BxTxF = dense(self.width, kernel_init=INIT, name="gate")(x_BxTxD)
            gate = nn.silu if self.kind == "swiglu" else nn.gelu
            h_BxTxF *= gate(mark(g_BxTxF, "batch", "length", "mlp"))
        else:
            h_BxTxF = nn.gelu(h_BxTxF, approximate=self.kind == "gelu")
        return dense(x_BxTxD.shape[-1], kernel_init=self.out_init, name="down")(h_BxTxF)


class UnitNorm(nn.Module):
    """RMS norm by 1 + scale, as Gemma has it: the parameter starts at 0, and weight decay pulls to a plain norm.

    Attributes:
      epsilon: added to the mean of squares.
      dtype: of the result; all before is float32.
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., D) to the same shape, in `dtype`."""
        scale_D = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(1 + scale_D, range(x.ndim - 1))).astype(self.dtype)


def rotate(
    x_BxTxNxH: jax.Array,
    base: float,
    positions_BxT: jax.Array | None = None,
    scaling: tuple[float, float, float, float] | None = None,
) -> jax.Array:
    """Rotary positions: turn the pair (i, i + H/2) at place t by the angle t * base^(-2i/H); same shape and dtype.

    Places are counted from 0, or those of `positions_BxT`. `scaling` is `rope_scaling` of `Transformer`.
    """
    T, H = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3]
    # In float32, since bfloat16 can't count past 256.
    frequency_H = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling is not None:
        factor, low, high, length = scaling
        turns_H = length * frequency_H / (2 * math.pi)  # in the length of training: what turns seldom is slowed down
        share_H = jnp.clip((turns_H - low) / (high - low), 0, 1)
        frequency_H *= share_H + (1 - share_H) / factor
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
