"""What a run shows: plain aligned lines in a pipe, a live line and tables in a terminal.

`open_display` picks one of the two `Display`s; `writers.Writers` is the caller. Read `Pipe` first.
"""

import abc
import contextlib
import errno
import itertools
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

RATE = "perf/examples_per_second"
# What a narrow window loses first.
KEEP = ("rate", "perplexity", "accuracy", "loss", "eta", "step")
# A wider line would wrap, and leave its first half behind, whenever a window is made a little smaller.
MAX_WIDTH = 100
Values = Mapping[str, float]


def human(number: float) -> str:
    """Three significant digits and a unit prefix: 1234567 -> "1.23M", 51234 -> "51.2k", 7 -> "7"."""
    number, unit = _scale(number, 1000, ("", "k", "M", "G", "T"))
    if not unit:
        return f"{number:.3g}"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def human_bytes(count: float) -> str:
    """Binary units: 1258291 -> "1.2 MiB", 512 -> "512 B"."""
    count, unit = _scale(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def _scale(number: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    for unit in units[:-1]:
        if not abs(number) >= 0.9995 * base or math.isinf(number):  # 999.6 would be shown as "1000"
            return number, unit
        number /= base
    return number, units[-1]


def duration(seconds: float) -> str:
    """The two largest units: 3 -> "3s", 65 -> "1m 05s", 7380 -> "2h 03m", 273600 -> "3d 04h"; not finite: "-"."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    for size, small, large_name, small_name in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{large_name} {whole % size // small:02d}{small_name}"
    return f"{whole}s"


def number(value: float, key: str = "") -> str:
    """A metric for the eye: four significant digits, in at most 9 characters; `perf/` keys get unit prefixes."""
    if key.startswith("perf/"):
        return human(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


class Meter:
    """Steps per second over the last seconds, on the monotonic clock, which starts at the first tick.

    The window is the last 32 samples, at least half a second apart: 16 seconds, or 32 steps where a step
    takes longer. So compile time and a slow hour long ago do not count.
    """

    def __init__(self, start_step: int) -> None:
        self.step = start_step
        self._now, self._due = 0.0, 0.0
        self._samples: deque[tuple[float, int]] = deque(maxlen=32)

    def tick(self, step: int) -> None:
        """Record that `step` was dispatched now. Called every step: it must stay cheap."""
        self.step, self._now = step, time.monotonic()
        if self._now >= self._due or not self._samples:
            self._samples.append((self._now, step))
            self._due = self._now + 0.5

    def rate(self) -> float:
        """Steps per second; NaN before the second tick."""
        if not self._samples:
            return math.nan
        then, step = self._samples[0]
        return (self.step - step) / (self._now - then) if self._now > then else math.nan

    def seconds_left(self, total_steps: int) -> float:
        """Seconds until `total_steps` at the present rate; NaN where the rate is unknown."""
        rate = self.rate()
        return max(0, total_steps - self.step) / rate if rate > 0 else math.nan


class SafeStream:
    """A text stream whose reader may leave: then the output ends, and the program goes on.

    A full disk behind `> log.txt` is waited out: Python keeps the text in the stream's buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.broken = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write, with characters that the stream can't encode as escapes. Never raises OSError."""
        if not self.broken:
            text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            with self._guard():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush. Never raises OSError."""
        if not self.broken:
            with self._guard():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person is watching."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # the stream was closed by its owner
            self.broken = True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN):
                self.broken = True
                self._abandon()

    def _abandon(self) -> None:
        # Python flushes stdout once more at exit, and would turn a run that went well into exit code 120.
        with contextlib.suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)


class Display(abc.ABC):
    """What a run shows, and how fast it goes: the part that a pipe and a terminal share."""

    def __init__(self, stream: SafeStream, total_steps: int, start_step: int, examples_per_step: int) -> None:
        self.stream, self.total_steps, self.examples_per_step = stream, total_steps, examples_per_step
        self.meter = Meter(start_step)

    @abc.abstractmethod
    def line(self, text: str) -> None:
        """Print one permanent line."""

    @abc.abstractmethod
    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> None:
        """Print a table; columns of numbers are aligned to the right. `total` is its last row, or empty."""

    @abc.abstractmethod
    def row(self, step: int, values: Values) -> None:
        """Show what was measured at `step`."""

    def progress(self, step: int, values: Values | None) -> None:
        """`step` was dispatched."""
        self.meter.tick(step)

    @abc.abstractmethod
    def close(self, keep: bool = True) -> None:
        """Stop what moves; `keep` leaves its last state on the screen."""

    def cells(self, step: int, values: Values) -> list[tuple[str, str]]:
        """One row as (name, value): the step, the values, and for a training row the rate and time left."""
        cells = [("step", f"{step:>{len(str(self.total_steps))}}/{self.total_steps}")]
        cells += [(key, f"{number(value, key):<8}") for key, value in values.items()]
        if all(key.startswith("eval/") for key in values):
            return cells
        rate = self.meter.rate() * self.examples_per_step
        if RATE not in values and math.isfinite(rate):
            cells.append((RATE, f"{human(rate):<8}"))
        return [*cells, ("eta", duration(self.meter.seconds_left(self.total_steps)))]


