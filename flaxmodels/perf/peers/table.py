"""What `bench` found of peers, for the eye; `bench_show` prints and draws it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flaxmodels.perf import timing
from flaxmodels.perf.bench_picture import Bar
from flaxmodels.perf.bench_show import View
from flaxmodels.perf.peers import judging
from flaxmodels.perf.peers.works import OURS, WORKS

Row = Mapping[str, Any]
CLOCKS = {"cpu": "CPU time", "wall": "wall time"}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each work, and what is to be said of it."""
    for work in dict.fromkeys(row["work"] for row in rows):
        yield from _work(work, [row for row in rows if row["work"] == work])
        yield ""


def _work(work: str, rows: Sequence[Row]) -> Iterator[str]:
    there = [row for row in rows if "left_out" not in row]
    ours = next(row for row in there if row["peer"] == OURS)
    many = f"{ours['cores']} core{'s' * (ours['cores'] > 1)}, {ours['rounds']} rounds"
    yield f"{work}: {WORKS[work].says}"
    yield f"{many}; milliseconds of a step, medians and how far apart their quartiles are\n"
    width = max(len(row["says"]) for row in there)
    unit = f"{'epoch':>10}" if "unit_seconds" in ours else ""
    yield f"  {'':<{width}}{'CPU time':>15}{'wall time':>15}{unit}{'loss':>8}   ours by theirs"
    for row in there:
        numbers = "".join(f"{row[f'{kind}_ms']:>10.3f}{row[f'{kind}_spread']:>5.0%}" for kind in CLOCKS)
        epoch = f"{row['unit_seconds']:>8.3f} s" if unit else ""
        yield f"  {row['says']:<{width}}{numbers}{epoch}{row['loss']:>8.3f}   {_ratio(row)}".rstrip()
    yield ""
    if any(row["refused"] for row in there):
        yield (
            f"not judged: this takes a spread of the rounds' ratios of at most {timing.SPREAD:.0%}, for wall time "
            f"{judging.FEWEST} quiet\nrounds, and losses and numbers of parameters that agree"
        )
    if "over_bare_us" in ours:
        low, middle, high = ours["over_bare_us"]
        yield (
            f"fit over its own compiled step: {middle:+.1f} us of a step ({ours['over_bare']:+.1%}), "
            f"half of the rounds {low:+.1f} to {high:+.1f} us"
        )
    if ours["compiles"] is not None:
        yield f"programs compiled after the warm-up of ours: {ours['compiles']}"
    if any(row["others"] is not None for row in there):
        busy, quiet = max(row["others"] or 0 for row in there), min(row["quiet"] for row in there)
        yield f"others used up to {busy:.0%} of these cores; {quiet} of {ours['rounds']} rounds were quiet"
    versions = {name: version for row in there for name, version in row["versions"].items()}
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    for row in rows:
        if "left_out" in row:
            yield f"{row['says']}: {row['left_out']}"


def _ratio(row: Row) -> str:
    if row["refused"]:
        return f"not judged: {row['refused']}"
    if row["peer"] == OURS:
        return ""
    alike = ", alike" if abs(row["ratio"] - 1) < timing.ALIKE else ""
    return f"{row['ratio']:.2f} x {row['ratio_spread']:.0%} by {CLOCKS[row['by']]}{alike}"


def _bar(row: Row) -> Bar:
    name = f"{row['work']}: {row['says']}"
    if "left_out" in row:
        return Bar(name, {"": 0.0}, 0.0, "left out")
    if not row["ratio"] or row["refused"]:
        return Bar(name, {"": 0.0}, 0.0, "not judged")
    times = 1 / row["ratio"]
    return Bar(name, {"": times}, times, f"{times:.2f}")


VIEW = View(lines, lambda rows: ("the same work in other libraries", "time, ours as users call it is 1"), _bar)
