"""What a data source gives: splits of examples, and how rows of them become a batch.

The way of one batch: `order` makes global example indices from (seed, step); `Split.gather` picks those rows, on the
host or on the device; `Split.prepare`, always inside the jitted step, turns rows into a batch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

Rows = dict[str, Any]
Batch = dict[str, Any]
# (batch, keys (B,)) -> a batch of the same shapes and dtypes. Traceable.
Draw = Callable[[Batch, Any], Batch]

# The name of an optional entry of rows, (B,) bool: examples that could not be read, and are to be left out. They count
# as padding, of weight 0, in their place, so that the order of all others stays what it was.
SKIP = "skip"
# Examples read at a time where a whole split is.
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set: in memory (`arrays`), or stored, and read when a batch needs it.

    Attributes:
      size: number of examples, below 2**31.
      arrays: what examples are made of, for example {"image": (N, 28, 28, 1) uint8, "label": (N,) int32}. Empty where
        the split is stored.
      gather: (arrays, index (B,) int32) -> rows, each (B, ...). Pure. An index of -1 is padding: any row may stand
        there. In memory it works on numpy and on JAX arrays alike. Of a stored split it runs on the host only, in
        several threads and, pickled, in worker processes: a `functools.partial` of a module's function over plain data.
        Its rows may have an entry `SKIP`.
      prepare: (rows, index (B,)) -> {"inputs", "targets", "weights"} with leading dimension B; weights float32, 0 where
        index is -1. Pure and traceable: it runs inside the jitted step. It never sees `SKIP`.
      stored: bytes that the rows of all examples take once read; 0 where the split is in memory.
      mixture: (size, slots of `order.PERIOD`) of each part, in order of example indices; () for a single part.
    """

    size: int
    arrays: Mapping[str, np.ndarray]
    gather: Callable[[Mapping[str, Any], Any], Rows]
    prepare: Callable[[Rows, Any], Batch]
    stored: int = 0
    mixture: tuple[tuple[int, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all examples, in memory or read into it."""
        return self.stored or sum(a.nbytes for a in self.arrays.values())

    def read(self) -> "Split":
        """The same split in memory: every row is read, once. Itself where it is in memory already."""
        if not self.stored:
            return self
        whole: dict[str, np.ndarray] = {}
        for start in range(0, self.size, CHUNK):
            rows = self.gather(self.arrays, np.arange(start, min(start + CHUNK, self.size), dtype=np.int32))
            for name, values in rows.items():
                if name not in whole:
                    whole[name] = np.empty((self.size, *values.shape[1:]), values.dtype)
                whole[name][start : start + len(values)] = values
        return dataclasses.replace(self, arrays=whole, gather=gather_rows, stored=0)


class Tokenizer(Protocol):
    """Between text and token ids. Those we have are in `tokenizer.py`."""

    @property
    def size(self) -> int:
        """Number of tokens: ids are below it."""

    @property
    def end(self) -> int | None:
        """The id that ends a document; None where there is none."""

    @property
    def begin(self) -> int | None:
        """The id that begins a text, for models that were trained so; None where there is none."""

    @property
    def special(self) -> Mapping[str, int]:
        """Id of each special token, by its name; of ours without `end`, which has none."""

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) UTF-8 bytes of each token; 0 for special ones."""

    @property
    def fingerprint(self) -> str:
        """A short hash of what it does: equal tokenizers have equal fingerprints on every machine."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids (N,), of the smallest unsigned dtype that holds all of them, without `end`."""

    def decode(self, ids: Any) -> str:
        """The text of token ids (N,)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its splits, and what it knows that models and losses may want.

    Attributes:
      name: for messages.
      train: the split to train on.
      test: the split to evaluate on.
      facts: what the data knows about itself, such as {"classes": 10} or {"vocab_size": 65}; fills model fields of the
        same name that a config leaves out, and is checked against those that it sets.
      fingerprint: a short hash of the content; equal data have equal fingerprints on every machine.
      tokens_per_example: to convert durations given in tokens; 1 where an example is not a sequence.
      token_bytes: (vocab_size,) UTF-8 bytes of each token, for bits per byte; None where that means nothing.
      transforms: what the source does to its content on the way to examples, ready for JSON: {"length": 64}. Of float
        targets it says {"values": "numbers"}, or "probabilities", the shares of classes.
      labels: names of the classes, in the order of their numbers; () where nobody knows them.
      tokenizer: of text; None where examples are no text.
      draw: what `objectives` draws anew for each training batch, such as the tokens that are masked. In `test` it is
        drawn already, and the same at each evaluation. None: nothing.
    """

    name: str
    train: Split
    test: Split
    facts: Mapping[str, int]
    fingerprint: str
    tokens_per_example: int = 1
    token_bytes: tuple[int, ...] | None = None
    transforms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    draw: Draw | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both splits."""
        return self.train.nbytes + self.test.nbytes


def take(array: Any, index: Any) -> Any:
    """`array[index]` along the first dimension, for numpy and JAX; `index` (any shape, integer) must be in range."""
    if isinstance(array, np.ndarray) and isinstance(index, np.ndarray):
        return array[index]
    # Without the promise XLA clamps or fills out-of-range rows, with a select over the whole result.
    return jnp.asarray(array).at[index].get(mode="promise_in_bounds")


def gather_rows(arrays: Mapping[str, Any], index: Any) -> Rows:
    """A `Split.gather` for arrays of one row per example; padding (-1) gets row 0."""
    return {name: take(array, index.clip(0)) for name, array in arrays.items()}


def describe(array: np.ndarray) -> dict[str, Any]:
    """The dtype, the shape and the sha256 of the bytes of an array, ready for JSON."""
    content = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": content}


def fingerprint(described: Any) -> str:
    """16 hexadecimal digits for a set of named arrays, each by its `describe`; or for anything else ready for JSON."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
