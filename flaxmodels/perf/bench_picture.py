"""A picture of what a bench found: a bar for each row, in parts where it has them, and a whisker to the worst."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels.curves import GREY, canvas

# One for each part; the first for what is whole.
COLORS = ("#3b6fb6", "#7aa6dc", "#d9622b", "#f0a35e", "#7b9e5f", "#b9c4d0", "#8e6bb0", "#c9a227", "#5f6368", "#dadce0")
_TEXT = "#202124"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
      name: beside it.
      parts: name -> how long; one that is called "" is the whole.
      most: where its whisker ends, which is left out where the bar is longer.
      said: behind it.
      least: where a dashed line crosses it, if anywhere.
    """

    name: str
    parts: Mapping[str, float]
    most: float
    said: str
    least: float | None = None


def draw(title: str, unit: str, bars: Sequence[Bar], path: Path) -> None:
    """Draw the bars below each other, 1000 pixels wide.

    Args:
      title: of the picture.
      unit: of its axis.
      bars: at least one.
      path: the PNG to write.

    Raises:
      OSError: the file can't be written.
    """
    names = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    labelled = [part for part in names if part]
    with canvas(10, 1.3 + 0.5 * len(bars) + 0.5 * bool(labelled)) as figure:
        axes = figure.subplots()
        longest = max(max(sum(bar.parts.values()), bar.most) for bar in bars)
        for i, bar in enumerate(bars):
            end = 0.0
            for part, length in bar.parts.items():
                axes.barh(i, length, left=end, height=0.6, color=COLORS[names.index(part) % len(COLORS)])
                end += length
            if bar.most > end:
                axes.plot([end, bar.most], [i, i], color=GREY, linewidth=1.2, marker="|", markevery=[1])
            if bar.least is not None:
                axes.plot([bar.least] * 2, [i - 0.4, i + 0.4], color="#c5221f", linewidth=1.5, linestyle=(0, (3, 1)))
            axes.text(max(end, bar.most) + 0.01 * longest, i, bar.said, va="center", fontsize=9, color=_TEXT)
        axes.set_xlim(0, 1.3 * longest or 1)
        axes.set_yticks(range(len(bars)), [textwrap.fill(bar.name, 36) for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_title(title, fontsize=12, fontweight="bold", loc="left", color=_TEXT)
        axes.set_xlabel(unit, fontsize=10, color=GREY)
        axes.grid(True, axis="x", color="#e4e6e9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, color=GREY, labelcolor=_TEXT, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#bdc1c6")
        handles = [axes.barh(0, 0, color=COLORS[names.index(part) % len(COLORS)], label=part) for part in labelled]
        if handles:
            figure.legend(handles=handles, frameon=False, fontsize=9, ncols=8, loc="outside lower center")
        figure.savefig(path, format="png")
