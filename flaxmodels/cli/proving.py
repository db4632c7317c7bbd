"""The verbs that prove what is promised, on a config of the user's own."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels import config
from flaxmodels.cli import words
from flaxmodels.runtime import exits


def verify(argv: Sequence[str]) -> int:
    """Prove: `verify mesh` that all splits train alike, `verify resume` that a kill changes no bit."""
    return words.one_of("verify", verify, "proof", PROOFS, argv)


def _verify_mesh(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import meshes
        from flaxmodels.verify import mesh

    parser = config.parser(
        "flaxmodels verify mesh", "Train a config on simulated devices, split in every way; compare."
    )
    parser.add_argument("--steps", type=words.number, default=20, help="to train each way (default: 20)")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="relative, of loss and gradient norm (2e-5)")
    parser.add_argument("--devices", type=words.number, default=8, help="simulated, a power of two (default: 8)")
    parser.add_argument("--accumulation", type=words.counts, default=(1, 4), metavar="N,N", help="microbatches (1,4)")
    meshes.simulated(parser.parse_known_args(argv)[0].devices)  # before a config file makes JAX start
    flags = config.parse(parser, argv)
    asked = flags.arguments
    rows = mesh.run(
        flags.config,
        steps=asked.steps,
        tolerance=asked.tolerance,
        devices=asked.devices,
        accumulation=asked.accumulation,
        show=words.say,
    )
    passed, said = mesh.verdict(rows, asked.tolerance)
    print(said)
    return exits.DONE if passed else exits.FAULT


def _verify_resume(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import sections
        from flaxmodels.verify import resume

    said = "Kill a run of a config again and again, and compare it with one that is left alone."
    whole, own = config.parser("flaxmodels verify resume", said), argparse.ArgumentParser(add_help=False)
    for parser in (whole, own):
        parser.add_argument("--kills", type=words.number, default=20, help="at random moments (default: 20)")
        parser.add_argument("--steps", type=words.number, default=60, help="of the run (default: 60)")
        parser.add_argument(
            "--devices", type=words.number, help="simulated CPU devices in all (default: what is there)"
        )
        parser.add_argument("--hosts", type=words.number, default=1, help="processes that train together (default: 1)")
        parser.add_argument("--seed", type=words.number, help="of the moments (default: a new one, printed)")
        parser.add_argument("--tolerance", type=float, default=1e-3, help="where a GPU can't promise bits (1e-3)")
        parser.add_argument("--limit", type=float, default=3600.0, metavar="S", help="for a run without kills (3600)")
        parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for all that is written")
    given = {key: value for key, value, _ in sections.resolved(config.parse(whole, argv).config)}
    asked, arguments = own.parse_known_args(argv)
    verdict = resume.run(
        arguments,
        given,
        kills=asked.kills,
        steps=asked.steps,
        hosts=asked.hosts,
        devices=asked.devices,
        seed=asked.seed,
        tolerance=asked.tolerance,
        limit=asked.limit,
        folder=asked.keep,
        show=words.say,
    )
    print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.said}")
    return exits.DONE if verdict.passed else exits.FAULT


PROOFS: Mapping[str, words.Verb] = {"mesh": _verify_mesh, "resume": _verify_resume}


def rehearse(argv: Sequence[str]) -> int:
    """Rehearse several hosts: real processes of this machine train, save and resume a config."""
    with exits.importing():
        from flaxmodels import sections
        from flaxmodels.verify import rehearse as rehearsal

    whole, own = config.parser("flaxmodels rehearse", rehearse.__doc__ or ""), argparse.ArgumentParser(add_help=False)
    for parser in (whole, own):
        parser.add_argument("--hosts", type=words.number, default=4, help="processes (default: 4)")
        parser.add_argument("--devices_per_host", type=words.number, default=2, help="simulated (default: 2)")
        parser.add_argument("--steps", type=words.number, default=6, help="of the whole run, even (default: 6)")
        parser.add_argument("--limit", type=float, default=180.0, metavar="S", help="for each phase (180 seconds)")
        parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for all that is written")
    given = any(word.partition("=")[0] == "--config" for word in argv)
    argv = argv if given else ["--config=configs/digits_mlp.py", *argv]
    sections.resolved(config.parse(whole, argv).config)  # what is wrong with it is said here, once
    asked, arguments = own.parse_known_args(argv)
    lines = rehearsal.run(
        arguments,
        hosts=asked.hosts,
        devices_per_host=asked.devices_per_host,
        steps=asked.steps,
        limit=asked.limit,
        folder=asked.keep,
        show=words.say,
    )
    bad = [line for line in lines if not line.passed]
    print(f"FAILED: {bad[0].scene}, {bad[0].phase}" if bad else f"passed: {len(lines)} checks")
    return exits.FAULT if bad else exits.DONE
