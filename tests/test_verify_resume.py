"""`verify resume` finds what is not resumed exactly, and says where; kills are drawn over all of a run."""

import copy
import random

import pytest
import small

from flaxmodels import config, manifest, sections
from flaxmodels.cli import main
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.verify import accounts, kills, resume
from flaxmodels.verify.accounts import Account
from flaxmodels.verify.kills import KINDS

STEPS = 4


def account(processes=1):
    """Of a run of four steps, evaluated at its end."""
    lines = [{"step": step, "train/loss": 1 / step, "train/grad_norm": "NaN"} for step in range(1, STEPS + 1)]
    state = [{"params/a": (f"digest {number}", 2.0), "step": ("digest", 4.0)} for number in range(processes)]
    batches = [{step: {f"{number} {step}"} for step in range(1, STEPS + 1)} for number in range(processes)]
    return Account(batches, [*lines, {"step": STEPS, "eval/loss": 0.5}], state)


def test_the_same_is_the_same():
    one = account(2)
    assert accounts.difference(one, copy.deepcopy(one), STEPS) == ""
    assert accounts.difference(one, copy.deepcopy(one), STEPS, tolerance=1e-3) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run.batches[0][3].add("another"), "step 3: the batch is another one"),
        (lambda run: run.batches[0].pop(2), "step 2: the batch is another one"),
        (
            lambda run: run.lines[1].update({"train/loss": 0.5 + 2**-53}),
            "step 2: train/loss is 0.5 (0x1.0000000000001p",
        ),
        (lambda run: run.lines[1].update({"train/grad_norm": 1.0}), "step 2: train/grad_norm is 1 (0x1.0"),
        (lambda run: run.lines[4].update({"eval/loss": 0.6}), "step 4: eval/loss is 0.6 ("),
        (lambda run: run.lines.insert(1, run.lines[0]), "step 1: it stands in the log 2 times, where 1 were expected"),
        (lambda run: run.lines.pop(2), "step 3: the log does not have step, train/grad_norm, train/loss"),
        (lambda run: run.lines.pop(), "step 4: the log does not have eval/loss"),
        (lambda run: run.lines.append({"step": 5}), "step 5: the log has a line"),
        (lambda run: run.state[0].update({"params/a": ("other", 2.0)}), "the last state: params/a differs"),
        (lambda run: run.state[0].pop("step"), "the last state: step differs"),
    ],
)
def test_the_first_thing_that_differs_is_named(change, said):
    other = account()
    change(other)
    assert accounts.difference(account(), other, STEPS).startswith(said)


def test_the_earliest_step_and_its_cause_come_first():
    other = account(2)
    other.lines[3]["train/loss"], other.state[0]["step"] = 7.0, ("other", 4.0)
    assert accounts.difference(account(2), other, STEPS).startswith("step 4: train/loss is 7")
    other.lines[1]["train/loss"] = 7.0
    assert accounts.difference(account(2), other, STEPS).startswith("step 2: train/loss is 7")
    other.batches[1][2] = {"other"}
    assert accounts.difference(account(2), other, STEPS).startswith("step 2: the batch in process 1 is another one")


def test_a_tolerance_is_for_numbers_only():
    other = account()
    other.lines[1]["train/loss"], other.state[0]["params/a"] = 0.5001, ("other", 2.0001)
    assert accounts.difference(account(), other, STEPS, tolerance=1e-3) == ""
    assert accounts.difference(account(), other, STEPS, tolerance=1e-5).startswith("step 2: train/loss")
    other.batches[0][1] = {"other"}
    assert accounts.difference(account(), other, STEPS, tolerance=1e-3).startswith("step 1: the batch")
    nan = account()
    nan.lines[0]["train/loss"] = "NaN"
    assert accounts.difference(account(), nan, STEPS, tolerance=1e9).startswith("step 1: train/loss is nan")


def test_a_gpu_promises_bits_where_a_flag_asks_for_it():
    assert accounts.promises_bits("cpu", "") and accounts.promises_bits("tpu", "")
    assert not accounts.promises_bits("gpu", "--xla_dump_to=x --xla_gpu_deterministic_ops=false")
    for flag in (accounts.DETERMINISTIC, "--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops=1"):
        assert accounts.promises_bits("gpu", f"--xla_dump_to=x {flag}")
        assert accounts.promises_bits("gpu", f"{flag} --xla_dump_to=x")


