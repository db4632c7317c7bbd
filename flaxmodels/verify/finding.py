"""What `flaxmodels doctor` finds, and how it is shown: a table in a terminal, a line each in a pipe, or JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import IO, Literal, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flaxmodels.console import SafeStream

Level = Literal["ok", "warning", "problem"]
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      what: such as "storage".
      level: "problem" keeps a run from starting, from going on, or from being safe; "warning" may well be meant.
      text: what was found.
      fix: what to do about it; "" where nothing is to be done.
    """

    what: str
    level: Level
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what:<15} {self.text}{f' Fix: {self.fix}' if self.fix else ''}"


def ok(what: str, text: str) -> Finding:
    """All is well."""
    return Finding(what, "ok", text)


def warning(what: str, text: str, fix: str) -> Finding:
    """It works, and may not be what is wanted."""
    return Finding(what, "warning", text, fix)


def problem(what: str, text: str, fix: str) -> Finding:
    """It does not work, or loses something."""
    return Finding(what, "problem", text, fix)


def verdict(findings: Sequence[Finding]) -> str:
    """All of them in one line."""
    counts = [(sum(found.level == level for found in findings), level) for level in ("problem", "warning")]
    said = [f"{count} {level}{'s' * (count > 1)}" for count, level in counts if count]
    return " and ".join(said) or f"nothing is wrong: {len(findings)} checks"


def show(findings: Sequence[Finding], stream: TextIO) -> None:
    """Print them, and the verdict."""
    safe = SafeStream(stream)
    if not stream.isatty():
        safe.write("".join(f"{line}\n" for line in [*map(str, findings), verdict(findings)]))
        safe.flush()
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in findings:
        fix = Text.assemble("\n", ("fix: ", "dim"), found.fix) if found.fix else Text()
        cells = Text(found.level, STYLES[found.level]), Text(found.what, "dim"), Text.assemble(found.text, fix)
        table.add_row(*cells)
    console = Console(file=cast(IO[str], safe), highlight=False)
    console.print(table, Text(f"\n{verdict(findings)}"))


def write_json(findings: Sequence[Finding], stream: TextIO) -> None:
    """A line of JSON each."""
    for found in findings:
        stream.write(json.dumps(dataclasses.asdict(found)) + "\n")
