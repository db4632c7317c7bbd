"""What the compiled step of a config costs on the devices at hand; and the same of other ways, or other configs.

All take turns in one run, so that whatever else the machine does slows all of them alike. Read `bench` first; ways are
in `ways`, turns in `timing`, FLOP/s and the like in `achieved`, whether ways agree in `agreement`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxmodels import config as configs
from flaxmodels import memory, registry, sections, sharding
from flaxmodels.job import Job, assemble
from flaxmodels.perf import achieved, agreement, compiling, energy, timing, ways
from flaxmodels.perf.running import Run, first_feeds
from flaxmodels.perf.ways import Way
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, heap

AS_WRITTEN = "as written"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing to measure.

    Attributes:
      name: as it was asked for.
      job: to measure the update of.
      make: of `ways.WAYS`: how it is computed.
    """

    name: str
    job: Job
    make: Callable[[Job], Way]


def bench(
    config: Mapping[str, Any],
    compare: Sequence[str] = (),
    seconds: float = 5.0,
    devices: Sequence[jax.Device] | None = None,
    turns: int = timing.TURNS,
) -> list[dict[str, Any]]:
    """Measure the update of a config.

    Args:
      config: of a run, with all its sections.
      compare: what to measure: names of `ways.WAYS`; config files; and changes of this config, "KEY=VALUE", or several
        joined by "+". All others are held against the first. Of one change or file alone the first is the config as it
        is written; with nothing to compare that is measured alone.
        Where `shard_map` or `pmap` is among the ways, these all put all devices on the data axis, whatever the mesh is.
      seconds: that each is timed for, all turns together.
      devices: to run on; None takes all there are.
      turns: of each.

    Returns:
      A row for each, ready for JSON: "name", "data", "batch_size", "mesh", "platform", "steps_per_dispatch";
      "trace_seconds", "lower_seconds", "compile_seconds" (cache of programs empty), "cached_seconds" (to compile it
      with the program in the cache), "first_step_ms"; "loss" (of the last of the first `running.STEPS` steps); what
      `timing.figures` and `achieved.achieved` say; "peak_bytes" and "peak_of", measured, all rows together, and
      "energy", what joules are of, or why there are none; for all but the first what `timing.against` says; "by_design"
      (why explicit collectives differ from "jit"), and "agreement": for ways, `agreement.difference` from the first
      one, and from the parts in turn, with whom that is "against".

    Raises:
      UserError: a config is wrong, or there is no such way or file; or a step does not fit the devices.
      FaultError: memory does not suffice.
    """
    checked = sections.check(config, lambda text, where: text)
    devices = list(sharding.find_devices(checked["mesh"].get("platform")) if devices is None else devices)
    if exits.commanding():  # as a run does
        heap.keep(devices[0].platform)
    entries = _entries(config, compare, devices)
    explicit = _explicit(compare)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    results: dict[str, tuple[Any, ...]] = {}
    for entry in entries:
        with memory.explained(entry.job) as programs:
            way, cached = _made(entry)
            programs.append(way.program)
            runs[entry.name] = run = Run(way, first_feeds(entry.job))
            results[entry.name] = run.results(whole=explicit)
        rows[entry.name] = {
            **_described(entry),
            **{f"{name}_seconds": round(took, 4) for name, took in dataclasses.asdict(way.seconds).items()},
            "cached_seconds": round(cached, 4),
            "first_step_ms": round(1e3 * run.first_seconds, 3),
            "loss": float(results[entry.name][0]["loss"][-1]),
        }
    counter, said = energy.counter(devices[0].platform)
    achieved.forget_peak()
    times = timing.measure(runs, seconds, turns, counter)
    most, of = achieved.peak(devices)
    if explicit:
        _add_agreement(config, entries, results, rows, devices)
    first = entries[0].name
    for entry in entries:
        row, found = rows[entry.name], timing.figures(times[entry.name])
        row |= found | achieved.achieved(entry.job, runs[entry.name].way.program, found["step_ms"] / 1e3)
        row |= {"peak_bytes": most, "peak_of": of, "energy": said}
        if entry.name != first:
            row |= timing.against(times[entry.name], times[first], devices[0].platform)
    return list(rows.values())


def _entries(config: Mapping[str, Any], compare: Sequence[str], devices: Sequence[jax.Device]) -> list[Entry]:
    """What `compare` asks for; ways share a job. Names are made unique, so that a thing can be held against itself."""
    mesh = {"mesh": {"data": len(devices)}} if _explicit(compare) else {}
    asked = [(name, *_meant(config, name)) for name in compare]
    if not asked or (len(asked) == 1 and asked[0][0] not in ways.WAYS):
        asked = [(AS_WRITTEN, config, ways.jit), *asked]
    shared = next((assemble({**config, **mesh}, devices) for _, meant, _ in asked if meant is config), None)
    found: list[Entry] = []
    for name, meant, make in asked:
        job = shared if meant is config and shared else assemble(meant, devices)
        before = sum(entry.name.partition(" (")[0] == name for entry in found)
        found.append(Entry(f"{name} ({before + 1})" if before else name, job, make))
    return found


def _meant(config: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], Callable[[Job], Way]]:
    """The config that an alternative stands for, and the way to compute it."""
    if name in ways.WAYS:
        return config, ways.WAYS[name]
    if name.partition(":")[0].endswith(".py"):
        return configs.load_config(name), ways.jit
    if "=" not in name:
        registry.pick(ways.WAYS, name, "--compare")
    changed = ConfigDict(registry.plain(config))
    for change in re.split(r"\+(?=[a-z_]\w*(?:\.\w+)*=)", name):
        key, _, value = change.partition("=")
        if not value or not all(key.split(".")):
            raise UserError(f"--compare={name!r}: {change!r} is no change: expected KEY=VALUE, as model.layers=2.")
        configs.override(changed, key, value)
    return changed, ways.jit


def _explicit(compare: Sequence[str]) -> bool:
    """Whether a way with explicit collectives is asked for."""
    return any(name in ways.WAYS and name != "jit" for name in compare)


def _made(entry: Entry) -> tuple[Way, float]:
    """The way of an entry, compiled with an empty cache of programs; and the seconds to compile it with a full one."""
    with compiling.fresh_cache():
        return entry.make(entry.job), entry.make(entry.job).seconds.compile


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "data": entry.job.source.name,
        "batch_size": entry.job.train.batch_size,
        "mesh": sharding.describe(entry.job.mesh),
        "platform": entry.job.mesh.devices.flat[0].platform,
        "steps_per_dispatch": entry.job.cadence.steps_per_dispatch,
        "by_design": [],
        "agreement": [],
    }


def _add_agreement(
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    results: Mapping[str, tuple[Any, ...]],
    rows: Mapping[str, dict[str, Any]],
    devices: Sequence[jax.Device],
) -> None:
    """Hold the ways against the first of them, and where they differ by design also against the parts in turn."""
    compared = [entry for entry in entries if entry.name.partition(" (")[0] in ways.WAYS]
    first, job = compared[0].name, compared[0].job
    reasons, others = ways.by_design(job), {first: results[first]}
    if reasons:
        one = assemble({**config, "mesh": {"data": 1}}, devices[:1])
        others[agreement.IN_TURN] = Run(ways.in_turn(one, len(devices)), first_feeds(one)).results(whole=True)
    for entry in compared:
        rows[entry.name]["by_design"] = reasons
        rows[entry.name]["agreement"] = [
            agreement.difference(results[entry.name], result, job.policy.compute) | {"against": other}
            for other, result in others.items()
            if other != entry.name and not (other == agreement.IN_TURN and entry.make is ways.jit)
        ]
