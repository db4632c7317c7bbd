"""Bytes of a device: what a compiled step needs, by class; and what to say where memory does not suffice.

Read `explained`. XLA says RESOURCE_EXHAUSTED and a number; what helps is which part of it could be smaller.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmodels import hardware, sharding
from flaxmodels.console import human_bytes
from flaxmodels.job import Job
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

_SIZE = r"([\d.]+) ?([KMGT]?)(?:i?B|\b)"
# "allocating 1024 bytes", "to allocate request for 176.00MiB", "Attempting to allocate 15.65G", "trying to allocate 7"
_ASKED = re.compile(rf"(?i)allocat(?:e|ing)(?: request for)? {_SIZE}")
ADVICE = (
    "What needs less: a smaller data.batch_size; train.microbatches=N, which divides activations by N; for a "
    "transformer model.remat, and loss.chunks for its logits; more devices with mesh.fsdp, which divides the state."
)
HOST_ADVICE = "What needs less: fewer data.workers, data.threads or data.prefetch; a smaller data.batch_size."


class OutOfMemoryError(FaultError):
    """A device, or the host, has no memory left."""


class DoesNotFitError(UserError):
    """A program needs more memory than its devices have.

    Attributes:
      needed: bytes of one device, as the compiler counts them; None where it does not say.
      limit: bytes that one device has; None where the compiler does not say.
    """

    def __init__(self, message: str, needed: int | None, limit: int | None) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. The first five are as the shardings say; the others as the compiler does.

    Attributes:
      parameters: of the model.
      optimizer: the state of the optimizer.
      other: of the state, such as BatchNorm's statistics, and the step.
      batch: what the steps of a dispatch are given.
      data: the data set, where it lives on the device.
      temporaries: activations, gradients, buffers of collectives.
      outputs: results that take no donated memory.
      donated: results that take the place of arguments.
      peak: the most that is in use at a time; arguments, outputs and temporaries.
      limit: what a program may use; None where nothing says, as on a CPU.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int
    data: int
    temporaries: int
    outputs: int
    donated: int
    peak: int
    limit: int | None

    @property
    def state(self) -> int:
        """Bytes of the train state."""
        return self.parameters + self.optimizer + self.other

    @property
    def state_is_donated(self) -> bool:
        """Whether the new state takes the place of the old one, so that there are never two."""
        return self.donated >= self.state


def of_step(compiled: jax.stages.Compiled, job: Job) -> Memory:
    """What the compiled train step of a job takes.

    Raises:
      FaultError: the compiler of these devices does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise FaultError(f"the compiler for {sharding.describe(job.mesh)} does not say what memory a program takes.")
    limit = hardware.memory(job.mesh.devices.flat[0])
    taken = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        **_known(job),
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        donated=found.alias_size_in_bytes,
        # The compiler for CPUs leaves the temporaries out. That for TPUs knows how far they share memory.
        peak=taken + found.temp_size_in_bytes if limit is None else found.peak_memory_in_bytes,
        limit=limit,
    )


def _known(job: Job) -> dict[str, int]:
    """The classes that shardings tell, without a compiler."""
    feed, state = job.train.abstract_dispatch(job.cadence.steps_per_dispatch), job.abstract
    return dict(
        parameters=on_a_device(state.params),
        optimizer=on_a_device(state.opt_state),
        other=on_a_device((state.step, state.extra)),
        batch=on_a_device({key: value for key, value in feed.items() if key != "every"}),
        data=on_a_device(feed["every"]),
    )


def on_a_device(tree: Any) -> int:
    """Bytes of one device of arrays, or `jax.ShapeDtypeStruct`, with shardings; without the padding of their layout."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def explained(job: Job) -> Iterator[list[jax.stages.Compiled]]:
    """Around all that a job compiles and runs: an error of memory says what takes it, and what would take less.

    Yields:
      A list, to append the train step to when it is compiled: its temporaries, such as activations, are known then.

    Raises:
      DoesNotFitError: the compiler refused a program as too large; the same config will never fit.
      OutOfMemoryError: an allocation failed, on a device or on the host. Another program may hold the memory.
    """
    programs: list[jax.stages.Compiled] = []
    try:
        yield programs
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if _REFUSED.search(str(error)):
            raise too_large(str(error), job.mesh) from error
        raise OutOfMemoryError(_on_device(str(error), job, programs)) from error
    except MemoryError as error:
        reason = str(error).rstrip(".") or "an allocation failed"
        raise OutOfMemoryError(f"this host has no memory left: {reason}.\n{HOST_ADVICE}") from error


def _on_device(reason: str, job: Job, programs: list[jax.stages.Compiled]) -> str:
    sizes = _known(job)
    names = {"other": "other state", "optimizer": "optimizer state", "data": "data set"}
    said = [f"{names.get(name, name)} {human_bytes(size)}" for name, size in sizes.items() if size]
    if programs and (found := programs[-1].memory_analysis()) is not None:
        said.append(f"activations and other temporaries {human_bytes(found.temp_size_in_bytes)}")
    limit = hardware.memory(job.mesh.devices.flat[0])
    has = "" if limit is None else f", which has {human_bytes(limit)}"
    asked = _ASKED.search(reason)
    failed = f"no {human_bytes(_bytes(*asked.groups()))} more could be had" if asked else reason.splitlines()[0]
    return (
        f"out of memory on {sharding.describe(job.mesh)}: {failed}.\n"
        f"A step takes, of each device{has}: {', '.join(said)}.\n{ADVICE}"
    )


# "... (20.00G) exceeds available HBM (15.75G)", or "Used 20.00G of 15.75G hbm": the compiler for TPUs.
_HBM = r"([\d.]+)([KMGT])"
_REFUSED = re.compile(rf"\({_HBM}\) exceeds available HBM \({_HBM}\)|Used {_HBM} of {_HBM} hbm")


def too_large(reason: str, devices: Mesh) -> DoesNotFitError:
    """What a compiler says of a program that it refuses, with what would help."""
    found = _REFUSED.search(reason)
    needed, limit = None, hardware.memory(devices.devices.flat[0])
    said = reason.splitlines()[0]
    if found:
        parts = [part for part in found.groups() if part]
        needed, limit = (_bytes(number, unit) for number, unit in zip(parts[::2], parts[1::2]))
        said = f"it needs {human_bytes(needed)} on each, which has {human_bytes(limit)}"
    where = sharding.describe(devices)
    return DoesNotFitError(f"the program does not fit on {where}: {said}.\n{ADVICE}", needed, limit)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (" KMGT".index(unit.upper()) if unit else 0))
