"""What a run came to: its best and last metrics, and `curves.png`, drawn from the rows of metrics.jsonl."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels.console import human, number

Rows = Sequence[Mapping[str, float]]
Series = tuple[np.ndarray, np.ndarray]
COLORS = {"train": "#3b6fb6", "eval": "#d9622b"}
GREY = "#5f6368"


def series(rows: Rows, key: str) -> Series:
    """(steps, values) of one metric, both [N] float64, without what is not finite; N may be 0."""
    pairs = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def main_metric(rows: Rows) -> str:
    """The name of the metric beside the loss: accuracy, perplexity, or whatever else was logged; "" if nothing."""
    names = {key.partition("/")[2] for row in rows for key in row if key.startswith(("train/", "eval/"))} - {"loss"}
    known = [name for name in ("accuracy", "perplexity") if name in names]
    return (known + sorted(names) + [""])[0]


def summary(rows: Rows, last: Mapping[str, float], last_step: int) -> list[tuple[str, str, str, str]]:
    """(metric, last value, best value, step of the best) for each train and eval metric, eval first.

    `last` was measured at `last_step` and goes before what `rows` say is last. The best is the highest of an
    accuracy and the lowest of a loss, perplexity or error; "-" for a metric of another name.
    """
    rows = [*rows, {"step": last_step, **last}]
    keys = {key for row in rows for key in row if key in last or key.startswith(("train/", "eval/"))}
    table = []
    for key in sorted(keys, key=lambda key: (not key.startswith("eval/"), not key.startswith("train/"), key)):
        seen = [(row[key], row["step"]) for row in rows if key in row]
        table.append((key, number(seen[-1][0], key), *_best(key, seen)))
    return table


def _best(key: str, seen: Sequence[tuple[float, float]]) -> tuple[str, str]:
    seen = [pair for pair in seen if not math.isnan(pair[0])]
    if seen and "accuracy" in key:
        value, step = max(seen, key=lambda pair: pair[0])
    elif seen and any(word in key for word in ("loss", "perplexity", "error")):
        value, step = min(seen, key=lambda pair: pair[0])
    else:
        return "-", "-"
    return number(value), str(step)


def draw(rows: Rows, path: Path) -> None:
    """Draw the three panels, 1200 x 400 pixels, and put them at `path` in one rename.

    Args:
      rows: one mapping a line of metrics.jsonl, with "step".
      path: the PNG to write.

    Raises:
      ImportError: matplotlib is not there.
      OSError: the file can't be written.
    """
    with canvas(12, 4) as figure:
        left, middle, right = figure.subplots(1, 3)
        metric, rate = main_metric(rows), _learning_rate(rows)
        _panel(left, "loss", {name: series(rows, f"{name}/loss") for name in COLORS})
        _panel(middle, metric or "metric", {name: series(rows, f"{name}/{metric}") for name in COLORS})
        _panel(right, "learning rate", {"": series(rows, rate)})
        tmp = path.with_name(f".{path.name}.tmp")
        try:
            figure.savefig(tmp, format="png")
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """An empty white `matplotlib.figure.Figure`, in hundreds of pixels; what matplotlib has to say is not heard.

    Raises:
      ImportError: matplotlib is not there.
    """
    with _quiet():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        FigureCanvasAgg(figure)  # not pyplot: no window system, and no state shared with the user's own plots
        yield figure


def _learning_rate(rows: Rows) -> str:
    keys = sorted({key for row in rows for key in row if key.rpartition("/")[2] == "learning_rate"})
    return keys[0] if keys else ""


def _panel(axes: Any, title: str, lines: Mapping[str, Series]) -> None:
    lines = {name: line for name, line in lines.items() if len(line[0])}
    for name, (steps, values) in lines.items():
        _line(axes, name, steps, values)
    _dress(axes, title)
    if not lines:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set(xticks=[], yticks=[])
        return
    everything = np.concatenate([values for _, values in lines.values()])
    if everything.min() > 0 and everything.max() > 50 * everything.min() and title != "learning rate":
        axes.set_yscale("log")  # a perplexity falls from tens of thousands to tens
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own moves the power to the top
    if any(lines):
        axes.legend(frameon=False, fontsize=10)


def _line(axes: Any, name: str, steps: np.ndarray, values: np.ndarray) -> None:
    color = COLORS.get(name, GREY)
    window = len(values) // 50
    if name == "train" and window > 1:  # the noise stays visible, behind its running mean
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
        values = _running_mean(values, window)
    marker = "o" if len(values) <= 40 else None
    axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=name)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    # Divided by the number of values that the window holds, so that the ends are not drawn towards zero.
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", color="#202124")
    axes.set_xlabel("step", fontsize=10, color=GREY)
    axes.grid(True, which="major", color="#e4e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=GREY)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: re.sub(r"\.0+(?=\D)", "", human(step)))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bdc1c6")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # matplotlib logs and warns about font caches, home directories and glyphs: none of that is the user's run.
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
