"""The verb `ssh`: a shell on a worker, or a command on one or all."""

import argparse
import shlex

from tpu import acts, gcloud, machines
from tpu.gcloud import Cloud, CloudError
from tpu.settings import Settings, UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument("--worker", default="0", metavar="N", help="which one, or all (default: 0)")


def ssh(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Run ssh on this terminal; the exit code is that of the command."""
    hosts = machines.of(s.type).hosts
    most, everyone = hosts * s.slices - 1, flags.worker == "all"
    if not everyone and not (flags.worker.isdecimal() and int(flags.worker) <= most):
        raise UserError(f"--worker={flags.worker!r}: expected a number from 0 to {most}, or 'all'.")
    if everyone and not flags.words:
        raise UserError("--worker=all needs a command: -- COMMAND ...")
    zone = place(cloud, s)
    nodes = gcloud.node_names(s) if everyone else gcloud.node_names(s)[int(flags.worker) // hosts :][:1]
    worker = "all" if everyone else int(flags.worker) % hosts
    # Several words are those of a command; a single one is read by the shell there, as with ssh itself.
    command = flags.words[0] if len(flags.words) == 1 else shlex.join(flags.words)
    return max(cloud.attach(gcloud.ssh(s, zone, command, worker, node)) for node in nodes)


def place(cloud: Cloud, s: Settings) -> str:
    """The zone of the machine.

    Raises:
      CloudError: there is none that can be reached.
    """
    found = acts.find(cloud, s)
    for zone, resource in found:
        if resource.nodes:
            return zone
    states = ", ".join(f"{resource.state} in {zone}" for zone, resource in found) or "nothing of this name"
    raise CloudError(
        "missing", f"{s.name!r} can't be reached in {', '.join(s.zones)}: {states}.", "`python tpu/launch.py up` first."
    )
