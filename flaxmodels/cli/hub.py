"""`flaxmodels import` and `flaxmodels export`: between directories of Hugging Face and workdirs of ours."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxmodels import registry, storage
from flaxmodels.cli import words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

if TYPE_CHECKING:
    from flaxmodels.shelf import Entry

DTYPES = ("float32", "bfloat16", "float16")


def import_(argv: Sequence[str]) -> int:
    """Make a workdir of a directory of Hugging Face: for generate, score, export, start.workdir. Nothing is fetched."""
    parser = _parser("import", "Make a workdir of a directory as Hugging Face has them, with safetensors.")
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="with a config.json")
    parser.add_argument("--to", required=True, metavar="WORKDIR", help="new")
    flags = _parse(parser, argv)
    with exits.importing():
        import jax

        from flaxmodels import hub, resume, sharding

    flags.to = storage.local(flags.to, "--to")
    described = hub.describe(flags.source)
    entry, config = hub.adopt(described, flags.to, sharding.make_mesh(devices=jax.devices()[:1]), flags.dtype)
    resume.write_config(flags.to, config)
    if flags.json:
        print(json.dumps({"workdir": str(flags.to), "architecture": described.architecture, "model": described.model}))
        return exits.DONE
    words.say(f"{described}: {', '.join(f'{key}={value!r}' for key, value in described.model.items())}")
    for name in described.unused:
        words.say(f"not used: {name}")
    words.say(f"{len(described.leaves)} arrays, {_size(described.leaves)}, are {entry}")
    return exits.DONE


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint as others read it: --format=hf for the transformers library, peft for factors of LoRA."""
    parser = _parser("export", "Write a checkpoint as others read it.")
    parser.add_argument("--format", default="hf", metavar="NAME", help=f"one of {', '.join(FORMATS)} (hf)")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a run, or gs://BUCKET/NAME")
    parser.add_argument("--step", default="best", help='a number, "best" or "latest" (best)')
    parser.add_argument("--to", required=True, metavar="DIR", help="new")
    parser.add_argument("--shard_bytes", type=_bytes, metavar="N", help="the most bytes of a file (5e9)")
    flags = _parse(parser, argv)
    if flags.format not in FORMATS:
        raise UserError(f"--format={flags.format!r} does not exist. {registry.suggest(flags.format, FORMATS)}")
    flags.workdir, flags.to = storage.place(flags.workdir).expanduser(), storage.local(flags.to, "--to")
    return FORMATS[flags.format](flags)


def _hf(flags: argparse.Namespace) -> int:
    with exits.importing():
        import jax

        from flaxmodels import hub, sharding, shelf

    entry = shelf.find(flags.workdir, flags.step)
    options: dict[str, Any] = {} if flags.shard_bytes is None else {"shard_bytes": flags.shard_bytes}
    if entry.meta.get("config", {}).get("lora.rank"):  # what trained is not all, and stands beside what did not
        from flaxmodels.inference import loading

        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        options["params"] = loading.load(flags.workdir, entry.step, mesh=mesh).params
    files, what = hub.release(entry, flags.to, dtype=flags.dtype, **options)
    return _written(flags, entry, files, what)


def _peft(flags: argparse.Namespace) -> int:
    with exits.importing():
        from flaxmodels import shelf
        from flaxmodels.hub import adapters

    if flags.dtype or flags.shard_bytes:
        raise UserError("--dtype and --shard_bytes are of --format=hf: factors are written as they are, in one file.")
    return _written(flags, entry := shelf.find(flags.workdir, flags.step), adapters.release(entry, flags.to), "factors")


def _written(flags: argparse.Namespace, entry: "Entry", files: Sequence[Path], what: str) -> int:
    if flags.json:
        print(json.dumps({"step": entry.step, "to": str(flags.to), "files": [file.name for file in files]}))
    else:
        words.say(f"{what} of {entry}, in {flags.to}: {', '.join(file.name for file in files)}")
        if any(file.name == "tokenizer.json" and '"flaxmodels"' in file.read_text()[:20] for file in files):
            words.say("tokenizer.json is one of ours (bytes, characters or words), which no other library reads")
    return exits.DONE


FORMATS: Mapping[str, Callable[[argparse.Namespace], int]] = {"hf": _hf, "peft": _peft}


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"flaxmodels {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    flags = words.parse(parser, argv)
    with exits.importing():
        import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: an accelerator may be in use by a run
    return flags


def _bytes(text: str) -> int:
    """A number of bytes, such as 5e9, for argparse: more than `words.number` knows."""
    try:
        found = int(float(text))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: expected 1 or more, such as 5e9")
    return found


def _size(leaves: Mapping[str, Any]) -> str:
    from flaxmodels import console

    return console.human_bytes(sum(leaf.nbytes for leaf in leaves.values()))
