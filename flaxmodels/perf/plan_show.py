"""A plan as a table for a terminal, and as JSON.

Read `lines`: one table, a column for each machine, then a sentence for each that needs a change.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.console import MAX_WIDTH, duration, human, human_bytes
from flaxmodels.perf.cells import Cell
from flaxmodels.perf.plan import CLASSES, Row, rest
from flaxmodels.perf.remedies import flags
from flaxmodels.perf.roofline import FORMULA

NONE = "-"


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """All of a plan for a terminal, at most `console.MAX_WIDTH` wide but for sentences."""
    table = list(_table(rows))
    label = max(len(name) for name, _ in table)
    width = max(len(text) for _, texts in table for text in texts) + 2
    columns = max((MAX_WIDTH - label) // width, 1)
    for first in range(0, len(rows), columns):
        for name, texts in table:
            line = f"{name:<{label}}" + "".join(f"{text:>{width}}" for text in texts[first : first + columns])
            yield line.rstrip()
        yield ""
    for row in rows:
        yield from sentences(row)
    yield from _terms(rows)


def _table(rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """(label, a text for each machine)."""
    cells = [row.cell for row in rows]
    memories, roofs = [cell.memory for cell in cells], [cell.roofline for cell in cells]
    yield "", [cell.target for cell in cells]
    yield "fits", ["yes" if cell.fits else "refused" if cell.refusal else "no" for cell in cells]
    yield "left of a device", [_left(cell) for cell in cells]
    yield "memory of a device", [human_bytes(found.limit or 0) if found else NONE for found in memories]
    yield "  needed", [human_bytes(found.peak) if found else NONE for found in memories]
    for name, of in {**CLASSES, "the rest": rest}.items():
        yield f"  {name}", [human_bytes(of(cell)) if cell.memory else NONE for cell in cells]
    yield "FLOPs of a step", [human(cell.flops) if cell.roofline else NONE for cell in cells]
    yield "memory traffic of a step", [human_bytes(cell.bytes) if cell.roofline else NONE for cell in cells]
    for kind in dict.fromkeys(row.kind for cell in cells for row in cell.collectives):
        sent = [sum(row.bytes for row in cell.collectives if row.kind == kind) for cell in cells]
        yield f"  {kind}", [human_bytes(size) if size else NONE for size in sent]
    yield "step at the roofline", [_seconds(found.seconds) if found else NONE for found in roofs]
    for part in ("compute", "memory", "network"):
        yield f"  {part}", [_seconds(getattr(found, part)) if found else NONE for found in roofs]
    yield "  bound by", [found.bound if found else NONE for found in roofs]
    yield "  MFU", [f"{found.mfu:.0%}" if found else NONE for found in roofs]
    yield from _rates(cells)
    yield "expected of it", [f"{row.efficiency:.0%}" if row.cell.roofline else NONE for row in rows]
    yield from _costs(rows, cells)
    yield from _meshes("mesh: ", cells)
    yield "batch", [f"{cell.batch_size:,}" if cell.batch_size else NONE for cell in cells]
    yield "largest batch", [_batch(row) for row in rows]
    if any(row.ranked for row in rows):
        best = [row.found or row.cell for row in rows]
        yield "best found", [f"of {len(row.ranked)}" if row.ranked else NONE for row in rows]
        yield from _meshes("  mesh: ", best)
        yield "  batch", [f"{cell.batch_size:,}" if cell.fits else NONE for cell in best]
        yield from _rates(best)
        yield from _costs(rows, best)


def _rates(cells: Sequence[Cell]) -> Iterator[tuple[str, list[str]]]:
    what = "tokens" if any(cell.tokens for cell in cells) else "examples"
    found = [cell.roofline and getattr(cell.roofline, f"{what}_per_second") for cell in cells]
    yield f"  {what}/s", [human(rate) if rate else NONE for rate in found]


def _costs(rows: Sequence[Row], cells: Sequence[Cell]) -> Iterator[tuple[str, list[str]]]:
    pairs = list(zip(rows, cells, strict=True))
    yield "  time of the run", [spent(row.hours(cell)) for row, cell in pairs]
    yield "  USD of the run", [money(row.usd(cell)) for row, cell in pairs]


def _left(cell: Cell) -> str:
    if cell.memory is None or cell.memory.limit is None:
        return NONE
    left = cell.memory.limit - cell.memory.peak
    return f"{left / cell.memory.limit:.0%}" if left >= 0 else f"-{human_bytes(-left)}"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-4
        else f"{1e6 * seconds:.3g} us"
    )


def spent(hours: float | None) -> str:
    """A time in words: "1.4 s", "2h 03m"; "-" for None."""
    return NONE if hours is None else duration(3600 * hours) if hours > 1 / 60 else _seconds(3600 * hours)


def money(usd: float | None) -> str:
    """US dollars: "1,234", "0.56", "< 0.01"; "-" for None."""
    return NONE if usd is None else f"{usd:,.0f}" if usd >= 100 else f"{usd:.2f}" if usd >= 0.01 else "< 0.01"


def _meshes(label: str, cells: Sequence[Cell]) -> Iterator[tuple[str, list[str]]]:
    """A line for each axis that some mesh has; devices of one axis are a narrow column."""
    for axis in dict.fromkeys(axis for cell in cells for axis, size in cell.mesh.items() if size > 1):
        yield label + axis, [str(cell.mesh[axis]) if cell.mesh else NONE for cell in cells]


def _batch(row: Row) -> str:
    return NONE if not row.largest_batch else f"{row.largest_batch:,}" if row.proved else f"~{row.largest_batch:,}"


def sentences(row: Row) -> Iterator[str]:
    """What to know of a machine beside its column: why it is refused, what would fit, what a search found."""
    cell, fix = row.cell, row.remedy
    if cell.refusal:
        yield f"{cell.target}: refused: {cell.refusal}"
    elif cell.changes:
        yield f"{cell.target}: the config's own mesh is for another number of devices; this is {flags(cell.changes)}."
    if cell.memory and not cell.fits:
        needs = f"needs {human_bytes(cell.memory.peak)} of each device, which has {human_bytes(cell.memory.limit or 0)}"
        done = "none of the changes that were tried fits"
        if fix and fix.memory:
            done = f"it fits with {flags(fix.changes)}: {human_bytes(fix.memory.peak)}, compiled like the first"
        yield f"{cell.target}: does not fit: it {needs}; {done}."
    if row.found and row.found.changes and row.found.fits:
        yield f"{cell.target}: best of {len(row.ranked)} that were compiled: {flags(row.found.changes)}"
    if row.found and row.found is not row.ranked[0]:
        yield f"{cell.target}: faster with another batch, which learns differently: {flags(row.ranked[0].changes)}"
    for note in cell.notes:
        yield f"{cell.target}: {note}"


def _terms(rows: Sequence[Row]) -> Iterator[str]:
    """What the numbers stand on."""
    yield "the rest: the program, padding, what the compiler keeps; less than 0 where temporaries share memory."
    if any(row.largest_batch and not row.proved for row in rows):
        yield "~: an estimate, from what each example adds to the memory of a device; --search proves it by compiling."
    yield "time and USD: of train.duration, at the part of the roofline that is expected; of steps alone."
    kind = "spot" if rows and rows[0].spot else "on demand"
    dates = {
        row.chip: row.price.date for row in rows if (row.price.spot if row.spot else row.price.on_demand) is not None
    }
    if dates:
        said = ", ".join(f"{chip} of {date}" if date else f"{chip} of your file" for chip, date in dates.items())
        yield f"prices: {kind}, {said}; yours: --prices=FILE."
    yield f"{FORMULA}."


def record(row: Row) -> dict[str, Any]:
    """One machine for a program, ready for JSON."""
    best = row.best
    return {
        **row.cell.to_json(),
        "chip": row.chip,
        "chips": row.chips,
        "efficiency": row.efficiency,
        "price": {"on_demand": row.price.on_demand, "spot": row.price.spot, "date": row.price.date},
        "hours": row.hours(row.cell),
        "usd": row.usd(row.cell),
        "largest_batch": row.largest_batch,
        "largest_batch_proved": row.proved,
        "remedy": row.remedy and row.remedy.to_json(),
        "ranked": [cell.to_json() for cell in row.ranked],
        "best": {"changes": best.to_json()["changes"], "hours": row.hours(best), "usd": row.usd(best)},
    }


def save(rows: Sequence[Row], path: Path) -> None:
    """Write a list of `record`s, as JSON."""
    path.write_text(json.dumps([record(row) for row in rows], indent=1) + "\n")
