"""Ring attention on one device of a ring, forward and backward, by hand: `attention.ring` puts it on a mesh.

Reverse-mode differentiation of the loop would keep the sums of every turn. Here the backward pass goes round again.
Letters as in `attention`, where G = N / K queries' heads share a key's; S is the number of keys in a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 512  # keys that one turn of the inner loop takes
_MASKED = -1e30  # finite, so that what a row has of masked keys alone is finite too, and is wiped out later


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def travelling(
    axis: str, parts: int, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """Causal attention of this device's queries to the keys of all devices, whose keys and values come by.

    Args:
      axis: of the mesh, along which places are split, in order.
      parts: its size. With 1 nothing travels, and there need not be a mesh.
      q: (B, T, N, H), this device's part.
      k: (B, T, K, H).
      v: as `k`.
      segments: (B, T) int, or None.

    Returns:
      (B, T, N, H) in the dtype of `q`; scores and sums are float32.
    """
    return _forward(axis, parts, q, k, v, segments)[0]


def _forward(axis: str, parts: int, q: Any, k: Any, v: Any, segments: Any) -> tuple[jax.Array, Any]:
    """On one device of `parts`. Kept for the backward pass: arguments, result, and each row's log of the sum."""
    B, T, N, H = q.shape
    K = k.shape[2]
    me, block = _me(axis, parts), _block(T)
    q_BxTxKxGxH = q.reshape(B, T, K, N // K, H)

    def absorb(state: Any, part: Any, turn: Any) -> Any:
        k, v, ids = part

        def visible(i: Any, state: Any) -> Any:
            out, top, total = state
            k_i, v_i, ids_i = _cut((k, v, ids), i, block)
            scores = _scores(q_BxTxKxGxH, k_i, segments, ids_i, me, (me - turn) % parts, i)
            new = jnp.maximum(top, scores.max(-1))
            kept, shares = jnp.exp(top - new), jnp.exp(scores - new[..., None])
            seen = jnp.einsum("bkgts,bskh->bkgth", shares.astype(v.dtype), v_i, preferred_element_type=jnp.float32)
            return out * kept[..., None] + seen, new, total * kept + shares.sum(-1)

        return _visit(visible, state, me, (me - turn) % parts, T, block)

    def body(carry: Any, turn: Any) -> tuple[Any, None]:
        state, part = carry
        return (absorb(state, part, turn), _pass_on(part, axis, parts)), None

    rows = (B, K, N // K, T)
    state = jnp.zeros((*rows, H), jnp.float32), jnp.full(rows, _MASKED), jnp.zeros(rows, jnp.float32)
    # The first turn is with the device's own keys, where each row sees itself: from then on its maximum is a real one.
    (state, part), _ = jax.lax.scan(body, (state, (k, v, segments)), jnp.arange(parts - 1))
    out, top, total = absorb(state, part, parts - 1)
    out = (out / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, segments, out, top + jnp.log(total))


def _backward(axis: str, parts: int, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, out, log_total = kept
    B, T, N, H = q.shape
    K = k.shape[2]
    me, block = _me(axis, parts), _block(T)
    q_BxTxKxGxH, d_BxTxKxGxH = (x.reshape(B, T, K, N // K, H) for x in (q, d_out))
    # sum_s p_s dp_s of a row, without another pass over the keys (Dao et al. 2022, arXiv:2205.14135, appendix B.2)
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).reshape(B, T, K, N // K)
    inner = inner.transpose(0, 2, 3, 1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(carry: Any, turn: Any) -> tuple[Any, None]:
        dq, part, grads = carry
        k, v, ids = part

        def visible(i: Any, state: Any) -> Any:
            dq, dk, dv = state
            k_i, v_i, ids_i = _cut((k, v, ids), i, block)
            with jax.named_scope("rematted_computation"):  # JAX's own name for what is computed twice: see perf.count
                scores = _scores(q_BxTxKxGxH, k_i, segments, ids_i, me, (me - turn) % parts, i)
            shares = jnp.exp(scores - log_total[..., None])
            d_shares = product("btkgh,bskh->bkgts", d_BxTxKxGxH, v_i)
            d_scores = (shares * (d_shares - inner[..., None]) * H**-0.5).astype(q.dtype)
            dq += product("bkgts,bskh->btkgh", d_scores, k_i)
            dk_i = product("bkgts,btkgh->bskh", d_scores, q_BxTxKxGxH)
            dv_i = product("bkgts,btkgh->bskh", shares.astype(v.dtype), d_BxTxKxGxH)
            return dq, *(_add(x, x_i, i * block) for x, x_i in ((dk, dk_i), (dv, dv_i)))

        dq, *grads = _visit(visible, (dq, *grads), me, (me - turn) % parts, T, block)
        return (dq, *_pass_on((part, tuple(grads)), axis, parts)), None

    zeros = jnp.zeros(k.shape, jnp.float32)
    start = (jnp.zeros(q_BxTxKxGxH.shape, jnp.float32), (k, v, segments), (zeros, zeros))
    # As many turns as there are devices: the gradients of a device's keys end where they belong.
    (dq, _, (dk, dv)), _ = jax.lax.scan(body, start, jnp.arange(parts))
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


travelling.defvjp(_forward, _backward)


def _scores(q_BxTxKxGxH: Any, k: Any, own: Any, ids: Any, me: Any, source: Any, i: Any) -> jax.Array:
    """(B, K, G, T, S) float32 of the queries of device `me` with the `i`th block of S keys of device `source`."""
    T, S = q_BxTxKxGxH.shape[1], k.shape[1]
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k, preferred_element_type=jnp.float32)
    ahead = (me * T + jnp.arange(T))[:, None] - (source * T + i * S + jnp.arange(S))[None]
    mask = (ahead >= 0)[None]
    if own is not None:
        mask = mask & (own[:, :, None] == ids[:, None, :])
    return jnp.where(mask[:, None, None], scores * q_BxTxKxGxH.shape[-1] ** -0.5, _MASKED)


def _visit(visible: Any, state: Any, me: Any, source: Any, length: int, block: int) -> Any:
    """`visible(i, state)` for the blocks of keys of device `source` that queries of device `me` see something of."""
    return jax.lax.fori_loop(0, jnp.where(source <= me, length // block, 0), visible, state)


def _cut(part: Any, i: Any, block: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1), part)


def _add(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis=1)


def _me(axis: str, parts: int) -> Any:
    return jax.lax.axis_index(axis) if parts > 1 else 0


def _block(length: int) -> int:
    return BLOCK if length % BLOCK == 0 else length


def _pass_on(part: Any, axis: str, parts: int) -> Any:
    """What the device before sent, while this one's goes to the next."""
    if parts == 1:
        return part
    return jax.lax.ppermute(part, axis, [(i, (i + 1) % parts) for i in range(parts)])
