"""The verbs that measure: how the state lies on a mesh; how fast data, steps, checkpoints and starts are."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels import config
from flaxmodels.cli import peers, words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits


def bench(argv: Sequence[str]) -> int:
    """Measure: `bench step` the update, `data` its loading, `checkpoint`, `startup`; `peers` what others take."""
    return words.one_of("bench", bench, "bench", BENCHES, argv)


def _bench_data(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels.perf import bench_data, bench_show

    parser = _parser("data", "Measure every way of loading the data of a config, in turns.")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way, all its turns together (3)")
    parser.add_argument("--against", choices=("grain",), help="measure Grain's own DataLoader besides, same work")
    flags = config.parse(parser, argv)
    asked, to = flags.arguments, bench_show.checked(flags.arguments.to)
    rows = bench_data.bench(flags.config, asked.seconds, (asked.against,) if asked.against else ())
    bench_show.show(rows, bench_show.DATA, as_json=asked.json, to=to)
    return exits.DONE


def _bench_step(argv: Sequence[str]) -> int:
    parser = _parser("step", "Measure the compiled update of a config; and others, in turns.")
    parser.add_argument(
        "--compare",
        type=_alternatives,
        default=(),
        metavar="A,B",
        help="what to measure, the first is what others are held against: ways (jit, shard_map, pmap), config files, "
        "or changes of this config (model.attention=xla; several are joined by +)",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each, all its turns together (5)")
    parser.add_argument("--devices", type=words.count, help="so many simulated CPU devices (default: all there are)")
    parser.add_argument("--cores", type=words.count, help="run on so many cores of this machine (default: all)")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    if asked.cores:
        _pin(asked.cores)
    with exits.importing():
        from flaxmodels import meshes
        from flaxmodels.perf import agreement, bench_show, bench_step

    to = bench_show.checked(asked.to)
    devices = meshes.simulated(asked.devices) if asked.devices else None
    rows = bench_step.bench(flags.config, asked.compare, asked.seconds, devices)
    bench_show.show(rows, bench_show.STEP, as_json=asked.json, to=to)
    return exits.DONE if agreement.agree(rows) else exits.FAULT


def _bench_checkpoint(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels.perf import bench_checkpoint, bench_show

    parser = _parser("checkpoint", "Save, verify and restore the state of a config, where a run of it would.")
    parser.add_argument("--rounds", type=words.count, default=5, help="of saving and reading (5)")
    flags = config.parse(parser, argv)
    asked, to = flags.arguments, bench_show.checked(flags.arguments.to)
    rows = bench_checkpoint.bench(flags.config, flags.workdir, asked.rounds)
    bench_show.show(rows, bench_show.CHECKPOINT, as_json=asked.json, to=to)
    return exits.DONE


def _bench_startup(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels.perf import bench_show, bench_startup

    parser = _parser("startup", "Start a run, up to its first step, with the cache of programs empty and full.")
    parser.add_argument("--rounds", type=words.count, default=3, help="of starts (3)")
    flags = config.parse(parser, argv)
    asked, to = flags.arguments, bench_show.checked(flags.arguments.to)
    rows = bench_startup.bench(asked.config, flags.config, flags.overridden, asked.rounds)
    bench_show.show(rows, bench_show.STARTUP, as_json=asked.json, to=to)
    return exits.DONE


BENCHES: Mapping[str, words.Verb] = {
    "data": _bench_data,
    "step": _bench_step,
    "checkpoint": _bench_checkpoint,
    "startup": _bench_startup,
    "peers": peers.bench_peers,
}


def _parser(bench: str, description: str) -> argparse.ArgumentParser:
    """The flags that every bench of a config has."""
    parser = config.parser(f"flaxmodels bench {bench}", description)
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument(
        "--to", type=Path, action="append", default=[], metavar="FILE", help="write a picture (.png), or JSON (.jsonl)"
    )
    return parser


def _alternatives(text: str) -> tuple[str, ...]:
    """Parts between commas that are in no bracket: "jit,model.hidden=(64,64)" has two."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected alternatives with a comma between them")
    return tuple(parts)


def _pin(cores: int) -> None:
    """Keep this process on the first of its cores; before JAX starts, which asks how many it has."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--cores: this system can't keep a process on some cores. Leave it out.")
    there = sorted(os.sched_getaffinity(0))
    if cores > len(there):
        raise UserError(f"--cores={cores}: this process has {len(there)}.")
    os.sched_setaffinity(0, there[:cores])


def shardings(argv: Sequence[str]) -> int:
    """Print how parameters and optimizer state lie on the mesh, and what of it is wasted; nothing is allocated."""
    with exits.importing():
        from flaxmodels import job
        from flaxmodels.perf import shardings

    parser = config.parser("flaxmodels shardings", "Print how the train state lies on the mesh, and what is wasted.")
    parser.add_argument("--topology", help="a TPU slice that need not be there, such as v5e:4x4")
    parser.add_argument("--num_slices", type=words.count, help="of that topology (default: 1)")
    parser.add_argument("--devices", type=words.count, help="simulate so many devices on the CPU")
    parser.add_argument("--compile", action="store_true", help="show the compiled step's memory and collectives, too")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    devices = shardings.devices(asked.topology, asked.num_slices, asked.devices)
    found, lines = shardings.report(job.assemble(flags.config, devices), compile=asked.compile)
    (shardings.write_json if asked.json else shardings.show)(found, lines, sys.stdout)
    return exits.DONE
