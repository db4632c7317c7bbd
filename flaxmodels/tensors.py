"""What the tensors of a checkpoint are like, and how those of two differ; on the host, a part at a time."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flaxmodels import stored
from flaxmodels.fitting import Leaf
from flaxmodels.shelf import Entry


@dataclasses.dataclass(frozen=True)
class Statistics:
    """One tensor in numbers; of values that are not finite only the count.

    Attributes:
      path: in the train state.
      leaf: shape and dtype.
      mean, std, low, high: of the finite values, float64; NaN where there are none.
      non_finite: how many values are NaN or infinite.
    """

    path: str
    leaf: Leaf
    mean: float
    std: float
    low: float
    high: float
    non_finite: int

    def record(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return _record(self)


def _record(row: Any) -> dict[str, Any]:
    """Fields of a row; a number that JSON does not know, such as NaN, becomes null."""
    fields = {**dataclasses.asdict(row), "bytes": row.leaf.nbytes}
    fields |= fields.pop("leaf")
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def statistics(entry: Entry) -> Iterator[Statistics]:
    """Numbers of each tensor of a step, in the order of the tree."""
    leaves = stored.tree(entry.folder)
    for portion in stored.portions(leaves):
        for path, array in stored.arrays(entry.folder, portion).items():
            values = _floats(array)
            finite = np.isfinite(values)
            count = int(values.size - finite.sum())
            values = values[finite] if count else values
            mean, std, low, high = (
                (float(of(values)) if values.size else math.nan) for of in (np.mean, np.std, np.min, np.max)
            )
            yield Statistics(path, leaves[path], mean, std, low, high, count)


def _floats(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one tensor of two checkpoints differs.

    Attributes:
      path: in the train state.
      leaf: shape and dtype, the same in both.
      same: whether all bits are.
      absolute: largest |a - b|; infinite where a value of one of them alone is not finite.
      relative: that, as a share of the largest |a| or |b| of the tensor.
    """

    path: str
    leaf: Leaf
    same: bool
    absolute: float
    relative: float

    @property
    def kind(self) -> str:
        """What it is of: "params", "extra", "opt_state" or "step"."""
        return self.path.partition("/")[0]

    def record(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return _record(self)


def differences(one: Entry, other: Entry) -> tuple[list[str], Iterator[Difference]]:
    """How the tensors of two checkpoints differ.

    Returns:
      (lines on what can't be compared: in one only, or of another shape or dtype; the others, one by one).
    """
    a, b = stored.tree(one.folder), stored.tree(other.folder)
    both = {path: leaf for path, leaf in a.items() if b.get(path) == leaf}
    return unlike(a, b), _compared(one, other, both)


def unlike(a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> list[str]:
    """A line for each path that only one of two trees A and B has, or that is of another shape or dtype in them."""
    lines = []
    for path in {**a, **b}:
        if path not in a or path not in b:
            lines.append(f"{path} {a.get(path, b.get(path))} is in {'A' if path in a else 'B'} only")
        elif a[path] != b[path]:
            lines.append(f"{path} is {a[path]} in A, {b[path]} in B")
    return lines


def _compared(one: Entry, other: Entry, both: Mapping[str, Leaf]) -> Iterator[Difference]:
    for portion in stored.portions(both):
        a, b = stored.arrays(one.folder, portion), stored.arrays(other.folder, portion)
        for path in portion:
            yield Difference(path, both[path], a[path].tobytes() == b[path].tobytes(), *_distance(a[path], b[path]))


def _distance(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Largest difference of two arrays of one shape: (absolute, as a share of the largest value)."""
    a, b = _floats(one), _floats(other)
    apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    a, b = a[apart], b[apart]
    if not a.size:
        return 0.0, 0.0
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return math.inf, math.inf
    absolute = float(np.abs(a - b).max())
    largest = max(float(np.abs(values[np.isfinite(values)]).max()) for values in map(_floats, (one, other)))
    return absolute, absolute / largest
