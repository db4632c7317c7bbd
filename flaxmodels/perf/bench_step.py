"""One update of a config, computed in several ways: do they agree, and what does each cost?

The ways take turns in one run, so that whatever else the machine does slows all of them alike. Read `bench` first; the
ways are in `ways.py`.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxmodels import registry, sections, sharding
from flaxmodels.job import Job, assemble
from flaxmodels.perf import ways
from flaxmodels.perf.ways import Way

# Each way has so many turns, of so many dispatches at the least, after some that do not count.
TURNS, SHORTEST, SETTLED = 7, 3, 2
# Steps whose results are compared, and dispatches whose batches are made beforehand, to be used over and over.
STEPS = 5
# Relative differences that rounding may make, by the dtype of the computation.
ROUNDING = {"float32": 2e-5, "bfloat16": 2e-2}
IN_TURN = "in turn"


def bench(
    config: Mapping[str, Any],
    compare: Sequence[str] = ("jit", "shard_map", "pmap"),
    seconds: float = 5.0,
    devices: Sequence[jax.Device] | None = None,
) -> list[dict[str, Any]]:
    """Run the update of a config in several ways.

    Args:
      config: of a run, with all its sections. All devices are put on the data axis, whatever its mesh says.
      compare: names of `ways.WAYS`; the first is what the others are measured against.
      seconds: that each way is timed for, all turns together.
      devices: to run on; None takes all there are.

    Returns:
      A row for each way, ready for JSON: "way", "data", "batch_size", "mesh", "compile_seconds", "step_ms" (median of
      all dispatches, by their steps), "p95_ms", "ratio" (median over turns of its time by that of the first way),
      "dispatches" and "turns" (that were timed), "by_design" (why others differ from "jit"), "agreement": for the
      first way, and for the parts in turn, {"against", "steps", "loss", "grad_norm", "params", "extra", "equal"}:
      the largest relative differences in `STEPS` steps, the relative distances of the parameters and of the other
      collections after them, and whether all this is rounding.

    Raises:
      UserError: the config is wrong, or there is no such way.
    """
    makers = {name: registry.pick(ways.WAYS, name, "--compare") for name in compare}
    checked = sections.check(config, lambda text, where: text)
    devices = list(sharding.find_devices(checked["mesh"].get("platform")) if devices is None else devices)
    job = assemble({**config, "mesh": {"data": len(devices)}}, devices)
    reasons, feeds = ways.by_design(job), _feeds(job)
    runs = {name: Run(make(job), feeds) for name, make in makers.items()}
    results = {name: run.results() for name, run in runs.items()}
    if reasons and makers.keys() - {"jit"}:
        one = assemble({**config, "mesh": {"data": 1}}, devices[:1])
        results[IN_TURN] = Run(ways.in_turn(one, len(devices)), _feeds(one)).results()
    times = measure(runs, seconds)
    first = next(iter(makers))
    return [
        {
            "way": name,
            "data": job.source.name,
            "batch_size": job.train.batch_size,
            "mesh": sharding.describe(job.mesh),
            "compile_seconds": round(run.way.seconds, 2),
            **_times(times[name], times[first]),
            "by_design": reasons,
            "agreement": [
                _difference(results[name], results[other], ROUNDING[job.policy.compute]) | {"against": other}
                for other in (first, *([IN_TURN] if name != "jit" else []))
                if other in results and other != name
            ],
        }
        for name, run in runs.items()
    ]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of times and one of differences, then a line of JSON for each row."""
    first = rows[0]
    print(f"{first['data']}, batches of {first['batch_size']} on {first['mesh']}; {first['turns']} turns\n")
    print(f"  {'way':<12}{'compile':>10}{'step':>14}{'95 % within':>14}   by {first['way']}")
    for row in rows:
        compiled, median, most = (
            f"{row['compile_seconds']:.1f} s",
            f"{row['step_ms']:.3f} ms",
            f"{row['p95_ms']:.3f} ms",
        )
        print(f"{'*' if row['way'] == 'jit' else ' '} {row['way']:<12}{compiled:>10}{median:>14}{most:>14}", end="")
        print(f"{row['ratio']:>7.2f} x")
    print(f"\n* the way a run goes\n\nrelative differences in the first {STEPS} steps\n")
    print(f"  {'way':<12}{'against':<12}{'loss':>10}{'grad norm':>12}{'parameters':>12}{'others':>10}")
    for row in rows:
        for found in row["agreement"]:
            numbers = (
                f"{found['loss']:>10.1e}{found['grad_norm']:>12.1e}{found['params']:>12.1e}{found['extra']:>10.1e}"
            )
            verdict = "equal up to rounding" if found["equal"] else "by design" if _meant(row, found) else "DIFFERENT"
            print(f"  {row['way']:<12}{found['against']:<12}{numbers}  {verdict}")
    notes = list(first["by_design"])
    if any(found["against"] == IN_TURN for row in rows for found in row["agreement"]):
        notes.append(f"{IN_TURN}: the parts of all devices, one after the other, on one device")
    print("".join(f"\n{note}." for note in notes))
    for row in rows:
        print(json.dumps(row))


