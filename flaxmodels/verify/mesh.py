"""`flaxmodels verify mesh`: a config trained on one simulated device, and on many, split in every way there is.

The mesh changes nothing: all start from the same bits, see the same batches, and train alike, but for the order in
which sums are taken. Everything is in float32, so that this order is all that may show. Read `run`.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxmodels import meshes, registry
from flaxmodels.job import Job, assemble
from flaxmodels.registry import UserError
from flaxmodels.verify import tracing
from flaxmodels.verify.tracing import Trace, Tracer

# Programs that are compiled side by side: XLA takes one core for each, and each holds the data of a config.
COMPILED_AT_ONCE = 2
EQUAL, DIFFERS, SKIPPED, REFERENCE = "equal", "DIFFERS", "skipped", "reference"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to train the config.

    Attributes:
      devices: how many.
      axes: of the mesh; {} on one device.
      microbatches: parts of a batch.
    """

    devices: int
    axes: Mapping[str, int]
    microbatches: int

    @property
    def mesh(self) -> str:
        """The axes in words."""
        return " x ".join(f"{name} {size}" for name, size in self.axes.items()) or "one device"

    @property
    def parts(self) -> int:
        """Devices over which a microbatch is split."""
        return math.prod(size for name, size in self.axes.items() if name in meshes.BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found in a cell.

    Attributes:
      cell: which.
      verdict: `EQUAL`, `DIFFERS`, `SKIPPED` or `REFERENCE`.
      loss: the greatest relative difference of the loss of a step; NaN where nothing was compared.
      grad_norm: the same of the gradient's norm.
      why: it was skipped, or what differs first.
    """

    cell: Cell
    verdict: str
    loss: float = math.nan
    grad_norm: float = math.nan
    why: str = ""

    def __str__(self) -> str:
        cell, compared = self.cell, not math.isnan(self.loss)
        numbers = [f"{x:.1e}" if compared else "" for x in (self.loss, self.grad_norm)]
        line = f"{cell.devices:>7}  {cell.mesh:<20}  {cell.microbatches:>12}  {numbers[0]:>8}  {numbers[1]:>9}  "
        return line + self.verdict + f": {self.why}" * bool(self.why)


HEADER = f"{'devices':>7}  {'mesh':<20}  {'microbatches':>12}  {'loss':>8}  {'grad norm':>9}"


def run(
    config: Mapping[str, Any],
    *,
    steps: int = 20,
    tolerance: float = 2e-5,
    devices: int = 8,
    accumulation: Sequence[int] = (1, 4),
    show: Callable[[str], None] = print,
) -> tuple[Row, ...]:
    """Train the first steps of a config in every cell, and compare.

    Each cell is held against one device that computes the batch whole. Where microbatches change the loss by design
    (dropout draws a mask for each, BatchNorm normalises each by itself) it is held against one device with as many.
    Meshes and precision of the config itself are not looked at.

    Args:
      config: of a run, with all its sections.
      steps: to train in each cell.
      tolerance: relative, of the loss and the gradient's norm of each step.
      devices: 1, 2, 4 and so on up to so many are simulated on the CPU; JAX must not have started with fewer.
      accumulation: numbers of microbatches.
      show: is given each line of the table when it is known.

    Returns:
      A row for each cell. All is well where none has the verdict `DIFFERS`, and some have `EQUAL`.

    Raises:
      UserError: the config is wrong, or its loss does not stay finite on one device.
    """
    if devices < 2 or devices & (devices - 1):
        raise UserError(f"--devices={devices}: expected a power of two, 2 or more.")
    for name, least in (("steps", steps), ("accumulation", min(accumulation))):
        if least < 1:
            raise UserError(f"--{name}: {least} is out of range, expected at least 1.")
    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance={tolerance:g} is out of range, expected 0 or more, and less than 1.")
    available = meshes.simulated(devices)
    # The batch in one piece is what all else is held against, whether it was asked for or not.
    proof, begun = _Proof(config, steps, tolerance, available), time.monotonic()
    rows = list(proof.alone(sorted({1, *accumulation})))
    splits = [(count, axes) for count in _counts(devices) for axes in _meshes(count)]
    total = len(rows) + len(splits) * len(accumulation)
    show(f"{total} cells of {proof.steps} steps; one device took {time.monotonic() - begun:.0f} s\n{HEADER}")
    for row in rows:
        show(str(row))
    with concurrent.futures.ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        try:
            prepare = partial(proof.prepare, accumulation=accumulation)
            for (count, axes), prepared in zip(splits, _ahead(pool, prepare, splits), strict=True):
                for parts in accumulation:
                    rows.append(proof.row(Cell(count, axes, parts), prepared))
                    show(str(rows[-1]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return tuple(rows)


def _ahead(pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, as many computed ahead as threads can work on."""
    waiting: deque[concurrent.futures.Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > COMPILED_AT_ONCE:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def verdict(rows: Sequence[Row], tolerance: float) -> tuple[bool, str]:
    """Whether all is well, and the closing line."""
    count = {name: sum(row.verdict == name for row in rows) for name in (EQUAL, DIFFERS, SKIPPED)}
    skipped = f"; {count[SKIPPED]} were skipped" if count[SKIPPED] else ""
    if count[DIFFERS]:
        first = next(row for row in rows if row.verdict == DIFFERS)
        differ = f"{count[DIFFERS]} of {count[EQUAL] + count[DIFFERS]} cells differ{skipped}"
        return False, f"FAILED: {differ}. The first, {first.cell.mesh} in {first.cell.microbatches}: {first.why}"
    if not count[EQUAL]:
        return False, f"FAILED: nothing could be compared{skipped}"
    return True, f"passed: {count[EQUAL]} cells train alike, within {tolerance:g}{skipped}"


def _counts(devices: int) -> list[int]:
    """2, 4, 8 and so on up to `devices`."""
    return [2**i for i in range(1, devices.bit_length())]


def _meshes(count: int) -> list[dict[str, int]]:
    """The axes to try on `count` devices."""
    half = count // 2
    combined = [{"data": half, "fsdp": 2}, {"fsdp": half, "tensor": 2}, {"data": 2, "sequence": half}]
    return [{"data": count}, {"fsdp": count}, *(combined if half > 1 else [{"tensor": 2}, {"sequence": 2}])]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A mesh, compiled: the bits of its fresh state, and a tracer for each number of microbatches that can be."""

    fresh: Mapping[str, str]
    tracers: Mapping[int, Tracer]
    why: str = ""  # nothing can be


class _Proof:
    """Trains in cells, and holds them against their references."""

    def __init__(self, config: Mapping[str, Any], steps: int, tolerance: float, devices: Sequence[jax.Device]) -> None:
        self.config, self.steps, self.tolerance, self.devices = registry.plain(config), steps, tolerance, devices
        self._batch_size = 0
        self._fresh: Mapping[str, str] = {}
        self._references: dict[int, tuple[Tracer, Trace]] = {}  # by microbatches
        self._by_design = ""  # why microbatches change the loss
        self._explained = False

    def alone(self, accumulation: Sequence[int]) -> Iterator[Row]:
        """One device: the batch in one piece, then in microbatches."""
        job = self._job(1, {})
        self._batch_size, self.steps = job.train.batch_size, min(self.steps, job.total_steps)
        prepared = self._compiled(job, [n for n in accumulation if not self._impossible(Cell(1, {}, n))])
        self._fresh = prepared.fresh
        whole = prepared.tracers[1](self.steps)
        for number, loss in enumerate(whole.loss, 1):
            if not np.isfinite(loss):
                raise UserError(f"the loss of step {number} is {loss} on one device: there is nothing to compare.")
        if "batch_stats" in job.abstract.extra:
            self._by_design = "BatchNorm normalises each microbatch by itself"
        elif tracing.draws(job):
            self._by_design = "each microbatch draws its own random bits, as for dropout"
        self._references[1] = prepared.tracers[1], whole
        yield Row(Cell(1, {}, 1), REFERENCE)
        for parts in accumulation[1:]:
            if self._by_design and parts in prepared.tracers:
                self._references[parts] = prepared.tracers[parts], prepared.tracers[parts](self.steps)
                yield Row(Cell(1, {}, parts), REFERENCE, why=self._by_design)
            else:
                yield self.row(Cell(1, {}, parts), prepared)

    def prepare(self, split: tuple[int, Mapping[str, int]], accumulation: Sequence[int]) -> _Prepared:
        """Compile all that is to be trained on one mesh."""
        possible = [parts for parts in accumulation if not self._impossible(Cell(*split, parts))]
        if not possible:
            return _Prepared({}, {})
        try:
            job = self._job(*split)
            if "sequence" in split[1] and not _splits_length(job):
                return _Prepared({}, {}, "the model marks no dimension as its length")
        except UserError as error:  # what this model can't do on this mesh
            return _Prepared({}, {}, str(error).splitlines()[0])
        return self._compiled(job, possible)

    def row(self, cell: Cell, prepared: _Prepared) -> Row:
        """Train in a cell, and compare."""
        if why := prepared.why or self._impossible(cell):
            return Row(cell, SKIPPED, why=why)
        reference, expected = self._references[cell.microbatches if self._by_design else 1]
        if paths := _other(self._fresh, prepared.fresh):
            why = f"before the first step: {paths[0]} has other bits, and {len(paths) - 1} more arrays of the state"
            return Row(cell, DIFFERS, why=why)
        tracer = prepared.tracers[cell.microbatches]
        found = tracer(self.steps)
        off = [_relative(getattr(expected, name), getattr(found, name)) for name in ("loss", "grad_norm")]
        row = partial(Row, cell, loss=float(off[0].max()), grad_norm=float(off[1].max()))
        for number, (a, b) in enumerate(zip(expected.batches, found.batches, strict=True), 1):
            if paths := _other(a, b):
                return row(verdict=DIFFERS, why=f"step {number}: {paths[0]} of the batch has other bits")
        past = np.flatnonzero(~(np.maximum(*off) <= self.tolerance))  # NaN is past any
        if not past.size:
            return row(verdict=EQUAL)
        number = int(past[0]) + 1
        loss, norm = (x[number - 1] for x in off)
        why = f"step {number}: the loss is off by {loss:.1e}, the gradient's norm by {norm:.1e}"
        if not self._explained:  # which takes as long as another two cells
            self._explained = True
            tensor = tracing.first_difference(reference.job, tracer.job, number, self.tolerance)
            why += f". First tensor: {tensor}" if tensor else "; no gradient and no parameter is past the tolerance"
        return row(verdict=DIFFERS, why=why)

    def _compiled(self, job: Job, accumulation: Sequence[int]) -> _Prepared:
        cadences = {parts: dataclasses.replace(job.cadence, microbatches=parts) for parts in accumulation}
        tracers = {parts: Tracer(dataclasses.replace(job, cadence=cadence)) for parts, cadence in cadences.items()}
        return _Prepared(tracing.digests(job.fresh()), tracers)

    def _impossible(self, cell: Cell) -> str:
        """Why the batch can't be split so, or ""."""
        size, pieces = self._batch_size, cell.parts * cell.microbatches
        if size % pieces == 0:
            return ""
        parts = f"in {cell.microbatches} parts " * (cell.microbatches > 1)
        over = f" over {cell.parts} devices" * (cell.parts > 1)
        return (
            f"{size} examples {parts}do not divide{over}: --config.data.batch_size={-(-size // pieces) * pieces} would"
        )

    def _job(self, count: int, axes: Mapping[str, int]) -> Job:
        """The job on a mesh: nothing of the config but the mesh, and what changes no number but by rounding."""
        config = tracing.in_float32(self.config)
        data, train = (config.setdefault(name, {}) for name in ("data", "train"))
        data.pop("workers", None)  # whose start would take longer than the steps
        data.pop("eval_batch_size", None)
        train |= {"steps_per_dispatch": 1, "microbatches": 1}
        config["mesh"] = dict(axes)
        return assemble(config, devices=self.devices[:count])


def _splits_length(job: Job) -> bool:
    """Whether an activation of the train step lies on the axis `sequence`; parameters do so of any model."""
    marks = ("sdy.sharding_constraint", "sdy.manual_computation")
    lines = job.lower_train()[0].as_text().splitlines()
    return any('"sequence"' in line for line in lines if any(mark in line for mark in marks))


def _other(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Paths whose digests are others."""
    return [path for path, digest in expected.items() if found.get(path) != digest]


def _relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|b - a| / |a|, elementwise; 0 where they are equal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(b - a) / np.abs(a))
