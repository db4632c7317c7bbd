"""The storage of a workdir: what it is, whether it locks and renames, how fast it takes what a save writes, its room.

Also what lies in the workdir, and the folder of compiled programs. Read `storage` and `contents`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flaxmodels import manifest
from flaxmodels.console import duration, human_bytes
from flaxmodels.runtime import lease, lock
from flaxmodels.storage import changed, is_object
from flaxmodels.verify.finding import Finding, ok, problem, warning

MIB = 2**20
# Seconds of writing, bytes written at most, and how often a small file is forced to storage.
SECONDS, MOST, SMALL = 2.0, 64 * MIB, 20
# Kinds of file systems that are memory.
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
# Bytes a second, and seconds of an fsync, below and above which saves are felt.
SLOW, LATE = 50 * MIB, 0.2
# Seconds that two clocks may be apart.
APART = 1.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a folder's storage does.

    Attributes:
      bytes_per_second: of one large file, written and forced to storage.
      fsync: (median, 95th percentile) seconds to force a small file to storage.
      offset: seconds by which the storage's clock is ahead of this host's; and the bound of its error.
      locks: whether a lock keeps a second owner out.
      renames: whether a folder can be renamed.
    """

    bytes_per_second: float
    fsync: tuple[float, float]
    offset: tuple[float, float]
    locks: bool
    renames: bool


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())


def mount(folder: Path, table: str | None = None) -> tuple[str, str, frozenset[str]]:
    """(kind, mount point, options) of the file system of a folder.

    Args:
      folder: which exists.
      table: as Linux writes /proc/self/mountinfo; None reads that.
    """
    if table is None:
        try:
            table = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return "unknown", "/", frozenset()
    where, found = folder.resolve(), ("unknown", "/", frozenset[str]())
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if point == where or point in where.parents:
            longer = len(str(point)) >= len(found[1])
            found = (after.split()[0], str(point), frozenset(fields[5].split(","))) if longer else found
    return found


def storage(workdir: Path, needed: int = 0, table: str | None = None) -> list[Finding]:
    """Of the file system of a workdir, which need not exist yet.

    Args:
      workdir: whose nearest folder is written to; what is written is removed.
      needed: bytes of all the checkpoints that a run keeps; 0: not known.
      table: see `mount`.
    """
    place = nearest(workdir)
    kind, point, options = mount(place, table)
    found = [*_kind(kind, point)]
    if "ro" in options:
        return [*found, problem("storage", f"{place} is read-only ({kind} at {point}).", "choose another --workdir")]
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor_", dir=place) as name:
            found += [*_speed(measure(Path(name)), f"{place} ({kind})")]
    except OSError as error:
        text = f"{place} can't be written: {error.strerror or error}."
        return [*found, problem("storage", text, "choose another --workdir, or make room and rights there")]
    return [*found, *_room(place, needed)]


def _kind(kind: str, point: str) -> Iterator[Finding]:
    if kind in MEMORY:
        text = f"{point} is {kind}: what is saved there takes memory, and is lost when the machine stops."
        yield warning("storage", text, "choose a --workdir on a disk")
    elif kind == "overlay":
        text = f"{point} is a container's own layer: what is saved there is lost with the container."
        yield warning("storage", text, "mount a volume, and choose a --workdir there")
    elif kind.startswith("fuse") or kind == "gcsfuse":  # most buckets
        text = f"{point} is {kind}: renames of folders, locks and fsync may not be what they are on a disk."
        yield warning("storage", text, "choose a --workdir on a disk, and copy what is finished")


def measure(folder: Path, seconds: float = SECONDS, most: int = MOST) -> Speed:
    """Write to an empty folder, and look at how it takes that.

    Args:
      folder: left empty.
      seconds: to write for, at the most; as long again for small files.
      most: bytes of the large file.

    Raises:
      OSError: it can't be written.
    """
    block = os.urandom(MIB)
    begun, written = time.perf_counter(), 0
    with (folder / "large").open("wb", buffering=0) as file:
        while written < most and time.perf_counter() - begun < seconds:
            written += file.write(block)
        os.fsync(file.fileno())
    rate = written / (time.perf_counter() - begun)
    waits, offset, ends = list[float](), (0.0, float("inf")), time.perf_counter() + seconds
    while len(waits) < SMALL and (time.perf_counter() < ends or not waits):
        before = time.time()
        started = time.perf_counter()
        with (folder / "small").open("wb", buffering=0) as file:
            file.write(block[:4096])
            os.fsync(file.fileno())
        waits.append(time.perf_counter() - started)
        after = time.time()
        bound = (after - before) / 2 + 0.01  # of most kernels the clock of files ticks 100 times a second
        if bound < offset[1]:
            offset = (folder / "small").stat().st_mtime - (before + after) / 2, bound
    (folder / "one").mkdir()
    (folder / "one").rename(folder / "other")
    speed = Speed(
        rate, (statistics.median(waits), sorted(waits)[int(0.95 * (len(waits) - 1))]), offset, _locks(folder / "small"),
        (folder / "other").is_dir() and not (folder / "one").exists(),
    )  # fmt: skip
    (folder / "other").rmdir()
    for name in ("large", "small"):
        (folder / name).unlink()
    return speed


