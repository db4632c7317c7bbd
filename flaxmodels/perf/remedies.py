"""A config that needs more memory than there is: the smallest change of it that fits, proved by compiling it.

Read `smallest_change`. What is tried first changes results least: see `levers.savers`.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flaxmodels.console import human_bytes
from flaxmodels.perf import cells, levers
from flaxmodels.perf.cells import Cell, Target
from flaxmodels.perf.levers import Layout, Lever, Look
from flaxmodels.perf.search import Measure

Changes = dict[str, Any]
Found = tuple[Changes, Cell]


def smallest_change(
    config: Mapping[str, Any],
    target: Target,
    *,
    limit: int | None = None,
    seconds: float = math.inf,
    measure: Measure = cells.cell,
) -> Found | None:
    """The change that alters the results of a run least, and of its kind the smallest, after which a step fits.

    One key after the other: where the data live, steps of a dispatch, remat, chunks of the loss, microbatches, the
    mesh. What can't save enough is not compiled. Where none is enough alone, one after the other is set as far as it
    goes, until it fits; then each is taken back as far as it can be. Where all are not enough: with the dtype of first
    moments too, and, in place of microbatches, with the batch size.

    Args:
      config: of a run.
      target: the devices.
      limit: bytes that a step may take of one device; None is what the device has.
      seconds: no compilation is begun later than this.
      measure: what compiles.

    Returns:
      (changes by dotted key, empty where it fits as it is; the cell that proves it); None where nothing was found.
    """
    end, made = time.monotonic() + seconds, dict[str, Cell]()

    def attempt(changes: Changes) -> Cell:
        key = repr(sorted(changes.items()))
        if key not in made:
            if made and time.monotonic() > end:
                raise TimeoutError
            made[key] = measure(config, target, changes)
        return made[key]

    def fits(cell: Cell) -> bool:
        return cell.fits and (limit is None or (cell.memory is not None and cell.memory.peak <= limit))

    base = attempt({})
    if fits(base):
        return {}, base
    if base.memory is None:
        return None
    room = min(value for value in (limit, base.memory.limit, sys.maxsize) if value is not None)
    seen = levers.look(config, target)
    best: Found | None = None
    with contextlib.suppress(TimeoutError):
        for new, all_of_them in _tiers(seen, base, target, room):
            for lever in new:
                steps = [step for step in lever.steps if base.memory.peak - _most(lever, step, seen, base) <= room]
                if found := _least(steps, attempt, fits):
                    return found
            for changes in _together(all_of_them, attempt, fits):
                best = changes, attempt(changes)
            if best:
                break
    return best


def _tiers(seen: Look, base: Cell, target: Target, room: int) -> Iterator[tuple[list[Lever], list[Lever]]]:
    """What may be changed, in the order of how little it changes results: (what is new in a tier, all to be combined).

    First what leaves them but for rounding; then the dtype of moments; then the batch, for which microbatches have
    nothing to do.
    """
    savers, kinds = levers.savers(seen, base.mesh), (dict[int, Layout](), dict[int, Layout]())
    for layout in levers.layouts(seen, target):  # of those whose state is equally large, the one that sends least
        simple = all(layout.axes[axis] == base.mesh[axis] for axis in ("tensor", "sequence"))
        if layout.axes != base.mesh and layout.state < room:
            kinds[not simple].setdefault(layout.state, layout)
    steps = [
        tuple(levers.of_layout(seen, least[state].axes) for state in sorted(least, reverse=True)) for least in kinds
    ]
    mesh = [Lever("mesh", "state", each) for each in steps if each]
    batch = [lever for lever in savers if lever.name == "data.batch_size"]
    moments = [lever for lever in savers if lever.name == "optim.moments"]
    exact = [lever for lever in savers if lever not in (*batch, *moments)] + mesh
    yield exact, exact
    yield moments, exact + moments
    yield batch, [lever for lever in exact if lever.name != "train.microbatches"] + moments + batch


def _most(lever: Lever, step: Changes, seen: Look, base: Cell) -> float:
    """Bytes of one device that a change can save at most."""
    memory = base.memory
    if memory is None or lever.part == "state":
        return math.inf
    own, value = seen.values.get(lever.name), step[lever.name]
    working = memory.peak - memory.state - memory.data - memory.batch
    if lever.name == "train.microbatches":
        return working * (1 - own / value)
    if lever.name == "data.batch_size":
        return (working + memory.batch) * (1 - value / own)
    return {"data": memory.data, "batch": memory.batch, "optimizer": memory.optimizer}.get(lever.part, working)


def _least(steps: Sequence[Changes], attempt: Callable[[Changes], Cell], fits: Callable[[Cell], bool]) -> Found | None:
    """The first of `steps` that fits, by halving: each needs less memory than the one before."""
    low, high, ahead = 0, len(steps), 0
    while low < high:  # the first most likely does; so it is asked before the middle
        middle = (low + high) // 2 if high < len(steps) else min(low + ahead, high - 1)
        low, high = (low, middle) if fits(attempt(steps[middle])) else (middle + 1, high)
        ahead = 2 * ahead + 1
    return (steps[low], attempt(steps[low])) if low < len(steps) else None


def _together(
    ladder: Sequence[Lever], attempt: Callable[[Changes], Cell], fits: Callable[[Cell], bool]
) -> Iterator[Changes]:
    """Changes of several keys, each smaller than the one before; all fit."""
    changes, used, enough = Changes(), list[Lever](), False
    for lever in ladder:
        for step in reversed(lever.steps):  # microbatches that suit one mesh may not suit the next
            cell = attempt({**changes, **step})
            if not cell.refusal:
                changes, enough = {**changes, **step}, fits(cell)
                used.append(lever)
                break
        if enough:
            break
    else:
        return
    yield changes
    for lever in reversed(used):
        keys = {key for step in lever.steps for key in step}
        others = {key: value for key, value in changes.items() if key not in keys}
        if found := _least([others, *({**others, **step} for step in lever.steps)], attempt, fits):
            changes = found[0]
            yield changes


# What a change does to the results of a run; "" where nothing.
EFFECTS: Mapping[str, str] = {
    "model.remat": "results stay the same but for rounding, and a step computes more",
    "loss.chunks": "results stay the same but for rounding",
    "train.microbatches": "results stay the same but for rounding, draws of dropout, and BatchNorm's statistics",
    "mesh": "results stay the same but for rounding",
    "optim.moments": "first moments are kept in fewer bits",
    "data.batch_size": "a smaller batch learns differently: the learning rate and the duration may want to change",
}


def flags(changes: Mapping[str, Any]) -> str:
    """Changes as a command line has them."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def sentence(found: Found | None, limit: int | None = None) -> str:
    """What `smallest_change` found, in words.

    Args:
      found: what it returned.
      limit: what it was given.
    """
    if found is None:
        return "No change of remat, chunks, microbatches, mesh, moments or batch size was found that fits."
    changes, cell = found
    least = limit if limit is not None or cell.memory is None else cell.memory.limit
    peak = cell.memory.peak if cell.memory else 0
    takes = f"a step takes {human_bytes(peak)}" + (f" of {human_bytes(least)}" if least else "")
    if not changes:
        return f"It fits as it is: {takes}."
    names = (key.partition(".")[0] if key.startswith("mesh.") else key for key in changes)
    effects = dict.fromkeys(EFFECTS[name] for name in names if name in EFFECTS)
    return f"The smallest change that fits: {flags(changes)}\nCompiled with it, {takes}" + (
        f"; {'; '.join(effects)}." if effects else "."
    )
