"""The verb that keeps what a step takes from growing unseen."""

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels import config, registry
from flaxmodels.cli import words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

FOLDER = Path("budgets")
SIMULATED = "cpu:8"


def budget(argv: Sequence[str]) -> int:
    """Keep what a step takes in a file under version control, `budget write`; fail where it grew, `budget check`."""
    return words.one_of("budget", budget, "action", ACTIONS, argv)


def _parser(action: str, description: str) -> argparse.ArgumentParser:
    parser = config.parser(f"flaxmodels budget {action}", description)
    parser.add_argument("--topologies", help="such as v5e:2x2,cpu:8 (default: those of the file, or cpu:8)")
    parser.add_argument("--file", type=Path, help=f"of the budgets (default: {FOLDER}/NAME_OF_CONFIG.json)")
    return parser


def _file(name: str) -> Path:
    return FOLDER / f"{Path(name.partition(':')[0]).stem}.json"


def _write(argv: Sequence[str]) -> int:
    flags = config.parse(_parser("write", "Measure what the step of a config takes, and write it to a file."), argv)
    with exits.importing():
        from flaxmodels.perf import budget as budgets
        from flaxmodels.perf import cells, over_budget

    asked, overrides = flags.arguments, _overrides(flags)
    file = asked.file or _file(asked.config)
    held = budgets.read(file) if file.exists() else budgets.File(asked.config, overrides, {})
    kept = held.budgets if (held.config, held.overrides) == (asked.config, overrides) else {}
    if kept != held.budgets and asked.topologies:
        raise UserError(
            f"{file} has budgets of --config={held.config} {_spelled(held.overrides)}: write all of them again, "
            "without --topologies, or others to a --file of their own."
        )
    names = asked.topologies.split(",") if asked.topologies else list(held.budgets) or [SIMULATED]
    made = dict(kept)
    for target in cells.targets(names):
        words.say(f"{target.name}: compiling for it")
        made[target.name], _ = budgets.measure(flags.config, target.devices)
        words.say(f"  {over_budget.told(made[target.name])}")
        if target.name in kept:
            verdict = over_budget.compare(kept[target.name], made[target.name])
            for line in (*verdict.worse, *verdict.better):
                words.say(f"  {line}")
    budgets.write(file, budgets.File(asked.config, overrides, made))
    words.say(f"written: {file}")
    return exits.DONE


def _check(argv: Sequence[str]) -> int:
    parser = _parser("check", "Hold what steps take against their budgets; without --config, against all there are.")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return exits.DONE
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config")
    named.add_argument("--file", type=Path)
    named.add_argument("--topologies")
    asked, rest = named.parse_known_args(argv)
    one = asked.file or (asked.config and _file(asked.config))
    files = [one] if one else sorted(FOLDER.glob("*.json"))
    if not files:
        raise UserError(f"there is no budget in {FOLDER}/: `flaxmodels budget write --config=FILE` writes one.")
    with exits.importing():
        from flaxmodels.perf import budget as budgets
        from flaxmodels.perf import cells, over_budget

    held = {file: budgets.read(file) for file in files}
    names = {file: asked.topologies.split(",") if asked.topologies else list(held[file].budgets) for file in files}
    for file in files:
        for name in names[file]:
            if name not in held[file].budgets:
                raise UserError(f"{file} has no budget for {name!r}. {registry.suggest(name, held[file].budgets)}")
    targets = {target.name: target for target in cells.targets(sorted(set(itertools.chain(*names.values()))))}
    over = 0
    for file, of in held.items():
        set_there = [f"--config.{key}={text}" for key, text in of.overrides.items()]
        flags = config.parse(parser, [f"--config={asked.config or of.config}", *set_there, *rest])
        for name in names[file]:
            said, worse = over_budget.held(of.budgets[name], flags.config, targets[name].devices)
            over += worse
            words.say(f"{file}, {name}: {said}")
    return exits.FAULT if over else exits.DONE


def _overrides(flags: config.Flags) -> dict[str, str]:
    """What the command line set, as it would be written there again."""

    def value(key: str) -> Any:
        return functools.reduce(lambda node, name: node[name], key.split("."), flags.config)

    return {key: repr(registry.plain(value(key))) for key in flags.overridden}


def _spelled(overrides: Mapping[str, str]) -> str:
    return " ".join(f"--config.{key}={text}" for key, text in overrides.items())


ACTIONS: Mapping[str, words.Verb] = {"write": _write, "check": _check}
