"""Whether a process still gets on: how long nothing has moved, how long that may be, and which process holds up a run.

`Watch` is asked at each tick of `pulse`, in a thread, so that it works while the main thread is in compiled code.
"""

import contextlib
import dataclasses
import faulthandler
import math
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from flaxmodels.runtime import host_log, progress

# Seconds in which something must move, where the speed is not known yet: a large model compiles for an hour, as a
# large data set is read into memory, and slow storage takes minutes. Outside of all phases there is no limit.
LIMITS = {
    "": math.inf,
    "start": 7200.0,
    "data": 10800.0,
    "compile": 10800.0,
    "restore": 7200.0,
    "training": 3600.0,
    "evaluation": 900.0,
    "save": 3600.0,
    "end": 7200.0,
}
# Where it is known: so many times the slowest so far, and at least so many seconds.
SLOWER, LEAST = 20.0, 45.0
FRAMES = 4  # in a message
# A process that stands in one of these files waits for another process, or for its devices.
WAITING = re.compile(r"/jax/|/jaxlib/|/orbax/|/flaxmodels/runtime/(peers|roll_call|agreement)\.py$")
# Where threads of Python wait: what matters is who called it.
_LOCKS = re.compile(r"/(threading|queue|selectors|socket|subprocess|concurrent/futures/\w+)\.py$")


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one process gets on.

    Attributes:
      phase, step, beats: of `progress.Now`.
      stalled: seconds for which nothing has moved.
      limit: seconds that this may last.
      waits: whether its main thread waits for another process, or for its devices.
      where: its main thread stands, in words, the innermost call first.
    """

    phase: str
    step: int | None
    beats: int
    stalled: float = 0.0
    limit: float = math.inf
    waits: bool = False
    where: str = ""

    @property
    def at(self) -> str:
        """Phase and step, in words."""
        phase = f"phase {self.phase!r}" if self.phase else "no phase"
        return phase if self.step is None else f"{phase} at step {self.step}"


class Watch:
    """Counts how long nothing has moved.

    It counts ticks, not time: a process that was stopped for hours, by a debugger or a closed laptop, did not tick.

    Args:
      stuck_after: seconds for training, from its first step on, and for evaluation; None goes by their speed. The
        limits of other phases it only raises. `math.inf` turns them all off.
    """

    def __init__(self, stuck_after: float | None = None) -> None:
        self._asked = stuck_after
        self._beats, self._stalled, self._counts, self._kind = -1, 0.0, False, ""
        self._slowest = {"training": 0.0, "evaluation": 0.0}

    def tick(self, elapsed: float) -> Standing:
        """How this process gets on.

        Args:
          elapsed: seconds since the last tick, no more than a tick can take.
        """
        now = progress.now()
        kind = now.phase
        if now.beats != self._beats:
            if self._counts:
                self._slowest[self._kind] = max(self._slowest[self._kind], self._stalled)
            # The first dispatch takes longer than all others; the first batch of each evaluation does, too.
            self._counts = kind == "evaluation" or (kind == "training" and progress.paces(kind) > 0)
            self._beats, self._stalled, self._kind = now.beats, 0.0, kind
        else:
            self._stalled += elapsed
        waits, where = stands() if self._stalled > 0 else (False, "")
        return Standing(now.phase, now.step, now.beats, self._stalled, self._limit(kind), waits, where)

    def _limit(self, kind: str) -> float:
        if self._asked == math.inf:
            return math.inf
        most = max(LIMITS[kind], self._asked or 0.0)
        if kind not in self._slowest:
            return most
        if self._asked and (kind == "evaluation" or progress.paces(kind)):
            return self._asked
        # The time from one beat of training to the next is known at the second; a step may take minutes.
        known = progress.paces(kind) > (kind == "training")
        return max(LEAST, progress.allowed(), SLOWER * self._slowest[kind]) if known else most


def stands() -> tuple[bool, str]:
    """Whether the main thread waits for another process or for its devices, and where it stands, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls: list[tuple[str, str]] = []
    while frame is not None and len(calls) < FRAMES:
        file = frame.f_code.co_filename
        if calls or not _LOCKS.search(file):
            calls.append((file, f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"))
        frame = frame.f_back
    return bool(calls and WAITING.search(calls[0][0])), ", called by ".join(text for _, text in calls)


def laggard(standings: Mapping[int, Standing]) -> int | None:
    """The process that holds up the run for longer than it may, by number; None where none does.

    The others wait for it, and may be over their own limits: one that compiles or saves is given its own time.
    """

    def got(number: int) -> tuple[int, bool, int, int]:
        it = standings[number]
        return -1 if it.step is None else it.step, it.waits, it.beats, number

    last = min(standings, key=got)
    return last if standings[last].stalled > standings[last].limit else None


def explain(number: int, standings: Mapping[int, Standing], who: str) -> str:
    """Why the run can't go on: in words, for all processes.

    Args:
      number: of the laggard.
      standings: of all processes.
      who: the laggard, such as "process 1 (host, pid 7)"; "" in a process that is alone.
    """
    it = standings[number]
    lines = [
        f"{who or 'this process'} is stuck in {it.at}: nothing has moved there for {it.stalled:.0f} s, and "
        f"{it.limit:.0f} s is the limit. It stands at {it.where or 'no call of Python'}."
    ]
    others = [f"{n} in {standings[n].at}" for n in sorted(standings) if n != number]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        what = "No process gets on; this one has come least far" if it.waits else "The others wait for it"
        lines.append(f"{what}: process {', '.join(others[:8])}{more}.")
    lines.append("Where that is as it should be, --stuck_after=SECONDS gives it more time.")
    return " ".join(lines)


def dump(process: int, folder: Path | None) -> str:
    """Write where every thread of this process stands to stderr, and to its log and a file of the workdir, if any.

    Returns:
      The file's name, or "".
    """
    name = ""
    if folder is not None and folder.is_dir():
        with contextlib.suppress(OSError), (folder / f"stacks.{process}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            name = file.name
    if (log := host_log.current()) is not None:
        log.stacks()
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, or no file
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    return name
