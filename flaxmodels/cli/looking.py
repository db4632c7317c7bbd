"""The verbs that look: at a config, a batch, a data set."""

from collections.abc import Sequence
from pathlib import Path

from flaxmodels import config, registry, storage
from flaxmodels.cli import words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits


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
    parser.add_argument(
        "--step", type=words.number, default=0, help="train: steps made before it; test: its number (0)"
    )
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which split (default: train)")
    parser.add_argument("--examples", type=words.count, help="how many to show (default: 64 images, 8 texts)")
    parser.add_argument("--to", type=Path, help="PNG for images (default: WORKDIR/batch_SPLIT_STEP.png)")
    flags = config.parse(parser, argv)
    asked = flags.arguments
    to = asked.to or flags.workdir / f"batch_{asked.split}_{asked.step}.png"
    if storage.is_object(to):
        raise UserError(f"{str(to)!r}: a picture is written to this machine only. Name a file with --to=FILE.")
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
