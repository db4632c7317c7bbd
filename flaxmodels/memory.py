"""Bytes of a device: what a compiled step needs, by class; and what to say where memory does not suffice.

Read `explained`. XLA says RESOURCE_EXHAUSTED and a number; what helps is which part of it could be smaller.
"""

import contextlib
import dataclasses
import math
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmodels import activations, hardware, sharding
from flaxmodels.console import human_bytes
from flaxmodels.job import Job
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

_SIZE = r"([\d.]+) ?([KMGT]?)(?:i?B|\b)"
# "allocating 1024 bytes", "to allocate request for 176.00MiB", "Attempting to allocate 15.65G", "trying to allocate 7"
_ASKED = re.compile(rf"(?i)allocat(?:e|ing)(?: request for)? {_SIZE}")
ADVICE = (
    "What needs less: a smaller data.batch_size; train.microbatches=N, which divides activations by N; for a "
    "transformer model.remat, and loss.chunks for its logits; more devices with mesh.fsdp, which divides the state. "
    "`flaxmodels plan` finds the smallest change that fits, and compiles it."
)
# Arrays that `explained` names.
LARGEST = 3
# The part of a host's free memory that one more step may count on: allocators and threads want some, too.
SAFE = 0.9
HOST_ADVICE = "What needs less: fewer data.workers, data.threads or data.prefetch; a smaller data.batch_size."


class OutOfMemoryError(FaultError):
    """A device, or the host, has no memory left.

    Attributes:
      room: bytes of one device that a step of this job could have had; None where nobody knows.
    """

    def __init__(self, message: str, room: int | None = None) -> None:
        super().__init__(message)
        self.room = room


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
        **known(job),
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        donated=found.alias_size_in_bytes,
        # The compiler for CPUs leaves the temporaries out. That for TPUs knows how far they share memory.
        peak=taken + found.temp_size_in_bytes if limit is None else found.peak_memory_in_bytes,
        limit=limit,
    )


def known(job: Job) -> dict[str, int]:
    """The fields of `Memory` that shardings tell, without a compiler: the arguments of a step."""
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
            raise too_large(str(error), job.mesh, filled(job)) from error
        raise OutOfMemoryError(_on_device(str(error), job, programs), _room(job.mesh)) from error
    except MemoryError as error:
        reason = str(error).rstrip(".") or "an allocation failed"
        raise OutOfMemoryError(f"this host has no memory left: {reason}.\n{HOST_ADVICE}") from error


def _on_device(reason: str, job: Job, programs: list[jax.stages.Compiled]) -> str:
    asked, found = _ASKED.search(reason), programs[-1].memory_analysis() if programs else None
    failed = f"no {human_bytes(_bytes(*asked.groups()))} more could be had" if asked else reason.splitlines()[0]
    takes = filled(job, found and found.temp_size_in_bytes)
    return f"out of memory on {sharding.describe(job.mesh)}: {failed}.\n{takes}\n{ADVICE}"


def filled(job: Job, temporaries: int | None = None) -> str:
    """What fills the memory of a device in a step of a job, in words.

    Args:
      job: what is trained.
      temporaries: bytes of one device, where they are known.
    """
    names = {"other": "other state", "optimizer": "optimizer state", "data": "data set"}
    said = [f"{names.get(name, name)} {human_bytes(size)}" for name, size in known(job).items() if size]
    if temporaries is not None:
        said.append(f"gradients, activations and other temporaries {human_bytes(temporaries)}")
    limit = hardware.memory(job.mesh.devices.flat[0])
    has = "" if limit is None else f", which has {human_bytes(limit)}"
    largest = [
        f"{number} x {array}, {human_bytes(size)}{' each' * (number > 1)}"
        for array, size, number in activations.kept(job)[:LARGEST]
    ]
    lines = [f"A step takes, of each device{has}: {', '.join(said)}."]
    if largest:
        lines.append(f"Its largest activations, kept for the backward pass, over all devices: {'; '.join(largest)}.")
    return "\n".join(lines)


def _room(mesh: Mesh) -> int | None:
    """Bytes of one device that this process holds in arrays, or could still get."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    held = sum(
        shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards if shard.device in own[:1]
    )
    if own and own[0].platform == "cpu":  # simulated devices share one memory
        return None if (free := _free()) is None else held + int(SAFE * free) // len(own)
    stats = own[0].memory_stats() if own else None
    return held + stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else None


def _free() -> int | None:
    """Bytes that this process could still get of the host: the least of what the machine has and it is allowed."""
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        found += [limit - pages * resource.getpagesize()] if limit != resource.RLIM_INFINITY else []
    with contextlib.suppress(OSError, ValueError):  # a container's
        folder = Path("/sys/fs/cgroup")
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    return max(min(found), 0) if found else None


# "... (20.00G) exceeds available HBM (15.75G)", or "Used 20.00G of 15.75G hbm": the compiler for TPUs.
_HBM = r"([\d.]+)([KMGT])"
_REFUSED = re.compile(rf"\({_HBM}\) exceeds available HBM \({_HBM}\)|Used {_HBM} of {_HBM} hbm")


def too_large(reason: str, devices: Mesh, takes: str = "") -> DoesNotFitError:
    """What a compiler says of a program that it refuses, with what would help.

    Args:
      reason: what it says.
      devices: for which it compiled.
      takes: of `filled`.
    """
    found = _REFUSED.search(reason)
    needed, limit = None, hardware.memory(devices.devices.flat[0])
    said = reason.splitlines()[0]
    if found:
        parts = [part for part in found.groups() if part]
        needed, limit = (_bytes(number, unit) for number, unit in zip(parts[::2], parts[1::2]))
        what = " for temporaries alone" if "temporaries" in reason[: found.start()] else ""
        said = f"it needs {human_bytes(needed)} on each{what}, which has {human_bytes(limit)}"
    lines = [f"the program does not fit on {sharding.describe(devices)}: {said}.", takes, ADVICE]
    return DoesNotFitError("\n".join(filter(None, lines)), needed, limit)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (" KMGT".index(unit.upper()) if unit else 0))
