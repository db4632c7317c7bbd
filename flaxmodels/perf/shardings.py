"""How the train state of a config lies on its mesh, and what of it is wasted, before anything is allocated.

Read `report`, then `warned`. What is read is the step that training compiles: `Job.lower_train`.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from flaxmodels import console, meshes, registry, sections, sharding
from flaxmodels.job import Job
from flaxmodels.paths import path_of
from flaxmodels.perf import compiled
from flaxmodels.registry import UserError

# Bytes of a parameter that may be whole on each device without a word.
SMALL = 2**16
NOT_IN_PLACE = "the compiled step does not write the whole state in its place: some of it is held twice."


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of the state.

    Attributes:
      path: of a parameter, such as "blocks/mlp/up/kernel".
      shape: whole.
      dtype: its name.
      spec: an axis, several joined by "+", or "-" for each dimension.
      device_bytes: of its part on one device.
      bytes: whole.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    device_bytes: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `flaxmodels shardings` shows.

    Attributes:
      mesh: in words.
      axes: name -> devices.
      notes: of the job: what was chosen, and why.
      parameters: a row each.
      totals: "parameters", "optimizer state", "other state" -> (bytes of one device, bytes).
      warnings: what could be better, with the remedy.
    """

    mesh: str
    axes: dict[str, int]
    notes: tuple[str, ...]
    parameters: tuple[Row, ...]
    totals: dict[str, tuple[int, int]]
    warnings: tuple[str, ...]


def devices(topology: str | None, num_slices: int | None, simulated: int | None) -> list[jax.Device] | None:
    """The devices that were asked for: of a TPU slice that is not there, simulated ones, or None for this machine's.

    Args:
      topology: such as "v5e:4x4"; nothing can be allocated on it.
      num_slices: of that shape.
      simulated: how many; to be called before JAX starts.

    Raises:
      UserError: the options exclude each other, or there is no such topology.
    """
    if topology and simulated:
        raise UserError(f"--topology={topology} and --devices={simulated}: leave one of them out.")
    if num_slices and not topology:
        raise UserError(
            f"--num_slices={num_slices} goes with --topology. For other devices: --config.mesh.num_slices={num_slices}."
        )
    if topology:
        from flaxmodels.perf import topologies

        return topologies.devices(topology, num_slices or 1)
    return meshes.simulated(simulated) if simulated else None


def report(job: Job, *, compile: bool = False) -> tuple[Report, list[str]]:
    """Lower the train step, and look at its state.

    Args:
      job: on any devices, also those of a topology.
      compile: the step, too; takes from seconds to minutes.

    Returns:
      (report, lines on the compiled step: memory by class and collectives; none without `compile`).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowered, _ = job.lower_train()
    unused = [str(w.message) for w in caught if "donated buffers were not usable" in str(w.message)]
    parts = {
        "parameters": job.abstract.params,
        "optimizer state": job.abstract.opt_state,
        "other state": (job.abstract.step, job.abstract.extra),
    }
    totals = {name: _total(tree) for name, tree in parts.items()}
    said, found = [*warned(job, lowered), *(f"of the train state, {text[0].lower()}{text[1:]}" for text in unused)], []
    if compile:
        try:
            program, seconds = compiled.compile_program(lowered, job.mesh)
            looked = compiled.report(program, job)
            found = [f"compiled in {seconds:.0f} s", *looked.lines()]
            said += [NOT_IN_PLACE] * (not looked.memory.state_is_donated)
        except compiled.DoesNotFitError as error:  # all the more need for the table
            said.append(str(error))
    rows = tuple(_rows(job.abstract.params))
    axes, described = dict(job.mesh.shape), meshes.describe(job.mesh, job.config["mesh"].get("num_slices"))
    return Report(described, axes, job.notes, rows, totals, tuple(said)), found


def warned(job: Job, lowered: jax.stages.Lowered) -> Iterator[str]:
    """What could be better about a job's mesh and rules, a line each."""
    params, rules = job.abstract.params, sections.rules(**job.config["sharding"])
    fields = registry.parameters([type(job.model)])
    yield from sharding.replicated_report(params, SMALL, rules)
    yield from sharding.padding_report(params, SMALL, rules, fields)
    yield from idle_rules(params, rules)
    yield from idle_axes(job, lowered)
    for keys, info in jax.tree.leaves_with_path(lowered.args_info[0][0]):
        if not info.donated:
            yield f"{path_of(keys)} of the train state is not donated: the step holds it twice."


