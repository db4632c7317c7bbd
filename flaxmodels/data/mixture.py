"""Several sources as one, dealt out by weights.

Each part keeps epochs of its own: a small part with a large weight comes round more often. Which part a position of the
training sequence takes is in `order`; the evaluation split is all parts' one after the other, each example once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import data, registry
from flaxmodels.data.order import PERIOD
from flaxmodels.data.split import SKIP, Batch, Rows, Source, Split, fingerprint
from flaxmodels.registry import UserError

_REMEDIES = {
    "facts": "Give all the same length, or the same classes.",
    "tokenizer": 'Give all one tokenizer: tokens="bytes", or the path of one tokenizer.json.',
    "labels": "Give all the same classes, by the same names.",
    "rows": 'Give all the same size or length, and the same kind of windows: windows="packed".',
}


def mixture(sources: tuple[dict, ...]) -> Source:
    """Examples of several sources, in fixed proportions.

    Args:
      sources: the `data` section of each, with a "weight": ({"name": "text", "path": ..., "weight": 3}, ...). Weights
        are relative; shares are rounded to 1/1000. All must give examples of one shape, and know the same facts: give
        texts one tokenizer, as "bytes" or a file.

    Raises:
      UserError: a weight is missing, or too small beside the others; or the sources do not fit together.
    """
    if len(sources) < 2:
        raise UserError(f"data.sources has {len(sources)} entries: a mixture needs two or more.")
    weights, parts = [], []
    for number, options in enumerate(sources):
        where = f"data.sources[{number}]"
        if "weight" not in options or "name" not in options:
            lacks = "weight" if "name" in options else "name"
            raise UserError(f"{where} has no {lacks!r}: expected {{'name': ..., 'weight': ..., options}}.")
        weights.append(registry.check(options["weight"], float, f"{where}.weight"))
        parts.append(data.load_as(where, {key: value for key, value in options.items() if key != "weight"}))
    slots = _slots(weights)
    _check_alike(parts)
    first = parts[0]
    train = _joined([part.train for part in parts], tuple(zip((p.train.size for p in parts), slots)))
    test = _joined([part.test for part in parts], ())
    return Source(
        "mixture",
        train,
        test,
        first.facts,
        fingerprint([[part.name, part.fingerprint] for part in parts]),
        first.tokens_per_example,
        first.token_bytes,
        {
            "shares": list(slots),
            "parts": [{"name": part.name, "examples": part.train.size, **part.transforms} for part in parts],
        },
        first.labels,
        first.tokenizer,
    )


def _slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each part in a period: largest remainders first, so that they add up (Hamilton's method)."""
    total = sum(weights)
    if not total:
        raise UserError("data.sources: all weights are 0, so that nothing is dealt out. Give each source one over 0.")
    shares = [weight / total * PERIOD for weight in weights]
    slots = [int(share) for share in shares]
    for number in sorted(range(len(shares)), key=lambda i: slots[i] - shares[i])[: PERIOD - sum(slots)]:
        slots[number] += 1
    if 0 in slots:
        number = slots.index(0)
        raise UserError(
            f"data.sources[{number}].weight={weights[number]:g} beside {total:.10g} in all is less than one example in "
            f"{PERIOD}. Leave the source out, or give it more."
        )
    return tuple(slots)


def _check_alike(parts: Sequence[Source]) -> None:
    """UserError unless all parts can stand in one batch."""
    described = [_looks(part) for part in parts]
    for number, looks in enumerate(described):
        for what, value in looks.items():
            if value != described[0][what]:
                raise UserError(
                    f"data.sources[{number}] ({parts[number].name}) has {what} {value}, but data.sources[0] "
                    f"({parts[0].name}) has {described[0][what]}: a mixture needs them equal. "
                    f"{_REMEDIES[what]}"
                )


def _looks(part: Source) -> dict[str, Any]:
    # Not the exact dtypes: of some rows they follow from what the part holds, and the wider one has room for both.
    rows = [
        {name: (*values.shape[1:], values.dtype.kind) for name, values in _row(split).items() if name != SKIP}
        for split in (part.train, part.test)
    ]
    return {
        "facts": dict(part.facts),
        "tokenizer": part.tokenizer and part.tokenizer.fingerprint,
        "labels": part.labels,
        "rows": rows[0] if rows[0] == rows[1] else rows,
    }


