"""`--profile=START:STEPS`: a trace of some steps of a run, and what took their time, in two tables.

The trace, under WORKDIR/profile, is JAX's own, for whoever has a viewer; `read` needs none. A compiled program names
its operations ("fusion.12"), and a trace says when each ran; the program's text says which module and line of the model
an operation came from. An operation that holds others, such as a loop, counts without them.
"""

import contextlib
import dataclasses
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from flaxmodels import mirror, registry
from flaxmodels.registry import UserError

SHOWN = 12  # rows of a table
WIDTH = 60  # characters of a name in it
_EXPECTED = "expected START:STEPS, as in --profile=100:10: ten steps from step 100 on"
# An instruction of a compiled program, and where it came from.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{.*?op_name="([^"]*)"', re.MULTILINE)
_MODULE = re.compile(r"HloModule ([^,\s]+)")
# Parts of a name that say how a function was called, not where it stands in the model.
_WRAPPED = re.compile(r"^(?:jit|pjit|jvp|vmap|transpose|checkpoint|remat|custom_vjp|custom_jvp|named)\((.*)\)$")
_CALLS = {
    "while", "body", "cond", "closed_call", "checkpoint", "remat", "rematted_computation", "shard_map", "scan", "pjit",
    "custom_vjp_call", "custom_jvp_call", "core_call", "branch_0_fun", "branch_1_fun",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, in all steps of a trace.

    Attributes:
      name: of the instruction.
      module: where in the model it stands, such as "MLP/hidden_0"; "" where that is not known.
      primitive: of JAX, that it is, or that the last of what was fused into it is; "" where that is not known.
      way: "forward", "backward", "again" (what `model.remat` computes a second time), or "" for all else of a step.
      seconds: on all devices, without operations inside of it.
      runs: how often.
    """

    name: str
    module: str
    primitive: str
    way: str
    seconds: float
    runs: int


class Profile:
    """Traces some steps of a run, and says what took their time; what `loop.fit` takes as `profiler`.

    Args:
      start: the step to begin at, or that its dispatch begins with; a run that goes on from a later one begins there.
      steps: how many, or some more where one dispatch makes several.
      folder: where the trace goes.
    """

    def __init__(self, start: int, steps: int, folder: Path) -> None:
        self.start, self.steps, self.folder = start, steps, folder
        self._last: jax.Array | None = None  # results of the last dispatch
        self._program: jax.stages.Compiled | None = None  # that is being traced
        self._first = self._step = self._made = 0  # of the trace: where it began, where it is, steps in it
        self._over = False

    def check(self, total_steps: int) -> None:
        """Refuse a run that ends before `start` (UserError)."""
        if self.start >= total_steps:
            raise UserError(f"--profile={self.start}:{self.steps}: the run ends at step {total_steps}; {_EXPECTED}.")

    def before(self, step: int, end: int, program: jax.stages.Compiled) -> None:
        """A dispatch of the steps from `step` to `end` is about to be made: begin, where that is due."""
        self._step = step  # a run may have gone back
        if self._over or self._program is not None or end <= self.start or jax.process_index() > 0:
            return
        if self._last is not None:
            self._last.block_until_ready()  # what is under way is not of these steps
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the host down, and what it finds is not shown
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self._program, self._first, self._made = program, step, 0

    def after(self, step: int, packed: jax.Array) -> list[str]:
        """A dispatch up to `step` was made: end, where that is due. Returns lines for the log."""
        self._made += step - self._step
        self._last, self._step = packed, step
        return self.close() if self._program is not None and self._made >= self.steps else []

    def stop(self) -> None:
        """End the trace, if there is one, and say nothing: the run ends by an error, which shall be heard."""
        if self._program is not None:
            self._program, self._over = None, True
            with contextlib.suppress(Exception):
                jax.profiler.stop_trace()

    def close(self) -> list[str]:
        """End the trace, if there is one. Returns lines for the log."""
        program, self._program = self._program, None
        if program is None:
            return []
        self._over = True
        if self._last is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # a step that failed says so elsewhere
                self._last.block_until_ready()
        jax.profiler.stop_trace()
        if not self._made:
            return []
        file = max(self.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        try:
            text = program.as_text() or ""
        except (jax.errors.JaxRuntimeError, NotImplementedError):  # not every compiler tells
            text = ""
        said = f"profile of steps {self._first} to {self._step}: {mirror.remote(file)}"
        return [said, *lines(read(file, text), self._made)]


def asked(span: str | None, workdir: Path) -> Profile | None:
    """The `Profile` that "START:STEPS" asks for; None where nothing is asked.

    Raises:
      UserError: it is no such thing.
    """
    if span is None:
        return None
    start, _, steps = span.partition(":")
    if not (start.isdecimal() and steps.isdecimal() and 0 < int(steps) <= registry.LONGEST >= int(start)):
        raise UserError(f"--profile={span!r}: {_EXPECTED}.")
    return Profile(int(start), int(steps), mirror.local(workdir) / "profile")


def read(file: Path, program: str) -> list[Operation]:
    """The operations of a trace, the longest first.

    Args:
      file: of `jax.profiler`, "*.xplane.pb".
      program: text of the compiled program that ran.
    """
    origins = dict(_INSTRUCTION.findall(program))
    module = match[1] if (match := _MODULE.match(program)) else ""
    seconds, runs = defaultdict[str, float](float), Counter[str]()
    with warnings.catch_warnings():
        # Of JAX's reader, on Python 3.13: its types have no `__module__`. Made an error, it would abort the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for events in _events(file, module):
            for name, alone in _alone(events):
                seconds[name] += alone
                runs[name] += 1
    return [Operation(name, *_origin(origins.get(name, "")), spent, runs[name]) for name, spent in _longest(seconds)]


def _events(file: Path, module: str) -> Iterator[list[tuple[float, float, str]]]:
    """(start, length, operation) of what ran of a compiled program, a list for each thread or stream; nanoseconds.

    Args:
      file: the trace.
      module: the name of the program, "" for any: an evaluation may have run between the steps.
    """
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                if event.name.startswith("end: "):  # a mark of XLA on CPUs
                    continue
                facts = {key: str(value) for key, value in event.stats if key in ("hlo_op", "hlo_module")}
                if "hlo_op" in facts and module in ("", facts.get("hlo_module", module)):
                    found.append((event.start_ns, event.duration_ns, facts["hlo_op"]))
            if found:
                yield found


def _alone(events: Sequence[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """(operation, seconds without those inside of it) of each event of one thread."""
    open_: list[tuple[float, str, list[float]]] = []  # (end, operation, [length, and of those inside])
    for start, length, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            _, last, (whole, inside) = open_.pop()
            yield last, (whole - inside) / 1e9
        if open_:
            open_[-1][2][1] += min(length, open_[-1][0] - start)
        open_.append((start + length, name, [length, 0.0]))
    for _, last, (whole, inside) in reversed(open_):
        yield last, (whole - inside) / 1e9


def _origin(name: str) -> tuple[str, str, str]:
    """(module, primitive, way) of what JAX calls an operation: "jit(step)/transpose(jvp(MLP))/head/dot_general"."""
    *parts, primitive = name.split("/")
    ways = [("rematted_computation", "again"), ("transpose(", "backward"), ("jvp(", "forward")]
    way = next((way for mark, way in ways if mark in name), "")
    path = []
    for part in parts:
        bare, called = part, part.startswith(("jit(", "pjit("))  # a function's name is no module's
        while wrapped := _WRAPPED.match(bare):
            bare = wrapped[1]
        if bare and not called and bare not in _CALLS:
            path.append(bare)
    return "/".join(path), primitive if parts else "", way


def modules(operations: Iterable[Operation]) -> list[tuple[str, str, float]]:
    """(module, way, seconds) summed over operations, the longest first; what has neither is ("", "")."""
    found = defaultdict[tuple[str, str], float](float)
    for operation in operations:
        found[operation.module, operation.way] += operation.seconds
    return [(module, way, seconds) for (module, way), seconds in _longest(found)]


def lines(operations: Sequence[Operation], steps: int) -> list[str]:
    """Two tables as lines of text: the longest operations, and the modules that they stand in.

    Args:
      operations: of `read`.
      steps: that were traced.
    """
    whole = sum(operation.seconds for operation in operations)
    if not whole:
        return ["the trace names no operation of the compiled program"]
    said = f"its operations took {1e3 * whole / steps:,.3f} ms of a step, those on all devices and threads added up"
    by_name = [
        (f"{1e3 * o.seconds / steps:.3f}", f"{o.seconds / whole:.1%}", f"{o.runs / steps:g}", _cut(o.name),
         _cut(" ".join(filter(None, (o.way, o.module, o.primitive))) or "-"))
        for o in operations
    ]  # fmt: skip
    by_module = [
        (f"{1e3 * seconds / steps:.3f}", f"{seconds / whole:.1%}", way or "-", _cut(module or "(no module)"))
        for module, way, seconds in modules(operations)
    ]
    return [
        said,
        *_table(("ms/step", "share", "runs/step", "operation", "what it is"), by_name, 3),
        *_table(("ms/step", "share", "way", "module"), by_module, 2),
    ]


def _longest(seconds: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2 - 2]}...{text[-WIDTH // 2 + 1 :]}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """The first `SHOWN` rows under their headers, the first `numbers` columns to the right; and how many more."""
    widths = [max(map(len, column)) for column in zip(headers, *rows[:SHOWN])]
    cells = [
        [cell.rjust(width) if i < numbers else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in (headers, *rows[:SHOWN])
    ]
    more = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return [*(("  " + "  ".join(row)).rstrip() for row in cells), *more]
