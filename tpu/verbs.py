"""The verbs of `tpu/launch.py`: their flags, and what is said where they fail."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from tpu import keys, settings
from tpu.gcloud import Cloud, CloudError
from tpu.goodcase import GoodCase
from tpu.settings import UserError
from tpu.state import StateError

FAULT, BAD_INPUT, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141


class Verb(NamedTuple):
    """A verb.

    Attributes:
      place: "module:function", loaded when it is asked for; `add_flags(parser)` of the module adds flags of its own.
      said: what it does.
      needs: the settings without which it can't.
      there: for `--dry_run`: "machine" and "training" where the good case begins with them.
    """

    place: str
    said: str
    needs: tuple[str, ...] = ("project", "zone", "type")
    there: tuple[str, ...] = ("machine",)


VERBS: Mapping[str, Verb] = {
    "up": Verb("tpu.up:up", "ask for the machine, zone after zone, and wait for it", there=()),
    "run": Verb("tpu.running:run", "ship the code, install it, start the training, and show its output; again: attach"),
    "watch": Verb(
        "tpu.watch:watch", "all of it, to the end: up, run, again after preemption, down at the end", there=()
    ),
    "status": Verb("tpu.status:status", "what runs, how far it is, what it costs", there=("machine", "training")),
    "logs": Verb("tpu.logs:logs", "the output of all workers", there=("machine", "training")),
    "ssh": Verb("tpu.ssh:ssh", "a shell on a worker, or after -- a command on it", there=("machine", "training")),
    "down": Verb("tpu.down:down", "save and delete, and see that nothing is left", ("project", "zone"), ("machine",)),
    "cost": Verb("tpu.bill:bill", "what the run has cost, and what still costs", (), ()),
    "gke": Verb("tpu.gke:gke", "write a JobSet manifest for Google Kubernetes Engine", ("type",), ()),
    "slurm": Verb("tpu.slurm:slurm", "write a batch script for a Slurm cluster of GPUs", (), ()),
}

_ABOUT = """python tpu/launch.py VERB [--file=tpu.toml] [--FLAG=VALUE ...] [-- COMMAND ...]

Verbs:
{verbs}

All settings may stand in a TOML file, and each is a flag too, which counts before it: VERB --help names them.
--dry_run prints the commands of the good case and runs none."""


class _Parser(argparse.ArgumentParser):
    """One whose errors are errors as the others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` names all flags.")


def main(argv: Sequence[str]) -> int:
    """Run a command; its exit code."""
    try:
        with _ended_as_by_ctrl_c():
            return _run(argv)
    except (UserError, CloudError, StateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, UserError) else FAULT
    except KeyboardInterrupt:
        print("interrupted; a machine that was asked for is there till `down`, and costs", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except OSError as error:  # a file of the user's that can't be read or written, a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return FAULT


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """A signal that ends this process, or its terminal, ends the commands that it runs, too."""

    def leave(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    listened = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in listened:  # `nohup` has SIGHUP ignored, which stays so
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in listened:
            signal.signal(number, signal.SIG_DFL)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_ABOUT.format(verbs="\n".join(f"  {name:<8}{verb.said}" for name, verb in VERBS.items())))
        return 0
    name = argv[0]
    if name not in VERBS:
        raise UserError(f"{name!r} is not a verb. {keys.suggest(name, VERBS)}")
    verb = VERBS[name]
    place, _, function = verb.place.partition(":")
    module = importlib.import_module(place)
    parser = _parser(name, verb)
    if hasattr(module, "add_flags"):
        module.add_flags(parser)
    words, command = list(argv[1:]), list[str]()
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        known = [f"--{name}" for name in vars(flags)]
        raise UserError(f"unknown flag {unknown[0]!r}. {keys.suggest(unknown[0].partition('=')[0], known)}")
    if name != "ssh" and command:  # a single word is a line for a shell, as in the file
        flags.command = command[0] if len(command) == 1 else command
    flags.words = command
    s = settings.load(flags.file, vars(flags), verb.needs)
    good = GoodCase(s, there="machine" in verb.there, trains="training" in verb.there)
    return int(getattr(module, function)(s, Cloud(flags.dry_run, good=good), flags))


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"tpu/launch.py {name}", description=verb.said, allow_abbrev=False)
    parser.add_argument("--file", type=Path, metavar="FILE", help="TOML file (default: tpu.toml, if there is one)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the good case, and run none")
    for key, one in keys.KEYS.items():
        said = one.said.replace("%", "%%")
        if one.switch:
            parser.add_argument(f"--{key}", action="store_true", default=None, help=said)
        else:
            parser.add_argument(f"--{key}", metavar="VALUE", help=said)
    return parser
