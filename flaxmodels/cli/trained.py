"""The flags that name a trained model, and what they load."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flaxmodels.cli import words
from flaxmodels.registry import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flaxmodels.data.split import Tokenizer
    from flaxmodels.inference.loading import Loaded


def parser(verb: str, description: str | None, usage: str) -> argparse.ArgumentParser:
    """The flags of a verb that uses a trained model.

    Args:
      verb: such as "score".
      description: what it does.
      usage: its own flags, in one line.
    """
    flags = argparse.ArgumentParser(
        prog=f"flaxmodels {verb}",
        usage=f"%(prog)s (--workdir=DIR | --from=DIR) {usage} [FLAG ...]",
        description=description,
        allow_abbrev=False,
    )
    flags.add_argument("--workdir", metavar="DIR", help="of a run, or gs://BUCKET/NAME")
    flags.add_argument("--step", help="of that run: best, latest, or a number (default: best)")
    flags.add_argument("--from", dest="source", metavar="DIR", help="a folder with weights as Hugging Face has them")
    flags.add_argument("--tensor", type=words.count, default=1, help="devices that share one model (1)")
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return flags


def parse(flags: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse them.

    Raises:
      UserError: a flag is unknown, or not one model is named.
    """
    asked = words.parse(flags, argv)
    if (asked.workdir is None) == (asked.source is None):
        raise UserError("name one model: --workdir=DIR of a run, or --from=DIR with weights as Hugging Face has them.")
    if asked.source is not None and asked.step is not None:
        raise UserError(f"--step={asked.step}: --from={asked.source!r} has one state alone. Leave it out.")
    return asked


def load(asked: argparse.Namespace) -> tuple["Loaded", "Tokenizer", "Mesh"]:
    """The model that flags name, its tokenizer, and the mesh of all devices that it lies on.

    Raises:
      UserError: it is not there, or was not trained on text.
    """
    from flaxmodels import hub, sharding, shelf, storage
    from flaxmodels.inference import loading

    mesh = sharding.make_mesh(tensor=asked.tensor)
    if asked.source is not None and not (storage.place(asked.source).expanduser() / shelf.CHECKPOINTS).is_dir():
        hub.describe(asked.source)  # says what is wrong with the folder, where there is something
    loaded = loading.load(asked.workdir or asked.source, asked.step or "best", mesh=mesh)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.where} has no tokenizer.json: copy it there, if this is a model of text.")
    return loaded, loaded.tokenizer, mesh


def begin(loaded: "Loaded", tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The ids that stand before each text: those of the tokenizer, unless the model was trained here without them."""
    from flaxmodels.inference import scoring

    known = "data.name" in loaded.config
    return () if known and not loaded.config.get("data.begin") else scoring.beginning(tokenizer)
