"""The machine below JAX: memory, processors, open files. Imports no JAX.

Read `memory`: what a container may use is less than what the machine has.
"""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from flaxmodels.console import human_bytes
from flaxmodels.verify.finding import Finding, ok, problem, warning

GIB = 2**30


def memory(root: Path = Path("/")) -> list[Finding]:
    """RAM, the limit of a container, and shared memory."""
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read(root / "proc/meminfo"), re.MULTILINE))
    total, free = (int(rows.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = memory_limit(root)
    size = f"{human_bytes(free)} of {human_bytes(total)} are free"
    if limit is not None and limit < total:
        free = min(free, limit - used)
        size += f"; a control group allows {human_bytes(limit)}, of which {human_bytes(used)} are in use"
    if free < 2 * GIB:
        fix = "end other processes, or raise the limit; else the kernel kills a run that needs more (SIGKILL)"
        return [warning("memory", f"{size}.", fix)]
    return [ok("memory", size)]


def memory_limit(root: Path = Path("/")) -> tuple[int | None, int]:
    """(bytes that the control groups of this process allow it, bytes in use there); None where nothing limits it."""
    paths = {controllers: path for _, controllers, path in _groups(root)}
    new, old = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    tries = [
        *((folder / "memory.max", folder / "memory.current") for folder in _up(new, paths.get("", "/"))),
        *(
            (folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes")
            for folder in _up(old, paths.get("memory", "/"))
        ),
    ]
    found = [(int(read(limit)), int(read(usage) or 0)) for limit, usage in tries if read(limit).isdecimal()]
    return min(found, default=(None, 0))


def _groups(root: Path) -> Iterator[tuple[str, str, str]]:
    for line in read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        yield number, controllers, path


def _up(base: Path, path: str) -> Iterator[Path]:
    """The folder of a control group, and those above it: each may set a limit. In a container only the last is seen."""
    folder = base / path.strip("/")
    yield from (parent for parent in (folder, *folder.parents) if parent == base or base in parent.parents)


def shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> list[Finding]:
    """/dev/shm. Our data workers do not use it; NCCL does, between GPUs of a host."""
    try:
        place = os.statvfs(path)
    except OSError as error:
        return [warning("shared memory", f"{path}: {error.strerror}.", "mount a tmpfs there")]
    size, free = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    text = f"{human_bytes(free)} of {human_bytes(size)} are free in {path}"
    if gpus > 1 and free < GIB:
        fix = "docker run --shm-size=8g, or an emptyDir of medium Memory in Kubernetes"
        return [problem("shared memory", f"{text}: too little for NCCL between {gpus} GPUs.", fix)]
    return [ok("shared memory", text)]


def processors(workers: int, threads: int, root: Path = Path("/")) -> list[Finding]:
    """Processors, and the threads that make batches.

    Args:
      workers: data.workers.
      threads: data.threads, of each of them.
      root: of the file system.
    """
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    share = _share(root)
    count = max(1, min(usable, int(share) if share else usable))
    text = f"{total} processors" + (f", of which this process may use {count}" if count < total else "")
    if workers > count:
        fix = f"--config.data.workers={count} or fewer"
        return [warning("processors", f"{text}; data.workers={workers} processes make batches.", fix)]
    makers = f"; batches are made by {workers} processes of {threads} threads" if workers else ""
    return [ok("processors", text + makers)]


def _share(root: Path) -> float | None:
    """Processors' time that a control group grants."""
    new = read(root / "sys/fs/cgroup/cpu.max").split()
    old = [read(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = new if len(new) == 2 else old
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def open_files() -> list[Finding]:
    """How many files a process may have open: shards, checkpoints, connections."""
    granted, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may have {granted:,} open"
    if granted < 1024:
        return [warning("open files", f"{text}.", f"ulimit -n {min(most, 65536) if most > 0 else 65536}")]
    return [ok("open files", text)]


def read(file: Path) -> str:
    """What a small file says, stripped; "" where it is not there, or can't be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
