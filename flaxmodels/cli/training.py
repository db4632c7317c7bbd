"""The verbs that train, evaluate, and prepare for it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flaxmodels import config
from flaxmodels.runtime import exits, place, supervisor


def train(argv: Sequence[str]) -> int:
    """Train a config; the same command again resumes."""
    return supervisor.run(_train, argv)


def _train(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import loop
        from flaxmodels.perf import profile, rescue
        from flaxmodels.runtime import distributed

    flags = config.parse(config.train_parser("flaxmodels train"), argv)
    allowed = {key: getattr(flags.arguments, key) for key in ("allow_config_change", "allow_data_change")}
    profiler = profile.asked(flags.arguments.profile, flags.workdir)
    with rescue.offered(flags.config), distributed.joined(flags.arguments, flags.workdir):
        return loop.fit(flags.config, flags.workdir, **allowed, profiler=profiler).exit_code


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint of a workdir on the whole evaluation split."""
    with exits.importing():
        from flaxmodels import evaluating, job
        from flaxmodels.runtime import compile_cache, distributed

    parser = config.parser("flaxmodels eval", "Evaluate a checkpoint on the whole evaluation split.")
    parser.add_argument("--step", default="best", help="best, latest, or a step on disk (default: best)")
    parser.add_argument("--allow_data_change", action="store_true", help="evaluate on other data")
    place.add_flags(parser)
    flags = config.parse(parser, argv)
    asked = flags.arguments
    with distributed.joined(asked) as first, compile_cache.verified():
        assembled = job.assemble(flags.config)
        step, found, count = evaluating.evaluate_checkpoint(
            assembled, flags.workdir, asked.step, allow_data_change=asked.allow_data_change
        )
    if first:
        print(f"{flags.workdir}, step {step}, {count:g} weighted {assembled.source.name!r} targets")
        for name, value in sorted(found.items()):
            print(f"  {name:<24} {value:.6g}")
    return exits.DONE


def prepare(argv: Sequence[str]) -> int:
    """Turn the text of a config into tokens on disk, once; the same command again goes on where it stopped."""
    with exits.importing():
        from flaxmodels import sections
        from flaxmodels.data import preparing

    parser = config.parser("flaxmodels prepare", "Turn the text of a config into tokens on disk, once.")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="the folder to write")
    flags = config.parse(parser, argv)
    checked = sections.check(flags.config, lambda text, where: text)
    _, options = sections.split_data(checked["data"])
    name = options.pop("name")
    options.pop("objective", None)  # of those who read the tokens
    try:
        preparing.prepare_source(name, options, flags.arguments.to, sys.stdout)
    except preparing.StoppedError as stopped:
        print(stopped)
        return exits.SIGNALLED + stopped.signal
    reading = ("length", "windows", "objective", "batch_size")
    kept = {key: value for key, value in checked["data"].items() if key in reading}
    said = "".join(f", {key}={value!r}" for key, value in kept.items())
    print(f'to train on it: config.data = dict(name="tokens", path={str(flags.arguments.to)!r}{said})')
    return exits.DONE
