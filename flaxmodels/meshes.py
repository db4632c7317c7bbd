"""The mesh: which devices, in which order, split along which axes; and a choice where the config makes none.

Axes are in the order of what they send: `data` an all-reduce a step, over the slow network too where there are slices;
`fsdp` an all-gather a layer; `sequence` keys and values; `tensor`, the innermost, something in each half of a layer.
Read `make_mesh`, then `automatic`. Words as in `jax.sharding`: mesh, axis.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from flaxmodels import hardware
from flaxmodels.registry import Positive, UserError

AXES = ("data", "fsdp", "sequence", "tensor")
# A batch is split over both: FSDP is data parallelism whose parameters are sharded too.
BATCH_AXES = ("data", "fsdp")

# `automatic` keeps parameters, optimizer state and gradients within this share of a device's memory: activations and
# what the compiler needs come on top, and a run that is near the edge at its first step passes it at some later one.
STATE_SHARE = 0.25
# More devices `automatic` does not give to `tensor`: each would have a sliver of a matrix, and wait for all others.
MOST_TENSOR = 8


def make_mesh(
    data: Positive | None = None,
    fsdp: Positive = 1,
    tensor: Positive = 1,
    sequence: Positive = 1,
    num_slices: Positive | None = None,
    platform: Literal["cpu", "gpu", "tpu"] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, with the axes of `AXES`.

    Args:
      data: devices along the data axis; None takes what the others leave. Slices are split over it first.
      fsdp: devices over which parameters, gradients and optimizer state are sharded, beside the batch.
      tensor: devices over which heads, MLP and vocabulary are split.
      sequence: devices over which activations are split along their length.
      num_slices: groups of devices between which the network is slow; only `data` crosses it. None: what the devices
        say, one where they say nothing. Simulated devices are cut into as many groups as are asked for.
      platform: what kind of device to use; None takes the best there is.
      devices: default all that JAX finds.

    Raises:
      UserError: there is no such device, the axes don't multiply to the number of devices, or one would cross slices.
    """
    devices = list(find_devices(platform) if devices is None else devices)
    groups = slices(devices, num_slices)
    inner = fsdp * sequence * tensor
    data = max(len(devices) // inner, 1) if data is None else data
    if data * inner != len(devices):
        raise UserError(
            f"mesh: data={data} x fsdp={fsdp} x sequence={sequence} x tensor={tensor} is {data * inner} devices, but "
            f"there are {len(devices)}. Leave mesh.data out and choose fsdp x sequence x tensor to divide "
            f"{len(groups[0])}."
        )
    if data % len(groups):
        raise UserError(
            f"mesh: data={data} is not a multiple of the {len(groups)} slices, and only data parallelism goes between "
            f"them. Choose fsdp x sequence x tensor to divide {len(groups[0])}, the devices of a slice."
        )
    shape = (data // len(groups), fsdp, sequence, tensor)
    # Auto: Linen does not work with the explicit axes that are `jax.make_mesh`'s default.
    return Mesh(np.concatenate([_ordered(group, shape) for group in groups]), AXES, (AxisType.Auto,) * len(AXES))


def _ordered(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """Devices of one slice as an array, so that neighbours along an axis are neighbours in a TPU's torus."""
    try:  # not `jax.make_mesh`, which refuses to split an axis of a torus of three, as 32 x 2 does one of 4 x 4 x 4
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):  # a part of a torus that is no box has no good order: any will do
        return np.array(devices).reshape(shape)


def slices(devices: Sequence[jax.Device], num_slices: int | None = None) -> list[list[jax.Device]]:
    """Devices in groups of equal size, between which the network is slow.

    Args:
      devices: all of the mesh.
      num_slices: as in `make_mesh`.

    Raises:
      UserError: the devices are in another number of slices, or don't divide into so many.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    # On GPUs these are the hosts, or what NVLink joins: FSDP may go further, so they count only where asked for.
    if devices[0].platform == "tpu" or num_slices == len(found):
        groups = [found[index] for index in sorted(found)]
        if num_slices not in (None, len(groups)):
            raise UserError(
                f"mesh.num_slices={num_slices}, but the number of slices that these {len(devices)} devices form is "
                f"{len(groups)}: leave it out."
            )
        if len({len(group) for group in groups}) > 1:
            sizes = ", ".join(str(len(group)) for group in groups)
            raise UserError(f"mesh: the slices have {sizes} devices: expected as many in each.")
    elif len(devices) % (count := num_slices or 1):
        raise UserError(
            f"mesh.num_slices={count} does not divide the {len(devices)} devices: use one of "
            f"{', '.join(map(str, _divisors(len(devices))))}."
        )
    else:
        size = len(devices) // count
        groups = [list(devices[i : i + size]) for i in range(0, len(devices), size)]
    return groups


def find_devices(platform: str | None = None) -> list[jax.Device]:
    """All devices of a kind; None: of the best kind there is. UserError if there are none."""
    hardware.quiet_libtpu()
    try:
        return jax.devices(platform)
    except (RuntimeError, AssertionError) as error:  # the second, bare, where the CUDA plugin is not installed
        asked = [f"mesh.platform={platform!r}"] if platform else []
        asked += [f"JAX_PLATFORMS={name!r}"] if (name := os.environ.get("JAX_PLATFORMS")) else []
        reason = (str(error).strip() or "its plugin is not installed").splitlines()[0]
        raise UserError(
            f"{', '.join(asked) or 'JAX'}: there is no such device ({reason}).\n"
            "Install flaxmodels-train[cuda] or [tpu] for the device, or leave both out to use what is there."
        ) from error


def simulated(count: int) -> list[jax.Device]:
    """`count` devices that this machine's CPU plays, and nothing else in this process, if JAX has not started yet.

    Raises:
      UserError: it has, with fewer.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    devices = find_devices("cpu")
    if len(devices) < count:
        raise UserError(f"{count} simulated devices: JAX has started with {len(devices)}, which can't be changed.")
    return devices[:count]


def describe(mesh: Mesh, num_slices: int | None = None) -> str:
    """The mesh in a line: "8 x cpu: data=4, fsdp=2", "32 x TPU v5 lite in 2 slices: data=2, fsdp=16"."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    count = len(slices(list(mesh.devices.flat), num_slices))
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{f' in {count} slices' * (count > 1)}: {axes}"


def automatic(
    devices: Sequence[jax.Device],
    *,
    state_bytes: int,
    gradient_bytes: int,
    batch_sizes: Sequence[int],
    memory: int | None,
    num_slices: int | None = None,
    tensor_sizes: Sequence[int] | None = None,
) -> tuple[dict[str, int], str]:
    """Axes for a model on devices: all of them, as simply as they can be used.

    Data parallelism where every device can hold parameters, optimizer state and gradients within `STATE_SHARE` of its
    memory. Else FSDP over the fewest devices of a slice that can together, or all of it, and data parallelism over the
    rest: the fewer gather a layer, the sooner they have it. Data x fsdp must divide every batch: where all devices
    don't, the fewest that leave a divisor go to `tensor`, up to `MOST_TENSOR`. Where nothing helps, data x fsdp is all
    of them, and `check_batch` says which batch sizes would do.

    Args:
      devices: all of the mesh.
      state_bytes: of parameters, optimizer state and all else in the train state, whole.
      gradient_bytes: of the gradients, whole.
      batch_sizes: examples of every kind of batch: training, one microbatch, evaluation.
      memory: bytes of one device; None for a CPU, whose devices are simulated and share one memory: data parallelism.
      num_slices: as in `make_mesh`.
      tensor_sizes: what `tensor` has to divide, from `sharding.tensor_sizes`; where there is nothing, it is not chosen.
        None: not known.

    Returns:
      (axes and `num_slices`, arguments for `make_mesh`; why, in words for the log).

    Raises:
      UserError: as `slices`.
    """
    count, groups = len(devices), len(slices(devices, num_slices))
    tensor = 1 if memory is None else _tensor(count, groups, batch_sizes, tensor_sizes)
    within = count // groups // tensor
    whole, limit = state_bytes + gradient_bytes, STATE_SHARE * (memory or math.inf)
    fsdp = next((parts for parts in _divisors(within) if whole / parts / tensor <= limit), within)
    axes = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor, "num_slices": groups}
    if count == 1:
        why = "there is no other"
    elif memory is None:
        why = "devices of a CPU share one memory, so that sharding parameters would gain nothing"
    else:
        within_limit, each = whole <= limit, whole / tensor / fsdp
        why = f"state and gradients, {_size(whole)}, are {'within' if within_limit else 'over'} {STATE_SHARE:.0%} of "
        why += f"a device's {_size(memory)}"
        if not within_limit:
            why += f"; sharded they are {_size(each)} a device" + ", which is still more" * (each > limit)
    if tensor > 1:
        sizes = " and ".join(map(str, sorted(set(batch_sizes))))
        why += f"; batches of {sizes} divide over {count // tensor} devices, not over {count}, so tensor has {tensor}"
    return axes, why


def _tensor(count: int, groups: int, batch_sizes: Sequence[int], sizes: Sequence[int] | None) -> int:
    """The fewest devices for `tensor` that leave a number, at least two, that divides every batch; 1 if none do."""
    common = math.gcd(*batch_sizes)
    for tensor in _divisors(count // groups):
        splits = tensor == 1 or sizes is None or (sizes and not any(size % tensor for size in sizes))
        if splits and tensor <= MOST_TENSOR and tensor < count and common % (count // tensor) == 0:
            return tensor
    return 1


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
