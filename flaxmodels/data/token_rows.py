"""Rows of tokens out of a flat array of them, in memory or on disk."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from flaxmodels.data.split import SKIP, Batch, Rows, Split
from flaxmodels.registry import UserError

# The name of an optional entry of rows: which tokens are targets of the loss, where some are not.
LOUD = "loud"


class Stored(Protocol):
    """Tokens on disk that look like a flat array: `token_files.TokenFiles`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a token."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    def read(self, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` tokens from each `start` (B,) on, (B, count), zeros past the end; and which are sound, (B,)."""


def nothing() -> UserError:
    """The error of a split in which no window has a target."""
    return UserError("There is nothing to predict: no document has two tokens. Use more text.")


def stored_split(size: int, gather: Callable[..., Rows], prepare: Callable[..., Batch]) -> Split:
    """A stored split of `size` windows. UserError for none, or too many."""
    if not size:
        raise nothing()
    if size >= 2**31:
        raise UserError(f"{size} windows are too many: expected fewer than 2**31. Raise data.length.")
    row = gather({}, np.zeros(1, np.int32))
    return Split(size, {}, gather, prepare, stored=size * sum(a.nbytes for a in row.values()))


def read_rows(tokens: np.ndarray | Stored, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens (B, count) from each start on, anything past the end; and which rows are sound, None for all."""
    if not isinstance(tokens, np.ndarray):
        return tokens.read(start, count)
    at = start[:, None] + np.arange(count)[None]
    return tokens[np.minimum(at, len(tokens) - 1)], None


def skipped(sound: np.ndarray | None) -> Rows:
    """The entry `SKIP` of rows; none where all are sound."""
    return {} if sound is None else {SKIP: ~sound}


def places_of(like: Any) -> Any:
    """0, 1, ... along the rows of (B, T): (B, T) int32."""
    return jax.lax.broadcasted_iota(np.int32, like.shape, 1)


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each n of counts, in one row."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
