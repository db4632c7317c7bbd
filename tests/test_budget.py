"""Budgets: what grows is named, what stays is not compiled again, and this project keeps to its own."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from small import config

from flaxmodels.cli import budget as cli
from flaxmodels.perf import budget, cells, over_budget
from flaxmodels.perf.budget import Budget, Sent
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

ROOT = Path(__file__).parent.parent
MIB = 2**20
GATHER = Sent("all-gather", ("fsdp",), "forward", 4 * MIB, 2, "blocks/mlp/up")
REDUCE = Sent("all-reduce", ("data",), "backward", 8 * MIB, 1)
BUDGET = Budget(
    devices="8 x cpu: data=2, fsdp=4",
    compiler={"jax": "1.0"},
    flops={"float32": 1e9},
    bytes=1e8,
    memory=dict(
        parameters=8 * MIB, optimizer=16 * MIB, other=8, batch=MIB, data=0, temporaries=100 * MIB, outputs=0,
        donated=24 * MIB + 8, peak=125 * MIB,
    ),
    collectives=(GATHER, REDUCE),
    splits={"blocks/up/kernel": "-, fsdp"},
    compiles=7,
)  # fmt: skip


def changed(**fields):
    return dataclasses.replace(BUDGET, **fields)


def memory(**fields):
    return changed(memory={**BUDGET.memory, **fields})


def other(found):
    return dataclasses.replace(found, compiler={"jax": "1.1"})


def test_what_stays_is_no_difference():
    assert over_budget.compare(BUDGET, BUDGET) == over_budget.Verdict((), (), ())


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            changed(collectives=(GATHER, REDUCE, Sent("all-gather", ("fsdp",), "backward", 96 * MIB, 1, "head"))),
            "+1 all-gather of 96.0 MiB along fsdp in the backward pass (head)",
        ),
        (
            changed(collectives=(dataclasses.replace(GATHER, count=5), REDUCE)),
            "+3 all-gathers of 4.0 MiB along fsdp in the forward pass (blocks/mlp/up)",
        ),
        (memory(peak=138 * MIB), "peak memory +10.4 %: 138.0 MiB of each device, was 125.0 MiB"),
        (memory(parameters=8 * MIB + 4), "parameters +0.0 %: 8.0 MiB of each device, was 8.0 MiB"),
        (memory(data=5000), "the data set new: 4.9 KiB of each device, was 0 B"),
        (memory(donated=8 * MIB), "the state is no longer donated: 8.0 MiB of 24.0 MiB is"),
        (changed(flops={"float32": 1.01e9}), "float32 FLOPs +1.0 %: 1.01e+09, were 1e+09"),
        (changed(flops={"float32": 1e9, "int8": 5.0}), "int8 FLOPs new: 5, were 0"),
        (changed(bytes=2e8), "memory traffic +100.0 %: 190.7 MiB a step, was 95.4 MiB"),
        (changed(compiles=9), "+2 programs compiled in a run: 9, were 7"),
        (changed(devices="8 x cpu: data=8"), "the mesh is 8 x cpu: data=8; it was 8 x cpu: data=2, fsdp=4"),
        (changed(splits={}), "blocks/up/kernel was split (-, fsdp), is whole on each device"),
        (changed(splits={"blocks/up/kernel": "fsdp"}), "blocks/up/kernel was split (-, fsdp), is split (fsdp)"),
        (changed(collectives=None), "the collectives can't be compared: one of the two programs can't be read"),
    ],
)
def test_what_grows_is_a_sentence(found, sentence):
    verdict = over_budget.compare(BUDGET, found)
    assert verdict.worse == (sentence.replace(" %", "%"),) and not verdict.better


@pytest.mark.parametrize(
    "found",
    [
        memory(temporaries=90 * MIB), changed(flops={"float32": 5e8}), changed(collectives=(REDUCE,)),
        changed(collectives=()), changed(compiles=6), changed(bytes=1.0), memory(optimizer=0, donated=8 * MIB + 8),
    ],
)  # fmt: skip
def test_what_shrinks_is_said_and_allowed(found):
    verdict = over_budget.compare(BUDGET, found)
    assert not verdict.worse and verdict.better


def test_a_collective_in_place_of_another_is_both():
    verdict = over_budget.compare(BUDGET, changed(collectives=(GATHER, dataclasses.replace(REDUCE, axes=("fsdp",)))))
    assert verdict.worse == ("+1 all-reduce of 8.0 MiB along fsdp in the backward pass",)
    assert verdict.better == ("-1 all-reduce of 8.0 MiB along data in the backward pass",)


def test_what_another_compiler_decides_may_differ_and_what_it_does_not_may_not():
    little = [
        changed(compiles=9),
        memory(temporaries=109 * MIB), memory(peak=137 * MIB), changed(flops={"float32": 1.01e9}),
        changed(collectives=(dataclasses.replace(GATHER, kind="all-to-all", count=1, bytes=8 * MIB), REDUCE)),
    ]  # fmt: skip
    for found in little:
        assert over_budget.compare(BUDGET, found).worse or over_budget.compare(BUDGET, found).better
        verdict = over_budget.compare(BUDGET, other(found))
        assert not verdict.worse and "jax 1.0 -> 1.1" in verdict.notes[0], verdict
    elsewhere = changed(compiler={"jax": "1.0", "instructions": "avx"})
    assert "a CPU of other instructions)" in over_budget.compare(BUDGET, elsewhere).notes[0]
    for found in (memory(temporaries=111 * MIB), memory(parameters=8 * MIB + 4), changed(splits={})):
        assert over_budget.compare(BUDGET, other(found)).worse
    more = changed(collectives=(dataclasses.replace(GATHER, count=3), REDUCE))
    assert over_budget.compare(BUDGET, other(more)).worse == (
        "collectives along fsdp +50.0%: 12.0 MiB a step, were 8.0 MiB",
    )


@pytest.mark.parametrize(
    ("op", "part", "place"),
    [
        ("jit(single)/jvp(Net)/while/body/closed_call/blocks/mlp/up/dot_general", "forward", "blocks/mlp/up"),
        (
            "jit(single)/transpose(jvp(Net))/while/body/closed_call/blocks/mlp/up/dot_general",
            "backward",
            "blocks/mlp/up",
        ),
        ("jit(single)/transpose(jvp(Net))/blocks/(attention/key/dot:mlp/up/dot)", "backward", "blocks"),
        ("jit(single)/jvp(Net)/add", "forward", ""),
        ("jit(single)/mul", "", ""),
        ("", "", ""),
    ],
)
def test_the_pass_and_the_place_of_a_collective(op, part, place):
    assert (budget.part_of(op), budget.place_of(op)) == (part, place)


def test_a_file_is_read_as_it_was_written(tmp_path):
    file = budget.File("configs/a.py", {"model.hidden": "(8, 8)"}, {"cpu:8": BUDGET, "v5e:2x2": changed(compiles=None)})
    budget.write(tmp_path / "new" / "a.json", file)
    assert budget.read(tmp_path / "new" / "a.json") == file
    text = (tmp_path / "new" / "a.json").read_text()
    assert len([line for line in text.splitlines() if '"kind"' in line and '"of"' in line]) == 4  # a row, a line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 1, "overrides": {}, "budgets": {"cpu": {"bytes": 3}}}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"no file of budgets.*version control"):
        budget.read(tmp_path / "a.json")
    with pytest.raises(UserError, match="budget write"):
        budget.read(tmp_path / "b.json")


def test_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no budget in budgets/"):
        cli.budget(["check"])
    with pytest.raises(UserError, match=r"budgets/a.json: No such file.*budget write"):
        cli.budget(["check", "--config=a.py"])
    with pytest.raises(UserError, match="no such action"):
        cli.budget(["chekc"])
    budget.write(Path("budgets/a.json"), budget.File("a.py", {}, {"cpu:8": BUDGET}))
    with pytest.raises(UserError, match=r"no budget for 'v5e:2x2'.*cpu:8"):
        cli.budget(["check", "--topologies=v5e:2x2"])


@pytest.mark.slow
def test_a_sharding_rule_broken_on_purpose_is_named(tmp_path, monkeypatch, capsys):
    """A kernel that a rule no longer splits: named, with the memory and the collectives that it costs."""
    monkeypatch.setattr(budget, "_run", lambda *_: 5)  # a run of `fit`: see the test below
    monkeypatch.setattr(cells.chips, "measured_cpu", lambda devices: None)
    monkeypatch.chdir(tmp_path)
    whole = {**config("mlp", mesh=dict(fsdp=8)), "model": dict(name="mlp", hidden=(256,))}
    Path("wide.py").write_text(f"def get_config():\n    return {whole!r}\n")
    asked = ["--config=wide.py", "--config.optim.learning_rate=3e-3"]
    assert cli.budget(["write", *asked, "--topologies=cpu:8"]) == exits.DONE
    held = budget.read(Path("budgets/wide.json"))
    assert held.overrides == {"optim.learning_rate": "0.003"}
    assert held.budgets["cpu:8"].splits["hidden_0/kernel"] == "-, fsdp" and held.budgets["cpu:8"].compiles == 5
    text = Path("budgets/wide.json").read_text()
    capsys.readouterr()

    assert cli.budget(["check"]) == exits.DONE
    assert capsys.readouterr().out == (
        "budgets/wide.json, cpu:8: keeps to its budget; the program is that of the budget, and was not compiled\n"
    )
    broken = "--config.sharding.rules=((r'.*hidden_0/kernel', (None, None)),)"
    assert cli.budget(["check", "--config=wide.py", broken]) == exits.FAULT
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "budgets/wide.json, cpu:8: over budget", "  hidden_0/kernel was split (-, fsdp), is whole on each device",
    ]  # fmt: skip
    assert any(line.startswith("  parameters +") for line in said), said
    assert any(line.startswith("  optimizer state +") for line in said), said
    assert any(line.startswith("  +1 all-") and "fsdp" in line for line in said), said

    with pytest.raises(UserError, match=r"write all of them again"):
        cli.budget(["write", "--config=wide.py", "--topologies=cpu:8"])
    assert Path("budgets/wide.json").read_text() == text
    by_hand = held.budgets["cpu:8"]
    by_hand = dataclasses.replace(by_hand, memory={**by_hand.memory, "peak": 1})
    budget.write(Path("budgets/wide.json"), dataclasses.replace(held, budgets={"cpu:8": by_hand}))
    assert cli.budget(["check"]) == exits.FAULT  # figures that were changed by hand are not believed
    assert "peak memory +" in capsys.readouterr().out


@pytest.mark.nightly
def test_this_project_keeps_to_a_budget(run):
    """In a process with XLA's defaults, as they were measured with; a run of `fit` included."""
    done = run("-m", "flaxmodels", "budget", "check", "--config=configs/digits_mlp.py", "--topologies=cpu:8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu")
def test_this_project_keeps_to_its_budgets(run):
    done = run("-m", "flaxmodels", "budget", "check", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_budgets_of_this_project_are_of_configs_that_are_there():
    files = sorted((ROOT / "budgets").glob("*.json"))
    assert files
    for file in files:
        held = budget.read(file)
        assert (ROOT / held.config).exists() and held.budgets, file
        assert json.loads(file.read_text())["config"] == held.config
