"""The command line: `flaxmodels VERB --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels import registry
from flaxmodels.cli import (
    budget,
    chat,
    checkpoint,
    doctor,
    generate,
    hub,
    looking,
    lora,
    measuring,
    planning,
    proving,
    replay,
    scoring,
    training,
    words,
)
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

VERBS: Mapping[str, words.Verb] = {
    "train": training.train,
    "eval": training.evaluate,
    "config": looking.show,
    "batch": looking.batch,
    "data": looking.show_data,
    "plan": planning.plan,
    "bench": measuring.bench,
    "budget": budget.budget,
    "prepare": training.prepare,
    "shardings": measuring.shardings,
    "verify": proving.verify,
    "rehearse": proving.rehearse,
    "checkpoint": checkpoint.checkpoint,
    "import": hub.import_,
    "export": hub.export,
    "merge": lora.merge,
    "generate": generate.generate,
    "chat": chat.chat,
    "score": scoring.score,
    "choose": scoring.choose,
    "replay": replay.replay,
    "doctor": doctor.doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code (see `runtime.exits`)."""
    if argv is None:
        sys.path.insert(0, str(Path.cwd()))  # a module of the user's own, as `python -m` would find it
    argv = list(sys.argv[1:] if argv is None else argv)
    return exits.reported(lambda: _verb(argv), debug="--debug" in argv)


def _verb(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("", "-h", "--help"):
        print(__doc__)
        for verb, function in VERBS.items():
            print(f"  {verb:<10} {(function.__doc__ or '').splitlines()[0]}")
        return exits.DONE if name else exits.BAD_INPUT
    if name not in VERBS:
        raise UserError(f"{name!r} is not a verb. {registry.suggest(name, VERBS)}")
    return VERBS[name](argv[1:])
