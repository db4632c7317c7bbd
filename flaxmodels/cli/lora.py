"""`flaxmodels merge`: a run that trained factors, as one that has them in its matrices."""

import argparse
from collections.abc import Sequence

from flaxmodels import storage
from flaxmodels.cli import words
from flaxmodels.runtime import exits


def merge(argv: Sequence[str]) -> int:
    """Write a run that trained factors (lora) with these in its matrices: for export, generate and start.workdir."""
    parser = argparse.ArgumentParser(prog="flaxmodels merge", description=merge.__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a run with lora.rank, or gs://BUCKET/NAME")
    parser.add_argument("--step", default="best", help='a number, "best" or "latest" (best)')
    parser.add_argument("--to", required=True, metavar="DIR", help="new: the workdir to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters (default: of the base)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = words.parse(parser, argv)
    with exits.importing():
        import jax

        jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by a run
        from flaxmodels import sharding
        from flaxmodels.inference import merging

    mesh, folder = sharding.make_mesh(devices=jax.devices()[:1]), storage.place(flags.workdir).expanduser()
    words.say(f"{folder}: {merging.merge(folder, flags.step, storage.local(flags.to, '--to'), mesh, flags.dtype)}")
    return exits.DONE
