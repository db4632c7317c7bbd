"""The programs of generation: `read` takes a piece of prompts into the cache, `write` makes new tokens.

Both are pure, and the same for every request: a row of the batch computes nothing from the other rows, and a request
that ends or begins changes no shape. What a row is at is a few numbers, `Rows`; a row with nothing to do feeds padding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels.inference import cache as ring
from flaxmodels.inference import sampling, weights

# (params, extra, cache, tokens (B, T), positions (B, T), last (B,)) -> (logits (B, V) float32 of the tokens at `last`,
# cache). Positions of padding are `cache.EMPTY`.
Logits = Callable[..., tuple[jax.Array, Any]]
# {"token": the newest, "position": where it is to lie in the context, "place": in its text, "request": its number,
# "left": how many more may be made before someone looks}, each (B,) int32.
Rows = dict[str, jax.Array]
NOTHING = -1  # instead of a token: the row had nothing to do
BROKEN = -2  # the model gave NaN


def logits_of(model: Any, vocab_size: int) -> Logits:
    """How a transformer continues.

    Args:
      model: a `Transformer`.
      vocab_size: tokens from here on are never chosen: a vocabulary may be padded.
    """
    split = model.clone(split_head=True, head_softcap=0.0)  # capped below

    def logits(
        params: Any, extra: Any, cache: Any, tokens: jax.Array, positions: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, Any]:
        inputs = {"tokens": tokens, "positions": positions}
        with weights.reading():
            head, cache = split.apply({"params": params, **extra}, inputs, cache=cache)
        # The head is most of what one token costs, so it is not computed for the others.
        features = jnp.take_along_axis(head["features"], last[:, None, None], axis=1)[:, 0]
        found = weights.logits(features, params, head["kernel"])
        if model.head_softcap:
            found = model.head_softcap * jnp.tanh(found / model.head_softcap)
        known = jnp.arange(found.shape[-1]) < vocab_size
        return jnp.where(known[None], found, -jnp.inf), cache

    return logits


def read(
    params: Any, extra: Any, cache: Any, found: jax.Array, piece: Mapping[str, Any], *, logits: Logits
) -> tuple[Any, jax.Array]:
    """Read a piece of some rows' texts.

    Args:
      params: of the model.
      extra: its other collections.
      cache: of `cache.empty`.
      found: (B, V) float32, of the pieces before.
      piece: {"tokens": (B, P) int32, "positions": (B, P) int32, `EMPTY` for padding and rows that read nothing; "last":
        (B,) int32, where in the piece a row's last token is, -1 where it has none}.
      logits: of `logits_of`.

    Returns:
      (cache, `found` with the logits after the last token of each row in this piece).
    """
    new, cache = logits(params, extra, cache, piece["tokens"], piece["positions"], piece["last"].clip(0))
    return cache, jnp.where(piece["last"][:, None] >= 0, new, found)


def begin(
    rows: Rows, seen: Any, found: jax.Array, new: Mapping[str, Any], numbers: sampling.Numbers
) -> tuple[Rows, Any, jax.Array]:
    """The first new token of rows whose text was read.

    Args:
      rows: of all; those that were not read stay as they are.
      seen: (B, V) bool, the tokens of each row's text; None where nothing asks for it.
      found: of `read`.
      new: {"read": (B,) bool, the rows that were; "rows": what they become, with the place and position of the new
        token; "seen": of these}.
      numbers: of `sampling.numbers`.

    Returns:
      (rows, seen, (B,) int32 new tokens, or `NOTHING` or `BROKEN`).
    """
    if seen is not None:
        seen = jnp.where(new["read"][:, None], new["seen"], seen)
    rows = {name: jnp.where(new["read"], new["rows"][name], old) for name, old in rows.items()}
    return _chosen(found, rows, seen, new["read"], numbers)


def write(
    params: Any, extra: Any, cache: Any, rows: Rows, seen: Any, going: jax.Array, count: jax.Array,
    numbers: sampling.Numbers, *, logits: Logits, ends: tuple[int, ...], most: int,
) -> tuple[Any, Rows, Any, jax.Array]:  # fmt: skip
    """Make new tokens in all rows until none has anything left to do, but at most `count`.

    Args:
      params: of the model.
      extra: its other collections.
      cache: of `read`.
      rows: of `begin`.
      seen: of `begin`.
      going: (B,) bool; rows where it is false have ended.
      count: int32 scalar, up to `most`.
      numbers: of `sampling.numbers`.
      logits: of `logits_of`.
      ends: ids after which a row has ended.
      most: tokens that the result has room for.

    Returns:
      (cache, rows, seen, (B, most) int32 new tokens in their order, or `NOTHING` or `BROKEN`).
    """
    rows = {**rows, "left": jnp.where(going, rows["left"], 0)}

    def more(carry: Any) -> jax.Array:
        i, _, rows, _, _ = carry
        return (i < count) & jnp.any(rows["left"] > 0)

    def one(carry: Any) -> Any:
        i, cache, rows, seen, made = carry
        active = rows["left"] > 0
        positions = jnp.where(active, rows["position"], ring.EMPTY)
        zeros = jnp.zeros_like(positions)
        found, cache = logits(params, extra, cache, rows["token"][:, None], positions[:, None], zeros)
        step = active.astype(jnp.int32)
        moved = {"position": rows["position"] + step, "place": rows["place"] + step, "left": rows["left"] - step}
        rows, seen, new = _chosen(found, {**rows, **moved}, seen, active, numbers)
        rows["left"] = jnp.where(jnp.isin(new, ending), 0, rows["left"])
        return i + 1, cache, rows, seen, made.at[:, i].set(new)

    ending = jnp.array((*ends, BROKEN), jnp.int32)
    made = jnp.full((rows["token"].shape[0], most), NOTHING, jnp.int32)
    _, cache, rows, seen, made = jax.lax.while_loop(more, one, (jnp.int32(0), cache, rows, seen, made))
    return cache, rows, seen, made


def _chosen(
    logits: jax.Array, rows: Rows, seen: Any, where: jax.Array, numbers: sampling.Numbers
) -> tuple[Rows, Any, jax.Array]:
    """The new tokens of some rows: (rows, seen, tokens)."""
    new = sampling.pick(logits, numbers, rows["request"], rows["place"], seen)
    new = jnp.where(where, jnp.where(jnp.isnan(jnp.max(logits, -1)), BROKEN, new), NOTHING)
    kept = jnp.where(new >= 0, new, rows["token"])
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), kept].max(where)
    return {**rows, "token": kept}, seen, new
