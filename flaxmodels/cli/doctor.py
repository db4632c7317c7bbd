"""The verb that looks for what is wrong before, or after, a run goes wrong."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxmodels import config, registry
from flaxmodels.cli import words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, place


def doctor(argv: Sequence[str]) -> int:
    """Look for what is wrong with software, machine, storage, hosts and workdir, and say how to mend it."""
    given = any(word.partition("=")[0] == "--config" for word in argv)
    parser = config.parser("flaxmodels doctor", doctor.__doc__ or "") if given else _parser()
    parser.add_argument("--json", action="store_true", help="a line of JSON for each finding")
    place.add_flags(parser)
    flags, workdir, written = _parsed(parser, argv, given)
    with exits.importing():
        from flaxmodels.verify import doctor as examination
        from flaxmodels.verify import finding
    alone = place.place_of(flags, os.environ) is None
    with _joined(flags, alone) as first:
        found = examination.examine(workdir, written, alone=alone)
        found = found if alone else examination.together(found)
        if first:
            (finding.write_json if flags.json else finding.show)(found, sys.stdout)
    return exits.FAULT if any(one.level == "problem" for one in found) else exits.DONE


def _parser() -> argparse.ArgumentParser:
    """Flags where no config is named."""
    parser = argparse.ArgumentParser(
        prog="flaxmodels doctor",
        usage="%(prog)s [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...] [FLAG ...]",
        description=doctor.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="of the run: to judge room for its checkpoints")
    parser.add_argument("--workdir", type=Path, default=Path(), metavar="DIR", help="of the run (default: this folder)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str], given: bool
) -> tuple[argparse.Namespace, Path, dict[str, Any] | None]:
    if given:
        flags = config.parse(parser, argv)
        return flags.arguments, flags.workdir, registry.plain(flags.config)
    unknown = parser.parse_known_args(argv)[1]
    if unknown and unknown[0].startswith("--config."):
        raise UserError(f"{unknown[0]!r} changes a config, and none is named: add --config=FILE.")
    known = words.parse(parser, argv)
    return known, known.workdir, None


@contextlib.contextmanager
def _joined(flags: argparse.Namespace, alone: bool) -> Iterator[bool]:
    """`distributed.joined` where there is something to join: it imports JAX, which may be what is broken."""
    if alone:
        yield True
        return
    from flaxmodels.runtime import distributed

    with distributed.joined(flags) as first:
        yield first
