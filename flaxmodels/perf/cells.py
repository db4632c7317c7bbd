"""One cell of a plan: a config, with changes, compiled for devices that need not be there, and what that says of it.

Read `cell`. What does not fit, or is refused, is a `Cell` too, which says so: a search goes on behind it.

Compiling takes from seconds to minutes: results are kept on disk, see `cache`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flaxmodels import activations, job, meshes, registry
from flaxmodels.job import Job
from flaxmodels.memory import DoesNotFitError, Memory, on_a_device
from flaxmodels.perf import cache, chips, compiled, count, gpus, topologies
from flaxmodels.perf.chips import Chip
from flaxmodels.perf.compiled import Row
from flaxmodels.perf.roofline import Roofline, roofline
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

# Where what was found is kept.
CELLS, PROGRAMS = "cells", "programs"
# Names of the devices at hand.
HERE = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: such as "v5e:4x4", "v5e:4x4*2" (two slices), "h100:8", "h100:2x8" (two nodes), "cpu:8" (simulated), or
        "cpu", "gpu", "tpu": those at hand.
      devices: nothing can be allocated on those of a topology.
      chip: what one of them can do.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was found.

    Attributes:
      target: its name.
      changes: of the config, by dotted key.
      mesh: axis -> devices; empty where the config was refused before there was one.
      batch_size: examples of a step, over all devices; 0 where refused.
      memory: of one device. Where the compiler refused the program as too large, its `peak` is what the compiler says
        that it needs, and `temporaries` what of it is neither arguments nor results. None where refused.
      gradients: bytes of one device, of `memory.temporaries`: one gradient a parameter, sharded as it is and in its
        dtype, in float32 where microbatches add up; all temporaries, if they are less, since then gradients are used up
        as they come.
      activations: bytes of one device: the other temporaries. What the forward pass keeps for the backward pass,
        working memory of operations, and buffers of collectives.
      saved: bytes of one device that a microbatch keeps for its backward pass, as the model is written: before the
        compiler computes some of it again, or keeps what is small on the chip. Not split over `tensor`.
      fits: on each device.
      over: bytes of one device that are missing; 0 where it fits, or where the compiler does not say.
      flops: of the model: matmuls and convolutions of one step, over all devices, without those of remat.
      bytes: to and from memory in one step, over all devices, by `count`'s model of fusion.
      collectives: of one step.
      roofline: of one step; None where it does not fit, or is refused.
      steps: of the run, by train.duration.
      tokens: of one step; None where examples are not sequences.
      compile_seconds: when it was compiled.
      refusal: why the config can't be compiled for these devices; "" where it can.
      notes: sentences on what is not certain.
    """

    target: str
    changes: dict[str, Any]
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_size: int = 0
    memory: Memory | None = None
    gradients: int = 0
    activations: int = 0
    saved: int = 0
    fits: bool = False
    over: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Row, ...] = ()
    roofline: Roofline | None = None
    steps: int = 0
    tokens: int | None = None
    compile_seconds: float = 0.0
    refusal: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `of_json` reads it."""
        return {**dataclasses.asdict(self), "changes": registry.storable(self.changes)}


def of_json(found: Mapping[str, Any]) -> Cell:
    """What `Cell.to_json` wrote, read back from JSON. Lists in `changes` are tuples, as in a config."""
    parts = dict(
        changes=registry.plain(found["changes"]),
        memory=found["memory"] and Memory(**found["memory"]),
        collectives=_rows(found["collectives"]),
        roofline=found["roofline"] and Roofline(**found["roofline"]),
        notes=tuple(found["notes"]),
    )
    return Cell(**{**found, **parts})


def _rows(found: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(**{**row, "axes": tuple(row["axes"])}) for row in found)


def targets(names: Sequence[str]) -> list[Target]:
    """The devices that names stand for; to be called before JAX starts, where some are simulated.

    Raises:
      UserError: there are no such devices, or what compiles for them is not installed; or simulated devices stand
        beside those at hand.
    """
    if any(name.partition(":")[0] in gpus.GPUS for name in names):
        gpus.prepare()
    simulated = [_simulated(name) for name in names if name.startswith("cpu:")]
    if simulated:
        if beside := [name for name in names if name in HERE]:
            raise UserError(
                f"topologies {', '.join(map(repr, names))}: where JAX simulates devices, it does not find those of "
                f"{beside[0]!r}: plan them in two calls."
            )
        meshes.simulated(max(simulated))
    return [_target(name) for name in names]


def _target(name: str) -> Target:
    topology, several, slices = name.partition("*")
    if name.startswith("cpu:"):
        devices = meshes.simulated(_simulated(name))
    elif name in HERE:
        devices = meshes.find_devices(name)
    elif name.partition(":")[0] in gpus.GPUS:
        devices = gpus.devices(name)
    elif several and not re.fullmatch("[1-9][0-9]*", slices):
        raise UserError(f"topology {name!r}: {slices!r} is no number of slices. Two are written {topology + '*2'!r}.")
    else:
        devices = topologies.devices(topology, int(slices or 1))
    cpu = devices[0].platform == "cpu"
    return Target(name, devices, chips.measured_cpu(len(devices)) if cpu else chips.of(devices[0]))


def _simulated(name: str) -> int:
    count = name.removeprefix("cpu:")
    if not re.fullmatch("[1-9][0-9]{0,3}", count):
        raise UserError(f"topology {name!r}: {count!r} is no number of devices. Eight simulated ones are 'cpu:8'.")
    return int(count)


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values: "data.batch_size" sets a key, "mesh" a whole section."""
    found = registry.plain(config)
    for key, value in changes.items():
        section, _, option = key.partition(".")
        if option and not isinstance(found.get(section, {}), dict):
            found[section] = {}  # such as mesh="auto"
        found[section] = {**found.get(section, {}), option: value} if option else value
    return found


