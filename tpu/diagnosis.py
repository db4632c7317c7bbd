"""Which of the workers' lines says what went wrong first: one worker fails, and all others then say that it did."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LONGEST = 40  # lines of an error that are shown
# How a line begins that tells of an error: ours, Python's, the interpreter's, XLA's, what a shell says of a signal.
_SIGN = re.compile(
    r"error: |Traceback \(most recent call last\)|Fatal Python error|(\w+\.)*\w*(Error|Exception)(: |$)|"
    r".*/worker\.sh: \d+: |F\d{4} \d\d:\d\d:|(Killed|Aborted|Segmentation fault|Bus error)\b|"
    r".*\b(RESOURCE_EXHAUSTED|No space left on device)\b|"
    r"launcher: attempt \d+ ended with exit code (?!0,|130,|143,)\d+|problem: "
)
_EXIT = re.compile(r"launcher: attempt \d+ ended with exit code (\d+), (\S+)")
_OTHER = re.compile(r"error: process (\d+)\b")
_OURS = ("supervisor: ", "launcher: ")  # who start it again


class _Found(NamedTuple):
    """An error, in the order in which it counts.

    Attributes:
      start: before which of the supervisor's restarts it stands, as a negative number: the last is what ended the run.
      told: whether it only tells that the run, or another process, failed.
      ended: when the attempt ended there; "~" where it did not.
      number: of the worker.
      lines: of it.
    """

    start: int
    told: bool
    ended: str
    number: int
    lines: tuple[str, ...]


def first_error(texts: Mapping[int, str]) -> str | None:
    """The first error of any worker in the newest start of the training, with the worker's name; None: there is none.

    First is who does not speak of another process, and then whose attempt ended first.

    Args:
      texts: the output of each worker, by number.
    """
    found = [one for number, text in texts.items() for one in _errors(number, text.splitlines())]
    if not found:
        return None
    first = min(found)
    return "\n".join([f"worker {first.number}:", *(f"  {line}" for line in first.lines)])


def _errors(number: int, lines: Sequence[str]) -> list[_Found]:
    """The first error of each start."""
    ended = next((said[2] for line in reversed(lines) if (said := _EXIT.match(line))), "~")
    found, start = dict[int, _Found](), 0
    for index, line in enumerate(lines):
        if line.startswith("supervisor: "):
            start -= 1
        elif _SIGN.match(line):
            other = _OTHER.match(line)
            told = line.startswith("launcher: ") or (other is not None and int(other[1]) != number)
            # The launcher's line is the end of what the supervisor gave up, not another start.
            at = min(found, default=start) if line.startswith("launcher: ") else start
            found.setdefault(at, _Found(at, told, ended, number, _block(lines[index:])))
    return list(found.values())


def _block(lines: Sequence[str]) -> tuple[str, ...]:
    """An error and what follows, till something else speaks: a process says little after its error."""
    rest = itertools.takewhile(lambda line: not line.startswith(_OURS), lines[1:LONGEST])
    return (lines[0], *rest)