class Pipe(Display):
    """Plain lines for a file, `tee` or `grep`: no escape codes, nothing that moves."""

    def line(self, text: str) -> None:
        """Print one line and flush it."""
        self.stream.write(text + "\n")
        self.stream.flush()

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> None:
        """Print the table as text in columns."""
        lines = [headers, *rows, *([total] if total else [])]
        widths = [max(cell_len(cell) for cell in column) for column in zip(*lines)]
        right = [_is_numeric(column) for column in zip(*rows)] or [False] * len(headers)
        text = [title]
        for cells in lines:
            pads = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths)]
            joined = (pad + cell if r else cell + pad for cell, pad, r in zip(cells, pads, right))
            text.append(("  " + "  ".join(joined)).rstrip())
        self.line("\n".join(text))

    def row(self, step: int, values: Values) -> None:
        """Print one line: `step 200/450  train/loss 0.1234  ...  eta 3s`."""
        self.line("  ".join(f"{name} {value}" for name, value in self.cells(step, values)).rstrip())

    def close(self, keep: bool = True) -> None:
        """Nothing moves in a pipe."""


class _LiveLine(Live):
    """A Live that cleans up after a window became narrower than the line it has drawn.

    Terminals wrap such a line themselves, and rich, which knows of one row, would leave the others behind.
    """

    def __init__(self, drawn: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self._drawn = drawn

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Erase the rows that were wrapped off the line, then draw as rich does."""
        wrapped = max(0, math.ceil(self._drawn() / max(1, self.console.width)) - 1)
        rows = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped
        return [Control(*rows), *super().process_renderables(renderables)]


class Terminal(Display):
    """A live line at the bottom; what is printed while it moves goes above it.

    rich's thread draws four times a second and asks for the width each time, so training never waits for
    the terminal and the window may be resized. NO_COLOR is respected (by rich).
    """

    def __init__(self, stream: SafeStream, total_steps: int, start_step: int, examples_per_step: int) -> None:
        super().__init__(stream, total_steps, start_step, examples_per_step)
        self._values: dict[str, float] = {}
        self._console = Console(file=cast(IO[str], stream), force_terminal=True, highlight=False)
        self._live: _LiveLine | None = None
        self._drawn = 0

    def line(self, text: str) -> None:
        """Print one line above the live line."""
        self._console.print(Text(text), soft_wrap=True)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> None:
        """Print a rich table above the live line."""
        table = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, show_footer=bool(total))
        right = [_is_numeric(column) for column in zip(*rows)] or [False] * len(headers)
        for header, is_right, footer in itertools.zip_longest(headers, right, total, fillvalue=""):
            table.add_column(Text(str(header)), Text(str(footer)), justify="right" if is_right else "left")
        for cells in rows:
            table.add_row(*map(Text, cells))
        self._console.print(table)

    def row(self, step: int, values: Values) -> None:
        """Hand the values to the live line; an evaluation, or a row before there is one, stays as its own line."""
        self._values.update(values)
        if self._live is None or any(key.startswith("eval/") for key in values):
            pairs = self.cells(step, values)
            cells = (Text.assemble((f"{name} ", "dim"), value) for name, value in pairs)
            line = Text("  ").join(cells)
            line.rstrip()
            self._console.print(line, soft_wrap=True)

    def progress(self, step: int, values: Values | None) -> None:
        """Move the live line, which starts here: before the first step there is nothing to show."""
        self.meter.tick(step)
        if values:
            self._values.update(values)
        if self._live is None:
            self._start()

    def close(self, keep: bool = True) -> None:
        """Stop the live line and give the cursor back."""
        if self._live is not None and self._live.is_started:
            self._live.transient = not keep
            self._live.stop()

    def _start(self) -> None:
        # What other code prints (warnings, a user's own print) goes above the live line too, but only where it
        # would have gone to this terminal anyway: `2>errors.log` must get its lines.
        self._live = _LiveLine(
            lambda: self._drawn,
            console=self._console,
            get_renderable=lambda: self,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start(refresh=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live line: as many parts as the width of the window holds, then the bar in what is left."""
        width = min(options.max_width, MAX_WIDTH)
        parts = self._parts()
        while len(parts) > 1 and _width(parts) > width:
            parts.pop(min(parts, key=KEEP.index))
        bar_width = min(40, width - _width(parts) - 2)
        step, *rest = (Text(text, "bold" if name == "step" else "") for name, text in parts.items())
        line = Table.grid(padding=(0, 2))
        line.add_row(step, *([self._bar(bar_width)] if bar_width >= 8 else []), *rest)
        for column in line.columns:
            column.no_wrap = True
        self._drawn = min(width, _width(parts) + (bar_width + 2 if bar_width >= 8 else 0))
        yield line

    def _bar(self, width: int) -> ProgressBar:
        return ProgressBar(total=max(1, self.total_steps), completed=self.meter.step, width=width)

    def _parts(self) -> dict[str, str]:
        values, rate = self._values, self.meter.rate() * self.examples_per_step
        parts = {"step": f"step {self.meter.step:>{len(str(self.total_steps))}}/{self.total_steps}"}
        for name in ("loss", "accuracy", "perplexity"):
            if f"train/{name}" in values:
                parts[name] = f"{name} {number(values[f'train/{name}'])}"
        if math.isfinite(rate):
            parts["rate"] = f"{human(rate)} examples/s"
        return parts | {"eta": f"eta {duration(self.meter.seconds_left(self.total_steps))}"}


def _width(parts: Mapping[str, str]) -> int:
    return sum(map(len, parts.values())) + 2 * (len(parts) - 1)


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(
        re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?[kMGT]?|[\d.]+ [KMGT]?i?B|-|nan|[-+]?inf|", cell) for cell in cells
    )


def open_display(stream: TextIO, total_steps: int, start_step: int, examples_per_step: int) -> Display:
    """A `Terminal` where `stream` is one that can move its cursor, else a `Pipe`."""
    moves = stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    return (Terminal if moves else Pipe)(SafeStream(stream), total_steps, start_step, examples_per_step)