def cell(config: Mapping[str, Any], target: Target, changes: Mapping[str, Any] | None = None) -> Cell:
    """Compile the train step of a config, with changes, for devices; or look up what was found before.

    Args:
      config: of a run: section -> options, and "seed".
      target: from `targets`.
      changes: by dotted key, such as {"data.batch_size": 64, "mesh": {"fsdp": 4}}.

    Returns:
      What was found. Never an exception for what the config says: see `Cell.refusal`.
    """
    changes = dict(changes or {})
    config = changed(config, changes)
    try:
        key = cache.config_key(config, target.name, target.devices, dataclasses.asdict(target.chip))
        if key and (kept := cache.get(CELLS, key)):
            return of_json({**kept, "changes": registry.storable(changes)})
        found = _made(config, target, changes)
    except (UserError, FaultError) as error:
        return Cell(target.name, changes, refusal=str(error))
    if key:
        cache.put(CELLS, key, found.to_json())
    return found


def _made(config: Mapping[str, Any], target: Target, changes: dict[str, Any]) -> Cell:
    made, chip = job.assemble(config, target.devices), target.chip
    program = _program(made)
    memory = Memory(**program["memory"])
    memory = dataclasses.replace(memory, limit=chip.memory if memory.limit is None else memory.limit)
    rows, over = _rows(program["collectives"]), max(memory.peak - (memory.limit or 0), 0)
    fits = program["compiled"] and not over
    counted, examples = count.of_job(made), made.train.batch_size
    tokens = examples * made.source.tokens_per_example if made.source.tokens_per_example > 1 else None
    gradients = min(_gradients(made), memory.temporaries)
    return Cell(
        target=target.name, changes=changes, mesh=dict(made.mesh.shape), batch_size=examples, memory=memory,
        gradients=gradients, activations=memory.temporaries - gradients, saved=_saved(made),
        fits=fits, over=over,
        flops=sum(counted.model.flops.values()), bytes=counted.hardware.bytes, collectives=rows,
        roofline=roofline(counted.hardware, counted.model, rows, chip, made.mesh, examples, tokens) if fits else None,
        steps=made.total_steps, tokens=tokens, compile_seconds=program["seconds"],
        notes=tuple(dict.fromkeys((*program["notes"], *counted.hardware.notes))),
    )  # fmt: skip


def _gradients(made: Job) -> int:
    """Bytes of one device of a gradient for each parameter."""

    def of(x: Any) -> jax.ShapeDtypeStruct:
        dtype = "float32" if made.cadence.microbatches > 1 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return on_a_device(jax.tree.map(of, made.abstract.params))


def _saved(made: Job) -> int:
    """See `Cell.saved`."""
    devices = math.prod(made.mesh.shape[axis] for axis in ("data", "fsdp", "sequence"))
    return sum(size * number for _, size, number in activations.kept(made)) // devices


def _program(made: Job) -> dict[str, Any]:
    """What the compiler says of the train step of a job, now or before: plain data.

    Raises:
      UserError: the compiler would get its gradients wrong on this mesh.
      DoesNotFitError: the compiler lacks memory, and does not say that it is that of the devices.
      FaultError: the compiler fails, or says nothing.
    """
    lowered, _ = made.lower_train()
    key = cache.program_key(lowered, made.abstract, made.mesh)
    if kept := cache.get(PROGRAMS, key):
        return kept
    fits, seconds, rows, notes = True, 0.0, tuple[Row, ...](), tuple[str, ...]()
    try:
        program, seconds = compiled.compile_program(lowered, made.mesh)
        report = compiled.report(program, made)
        memory, rows, notes = report.memory, report.collectives, report.notes
    except DoesNotFitError as error:
        if error.needed is None:  # not of a device's memory, but of a kernel's, say: another config may not help
            raise
        fits, memory = False, compiled.refused(error, made)
    except jax.errors.JaxRuntimeError as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FaultError(f"the compiler fails: {said}") from error
    found = {
        "compiled": fits,
        "memory": dataclasses.asdict(memory),
        "collectives": [dataclasses.asdict(row) for row in rows],
        "notes": notes,
        "seconds": seconds,
    }
    cache.put(PROGRAMS, key, found)
    return found
