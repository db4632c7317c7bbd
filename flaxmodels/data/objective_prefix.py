"""Prefix language models: all of a prefix is seen from everywhere in it, and what follows is learned."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels.data.objectives import Objective, Text, layout, prompted
from flaxmodels.data.split import Batch
from flaxmodels.data.token_rows import places_of


def prefix(text: Text) -> Objective:
    """Prefix language model (Raffel et al. 2019, arXiv:1910.10683, section 3.2.1): tokens of a prefix see all of it.

    Where data have prompts, these are the prefixes; of a chat, what stands before the first answer. Else each document
    of a window is cut in two at random, evenly over all places, and only what stands after the cut is learned. The
    inputs have {"prefix"} (B, T) int32, 1 for tokens that all of their document see.
    """
    source = text.load()
    given = prompted(source)

    def lay(batch: Batch) -> Batch:
        inputs = layout(batch)
        shown = jnp.zeros_like(inputs["segments"])
        if given:
            learned = (batch["weights"] > 0).astype(jnp.int32)
            before = jnp.cumsum(learned, axis=1) - learned
            # In each document, up to the place whose target is the first that is learned.
            at_begin = jax.lax.cummax(jnp.where(inputs["positions"] == 0, before, 0), axis=1)
            shown = (before == at_begin).astype(jnp.int32) * (inputs["segments"] > 0)
        return {**batch, "inputs": {**inputs, "prefix": shown}}

    def draw(batch: Batch, keys: Any) -> Batch:
        inputs = batch["inputs"]
        segments, positions = inputs["segments"], inputs["positions"]
        length = segments.shape[1]
        drawn = jax.vmap(functools.partial(jax.random.uniform, shape=(length + 1,)))(keys)
        cut = 1 + jnp.floor(jnp.take_along_axis(drawn, segments, axis=1) * _sizes(segments)).astype(jnp.int32)
        shown = ((positions < cut) & (segments > 0)).astype(jnp.int32)
        weights = batch["weights"] * (positions >= cut - 1)
        return {**batch, "inputs": {**inputs, "prefix": shown}, "weights": weights}

    return Objective(source, lay, (lambda batch, keys: batch) if given else draw, compressed=True)


def _sizes(segments: Any) -> Any:
    """(B, T) int32, how many tokens the segment of each token has."""
    places = places_of(segments)
    edge = segments[:, 1:] != segments[:, :-1]
    ends = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    begins = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, places, segments.shape[1]), axis=1, reverse=True)
    return last - first + 1
