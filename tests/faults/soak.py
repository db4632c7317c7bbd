"""Faults of all kinds for as long as you like: python tests/faults/soak.py [--minutes=20] [--seed=N] [--between=60].

Two processes of four devices each, under `--max_restarts`, on a small disk of their own. Faults come at random: a
process is killed; one or both get SIGTERM, and are started again, as a cluster would; the disk is full for some
seconds; a data worker is killed. All the while some batches are NaN. At the end everything is compared with a run that
was left alone. Needs root, to mount the disk.
"""

import argparse
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
from harness import ROOT, Group, T2x4

from flaxmodels.runtime import goodput

# Fault -> its share.
FAULTS = {"kill one": 3, "kill both": 1, "SIGTERM to one": 2, "SIGTERM to both": 1, "disk full": 2, "kill a worker": 2}
RESTARTS = 1000
DISK = "96m"
FULL = (2.0, 8.0)  # seconds without room
SHARE = 0.5  # of the time that steps get
PATIENCE = 15.0  # seconds till the others of a run are asked to stop, where one has left for good
LEAVING = 180.0  # and for them to end


def main(argv: Sequence[str]) -> int:
    """Soak; 0 where the run ended as one left alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="about so long (20)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of the faults (a new one)")
    parser.add_argument("--between", type=float, default=60.0, help="seconds between faults, on average (60)")
    parser.add_argument("--steps", type=int, help="of the run (default: what fits into the time)")
    parser.add_argument("--keep", type=Path, help="a folder for all that is written")
    asked = parser.parse_args(argv)
    if reason := harness.mounts():
        print(f"skipped: {reason}")
        return 0
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak_")))
        os.environ.setdefault(harness.PROGRAMS, str(folder / "programs"))
        print(f"seed {asked.seed}; a fault every {asked.between:g} s", flush=True)
        steps = asked.steps or int(SHARE * 60 * asked.minutes / pace(folder / "pace"))
        print(f"{steps} steps, left alone", flush=True)
        begun = time.monotonic()
        with start(folder / "whole", steps) as group:
            if set(group.wait(3600 + 600 * asked.minutes)) != {0}:
                print(f"the run fails by itself\n{group}")
                return 1
        print(f"  took {time.monotonic() - begun:.0f} s; now with faults", flush=True)
        workdir = stack.enter_context(harness.tmpfs(folder / "soaked", DISK))
        begun = time.monotonic()
        counts, starts = soak(workdir, steps, random.Random(asked.seed), asked.between)
        seconds = time.monotonic() - begun
        found = harness.same(workdir, folder / "whole", steps=None)
        lines = goodput.summary(workdir)
        harness.record(
            "F47",
            "soak",
            {
                "injected": sum(counts.values()),
                "exact": sum(counts.values()) if not found else 0,
                "minutes": round(seconds / 60, 1),
                "faults": ", ".join(f"{count} {name}" for name, count in counts.items()),
                "goodput": " ".join(lines[:1]),
            },
        )
        print(*lines, sep="\n")
        print(f"{sum(counts.values())} faults in {seconds / 60:.1f} minutes ({dict(counts)}), {starts} starts by hand")
        print(f"FAILED: {found} (seed {asked.seed})" if found else "EXACT: as the run that was left alone")
        return int(bool(found))


def start(workdir: Path, steps: int, *flags: str) -> Group:
    """Start a run of the soak."""
    words = [f"--config.train.duration={steps}", *flags]
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/faults")])}
    return harness.start(workdir, T2x4, *words, config=ROOT / "tests/faults/busy.py", env=env)


def pace(workdir: Path) -> float:
    """Seconds of a step."""
    with start(workdir, 10_000) as group:
        if not harness.wait_for(lambda: harness.last_step(workdir) >= 50 or not group.running(), 600):
            raise TimeoutError(f"no 50 steps in 600 s\n{group}")
        begun, first = time.monotonic(), harness.last_step(workdir)
        harness.wait_for(lambda: not group.running(), 20.0)
        return (time.monotonic() - begun) / max(harness.last_step(workdir) - first, 1)


def soak(workdir: Path, steps: int, rng: random.Random, between: float) -> tuple[Counter[str], int]:
    """Train to the end, through faults; how many there were of each kind, and how often the run was started."""
    counts, starts, room = Counter[str](), 0, Room(workdir)
    due = time.monotonic() + rng.expovariate(1 / between)
    while True:
        starts += 1
        with start(workdir, steps, f"--max_restarts={RESTARTS}") as group:
            while all(code is None for code in group.codes()):
                time.sleep(0.05)
                room.look()
                if time.monotonic() < due or harness.last_step(workdir) == 0:
                    continue
                due = time.monotonic() + rng.expovariate(1 / between)
                kind = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
                if strike(kind, group, rng, room):
                    counts[kind] += 1
                    print(f"  {time.strftime('%H:%M:%S')} step {harness.last_step(workdir)}: {kind}", flush=True)
            room.free()
            if not harness.wait_for(group.ended, PATIENCE):
                group.kill(signum=signal.SIGTERM)  # as a cluster does, where one of a job has left
            codes = group.wait(LEAVING)
            if set(codes) == {0}:
                return counts, starts
            if not set(codes) <= {0, 1, 143}:
                print(f"  left with {codes}\n{group}", flush=True)
            print(f"  {time.strftime('%H:%M:%S')} left with {codes}, started again", flush=True)


class Room:
    """The disk of the run, which is full at times."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.until = folder, 0.0

    def fill(self, seconds: float) -> None:
        """Leave no room for so long."""
        harness.fill(self.folder)
        self.until = time.monotonic() + seconds

    def look(self) -> None:
        """Make room again, when it is time."""
        if self.until and time.monotonic() > self.until:
            self.free()

    def free(self) -> None:
        """Make room."""
        (self.folder / "ballast").unlink(missing_ok=True)
        self.until = 0.0


def strike(kind: str, group: Group, rng: random.Random, room: Room) -> bool:
    """Make a fault; False where there was nothing to hit, as between two attempts."""
    if kind == "disk full":
        room.fill(rng.uniform(*FULL))
        return True
    one = rng.randrange(len(group.processes))
    if kind.startswith("SIGTERM"):  # to the supervisors, as a cluster does
        group.kill(None if kind.endswith("both") else one, signal.SIGTERM)
        return True
    trainers = [next(children(process.pid), None) for process in group.processes]
    hit = trainers if kind == "kill both" else [trainers[one]]
    if kind == "kill a worker":
        hit = [next((pid for pid in descendants(hit[0]) if worker(pid)), None)] if hit[0] else []
    for pid in filter(None, hit):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return any(hit)


def children(pid: int) -> Iterator[int]:
    """The processes that a process has started."""
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            yield from map(int, file.read_text().split())


def descendants(pid: int) -> Iterator[int]:
    """And all that these have."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def worker(pid: int) -> bool:
    """Whether a process is a data worker."""
    with contextlib.suppress(OSError):
        return "multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
