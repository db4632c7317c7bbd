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
        lines = _Lines(safe)
        try:
            yield lines.progress, lines.say
        finally:
            lines.finish()
        return
    console = Console(file=cast(TextIO, safe), force_terminal=True)
    columns = TextColumn("{task.description:<9}"), BarColumn(), TextColumn("{task.fields[said]}")
    with Progress(*columns, console=console, transient=True) as bar:
        yield _bar(bar), lambda text: console.print(text, markup=False, highlight=False)


class _Lines:
    """The first line of each thing that is done, one now and then, and the last."""

    def __init__(self, stream: SafeStream) -> None:
        self._stream, self._pace, self._due = stream, _Pace(), 0.0
        self._waiting: tuple[str, int, int, int] | None = None  # what no line says yet

    def progress(self, what: str, done: int, total: int, tokens: int) -> None:
        """See `shown`."""
        if what != self._pace.what:
            self.finish()
        self._waiting = what, done, total, tokens
        if self._pace.begin(what) or time.monotonic() >= self._due:
            self.finish()

    def finish(self) -> None:
        """Print what waits."""
        if self._waiting is not None:
            what, *counts = self._waiting
            self._due, self._waiting = time.monotonic() + _EVERY, None
            self._print(f"{what:<9}  {self._pace.spell(*counts)}")

    def say(self, text: str) -> None:
        """Print a line, after what waits."""
        self.finish()
        self._print(text)

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


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
        self.what, self._start, self._skipped = "", 0.0, 0

    def begin(self, what: str) -> bool:
        """Whether `what` is another thing than before."""
        if what == self.what:
            return False
        self.what, self._start, self._skipped = what, time.monotonic(), 0
        return True

    def spell(self, done: int, total: int, tokens: int) -> str:
        """Bytes of all bytes, tokens a second, and the time that is left."""
        seconds = time.monotonic() - self._start
        if self.what == "encoding" and not tokens:
            self._start, self._skipped = time.monotonic(), done  # what an earlier call did
        parts = [f"{human_bytes(min(done, total))} of {human_bytes(total)}"]
        if seconds > 0.5 and done > self._skipped:
            if tokens:
                parts.append(f"{human(tokens / seconds)} tokens/s")
            left = (total - done) * seconds / (done - self._skipped)
            parts.append(f"eta {duration(left)}" if left > 0 else f"in {duration(seconds)}")
        return "  ".join(parts)
