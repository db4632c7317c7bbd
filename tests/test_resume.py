"""Killed at random moments, restarted with the same command: nothing is lost, and no bit differs."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
import small
from conftest import ROOT

from flaxmodels.checkpoint import Checkpoints
from flaxmodels.config import load_config, override
from flaxmodels.job import assemble

# Three epochs of 90 steps, with dropout; a save every 4 steps and an evaluation every 9 make the run slow enough to be
# hit anywhere, and most kills come near or inside a save.
KEYS = {
    "model.dropout": "0.2",
    "data.batch_size": "48",
    "optim.average": "0.9",
    "train.duration": "3 epochs",  # of 1,433 examples
    "train.eval_every": "9",
    "train.log_every": "1",
    "train.steps_per_dispatch": "3",
    "checkpoint.every": "4",
}
COMMAND = ["train.py", "--config=configs/digits_mlp.py", *(f"--config.{k}={v}" for k, v in KEYS.items())]


def start(workdir, devices, cache):
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    with (workdir.with_suffix(".out")).open("a") as out:
        return subprocess.Popen(
            [sys.executable, *COMMAND, f"--workdir={workdir}"], cwd=ROOT, env=env, stdout=out, stderr=out
        )


def lines(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def last_step(workdir):
    complete = [line for line in lines(workdir) if line.endswith("}")]
    return json.loads(complete[-1])["step"] if complete else 0


def logged(workdir):
    rows = map(json.loads, lines(workdir))
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def final_bits(workdir):
    """Of the whole last state; restored onto the mesh of this process, which is another one."""
    config = load_config(ROOT / "configs/digits_mlp.py")
    for key, text in KEYS.items():
        override(config, key, text)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    config.data.batch_size = 48
    state = checkpoints.restore(checkpoints.latest(), assemble(config, jax.devices()[:1]).abstract)
    return small.bits(state)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "kills"), [(1, 20), (8, 4)])
def test_killed_at_random_moments(tmp_path, devices, kills):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, whole, killed = random.Random(seed), tmp_path / "whole", tmp_path / "killed"
    process = start(whole, devices, tmp_path / "cache")
    assert process.wait(timeout=300) == 0, whole.with_suffix(".out").read_text()
    moments = sorted(rng.randrange(90) for _ in range(kills))
    for moment in moments:
        process = start(killed, devices, tmp_path / "cache")
        while process.poll() is None and last_step(killed) < moment:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0)
    process = start(killed, devices, tmp_path / "cache")
    assert process.wait(timeout=300) == 0, killed.with_suffix(".out").read_text()
    assert logged(killed) == logged(whole)
    assert [row["step"] for row in logged(whole) if "train/loss" in row] == list(range(1, 91))
    assert final_bits(killed) == final_bits(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(tmp_path, number, code):
    workdir = tmp_path / "run"
    process = start(workdir, 1, tmp_path / "cache")
    while process.poll() is None and last_step(workdir) < 5:
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    said = workdir.with_suffix(".out").read_text()
    assert f"{number.name}: saved step" in said and "Traceback" not in said
    saved = Checkpoints(workdir / "checkpoints", read_only=True).latest()
    assert f"saved step {saved} of 90;" in said and saved >= 5
