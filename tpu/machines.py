"""The accelerator types of Cloud TPU: what a name such as "v5litepod-16" is, where it is offered, what it costs.

From https://docs.cloud.google.com/tpu/docs, the page of each version, and its "TPU software versions" and "TPU regions
and zones".
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpu.settings import Capacity, UserError

PRICES = Path(__file__).resolve().parent.parent / "flaxmodels" / "perf" / "prices.toml"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """A slice.

    Attributes:
      type: accelerator type, such as "v5litepod-16".
      chip: such as "v5e".
      chips: of the slice.
      hosts: TPU VMs of the slice, each a worker.
      hbm: bytes of a chip.
      peak: FLOP/s of a chip in bfloat16.
      topology: as `flaxmodels plan` names it, such as "v5e:4x4".
      runtime_version: of the image, the one for JAX.
    """

    type: str
    chip: str
    chips: int
    hosts: int
    hbm: int
    peak: float
    topology: str
    runtime_version: str


@dataclasses.dataclass(frozen=True)
class _Family:
    """Types of one name. `single`: the slices that one machine holds whole; other machines have 4 chips."""

    chip: str
    hbm: int
    peak: float
    runtime_version: str
    shapes: tuple[tuple[int, ...], ...]
    zones: tuple[str, ...]
    cores: int = 1  # that a chip counts for in the name
    single: tuple[int, ...] = (1, 4, 8)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16),
    (8, 16, 16),
)  # fmt: skip
# The zones are a hint in messages, not a limit: they change, and some are open to some projects only.
FAMILIES: Mapping[str, _Family] = {
    "v4": _Family("v4", 32 * _GIB, 275e12, "tpu-ubuntu2204-base", _DEEP, ("us-central2-b",), 2, (4,)),
    "v5litepod": _Family(
        "v5e", 16 * _GIB, 197e12, "v2-alpha-tpuv5-lite", _FLAT,
        ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b", "asia-southeast1-b"),
    ),
    "v5p": _Family(
        "v5p", 96 * _GIB, 459e12, "v2-alpha-tpuv5", _DEEP, ("us-central1-a", "us-east5-a", "europe-west4-b"), 2, (4,)
    ),
    "v6e": _Family(
        "v6e", 32 * _GIB, 918e12, "v2-alpha-tpuv6e", _FLAT,
        ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a", "asia-northeast1-b",
         "southamerica-west1-a"),
    ),
}  # fmt: skip
# What people write who mean one of these; and the version whose machines the Cloud TPU API doesn't create.
_ALIASES: Mapping[str, str] = {
    "v5e": "v5litepod", "v5lite": "v5litepod", "v5": "v5p", "v6": "v6e", "v6lite": "v6e", "trillium": "v6e",
}  # fmt: skip


def _types(name: str, family: _Family) -> dict[str, Machine]:
    found = {}
    for shape in family.shapes:
        chips = math.prod(shape)
        hosts = 1 if chips in family.single else chips // 4
        found[f"{name}-{chips * family.cores}"] = Machine(
            f"{name}-{chips * family.cores}", family.chip, chips, hosts, family.hbm, family.peak,
            f"{family.chip}:{'x'.join(map(str, shape))}", family.runtime_version,
        )  # fmt: skip
    return found


TYPES: Mapping[str, Machine] = {
    key: machine for name, family in FAMILIES.items() for key, machine in _types(name, family).items()
}


def of(type: str) -> Machine:
    """The machine of an accelerator type, such as "v5litepod-16".

    Raises:
      UserError: there is no such type.
    """
    if type in TYPES:
        return TYPES[type]
    parts = re.fullmatch(r"([a-z]\w*)-(\d+)", type.lower())
    name = _ALIASES.get(parts[1], parts[1]) if parts else ""
    if parts and name in FAMILIES:
        sizes = [int(key.rpartition("-")[2]) for key in TYPES if key.startswith(f"{name}-")]
        near = f"{name}-{min(sizes, key=lambda size: (abs(size - int(parts[2])), size))}"
    else:
        near = next(iter(difflib.get_close_matches(type, TYPES, n=1)), "")
    there = f"Of {name} there are: " if name in FAMILIES else "There are: "
    names = [key for key in TYPES if name not in FAMILIES or key.startswith(f"{name}-")]
    said = f"Did you mean {near!r}? " if near else ""
    if name in ("v7", "v7x", "tpu7x", "tpu7", "ironwood"):
        said = "The Cloud TPU API, which this is for, creates none of that version. "
    raise UserError(f"--type={type!r} is not an accelerator type. {said}{there}{', '.join(names)}.")


def offered(machine: Machine, zone: str) -> str:
    """What to say of a zone that isn't known to have such machines; "" where it is."""
    zones = next(family.zones for family in FAMILIES.values() if family.chip == machine.chip)
    if zone in zones:
        return ""
    return f"{machine.chip} is offered in {', '.join(zones)} (of zone {zone!r} we know nothing)."


def price(machine: Machine, capacity: Capacity, prices: Path | None = None) -> float | None:
    """USD an hour of one chip, by prices.toml and, where it says otherwise, by the user's own file.

    Args:
      machine: whose chip.
      capacity: a reservation is paid for by contract: its price is that on demand unless the user's file has one under
        `reserved`.
      prices: a TOML file of the form of prices.toml, a table a chip.

    Returns:
      None where no file names the chip.

    Raises:
      UserError: the user's file can't be read, or its price is no number.
    """
    found = _read(PRICES).get(machine.chip, {}) | (_read(prices).get(machine.chip, {}) if prices else {})
    key = (
        "spot" if capacity == "spot" else "reserved" if "reserved" in found and capacity == "reserved" else "on_demand"
    )
    value = found.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(
            f"--prices={str(prices)!r}: {key}={value!r} of {machine.chip!r} is no price: expected USD an hour of a "
            "chip, at least 0."
        )
    return float(value)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--prices={str(path)!r} can't be read: {error}. Expected a TOML file, a table a chip, such as [v5e] with "
            "on_demand = 1.2 below it."
        ) from error
    for chip, table in found.items():
        if not isinstance(table, dict):
            raise UserError(
                f"--prices={str(path)!r}: {chip!r} is not a table, such as [v5e] with on_demand = 1.2 below."
            )
    return found
