"""What a run of a config would take on machines that need not be there: does it fit, how fast at best, for how much?

Read `plan`. Each machine is a `Row`: the config as it is, compiled for it; where it does not fit, the smallest change
that does; and with `search`, the best that was found. `plan_show` prints, stores and draws them.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flaxmodels.perf import cache, cells, chips, remedies
from flaxmodels.perf import search as searching
from flaxmodels.perf.cells import Cell, Target
from flaxmodels.perf.chips import Price

# What is planned for where nobody says: one chip, a host, and several of them, of what can be rented most easily.
TOPOLOGIES = ("v5e:1x1", "v5e:2x2", "v5e:4x4", "v6e:1x1", "v6e:2x2", "v5p:2x2x1")
# Where a config asks for axes that these devices don't multiply to.
AUTO: Mapping[str, Any] = {"mesh": "auto"}
# What `meshes` says then; what is wrong in the section itself is said otherwise.
_OTHERS = re.compile(r"mesh: (data=|the slices have )|mesh\.num_slices=\d+(, but| does not divide)")

# After which no compilation is begun that looks for the smallest change.
SECONDS = 600.0

# Bytes of activations that a TPU may keep on the chip, in whole or in part.
ON_CHIP = 2**28
# Bytes of a device, bottom to top: what a `Cell` says of it.
CLASSES: Mapping[str, Callable[[Cell], int]] = {
    "parameters": lambda cell: cell.memory.parameters if cell.memory else 0,
    "optimizer state": lambda cell: cell.memory.optimizer + cell.memory.other if cell.memory else 0,
    "data and batch": lambda cell: cell.memory.data + cell.memory.batch if cell.memory else 0,
    "gradients": lambda cell: cell.gradients,
    "activations, temporaries": lambda cell: cell.activations,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One machine.

    Attributes:
      cell: the config as it is; with `mesh: auto` where its mesh is for another number of devices.
      chips: of the machine.
      chip: its name.
      efficiency: the part of the roofline that well-tuned training reaches on it; `hours` and `usd` count with it.
      price: of a chip.
      spot: whether the price of machines that the owner may take back counts.
      largest_batch: that fits, over all devices, with the same mesh; None where it is not known.
      proved: whether `largest_batch` was compiled; else it is an estimate from how activations grow.
      remedy: the smallest change that fits, compiled, where the config does not.
      ranked: what a search compiled, best first; empty without one.
    """

    cell: Cell
    chips: int
    chip: str
    efficiency: float
    price: Price
    spot: bool
    largest_batch: int | None = None
    proved: bool = False
    remedy: Cell | None = None
    ranked: tuple[Cell, ...] = ()

    @property
    def best(self) -> Cell:
        """The best that is known to fit; else the config as it is."""
        return next((cell for cell in (self.found, self.cell, self.remedy) if cell and cell.fits), self.cell)

    @property
    def found(self) -> Cell | None:
        """The best of a search, with the batch of the config, which learns as it did, if any with it fits."""
        own = (cell for cell in self.ranked if cell.fits and "data.batch_size" not in cell.changes)
        return next(own, self.ranked[0] if self.ranked else None)

    def hours(self, cell: Cell) -> float | None:
        """Of a whole run; None where it does not fit."""
        line = cell.roofline
        return cell.steps * line.seconds / self.efficiency / 3600 if line else None

    def usd(self, cell: Cell) -> float | None:
        """What a run costs; None where it does not fit, or no price is known."""
        hours, rate = self.hours(cell), self.price.spot if self.spot else self.price.on_demand
        return None if hours is None or rate is None else hours * rate * self.chips


def rest(cell: Cell) -> int:
    """Bytes of a device that no class has: the program and padding; less than 0 where temporaries share memory."""
    return cell.memory.peak - sum(of(cell) for of in CLASSES.values()) if cell.memory else 0


