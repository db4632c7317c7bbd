"""What the benches found, as tables for the eye, and as lines of JSON for programs; `bench_picture` draws it.

Read `show`; `step`, `checkpoint`, `startup` and `data` say what each of them shows.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.console import MAX_WIDTH, human, human_bytes
from flaxmodels.perf import agreement, bench_picture, timing
from flaxmodels.perf.bench_picture import Bar
from flaxmodels.perf.roofline import FORMULA
from flaxmodels.perf.running import STEPS
from flaxmodels.registry import UserError

Row = Mapping[str, Any]
PICTURE, LINES = ".png", (".jsonl", ".json")
# Of the clock on the wall: where a processor gave a step less than this, something else had it.
STARVED = 0.8
# Characters of a heading.
LONG = 24


@dataclasses.dataclass(frozen=True)
class View:
    """How the rows of a bench are shown.

    Attributes:
      table: rows -> lines.
      title: rows -> what a picture of them is headed with, and its unit.
      bar: row -> what it shows.
    """

    table: Callable[[Sequence[Row]], Iterator[str]]
    title: Callable[[Sequence[Row]], tuple[str, str]]
    bar: Callable[[Row], Bar]


def checked(to: Sequence[Path]) -> Sequence[Path]:
    """Files to write, to be asked before anything is measured. UserError: of another kind, or in no folder."""
    for path in to:
        if path.suffix not in (PICTURE, *LINES):
            raise UserError(f"--to={str(path)!r}: expected a name that ends in {PICTURE}, a picture, or {LINES[0]}.")
        if not path.parent.is_dir():
            raise UserError(f"--to={str(path)!r}: there is no folder {str(path.parent)!r}.")
    return to


def show(rows: Sequence[Row], view: View, *, as_json: bool, to: Sequence[Path] = ()) -> None:
    """Print rows, and write the files that are asked for.

    Args:
      rows: of a bench.
      view: of the same bench.
      as_json: print lines of JSON in the place of the table.
      to: of `checked`: a picture (.png), or lines of JSON.
    """
    for line in map(json.dumps, rows) if as_json else view.table(rows):
        print(line, flush=True)
    for path in to:
        if path.suffix == PICTURE:
            bench_picture.draw(*view.title(rows), [view.bar(row) for row in rows], path)
        else:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def columns(names: Sequence[str], lines: Sequence[tuple[str, Sequence[str | None]]]) -> Iterator[str]:
    """A column for each name, as many side by side as a terminal has room for, without lines that say nothing.

    Args:
      names: of the columns; where they are long these are numbered, and the numbers explained.
      lines: (label, a text for each column, or None).
    """
    if len(names) > 1 and max(map(len, names)) > LONG:
        yield from (f"[{number}] {name}" for number, name in enumerate(names, 1))
        yield ""
        names = [f"[{number}]" for number in range(1, len(names) + 1)]
    kept = [(label, [text or "-" for text in texts]) for label, texts in lines if any(texts)]
    label = max(len(name) for name, _ in kept)
    width = max(len(text) for texts in (names, *(texts for _, texts in kept)) for text in texts) + 2
    each = max((MAX_WIDTH - label) // width, 1)
    for first in range(0, len(names), each):
        for name, texts in (("", names), *kept):
            yield f"{name:<{label}}" + "".join(f"{text:>{width}}" for text in texts[first : first + each])
        yield ""


def _step(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    same = {key: len({row[key] for row in rows}) == 1 for key in ("data", "mesh", "batch_size", "steps_per_dispatch")}
    said = (first["data"], f"batches of {first['batch_size']}", f"on {first['mesh']}", f"{first['turns']} turns")
    yield ", ".join(text for text, key in zip(said, ("data", "batch_size", "mesh", "turns")) if same.get(key, True))
    yield ""

    def line(label: str, key: str, text: Callable[[Any], str]) -> tuple[str, list[str | None]]:
        shown = not same.get(key, False)
        return label, [None if row.get(key) is None or not shown else text(row[key]) for row in rows]

    def ratio(key: str) -> tuple[str, list[str | None]]:
        steady = [row.get(f"{key}_spread", 0.0) <= timing.SPREAD for row in rows]
        _, texts = line("", key, "{:.2f} x".format)
        return "  by the first", [text if good else "unsteady" for text, good in zip(texts, steady)]

    def many(unit: str) -> Callable[[Any], str]:
        return lambda value: f"{human(value)}{'' if human(value)[-1].isalpha() else ' '}{unit}"

    yield from columns(
        [row["name"] for row in rows],
        [
            line("data", "data", str),
            line("devices", "mesh", str),
            line("batch", "batch_size", str),
            line("steps of a dispatch", "steps_per_dispatch", str),
            line("trace", "trace_seconds", "{:.2f} s".format),
            line("lower", "lower_seconds", "{:.2f} s".format),
            line("compile, cache empty", "compile_seconds", "{:.2f} s".format),
            line("compile, cache full", "cached_seconds", "{:.2f} s".format),
            line("first step", "first_step_ms", "{:.1f} ms".format),
            line("step", "step_ms", "{:.3f} ms".format),
            line("  95 % within", "p95_ms", "{:.3f} ms".format),
            line("  spread of the turns", "spread", "{:.0%}".format),
            ratio("ratio"),
            line("CPU time of a step", "cpu_ms", "{:.3f} ms".format),
            line("  spread of the turns", "cpu_spread", "{:.0%}".format),
            ratio("cpu_ratio"),
            line("to submit a dispatch", "dispatch_us", "{:.0f} us".format),
            line("examples/s", "examples_per_second", human),
            line("tokens/s", "tokens_per_second", human),
            line("FLOPs of a step", "model_flops", human),
            line("FLOP/s", "flops_per_second", human),
            line("MFU", "mfu", "{:.1%}".format),
            line("roofline", "roofline_ms", "{:.3f} ms".format),
            line("  bound by", "bound", str),
            line("  reached", "roofline_fraction", "{:.1%}".format),
            line("memory, as compiled", "compiled_bytes", human_bytes),
            line("energy of a step", "joules", many("J")),
            line(f"loss of step {STEPS}", "loss", "{:.6g}".format),
        ],
    )
    for row in rows[1:]:
        yield f"{row['name']} against {first['name']}: {row['verdict']}."
    yield from _agreement(rows)
    yield from _unsteady(rows)
    yield f"Peak memory: {human_bytes(first['peak_bytes'])} {first['peak_of']}{', of all together' * (len(rows) > 1)}."
    yield f"{first['energy'][0].upper()}{first['energy'][1:]}."
    if first["mfu"] is not None:
        yield f"{FORMULA}; the peak is that of {first['chip']}."
    yield from dict.fromkeys(f"{note}." for row in rows for note in row["notes"])


def _unsteady(rows: Sequence[Row]) -> Iterator[str]:
    """What not to believe."""
    for row in rows:
        if row["spread"] > timing.SPREAD:
            cpu = f", {row['cpu_spread']:.0%} by CPU time" if row["platform"] == "cpu" else ""
            yield (
                f"The turns of {row['name']} are {row['spread']:.0%} apart by the clock{cpu}: what is more than "
                f"{timing.SPREAD:.0%} is not to be quoted."
            )
    if any(row["platform"] == "cpu" and row["cpu_ms"] < STARVED * row["step_ms"] for row in rows):
        yield "Steps took longer by the clock than they had of the processor: other programs had it, or nothing to do."


def _agreement(rows: Sequence[Row]) -> Iterator[str]:
    """Relative differences of ways; nothing where there is nothing to compare."""
    found = [(row, one) for row in rows for one in row["agreement"]]
    if not found:
        return
    yield f"\nrelative differences in the first {STEPS} steps\n"
    yield f"{'':<12}{'against':<12}{'loss':>10}{'grad norm':>12}{'parameters':>12}{'others':>10}"
    for row, one in found:
        numbers = f"{one['loss']:>10.1e}{one['grad_norm']:>12.1e}{one['params']:>12.1e}{one['extra']:>10.1e}"
        equal, meant = one["equal"], agreement.meant(row, one)
        verdict = "equal up to rounding" if equal else "by design" if meant else "DIFFERENT"
        yield f"{row['name']:<12}{one['against']:<12}{numbers}  {verdict}"
    yield ""
    for reason in found[0][0]["by_design"]:
        yield f"{reason}."
    if any(one["against"] == agreement.IN_TURN for _, one in found):
        yield f"{agreement.IN_TURN}: the parts of all devices, one after the other, on one device."


def _seconds(rows: Sequence[Row], more: Sequence[tuple[str, str, Callable[[Any], str]]]) -> Iterator[str]:
    """A line for each row, with its seconds; and what there is `more`: (heading, key, value -> text)."""
    head: list[tuple[str, str, Callable[[Any], str]]] = [
        ("", "name", str), ("seconds", "seconds", "{:.3f}".format), ("slowest", "slowest", "{:.3f}".format),
        ("spread", "spread", "{:.0%}".format), ("CPU seconds", "cpu_seconds", "{:.3f}".format), *more,
    ]  # fmt: skip
    texts = [[name for name, _, _ in head]]
    texts += [["-" if row[key] is None else text(row[key]) for _, key, text in head] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for first, *others in texts:
        yield f"{first:<{widths[0]}}" + "".join(f"{text:>{width + 3}}" for text, width in zip(others, widths[1:]))


def _startup(rows: Sequence[Row]) -> Iterator[str]:
    yield f"seconds since a process was asked for, medians of {rows[0]['rounds']} rounds\n"
    yield from _seconds(rows, ())
    yield ""
    starts = [row for row in rows if row["phases"]]
    phases = [phase for phase in starts[0]["phases"] if any(row["phases"][phase] >= 0.001 for row in starts)]
    names = [row["name"] for row in starts]
    yield from columns(names, [(phase, [f"{row['phases'][phase]:.3f} s" for row in starts]) for phase in phases])


def _checkpoint(rows: Sequence[Row]) -> Iterator[str]:
    yield f"medians of {rows[0]['rounds']} rounds\n"
    size = ("bytes", "bytes", human_bytes)
    speed, ratio = ("GB/s", "gb_per_second", "{:g}".format), ("by a plain file", "ratio", "{:.2f} x".format)
    yield from _seconds(rows, (size, speed, ratio))


def _data(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{rows[0]['data']}, batches of {rows[0]['batch_size']}; median of {rows[0]['turns']} turns\n"
    peer = next((row["peer"] for row in rows if "peer" in row), None)
    yield f"  {'way':<28}{'examples/s':>14}{'slowest':>14}{'fastest':>14}" + (f"   by {peer}" if peer else "")
    for row in rows:
        numbers = "".join(f"{row[key]:>14,}" for key in ("examples_per_second", "slowest", "fastest"))
        ratio = f"{row['ratio']:>9.2f} x" if "ratio" in row else ""
        yield f"{'*' if row['chosen'] else ' '} {row['way']:<28}{numbers}{ratio}"
    yield "\n* the way a run of this config goes"


def _step_bar(row: Row) -> Bar:
    said = f"{row['step_ms']:.3g} ms" + f"; CPU {row['cpu_ms']:.3g} ms" * (row["platform"] == "cpu")
    return Bar(row["name"], {"": row["step_ms"]}, row["p95_ms"], said, row["roofline_ms"])


def _seconds_bar(row: Row) -> Bar:
    parts = {name: took for name, took in row.get("phases", {}).items() if took} or {"": row["seconds"]}
    return Bar(row["name"], parts, row["slowest"], f"{row['seconds']:.3g} s")


def _data_bar(row: Row) -> Bar:
    speed = row["examples_per_second"]
    return Bar(row["way"], {"": speed}, row["fastest"], f"{human(speed)}{' *' * row['chosen']}")


def _step_title(rows: Sequence[Row]) -> tuple[str, str]:
    return f"a step of {rows[0]['data']} on {rows[0]['mesh']}", "ms, to the 95th percentile; dashed: the roofline"


STEP = View(_step, _step_title, _step_bar)
STARTUP = View(_startup, lambda _: ("from the start of a process", "seconds, to the slowest"), _seconds_bar)
CHECKPOINT = View(_checkpoint, lambda _: ("a checkpoint", "seconds, to the slowest"), _seconds_bar)
DATA = View(_data, lambda rows: (f"data: {rows[0]['data']}", "examples a second, to the fastest turn"), _data_bar)
