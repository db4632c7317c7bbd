"""The text of a compiled program, `jax.stages.Compiled.as_text()`, as computations of instructions.

Only what `collectives` asks of it: which computation calls which, how often a loop turns, how large a value is.
"""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = result opcode(%operand, ...), rest`; `result` is its type.

    Names have no `%`. `rest` starts behind the opening bracket: a constant's value is there.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self, *attributes: str) -> list[str]:
        """Names of computations after `attribute=`, one or several in braces."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        return [name.strip().lstrip("%") for one, several in found for name in (one or several).split(",")]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the one whose value it returns."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the one that is the program)."""
    found: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line == "}" and name:
            found[name], name = Computation(name, lines, root), ""
        elif name and (instruction := _instruction(line)):
            lines[instruction.name] = instruction
            root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if not entry:
        raise ValueError("this is not the text of a program: no ENTRY")
    return found, entry


def _instruction(line: str) -> Instruction | None:
    """`%name = type opcode(%operand, ...), attributes`; a type may be a tuple, which has brackets and blanks."""
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    while line[end] != " ":  # the layout of a tuple
        end += 1
    opening = line.index("(", end)
    closing = _closing(line, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opening:closing]))
    return Instruction(head[1], line[start:end], line[end:opening].strip(), operands, line[opening + 1 :])


def _closing(line: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i
    raise ValueError(f"a bracket is not closed: {line[:80]!r}")


def size_of(result: str) -> int:
    """Of a type such as `bf16[8,1024]{1,0}`, or of a tuple of such; without the padding that a layout may have."""
    return sum(
        math.prod(integers(shape) if shape else ()) * _bits(dtype) // 8
        for dtype, shape in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", result)
    )


def _bits(dtype: str) -> int:
    """`bf16` has 16, `pred` 8, `f8e4m3fn` 8; what is no number, such as a token, has none."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return 8 if dtype == "pred" else int(digits[1]) if digits else 0


def integers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(number) for number in text.split(","))


# Loops


def trips(loop: Instruction, home: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop turns; None if that is not in the program."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (computations[loop.called(part)[0]] for part in ("condition", "body"))
    root = condition.instructions[condition.root]
    if root.opcode != "compare" or not (direction := re.search(r"direction=(LT|LE|NE)", root.rest)):
        return None
    counter, bound = (_plain(name, condition) for name in root.operands)
    if counter.opcode != "get-tuple-element" or (last := _constant(bound)) is None:
        return None
    index = _index(counter)
    first = _element(home, loop.operands[0], index)
    after = _element(body, body.root, index)
    if after is None or first is None or (start := _constant(first)) is None or after.opcode != "add":
        return None
    steps = [_constant(_plain(name, body)) for name in after.operands]
    step = next((step for step in steps if step), 1)
    return max(-(-(last + (direction[1] == "LE") - start) // step), 0)


def _plain(name: str, home: Computation) -> Instruction:
    """The instruction that gives a value, behind copies of it."""
    found = home.instructions[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done") and found.operands:
        found = home.instructions[found.operands[0]]
    return found


def _element(home: Computation, name: str, index: int) -> Instruction | None:
    """What gives element `index` of a tuple; None where it is not made here."""
    made = _plain(name, home)
    return _plain(made.operands[index], home) if made.opcode == "tuple" else None


def _constant(instruction: Instruction) -> int | None:
    digits = re.fullmatch(r"\s*(-?\d+)\).*", instruction.rest, re.DOTALL) if instruction.opcode == "constant" else None
    return int(digits[1]) if digits else None


def _index(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.rest)
    if not found:
        raise ValueError(f"{instruction.name} has no index")
    return int(found[1])
