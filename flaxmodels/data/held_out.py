"""Which examples are held out where a source comes as one piece: the same ones on every machine, and at every start."""

import hashlib

import numpy as np

from flaxmodels.data import order

# Of the streams of a seed (see `order.permutation`), one that no epoch comes to: what is held out says nothing about
# the order in which the rest is seen.
_STREAM = 2**62


def stratified(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """The part of a labelled set to hold out: of each class the same share, drawn at random.

    Args:
      labels: (N,) integers. All equal where there are no classes to keep in proportion.
      fraction: of each class, in 0..1. The count is rounded, to even at one half; it is at least one where the class
        has two examples or more and `fraction` is not 0, and never the whole class.
      seed: of the draw.

    Returns:
      (N,) bool, True for what is held out.
    """
    shuffled = order.permutation(seed, _STREAM, len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[grouped], return_index=True, return_counts=True)
    wanted = np.minimum(np.maximum(np.rint(counts * fraction), fraction > 0), counts - 1)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    held = np.zeros(len(labels), bool)
    held[grouped[rank < np.repeat(wanted, counts)]] = True
    return held


def by_content(content: str | bytes, fraction: float) -> bool:
    """Whether one document is held out, by a hash of nothing but its content.

    So equal documents always stand on the same side, and no other document, added or removed, moves one over.

    Args:
      content: the document; text counts as its UTF-8 bytes.
      fraction: how many of very many different documents are held out, in 0..1. What a larger fraction holds out
        includes what a smaller one does.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2**64
