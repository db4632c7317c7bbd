"""What verbs share: flags and numbers on the command line, and verbs that name one thing of several."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from flaxmodels import registry
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

Verb = Callable[[Sequence[str]], int]  # arguments -> exit code


def number(text: str) -> int:
    """An integer from 0, for argparse."""
    if not text.isdecimal() or int(text) > registry.LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected an integer from 0 to {registry.LONGEST}")
    return int(text)


def count(text: str) -> int:
    """An integer from 1, for argparse."""
    if not number(text):
        raise argparse.ArgumentTypeError("'0' shows nothing: expected 1 or more")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Integers, separated by commas, for argparse."""
    return tuple(map(number, text.split(",")))


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """What a command line says. UserError for a word that is no flag; it names the nearest."""
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"{unknown[0]!r} is not a flag. {registry.suggest(unknown[0].partition('=')[0], names)}")
    return flags


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def one_of(verb: str, function: Verb, kind: str, there: Mapping[str, Verb], argv: Sequence[str]) -> int:
    """Run what the first word names.

    Args:
      verb: the word before it.
      function: of that verb, which knows what it is for.
      kind: what the words name.
      there: name -> what it runs.
      argv: the words after the verb.

    Raises:
      UserError: there is no such thing, or none is named.
    """
    what, *rest = argv or [""]
    if what in ("-h", "--help"):
        print(f"{function.__doc__}\n")
        for name in there:
            print(f"  flaxmodels {verb} {name} --help")
        return exits.DONE
    if what in there:
        return there[what](rest)
    if not what or what.startswith("-"):
        first = next(iter(there))
        raise UserError(
            f"{verb}: say first which {kind}, as in `flaxmodels {verb} {first} --config=FILE`. "
            f"There are: {', '.join(there)}."
        )
    raise UserError(f"{verb} {what!r}: there is no such {kind}. {registry.suggest(what, there)}")