def _locks(file: Path) -> bool:
    with file.open() as one, file.open() as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _speed(speed: Speed, place: str) -> Iterator[Finding]:
    median, late = speed.fsync
    rate = f"{human_bytes(speed.bytes_per_second)}/s"
    text = f"{place}: {rate}, an fsync takes {1000 * median:.1f} ms, 1 of 20 over {1000 * late:.0f} ms"
    if speed.bytes_per_second < SLOW or late > LATE:
        fix = "save less often with --config.checkpoint.every_seconds, or choose a faster --workdir"
        yield warning("storage", f"{text}: slow.", fix)
    else:
        yield ok("storage", text)
    if not speed.locks:
        text = f"{place}: a lock does not keep a second process out, so that two runs can destroy each other."
        yield problem("storage", text, "choose a --workdir whose file system has flock (NFS: mount it without nolock)")
    if not speed.renames:
        yield problem("storage", f"{place}: a folder can't be renamed.", "choose another --workdir")
    offset, bound = speed.offset
    text = f"the storage's clock is {apart(offset, bound)}"
    yield (
        warning("clocks", f"{text}.", "set both by NTP: chronyc makestep")
        if abs(offset) > APART + bound
        else ok("clocks", text)
    )


def apart(offset: float, bound: float, whose: str = "this host's") -> str:
    """How far a clock is ahead of another one, in words that follow "is"."""
    size = f"{1000 * abs(offset):.0f} ms" if abs(offset) < 10 else duration(abs(offset))
    return f"{size} {'ahead of' if offset > 0 else 'behind'} {whose}, +-{1000 * bound:.0f} ms"


def _room(place: Path, needed: int) -> Iterator[Finding]:
    there = os.statvfs(place)
    free, nodes = there.f_bavail * there.f_frsize, there.f_favail
    text = f"{human_bytes(free)} are free" + (f", checkpoints take {human_bytes(needed)}" if needed else "")
    if free < needed:
        yield problem("space", f"{text}.", "make room, choose another --workdir, or keep fewer with checkpoint.keep")
    elif free < max(2 * needed, 2**30):
        yield warning("space", f"{text}: not much more.", "make room, or choose another --workdir")
    else:
        yield ok("space", text)
    if there.f_files and nodes < 10_000:
        yield warning("space", f"{nodes:,} more files can be made.", "remove small files, or choose another --workdir")


def contents(workdir: Path, seconds: float = 5.0) -> list[Finding]:
    """What lies in a workdir: who holds it, and which steps are whole.

    Args:
      workdir: of a run; only read.
      seconds: for verifying steps, from the newest; the others are only looked for.
    """
    found, folder = [*_holder(workdir)], workdir / "checkpoints"
    inside = folder.iterdir() if folder.is_dir() else ()
    steps = sorted((file for file in inside if file.name.isdecimal()), key=lambda file: -int(file.name))
    begun, verified, bad = time.monotonic(), 0, list[Finding]()
    for step in steps:
        if not manifest.committed(step):
            text = f"step {step.name} was never committed: a save was interrupted."
            bad.append(warning("checkpoints", text, "nothing to do: the next start moves it aside"))
        elif verified == 0 or time.monotonic() - begun < seconds:
            verified += 1
            wrong = manifest.verify(step)
            if wrong:
                more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                fix = f"flaxmodels checkpoint verify --workdir={workdir}; or resume from an older step"
                bad.append(problem("checkpoints", f"step {step.name} is damaged: {wrong[0]}{more}.", fix))
    found += bad
    if steps and not bad:
        numbers = ", ".join(step.name for step in steps[:4]) + (f" and {len(steps) - 4} older" if steps[4:] else "")
        found.append(ok("checkpoints", f"steps {numbers}: {verified} of {len(steps)} verified byte by byte"))
    elif not steps and workdir.is_dir():
        found.append(ok("checkpoints", f"{workdir} has none yet"))
    return found


def _holder(workdir: Path) -> Iterator[Finding]:
    try:
        held = (_leased if is_object(workdir) else _locked)(workdir / lock.LOCK)
        if held is not None:
            text = f"{workdir} belongs to a running process: {_owner(held)}."
            yield warning("workdir", text, "wait for it, stop it, or choose another --workdir")
    except OSError:  # there is no lock, as no run was here; or it can't be read, which is found elsewhere
        return


def _locked(file: Path) -> str | None:
    """What a lock says that another process holds. Raises OSError."""
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return opened.read()
    return None


def _leased(file: Path) -> str | None:
    """The same of a lock in a bucket: by the clocks, since who asks here does not wait till it is renewed."""
    return file.read_text() if time.time() - changed(file) < lease.DEAD else None


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has just started"


def compiled_programs(environ: Mapping[str, str]) -> list[Finding]:
    """JAX's folder of compiled programs, where one is set."""
    name = environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not name:
        text = "this user's cache folder, of runs of one process; JAX_COMPILATION_CACHE_DIR=DIR keeps those of several"
        return [ok("compile cache", text)]
    if "://" in name:
        return [ok("compile cache", name)]
    folder = Path(name)
    files = [file for file in folder.glob("*-cache") if file.is_file()]
    size = 0
    for file in files:
        with contextlib.suppress(OSError):  # another process may have removed it
            size += file.stat().st_size
    text = f"{name}: {len(files)} programs, {human_bytes(size)}"
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        text = f"{text}; it can't be written: {error.strerror}."
        return [warning("compile cache", text, "choose another JAX_COMPILATION_CACHE_DIR")]
    return [ok("compile cache", text)]
