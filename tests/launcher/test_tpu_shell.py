"""Shell that is in the repository, and shell that is written or shown by it, passes shellcheck."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tpu import settings, slurm

ROOT = Path(__file__).parent.parent.parent
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{Path(sys.executable).parent}:{Path(sys.prefix, 'bin')}"
) or shutil.which("shellcheck")
SHELLS = ("#!/bin/sh", "#!/bin/bash", "#!/usr/bin/env bash", "#!/usr/bin/env sh")
FILES = sorted(
    path
    for folder in ("tpu", ".ci", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and "__pycache__" not in path.parts
    and path.read_bytes()[:40].split(b"\n")[0].decode("latin1") in SHELLS
)
pytestmark = pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install -e '.[test]' brings it")


def said(text, *flags):
    """What shellcheck says of a script, "" if nothing."""
    done = subprocess.run([SHELLCHECK, *flags, "-"], input=text, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_there_are_scripts():
    assert {ROOT / "tpu/worker.sh", ROOT / "tpu/slurm/job.sbatch", ROOT / ".ci/run"} <= set(FILES)
    assert "SC2086" in said("#!/bin/sh\nls $1\n")


def test_every_script_of_the_repository():
    done = subprocess.run([SHELLCHECK, *FILES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("words", [[], ["--hours=2"], ["--setup=module load cuda && . /opt/a/activate"]])
@pytest.mark.parametrize("given", [{}, {"max_hours": 3.5}, {"command": ("a b", "$c", "'d'", "`e`", "{f}")}])
def test_every_batch_script(given, words):
    parser = argparse.ArgumentParser()
    slurm.add_flags(parser)
    s = settings.Settings(name="a", bucket="/b", **given)
    assert said(slurm.script(s, parser.parse_args(words), Path("runs/tpu/a"))) == ""


def test_every_command_of_the_readme():
    text = (ROOT / "tpu/README.md").read_text()
    for block in text.split("```sh\n")[1:]:
        assert said(block.partition("```")[0], "--shell=sh") == ""
