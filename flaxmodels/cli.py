"""The command line: `flaxmodels VERB --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flaxmodels import config, registry
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits


def train(argv: Sequence[str]) -> int:
    """Train a config; the same command again resumes."""
    with exits.importing():
        from flaxmodels import loop

    flags = config.parse(config.train_parser("flaxmodels train"), argv)
    allowed = flags.arguments.allow_config_change
    return loop.fit(flags.config, flags.workdir, allow_config_change=allowed).exit_code


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint of a workdir on the whole evaluation split."""
    with exits.importing():
        from flaxmodels import job, loop

    parser = config.parser("flaxmodels eval", "Evaluate a checkpoint on the whole evaluation split.")
    parser.add_argument("--step", default="best", help="best, latest, or a step on disk (default: best)")
    flags = config.parse(parser, argv)
    assembled = job.assemble(flags.config)
    step, found, count = loop.evaluate_checkpoint(assembled, flags.workdir, flags.arguments.step)
    print(f"{flags.workdir}, step {step}, {count:g} weighted {assembled.source.name!r} targets")
    for name, value in sorted(found.items()):
        print(f"  {name:<24} {value:.6g}")
    return exits.DONE


def show(argv: Sequence[str]) -> int:
    """Print the resolved config: every key, its value, and where that comes from."""
    with exits.importing():
        from flaxmodels import sections

    flags = config.parse(config.parser("flaxmodels config", "Print every key, its value and its origin."), argv)
    rows = sections.resolved(flags.config, flags.overridden)
    width, middle = max(len(key) for key, _, _ in rows), min(max(len(repr(value)) for _, value, _ in rows), 48)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {value!r:<{middle}}  {origin}")
    return exits.DONE


VERBS: Mapping[str, Callable[[Sequence[str]], int]] = {"train": train, "eval": evaluate, "config": show}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code (see `runtime.exits`)."""
    if argv is None:
        sys.path.insert(0, str(Path.cwd()))  # a module of the user's own, as `python -m` would find it
    words = list(sys.argv[1:] if argv is None else argv)
    return exits.reported(lambda: _verb(words), debug="--debug" in words)


def _verb(words: list[str]) -> int:
    name = words[0] if words else ""
    if name in ("", "-h", "--help"):
        print(__doc__)
        for verb, function in VERBS.items():
            print(f"  {verb:<8} {(function.__doc__ or '').splitlines()[0]}")
        return exits.DONE if name else exits.BAD_INPUT
    if name not in VERBS:
        raise UserError(f"{name!r} is not a verb. {registry.suggest(name, VERBS)}")
    return VERBS[name](words[1:])