def _row(split: Split) -> Rows:
    """Row 0."""
    return split.gather(split.arrays, np.zeros(1, np.int32))


def _joined(splits: Sequence[Split], slots: tuple[tuple[int, int], ...]) -> Split:
    """One split, in which part k has the indices from the sum of the sizes before it."""
    size = sum(split.size for split in splits)
    if size >= 2**31:
        raise UserError(f"data.sources have {size} examples in all: expected fewer than 2**31.")
    if any(split.mixture for split in splits):
        raise UserError("data.sources has a mixture in it: list the sources of that one instead, with their weights.")
    parts = _Parts(
        tuple(split.gather for split in splits),
        tuple(split.prepare for split in splits),
        tuple(int(n) for n in np.cumsum([0, *(split.size for split in splits)])),
        _empty(splits),
    )
    stored = sum(split.nbytes for split in splits)
    prepare = functools.partial(_prepare, parts=parts)
    if any(split.stored for split in splits):
        read = functools.partial(_read, parts=dataclasses.replace(parts, prepares=()), held=[s.arrays for s in splits])
        return Split(size, {}, read, prepare, stored, slots)
    arrays = {f"{k}/{name}": array for k, split in enumerate(splits) for name, array in split.arrays.items()}
    return Split(size, arrays, functools.partial(_gather, parts=parts), prepare, 0, slots)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What is called for each part.

    Attributes:
      gathers: `Split.gather` of each.
      prepares: `Split.prepare` of each.
      starts: the first index of each, and after the last one the number of all.
      empty: no rows, of the dtypes that have room for those of each part.
    """

    gathers: tuple[Callable[..., Rows], ...]
    prepares: tuple[Callable[..., Batch], ...]
    starts: tuple[int, ...]
    empty: Rows


def _empty(splits: Sequence[Split]) -> Rows:
    rows = [_row(split) for split in splits]
    names = sorted({name for row in rows for name in row})
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: np.zeros((0, *v[0].shape[1:]), np.result_type(*(x.dtype for x in v))) for name, v in found.items()}


def _local(index: Any, starts: tuple[int, ...], k: int) -> tuple[Any, Any]:
    """Which of `index` (B,) belong to part k, and what they are there; -1 for the others."""
    xp = np if isinstance(index, np.ndarray) else jnp
    mine = (index >= starts[k]) & (index < starts[k + 1])
    return mine, xp.where(mine, index - np.int32(starts[k]), np.int32(-1))


def _gather(arrays: Mapping[str, Any], index: Any, parts: _Parts) -> Rows:
    """Rows of parts in memory, on the host or on the device."""
    held: list[dict[str, Any]] = [{} for _ in parts.gathers]
    for name, array in arrays.items():
        part, _, own = name.partition("/")
        held[int(part)][own] = array
    if isinstance(index, np.ndarray):
        return _read({}, index, parts, held)
    rows = {name: jnp.zeros((*index.shape, *empty.shape[1:]), empty.dtype) for name, empty in parts.empty.items()}
    for k, gather in enumerate(parts.gathers):
        mine, local = _local(index, parts.starts, k)
        for name, values in gather(held[k], local).items():
            rows[name] = _where(mine, values.astype(rows[name].dtype), rows[name])
    return rows


def _read(_: Mapping[str, Any], index: np.ndarray, parts: _Parts, held: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows on the host; each part reads its own only, and padding (-1) is a row of zeros."""
    rows = {name: np.zeros((len(index), *empty.shape[1:]), empty.dtype) for name, empty in parts.empty.items()}
    for k, gather in enumerate(parts.gathers):
        mine, local = _local(index, parts.starts, k)
        if mine.any():
            for name, values in gather(held[k], local[mine]).items():
                rows[name][mine] = values
    return rows


def _prepare(rows: Rows, index: Any, parts: _Parts) -> Batch:
    """Each part's own way from rows to a batch, where an example is that part's; weights are 0 in all the others."""
    batch: Batch = {}
    for k, prepare in enumerate(parts.prepares):
        mine, local = _local(index, parts.starts, k)
        found = prepare(rows, local)
        batch = jax.tree.map(functools.partial(_where, mine), found, batch or found)
    return batch


def _where(mine: Any, new: Any, old: Any) -> Any:
    """`new` where `mine` (B,), for arrays (B, ...)."""
    return jnp.where(mine.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
