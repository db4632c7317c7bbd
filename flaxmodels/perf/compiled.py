"""What a compiled step needs: memory of a device by class, and what its devices say to each other.

Read `report`. It works on a step that was compiled for devices that are not there (`topologies`) as on one that runs.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmodels import sharding
from flaxmodels.console import human_bytes
from flaxmodels.job import Job
from flaxmodels.memory import DoesNotFitError, Memory, known, of_step, on_a_device, too_large
from flaxmodels.perf import collectives
from flaxmodels.perf.collectives import TRANSFER, Groups

__all__ = ["DoesNotFitError", "Memory", "Report", "Row", "along", "compile_program", "on_a_device", "report"]


@dataclasses.dataclass(frozen=True)
class Row:
    """All collectives of a step of one kind along the same axes.

    Attributes:
      kind: see `collectives.Collective`.
      axes: of the mesh, between whose devices it is; () where the program does not tell.
      whole: whether all devices of these axes take part together, and not a few at a time.
      count: runs in a step.
      bytes: of one device in a step, all runs together, as `collectives.Collective.bytes` counts them.
    """

    kind: str
    axes: tuple[str, ...]
    whole: bool
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found.

    Attributes:
      devices: the mesh, in words.
      memory: of one device.
      collectives: of one step, largest first.
      notes: sentences on what is not certain.
    """

    devices: str
    memory: Memory
    collectives: tuple[Row, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """All of it for a terminal."""
        memory, limit = self.memory, self.memory.limit
        fields = [field.name for field in dataclasses.fields(Memory)][:7]
        names = {"other": "other state", "optimizer": "optimizer state", "data": "data set", "outputs": "new outputs"}
        rows = [(names.get(name, name), getattr(memory, name)) for name in fields if getattr(memory, name)]
        of = "" if limit is None else f" of {human_bytes(limit)}: {'fits' if memory.peak <= limit else 'does not fit'}"
        kept = "donated: one copy at a time" if memory.state_is_donated else "NOT donated: two copies while a step runs"
        return [
            f"{self.devices}; bytes of one device",
            *(f"  {name:<24}{human_bytes(size):>11}" for name, size in rows),
            f"  {'most at a time':<24}{human_bytes(memory.peak):>11}{of}",
            f"  the state, {human_bytes(memory.state)}, is {kept}",
            f"collectives of one step: {'whole buffers, and how often' if self.collectives else 'none'}",
            *(
                f"  {row.kind:<24}{human_bytes(row.bytes):>11}{row.count:>7} x  {_along(row)}"
                for row in self.collectives
            ),
            *self.notes,
        ]


def compile_program(lowered: jax.stages.Lowered, devices: Mesh) -> tuple[jax.stages.Compiled, float]:
    """Compile, on these devices or for them; returns the program, and the seconds it took.

    Raises:
      DoesNotFitError: the compiler knows that it needs more memory than a device has. That of TPUs does.
    """
    started = time.perf_counter()
    there = bool(devices.devices.flat[0].client.local_devices())
    try:
        with contextlib.nullcontext() if there else _uncached():
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(str(error), devices) from error
    return program, time.perf_counter() - started


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """JAX's cache of compiled programs stores those for a topology, and then can't read them: it warns each time."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            yield
    finally:
        jax.config.update(name, before)


def report(compiled: jax.stages.Compiled, job: Job) -> Report:
    """Of the compiled train step of a job: `job.lower_train()[0].compile()`, or `compile_program` of the same.

    Raises:
      FaultError: the compiler of these devices does not say what memory a program takes.
    """
    rows, notes = _collectives(compiled, job.mesh)
    return Report(sharding.describe(job.mesh), of_step(compiled, job), rows, notes)


def refused(error: DoesNotFitError, job: Job) -> Memory:
    """What a train step would take that the compiler refused as too large, as far as that is known.

    The compiler says what it needs in all, and shardings say what its arguments are: the rest counts as temporaries.
    Or it says what temporaries alone need: arguments come on top.
    """
    arguments = known(job)
    held, needed = sum(arguments.values()), error.needed or 0
    peak = held + needed if "for temporaries alone" in str(error) else max(needed, held)
    return Memory(
        **arguments,
        temporaries=peak - held,
        outputs=0,
        donated=on_a_device(job.abstract),
        peak=peak,
        limit=error.limit,
    )


def _collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    try:
        found, notes = collectives.collectives(compiled.as_text() or "")
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (), (f"the collectives can't be told: the text of the program can't be read ({reason})",)
    total: dict[tuple[str, tuple[str, ...], bool], tuple[int, int]] = {}
    for one in found:
        axes, whole = along(one.groups, mesh)
        if one.groups and not axes:  # each device by itself: nothing is sent
            continue
        count, size = total.get((one.kind, axes, whole), (0, 0))
        total[one.kind, axes, whole] = (count + one.count, size + one.count * one.bytes)
    rows = [Row(*key, count, size) for key, (count, size) in total.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes)), tuple(notes)


def along(groups: Groups, mesh: Mesh) -> tuple[tuple[str, ...], bool]:
    """The axes of a mesh that groups of devices (positions in it) extend along, and whether over all of each."""
    if not groups:
        return (), True
    places = np.stack(np.unravel_index(np.asarray(max(groups, key=len)), mesh.devices.shape))
    axes = [name for name, place in zip(mesh.axis_names, places) if len(set(place.tolist())) > 1]
    return tuple(axes), len(places[0]) == math.prod(mesh.shape[name] for name in axes)


def _along(row: Row) -> str:
    names = " x ".join(row.axes)
    if not names:
        return "" if row.kind == TRANSFER else "along ?"
    return f"along {names}" if row.whole else f"along parts of {names}"
