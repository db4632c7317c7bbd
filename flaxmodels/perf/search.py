"""Other meshes, remat, microbatches, chunks and batches for a config, ranked by what compiling them showed.

Read `search`. It compiles the config as it is, then goes on from the best that it has: of all that one change would
make, what an estimate (`_expected`) says is best comes next. Estimates decide only what is compiled; what fits, and the
ranks, never come from one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flaxmodels import sections
from flaxmodels.perf import cells, levers
from flaxmodels.perf.cells import Cell, Target
from flaxmodels.perf.levers import Layout, Look
from flaxmodels.registry import UserError

Measure = Callable[[Mapping[str, Any], Target, Mapping[str, Any]], Cell]

# `largest_batch` looks no further than this many times the config's own, and is content with a share of what it found.
FURTHEST = 1024
EXACT = 1 / 16
# Of two rates that are closer than this, that of fewer changes is better: a roofline knows no more.
CLOSE = 0.02
# What is expected to reach less than this part of the best rate is not compiled.
WORTH = 0.7
# What a value of `model.remat` leaves of activations, and of speed, roughly: before it is compiled.
_REMAT: Mapping[Any, tuple[float, float]] = {
    "none": (1.0, 1.0), "dots": (0.6, 0.95), "nothing": (0.3, 0.78), False: (1.0, 1.0), True: (0.3, 0.78),
}  # fmt: skip


def rate(cell: Cell) -> float:
    """Examples a second at the roofline; 0 where it does not fit."""
    return cell.batch_size / cell.roofline.seconds if cell.fits and cell.roofline and cell.roofline.seconds else 0.0


def rank(cell: Cell) -> tuple[float, ...]:
    """Less is better: what fits before what does not; then the rate; then few changes, and none of the batch size."""
    if not cell.fits:
        return (1, bool(cell.refusal), cell.over, len(cell.changes))
    speed = round(math.log(rate(cell)) / math.log1p(CLOSE)) if rate(cell) else 0
    return (0, -speed, "data.batch_size" in cell.changes, len(cell.changes))


def search(
    config: Mapping[str, Any],
    target: Target,
    most: int = 12,
    *,
    measure: Measure = cells.cell,
    told: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Compile what seems best, up to `most` times.

    The first half goes to meshes, with the config's own batch, where any is expected to be nearly as good. A batch size
    changes what a run learns: it stands among the `changes` of a cell, so that who reads them can leave it.

    Args:
      config: of a run.
      target: the devices.
      most: cells to compile, at least 1.
      measure: what compiles.
      told: is given each cell, as it is there.

    Returns:
      All of them, best first, by `rank`.
    """
    found = [measure(config, target, {})]
    told(found[0])
    try:
        seen = levers.look(config, target)
    except UserError:  # as that cell says
        return found
    layouts, tried = levers.layouts(seen, target), {_key(found[0].mesh, {})}
    while len(found) < most:
        moves = [move for cell in sorted(found, key=rank)[:2] for move in _moves(cell, seen, layouts, target)]
        moves = [move for move in moves if _key(move.axes, move.changes) not in tried]
        best = min(found, key=rank)
        moves = [move for move in moves if not best.fits or move.expected <= (0, -WORTH * rate(best))]
        of_mesh = [move for move in moves if move.mesh and "data.batch_size" not in move.changes]
        if not moves:
            break
        move = min(of_mesh if of_mesh and len(found) < most / 2 else moves, key=lambda move: move.expected)
        tried.add(_key(move.axes, move.changes))
        found.append(measure(config, target, move.changes))
        told(found[-1])
    return sorted(found, key=rank)


@dataclasses.dataclass(frozen=True)
class _Move:
    """One change of a cell, and what is expected of it: less is better, as in `rank`."""

    changes: dict[str, Any]
    axes: dict[str, int]
    mesh: bool
    expected: tuple[float, float]


def _key(axes: Mapping[str, int], changes: Mapping[str, Any]) -> str:
    """The same for the same mesh, whether a config names it or "auto" chose it."""
    others = {key: value for key, value in changes.items() if not key.startswith("mesh.")}
    return f"{sorted(axes.items())} {sorted(others.items())}"


def _moves(cell: Cell, seen: Look, layouts: Sequence[Layout], target: Target) -> Iterator[_Move]:
    """All that one change would make of a cell: another mesh, or a notch more or less of a key."""
    if not cell.mesh and layouts:  # the config's own mesh was refused: any other will do
        for layout in layouts:
            yield _Move(levers.of_layout(seen, layout.axes), layout.axes, True, (0, layout.sent))
        return
    here = next((layout for layout in layouts if layout.axes == cell.mesh), None)
    others = {key: value for key, value in cell.changes.items() if not key.startswith("mesh.")}
    for layout in layouts if here else ():
        if here and layout != here:
            changes = {**levers.of_layout(seen, layout.axes), **others}
            memory = 1.5 * (layout.state - here.state)  # with gradients, which are a third of Adam's state
            yield _Move(changes, layout.axes, True, _expected(cell, target, memory, layout.sent - here.sent))
    for key, value, left, speed in _notches(cell, seen):
        memory = (left - 1) * cell.activations
        changes = {**cell.changes, key: value}
        if value == seen.values[key]:
            del changes[key]
        yield _Move(changes, dict(cell.mesh), False, _expected(cell, target, memory, speed=speed))


