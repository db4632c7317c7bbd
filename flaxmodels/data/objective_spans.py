"""Span denoising: what is left of a text, and then what was cut out of it, which is learned."""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels.data.objectives import Objective, Rate, Text, ends, layout, with_marks
from flaxmodels.data.split import Batch
from flaxmodels.data.token_rows import places_of
from flaxmodels.registry import LONGEST, Range, UserError

# What ends a text where its tokenizer has nothing for that.
END = "</s>"


def denoise(
    text: Text, rate: Rate = 0.15, mean: Annotated[float, Range(1, LONGEST)] = 3.0, bidirectional: bool = False
) -> Objective:
    """Span denoising of T5 (Raffel et al. 2019, arXiv:1910.10683, section 3.1.4), for a decoder.

    Spans of `rate` of the tokens are cut out of a text. What is left, with a sentinel in place of each span, is the
    first half of the sequence; each sentinel with its span, the second, which is learned; the token that ends a
    document stands after each. Numbers and lengths of spans are those of T5's code. The windows of the source are
    shorter than `data.length`, so that the sequence has that length.

    Args:
      text: what is learned, in "contiguous" or "padded" windows.
      rate: the part of the tokens that are cut out.
      mean: tokens in a span, on average.
      bidirectional: whether all of the first half is seen from everywhere in it, as in an encoder: inputs have
        {"prefix"}, as for `prefix`.
    """
    length = text.length
    most = raw_length(length, rate, mean)
    source = text.load(prompts=False, length=most)
    windows = {str(part.get("windows")) for part in source.transforms.get("parts", (source.transforms,))}
    if "packed" in windows:
        raise UserError(
            "data.windows='packed': with data.objective.name='denoise' each window has one text, or a part of one. Set "
            "data.windows='contiguous' or 'padded'."
        )
    sentinels = tuple(f"<extra_id_{i}>" for i in range(counts(most, rate, mean)[1]))
    source, known = with_marks(source, sentinels if ends(source.tokenizer) else (END, *sentinels))
    cut = functools.partial(
        corrupt,
        rate=rate,
        mean=mean,
        sentinels=np.array([known.special[name] for name in sentinels], np.int32),
        end=(*ends(known), known.special.get(END, -1))[0],
    )

    def lay(batch: Batch) -> Batch:
        inputs = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]))), layout(batch))
        inputs["positions"] = places_of(inputs["tokens"])
        if bidirectional:
            inputs["prefix"] = jnp.zeros_like(inputs["tokens"])
        return {"inputs": inputs, "targets": inputs["tokens"], "weights": inputs["segments"].astype(jnp.float32)}

    def draw(batch: Batch, keys: Any) -> Batch:
        inputs = batch["inputs"]
        size = jnp.sum(inputs["segments"], axis=1)
        tokens, first, total = jax.vmap(cut)(inputs["tokens"], size, keys)
        places = places_of(inputs["tokens"])
        real = places < total[:, None] - 1
        found = {**inputs, "tokens": tokens[:, :-1] * real, "segments": real.astype(jnp.int32)}
        if bidirectional:
            found["prefix"] = ((places < first[:, None]) & real).astype(jnp.int32)
        learned = real & (places >= first[:, None] - 1)
        return {"inputs": found, "targets": tokens[:, 1:], "weights": learned.astype(jnp.float32)}

    return Objective(dataclasses.replace(source, tokens_per_example=length), lay, draw, {"max_length": length})


def counts(size: int, rate: float, mean: float) -> tuple[int, int]:
    """How many of `size` tokens are cut out, and in how many spans; (0, 0) where a text is too short for one.

    As in T5's `random_spans_noise_mask`; at least a token is left, and one between two spans.
    """
    if size < 2:
        return 0, 0
    tokens = min(max(round(size * rate), 1), size - 1)
    return tokens, min(max(round(tokens / mean), 1), tokens, size - tokens + 1)


def raw_length(length: int, rate: float, mean: float) -> int:
    """Most tokens of a text whose sequence has up to `length` inputs: its tokens, two sentinels a span, and an end."""
    fitting = (size for size in range(length, 1, -1) if size + 2 * counts(size, rate, mean)[1] < length)
    if (found := next(fitting, None)) is None:
        raise UserError(f"data.length={length} has no room for a text, sentinels and ends: expected at least 5.")
    return found


def corrupt(
    tokens: Any, size: Any, key: Any, *, rate: float, mean: float, sentinels: np.ndarray, end: int
) -> tuple[Any, Any, Any]:
    """Cut spans out of a text, all ways to cut it equally probable, with at least a token between two spans.

    (T5's code always cuts at the end, so that of a short text, with its one span, the same would always be learned.)

    Args:
      tokens: (T,) int32, of which the first `size` are the text, up to `raw_length(T, rate, mean)`.
      size: () int32.
      key: of this text.
      rate: the part of the tokens that are cut out.
      mean: tokens in a span, on average.
      sentinels: (S,) int32, ids; at least as many as `counts` gives.
      end: the id that stands after each half.

    Returns:
      The sequence, (T + 1,) int32, zeros after its end: what is left, with sentinels; `end`; sentinels with what was
      cut out; `end`. Then how many tokens its first half has, with the end, and how many all of it: 0 for a text of
      fewer than two tokens.
    """
    length, most = tokens.shape[0], raw_length(tokens.shape[0], rate, mean)
    table = np.array([counts(n, rate, mean) for n in range(most + 1)], np.int32)
    cut_tokens, parts = jnp.asarray(table)[size]
    for_left, for_cut = jax.random.split(key)
    # What is left before the first span and after the last may be nothing: as if of one token more, less that one.
    left = _lengths(for_left, size - cut_tokens + 2, parts + 1, most + 2, len(sentinels))
    cut = _lengths(for_cut, cut_tokens, parts, most, len(sentinels))
    number, earlier = jnp.arange(len(sentinels)), jnp.cumsum(cut) - cut
    begins = jnp.cumsum(left) - 1 + earlier
    stops, place, there = begins + cut, jnp.arange(most), number < parts
    begun = jnp.sum((begins[None] <= place[:, None]) & there[None], axis=1)
    is_cut = (begun > 0) & (place < stops[begun - 1])
    before = jnp.cumsum(is_cut) - is_cut
    second = size - cut_tokens + parts + 1
    total = second + cut_tokens + parts + 1
    nowhere = length + 1
    to = jnp.where(place < size, jnp.where(is_cut, second + before + begun, place - before + begun), nowhere)
    sequence = jnp.zeros(length + 1, tokens.dtype).at[to].set(tokens[:most], mode="drop")
    for at in (begins - earlier + number, second + earlier + number):
        sequence = sequence.at[jnp.where(there, at, nowhere)].set(jnp.asarray(sentinels), mode="drop")
    sequence = sequence.at[jnp.stack([second - 1, total - 1])].set(end, mode="drop")
    some = (size > 1).astype(jnp.int32)
    return sequence * some, second * some, total * some


def _lengths(key: Any, total: Any, parts: Any, most: int, room: int) -> Any:
    """(room,) int32: lengths of the first of `parts` parts of `total` tokens, each at least 1; zeros in the rest."""
    place = jnp.arange(most)
    inside = (place > 0) & (place < total)
    order = jnp.argsort(jnp.where(inside, jax.random.uniform(key, (most,)), 2.0))
    begins = (place == 0) | (inside & (jnp.argsort(order) < parts - 1))
    part = jnp.cumsum(begins) - 1
    return jnp.sum((part[:, None] == jnp.arange(room)[None]) & (place < total)[:, None], axis=0, dtype=jnp.int32)
