"""What `flaxmodels prepare` shows: a bar in a terminal, and a line now and then in a pipe."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flaxmodels.console import SafeStream, duration, human, human_bytes

# Seconds between two lines of a pipe, and two looks of a bar.
_EVERY, _EVERY_BAR = 10.0, 0.1
_Progress = Callable[[str, int, int, int], None]


@contextlib.contextmanager
def shown(stream: TextIO) -> Iterator[tuple[_Progress, Callable[[str], None]]]:
    """Two functions: one to call with (what is done, bytes, of how many, tokens), and one that prints a line."""
    safe = SafeStream(stream)
    if not (stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")):
        yield _lines(safe), lambda text: _print(safe, text)
        return
    console = Console(file=cast(TextIO, safe), force_terminal=True)
    columns = TextColumn("{task.description:<9}"), BarColumn(), TextColumn("{task.fields[said]}")
    with Progress(*columns, console=console, transient=True) as bar:
        yield _bar(bar), lambda text: console.print(text, markup=False, highlight=False)


def _print(stream: SafeStream, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _lines(stream: SafeStream) -> _Progress:
    pace, due = _Pace(), 0.0

    def progress(what: str, done: int, total: int, tokens: int) -> None:
        nonlocal due
        if pace.begin(what) or time.monotonic() >= due:
            due = time.monotonic() + _EVERY
            _print(stream, f"{what:<9}  {pace.spell(done, total, tokens)}")

    return progress


def _bar(bar: Progress) -> _Progress:
    pace, task, due = _Pace(), bar.add_task("", said=""), 0.0

    def progress(what: str, done: int, total: int, tokens: int) -> None:
        nonlocal due
        if pace.begin(what) or time.monotonic() >= due:
            due = time.monotonic() + _EVERY_BAR
            said = pace.spell(done, total, tokens)
            bar.update(task, description=what, completed=min(done, total), total=total, said=said)

    return progress


class _Pace:
    """How fast one thing is done, since it began."""

    def __init__(self) -> None:
        self._what, self._start, self._skipped = "", 0.0, 0

    def begin(self, what: str) -> bool:
        """Whether `what` is another thing than before."""
        if what == self._what:
            return False
        self._what, self._start, self._skipped = what, time.monotonic(), 0
        return True

    def spell(self, done: int, total: int, tokens: int) -> str:
        """Bytes of all bytes, tokens a second, and the time that is left."""
        seconds = time.monotonic() - self._start
        if self._what == "encoding" and not tokens:
            self._start, self._skipped = time.monotonic(), done  # what an earlier call did
        parts = [f"{human_bytes(min(done, total))} of {human_bytes(total)}"]
        if seconds > 0.5 and done > self._skipped:
            if tokens:
                parts.append(f"{human(tokens / seconds)} tokens/s")
            left = max(0, total - done) * seconds / (done - self._skipped)
            parts.append(f"eta {duration(left)}")
        return "  ".join(parts)
