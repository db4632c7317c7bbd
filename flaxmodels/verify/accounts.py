"""What a run did and left; and the first step and the thing in which two runs differ."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass
class Account:
    """What a run did and left.

    Attributes:
      batches: of each process, step -> digests of the batches that it was given for that step.
      lines: of its log, without what the clock decides.
      state: of each process, path -> (digest, norm) of what it holds of each array of the last state.
      bits: whether the backend computes the same bits each time.
    """

    batches: list[dict[int, set[str]]]
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    state: list[dict[str, tuple[str, float]]] = dataclasses.field(default_factory=list)
    bits: bool = True


def promises_bits(platform: str, flags: str) -> bool:
    """Whether a backend computes the same bits each time: a GPU does with one of two flags in XLA_FLAGS only."""
    asked = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?( |$)"
    return platform != "gpu" or re.search(asked, flags, re.IGNORECASE) is not None


def difference(expected: Account, found: Account, steps: int, tolerance: float | None = None) -> str:
    """The first step and the thing in which two runs differ; "" where they are the same.

    Args:
      expected: of the run that was left alone.
      found: of the other.
      steps: that both made.
      tolerance: relative, of numbers; None compares bits. Batches are always compared by their bits.
    """
    wanted_lines, lines = _by_step(expected.lines), _by_step(found.lines)
    for step in range(1, steps + 1):
        for process, (wanted, seen) in enumerate(zip(expected.batches, found.batches, strict=True)):
            if seen.get(step) != wanted.get(step):
                where = f" in process {process}" if len(found.batches) > 1 else ""
                return f"step {step}: the batch{where} is another one than in the run that was left alone"
        if said := _line_differs(wanted_lines.get(step, []), lines.get(step, []), tolerance):
            return f"step {step}: {said}"
    if extra := sorted(set(lines) - set(wanted_lines)):
        return f"step {extra[0]}: the log has a line that the run that was left alone does not have"
    for process, (state, other) in enumerate(zip(expected.state, found.state, strict=True)):
        for path in {**state, **other}:
            if not _same_array(state.get(path), other.get(path), tolerance):
                return f"the last state: {path} differs" + (f" in process {process}" if process else "")
    return ""


def _by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["step"], []).append(line)
    return found


def _line_differs(wanted: Sequence[Mapping], seen: Sequence[Mapping], tolerance: float | None) -> str:
    """How what the log says of a step differs."""
    if [sorted(line) for line in wanted] != [sorted(line) for line in seen]:
        if wanted and len(seen) > len(wanted):
            return f"it stands in the log {len(seen)} times, where {len(wanted)} were expected"
        names = sorted({key for line in wanted for key in line} - {key for line in seen for key in line})
        return f"the log does not have {', '.join(names) or 'the same lines'}"
    for line, other in zip(wanted, seen):
        for name, value in line.items():
            if not _same(float(value), float(other[name]), tolerance):
                a, b = float(other[name]), float(value)
                return f"{name} is {a:.9g} ({a.hex()}), was {b:.9g} ({b.hex()}) in the run that was left alone"
    return ""


def _same(a: float, b: float, tolerance: float | None) -> bool:
    if a.hex() == b.hex():  # NaN is the same as NaN
        return True
    return tolerance is not None and abs(a - b) <= tolerance * max(abs(a), abs(b))


def _same_array(a: tuple[str, float] | None, b: tuple[str, float] | None, tolerance: float | None) -> bool:
    if a is None or b is None:
        return False
    return a[0] == b[0] or (tolerance is not None and _same(a[1], b[1], tolerance))


def compared(account: Account, tolerance: float | None) -> str:
    """What was found to be the same."""
    batches, arrays = (sum(map(len, parts)) for parts in (account.batches, account.state))
    how = "bit for bit" if tolerance is None else f"within {tolerance:g} (batches: bit for bit)"
    return (
        f"{batches} batches, {len(account.lines)} lines of the log, each once, and {arrays} arrays of the last state "
        f"are those of the run that was left alone, {how}"
    )
