"""What a device can do at best, and what it costs to rent: the figures that a roofline is drawn with.

Data sheets are of chips; here a figure is of one JAX *device*, which is half a chip of TPU 7x, and a share of the host
where a CPU is cut into simulated devices.
"""

import dataclasses
import functools
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flaxmodels import hardware
from flaxmodels.perf import this_cpu
from flaxmodels.registry import UserError, suggest

CPU = "cpu"
PRICES = Path(__file__).with_name("prices.toml")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at best.

    Attributes:
      name: of the chip, a key of `CHIPS`, or `CPU`.
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes/s, reads and writes together.
      peak: FLOP/s of matrix products, a multiply-add being two, by the names that `count` gives: "bfloat16", "int8",
        "float32" as JAX computes it by default (one pass in bfloat16 on TPUs, TF32 on GPUs), "float32 highest" with
        `jax.lax.Precision.HIGHEST`.
      link: bytes/s that a device can send to others of its slice or node, over all links together, one way.
      slow_link: bytes/s that it can send to other slices or nodes: its share of the host's network.
      torus: dimensions of the torus that the links make; 0 where a switch joins all with all.
      closes: a side of a slice closes to a ring where its length is a multiple of this; 0 for never.
      devices: JAX devices of a chip.
      efficiency: the part of the roofline that well-tuned training reaches; published figures, see `source`.
      source: of all this.
    """

    name: str
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    link: float
    slow_link: float
    torus: int
    closes: int
    devices: int
    efficiency: float
    source: str

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrix products of a dtype; of one that the data sheet leaves out, those of the next that it has.

        That is, of what the values would be computed in: narrow integers in int8 or else in bfloat16, float8 and
        float16 in bfloat16, anything else as slowly as anything is.
        """
        kind = "float8" if dtype.startswith("float8") else "int8" if dtype in ("uint8", "int4", "uint4") else dtype
        tried = (kind, "bfloat16") if kind in ("float8", "int8", "float16") else (kind,)
        return next((self.peak[name] for name in tried if name in self.peak), min(self.peak.values()))


def _known(name: str) -> hardware.Kind:
    return next(kind for kind in hardware.KINDS.values() if kind.name == name)


def _tpu(
    name: str, peak: tuple[float, float, float], hbm: float, ici: float, torus: int, network: float,
    efficiency: float, said: str,
) -> Chip:  # fmt: skip
    """Of one device, from figures of a chip.

    Args:
      name: of the chip.
      peak: TFLOP/s in bfloat16, TOP/s in int8, TFLOP/s in float8; 0 for what it has not.
      hbm: GB/s.
      ici: GB/s of all links, both ways.
      torus: dimensions.
      network: Gbit/s of the data center's network, a chip.
      efficiency: see `Chip`.
      said: where.
    """
    kind = _known(name)
    parts = kind.devices_per_chip
    bfloat16, int8, float8 = peak
    # Three and six passes of bfloat16: https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision.
    tera = {"bfloat16": bfloat16, "float32": bfloat16, "float32 high": bfloat16 / 3, "float32 highest": bfloat16 / 6}
    tera |= {key: rate for key, rate in (("int8", int8), ("float8", float8)) if rate}
    return Chip(
        name, kind.usable, hbm * 1e9 / parts, {key: rate * 1e12 / parts for key, rate in tera.items()},
        ici / 2 * 1e9 / parts, network / 8 * 1e9 / parts, torus, 16 if torus == 2 else 4, parts, efficiency,
        f"https://docs.cloud.google.com/tpu/docs/{name}; efficiency: {said}",
    )  # fmt: skip


def _gpu(
    name: str, peak: tuple[float, float, float], hbm: float, nvlink: float, network: float, efficiency: float, said: str
) -> Chip:
    """Of one GPU.

    Args:
      name: of the GPU.
      peak: without sparsity: TFLOP/s in bfloat16 and, without tensor cores, in float32; TOP/s in int8.
      hbm: GB/s.
      nvlink: GB/s, both ways.
      network: Gbit/s of the node's network, a GPU.
      efficiency: see `Chip`.
      said: where.
    """
    bfloat16, float32, int8 = peak
    # TF32 unless asked: https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision.
    tera = {"bfloat16": bfloat16, "float32": bfloat16 / 2, "float32 high": bfloat16 / 2, "float32 highest": float32}
    tera |= {"int8": int8} if name.startswith("A100") else {"int8": int8, "float8": int8}
    return Chip(
        name, _known(name).usable, hbm * 1e9, {key: rate * 1e12 for key, rate in tera.items()},
        nvlink / 2 * 1e9, network / 8 * 1e9, 0, 0, 1, efficiency,
        f"Nvidia's data sheet of the {name} SXM; efficiency: {said}",
    )  # fmt: skip


