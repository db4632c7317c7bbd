"""From flags to a config: a Python file with `get_config()`, and `--config.KEY=VALUE` on top.

A config holds only what differs from the defaults, which live in signatures; so a key given on the command line need
not stand in the file. Nothing here knows what a key means: `sections.check` does.
"""

import argparse
import ast
import dataclasses
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxmodels import storage
from flaxmodels.registry import UserError, suggest
from flaxmodels.runtime import place, supervisor


@dataclasses.dataclass(frozen=True)
class Flags:
    """What was asked for on the command line.

    Attributes:
      config: the config, overrides applied.
      overridden: keys that the command line set, such as "optim.learning_rate".
      workdir: everything a run writes goes here.
      arguments: the other flags.
    """

    config: ConfigDict
    overridden: tuple[str, ...]
    workdir: Path
    arguments: argparse.Namespace


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags that every command on a config has."""
    flags = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...] [FLAG ...]",
        description=description,
        allow_abbrev=False,
        epilog="Any key of the config: --config.optim.learning_rate=1e-3",
    )
    flags.add_argument("--config", required=True, metavar="FILE", help="config file, such as configs/digits_mlp.py")
    flags.add_argument(
        "--workdir",
        type=_folder,
        metavar="DIR",
        help="what a run writes; a folder or gs://BUCKET/NAME (default: runs/NAME_OF_CONFIG)",
    )
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return flags


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder: expected --workdir=DIR")
    try:
        return storage.place(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def train_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of training."""
    flags = parser(prog, "Train a config; the same command again resumes.")
    flags.add_argument("--allow_config_change", action="store_true", help="resume although the config differs")
    flags.add_argument("--allow_data_change", action="store_true", help="resume although the data differ")
    flags.add_argument(
        "--profile", metavar="START:STEPS", help="trace so many steps from START on, and print what took their time"
    )
    supervisor.add_flag(flags)
    place.add_flags(flags)
    return flags


def parse(flags: argparse.ArgumentParser, argv: Sequence[str]) -> Flags:
    """Parse flags and load the config.

    Raises:
      UserError: a flag, the config file or an override is wrong.
    """
    overrides, rest = _split(argv)
    known, unknown = flags.parse_known_args(rest)
    if unknown:
        names = [option for action in flags._actions for option in action.option_strings]
        raise UserError(f"{unknown[0]!r} is not a flag. {suggest(unknown[0].partition('=')[0], names)}")
    config = load_config(known.config)
    for key, text in overrides:
        override(config, key, text)
    workdir = known.workdir or supervisor.default_workdir(known.config)
    return Flags(config, tuple(key for key, _ in overrides), workdir, known)


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments."""
    overrides, rest, words = [], [], iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not all(key.split(".")):
            raise UserError(f"{word!r} names no key: expected --config.SECTION.KEY=VALUE.")
        if not equals:
            value = next(words, "")
        if not value:
            raise UserError(f"{word!r} has no value: expected --config.{key}=VALUE.")
        overrides.append((key, value))
    return overrides, rest


def load_config(path: str | Path) -> ConfigDict:
    """Run `get_config()` of a config file.

    Args:
      path: a Python file; "FILE:TEXT" calls `get_config("TEXT")`.

    Raises:
      UserError: the file is missing, fails, or has no `get_config` that returns a config.
    """
    name, _, argument = str(path).partition(":")
    file = Path(name)
    if not file.is_file():
        folders = (file, file.parent, Path("configs"))
        others = next(filter(None, ([str(p) for p in folder.glob("*.py")] for folder in folders)), [])
        what = "that is a folder" if file.is_dir() else "there is no such file"
        raise UserError(f"--config={name!r}: {what}. {suggest(name, others)}")
    spec = importlib.util.spec_from_file_location(f"flaxmodels_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name!r} is not a Python file: expected one with a function get_config().")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={name!r} has no function get_config(): expected one that returns a ConfigDict.")
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        within = (frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve())
        line = error.lineno if isinstance(error, SyntaxError) else next(within, "?")
        raise UserError(f"--config={name!r}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict | dict):
        raise UserError(f"--config={name!r}: get_config() returned {type(config).__name__}, expected a ConfigDict.")
    return ConfigDict(config)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set `config`'s dotted `key` to `text`, read as a Python literal where it is one, else as a string.

    Raises:
      UserError: the key goes through a value that is not a section.
    """
    *sections, last = key.split(".")
    node: Any = config
    for i, section in enumerate(sections):
        if section not in node or (section == "mesh" and node[section] == "auto"):  # "auto" is no word on the mesh
            with node.unlocked(), node.ignore_type():
                node[section] = ConfigDict()
        node = node[section]
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{key}={text}: {'.'.join(sections[: i + 1])} is a value, not a section.")
    with node.unlocked():
        if last in node:
            del node[last]  # else True would become 1.0 where 1e-3 stood
        node[last] = literal(text)


def literal(text: str) -> Any:
    """The Python literal that `text` spells ("1e-3", "True", "(64, 64)"), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"nan": float("nan"), "inf": float("inf"), "true": True, "false": False}.get(text.lower(), text)
