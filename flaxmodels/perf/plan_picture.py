"""plan.png: what a config takes of each machine, memory, time and money side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxmodels.console import human_bytes
from flaxmodels.curves import GREY, canvas
from flaxmodels.perf.plan import CLASSES, Row, rest
from flaxmodels.perf.plan_show import money, spent

COLORS = ("#3b6fb6", "#7aa6dc", "#b9c4d0", "#d9622b", "#f0a35e", "#dadce0")
ROOFS = {"compute": "#3b6fb6", "memory": "#f0a35e", "network": "#7b9e5f"}
GIB = 2**30


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw three panels over the machines: memory of a device by class, time of a step by bound, money of the run.

    Args:
      rows: of a plan, at least one.
      path: the PNG to write.

    Raises:
      OSError: the file can't be written.
    """
    with canvas(14, 2.2 + 0.45 * max(len(rows), 3)) as figure:
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1.4, 1.2, 1))
        _memory(left, rows)
        _times(middle, rows)
        _money(right, rows)
        left.set_yticks(range(len(rows)), [row.cell.target for row in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        figure.savefig(path, format="png")


def _memory(axes: Any, rows: Sequence[Row]) -> None:
    """As shares of a device, so that small and large ones stand side by side; the whole at 100 %."""
    classes = {**CLASSES, "the rest": lambda cell: max(rest(cell), 0)}
    start = [0.0] * len(rows)
    for (name, of), color in zip(classes.items(), COLORS):
        sizes = [100 * of(row.cell) / _limit(row) for row in rows]
        axes.barh(range(len(rows)), sizes, left=start, height=0.62, color=color, label=name)
        start = [a + b for a, b in zip(start, sizes)]
    axes.set_xlim(0, 1.6 * max(start) or 1)
    if max(start) > 50:
        axes.axvline(100, color="#c5221f", linewidth=1)
    for i, row in enumerate(rows):
        memory, cell = row.cell.memory, row.cell
        said = "refused" if memory is None else f"{human_bytes(memory.peak)} of {human_bytes(_limit(row))}"
        said += "" if cell.fits or cell.refusal else ": does not fit"
        axes.text(
            start[i] + 0.02 * axes.get_xlim()[1],
            i,
            said,
            va="center",
            fontsize=9,
            color="#202124" if cell.fits else "#c5221f",
        )
    _dress(axes, "memory of a device, %")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _limit(row: Row) -> int:
    return (row.cell.memory and row.cell.memory.limit) or 1


def _times(axes: Any, rows: Sequence[Row]) -> None:
    """Three bars a machine: the longest bounds the step."""
    longest = 0.0
    for number, (name, color) in enumerate(ROOFS.items()):
        lines = [row.best.roofline for row in rows]
        sizes = [1e3 * getattr(line, name) if line else 0 for line in lines]
        places = [i + 0.22 * (number - 1) for i in range(len(rows))]
        axes.barh(places, sizes, height=0.2, color=color, label=name)
        longest = max(longest, *sizes)
    for i, row in enumerate(rows):
        if line := row.best.roofline:
            said = f"{1e3 * line.seconds:.3g} ms, MFU {line.mfu:.0%}"
            axes.text(1e3 * line.seconds + 0.02 * longest, i, said, va="center", fontsize=9, color="#202124")
    axes.set_xlim(0, 1.5 * longest or 1)
    _dress(axes, "a step at the roofline, ms")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _money(axes: Any, rows: Sequence[Row]) -> None:
    costs = [row.usd(row.best) for row in rows]
    axes.barh(range(len(rows)), [cost or 0 for cost in costs], height=0.62, color=COLORS[0])
    longest = max((cost or 0 for cost in costs), default=0)
    for i, (row, cost) in enumerate(zip(rows, costs)):
        hours = row.hours(row.best)
        said = "" if hours is None else f"{spent(hours)}, " + ("no price" if cost is None else f"{money(cost)} USD")
        axes.text((cost or 0) + 0.02 * longest, i, said, va="center", fontsize=9, color="#202124")
    axes.set_xlim(0, 1.7 * longest or 1)
    _dress(axes, "the run as expected, USD")


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", color="#202124")
    axes.grid(True, axis="x", color="#e4e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=9, color=GREY, labelcolor="#202124", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bdc1c6")
