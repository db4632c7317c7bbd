"""Packed windows: pieces of documents that share a window, and how rows of them become a batch."""

import functools
from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels.data.split import Batch, Rows, Split
from flaxmodels.data.token_rows import LOUD, Stored, places_of, ranges, skipped, stored_split


def packed_split(
    tokens: np.ndarray | Stored, begins: np.ndarray, ends: np.ndarray, loud: np.ndarray | None, length: int
) -> Split:
    """A split of "packed" windows; see `documents.windows`. `loud`: (N,) bool, which tokens are targets of the loss."""
    sizes = np.maximum(ends - begins - 1, 0)
    counts = -(-sizes // length)
    owner = np.repeat(np.arange(len(counts)), counts)
    nth = ranges(counts) * length
    starts, sizes = begins[owner] + nth, np.minimum(sizes[owner] - nth, length).astype(np.int32)
    if loud is not None:
        before = np.cumsum(loud)
        heard = before[starts + sizes] > before[starts]
        starts, sizes = starts[heard], sizes[heard]
    window = in_order(pack(sizes, length), starts)
    order = np.lexsort((starts, window))
    counts = np.bincount(window)
    gather = functools.partial(
        _gather,
        tokens=tokens,
        length=length,
        first=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        starts=starts[order],
        sizes=sizes[order],
        loud=loud,
        number=np.min_scalar_type(counts.max(initial=0)),
    )
    return stored_split(len(counts), gather, _prepare)


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Put items into bins by best fit decreasing: the largest first, each where the least space is left that is enough.

    Items of one size are placed together, so that the work grows with the number of different sizes and of bins.

    Args:
      sizes: (C,) integers in 1..capacity.
      capacity: of a bin.

    Returns:
      (C,) int32, the bin of each item, from 0 on without a gap. A pure function of the sizes.
    """
    bins = np.empty(len(sizes), np.int32)
    order = np.argsort(-sizes.astype(np.int32), kind="stable")
    free: dict[int, list[np.ndarray]] = {}  # by the space that is left
    spaces: list[int] = []  # the keys of `free`, sorted
    used = 0

    def keep(space: int, which: np.ndarray) -> None:
        if space and len(which):
            if space not in free:
                insort(spaces, space)
            free.setdefault(space, []).append(which)

    bounds = np.flatnonzero(np.diff(sizes[order], prepend=0, append=0))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        items, size = order[start:stop], int(sizes[order[start]])
        while len(items):
            at = bisect_left(spaces, size)
            if at < len(spaces):
                space = spaces.pop(at)
                there = np.concatenate(free.pop(space))
            else:
                space, count = capacity, -(-len(items) // (capacity // size))
                there, used = np.arange(used, used + count, dtype=np.int32), used + count
            each = space // size  # the tightest bin stays the tightest until it is full
            full, more = divmod(len(items), each) if len(items) < each * len(there) else (len(there), 0)
            touched = full + (more > 0)
            placed = min(len(items), each * len(there))
            bins[items[:placed]] = np.repeat(there[:touched], each)[:placed]
            items = items[placed:]
            keep(space - each * size, there[:full])
            keep(space - more * size, there[full:touched])
            keep(space, there[touched:])
    return bins


def in_order(bins: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The bins, numbered in the order of the first token in each, so that a pass over them reads forward."""
    lowest = np.full(bins.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(lowest, bins, starts)
    rank = np.empty(len(lowest), np.int32)
    rank[np.argsort(lowest, kind="stable")] = np.arange(len(lowest), dtype=np.int32)
    return rank[bins]


def _gather(
    arrays: Mapping[str, Any],
    index: np.ndarray,
    tokens: np.ndarray | Stored,
    length: int,
    first: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    loud: np.ndarray | None,
    number: np.dtype[Any],
) -> Rows:
    """{"tokens", "targets", "segments", and with `loud` LOUD: which targets count}, each (B, length).

    Window i has the pieces first[i] to first[i + 1]; a piece has `sizes` inputs from the token `starts` on.
    """
    rows = index.clip(0)
    counts = first[rows + 1] - first[rows]
    row, nth = np.repeat(np.arange(len(rows)), counts), ranges(counts)
    piece = first[rows][row] + nth
    size = sizes[piece]
    inputs, targets, sound = _read_pieces(tokens, starts[piece], size, length)
    filled = np.concatenate([[0], np.cumsum(size)])
    before = filled[:-1] - filled[np.cumsum(counts) - counts][row]
    within = ranges(size)
    at = np.repeat(row * length + before, size) + within

    def lay(values: np.ndarray) -> np.ndarray:
        laid = np.zeros((len(rows), length), values.dtype)
        laid.ravel()[at] = values
        return laid

    whole = {
        "tokens": lay(inputs),
        "targets": lay(targets),
        "segments": lay(np.repeat(nth + 1, size).astype(number)),
    }
    if loud is not None:
        whole[LOUD] = lay(loud[np.repeat(starts[piece], size) + within + 1])
    return whole | skipped(None if sound is None else np.bincount(row, sound, len(rows)) == counts)


def _read_pieces(
    tokens: np.ndarray | Stored, starts: np.ndarray, sizes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Inputs and targets of pieces (P,), each in one row of `sizes.sum()`; and which pieces are sound, None for all."""
    if isinstance(tokens, np.ndarray):
        at = np.repeat(starts, sizes) + ranges(sizes)
        return tokens[at], tokens[at + 1], None
    found = np.empty((2, sizes.sum()), tokens.dtype)
    sound = np.empty(len(sizes), bool)
    # Together those of about one size. What is read of a piece must not depend on the others that are: a damaged block
    # has to leave out the same windows in every batch.
    _, power = np.frexp(sizes)
    for each in np.unique(power):
        some = power == each
        rows, sound[some] = tokens.read(starts[some], min(2 ** int(each), length + 1))
        inside = np.arange(rows.shape[1] - 1) < sizes[some][:, None]
        found[:, np.repeat(some, sizes)] = rows[:, :-1][inside], rows[:, 1:][inside]
    return found[0], found[1], sound


def _prepare(rows: Rows, index: Any) -> Batch:
    """Inputs a dict of (B, length) int32, targets (B, length) int32, weights (B, length) float32."""
    segments = rows["segments"].astype(np.int32)
    places = places_of(segments)
    begins = jnp.concatenate([segments[:, :1] >= 0, segments[:, 1:] != segments[:, :-1]], axis=1)
    positions = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    real = (index >= 0)[:, None] & (segments > 0) & rows.get(LOUD, True)
    return {
        "inputs": {"tokens": rows["tokens"].astype(np.int32), "segments": segments, "positions": positions},
        "targets": rows["targets"].astype(np.int32),
        "weights": real.astype(np.float32),
    }
