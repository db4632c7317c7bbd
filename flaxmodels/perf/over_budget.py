"""What a step takes more than its budget allows, in sentences. Read `compare`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flaxmodels.console import human_bytes
from flaxmodels.memory import DoesNotFitError
from flaxmodels.perf.budget import Budget, Sent, measure


class Slack(NamedTuple):
    """By how much a figure may grow: by the larger of both.

    Attributes:
      share: of it.
      bytes: of bytes.
    """

    share: float
    bytes: int


# What follows from shapes and shardings alone is exact. What the compiler decides is the same each time it compiles the
# same program; another version, or one that makes code for another CPU, fuses and schedules otherwise.
SAME, OTHER = Slack(0.02, 2**12), Slack(0.10, 2**20)
# (How many programs a run compiles is compared for the same compiler only: JAX and Orbax have small ones of their own.)
# FLOPs and bytes are counted before the compiler has the program: another JAX may trace a function otherwise.
TRACED = {True: 0.001, False: 0.02}
NAMES = {"optimizer": "optimizer state", "other": "other state", "data": "the data set", "peak": "peak memory"}
EXACT, DECIDED = ("parameters", "optimizer", "other", "batch", "data"), ("temporaries", "outputs", "peak")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a step stands to its budget.

    Attributes:
      worse: sentences; none where it keeps to it.
      better: sentences on what it takes less: the budget could be tighter.
      notes: sentences on how it was compared.
    """

    worse: tuple[str, ...]
    better: tuple[str, ...]
    notes: tuple[str, ...]


def compare(budget: Budget, found: Budget) -> Verdict:
    """Hold what a step takes against its budget.

    Args:
      budget: as it was written.
      found: as it is now.
    """
    same = budget.compiler == found.compiler
    worse = [*_splits(budget, found)]
    better: list[str] = []
    for said, grown in (*_figures(budget, found, same), *_collectives(budget, found, same)):
        (worse if grown else better).append(said)
    notes = []
    if not same:
        notes = [
            f"compiled by another compiler ({_compilers(budget, found)}): memory and collectives may be up to "
            f"{OTHER.share:.0%} or {human_bytes(OTHER.bytes)} more, and collectives may differ in kind and number"
        ]
    return Verdict(tuple(worse), tuple(better), tuple(notes))


def _compilers(budget: Budget, found: Budget) -> str:
    was, now = budget.compiler, found.compiler
    names = [name for name in sorted(was | now) if was.get(name) != now.get(name)]
    told = {name: f"{name} {was.get(name, 'none')} -> {now.get(name, 'none')}" for name in names}
    return ", ".join((told | {"instructions": "a CPU of other instructions"})[name] for name in names)


def _splits(budget: Budget, found: Budget) -> Iterator[str]:
    """What lies otherwise on the devices: the cause of most else."""
    if budget.devices != found.devices:
        yield f"the mesh is {found.devices}; it was {budget.devices}"
    for path in sorted(budget.splits | found.splits):
        was, now = (of.splits.get(path, "") for of in (budget, found))
        if was and was != now:
            yield f"{path} was split ({was}), is {f'split ({now})' if now else 'whole on each device'}"


