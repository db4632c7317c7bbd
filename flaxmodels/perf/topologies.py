"""The devices of a TPU slice that is not there: enough to compile for it, on any Linux machine, in seconds.

Nothing can be allocated or run on them. What is compiled is what would run: libtpu is the compiler of the real ones.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from flaxmodels import hardware
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError


class _Version(NamedTuple):
    """What slices of a TPU version there are.

    `shapes`, in chips, are all there are of v5e and v6e. Of the others these, and whatever divides into hosts of 2x2x1
    chips and is no larger than a pod.
    """

    pod: int
    shapes: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = {}


# From https://docs.cloud.google.com/tpu/docs, the page of each version.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
VERSIONS: Mapping[str, _Version] = {
    # libtpu would list the two cores of a v4 chip; real ones show as one device. Those of v5p do so by themselves.
    "v4": _Version(4096, options={"chip_config_name": "megacore"}),
    "v5e": _Version(256, _FLAT),
    "v5p": _Version(8960, ((1, 1, 1),)),
    "v6e": _Version(256, _FLAT),
    "tpu7x": _Version(9216, ((1, 1, 1),)),
}
# What libtpu takes to be hosts of 2x2x1, though one machine holds them.
_HOSTS: Mapping[tuple[int, ...], tuple[int, int, int]] = {(1, 1): (1, 1, 1), (2, 4): (2, 4, 1), (1, 1, 1): (1, 1, 1)}
# Other names of the versions: of accelerator types, of device kinds, and in talk.
_ALIASES: Mapping[str, str] = {
    "v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e", "v6": "v6e", "trillium": "v6e",
    "v7": "tpu7x", "v7x": "tpu7x", "tpu7": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x",
}  # fmt: skip
# An accelerator type ends in a number: of chips for v5e and v6e, for the others of cores, two a chip.
_CORES = 2


def devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """All devices of a slice, or of several that a slower network joins.

    Args:
      name: "VERSION:SHAPE" in chips, such as "v5e:4x4" or "v5p:2x2x2". A chip of tpu7x is two devices, others are one.
      num_slices: slices of this shape; `device.slice_index` tells them apart.

    Raises:
      UserError: there is no such slice, or libtpu, the compiler, is not installed.
    """
    version, shape = parse(name)
    if num_slices < 1:
        raise UserError(f"num_slices={num_slices} must be at least 1.")
    options = dict(VERSIONS[version].options)
    if shape in _HOSTS:
        options["chips_per_host_bounds"] = _HOSTS[shape]
    if num_slices > 1:
        options["num_slices"] = num_slices
    hardware.quiet_libtpu()
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except RuntimeError as error:
        raise _refusal(name, str(error)) from error


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """What a name stands for: "v5e:4x4" is ("v5e", (4, 4)). UserError, with what it should be, if there is no such."""
    version, _, rest = name.partition(":")
    if version not in VERSIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", rest):
        meant = _meant(name)
        said = f"Did you mean {meant!r}? " if meant else ""
        raise UserError(
            f"topology {name!r} is not VERSION:SHAPE, such as 'v5e:4x4' or 'v5p:2x2x2'. {said}"
            f"Versions are {', '.join(VERSIONS)}."
        )
    shape = tuple(int(side) for side in rest.split("x"))
    if wrong := _wrong(version, shape):
        raise UserError(f"topology {name!r}: {wrong}")
    return version, shape


def _wrong(version: str, shape: tuple[int, ...]) -> str:
    """Why there is no such slice, and what there is; "" if there is."""
    pod, shapes, _ = VERSIONS[version]
    if shape in shapes:
        return ""
    chips = math.prod(shape)
    if chips > pod:
        return f"{chips} chips are more than the {pod} of a {version} pod. Use several slices: num_slices=N."
    if shapes is _FLAT:
        turned = tuple(sorted(side for side in shape if side > 1))
        near = f" Did you mean '{version}:{_written(turned)}'?" if turned in shapes else ""
        return f"slices of {version} are {', '.join(map(_written, shapes))}.{near}"
    if len(shape) != 3:
        return f"slices of {version} have three sides, in chips, such as {version}:{_written((*shape, 1))}."
    if shape[0] % 2 or shape[1] % 2:
        even = (*(side + side % 2 for side in shape[:2]), shape[2])
        return (
            f"slices of {version} are made of hosts of 2x2x1 chips: the first two sides are even. "
            f"Did you mean '{version}:{_written(even)}'?"
        )
    return ""


def _meant(name: str) -> str | None:
    """The topology that someone means who writes it as "v5litepod-16", "v4-8", "TPU v5e 4X4" or "v7x:2x2x1"."""
    text = name.strip().lower().replace(" lite", "lite")
    parts = re.fullmatch(r"(?:tpu[ _-]?(?=v))?(\w+?)[:=_ -]+([1-9]\d*(?:x[1-9]\d*)*)", text)
    version = _ALIASES.get(parts[1], parts[1]) if parts else ""
    if not parts or version not in VERSIONS:
        return None
    sides = tuple(map(int, parts[2].split("x")))
    shape = sides if len(sides) > 1 else _of_size(version, sides[0])
    return f"{version}:{_written(shape)}" if shape and not _wrong(version, shape) else None


def _of_size(version: str, number: int) -> tuple[int, ...] | None:
    """The shape of the accelerator type VERSION-NUMBER."""
    if VERSIONS[version].shapes is _FLAT:
        return next((shape for shape in _FLAT if math.prod(shape) == number), None)
    shape = [2, 2, 1]
    while math.prod(shape) * _CORES < number:  # doubled where it is shortest: 2x2x2, 2x2x4, 2x4x4, 4x4x4
        shape[max(i for i in range(3) if shape[i] == min(shape))] *= 2
    return tuple(shape) if math.prod(shape) * _CORES == number else None


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _refusal(name: str, reason: str) -> Exception:
    if "not installed" in reason:
        return UserError(
            f"topology {name!r}: to compile for a TPU takes libtpu, and it is not installed. "
            "pip install 'flaxmodels-train[tpu]' brings it, on Linux with an x86-64 processor; no TPU is needed."
        )
    if "lockfile" in reason or "in use" in reason:
        return UserError(
            f"topology {name!r}: another process uses this machine's TPU, and libtpu lets in one at a time "
            f"({reason.splitlines()[0]}). Wait for it, or set JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1, which "
            "is safe as long as this process only compiles."
        )
    return FaultError(f"topology {name!r}: libtpu refuses it: {reason}")
