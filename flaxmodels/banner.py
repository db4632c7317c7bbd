"""The first lines of a run, which process 0 prints: on what it runs, with what, and where everything lies.

Read `lines`. All of it is at hand, or was looked up by a thread while the run started (`ahead`).
"""

import collections
import contextlib
import importlib.metadata
import itertools
import math
import platform
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmodels import hardware, mirror, registry, resume, storage, version
from flaxmodels.console import human_bytes
from flaxmodels.data import SOURCES, prepared
from flaxmodels.job import Job
from flaxmodels.runtime import compile_cache, host_log, peers, pulse

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax.checkpoint")
MOST = 3  # hosts that are named
# TPUs whose slices lie in a plane: their coordinates have a third number, which is 0.
FLAT = ("v2", "v3", "v5e", "v6e")


def ahead() -> None:
    """Ask git, in a thread: it takes longer than all else here."""
    threading.Thread(target=resume.revision, name="git", daemon=True).start()


def lines(job: Job, workdir: Path, start: int) -> list[str]:
    """Hosts, chips, versions, mesh and all else that was chosen, and where everything lies: a line each.

    Args:
      job: of the run.
      workdir: of the run.
      start: the step it goes on from.
    """
    return [
        *machines(job.mesh, names()),
        f"versions: {', '.join(versions(job.mesh))}{code(resume.revision())}",
        *job.notes,
        f"workdir: {workdir}{f', resumed at step {start}' if start else ''}",
        *places(job.config["data"], workdir, jax.process_count()),
    ]


def names() -> list[str]:
    """The hosts of all processes, in their order; only this one's where nothing has told of the others."""
    beat = pulse.current()
    others = beat.hosts() if beat is not None else {}
    found = {peers.me(): socket.gethostname(), **others}
    return [found[number] for number in sorted(found)]


def machines(mesh: Mesh, hosts: Sequence[str]) -> Iterator[str]:
    """Hosts, with the chips of each, and what kind of chips they are.

    Args:
      mesh: of the run.
      hosts: of its processes, in their order; of fewer where not all are known.
    """
    devices = list(mesh.devices.flat)
    kind = hardware.KINDS.get(devices[0].device_kind)
    halves = kind.devices_per_chip if kind else 1
    word = "device" if devices[0].platform == "cpu" else "chip"
    each = collections.Counter(device.process_index for device in devices)
    counts = sorted({number // halves for number in each.values()})
    share = f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} {word}{'s' * (counts != [1])}"
    known = list(dict.fromkeys(hosts))
    listed = ", ".join(known[:MOST]) + (f" and {len(known) - MOST} more" if known[MOST:] else "")
    processes = f"{len(each)} processes x " if len(each) > 1 else ""
    if len(hosts) < len(each):
        yield f"hosts: {processes}{share}; this is process {peers.me()}, on {listed}"
    elif len(known) == len(each):
        yield f"hosts: {len(known)} x {share} ({listed})"
    else:
        yield f"hosts: {len(known)}, {processes}{share} ({listed})"
    if word == "chip":
        size = hardware.memory(devices[0])
        memory = f", {human_bytes(size * halves)} each" if size else ""
        shape = f", topology {shape}" if (shape := topology(devices)) else ""
        yield f"chips: {len(devices) // halves} x {devices[0].device_kind}{memory}{shape}"


def topology(devices: Sequence[Any]) -> str:
    """How the chips of a TPU lie, as `flaxmodels plan` names it: "v5e:4x4", "2 x v5p:2x2x4"; "" where nothing tells.

    Args:
      devices: of a run, with the coordinates of their chips.
    """
    kind = hardware.KINDS.get(devices[0].device_kind)
    if devices[0].platform != "tpu" or kind is None or not hasattr(devices[0], "coords"):
        return ""
    groups = collections.defaultdict[int, set[tuple[int, ...]]](set)
    for device in devices:
        groups[getattr(device, "slice_index", 0) or 0].add(tuple(device.coords))
    shapes = set()
    for chips in groups.values():
        sides = [max(side) - min(side) + 1 for side in zip(*chips)]
        if math.prod(sides) != len(chips):  # a part of a slice
            return ""
        shapes.add("x".join(map(str, sides[:2] if kind.name in FLAT else sides)))
    if len(shapes) > 1:
        return ""
    return f"{len(groups)} x " * (len(groups) > 1) + f"{kind.name}:{shapes.pop()}"


def versions(mesh: Mesh) -> Iterator[str]:
    """Of this library, of what the numbers of a run depend on, and of Python."""
    yield f"flaxmodels {version.__version__}"
    for name in SHOWN:
        yield f"{name.partition('.')[0]} {getattr(sys.modules.get(name), '__version__', '?')}"
    if mesh.devices.flat[0].platform == "tpu":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it came by another way
            yield f"libtpu {importlib.metadata.version('libtpu')}"
    yield f"Python {platform.python_version()}"


def code(revision: Mapping[str, Any] | None) -> str:
    """What git says of the working directory."""
    if revision is None:
        return ""
    return f"; git {revision['revision'][:10]}{' with changes' if revision['dirty'] else ''}"


def places(data: Mapping[str, Any], workdir: Path, processes: int) -> Iterator[str]:
    """Where logs, compiled programs and data sets are kept: all on this machine, whatever the workdir is.

    Args:
      data: that section of a config.
      workdir: of the run.
      processes: how many the run has.
    """
    if processes > 1:
        yield f"logs: {host_log.path(workdir, 0)} to {host_log.path(workdir, processes - 1).name}"
    if storage.is_object(workdir):
        yield f"mirror: {mirror.local(workdir, peers.me())} is copied there every {mirror.EVERY:.0f} s"
    kept = compile_cache.place()
    compiled = f"compiled programs in {kept}" if kept else "compiled programs are not kept"
    yield ", ".join(["caches: " + compiled, *(f"data sets in {root}" for root in data_folders(data))])


def data_folders(data: Mapping[str, Any]) -> list[str]:
    """The folders in which official data sets of a config are kept once they are prepared."""
    parts = data["sources"] if data["name"] == "mixture" else ()
    own = [str(prepared.data_root(data.get("data_dir")))] if _prepared(data["name"]) else []
    return list(dict.fromkeys(itertools.chain(own, *map(data_folders, parts))))


def _prepared(name: str) -> bool:
    return name in SOURCES and "data_dir" in registry.parameters([registry.pick(SOURCES, name, "data.name")])
