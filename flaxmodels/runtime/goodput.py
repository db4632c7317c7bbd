"""Where the time of a run went, over all its attempts: an *attempt* is one process that trained in a workdir.

*Goodput* is the share of the time that went into steps that count, and into evaluations. The time begins with the first
attempt. Lost are: seconds of every other phase (`progress.PHASES`); steps that were made and then made again, because
they were not on disk when an attempt ended (their share of its steps, of its seconds of training and evaluation); and
the time between attempts, except after an end that someone wanted: done, bad input, Ctrl-C.

Process 0 keeps `goodput.jsonl`, a line for each attempt, and rewrites it every second: what ends an attempt is seldom
so kind as to let it write. How it ended is added by a supervisor, if there is one.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.runtime import exits, progress

FILE = "goodput.jsonl"
EVERY = 1.0  # seconds
LAST = 5.0  # seconds that a last write may take: storage may not answer
STARTING = 60.0  # seconds that Python may take till it imports this
GOOD = ("training", "evaluation")
LOST = {
    "start": "starting", "restore": "restoring", "compile": "compiling", "data": "waiting for the first batches",
    "save": "saving", "end": "ending",
}  # fmt: skip
WANTED = (exits.DONE, exits.BAD_INPUT, exits.INTERRUPTED)
ENDS = {
    exits.DONE: "done", exits.FAULT: "failed", exits.BAD_INPUT: "bad input", exits.STUCK: "stuck",
    exits.INTERRUPTED: "stopped by SIGINT", exits.SIGNALLED + signal.SIGTERM: "stopped by SIGTERM",
}  # fmt: skip

Record = dict[str, Any]
FIELDS = {"host", "pid", "boot", "time", "began", "first", "back", "last", "ended", "seconds", "phases"}


class Attempt:
    """The line of one attempt, kept up to date while it is open. Use `recorded`.

    Args:
      workdir: of the run; None keeps nothing.
    """

    def __init__(self, workdir: Path | None) -> None:
        whole = exits.commanding()  # else the process did other things before, which are none of the run
        began = _process_began() if whole else _clock()  # first: what passes till the next line counts as starting
        self._before = {} if whole else progress.totals()
        self._record: Record = {
            "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "time": time.time(),
            "began": began, "first": None, "back": 0, "ended": None,
        }  # fmt: skip
        self._workdir, self._over = workdir, threading.Event()
        self._thread: threading.Thread | None = None
        self._earlier: list[Record] = []

    def start(self, step: int) -> None:
        """It goes on from `step`, which is on disk; 0 where there is none. From here on its line is written.

        Called once more, it went back there: what it had made beyond is made again.
        """
        if self._record["first"] is not None:
            self._record["back"] += max((progress.now().step or 0) - step, 0)
            return
        self._record["first"] = step
        if self._workdir is not None:
            self._earlier = read(self._workdir)
            self._thread = threading.Thread(target=self._keep, args=(self._workdir,), name="goodput", daemon=True)
            self._thread.start()

    def end(self, code: int) -> list[str]:
        """It ends with an exit code. Returns the lines of `account`; called again, none."""
        if self._thread is None or self._over.is_set():
            return []
        self._record["ended"] = code
        self._over.set()
        self._thread.join(LAST)
        return account([*self._earlier, self._now()])

    def _now(self) -> Record:
        phases = {name: seconds - self._before.get(name, 0.0) for name, seconds in progress.totals().items()}
        seconds = _clock() - self._record["began"]
        phases["start"] += max(seconds - sum(phases.values()), 0.0)  # Python's own start, and imports
        spent = {name: round(value, 3) for name, value in phases.items()}
        return {**self._record, "last": progress.now().step, "seconds": round(seconds, 3), "phases": spent}

    def _keep(self, workdir: Path) -> None:
        over = False
        while True:
            _write(workdir, [*self._earlier, self._now()])  # at once: a run may be killed in its first second
            if over:
                return
            over = self._over.wait(EVERY)


@contextlib.contextmanager
def recorded(workdir: Path | None) -> Iterator[Attempt]:
    """Keep the line of this attempt; it ends on leaving, if not before.

    Args:
      workdir: of the run, whose lock this process holds; None keeps nothing.
    """
    attempt = Attempt(workdir)
    try:
        yield attempt
    except BaseException as error:
        attempt.end(exits.code_of(error))
        raise
    attempt.end(exits.DONE)


def close(workdir: Path, pid: int, code: int) -> None:
    """Add how the attempt of process `pid` of this host ended, where it could not say so itself; as `ending`."""
    records = read(workdir)
    unsaid = {"pid": pid, "host": socket.gethostname(), "ended": None}
    if records and unsaid.items() <= records[-1].items():
        records[-1]["ended"] = code
        _write(workdir, records)


def summary(workdir: Path) -> list[str]:
    """Lines on all attempts of a run; [] where each but the last ended as was wanted."""
    return account(read(workdir))


def read(workdir: Path) -> list[Record]:
    """The attempts of a run, in order; a line that is not whole is left out."""
    records = []
    with contextlib.suppress(OSError):
        for line in (workdir / FILE).read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.keys() >= FIELDS:
                    records.append(record)
    return records


def _write(workdir: Path, records: Sequence[Record]) -> None:
    """Whole or not at all. Without room or storage the account is not kept, and the run goes on."""
    new = workdir / f"{FILE}.tmp"
    try:
        new.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        new.replace(workdir / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()


def ending(code: int | None) -> str:
    """How a process ended, in words.

    Args:
      code: its exit code; negative where a signal killed it; None where nobody saw.
    """
    if code is None:
        return "cut off"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return ENDS.get(code, f"ended with code {code}")


def account(records: Sequence[Record]) -> list[str]:
    """Goodput, and lost time by cause, of the attempts of a run; [] where each but the last ended as was wanted."""
    if all(record["ended"] in WANTED for record in records[:-1]):
        return []
    spent, lost = dict.fromkeys(progress.PHASES, 0.0), {"redone steps": 0.0, "down": 0.0}
    redone = 0
    for number, record in enumerate(records):
        for phase, seconds in record["phases"].items():
            spent[phase] = spent.get(phase, 0.0) + seconds
        later = records[number + 1 :]
        again, made = _again(record, later)
        redone += again
        for phase in GOOD if again else ():
            wasted = record["phases"][phase] * again / made
            spent[phase] -= wasted
            lost["redone steps"] += wasted
        if later and record["ended"] not in WANTED:
            lost["down"] += _between(record, later[0])
    lost |= {words: spent[phase] for phase, words in LOST.items()}
    good = sum(spent[phase] for phase in GOOD)
    total = good + sum(lost.values())
    ends = Counter(ending(record["ended"]) for record in records[:-1])
    evaluation = f" and evaluation {spent['evaluation']:,.1f} s" if spent["evaluation"] else ""
    causes = [
        f"{name} {seconds:,.1f} s"
        for name, seconds in sorted(lost.items(), key=lambda item: -item[1])
        if seconds >= 0.05
    ]
    return [
        f"goodput {good / max(total, 1e-9):.1%}: training {spent['training']:,.1f} s{evaluation} of {total:,.1f} s, in "
        f"{len(records)} attempts",
        f"lost: {', '.join(causes) or 'nothing'}; steps made again: {redone:,}",
        f"attempts before this one: {', '.join(f'{count} {how}' for how, count in ends.most_common())}",
    ]


def _again(record: Record, later: Sequence[Record]) -> tuple[int, int]:
    """(steps of an attempt that were made again, steps that it made)."""
    first, back = record["first"] or 0, record["back"]
    last = max(record["last"] or 0, first)
    resumed = next((after["first"] for after in later if after["first"] is not None), last)
    return back + min(max(last - resumed, 0), last - first), back + last - first


def _between(record: Record, after: Record) -> float:
    """Seconds from an attempt to the next: on a clock that nobody sets, where both ran since this machine started."""
    clock = "began" if record["boot"] == after["boot"] else "time"
    return max(after[clock] - record[clock] - record["seconds"], 0.0)


def _clock() -> float:
    """Seconds since this machine started, the same in all its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _process_began() -> float:
    """When this process began, on `_clock`: before Python did, where Linux tells."""
    now, known = _clock(), sum(progress.totals().values())
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        if known <= now - began < known + STARTING:  # not in a sandbox that makes one up
            return began
    return now - known


def _boot() -> str:
    """Which start of which machine this is."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