_MAXTEXT = "MFU of MaxText, https://github.com/AI-Hypercomputer/maxtext"
_NEAREST = "none is published that we know of; that of the generation before"
_ALL = (
    _tpu("v4", (275, 275, 0), 1200, 600, 3, 50, 0.567, _MAXTEXT),
    _tpu("v5e", (197, 393, 0), 819, 400, 2, 25, 0.64, f"{_MAXTEXT}, 61 to 67 %"),
    _tpu("v5p", (459, 918, 459), 2765, 1200, 3, 50, 0.715, f"{_MAXTEXT}, 16 to 32 billion parameters"),
    _tpu("v6e", (918, 1836, 918), 1600, 800, 2, 100, 0.455, f"{_MAXTEXT}, Llama 3.1 8B"),
    _tpu("tpu7x", (2307, 0, 4614), 7380, 1200, 3, 100, 0.455, _NEAREST),
    _gpu("A100", (312, 19.5, 624), 2039, 600, 200, 0.52, "Narayanan et al. 2021, arXiv:2104.04473, 52 % of the peak"),
    _gpu("A100-40GB", (312, 19.5, 624), 1555, 600, 200, 0.52, "that of the A100"),
    _gpu("H100", (989.4, 67, 1979), 3350, 900, 400, 0.497, f"{_MAXTEXT}, Llama 2 7B"),
    _gpu("H200", (989.4, 67, 1979), 4800, 900, 400, 0.497, "that of the H100, which computes as fast"),
    _gpu("B200", (2250, 75, 4500), 8000, 1800, 400, 0.497, _NEAREST),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _ALL}


def of(device: jax.Device) -> Chip:
    """The chip of a device, by its kind; of a CPU, by measurement.

    Raises:
      UserError: a kind that the table lacks.
    """
    if device.platform == "cpu":
        return measured_cpu(len(device.client.local_devices()) or 1)
    kind = hardware.KINDS.get(device.device_kind)
    if kind is None or kind.name not in CHIPS:
        known = sorted(name for name, kind in hardware.KINDS.items() if kind.name in CHIPS)
        raise UserError(
            f"what a device of the kind {device.device_kind!r} can do is not known, so there is no roofline to hold it "
            f"against. Known are {', '.join(known)}, and CPUs, which are measured."
        )
    return CHIPS[kind.name]


# What our own steps reach of this roofline on one core of an AMD EPYC: an MLP half, convolutions and a small
# transformer a quarter to a third. XLA multiplies small matrices less well than those that are measured.
CPU_EFFICIENCY = 0.35


@functools.cache
def measured_cpu(devices: int) -> Chip:
    """This machine's CPU, cut into so many simulated devices; see `this_cpu.measured`."""
    found = this_cpu.measured()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices
    copied = found.bandwidth / devices
    # Simulated devices send each other copies: a byte is read and written.
    return Chip(
        CPU, memory, copied, {dtype: rate / devices for dtype, rate in found.peak.items()}, copied / 2, copied / 2,
        0, 0, devices, CPU_EFFICIENCY, f"measured on {found.date}: {found.machine}; efficiency: our own steps",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Price:
    """What renting a chip costs.

    Attributes:
      on_demand: USD for an hour of a chip; None where no price is known.
      spot: the same of a machine that the owner may take back; None where no price is known.
      date: when it was looked up, "YYYY-MM-DD"; "" where no price is known.
      source: where, and for which region.
    """

    on_demand: float | None = None
    spot: float | None = None
    date: str = ""
    source: str = ""


def price(name: str, path: str | Path | None = None, spot: bool = False) -> Price:
    """What a chip costs by `prices.toml`, and where a file of the user's own says otherwise, by that.

    Args:
      name: of a chip, as in `CHIPS`; one that no file names has no price.
      path: a TOML file, a table a chip: `[v5e]`, `on_demand = 1.1`. What it leaves out is taken from ours; the
        date is not, where the price that counts is its own.
      spot: count the price of machines that the owner may take back.

    Raises:
      UserError: the file can't be read, or has a chip or a key that there is not.
    """
    own = prices(Path(path)).get(name, {}) if path else {}
    undated = {"date": "", "source": ""} if ("spot" if spot else "on_demand") in own and "date" not in own else {}
    return Price(**prices(PRICES).get(name, {}) | undated | own)


def prices(path: Path) -> dict[str, dict[str, Any]]:
    """All prices of a file, checked."""
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"prices {str(path)!r} can't be read: {error}") from error
    for name, table in found.items():
        if name not in (*CHIPS, CPU):
            raise UserError(f"prices {str(path)!r}: there is no chip {name!r}. {suggest(name, (*CHIPS, CPU))}")
        _check(table, f"prices {str(path)!r}, {name}")
    return {name: table | {"date": str(table["date"])} if "date" in table else table for name, table in found.items()}


def _check(table: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{where}: {table!r} is not a table, such as [v5e] with on_demand = 1.2 below it.")
    known = [field.name for field in dataclasses.fields(Price)]
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}. {suggest(key, known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if key in ("on_demand", "spot") and not number:
            raise UserError(f"{where}: {key}={value!r} is not a price: expected USD an hour, at least 0.")
