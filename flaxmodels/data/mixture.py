"""Several sources as one, dealt out by weights.

Each part keeps epochs of its own: a small part with a large weight comes round more often. Which part a position of the
training sequence takes is in `order`; the evaluation split is all parts' one after the other, each example once.
"""

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
        {"shares": list(slots), "parts": [dict(part.transforms) for part in parts]},
        first.labels,
        first.tokenizer,
    )


def _slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each part in a period: largest remainders first, so that they add up (Hamilton's method)."""
    total = sum(weights)
    shares = [weight / total * PERIOD if total else 0.0 for weight in weights]
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
                    f"({parts[0].name}) has {described[0][what]}: a mixture needs them equal."
                )


def _looks(part: Source) -> dict[str, Any]:
    row = _row(part.train).items()
    shapes = {name: (*values.shape[1:], values.dtype.name) for name, values in row if name != SKIP}
    return {
        "facts": dict(part.facts),
        "tokenizer": part.tokenizer and part.tokenizer.fingerprint,
        "labels": part.labels,
        "rows": shapes,
    }


def _joined(splits: Sequence[Split], slots: tuple[tuple[int, int], ...]) -> Split:
    """One split, in which part k has the indices from the sum of the sizes before it."""
    size = sum(split.size for split in splits)
    if size >= 2**31:
        raise UserError(f"data.sources have {size} examples in all: expected fewer than 2**31.")
    starts = tuple(int(n) for n in np.cumsum([0, *(split.size for split in splits)]))
    prepare = functools.partial(_prepare, prepares=tuple(split.prepare for split in splits), starts=starts)
    gathers = tuple(split.gather for split in splits)
    stored = sum(split.nbytes for split in splits)
    if any(split.stored for split in splits):
        held = tuple(split.arrays for split in splits)
        skips = any(SKIP in _row(split) for split in splits)
        read = functools.partial(_read, gathers=gathers, held=held, starts=starts, skips=skips)
        return Split(size, {}, read, prepare, stored, slots)
    arrays = {f"{k}/{name}": array for k, split in enumerate(splits) for name, array in split.arrays.items()}
    return Split(size, arrays, functools.partial(_gather, gathers=gathers, starts=starts), prepare, 0, slots)


def _row(split: Split) -> Rows:
    """Row 0."""
    return split.gather(split.arrays, np.zeros(1, np.int32))


def _local(index: Any, starts: tuple[int, ...], k: int) -> tuple[Any, Any]:
    """Which of `index` (B,) belong to part k, and what they are there; -1 for the others."""
    xp = np if isinstance(index, np.ndarray) else jnp
    mine = (index >= starts[k]) & (index < starts[k + 1])
    return mine, xp.where(mine, index - np.int32(starts[k]), np.int32(-1))


def _gather(
    arrays: Mapping[str, Any], index: Any, gathers: tuple[Callable[..., Rows], ...], starts: tuple[int, ...]
) -> Rows:
    """Rows of parts in memory, on the host or on the device."""
    held = [
        {name.partition("/")[2]: array for name, array in arrays.items() if name.partition("/")[0] == str(k)}
        for k in range(len(gathers))
    ]
    if isinstance(index, np.ndarray):
        return _read({}, index, gathers, tuple(held), starts)
    rows: Rows = {}
    for k, gather in enumerate(gathers):
        mine, local = _local(index, starts, k)
        found = gather(held[k], local)
        rows = {name: _where(mine, values, rows.get(name, values)) for name, values in found.items()}
    return rows


def _read(
    _: Mapping[str, Any],
    index: np.ndarray,
    gathers: tuple[Callable[..., Rows], ...],
    held: tuple[Mapping[str, Any], ...],
    starts: tuple[int, ...],
    skips: bool = False,
) -> Rows:
    """Rows on the host; each part reads its own only. Padding (-1) is a row of zeros. `skips`: some part has `SKIP`."""
    rows: Rows = {SKIP: np.zeros(len(index), bool)} if skips else {}
    for k, gather in enumerate(gathers):
        mine, local = _local(index, starts, k)
        if not mine.any() and (k or (index >= 0).any()):
            continue
        found = gather(held[k], local[mine] if mine.any() else np.zeros(1, np.int32))
        for name, values in found.items():
            if name not in rows:
                rows[name] = np.zeros((len(index), *values.shape[1:]), values.dtype)
            if mine.any():
                rows[name][mine] = values
    return rows


def _prepare(rows: Rows, index: Any, prepares: tuple[Callable[..., Batch], ...], starts: tuple[int, ...]) -> Batch:
    """Each part's own way from rows to a batch, where an example is that part's; weights are 0 in all the others."""
    batch: Batch = {}
    for k, prepare in enumerate(prepares):
        mine, local = _local(index, starts, k)
        found = prepare(rows, local)
        batch = jax.tree.map(functools.partial(_where, mine), found, batch or found)
    return batch


def _where(mine: Any, new: Any, old: Any) -> Any:
    """`new` where `mine` (B,), for arrays (B, ...)."""
    return jnp.where(mine.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
