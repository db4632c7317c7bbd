"""The command line: `flaxmodels VERB --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flaxmodels import config, registry
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, place


def train(argv: Sequence[str]) -> int:
    """Train a config; the same command again resumes."""
    with exits.importing():
        from flaxmodels import loop
        from flaxmodels.runtime import distributed

    flags = config.parse(config.train_parser("flaxmodels train"), argv)
    allowed = {key: getattr(flags.arguments, key) for key in ("allow_config_change", "allow_data_change")}
    with distributed.joined(flags.arguments):
        return loop.fit(flags.config, flags.workdir, **allowed).exit_code


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint of a workdir on the whole evaluation split."""
    with exits.importing():
        from flaxmodels import job, loop
        from flaxmodels.runtime import distributed

    parser = config.parser("flaxmodels eval", "Evaluate a checkpoint on the whole evaluation split.")
    parser.add_argument("--step", default="best", help="best, latest, or a step on disk (default: best)")
    parser.add_argument("--allow_data_change", action="store_true", help="evaluate on other data")
    place.add_flags(parser)
    flags = config.parse(parser, argv)
    asked = flags.arguments
    with distributed.joined(asked) as first:
        assembled = job.assemble(flags.config)
        step, found, count = loop.evaluate_checkpoint(
            assembled, flags.workdir, asked.step, allow_data_change=asked.allow_data_change
        )
    if first:
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
    shown = [(key, registry.quote(value), origin) for key, value, origin in rows]
    width, middle = max(len(key) for key, _, _ in rows), min(max(len(value) for _, value, _ in shown), 48)
    for key, value, origin in shown:
        print(f"{key:<{width}}  {value:<{middle}}  {origin}")
    return exits.DONE


def batch(argv: Sequence[str]) -> int:
    """Show any past or future batch: images as a labelled grid, text with its boundaries and masks."""
    with exits.importing():
        from flaxmodels import job, looking

    parser = config.parser("flaxmodels batch", "Show any past or future batch as the step sees it.")
    parser.add_argument("--step", type=_number, default=0, help="train: steps made before it; test: its number (0)")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which split (default: train)")
    parser.add_argument("--examples", type=_count, help="how many to show (default: 64 images, 8 texts)")
    parser.add_argument("--to", type=Path, help="PNG for images (default: WORKDIR/batch_SPLIT_STEP.png)")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    to = asked.to or flags.workdir / f"batch_{asked.split}_{asked.step}.png"
    for line in looking.write_batch(job.assemble(flags.config), asked.step, asked.split, to, asked.examples):
        print(line)
    return exits.DONE


def show_data(argv: Sequence[str]) -> int:
    """Print what a data set is made of: splits, class balance, lengths, identity, speed."""
    with exits.importing():
        from flaxmodels import job, looking

    parser = config.parser("flaxmodels data", "Print splits, class balance, lengths, identity and speed.")
    parser.add_argument("--verify", action="store_true", help="read every example once, and name what is damaged")
    flags = config.parse(parser, argv)
    assembled = job.assemble(flags.config)
    for line in looking.verify(assembled) if flags.arguments.verify else looking.summary(assembled):
        print(line)
    return exits.DONE


def bench(argv: Sequence[str]) -> int:
    """Measure: `bench data` every way of loading the data, `bench step` every way of computing the update."""
    return _of("bench", "bench", BENCHES, argv)


