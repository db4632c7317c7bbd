"""`gcloud`: the words of each command, and how they are run.

The words are those of https://cloud.google.com/sdk/gcloud/reference/compute/tpus.
"""

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpu import machines, processes
from tpu.meaning import CloudError, error_of, not_installed
from tpu.meaning import kind as kind
from tpu.processes import EXPIRED, Done
from tpu.settings import Settings

Words = tuple[str, ...]
LIMIT = 300.0  # seconds for a command that nothing else is said of
RETRIES = (1.0, 5.0, 20.0)  # seconds before each further try of what failed in passing
_TPUS = ("gcloud", "compute", "tpus")
_QUEUED = (*_TPUS, "queued-resources")
_NODES = (*_TPUS, "tpu-vm")


def node_names(s: Settings) -> Words:
    """The TPU VMs of a run, a name a slice."""
    return (s.name,) if s.slices == 1 else tuple(f"{s.name}-{index}" for index in range(s.slices))


def create(s: Settings, zone: str) -> Words:
    """Queue a request for the machine."""
    machine = machines.of(s.type)
    nodes = (f"--node-id={s.name}",) if s.slices == 1 else (f"--node-count={s.slices}", f"--node-prefix={s.name}")
    capacity = {"spot": ("--spot",), "reserved": ("--reserved",), "on demand": ()}[s.capacity]
    optional = {"network": s.network, "subnetwork": s.subnetwork, "service-account": s.service_account}
    optional |= {"labels": ",".join((*s.labels, f"flaxmodels={s.name}")), "tags": ",".join(s.tags)}
    return (
        *_QUEUED, "create", s.name, *nodes, *_place(s, zone), f"--accelerator-type={s.type}",
        f"--runtime-version={s.runtime_version or machine.runtime_version}", *capacity,
        f"--valid-until-duration={max(1, round(s.queue_hours * 60))}m",
        *(f"--{flag}={value}" for flag, value in optional.items() if value),
        *(("--internal-ips",) if s.internal_ips else ()), "--quiet",
    )  # fmt: skip


def describe(s: Settings, zone: str) -> Words:
    """The request, as JSON."""
    return (*_QUEUED, "describe", s.name, *_place(s, zone), "--format=json")


def list_queued(s: Settings, zone: str) -> Words:
    """All requests of the project in a zone, as JSON."""
    return (*_QUEUED, "list", *_place(s, zone), "--format=json")


def list_nodes(s: Settings, zone: str) -> Words:
    """All TPU VMs of the project in a zone, as JSON."""
    return (*_NODES, "list", *_place(s, zone), "--format=json")


def delete(s: Settings, zone: str) -> Words:
    """Delete the request, and with it the machine."""
    return (*_QUEUED, "delete", s.name, *_place(s, zone), "--force", "--quiet")


def delete_node(s: Settings, zone: str, node: str) -> Words:
    """Delete a TPU VM that no request holds."""
    return (*_NODES, "delete", node, *_place(s, zone), "--quiet")


def ssh(s: Settings, zone: str, command: str, worker: str | int = "all", node: str | None = None) -> Words:
    """Run a command on workers of one slice, at the same time.

    Args:
      s: whose machine.
      zone: where it is.
      command: for the shell there; "" for a shell to type into.
      worker: a number within the slice, or "all".
      node: the slice; None: the first.
    """
    ask = (f"--command={command}", "--quiet") if command else ()
    return (*_NODES, "ssh", node or node_names(s)[0], *_place(s, zone), f"--worker={worker}", *s.ssh_flags, *ask)


def scp(
    s: Settings, zone: str, files: Sequence[Path], to: str, worker: str | int = "all", node: str | None = None
) -> Words:
    """Copy files of this machine to a path on workers of one slice; arguments as `ssh` has them."""
    name = node or node_names(s)[0]
    sources = (str(file) for file in files)
    return (*_NODES, "scp", *sources, f"{name}:{to}", *_place(s, zone), f"--worker={worker}", *s.ssh_flags, "--quiet")