def agree(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all differences are rounding, or meant."""
    return all(found["equal"] or _meant(row, found) for row in rows for found in row["agreement"])


def _meant(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return bool(row["by_design"]) and "jit" in (row["way"], found["against"])


class Run:
    """A way under way: its state, and batches to go on with.

    Args:
      way: compiled.
      feeds: of the first dispatches, on the host.
    """

    def __init__(self, way: Way, feeds: Sequence[dict[str, Any]]) -> None:
        self.way, self.state, self.step, self.number = way, way.state, 0, 0
        every = way.place({"every": feeds[0]["every"]})
        self.feeds = [way.place({key: feed[key] for key in ("count", "first", "each")}) | every for feed in feeds]
        self.counts = [int(feed["count"]) for feed in feeds]
        self.rows = [i * self.counts[0] - int(feed["first"]) for i, feed in enumerate(feeds)]

    def results(self) -> tuple[dict[str, np.ndarray], Any, Any]:
        """Of the first `STEPS` steps: metric -> its mean at each; parameters; other collections. To be called first."""
        packed: list[np.ndarray] = []
        while self.step < STEPS:
            count = min(self.counts[self.number], STEPS - self.step)
            packed += list(self.way.read(self.dispatch(count)))[:count]
        pairs = dict(zip(self.way.names, np.stack(packed, axis=1).astype(np.float64), strict=True))
        means = {name: pair[:, 0] / pair[:, 1] for name, pair in pairs.items()}
        return means, self.way.read(self.state.params), self.way.read(self.state.extra)

    def dispatch(self, count: int | None = None) -> jax.Array:
        """Make the steps of one dispatch, or `count` of them; their metrics, which are not waited for."""
        which = self.number % len(self.feeds)
        count = self.counts[which] if count is None else count
        # The rows of this feed, whatever step the state is at.
        now = {"count": np.int32(count), "first": np.int32(self.step - self.rows[which])}
        self.state, packed = self.way.program(self.state, {**self.feeds[which], **self.way.place(now)})
        self.step, self.number = self.step + count, self.number + 1
        return packed


def measure(runs: Mapping[str, Run], seconds: float) -> dict[str, list[list[float]]]:
    """Seconds of a step, by way, turn and dispatch.

    Args:
      runs: name -> run.
      seconds: for each of them, all turns together.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            times[name].append(_turn(runs[name], seconds / TURNS))
    return times


def _turn(run: Run, seconds: float) -> list[float]:
    """As the loop does it: a dispatch is waited for when the next one has been submitted."""
    before, then = run.dispatch(), time.perf_counter()
    found: list[float] = []
    while len(found) < SETTLED + SHORTEST or sum(found[SETTLED:]) < seconds:
        first, packed = run.step, run.dispatch()
        jax.block_until_ready(before)
        now = time.perf_counter()
        found.append(now - then)
        before, then, steps = packed, now, run.step - first
    jax.block_until_ready(before)
    return [spent / steps for spent in found[SETTLED:]]


def _times(turns: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> dict[str, Any]:
    found = [seconds for turn in turns for seconds in turn]
    ratios = (statistics.median(a) / statistics.median(b) for a, b in zip(turns, first))
    return {
        "step_ms": round(1e3 * statistics.median(found), 4),
        "p95_ms": round(1e3 * float(np.percentile(found, 95)), 4),
        "ratio": round(statistics.median(ratios), 3),
        "dispatches": len(found),
        "turns": len(turns),
    }


def _difference(results: tuple[Any, ...], others: tuple[Any, ...], rounding: float) -> dict[str, Any]:
    (means, *trees), (other_means, *other_trees) = results, others
    found = {
        name: float(np.max(np.abs(means[name] - other_means[name]) / np.abs(other_means[name])))
        for name in ("loss", "grad_norm")
    }
    for name, tree, other in zip(("params", "extra"), trees, other_trees):
        found[name] = _norm(jax.tree.map(np.subtract, tree, other)) / (_norm(other) or 1.0)
    return {"steps": STEPS, **found, "equal": max(found.values()) <= rounding}


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in jax.tree.leaves(tree)))


def _feeds(job: Job) -> list[dict[str, Any]]:
    """Of the first `STEPS` dispatches, on the host."""
    most = job.cadence.steps_per_dispatch
    plan = [(number * most, most) for number in range(STEPS)]
    with contextlib.closing(job.train.dispatches(job.seed, plan, most)) as feeds:
        return [jax.device_get(feed) for feed in feeds]
