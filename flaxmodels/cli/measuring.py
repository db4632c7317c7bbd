"""The verbs that measure: how the state lies on a mesh, and how fast data and steps are."""

import sys
from collections.abc import Mapping, Sequence

from flaxmodels import config
from flaxmodels.cli import words
from flaxmodels.runtime import exits


def bench(argv: Sequence[str]) -> int:
    """Measure: `bench data` every way of loading the data, `bench step` every way of computing the update."""
    return words.one_of("bench", bench, "bench", BENCHES, argv)


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
    parser.add_argument("--devices", type=words.count, help="so many simulated CPU devices (default: all there are)")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    devices = meshes.simulated(asked.devices) if asked.devices else None
    rows = bench_step.bench(flags.config, asked.compare.split(","), asked.seconds, devices)
    bench_step.show(rows)
    return exits.DONE if bench_step.agree(rows) else exits.FAULT


BENCHES: Mapping[str, words.Verb] = {"data": _bench_data, "step": _bench_step}


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