def _notches(cell: Cell, seen: Look) -> Iterator[tuple[str, Any, float, float]]:
    """(key, value, what is left of activations, factor of the rate) of each notch that a key can move."""
    own = {**seen.values, **cell.changes}
    parts, micro = cell.mesh["data"] * cell.mesh["fsdp"], own["train.microbatches"]
    for value in seen.remats:
        left, speed = (a / b for a, b in zip(_REMAT[value], _REMAT.get(own["model.remat"], (1.0, 1.0))))
        if value != own["model.remat"]:
            yield "model.remat", value, left, speed
    for value in seen.chunks(cell.mesh, cell.batch_size):
        if value != own["loss.chunks"] and 1 in (value, own["loss.chunks"]):
            yield "loss.chunks", value, 0.8 if value > 1 else 1.25, 0.98 if value > 1 else 1.02
    for value, left, speed in ((micro * 2, 0.5, 0.98), (micro // 2, 2.0, 1.02)):
        if value and cell.batch_size % (value * parts) == 0:
            yield "train.microbatches", value, left, speed
    for value, left, speed in ((cell.batch_size * 2, 2.0, 1.03), (cell.batch_size // 2, 0.5, 0.97)):
        if value and value % (micro * parts) == 0:
            yield "data.batch_size", value, left, speed


def _expected(
    cell: Cell, target: Target, memory: float, seconds: float = 0.0, speed: float = 1.0
) -> tuple[float, float]:
    """What a cell would be with more bytes on a device, more seconds of sending, or another speed: less is better."""
    if cell.memory is None:
        return (1, math.inf)
    over = cell.memory.peak + memory - (cell.memory.limit or math.inf)
    if over > 0:
        return (1, over)
    peak = max(target.chip.peak.values()) * len(target.devices)
    now = cell.roofline.seconds if cell.roofline else cell.flops / peak
    return (0, -(cell.batch_size / max(now + seconds, cell.flops / peak)) * speed)


def largest_batch(config: Mapping[str, Any], target: Target, most: int = 8, *, measure: Measure = cells.cell) -> int:
    """The largest batch that fits, on the mesh that the config has with its own.

    Memory is nearly linear in the batch: a line through what was compiled says what is compiled next, until a batch
    that fits and one that does not are within a sixteenth, or next to each other.

    Args:
      config: of a run.
      target: the devices.
      most: cells to compile.
      measure: what compiles.

    Returns:
      A batch size that was compiled and fits, at most `FURTHEST` times the config's own; 0 if none does, or if the
      config is refused.
    """
    first = measure(config, target, {})
    if first.memory is None:
        return 0
    mesh = {f"mesh.{axis}": size for axis, size in first.mesh.items()}
    own = {key: value for key, value, _ in sections.resolved(config)}
    unit = first.mesh["data"] * first.mesh["fsdp"] * own["train.microbatches"]
    size, peaks = first.batch_size, {0: first.memory.peak - first.activations - first.memory.batch}
    peaks[size] = first.memory.peak
    fits, fails = (size, size * FURTHEST + unit) if first.fits else (0, size)
    for number in range(1, most):
        grain = _grain(fits or fails, unit)
        if fails - fits <= grain:
            break
        guess = _on_line(peaks, first.memory.limit) if number <= most // 2 else (fits + fails) // 2
        size = min(max(guess // grain * grain, fits + unit), fails - min(grain, fails - fits - unit))
        cell = measure(config, target, {**mesh, "data.batch_size": size})
        fits, fails = (size, fails) if cell.fits else (fits, size)
        if cell.memory is not None:
            peaks[size] = cell.memory.peak
    return fits


def _grain(size: int, unit: int) -> int:
    """A power of two times `unit`, of about a sixteenth of a batch: round sizes compile faster, and run faster."""
    return unit * 2 ** max(int(math.log2(size / unit * EXACT)), 0) if size >= unit else unit


def _on_line(peaks: Mapping[int, int], limit: int | None) -> int:
    """Where a line through the peaks of two batches, those next to the limit, meets it."""
    below = sorted(size for size, peak in peaks.items() if limit is None or peak <= limit)
    above = sorted(size for size, peak in peaks.items() if limit is not None and peak > limit)
    near = [*below[-2:], *above[:2]]
    a, b = (below[-1], above[0]) if below and above else near[:2]
    if limit is None or peaks[b] <= peaks[a]:
        return 8 * max(peaks)  # it does not seem to grow
    return int(a + (limit - peaks[a]) * (b - a) / (peaks[b] - peaks[a]))