def _bench_data(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels.perf import bench_data

    parser = config.parser("flaxmodels bench data", "Measure every way of loading the data of a config, in turns.")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way, all its turns together (3)")
    parser.add_argument("--against", choices=("grain",), help="measure Grain's own DataLoader besides, same work")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    bench_data.show(bench_data.bench(flags.config, asked.seconds, (asked.against,) if asked.against else ()))
    return exits.DONE


def _bench_step(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import meshes
        from flaxmodels.perf import bench_step

    parser = config.parser("flaxmodels bench step", "Compute the update of a config in several ways: equal? how fast?")
    parser.add_argument(
        "--compare", default="jit,shard_map,pmap", help="ways, the first is what others are held against"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way, all its turns together (5)")
    parser.add_argument("--devices", type=_count, help="so many simulated CPU devices (default: all there are)")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    devices = meshes.simulated(asked.devices) if asked.devices else None
    rows = bench_step.bench(flags.config, asked.compare.split(","), asked.seconds, devices)
    bench_step.show(rows)
    return exits.DONE if bench_step.agree(rows) else exits.FAULT


BENCHES: Mapping[str, Callable[[Sequence[str]], int]] = {"data": _bench_data, "step": _bench_step}


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
    try:
        preparing.prepare_source(name, options, flags.arguments.to, sys.stdout)
    except preparing.StoppedError as stopped:
        print(stopped)
        return exits.SIGNALLED + stopped.signal
    kept = {key: value for key, value in checked["data"].items() if key in ("length", "windows", "batch_size")}
    said = "".join(f", {key}={value!r}" for key, value in kept.items())
    print(f'to train on it: config.data = dict(name="tokens", path={str(flags.arguments.to)!r}{said})')
    return exits.DONE


def shardings(argv: Sequence[str]) -> int:
    """Print how parameters and optimizer state lie on the mesh, and what of it is wasted; nothing is allocated."""
    with exits.importing():
        from flaxmodels import job
        from flaxmodels.perf import shardings

    parser = config.parser("flaxmodels shardings", "Print how the train state lies on the mesh, and what is wasted.")
    parser.add_argument("--topology", help="a TPU slice that need not be there, such as v5e:4x4")
    parser.add_argument("--num_slices", type=_count, help="of that topology (default: 1)")
    parser.add_argument("--devices", type=_count, help="simulate so many devices on the CPU")
    parser.add_argument("--compile", action="store_true", help="show the compiled step's memory and collectives, too")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    devices = shardings.devices(asked.topology, asked.num_slices, asked.devices)
    found, lines = shardings.report(job.assemble(flags.config, devices), compile=asked.compile)
    (shardings.write_json if asked.json else shardings.show)(found, lines, sys.stdout)
    return exits.DONE


def verify(argv: Sequence[str]) -> int:
    """Prove: `verify mesh` that one device and many, split in any way, train a config alike."""
    return _of("verify", "proof", PROOFS, argv)


def _verify_mesh(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import meshes
        from flaxmodels.verify import mesh

    parser = config.parser(
        "flaxmodels verify mesh", "Train a config on simulated devices, split in every way; compare."
    )
    parser.add_argument("--steps", type=_number, default=20, help="to train each way (default: 20)")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="relative, of loss and gradient norm (2e-5)")
    parser.add_argument("--devices", type=_number, default=8, help="simulated, a power of two (default: 8)")
    parser.add_argument("--accumulation", type=_counts, default=(1, 4), metavar="N,N", help="microbatches (1,4)")
    meshes.simulated(parser.parse_known_args(argv)[0].devices)  # before a config file makes JAX start
    flags = config.parse(parser, argv)
    asked = flags.arguments
    rows = mesh.run(
        flags.config,
        steps=asked.steps,
        tolerance=asked.tolerance,
        devices=asked.devices,
        accumulation=asked.accumulation,
        show=_say,
    )
    passed, said = mesh.verdict(rows, asked.tolerance)
    print(said)
    return exits.DONE if passed else exits.FAULT


PROOFS: Mapping[str, Callable[[Sequence[str]], int]] = {"mesh": _verify_mesh}


def rehearse(argv: Sequence[str]) -> int:
    """Rehearse several hosts: real processes of this machine train, save and resume a config."""
    with exits.importing():
        from flaxmodels import sections
        from flaxmodels.verify import rehearse as rehearsal

    whole, own = config.parser("flaxmodels rehearse", rehearse.__doc__ or ""), argparse.ArgumentParser(add_help=False)
    for parser in (whole, own):
        parser.add_argument("--hosts", type=_number, default=4, help="processes (default: 4)")
        parser.add_argument("--devices_per_host", type=_number, default=2, help="simulated (default: 2)")
        parser.add_argument("--steps", type=_number, default=6, help="of the whole run, even (default: 6)")
        parser.add_argument("--limit", type=float, default=180.0, metavar="S", help="for each phase (180 seconds)")
        parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for all that is written")
    given = any(word.partition("=")[0] == "--config" for word in argv)
    words = [*argv] if given else ["--config=configs/digits_mlp.py", *argv]
    sections.resolved(config.parse(whole, words).config)  # what is wrong with it is said here, once
    asked, arguments = own.parse_known_args(words)
    lines = rehearsal.run(
        arguments,
        hosts=asked.hosts,
        devices_per_host=asked.devices_per_host,
        steps=asked.steps,
        limit=asked.limit,
        folder=asked.keep,
        show=_say,
    )
    bad = [line for line in lines if not line.passed]
    print(f"FAILED: {bad[0].scene}, {bad[0].phase}" if bad else f"passed: {len(lines)} checks")
    return exits.FAULT if bad else exits.DONE


def _of(verb: str, kind: str, there: Mapping[str, Callable[[Sequence[str]], int]], argv: Sequence[str]) -> int:
    what, *rest = argv or [""]
    if what in ("-h", "--help"):
        print(f"{VERBS[verb].__doc__}\n")
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


def _say(text: str) -> None:
    print(text, flush=True)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_number, text.split(",")))


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) > registry.LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected an integer from 0 to {registry.LONGEST}")
    return int(text)


def _count(text: str) -> int:
    if not _number(text):
        raise argparse.ArgumentTypeError("'0' shows nothing: expected 1 or more")
    return int(text)


VERBS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "config": show,
    "batch": batch,
    "data": show_data,
    "bench": bench,
    "prepare": prepare,
    "shardings": shardings,
    "verify": verify,
    "rehearse": rehearse,
}


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
            print(f"  {verb:<9} {(function.__doc__ or '').splitlines()[0]}")
        return exits.DONE if name else exits.BAD_INPUT
    if name not in VERBS:
        raise UserError(f"{name!r} is not a verb. {registry.suggest(name, VERBS)}")
    return VERBS[name](words[1:])
