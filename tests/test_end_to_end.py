"""The main job, as a user runs it: a process of its own, XLA's defaults, the config as it is."""

import json

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits_mlp"
    command = ("train.py", "--config=configs/digits_mlp.py", f"--workdir={workdir}")
    return command, workdir, run(*command)


def test_main_job(trained):
    _, workdir, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/accuracy"] >= 0.97
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoints"} <= {p.name for p in workdir.iterdir()}
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["config"]["optim.b1"] == 0.9 and "jax" in stored["versions"]
    for expected in ("parameters", "compiled in", "eval/accuracy", "curves:"):
        assert expected in done.stdout
    assert "\x1b" not in done.stdout  # no escapes in a pipe


@pytest.mark.slow
def test_the_same_command_again_only_evaluates(trained, run):
    command, workdir, first = trained
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(*command)
    assert again.returncode == 0 and "finished at step" in again.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert first.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]


@pytest.mark.slow
def test_eval_and_train_verbs_do_the_same(trained, run):
    command, workdir, _ = trained
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max(row.get("eval/accuracy", 0) for row in rows)
    done = run("-m", "flaxmodels", "eval", *command[1:])
    assert done.returncode == 0, done.stderr
    assert f"{best:.6g}" in done.stdout and "364 weighted 'digits' targets" in done.stdout
    again = run("-m", "flaxmodels", "train", *command[1:])
    assert again.returncode == 0 and "finished at step" in again.stdout


def test_config_verb_prints_every_value_with_its_origin(run):
    done = run("-m", "flaxmodels", "config", "--config=configs/digits_mlp.py", "--config.optim.learning_rate=1e-3")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["optim.learning_rate"].split()[1:] == ["0.001", "command", "line"]
    assert lines["optim.b1"].split()[1:] == ["0.9", "default"]
    assert lines["model.classes"].endswith("from the data")
    assert lines["data.batch_size"].split()[1:] == ["64", "config"]


@pytest.mark.slow
def test_every_device_is_used(run, tmp_path):
    done = run("train.py", "--config=configs/digits_mlp.py", f"--workdir={tmp_path}", devices=8)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu: data=8" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/accuracy"] >= 0.97


def test_train_py_is_flags_config_fit():
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) <= 40
