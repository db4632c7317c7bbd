"""What a training run writes: the console, metrics.jsonl, samples.jsonl, TensorBoard events, and curves.png at its end.

Process 0 only: the others construct `Writers(..., enabled=False)`, and every call does nothing. Read `Writers`
first; `console.py` draws, `curves.py` plots, `MetricsFile` is the record that both are made from.
"""

import atexit
import importlib
import itertools
import json
import math
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from flaxmodels import console, curves, mirror

# (path, shape, dtype, spec, number of elements, bytes) of one parameter.
ParameterRow = tuple[str, Sequence[int], str, str, int, int]
MAX_TABLE_ROWS = 40


class Writers:
    """Everything that a run writes, behind one object; a context manager.

    A full disk, a closed pipe or a lost terminal never stops training: there is one warning, and it goes on.

    Args:
      workdir: where metrics.jsonl, curves.png and tensorboard/ go; made if it is missing.
      total_steps: the step at which training ends.
      start_step: the step that was restored, or 0. What an earlier process logged after it is dropped, since
        those steps run again: every step is logged exactly once.
      examples_per_step: the global batch size, for examples per second.
      stream: where to print. A terminal gets a live line, anything else plain lines.
      enabled: False on all processes but the first.

    Raises:
      OSError: the workdir can't be made.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        start_step: int,
        examples_per_step: int,
        stream: TextIO | None = None,
        enabled: bool = True,
    ) -> None:
        self._enabled, self._workdir, self._warned = enabled, Path(workdir), set[Path]()
        self._start_step, self._last_step = start_step, start_step
        if not enabled:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._display = console.open_display(stream or sys.stdout, total_steps, start_step, examples_per_step)
        self._metrics = MetricsFile(self._workdir / "metrics.jsonl", start_step)
        self._tensorboard = open_tensorboard(self._workdir / "tensorboard", start_step)
        self._samples: RowsFile | None = None  # there is a file once there is something to write
        # An evaluation that a resumed process makes again, because it was killed before it could save that it was made.
        rows = read_metrics(self._workdir / "metrics.jsonl")
        self._logged = {key for row in rows if row["step"] == start_step for key in row}
        self._check_files()
        atexit.register(self.close)  # sys.exit without `with` must give the cursor back too

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live line, flush and close the files. Calling it again does nothing."""
        if not self._enabled:
            return
        self._enabled = False
        atexit.unregister(self.close)
        self._display.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._samples is not None:
            self._samples.close()
        self._metrics.close()
        if lost := self._metrics.pending.count(b"\n"):
            self._display.line(f"warning: metrics.jsonl: there never was room for the last {lost} lines")

    def note(self, text: str) -> None:
        """Print one plain line, such as "mesh: data=8" or "resumed at step 40"."""
        if self._enabled:
            self._display.line(text)

    def parameter_table(self, rows: Iterable[ParameterRow]) -> None:
        """Print the parameters and their total; more than 40 are grouped by the first parts of their paths."""
        if not self._enabled:
            return
        rows = list(rows)
        count, size = sum(row[4] for row in rows), sum(row[5] for row in rows)
        cells = [
            (path, shape, dtype, spec, f"{n:,}", console.human_bytes(b))
            for path, shape, dtype, spec, n, b in grouped(rows)
        ]
        total = ("total", "", "", "", f"{count:,}", console.human_bytes(size))
        self._display.table("parameters", ("path", "shape", "dtype", "spec", "count", "bytes"), cells, total)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row of metrics: a line of metrics.jsonl, TensorBoard scalars, and the console.

        Floats are written so that they read back bit for bit. JSON has no NaN: it and the infinities become the
        strings "NaN", "Infinity" and "-Infinity", which `float()` and `read_metrics` turn back. What an earlier process
        logged for the step that was restored is not logged again.

        Args:
          step: the optimizer step that the values belong to.
          values: name -> number. "train/loss", "eval/accuracy", "perf/...": the part before "/" groups them.
        """
        if not self._enabled or (step == self._start_step and values.keys() <= self._logged):
            return
        self._last_step = max(self._last_step, step)
        self._metrics.write(step, values)
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)
        self._check_files()
        # Where the time goes is for the files: a line of the console is short, and the run says it in words at its end.
        shown = {key: v for key, v in values.items() if not key.startswith("perf/") or key == console.RATE}
        self._display.row(step, shown)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log what a language model writes at `step`: a line of samples.jsonl for each text, and the console.

        Args:
          step: the optimizer step that the texts belong to.
          rows: {"prompt": text, "text": what follows it, and anything else that JSON can hold} of each.
        """
        if not self._enabled:
            return
        if self._samples is None:  # what is made again at the step that was restored is the same: it is written anew
            self._samples = RowsFile(self._workdir / "samples.jsonl", min(self._start_step, step - 1))
        self._samples.append(b"".join(json.dumps({"step": step, **row}).encode() + b"\n" for row in rows))
        for i, row in enumerate(rows):
            text = json.dumps(row["prompt"] + row["text"], ensure_ascii=False).encode("utf-8", "replace").decode()
            self._display.line(f"sample {i}: {text}")
        self._check_files()

    def progress(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Say that `step` was dispatched; well under 5 microseconds, so call it every step.

        The first call starts the clock of examples per second and time left, so that compilation is not in them.
        """
        if self._enabled:
            self._display.progress(step, values)

    def final(self, rows: Mapping[str, float], seconds: float) -> None:
        """Print the last and best metrics of the whole run, resumed or not, and draw curves.png.

        Args:
          rows: metrics to show as the last ones, such as the final evaluation's.
          seconds: how long this process trained.
        """
        if not self._enabled:
            return
        self._display.close(keep=False)
        history = read_metrics(self._workdir / "metrics.jsonl")
        steps = self._last_step - self._start_step
        self._display.table(
            f"{steps} steps in {console.duration(seconds)}, ended at step {self._last_step}",
            ("metric", "last", "best", "at step"),
            curves.summary(history, rows, self._last_step),
            (),
        )
        try:
            curves.draw(history, self._workdir / "curves.png")
            self.note(f"curves: {mirror.remote(self._workdir / 'curves.png')}")
        except (ImportError, OSError) as error:
            self.note(f"warning: curves.png was not drawn: {error}")

    def _check_files(self) -> None:
        # A disk that is full stays full for a while: say so once a file, not at every step.
        for file in (self._metrics, self._tensorboard, self._samples):
            if file is not None and file.error and file.path not in self._warned:
                self._warned.add(file.path)
                self.note(f"warning: {file.path}: {file.error}")


class Appender:
    """The end of a file, written straight to the system: what `append` was given is in the file, or waits.

    What can't be written waits in memory, and goes out with a later call once there is room: nothing is lost or
    torn. `error` says what went wrong last, "" when all is well.

    Args:
      path: the file; made if it is missing.
      prepare: called before the file is opened, and again if it or the opening raised OSError.
    """

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self.path, self._prepare = path, prepare
        self._file: int | None = None
        self.pending = bytearray()
        self.error = ""
        self._flush()

    def append(self, data: bytes) -> None:
        """Write `data` at the end. Never raises OSError: see `error`."""
        self.pending += data
        self._flush()

    def close(self) -> None:
        """Try once more to write what waits (then in `pending`), and close."""
        self._flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._prepare()
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self.pending:  # a nearly full disk takes a part of a line; the rest follows it later
                del self.pending[: os.write(self._file, self.pending)]
            self.error = ""
        except OSError as error:
            self.error = f"{error.strerror}; training goes on, and what was logged waits in memory"


class RowsFile(Appender):
    """JSON objects with a "step", one a line; those after `start_step` are dropped."""

    def __init__(self, path: Path, start_step: int) -> None:
        super().__init__(path, lambda: rewind(path, start_step))


class MetricsFile(RowsFile):
    """metrics.jsonl: one JSON object a line, `{"step": 10, "train/loss": 0.25}`, flushed when it is written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; see `Writers.write` for NaN."""
        row = {"step": step} | {key: _number(value) for key, value in values.items()}
        self.append(json.dumps(row, allow_nan=False).encode() + b"\n")


class TensorBoardFile(Appender):
    """A file of scalars for TensorBoard; needs tensorboardX (the extra `logging`), see `open_tensorboard`.

    Not through tensorboardX's SummaryWriter: its thread dies when the disk is full, the calls after that wait
    for ever, and its file syncs the disk at each flush. Of it come the messages and the checksum.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        # A name of its own for each process, also when two start in one second; TensorBoard sorts by the time.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        super().__init__(folder / name, lambda: folder.mkdir(exist_ok=True))
        self._event(file_version="brain.Event:2")
        # TensorBoard hides what an earlier process logged from this step on: SummaryWriter's `purge_step`.
        self._event(step=start_step + 1, session_log={"status": "START"})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row as float32 scalars."""
        scalars = [{"tag": key, "simple_value": float(value)} for key, value in values.items()]
        self._event(step=step, summary={"value": scalars})

    def _event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self.append(length + next(sums) + data + next(sums))


def open_tensorboard(folder: Path, start_step: int) -> TensorBoardFile | None:
    """TensorBoard's file in `folder`, or None, silently, where tensorboardX is not installed."""
    try:
        importlib.import_module("tensorboardX")
    except ImportError:
        return None
    return TensorBoardFile(folder, start_step)


def _number(value: float) -> float | int | str:
    if isinstance(value, int):
        return int(value)
    value = float(value)  # a NumPy float32 too
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row of one line, or None where the line was torn by a kill or is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl in order, as floats ("step" as an int); none if there is no such file."""
    if not path.exists():
        return []
    rows = filter(None, map(_parse, path.read_bytes().splitlines()))
    return [{key: value if key == "step" else float(value) for key, value in row.items()} for row in rows]


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl after `step`, and torn ones; whole or not at all, whenever it is killed.

    Raises:
      OSError: the new file can't be written; the old one is untouched.
    """
    if not path.exists():
        return
    old = path.read_bytes()
    rows = ((line, _parse(line)) for line in old.splitlines())
    kept = b"".join(line + b"\n" for line, row in rows if row is not None and row["step"] <= step)
    if kept == old:
        return
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with tmp.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def grouped(rows: Sequence[ParameterRow], limit: int = MAX_TABLE_ROWS) -> list[tuple[str, str, str, str, int, int]]:
    """At most `limit` rows of text for a parameter table, with the same total count and bytes.

    Paths are cut after as many parts as fit, "encoder/block_3/..."; where even their first parts are too many,
    the numbers in them become one, "block_*/mlp/kernel".
    """
    depth = max((row[0].count("/") + 1 for row in rows), default=1)
    for star in (False, True):
        for parts in range(depth, 0, -1):
            groups: dict[str, list[ParameterRow]] = {}
            for row in rows:
                groups.setdefault(_prefix(row[0], parts, star), []).append(row)
            if len(groups) <= limit:
                return [_group(path, members) for path, members in groups.items()]
    first, rest = list(groups.items())[: limit - 1], list(groups.values())[limit - 1 :]
    return [*(_group(*item) for item in first), _group("(others)", list(itertools.chain(*rest)))]


def _prefix(path: str, parts: int, star: bool) -> str:
    pieces = path.split("/")
    prefix = "/".join(pieces[:parts]) + ("/..." if len(pieces) > parts else "")
    return re.sub(r"\d+", "*", prefix) if star else prefix


def _group(path: str, rows: Sequence[ParameterRow]) -> tuple[str, str, str, str, int, int]:
    shapes, dtypes, specs = ({str(row[i]) for row in rows} for i in (1, 2, 3))
    shape = shapes.pop() if len(shapes) == 1 else "various"
    times = f"{len(rows)} x " if len(rows) > 1 else ""
    dtype, spec = (values.pop() if len(values) == 1 else "various" for values in (dtypes, specs))
    return path, times + shape, dtype, spec, sum(row[4] for row in rows), sum(row[5] for row in rows)