def idle_rules(params: Any, rules: sharding.Rules) -> Iterator[str]:
    """A line for each of a user's rules that changes nothing.

    Args:
      params: `jax.ShapeDtypeStruct` (or arrays) with shardings.
      rules: each of which the path of some parameter matches.
    """
    leaves = {path_of(keys): x.sharding for keys, x in jax.tree.leaves_with_path(params)}
    for i, (pattern, spec) in enumerate(rules):
        paths = [path for path in leaves if re.search(f"(?:{pattern})$", path)]
        first = {next((p for p, _ in rules[:i] if re.search(f"(?:{p})$", path)), None) for path in paths}
        names = [name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,)) if name]
        if None not in first:
            others = " and ".join(sorted(repr(name) for name in first))
            yield f"sharding.rules: {pattern!r} is never reached: {others}, before it, matches all that it does."
        elif names and all(leaves[paths[0]].mesh.shape[name] == 1 for name in names):
            yield (
                f"sharding.rules: {pattern!r} splits nothing, since this mesh has {', '.join(names)}=1, and keeps the "
                f"fallback from splitting {', '.join(paths)}: leave it out."
            )


def idle_axes(job: Job, lowered: jax.stages.Lowered) -> Iterator[str]:
    """A line for each axis of the mesh whose devices all do the same work, or some of them more than others."""
    marked = "".join(line for line in lowered.as_text().splitlines() if "sharding_constraint" in line)
    size, uneven = job.mesh.shape["sequence"], False
    for x in jax.tree.leaves(job.train.example()["inputs"]):
        tokens = x.ndim == 2 and np.issubdtype(x.dtype, np.integer)
        if uneven := bool(tokens and x.shape[1] % size):
            longer = -(-x.shape[1] // size) * size
            yield f"data.length={x.shape[1]} does not divide over mesh.sequence={size}: use {longer}."
            break
    for axis in ("tensor",) if uneven else ("sequence", "tensor"):
        size = job.mesh.shape[axis]
        specs = (x.sharding.spec for x in jax.tree.leaves(job.abstract.params))
        split = axis == "tensor" and any(axis in spec for spec in specs)
        if size > 1 and not split and f'"{axis}"' not in marked:
            yield (
                f"mesh.{axis}={size}: model.name={job.config['model']['name']!r} says of nothing that it is split over "
                f"it, so that {size} devices may do the same work: use mesh.{axis}=1."
            )


def _rows(tree: Any) -> Iterator[Row]:
    for keys, x in jax.tree.leaves_with_path(tree):
        entries = (entry if isinstance(entry, tuple) else (entry,) for entry in x.sharding.spec)
        spec = ", ".join("+".join(entry) if entry != (None,) else "-" for entry in entries)
        held = math.prod(x.sharding.shard_shape(x.shape))
        yield Row(path_of(keys), x.shape, x.dtype.name, spec, held * x.dtype.itemsize, x.size * x.dtype.itemsize)


def _total(tree: Any) -> tuple[int, int]:
    rows = list(_rows(tree))
    return sum(row.device_bytes for row in rows), sum(row.bytes for row in rows)


def show(found: Report, lines: Sequence[str], stream: TextIO) -> None:
    """Print tables, then what the compiled step takes, then warnings."""
    display = console.open_display(stream, 1, 0, 1)
    for note in found.notes:
        display.line(note)
    total = sum(row.bytes for row in found.parameters)
    cells = [
        (
            row.path,
            str(row.shape),
            row.dtype,
            row.spec,
            console.human_bytes(row.device_bytes),
            f"{row.bytes / total:.1%}",
        )
        for row in found.parameters
    ]
    display.table("parameters", ("path", "shape", "dtype", "spec", "a device", "of all"), cells, ())
    held, whole = (sum(pair[i] for pair in found.totals.values()) for i in (0, 1))
    sums = [(name, *map(console.human_bytes, pair)) for name, pair in found.totals.items()]
    everything = ("total", console.human_bytes(held), console.human_bytes(whole))
    display.table("train state", ("", "a device", "whole"), sums, everything)
    for line in lines:
        display.line(line)
    for text in found.warnings:
        display.line(f"warning: {text}")
    if not found.warnings:
        split = any(size > 1 for name, size in found.axes.items() if name != "data")
        what = "what is large is split, its dimensions divide" if split else "parameters are whole on each device"
        display.line(f"no warnings: {what}, the state is donated")
    display.close()


def records(found: Report, lines: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The same for a program: objects, ready for JSON, each with a "kind"."""
    yield {"kind": "mesh", "mesh": found.mesh, "axes": found.axes, "notes": found.notes}
    for row in found.parameters:
        yield {"kind": "parameter", **dataclasses.asdict(row)}
    for name, (held, whole) in found.totals.items():
        yield {"kind": "total", "of": name, "device_bytes": held, "bytes": whole}
    yield from ({"kind": "compiled", "line": line} for line in lines)
    yield from ({"kind": "warning", "text": text} for text in found.warnings)


def write_json(found: Report, lines: Sequence[str], stream: TextIO) -> None:
    """`records`, a line each."""
    for record in records(found, lines):
        stream.write(json.dumps(record) + "\n")
