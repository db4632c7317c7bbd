"""Attention in plain XLA under any mask: soft caps, prefixes, and a cache of keys and values.

Letters as in `attention`; S is the number of keys, or of slots of a cache, and G = N / K.

A cache is {"places": (B, S) int32, "blocks": {"key": (L, B, K, S, H), "value": the same}}, or, where layers are not
stacked, "blocks" is a tuple of {"key": (B, K, S, H), "value"} over layers: a head's slots lie together. `places` are
the positions of the tokens whose keys the slots hold, -1 for none; the token of position p belongs to slot p % S.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Finite, so that a row without a visible key is finite too: it averages all values, and nothing asks for it.
_HIDDEN = -1e30


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float | None = None, softcap: float = 0.0
) -> jax.Array:
    """softmax(cap(scale q k)) v, where cap(x) = softcap tanh(x / softcap) (Gemma 2, arXiv:2408.00118); 0 for none.

    Args:
      q: (B, T, N, H).
      k: (B, S, K, H) of the same dtype.
      v: as `k`.
      seen: (B or 1, T, S) bool: which keys a query sees.
      scale: None: H**-0.5.
      softcap: of scores.

    Returns:
      (B, T, N, H) in the dtype of `v`; scores and softmax are float32.
    """
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    shares = jax.nn.softmax(_scores(q, k, seen, scale, softcap), axis=-1)
    return _mean(shares, v, q.shape)


def visible(
    length: int, *, causal: bool = True, window: int = 0, segments: Any = None, prefix: Any = None
) -> jax.Array:
    """(B or 1, T, T) bool: whether the query at t sees the key at s, both among T = `length` places of a row.

    Args:
      length: T.
      causal: only keys up to itself, and those of a prefix.
      window: only the last so many of them, itself among them; 0 for all.
      segments: (B, T) int: only keys of its own; or None.
      prefix: (B, T) int or bool: keys that are seen from places before them, too; or None.
    """
    ahead = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    seen = (ahead >= 0 if causal else ahead == ahead)[None]
    if prefix is not None:
        seen = seen | (prefix != 0)[:, None, :]
    if window:
        seen = seen & (ahead < window)[None]
    return seen if segments is None else seen & (segments[:, :, None] == segments[:, None, :])


def cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    slots: Mapping[str, jax.Array],
    places: jax.Array,
    positions: jax.Array,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Causal attention to the keys of a cache and to those of this call, which are not in it yet.

    So no key is lost that an earlier query of this call still sees, when a later one's takes its slot.

    Args:
      q: (B, T, N, H).
      k: (B, T, K, H), of this call.
      v: as `k`.
      slots: {"key": (B, K, S, H), "value": the same}, of the dtype of `k` or another, in which they are kept.
      places: (B, S) int32, of the cache. A slot whose place is not before this call's first position is not seen: its
        token comes anew.
      positions: (B, T) int32, of this call; -1 is padding.
      window: a query sees only the last so many positions, its own among them; 0 for all.
      scale: as in `attend`.
      softcap: as in `attend`.

    Returns:
      (B, T, N, H) in the dtype of `q`.
    """
    k, v = (x.swapaxes(1, 2) for x in (k, v))

    def seen(kept: jax.Array) -> jax.Array:
        ahead = positions[:, :, None] - kept[:, None, :]
        within = (kept >= 0)[:, None, :] & (ahead >= 0)
        return within & (ahead < window) if window else within

    if q.shape[1] == 1:
        # No key is lost that this only query sees. `store` makes the same arrays, and the compiler makes them once, in
        # the memory of the cache: it would copy all of it if the old one were read.
        slot = _slot(positions, places.shape[1])
        kept_k, kept_v = (_put(slots[name], slot, x).astype(q.dtype) for name, x in (("key", k), ("value", v)))
        shares = jax.nn.softmax(_scores(q, kept_k, seen(_put(places, slot, positions)), scale, softcap), axis=-1)
        return _mean(shares, kept_v, q.shape)
    S, most = places.shape[1], jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(positions >= 0, positions, most), axis=1, keepdims=True)
    old = jnp.where(places < first, places, -1)
    kept_k, kept_v = (slots[name].astype(q.dtype) for name in ("key", "value"))
    scores = [_scores(q, a, seen(b), scale, softcap) for a, b in ((kept_k, old), (k, positions))]
    shares = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    return _mean(shares[..., :S], kept_v, q.shape) + _mean(shares[..., S:], v, q.shape)


def store(cache: Mapping[str, Any], added: Any, positions: jax.Array) -> dict[str, Any]:
    """A cache with the keys and values of a call in their slots.

    Args:
      cache: see above.
      added: as `cache["blocks"]`, with T tokens of the call instead of S slots.
      positions: (B, T) int32 of these; -1 is padding, and stored nowhere. Of more than S only the last S are kept.
    """
    slot = _slot(positions, cache["places"].shape[1])
    blocks = jax.tree.map(lambda kept, new: _put(kept, slot, new.swapaxes(-3, -2)), cache["blocks"], added)
    return {**cache, "places": _put(cache["places"], slot, positions), "blocks": blocks}


def _slot(positions: jax.Array, S: int) -> jax.Array:
    """(B, T), the slot that each token belongs to; S for those that are not stored."""
    last = jnp.max(positions, axis=1, keepdims=True)
    return jnp.where((positions >= 0) & (positions > last - S), positions % S, S)


def _put(kept: jax.Array, slot_BxT: jax.Array, new: jax.Array) -> jax.Array:
    """`kept` (..., B, K, S, H) or (B, S) with `new` (..., B, K, T, H) or (B, T) in some slots."""

    def one(kept: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
        at = (slice(None),) * (kept.ndim - 2) + (slot,)
        return kept.at[at].set(new.astype(kept.dtype), mode="drop", unique_indices=False)

    axis = max(kept.ndim - 4, 0)  # examples one by one, so that a mesh keeps each where it is
    filled: jax.Array = jax.vmap(one, in_axes=(axis, 0, axis), out_axes=axis)(kept, slot_BxT, new)
    return filled


def _scores(q: jax.Array, k: jax.Array, seen: jax.Array, scale: float | None, softcap: float) -> jax.Array:
    """(B, K, G, T, S) float32."""
    B, T, N, H = q.shape
    K = k.shape[1]
    q_BxTxKxGxH = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bksh->bkgts", q_BxTxKxGxH, k, preferred_element_type=jnp.float32)
    scores *= H**-0.5 if scale is None else scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen[:, None, None], scores, _HIDDEN)


def _mean(shares: jax.Array, v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B, T, N, H) in the dtype of `v`."""
    mean: jax.Array = jnp.einsum("bkgts,bksh->btkgh", shares.astype(v.dtype), v).reshape(shape)
    return mean