def test_kills_are_of_all_kinds_and_all_over_the_run():
    seed = 7
    drawn = kills.draw(random.Random(seed), 64, steps=90, every=5, hosts=2)
    assert drawn == kills.draw(random.Random(seed), 64, steps=90, every=5, hosts=2)
    assert [kill.step for kill in drawn] == sorted(kill.step for kill in drawn)
    assert {kind: sum(kill.kind == kind for kill in drawn) for kind in KINDS} == {
        kind: 8 * share for kind, share in KINDS.items()
    }
    assert all(sum(kill.step in range(low, low + 30) for kill in drawn) > 4 for low in (1, 31, 61))
    assert {kill.processes for kill in drawn} == {(0,), (1,), (0, 1)}
    assert all(kill.step <= 80 for kill in drawn if kill.kind in ("in a save", "in a deletion"))
    assert len(kills.draw(random.Random(seed), 3, 12, 2, 1)) == 3


def test_what_is_on_disk_is_said(tmp_path):
    assert kills.on_disk(tmp_path / "absent") == "nothing"
    for name in ("12", "4", "14", "deleted", "16.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    for name in ("12", "4"):
        (tmp_path / name / "params").touch()
        manifest.write(tmp_path / name, {})
    assert kills.on_disk(tmp_path) == "4, 12, and half of 14, 16"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"kills": 0}, "--kills=0: expected at least 1"),
        ({"steps": 3}, "--steps=3: expected at least 12"),
        ({"hosts": 0}, "--hosts=0: expected at least 1"),
        ({"hosts": 2, "devices": 3}, "--devices=3: expected a multiple of --hosts=2"),
    ],
)
def test_numbers_that_can_not_be_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        resume.run(["--config=none"], {}, **flags)


def test_a_wrong_config_is_said_before_anything_starts(tmp_path, capsys):
    file = write(tmp_path, small.config("mlp"))
    assert main(["verify", "resume", f"--config={file}", "--config.optim.learning_rat=1"]) == 2
    assert "optim.learning_rat" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert main(["verify", "resume", f"--config={file}", f"--keep={tmp_path / 'full'}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_is_changed_for_it_is_what_makes_it_short():
    given = {"train.duration": "20 epochs", "optim.warmup": "1 epochs", "train.log_every": 1}
    changes = resume.shortened(given, 60)
    assert changes["train.duration"] == 60 and changes["optim.warmup"] == 0 and changes["checkpoint.every"] == 5
    assert "optim.warmup" not in resume.shortened({"optim.warmup": 0}, 60)


# What is trained here knows whether it was started again after a kill.
STARTS = """
import sys
from flaxmodels.data.synthetic import synthetic_images
from flaxmodels.models.mlp import MLP

again = any("killed_1_002" in word for word in sys.argv)

def source(examples: int = 256):
    found = synthetic_images(examples, 32)
    if again:  # other pixels, of which its fingerprint does not tell
        found.train.arrays["image"][:] = 255 - found.train.arrays["image"]
    return found

class Model(MLP):
    def __call__(self, x, train=False):
        return super().__call__(x, train) * (1.0 + again * 2**-12)
"""


def write(folder, written):
    file = folder / "config.py"
    file.write_text(f"def get_config():\n    return {written!r}\n")
    return file


def verdict(tmp_path, monkeypatch, **sections_of):
    """Of one kill, on a config of a module that knows that it was started again."""
    (tmp_path / "starts.py").write_text(STARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kills, "KINDS", {"in a step": 8})
    file = write(tmp_path, {**small.config("mlp"), **sections_of})
    given = {key: value for key, value, _ in sections.resolved(config.load_config(file))}
    lines = []
    found = resume.run(
        [f"--config={file}"], given, kills=1, steps=24, devices=1, seed=3, folder=tmp_path / "run", show=lines.append
    )
    print(*lines, found, sep="\n")
    return found


@pytest.mark.nightly
def test_a_model_that_changes_with_a_restart_is_found(tmp_path, monkeypatch):
    model = dict(name="starts:Model", hidden=(16,), classes=10)
    found = verdict(tmp_path, monkeypatch, model=model)
    assert not found.passed and "Two runs that are left alone are the same" in found.said
    step, said = found.said.split("; step ")[1].split(": ", 1)
    assert 0 < int(step) <= 24 and said.startswith("train/")


@pytest.mark.nightly
def test_data_that_change_with_a_restart_are_found(tmp_path, monkeypatch):
    found = verdict(tmp_path, monkeypatch, data=dict(name="starts:source", batch_size=16))
    assert not found.passed and "the batch is another one than in the run that was left alone" in found.said


@pytest.mark.nightly
def test_a_config_that_fails_by_itself_is_no_verdict(tmp_path, monkeypatch):
    data = dict(name="starts:source", batch_size=16, examples=8)  # fewer than a batch, which only the data tell
    with pytest.raises((UserError, FaultError), match="the run fails by itself, without a kill"):
        verdict(tmp_path, monkeypatch, data=data, model=dict(name="transformer"))
