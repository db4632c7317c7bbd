"""The verb that looks for what is wrong before, or after, a run goes wrong."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flaxmodels import config, registry, storage
from flaxmodels.cli import words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, place
from flaxmodels.runtime.exits import FaultError

if TYPE_CHECKING:
    from flaxmodels.verify.expected import Expected
    from flaxmodels.verify.finding import Finding


def doctor(argv: Sequence[str]) -> int:
    """Look for what is wrong with software, machine, storage, hosts and workdir, and say how to mend it."""
    given = any(word.partition("=")[0] == "--config" for word in argv)
    parser = config.parser("flaxmodels doctor", doctor.__doc__ or "") if given else _parser()
    parser.add_argument("--json", action="store_true", help="a line of JSON for each finding")
    place.add_flags(parser)
    parser.add_argument("--hosts", type=_count, metavar="N", help="processes there must be: on TPUs one a host")
    parser.add_argument("--chips", type=_count, metavar="M", help="chips that these must have, all together")
    flags, written = _parsed(parser, argv, given)
    with exits.importing():
        from flaxmodels.verify import expected
    wanted = expected.Expected(flags.hosts, flags.chips)
    found = (_alone if _is_alone(flags) else _together)(flags, written, wanted)
    return exits.FAULT if any(one.level == "problem" for one in found) else exits.DONE


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of them: expected an integer, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    """Flags where no config is named."""
    parser = argparse.ArgumentParser(
        prog="flaxmodels doctor",
        usage="%(prog)s [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...] [FLAG ...]",
        description=doctor.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="of the run: to judge room for its checkpoints")
    parser.add_argument("--workdir", default=".", metavar="DIR", help="of the run (default: this folder)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str], given: bool
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    if given:
        said = config.parse(parser, argv)
        said.arguments.workdir = said.workdir
        return said.arguments, registry.plain(said.config)
    unknown = parser.parse_known_args(argv)[1]
    if unknown and unknown[0].startswith("--config."):
        raise UserError(f"{unknown[0]!r} changes a config, and none is named: add --config=FILE.")
    flags = words.parse(parser, argv)
    flags.workdir = storage.place(flags.workdir)
    return flags, None


def _is_alone(flags: argparse.Namespace) -> bool:
    with contextlib.suppress(Exception):  # it marks a TPU VM in the environment; what is broken in it is found later
        importlib.import_module("jax")
    return place.place_of(flags, os.environ) is None


def _alone(flags: argparse.Namespace, written: dict[str, Any] | None, wanted: "Expected") -> "list[Finding]":
    from flaxmodels.verify import devices, expected
    from flaxmodels.verify import doctor as examination

    started = devices.look()
    share = expected.here(expected.chips(started.devices), wanted)
    return _shown([*share, *examination.examine(flags.workdir, written, started)], flags)


def _together(flags: argparse.Namespace, written: dict[str, Any] | None, wanted: "Expected") -> "list[Finding]":
    """As `_alone`, of all processes of a run; process 0 shows it, or each, where they don't come together."""
    from flaxmodels.runtime import distributed, peers
    from flaxmodels.verify import devices, expected
    from flaxmodels.verify import doctor as examination
    from flaxmodels.verify.finding import problem

    met = False
    try:
        with distributed.joined(flags) as first:
            met = True
            started = examination.started()
            found = examination.examine(flags.workdir, written, started)
            if not started.backend:  # the others may wait for it in their own start of JAX
                _shown(found, flags)
                raise FaultError(f"JAX does not start in {peers.name()}: {started.said}")
            found = examination.together(found, started.devices, wanted)
            return _shown(found, flags) if first else found
    except FaultError as error:
        if met:
            raise
        absent = problem("hosts", str(error), "the output of those that are missing says why")
    chips = len(devices.present()["TPU"])  # JAX would wait for the hosts that did not come
    share = expected.here(chips, wanted, alone=False) if chips else []
    return _shown([absent, *share, *examination.examine(flags.workdir, written, None)], flags)


def _shown(found: "list[Finding]", flags: argparse.Namespace) -> "list[Finding]":
    from flaxmodels.verify import finding

    (finding.write_json if flags.json else finding.show)(found, sys.stdout)
    return found
