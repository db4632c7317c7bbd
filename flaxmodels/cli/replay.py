"""The verb that looks into a bad step."""

import argparse
from collections.abc import Sequence

from flaxmodels import config, storage
from flaxmodels.registry import UserError, plain
from flaxmodels.runtime import exits


def replay(argv: Sequence[str]) -> int:
    """Run the step of a capsule again, and name the module and the examples that went wrong."""
    with exits.importing():
        from flaxmodels import capsule, meshes
        from flaxmodels.verify import replay

    parser = argparse.ArgumentParser(
        prog="flaxmodels replay",
        usage="%(prog)s CAPSULE [--config=FILE] [--config.KEY=VALUE ...] [--debug]",
        description="Run a bad step again, and look inside. Exits with 0 if it says what went wrong, else with 1.",
        allow_abbrev=False,
        epilog="--config.KEY=VALUE replays it otherwise: --config.precision.compute=float32",
    )
    parser.add_argument("capsule", metavar="CAPSULE", help="a folder WORKDIR/capsules/STEP")
    parser.add_argument("--config", metavar="FILE", help="the config it was trained with, if that names code")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    words = [word for word in argv if word.startswith("--config.")]
    flags = parser.parse_args([word for word in argv if word not in words])
    folder = storage.place(flags.capsule)
    facts = capsule.read(folder)
    if facts["kind"] == "cpu" and facts["devices"] > 1:
        meshes.simulated(facts["devices"])  # before a config file makes JAX start
    overrides = {}
    for text in words:
        key, equals, value = text.removeprefix("--config.").partition("=")
        if not (equals and value and all(key.split("."))):
            raise UserError(f"{text!r}: expected --config.SECTION.KEY=VALUE.")
        overrides[key] = value
    given = plain(config.load_config(flags.config)) if flags.config else None
    found = replay.run(folder, given=given, overrides=overrides)
    return exits.DONE if found.module or found.examples else exits.FAULT
