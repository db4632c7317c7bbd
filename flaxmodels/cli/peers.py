"""The verb that holds our speed against that of other libraries."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flaxmodels.cli import words
from flaxmodels.runtime import exits


def bench_peers(argv: Sequence[str]) -> int:
    """The same work in PyTorch, Keras, plain JAX and ours, in turns on the same cores of the CPU: how fast is each?"""
    with exits.importing():
        from flaxmodels.perf import bench_show
        from flaxmodels.perf.peers import bench, judging, table
        from flaxmodels.perf.peers.works import PEERS, WORKS

    parser = argparse.ArgumentParser(prog="flaxmodels bench peers", description=bench_peers.__doc__, allow_abbrev=False)
    parser.add_argument("--work", type=_names, default=tuple(WORKS), metavar="A,B", help=f"of {', '.join(WORKS)} (all)")
    parser.add_argument(
        "--peers", type=_names, default=tuple(PEERS), metavar="A,B", help=f"of {', '.join(PEERS)} (all)"
    )
    parser.add_argument("--cores", type=words.count, default=1, help="that each is pinned to (1)")
    parser.add_argument("--rounds", type=words.count, default=9, help="in which each has a turn (9)")
    parser.add_argument("--seed", type=words.number, default=0, help="of the order within rounds (0)")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument(
        "--to", type=Path, action="append", default=[], metavar="FILE", help="write a picture (.png), or JSON (.jsonl)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    asked = words.parse(parser, argv)
    to = bench_show.checked(asked.to)
    options = {
        "cores": asked.cores,
        "rounds": asked.rounds,
        "seed": asked.seed,
        "say": lambda text: print(text, file=sys.stderr, flush=True),
    }
    rows = bench.bench(asked.work, asked.peers, **options)
    bench_show.show(rows, table.VIEW, as_json=asked.json, to=to)
    return exits.DONE if judging.agree(rows) else exits.FAULT


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
