"""The place of this process among those of its run: from flags, or from what `cluster` finds in the environment.

Needs no JAX, so that the flags of a command cost nothing.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping

from flaxmodels.registry import UserError
from flaxmodels.runtime import cluster
from flaxmodels.runtime.cluster import Place

FLAGS = {"address": "--coordinator_address", "processes": "--num_processes", "process": "--process_id"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where this process stands; without them the environment does, or it is alone."""
    group = parser.add_argument_group(
        "several processes", "each is started with the same command; TPU pods, SLURM and Open MPI tell the first three"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0, the same for all")
    group.add_argument("--num_processes", type=_count, metavar="N", help="how many processes the run has")
    group.add_argument("--process_id", type=_whole, metavar="I", help="which of them this one is, from 0")
    group.add_argument("--local_device_ids", type=_list, metavar="I,J", help="GPUs of its host that are its own")
    group.add_argument("--distributed", choices=("auto", "off"), default="auto", help="off: alone, whatever is found")
    group.add_argument(
        "--init_timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="to find each other, and to end together (300)",
    )
    group.add_argument(
        "--heartbeat_timeout", type=_seconds, default=60.0, metavar="S", help="until a silent one counts as dead (60)"
    )
    parser.add_argument(
        "--stuck_after",
        type=_patience,
        metavar="S",
        help="seconds in which a dispatch of training, from the second on, or a batch of an evaluation must end, else "
        "the run is stuck and ends; off: for ever, as all else (default: 20 times the slowest so far, at least 45 s)",
    )


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected an integer, at least 0")
    return int(text)


def _count(text: str) -> int:
    if not _whole(text):
        raise argparse.ArgumentTypeError("'0' is too few: expected at least 1")
    return int(text)


def _list(text: str) -> tuple[int, ...]:
    return tuple(_whole(part.strip()) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit: expected seconds, from 1 to 86400")
    return seconds


def _patience(text: str) -> float:
    return math.inf if text == "off" else _seconds(text)


def place_of(flags: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """The place of this process, or None where it is alone.

    Args:
      flags: with those of `add_flags`; what they say goes before the environment.
      environment: `os.environ`, after JAX is imported.

    Raises:
      UserError: what they say is not enough, or can't be.
      FaultError: a TPU VM does not tell.
    """
    given = {"address": flags.coordinator_address, "processes": flags.num_processes, "process": flags.process_id}
    given = {field: value for field, value in given.items() if value is not None}
    if flags.distributed == "off" and given:
        raise UserError(f"--distributed=off with {FLAGS[next(iter(given))]}: leave one of the two out.")
    asked = flags.distributed != "off" and len(given) < len(FLAGS)
    found = cluster.find(environment) if asked else None
    place: Place = dataclasses.replace(found or Place(), **given)
    if (not found and not given) or (place.processes == 1 and place.process <= 0):
        if flags.local_device_ids is not None:
            raise UserError(
                "--local_device_ids is for one of several processes, and this one is alone: leave it out. "
                "CUDA_VISIBLE_DEVICES in the environment says which GPUs a process sees."
            )
        return None
    if flags.local_device_ids is not None:
        place = dataclasses.replace(place, local_device_ids=flags.local_device_ids)
    return _checked(place, found)


def _checked(place: Place, found: Place | None) -> Place:
    told = {"address": bool(place.address), "processes": place.processes > 0, "process": place.process >= 0}
    missing = [FLAGS[field] for field, known in told.items() if not known]
    if missing:
        where = f", and {found.source} does not tell" if found else ""
        raise UserError(
            f"{' and '.join(missing)}: not set{where}. Several processes need {', '.join(FLAGS.values())}, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID in the environment; --distributed=off trains "
            "in this one alone."
        )
    if place.process >= place.processes:
        raise UserError(
            f"--process_id={place.process} is none of {place.processes} processes: expected 0 to {place.processes - 1}."
        )
    host_and_port(place.address)
    return place


def host_and_port(address: str) -> tuple[str, int]:
    """("host", port) of "HOST:PORT" (UserError)."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={address!r}: expected HOST:PORT, such as node0:{cluster.PORT}.")
    return host.strip("[]"), int(port)
