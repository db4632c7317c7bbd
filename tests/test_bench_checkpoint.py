"""`bench checkpoint` measures what a run does, and leaves nothing; `bench startup` a start as anyone makes it."""

import json
import math
import os
import stat
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import small

from flaxmodels import cli
from flaxmodels.job import assemble
from flaxmodels.perf import bench_checkpoint, bench_show, bench_startup, first_step
from flaxmodels.registry import UserError
from flaxmodels.runtime import progress
from flaxmodels.runtime.exits import FaultError

CONFIG = {**small.config("mlp"), "model": dict(name="mlp", hidden=(256,))}


@pytest.mark.slow
def test_a_checkpoint_is_measured_and_nothing_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_checkpoint, "SMALLEST", 2**16)
    file = tmp_path / "config.py"
    file.write_text(f"def get_config():\n    return {CONFIG!r}\n")
    command = ["bench", "checkpoint", f"--config={file}", f"--workdir={tmp_path}/runs/a", "--rounds=2"]
    assert cli.main([*command, f"--to={tmp_path}/a.png", f"--to={tmp_path}/a.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {path.name for path in tmp_path.iterdir()} == {"config.py", "a.png", "a.jsonl"}
    found = {row["name"]: row for row in rows}
    assert list(found) == [
        "plain file, written", "plain file, read", "save, run held up", "save, until committed", "verify", "restore",
    ]  # fmt: skip
    state = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(assemble(CONFIG).abstract))
    assert found["plain file, read"]["bytes"] == state
    # Adam's moments are stored as they are, not as the zeros that they begin with.
    assert found["restore"]["bytes"] == found["verify"]["bytes"] > 0.8 * state
    assert found["save, run held up"]["seconds"] <= found["save, until committed"]["seconds"]
    for row in rows:
        assert row["rounds"] == 2 and row["slowest"] >= row["seconds"] > 0
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9, rel=0.05)
        assert (row["ratio"] is None) == (row["name"] not in bench_checkpoint.AGAINST)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "medians of 2 rounds" and printed[2].split()[:4] == ["seconds", "slowest", "spread", "CPU"]
    assert [line.split("  ")[0] for line in printed[3:]] == list(found)


def test_a_ratio_is_of_seconds_a_byte():
    found = {"plain file, read": [(1.0, 0.0), (2.0, 0.0)], "verify": [(4.0, 1.0), (4.0, 2.0)]}
    row = bench_checkpoint._row("verify", found, {"plain file, read": 2**27, "verify": 2**28})
    assert row["ratio"] == 1.5 and row["seconds"] == 4 and row["cpu_seconds"] == 1.5  # of 2 and of 1
    row = bench_checkpoint._row("verify", found, {"plain file, read": 2**26, "verify": 2**20})
    assert row["ratio"] is None  # so small that opening files is what takes time


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a can't be written: Not a directory\. Choose another --workdir\."):
        bench_checkpoint.bench(CONFIG, tmp_path / "file" / "a", 1, jax.devices()[:1])


@pytest.mark.slow
def test_noise_keeps_what_is_no_float():
    job = assemble({**CONFIG, "model": dict(name="mlp", hidden=(4,))}, jax.devices()[:1])
    fresh, state = job.fresh(), bench_checkpoint._noise(job)
    for before, after in zip(jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True):
        assert (before.dtype, before.shape, before.sharding) == (after.dtype, after.shape, after.sharding)
        if np.issubdtype(before.dtype, np.floating):
            assert np.count_nonzero(np.asarray(after)) == after.size
        else:
            np.testing.assert_array_equal(before, after)


# Starts


@pytest.mark.nightly
def test_starts_are_measured(run, tmp_path):
    """With the cache full, programs come from it; all phases add up."""
    done = run(
        "-m", "flaxmodels", "bench", "startup", "--config=configs/digits_mlp.py", "--rounds=1", "--json",
        "--config.model.hidden=(8,)", "--config.train.steps_per_dispatch=1", "--config.optim.schedule=constant",
        TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["python", "import flaxmodels", "import jax", bench_startup.COLD, bench_startup.WARM]
    assert [row["name"] for row in rows] == names
    assert not list(tmp_path.glob("flaxmodels_*"))
    python, _, bare, cold, warm = rows
    assert python["seconds"] < bare["seconds"] < cold["seconds"] and python["phases"] == {}
    for row in (cold, warm):
        assert {"python", "import", "start", "data", "compile", "training"} <= row["phases"].keys()
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], abs=0.02)
        assert min(row["phases"].values()) >= 0 and row["cpu_seconds"] > 0


def test_a_run_that_ends_before_its_first_step(tmp_path, monkeypatch):
    command = tmp_path / "python"
    command.write_text('#!/bin/sh\necho "error: there is no such data"\nexit 2\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(bench_startup.sys, "executable", str(command))
    with pytest.raises(FaultError, match=r"train --config=a\.py .*ended with code 2 .*\n.*there is no such data"):
        bench_startup._started(["--config=a.py"], tmp_path, bench_startup.COLD)
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(bench_startup, "LIMIT", 0.2)
    with pytest.raises(FaultError, match=r"no first step after 0\.2 s"):
        bench_startup._started(["--config=a.py"], tmp_path, bench_startup.COLD)


def test_the_first_step_is_seen(tmp_path, monkeypatch):
    told, step = [], [None]
    monkeypatch.setitem(sys.modules, "flaxmodels.loop", types.SimpleNamespace(fit=None))  # as if it were imported
    monkeypatch.setattr(first_step.os, "kill", lambda *arguments: told.append(arguments))
    monkeypatch.setattr(progress, "now", lambda: progress.Now("training", step[0], 0, 0.0))
    monkeypatch.setattr(progress, "totals", lambda: {"start": 0.5, "training": 0.25})
    begun = time.monotonic()
    times = (begun - 2.0, begun - 1.5, tmp_path / "found.json")
    watcher = threading.Thread(target=first_step.watch, args=times, daemon=True)
    watcher.start()
    for step[0] in (None, 0):  # where a run begins is not yet a step
        time.sleep(4 * first_step.LOOK)
        assert not told
    step[0] = 1
    watcher.join(10)
    assert told == [(os.getpid(), first_step.signal.SIGTERM)]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["phases"]["python"] == pytest.approx(0.5) and found["phases"]["training"] == 0.25
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"]) and found["seconds"] >= 2


def test_what_is_printed_of_starts():
    def row(name, **phases):
        seconds = sum(phases.values()) or 1.0
        return {
            "name": name, "seconds": seconds, "slowest": 2 * seconds, "spread": 0.1, "cpu_seconds": 0.5, "rounds": 3,
            "phases": phases,
        }  # fmt: skip

    rows = [row("python"), row("cold", data=0.5, compile=2.0, save=0.0), row("warm", data=0.5, compile=0.25, save=0.0)]
    lines = [line.split() for line in bench_show.STARTUP.table(rows)]
    assert ["compile", "2.000", "s", "0.250", "s"] in lines and ["cold", "2.500", "5.000", "10%", "0.500"] in lines
    assert not any(line[:1] == ["save"] for line in lines)
    assert bench_show.STARTUP.bar(rows[1]).parts == {"data": 0.5, "compile": 2.0}
    assert bench_show.STARTUP.bar(rows[0]).parts == {"": 1.0}