def _figures(budget: Budget, found: Budget, same: bool) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it is worse) of each number that changed by more than it may."""
    for dtype in sorted(budget.flops | found.flops):
        was, now = (of.flops.get(dtype, 0) for of in (budget, found))
        if abs(now - was) > TRACED[same] * was:
            yield f"{dtype} FLOPs {_change(was, now)}: {now:.4g}, were {was:.4g}", now > was
    if abs(found.bytes - budget.bytes) > TRACED[same] * budget.bytes:
        was, now = budget.bytes, found.bytes
        yield f"memory traffic {_change(was, now)}: {human_bytes(now)} a step, was {human_bytes(was)}", now > was
    for name in (*EXACT, *DECIDED):
        was, now = (of.memory.get(name, 0) for of in (budget, found))
        slack = Slack(0, 0) if name in EXACT else SAME if same else OTHER
        if abs(now - was) > max(slack.share * was, slack.bytes):
            sizes = f"{human_bytes(now)} of each device, was {human_bytes(was)}"
            yield f"{NAMES.get(name, name)} {_change(was, now)}: {sizes}", now > was
    was, now = (of.memory["donated"] for of in (budget, found))
    if now < was and not _state(found) <= now:
        yield f"the state is no longer donated: {human_bytes(now)} of {human_bytes(_state(found))} is", True
    if same and budget.compiles is not None and found.compiles is not None and budget.compiles != found.compiles:
        was, now = budget.compiles, found.compiles
        yield f"{now - was:+d} program{'s' * (abs(now - was) > 1)} compiled in a run: {now}, were {was}", now > was


def _state(of: Budget) -> int:
    return of.memory["parameters"] + of.memory["optimizer"] + of.memory["other"]


def _change(was: float, now: float) -> str:
    return f"{now / was - 1:+.1%}" if was else "new"


def _collectives(budget: Budget, found: Budget, same: bool) -> Iterator[tuple[str, bool]]:
    """By the same compiler each kind and size counts; by another, the bytes along each axis."""
    if budget.collectives is None or found.collectives is None:
        if (budget.collectives is None) != (found.collectives is None):
            yield "the collectives can't be compared: one of the two programs can't be read", found.collectives is None
        return
    if same:
        was, now = (
            {(r.kind, r.axes, r.part, r.bytes): r for r in of} for of in (budget.collectives, found.collectives)
        )
        rows = [(_number(was.get(key)), _number(now.get(key)), now.get(key) or was[key]) for key in was | now]
        for before, after, row in sorted(rows, key=lambda one: -abs(one[1] - one[0]) * one[2].bytes):
            if before != after:
                yield _sentence(row, after - before), after > before
        return
    for axes in sorted({row.axes for row in (*budget.collectives, *found.collectives)}):
        before, after = (
            sum(r.bytes * r.count for r in of.collectives or () if r.axes == axes) for of in (budget, found)
        )
        if abs(after - before) > max(OTHER.share * before, OTHER.bytes):
            what = f"collectives{_along(axes)} {_change(before, after)}"
            yield f"{what}: {human_bytes(after)} a step, were {human_bytes(before)}", after > before


def _number(row: Sent | None) -> int:
    return row.count if row else 0


def _sentence(row: Sent, more: int) -> str:
    where = f" in the {row.part} pass" if row.part else ""
    of = f" ({row.of})" if row.of else ""
    kind = row.kind + "s" * (abs(more) > 1)
    return f"{more:+d} {kind} of {human_bytes(row.bytes)}{_along(row.axes)}{where}{of}"


def _along(axes: tuple[str, ...]) -> str:
    return f" along {' x '.join(axes)}" if axes else ""


def held(budget: Budget, config: Mapping[str, Any], devices: Sequence[jax.Device]) -> tuple[str, bool]:
    """Measure the step of a config, and hold it against a budget: (what to say, whether it takes more).

    Raises:
      UserError: the config is wrong.
    """
    try:
        found, compiled = measure(config, devices, budget)
    except DoesNotFitError as error:
        return f"over budget\n  {error}", True
    verdict = compare(budget, found)
    said = "over budget" if verdict.worse else "keeps to its budget"
    if not compiled:
        said += "; the program is that of the budget, and was not compiled"
    less, notes = (f"less: {line}" for line in verdict.better), (f"note: {line}" for line in verdict.notes)
    return "\n  ".join([said, *verdict.worse, *less, *notes]), bool(verdict.worse)


def told(found: Budget) -> str:
    """The figures of a budget in a line."""
    flops = sum(found.flops.values())
    parts = [f"peak {human_bytes(found.memory['peak'])} of a device", f"{flops:.4g} FLOPs a step"]
    if found.collectives is not None:
        number = sum(row.count for row in found.collectives)
        size = sum(row.count * row.bytes for row in found.collectives)
        many = f"{number} collective{'s' * (number > 1)} of {human_bytes(size)}"
        parts.append(f"{many}{' together' * (number > 1)}" if number else "no collectives")
    if found.compiles is not None:
        parts.append(f"{found.compiles} programs compiled in a run")
    return f"{found.devices}: {', '.join(parts)}"
