"""What a data source gives: splits of examples that live in arrays, and how rows of them become a batch.

The way of one batch: `order` makes global example indices from (seed, step); `Split.gather` picks those rows, on the
host or on the device; `Split.prepare`, always inside the jitted step, turns rows into a batch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Rows = dict[str, Any]
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, in memory.

    Attributes:
      size: number of examples.
      arrays: what examples are made of, for example {"image": (N, 28, 28, 1) uint8, "label": (N,) int32}.
      gather: (arrays, index (B,) int32) -> rows. Pure, and works on numpy and on JAX arrays alike. An index of -1 is
        padding: any row may stand there.
      prepare: (rows, index (B,)) -> {"inputs", "targets", "weights"} with leading dimension B; weights float32, 0 where
        index is -1. Pure and traceable: it runs inside the jitted step.
    """

    size: int
    arrays: Mapping[str, np.ndarray]
    gather: Callable[[Mapping[str, Any], Any], Rows]
    prepare: Callable[[Rows, Any], Batch]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays.values())


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its splits, and what it knows that models and losses may want.

    Attributes:
      name: for messages.
      train: the split to train on.
      test: the split to evaluate on.
      facts: what the data knows about itself, such as {"classes": 10} or {"vocab_size": 65}; fills model fields of the
        same name that a config leaves out, and is checked against those that it sets.
      tokens_per_example: to convert durations given in tokens; 1 where an example is not a sequence.
      token_bytes: (vocab_size,) UTF-8 bytes of each token, for bits per byte; None where that means nothing.
      fingerprint: a short hash of the content of the arrays; equal data have equal fingerprints on every machine.
    """

    name: str
    train: Split
    test: Split
    facts: Mapping[str, int]
    fingerprint: str
    tokens_per_example: int = 1
    token_bytes: tuple[int, ...] | None = None

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


def fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    """16 hexadecimal digits for a set of named arrays, each by its `describe`."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