def plan(
    config: Mapping[str, Any],
    targets: Sequence[Target],
    *,
    search: bool = False,
    most: int = 12,
    prices: Path | None = None,
    spot: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Compile a config for machines, one after the other.

    Args:
      config: of a run.
      targets: the machines, from `cells.targets`.
      search: also try other meshes, remat, microbatches and batches, and prove the largest batch.
      most: cells to compile for each machine in a search.
      prices: a file of the user's own, see `chips.price`.
      spot: count with spot prices.
      say: is told what is done.

    Returns:
      A row for each machine, in order.

    Raises:
      UserError: the file of prices is wrong.
    """
    named = [chips.price(target.chip.name, prices, spot) for target in targets]
    cache.look_again()
    rows = []
    for number, (target, price) in enumerate(zip(targets, named, strict=True), 1):
        told = partial(_told, say, f"[{number}/{len(targets)}] {target.name}")
        rows.append(_row(config, target, price, search, most, spot, told))
    return rows


def _told(say: Callable[[str], None], head: str, text: str) -> None:
    say(f"{head}: {text}")


def _row(
    config: Mapping[str, Any],
    target: Target,
    price: Price,
    search: bool,
    most: int,
    spot: bool,
    say: Callable[[str], None],
) -> Row:
    say("the config as it is")
    cell, own = cells.cell(config, target), config
    if _OTHERS.match(cell.refusal):
        say("its mesh is for another number of devices; with mesh=auto")
        cell, config = cells.cell(config, target, AUTO), cells.changed(config, AUTO)
    chip, ranked = target.chip, tuple[Cell, ...]()
    if search:
        told = (f"search, {n} of at most {most}" for n in itertools.count(1))
        ranked = tuple(searching.search(config, target, most, told=lambda _: say(next(told))))
    remedy = None
    if not cell.fits and not cell.refusal:
        say("it does not fit: what would?")
        found = remedies.smallest_change(config, target, seconds=SECONDS)
        remedy = found and found[1]
    largest = None
    if search and not cell.refusal:
        say("the largest batch")
        largest = searching.largest_batch(config, target)
    else:
        largest = estimated_batch(cell, config.get("train", {}).get("microbatches", 1))
    if config is not own:
        remedy, ranked = remedy and _of_own(remedy, own), tuple(_of_own(one, own) for one in ranked)
    return Row(
        cell=cell, chips=-(-len(target.devices) // chip.devices), chip=chip.name, efficiency=chip.efficiency,
        price=price, spot=spot, largest_batch=largest, proved=search, remedy=remedy, ranked=ranked,
    )  # fmt: skip


def _of_own(cell: Cell, config: Mapping[str, Any]) -> Cell:
    """A cell that was found from `AUTO`, with the changes that make it of the config itself: all axes of its mesh."""
    if not cell.mesh:  # refused
        return cell
    mesh: dict[str, Any] = {f"mesh.{axis}": size for axis, size in cell.mesh.items()}
    given = config.get("mesh")
    if isinstance(given, Mapping) and given.get("num_slices"):
        mesh["mesh.num_slices"] = None
    others = {key: value for key, value in cell.changes.items() if key.partition(".")[0] != "mesh"}
    return dataclasses.replace(cell, changes={**mesh, **others})


def estimated_batch(cell: Cell, microbatches: int) -> int | None:
    """The largest batch on the mesh of a cell, if memory grows in a line from there.

    Each example takes its share of the activations; where these are so small that they may lie on the chip, its share
    of what JAX would save for the backward pass, which is more than the compiler keeps.

    Returns:
      A multiple of what the mesh and the microbatches divide a batch into; None where not even that fits, or nothing is
      known.
    """
    memory, size = cell.memory, cell.batch_size
    if memory is None or memory.limit is None:
        return None
    unit = cell.mesh["data"] * cell.mesh["fsdp"] * microbatches
    each = (cell.activations if cell.activations > ON_CHIP else max(cell.activations, cell.saved)) + memory.batch
    most = int(size + (memory.limit - memory.peak) / each * size) // unit * unit
    return most if most >= unit else None
