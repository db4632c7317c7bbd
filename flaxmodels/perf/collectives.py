"""The collectives of a compiled program: what its devices send each other, how often, and between which of them.

XLA's cost analysis counts the body of a loop once and knows nothing of collectives; the text of the program has all of
it. Read `collectives`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from flaxmodels.perf import hlo
from flaxmodels.perf.hlo import Computation, Instruction, integers

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# A program of several slices has no collectives between them: libtpu splits these into transfers through the hosts.
TRANSFER = "transfer between slices"
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`, or `TRANSFER`.
      count: how often it runs in one run of the program.
      bytes: of the whole buffer on one device, each time: of what an all-gather gives, and of what others are given. Of
        this a ring of n devices sends (n - 1) / n, and twice that for an all-reduce.
      groups: positions in the mesh of the devices that take part together; () where the text does not tell.
      op: of the traced program that it is for, such as "jit(step)/transpose(jvp(Net))/blocks/mlp/up/dot_general"; ""
        where the text does not tell.
    """

    kind: str
    count: int
    bytes: int
    groups: Groups
    op: str = ""


def collectives(text: str) -> tuple[list[Collective], list[str]]:
    """All collectives of a program, and what about their counts is not certain.

    An operation in several parts (-start, -done) counts once, and one in a loop as often as the loop turns. A loop
    whose length the program is told when it runs, such as that over the steps of a dispatch, counts as one turn. All
    branches of a conditional count.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Returns:
      (collectives in the order of the program, sentences for a reader).

    Raises:
      ValueError: this is not the text of a program, or of a form that is not known.
    """
    computations, entry = hlo.parse(text)
    devices = int(found[1]) if (found := re.search(r"\bnum_partitions=(\d+)", text)) else 1
    notes: dict[str, int] = {}
    rows = [
        _collective(instruction, computations[home], times, devices)
        for home, instruction, times in _walk(computations, entry, 1, notes)
    ]
    return rows, [f"{note} ({count} of them)" if count > 1 else note for note, count in notes.items()]


def _walk(
    computations: Mapping[str, Computation],
    name: str,
    times: int,
    notes: dict[str, int],
    fused: set[str] | None = None,
) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, collective, how often it runs), with those of all computations that are called.

    libtpu cuts a collective that runs beside other work into pieces, in fusions one after the other, that all have its
    channel. `fused` holds the channels that were seen in the fusions of the computation that calls this one.
    """
    channels: set[str] = set()
    for instruction in computations[name].instructions.values():
        turns, inner, within, unsure = times, list[str](), None, ""
        if _kind(instruction):
            channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
            if fused is None or not channel or channel[1] not in fused:
                yield name, instruction, times
            if fused is not None and channel:
                fused.add(channel[1])
        elif instruction.opcode == "while":
            inner, trips = instruction.called("body"), hlo.trips(instruction, computations[name], computations)
            turns = times * (1 if trips is None else trips)
            unsure = "a loop whose length is not in the program counts as one turn" if trips is None else ""
        elif instruction.opcode == "conditional":
            inner = instruction.called("branch_computations", "true_computation", "false_computation")
            unsure = "of a conditional all branches are counted"
        elif instruction.opcode == "fusion":
            inner, within = instruction.called("calls"), channels if fused is None else fused
        elif instruction.opcode in ("call", "async-start", "custom-call"):
            inner = instruction.called("calls", "to_apply", "called_computations")
        rows = [row for called in inner for row in _walk(computations, called, turns, notes, within)]
        if rows and unsure:
            notes[unsure] = notes.get(unsure, 0) + 1
        yield from rows


def _kind(instruction: Instruction) -> str | None:
    if instruction.opcode == "send" and "is_host_transfer=true" in instruction.rest:
        return TRANSFER
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _collective(instruction: Instruction, home: Computation, times: int, devices: int) -> Collective:
    kind = _kind(instruction) or ""
    groups = _groups(instruction.rest, devices)
    size = sum(hlo.size_of(home.instructions[name].result) for name in instruction.operands)
    if kind == "all-gather":
        size *= len(groups[0]) if groups else devices
    op = re.search(r'\bop_name="([^"]*)"', instruction.rest)
    return Collective(kind, times, size, groups, op[1] if op else "")


def _groups(rest: str, devices: int) -> Groups:
    """From `replica_groups` in any of its spellings, or from the pairs of a permute: who sends to whom in the end."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return _joined([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])])
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest):
        listed = tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
        return listed or (tuple(range(devices)),)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _rows(_iota(found[2]).reshape(integers(found[1])))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        return _of_mesh(*found.groups())
    return ()


def _of_mesh(sizes: str, order: str, names: str) -> Groups:
    """`mesh['a'=2,'b'=8] {'b'}`: along b.

    `, device_ids=([8,2]T(1,0))` before the axes says which devices lie on the mesh, in its order. An axis may be in
    parts: `'b':(2)4` is one of 4, with one of 2 outside of it.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    total = math.prod(axes.values())
    ids = np.arange(total)
    if turned := re.search(r"\[[\d,]+\](?:T\([\d,]+\))?", order):
        ids = _iota(turned[0])
    elif listed := re.search(r"\(([\d,]+)\)", order):
        ids = np.array(integers(listed[1]))
    parts: list[int] = []
    along: list[int] = []
    for name, size in axes.items():
        taken = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", names)
        before, inside = (int(taken[1]), int(taken[2])) if taken and taken[1] else (1, size if taken else 1)
        parts += [before, inside, size // before // inside]
        along += [len(parts) - 2]
    grid = np.moveaxis(ids.reshape(parts), along, range(-len(along), 0))
    return _rows(grid.reshape(-1, math.prod(parts[i] for i in along)))


def _iota(text: str) -> np.ndarray:
    """`[2,8]T(1,0)`: the numbers from 0, in that shape, transposed, flat."""
    shape, *turned = (integers(part) for part in re.findall(r"[\d,]+", text))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(turned[0]) if turned else ids).reshape(-1)


def _rows(grid: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in grid.tolist())


def _joined(pairs: list[tuple[int, int]]) -> Groups:
    """Pairs to the groups that they join, each sorted."""
    group = {end: {end} for pair in pairs for end in pair}
    for source, target in pairs:
        if group[source] is not group[target]:
            group[source] |= group[target]
            for member in group[target]:
                group[member] = group[source]
    return tuple(sorted({tuple(sorted(members)) for members in group.values()}))
