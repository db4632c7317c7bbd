"""The verb that plans: a config on machines that need not be there."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flaxmodels import config
from flaxmodels.cli import words
from flaxmodels.runtime import exits


def plan(argv: Sequence[str]) -> int:
    """Say of machines that need not be there: does a config fit, how fast at best, for how much money?"""
    with exits.importing():
        from flaxmodels import sections
        from flaxmodels.perf import cells, plan_picture, plan_show
        from flaxmodels.perf import plan as planning

    parser = config.parser("flaxmodels plan", "Compile a config for machines that need not be there; nothing is run.")
    parser.add_argument(
        "--topologies",
        metavar="NAME,...",
        help="such as v5e:4x4, v5e:4x4*2 (two slices), h100:8, cpu:8 (simulated), cpu "
        f"(default: {','.join(planning.TOPOLOGIES)})",
    )
    parser.add_argument("--search", action="store_true", help="try other meshes, remat, microbatches and batches, too")
    parser.add_argument("--most", type=words.count, default=12, help="programs to compile for each in a search (12)")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="a TOML file with your own prices")
    parser.add_argument("--spot", action="store_true", help="count with spot prices")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write plan.json and plan.png there")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    sections.check(flags.config, lambda text, where: text)  # what is wrong for every machine is said once, at once
    names = [name.strip() for name in (asked.topologies or ",".join(planning.TOPOLOGIES)).split(",")]
    rows = planning.plan(
        flags.config,
        cells.targets(names),
        search=asked.search,
        most=asked.most,
        prices=asked.prices,
        spot=asked.spot,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    for line in map(json.dumps, map(plan_show.record, rows)) if asked.json else plan_show.lines(rows):
        words.say(line)
    if asked.to:
        asked.to.mkdir(parents=True, exist_ok=True)
        plan_show.save(rows, asked.to / "plan.json")
        plan_picture.draw(rows, asked.to / "plan.png")
    return exits.DONE
