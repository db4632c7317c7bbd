"""Beam search: the likeliest continuation that a search with a few hypotheses finds; one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels.inference import cache as ring
from flaxmodels.inference.decoding import NOTHING, Logits


def search(
    params: Any, extra: Any, cache: Any, found: jax.Array, position: jax.Array, count: jax.Array, penalty: jax.Array,
    *, logits: Logits, beams: int, ends: tuple[int, ...], most: int,
) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
    """The best continuation of each of G texts; pure and traceable.

    A hypothesis that ends, by one of `ends` or with `count` tokens, has the score log p / length^penalty, where length
    counts its new tokens (https://arxiv.org/abs/1609.08144, with the plain power of today's libraries). Of the 2 K
    likeliest continuations of the K hypotheses of a text, the first K may end, and the first K that do not live on. A
    text is done when it has K hypotheses that ended, and the likeliest that lives could not beat them as it is.

    Args:
      params: of the model.
      extra: its other collections.
      cache: B rows; those of a text lie together, from the first row on, and all hold its prompt.
      found: (B, V) float32, logits of the first new tokens.
      position: (B,) int32, of the first new token.
      count: int32 scalar, new tokens of a text, up to `most`.
      penalty: float32 scalar.
      logits: of `decoding.logits_of`.
      beams: K.
      ends: ids that end a text.
      most: size of the result.

    Returns:
      (cache, (G, most) int32 tokens with what ended them, then `NOTHING`; (G,) float32 scores, -inf for a text whose
      logits are NaN).
    """
    K, (B, V) = beams, found.shape
    G = B // K
    rest = B - G * K  # rows of no text
    first = jnp.arange(G)[:, None] * K
    ending = jnp.array((*ends, NOTHING), jnp.int32)

    def body(carry: Any) -> Any:
        i, cache, found, live, made, scores, ended, over = carry
        logs = jax.nn.log_softmax(found[: G * K]).reshape(G, K, V) + live[:, :, None]
        best, where = jax.lax.top_k(logs.reshape(G, K * V), 2 * K)
        parents, tokens = where // V, (where % V).astype(jnp.int32)
        texts = jnp.take_along_axis(made, parents[:, :, None], axis=1).at[:, :, i].set(tokens)
        ends_here = jnp.isin(tokens, ending)
        closes = (ends_here | (i + 1 == count)) & (jnp.arange(2 * K) < K)[None] & ~over[:, None]
        normed = jnp.where(closes, best / (i + 1.0) ** penalty, -jnp.inf)
        scores, kept = jax.lax.top_k(jnp.concatenate([scores, normed], 1), K)
        ended = jnp.take_along_axis(jnp.concatenate([ended, texts], 1), kept[:, :, None], axis=1)
        live, kept = jax.lax.top_k(jnp.where(ends_here, -jnp.inf, best), K)
        made = jnp.take_along_axis(texts, kept[:, :, None], axis=1)
        parents, tokens = (jnp.take_along_axis(x, kept, axis=1) for x in (parents, tokens))
        over |= jnp.min(scores, 1) >= live[:, 0] / (i + 1.0) ** penalty
        cache = ring.reorder(cache, jnp.concatenate([(first + parents).reshape(G * K), jnp.arange(G * K, B)]))
        places = jnp.where(jnp.pad(jnp.repeat(over, K), (0, rest), constant_values=True), ring.EMPTY, position + i)
        new = jnp.pad(tokens.reshape(G * K), (0, rest))
        found, cache = logits(params, extra, cache, new[:, None], places[:, None], jnp.zeros_like(places))
        return i + 1, cache, found, live, made, scores, ended, over

    def more(carry: Any) -> jax.Array:
        return (carry[0] < count) & ~jnp.all(carry[-1])

    live = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)[None].repeat(G, 0)
    made = jnp.full((G, K, most), NOTHING, jnp.int32)
    scores = jnp.full((G, K), -jnp.inf)
    start = (jnp.int32(0), cache, found, live, made, scores, made, jnp.zeros(G, bool))
    _, cache, _, _, _, scores, ended, _ = jax.lax.while_loop(more, body, start)
    return cache, ended[:, 0], scores[:, 0]
