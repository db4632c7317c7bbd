"""What a checkpoint holds, and how two differ, as tables for the eye."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxmodels import console

if TYPE_CHECKING:
    from flaxmodels.shelf import Entry
    from flaxmodels.tensors import Difference, Statistics

KINDS = ("params", "extra", "opt_state", "step")
Fact = tuple[str, str, Any, Any]  # kind, name, value of A, value of B


def when(seconds: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def show(display: console.Display, entry: "Entry", problems: Sequence[str], rows: "Sequence[Statistics]") -> None:
    """Show what the manifest of a checkpoint says, whether its files are as it says, and its arrays."""
    state = [("", "files", problem) for problem in problems] or [("", "files", "whole")]
    display.table(str(entry), ("", "", ""), [*state, *_facts(entry)], ())
    for kind in KINDS:
        _show_arrays(display, kind, [row for row in rows if row.path.startswith(f"{kind}/")])


def _show_arrays(display: console.Display, kind: str, rows: "Sequence[Statistics]") -> None:
    """Two tables, which fit a window: what the arrays are, and what is in them."""
    if not rows:
        return
    names = [row.path.removeprefix(f"{kind}/") for row in rows]
    sizes = [console.human_bytes(row.leaf.nbytes) for row in rows]
    arrays = [(name, str(row.leaf.shape), row.leaf.dtype, size) for name, row, size in zip(names, rows, sizes)]
    total = ("total", "", "", console.human_bytes(sum(row.leaf.nbytes for row in rows)))
    display.table(f"{kind}: arrays", ("path", "shape", "dtype", "size"), arrays, total)
    values = [
        (name, *(_number(x, row.leaf.dtype) for x in (row.mean, row.std, row.low, row.high)), str(row.non_finite))
        for name, row in zip(names, rows)
    ]
    display.table(f"{kind}: values", ("path", "mean", "std", "min", "max", "not finite"), values, ())


def _facts(entry: "Entry") -> Iterator[tuple[str, str, str]]:
    """(group, name, value) of all that its manifest says, the config aside."""
    yield "", "saved", f"{when(entry.saved)}, after {console.duration(entry.facts.get('seconds', 0.0))} of training"
    yield "", "size", console.human_bytes(entry.nbytes)
    groups = {key: value for key, value in entry.facts.items() if key not in ("meta", "time", "step", "seconds")}
    groups |= {key: value for key, value in entry.meta.items() if key != "config"}
    yield from (("", key, _text(value)) for key, value in groups.items() if not isinstance(value, dict))
    for group, values in groups.items():
        if isinstance(values, dict):
            yield from ((group, key, _text(value)) for key, value in values.items())


def _number(value: float, dtype: str) -> str:
    return f"{value:.10g}" if "int" in dtype else console.number(value)


def _text(value: Any) -> str:
    """A fact for the eye."""
    if value in (None, "", [], {}):
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def facts_that_differ(a: "Entry", b: "Entry") -> Iterator[Fact]:
    """In what two checkpoints differ beside their arrays."""
    for kind in ("config", "data", "versions"):
        yield from ((kind, *row) for row in _unlike(a.meta.get(kind, {}), b.meta.get(kind, {})))
    names = ("mesh", "processes", "platform", "git", "watched")
    yield from (("run", *row) for row in _unlike(*({n: e.facts.get(n) for n in names} for e in (a, b))))


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)]


def ranked(rows: "Sequence[Difference]") -> "list[Difference]":
    """Those that differ: parameters first, and of each kind those that differ most."""
    return sorted((row for row in rows if not row.same), key=lambda row: (KINDS.index(row.kind), -row.relative))


def show_difference(
    display: console.Display,
    pair: "tuple[Entry, Entry]",
    facts: Sequence[Fact],
    lines: Sequence[str],
    rows: "Sequence[Difference]",
    most: int | None,
) -> None:
    """Show how two checkpoints differ.

    Args:
      display: where.
      pair: A and B.
      facts: of `facts_that_differ`.
      lines: on arrays that can't be compared.
      rows: on those that can.
      most: of these to show; None shows all that differ.
    """
    display.line(f"A: {pair[0]}\nB: {pair[1]}")
    if facts:
        cells = [(kind, name, _text(x), _text(y)) for kind, name, x, y in facts]
        display.table("what they came from", ("", "", "A", "B"), cells, ())
    else:
        display.line("config, data and versions are the same")
    for line in lines:
        display.line(line)
    differ = ranked(rows)
    if shown := differ[:most]:
        cells = [
            (row.path, str(row.leaf), console.number(row.absolute), console.number(row.relative)) for row in shown
        ]  # fmt: skip
        more = "" if len(shown) == len(differ) else f", the first {len(shown)}"
        display.table(f"tensors that differ{more}", ("path", "", "largest |A - B|", "relative"), cells, ())
    display.line(f"{len(rows) - len(differ)} of {len(rows)} tensors in both are the same, bit for bit")
