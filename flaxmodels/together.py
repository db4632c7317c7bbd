"""What the processes of a run compare before its first step: a difference is refused by name.

In a process that is alone all of this does nothing.
"""

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from flaxmodels.checkpoint import versions
from flaxmodels.job import Job
from flaxmodels.registry import UserError, storable
from flaxmodels.runtime import exits, peers, sameness
from flaxmodels.runtime.lock import LOCK

# Seconds after which a file that one host wrote must be seen by all: network file systems remember what was not there.
SEEN = 15.0


def first() -> bool:
    """Whether this is process 0, which writes.

    Raises:
      UserError: JAX knows of several processes, and they can't talk to each other.
    """
    if jax.process_count() != peers.count():
        raise UserError(
            f"JAX has devices of {jax.process_count()} processes, but jax.distributed was not started: train with "
            "train.py or `flaxmodels train`, or call jax.distributed.initialize() before anything else of JAX."
        )
    return peers.me() == 0


def same_start(
    workdir: Path,
    resolved: Mapping[str, Any],
    devices: Sequence[jax.Device],
    *,
    allow_config_change: bool,
    allow_data_change: bool,
) -> None:
    """Compare what is known before the data are read: config, code, versions, and that the workdir is one folder.

    Args:
      workdir: process 0 holds its lock.
      resolved: every key of the config.
      devices: to train on.
      allow_config_change: as given to `fit`.
      allow_data_change: as given to `fit`.

    Raises:
      UserError: they differ between processes.
      FaultError: a process failed, or did not answer in time.
    """
    if peers.count() == 1:
        return
    absent = sorted(set(range(jax.process_count())) - {device.process_index for device in devices})
    if absent:
        raise UserError(f"of the devices to train on none belongs to process {absent[0]}: each must have at least one.")
    flags = {"--allow_config_change": allow_config_change, "--allow_data_change": allow_data_change}
    config = {**storable(resolved), **flags}
    peers.compare({"config": config, "version": versions() | sameness.python(), "file": sameness.code(resolved)})
    _one_folder(workdir)


def _one_folder(workdir: Path) -> None:
    """All processes must see the lock that process 0 has written."""
    file = workdir / LOCK
    mine = file.read_text() if peers.me() == 0 else ""
    first = peers.told({"lock": mine, "host": socket.gethostname(), "folder": str(workdir.absolute())})
    deadline, seen = time.monotonic() + SEEN, False
    while not (seen := _text(file) == first["lock"]) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            next(workdir.iterdir(), None)  # makes a network file system look again
        time.sleep(0.2)
    there = f"{first['host']}, {first['folder']!r}"
    problem = (
        f"{peers.name()}: --workdir={str(workdir)!r} is not the folder of process 0 ({there}). All need one that they "
        "share: on a network file system, or in a bucket, gs://BUCKET/NAME."
    )
    peers.settle("" if seen else problem)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def same_programs(job: Job, programs: Mapping[str, jax.stages.Lowered]) -> None:
    """Compare the data of a job, and the programs that come of it all: what differs in any other way shows there.

    Args:
      job: of the config.
      programs: by name, such as "of the train step".

    Raises:
      UserError: they differ between processes.
      FaultError: a process failed, or did not answer in time.
    """
    if peers.count() == 1:
        return
    data = {f"data: {name}": value for name, value in job.identity.items()}
    mesh = {f"mesh.{axis}": size for axis, size in job.mesh.shape.items()}
    hashes = {name: sameness.program(lowered) for name, lowered in programs.items()}
    peers.compare({"mesh": mesh, "data": data, "program": hashes})


def end(error: exits.FaultError) -> NoReturn:
    """End this process at once, and the others of the run with it; from any thread, whatever the main one is in."""
    if peers.count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone, and with it the way to the others
            peers.report(error)
            peers.cut()
    exits.leave(error)
