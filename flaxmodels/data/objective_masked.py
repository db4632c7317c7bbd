"""Masked language models: some tokens are hidden, and predicted from those on both sides."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels.data import words
from flaxmodels.data.objectives import Objective, Rate, Text, ends, layout, with_marks
from flaxmodels.data.split import Batch
from flaxmodels.registry import Fraction, UserError

MASK = "[MASK]"


def masked(
    text: Text, rate: Rate = 0.15, mask: Fraction = 0.8, random: Fraction = 0.1, whole_words: bool = False
) -> Objective:
    """Masked language model of BERT (Devlin et al. 2018, arXiv:1810.04805, section 3.1): predict some of the tokens.

    Of each window `rate` of the tokens are predicted, rounded, and at least one; special tokens never are. The model
    has to see both sides: the fact causal=False says so.

    Args:
      text: what is learned.
      rate: the part of the tokens that are predicted.
      mask: the part of these that the model sees as "[MASK]", a special token of the tokenizer; where it has none, one
        is added.
      random: the part of these that it sees as another token, drawn from all that are not special; the rest it sees as
        they are.
      whole_words: predict all of a word, or nothing of it: what white space separates; of WordPiece, with the pieces
        that go on ("##"). Some more tokens than `rate` may be predicted then, up to the length of a word.
    """
    if mask + random > 1:
        raise UserError(f"data.objective: mask={mask:g} and random={random:g} are parts of a whole: expected up to 1.")
    source, known = with_marks(text.load(prompts=False), (MASK,))
    ordinary = np.setdiff1d(np.arange(known.size, dtype=np.int32), [*known.special.values(), *ends(known)])
    choose = functools.partial(
        _masked_row,
        ordinary=ordinary,
        mask_id=known.special[MASK],
        rate=rate,
        shares=(mask, random),
        edges=words.edges(known) if whole_words else None,
    )

    def lay(batch: Batch) -> Batch:
        inputs = layout(batch)
        plain = np.zeros(known.size, bool)
        plain[ordinary] = True
        candidates = jnp.asarray(plain)[inputs["tokens"]] & (inputs["segments"] > 0)
        return {"inputs": inputs, "targets": inputs["tokens"], "weights": candidates.astype(jnp.float32)}

    def draw(batch: Batch, keys: Any) -> Batch:
        inputs = batch["inputs"]
        seen, chosen = jax.vmap(choose)(inputs["tokens"], inputs["segments"], batch["weights"] > 0, keys)
        weights = batch["weights"] * chosen
        return {**batch, "inputs": {**inputs, "tokens": seen}, "weights": weights}

    return Objective(source, lay, draw, {"causal": False, "mask_token": known.special[MASK]})


def _masked_row(
    tokens: Any,
    segments: Any,
    candidates: Any,
    key: Any,
    *,
    ordinary: np.ndarray,
    mask_id: int,
    rate: float,
    shares: tuple[float, float],
    edges: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[Any, Any]:
    """What the model sees of one window, (T,) int32, and which tokens it predicts, (T,) bool."""
    for_choice, for_fate, for_token = jax.random.split(key, 3)
    noise = jax.random.uniform(for_choice, tokens.shape)
    if edges is not None:  # all tokens of a word have the noise of its first
        begins, stops = (jnp.asarray(edge)[tokens] for edge in edges)
        first = begins[1:] | stops[:-1] | (segments[1:] != segments[:-1]) | ~candidates[1:] | ~candidates[:-1]
        noise = noise[jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), first.astype(jnp.int32)]))]
    # In the order of the noise, words are taken until there are enough tokens.
    before = jnp.sum(candidates[None] & (noise[None] < noise[:, None]), axis=1)
    wanted = jnp.maximum(1, jnp.round(rate * jnp.sum(candidates)))
    chosen = candidates & (before < wanted)
    fate = jax.random.uniform(for_fate, tokens.shape)
    other = jnp.asarray(ordinary)[jax.random.randint(for_token, tokens.shape, 0, len(ordinary))]
    mask, random = shares
    new = jnp.where(fate < mask, mask_id, jnp.where(fate < mask + random, other, tokens))
    return jnp.where(chosen, new, tokens).astype(tokens.dtype), chosen