def storage(verb: str, *words: str) -> Words:
    """A command on a bucket, such as `storage("ls", "gs://b/run/")`."""
    return ("gcloud", "storage", verb, *words)


def _place(s: Settings, zone: str) -> Words:
    return (f"--project={s.project}", f"--zone={zone}")


def _print(line: str) -> None:
    print(line, flush=True)


class Cloud:
    """Runs commands, each printed before it runs.

    Args:
      dry_run: print, and run nothing: what depends on an answer takes that of the good case.
      echo: prints a line.
      good: what a cloud answers when all goes well, for `dry_run`.
      sleep: waits so many seconds, in place of `time.sleep`; not used in a `dry_run`.
    """

    def __init__(
        self,
        dry_run: bool = False,
        echo: Callable[[str], None] = _print,
        *,
        good: Callable[[Words], Done] = lambda words: Done(0, "", ""),
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.dry_run = dry_run
        self._echo, self._good, self._sleep = echo, good, sleep or time.sleep
        self._told: set[Words] = set()

    def say(self, line: str) -> None:
        """Print a line for the user."""
        self._echo(line)

    def once(self, line: str) -> None:
        """Print a line for the user, the first time only."""
        if (line,) not in self._told:
            self._told.add((line,))
            self.say(line)

    def sleep(self, seconds: float) -> None:
        """Wait, unless nothing real is waited for."""
        if not self.dry_run:
            self._sleep(seconds)

    def run(
        self,
        words: Sequence[str],
        *,
        limit: float = LIMIT,
        quiet: bool = False,
        check: bool = True,
        stream: Callable[[str], None] | None = None,
    ) -> Done:
        """Run one command; with `check`, what fails in passing is tried again, and what fails raises.

        Args:
          words: the command.
          limit: seconds; a command that takes longer is ended, and so is all that it started.
          quiet: a poll: printed the first time only.
          check: False: return how it ended, whatever that is.
          stream: is given each line of standard output as it comes.

        Raises:
          CloudError: it failed, or `gcloud` is not there.
        """
        pauses = iter(RETRIES)
        while True:
            (done,) = self.together([words], limit=limit, quiet=quiet, stream=stream)
            if done.code == 0 or not check:
                return done
            error = error_of(words, done)
            pause = None if error.kind != "transient" or done.code == EXPIRED else next(pauses, None)
            if pause is None:
                raise error
            self.say(f"# {error.said} Once more in {pause:.0f} s.")
            self.sleep(pause)

    def together(
        self,
        commands: Sequence[Sequence[str]],
        *,
        limit: float = LIMIT,
        quiet: bool = False,
        stream: Callable[[str], None] | None = None,
    ) -> list[Done]:
        """Run commands at the same time; arguments as `run` has them, and nothing is checked."""
        all_words = [tuple(words) for words in commands]
        for words in all_words:
            if not quiet or words not in self._told:
                self.say(f"$ {shlex.join(words)}")
            self._told.add(words)
        if self.dry_run:
            return [self._good(words) for words in all_words]
        try:
            return processes.run(all_words, limit, stream)
        except FileNotFoundError as error:
            raise not_installed(all_words[0][0]) from error

    def json(self, words: Sequence[str], *, limit: float = 60.0, quiet: bool = True) -> Any:
        """What a command answers that prints JSON; None where it prints nothing."""
        done = self.run(words, limit=limit, quiet=quiet)
        try:
            return json.loads(done.out) if done.out.strip() else None
        except ValueError as error:
            raise CloudError("unknown", f"`{shlex.join(words)}` printed no JSON: {error}.", done=done) from error

    def attach(self, words: Sequence[str]) -> int:
        """Run a command that the user types into; its exit code."""
        self.say(f"$ {shlex.join(words)}")
        if self.dry_run:
            return 0
        try:
            return subprocess.run(list(words), check=False).returncode
        except FileNotFoundError as error:
            raise not_installed(words[0]) from error
