"""`bench step`: what is compared is what was asked for; ways to compute an update agree, or differ as is said."""

import argparse
import contextlib
import dataclasses
import json
import math
import mmap

import jax
import matplotlib.image
import numpy as np
import pytest
import small

from flaxmodels import cli
from flaxmodels.cli import measuring
from flaxmodels.job import assemble
from flaxmodels.memory import OutOfMemoryError
from flaxmodels.perf import achieved, agreement, bench_show, bench_step, chips, compiling, count, running, timing, ways
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

WAYS = ("jit", "shard_map", "pmap")
PLAIN = dict(dropout=0.0)
SGD = dict(name="sgd", learning_rate=0.1)


@pytest.fixture
def quick(monkeypatch):
    """Next to no steps, and programs from the cache that all tests share: what is tested is not how fast it is."""
    monkeypatch.setattr(timing, "SHORTEST", 1)
    monkeypatch.setattr(running, "AHEAD", 8)
    monkeypatch.setattr(compiling, "fresh_cache", contextlib.nullcontext)


@pytest.fixture
def agreeing(quick, monkeypatch):
    """Neither compiled twice, nor held against the roofline: all that counts is whether results agree."""
    monkeypatch.setattr(bench_step, "_made", lambda entry: (entry.make(entry.job), 0.0))
    monkeypatch.setattr(achieved, "achieved", lambda job, program, seconds: {})


def config(family, fields=PLAIN, **sections):
    base = small.config(family, **sections)
    return {**base, "model": {**base["model"], **fields}}


def differences(rows):
    return {(row["name"], found["against"]): found for row in rows for found in row["agreement"]}


@pytest.mark.parametrize(
    "family", [pytest.param("mlp", marks=pytest.mark.slow), pytest.param("transformer", marks=pytest.mark.nightly)]
)
def test_explicit_collectives_agree_with_a_run(agreeing, family):
    """Weights of examples, microbatches and several steps a dispatch are all in it; the mesh of the config is not."""
    mlp = family == "mlp"
    sections = dict(train=dict(steps_per_dispatch=3, microbatches=2), mesh=dict(fsdp=2)) if mlp else dict(optim=SGD)
    fields, compared = (PLAIN, WAYS) if mlp else (dict(PLAIN, layers=1, width=16), WAYS[:2])
    rows = bench_step.bench(config(family, fields, **sections), compared, 0.0, turns=1)
    assert [row["name"] for row in rows] == list(compared) and {row["mesh"] for row in rows} == {"8 x cpu: data=8"}
    found = differences(rows)
    assert found.keys() == {(name, "jit") for name in compared[1:]}
    for one in found.values():
        assert one["equal"] and one["steps"] == 5
        assert max(one[name] for name in ("loss", "grad_norm", "params", "extra")) < 2e-5
    assert all(row["by_design"] == [] for row in rows)


@pytest.mark.slow
def test_what_differs_by_design_agrees_with_the_parts_in_turn(agreeing):
    rows = bench_step.bench(config("cnn", dict(features=(4,), dense=16), optim=SGD), ("jit", "pmap"), 0.0, turns=1)
    found = differences(rows)
    assert not found["pmap", "jit"]["equal"] and found["pmap", "jit"]["loss"] > 1e-4
    assert found["pmap", "in turn"]["equal"] and ("jit", "in turn") not in found
    assert found["pmap", "jit"]["extra"] > 1e-4
    assert [why.partition(":")[0] for why in rows[1]["by_design"]] == ["dropout", "batch_stats"]
    assert agreement.agree(rows)


@pytest.mark.slow
def test_a_wrong_sum_is_seen(agreeing, monkeypatch):
    """A mean of the devices' gradients is an eighth of their sum: Adam hides it from the loss, not from the norm."""

    def averaged(gradient, axis):
        def over(*arguments):
            grads, extra, metrics = gradient(*arguments)
            return jax.lax.pmean(grads, axis), extra, jax.lax.psum(metrics, axis)

        return over

    monkeypatch.setattr(ways, "summed", averaged)
    rows = bench_step.bench(config("mlp"), ("jit", "shard_map"), 0.0, turns=1)
    found = differences(rows)
    assert not found["shard_map", "jit"]["equal"] and not agreement.agree(rows)
    np.testing.assert_allclose(found["shard_map", "jit"]["grad_norm"], 7 / 8, rtol=0.05)


@pytest.mark.parametrize(
    ("family", "fields", "augment", "words"),
    [
        ("mlp", PLAIN, ("flip",), []),
        ("mlp", {}, (), ["dropout"]),
        ("cnn", PLAIN, (), ["batch_stats"]),
        ("mlp", PLAIN, ("flip", "mixup"), ["mixup"]),
    ],
)
def test_reasons(family, fields, augment, words):
    options = dict(augment=tuple({"name": name} for name in augment))
    found = ways.by_design(assemble(config(family, fields, data=options)))
    assert [why.partition(":")[0] for why in found] == words


def test_what_was_not_counted_is_said_even_where_there_is_no_roofline(monkeypatch):
    def report(program, job):
        raise FaultError("no memory is told")

    job = assemble(small.config("mlp"))
    counted = count.of_job(job)
    unsure = dataclasses.replace(counted, hardware=dataclasses.replace(counted.hardware, notes=("a loop",)))
    monkeypatch.setattr(count, "of_job", lambda job: unsure)
    monkeypatch.setattr(achieved.compiled, "report", report)
    assert achieved.achieved(job, None, 1.0)["notes"] == [
        "a loop", "MFU and roofline are not known: no memory is told",
    ]  # fmt: skip


def test_what_is_not_a_number_differs():
    """As `loss`, `grad_norm`, parameters or other collections: none compares as more than rounding."""
    fine = {"loss": np.ones(5), "grad_norm": np.ones(5)}, {"w": np.ones(3)}, {"mean": np.ones(2)}
    assert agreement.difference(fine, fine, "float32")["equal"]
    for wrong in (
        (fine[0] | {"grad_norm": np.full(5, math.nan)}, *fine[1:]), (fine[0], {"w": np.full(3, math.nan)}, fine[2]),
    ):  # fmt: skip
        assert not agreement.difference(wrong, fine, "float32")["equal"]
        assert not agreement.difference(fine, wrong, "float32")["equal"]


def test_pmap_may_be_gone(monkeypatch):
    job = assemble(small.config("mlp"))
    monkeypatch.delattr(jax, "pmap")
    with pytest.raises(UserError, match=r"has no pmap any more: leave it out, --compare=jit,shard_map"):
        ways.pmap(job)


def test_bad_input(capsys):
    with pytest.raises(UserError, match=r"--compare='pjit' does not exist. Did you mean 'jit'\?"):
        bench_step.bench(small.config("mlp"), ("jit", "pjit"))
    with pytest.raises(UserError, match=r"data\.batch_size=12 does not divide over the 8 devices"):
        bench_step.bench(small.config("mlp", data=dict(batch_size=12)))
    with pytest.raises(UserError, match=r"'model\.hidden=' is no change: expected KEY=VALUE"):
        bench_step.bench(small.config("mlp"), ("seed=1+model.hidden=",))
    with pytest.raises(UserError, match=r"--config='mine\.py': there is no such file"):
        bench_step.bench(small.config("mlp"), ("mine.py",))
    with pytest.raises(UserError, match=r"optim: unknown key 'learning_rte'|learning_rte"):
        bench_step.bench(small.config("mlp"), ("optim.learning_rte=1",))
    assert cli.main(["bench", "stp"]) == 2
    assert "Did you mean 'step'?" in capsys.readouterr().err


def entries(base, *compare, devices=1):
    return bench_step._entries(base, compare, jax.devices()[:devices])


def test_what_is_asked_for(tmp_path):
    file = tmp_path / "other.py"
    file.write_text(f"def get_config(seed='0'):\n    return {{**{small.config('mlp', seed=3)!r}, 'seed': int(seed)}}\n")
    base = small.config("mlp")
    assert [(entry.name, entry.make) for entry in entries(base)] == [("as written", ways.jit)]
    first, second = entries(base, "train.steps_per_dispatch=2+precision.compute=bfloat16")
    assert (
        first.name == "as written" and second.job.policy.compute == "bfloat16" and first.job.policy != second.job.policy
    )
    first, second, third = entries(base, "model.hidden=(4,)", "model.hidden=(4,)", f"{file}:7")
    assert (first.name, second.name, third.job.seed) == ("model.hidden=(4,)", "model.hidden=(4,) (2)", 7)
    assert first.job.model.hidden == (4,) and third.job.model.hidden == (64,)
    first, second = entries(base, "jit", "jit")
    assert second.name == "jit (2)" and first.job is second.job


def test_the_mesh_is_the_configs_own_but_for_explicit_collectives():
    base = small.config("mlp", mesh=dict(fsdp=2))
    (alone,) = entries(base, devices=4)
    ways_of = entries(base, "jit", "pmap", "seed=1", devices=4)
    assert [dict(entry.job.mesh.shape)["fsdp"] for entry in (alone, *ways_of)] == [2, 1, 1, 2]


@pytest.mark.slow
def test_a_row_holds_together(quick, monkeypatch):
    """The speeds follow from the time of a step, the MFU from the FLOPs of a matrix product and the peak."""
    peak = 1e9
    chip = chips.Chip("slow", 2**30, 1e9, {"float32": peak}, 1.0, 1.0, 0, 0, 1, 1.0, "made up")
    monkeypatch.setattr(chips, "of", lambda device: chip)
    base = {**small.config("mlp"), "model": dict(name="mlp", hidden=(16,), dropout=0.0)}
    rows = bench_step.bench(base, ("train.steps_per_dispatch=2",), 0.0, jax.devices()[:2], turns=2)
    assert json.loads(json.dumps(rows)) == rows and rows[0]["name"] == "as written"
    for row in rows:
        inputs, size, classes = 8 * 8, row["batch_size"], 10
        # Forward, and both gradients of the last layer; the first needs none of its input.
        assert row["model_flops"] == 2 * size * (2 * inputs * 16 + 3 * 16 * classes)
        seconds = row["step_ms"] / 1e3
        np.testing.assert_allclose(row["flops_per_second"], row["model_flops"] / seconds, rtol=1e-3)
        np.testing.assert_allclose(row["mfu"], row["model_flops"] / seconds / peak / 2, atol=1e-4)
        np.testing.assert_allclose(row["examples_per_second"], size / seconds, rtol=1e-3)
        np.testing.assert_allclose(row["roofline_fraction"], row["roofline_ms"] / row["step_ms"], atol=2e-4)
        assert row["tokens_per_second"] is None and row["joules"] is None
        assert row["peak_bytes"] > 2**20 and 0 < row["compiled_bytes"] < row["peak_bytes"]
        assert min(row[f"{part}_seconds"] for part in ("trace", "lower", "compile", "cached")) > 0
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5) and "ratio" not in rows[0]
    assert [row["steps_per_dispatch"] for row in rows] == [1, 2] and rows[1]["verdict"] and rows[0]["notes"] == []


def test_out_of_memory_is_explained(monkeypatch):
    def full(entry):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.")

    monkeypatch.setattr(bench_step, "_made", full)
    with pytest.raises(OutOfMemoryError, match=r"out of memory on 1 x cpu: one device: no 1\.0 KiB more"):
        bench_step.bench(small.config("mlp"), (), 0.0, jax.devices()[:1])


def test_peak_memory_begins_anew():
    np.ones(2**26, np.int8).sum()  # 64 MiB, and gone
    before, _ = achieved.peak(jax.devices())
    achieved.forget_peak()
    after, of = achieved.peak(jax.devices())
    assert of == "of this process, while it made steps" and after <= before
    kept = mmap.mmap(-1, 2**27)  # not of the heap, which may have kept as much
    np.frombuffer(kept, np.int8)[:] = 1
    assert achieved.peak(jax.devices())[0] >= after + 2**27 - 2**24 and len(kept)


def test_the_command_takes_alternatives_apart():
    taken = measuring._alternatives("jit,model.hidden=(64,64)+seed=1,data.augment=[{'name': 'flip'}],a.py:b")
    assert taken == ("jit", "model.hidden=(64,64)+seed=1", "data.augment=[{'name': 'flip'}]", "a.py:b")
    for wrong in ("jit,", ",jit", "jit,,pmap", "model.hidden=(64,64"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected alternatives"):
            measuring._alternatives(wrong)


def test_the_command_refuses_before_it_measures(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {small.config('mlp')!r}\n")
    command = ["bench", "step", f"--config={path}"]
    assert cli.main([*command, "--to=a.gif"]) == 2 and "expected a name that ends in .png" in capsys.readouterr().err
    assert cli.main([*command, f"--to={tmp_path}/no/a.png"]) == 2 and "there is no folder" in capsys.readouterr().err
    assert cli.main([*command, "--cores=100000"]) == 2 and "--cores=100000: this process has" in capsys.readouterr().err


# What is shown


def row(name, by_design=(), agreement=(), **values):
    return {
        "name": name, "data": "digits", "batch_size": 64, "mesh": "8 x cpu: data=8", "platform": "cpu",
        "steps_per_dispatch": 1, "trace_seconds": 0.5, "lower_seconds": 0.25, "compile_seconds": 1.25,
        "cached_seconds": 0.125, "first_step_ms": 3.0, "loss": 2.5, "step_ms": 0.5, "p95_ms": 0.75, "spread": 0.02,
        "cpu_ms": 0.75, "cpu_spread": 0.01, "dispatch_us": 40.0, "joules": None, "dispatches": 90, "turns": 7,
        "examples_per_second": 128e3, "tokens_per_second": None, "model_flops": 2e7, "flops_per_second": 4e10,
        "chip": "cpu", "mfu": 0.25, "roofline_ms": 0.1, "roofline_fraction": 0.2, "bound": "memory",
        "compiled_bytes": 2**20, "notes": [], "peak_bytes": 2**29, "peak_of": "of this process", "energy": "no energy",
        "by_design": list(by_design), "agreement": list(agreement), **values,
    }  # fmt: skip


AGAINST = dict(ratio=1.1, ratio_spread=0.01, cpu_ratio=1.2, cpu_ratio_spread=0.01, verdict="1.10 x slower by wall time")


def difference(against, equal, size):
    return {
        **dict.fromkeys(("loss", "grad_norm", "params", "extra"), size),
        "steps": 5,
        "equal": equal,
        "against": against,
    }


def test_what_is_printed(capsys, tmp_path):
    differ = [difference("jit", False, 0.1), difference("in turn", True, 1e-7)]
    why, bad = ["dropout: masks"], [difference("in turn", False, 0.1)]
    rows = [row("jit", why), row("shard_map", why, differ, **AGAINST), row("pmap", why, bad, **AGAINST)]
    assert agreement.agree(rows[:2]) and not agreement.agree(rows)
    assert agreement.agree([row("pmap"), row("jit", why, [difference("pmap", False, 0.1)])])
    bench_show.show(rows, bench_show.STEP, as_json=False, to=(tmp_path / "a.jsonl", tmp_path / "a.png"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[:2] == [
        "digits, batches of 64, on 8 x cpu: data=8, 7 turns",
        f"{'':<21}{'jit':>11}{'shard_map':>11}{'pmap':>11}",
    ]
    texts = {line[:21].strip(): line[21:].split() for line in lines}
    assert texts["step"] == ["0.500", "ms"] * 3 and texts["by the first"] == ["-", "1.20", "x", "1.20", "x"]
    assert texts["compile, cache full"] == ["0.12", "s"] * 3 and texts["MFU"] == ["25.0%"] * 3
    assert "tokens/s" not in texts and "energy of a step" not in texts and "devices" not in texts
    (one, other, bad) = [line for line in lines if "e-0" in line]
    assert one.split() == ["shard_map", "jit", *["1.0e-01"] * 4, "by", "design"]
    assert other.endswith("1.0e-07  equal up to rounding") and bad.endswith("DIFFERENT")
    assert "dropout: masks." in lines and any(line.startswith("in turn: the parts of all") for line in lines)
    assert "pmap against jit: 1.10 x slower by wall time." in lines and "No energy." in lines
    assert "Peak memory: 512.0 MiB of this process, of all together." in lines
    assert any(line.startswith("MFU = ") and line.endswith("; the peak is that of cpu.") for line in lines)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows
    assert matplotlib.image.imread(tmp_path / "a.png").shape[1] == 1000
    bench_show.show(rows, bench_show.STEP, as_json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_what_is_not_to_be_believed_is_said():
    values = dict(steps_per_dispatch=8, mfu=None, notes=["no peak"]) | AGAINST | dict(ratio_spread=0.2)
    named = row("model.hidden=(4,)+train.steps_per_dispatch=8", **values)
    lines = list(bench_show.STEP.table([row("jit", spread=0.2, step_ms=2.0), named]))
    assert (
        "The turns of jit are 20% apart by the clock, 1% by CPU time: what is more than 15% is not to be quoted."
        in lines
    )
    assert any(line.startswith("Steps took longer by the clock than they had of the processor") for line in lines)
    assert "[2] model.hidden=(4,)+train.steps_per_dispatch=8" in lines and "no peak." in lines
    assert [line.split()[-2:] for line in lines if line.startswith("steps of a dispatch")] == [["1", "8"]]
    ratios = [line.split()[3:] for line in lines if line.startswith("  by the first")]
    assert ratios == [["-", "unsteady"], ["-", "1.20", "x"]]
    quiet = list(bench_show.STEP.table([row("jit")]))
    assert not any("not to be quoted" in line or "the processor" in line for line in quiet)


def test_what_is_printed_of_data():
    def one(way, speed, **values):
        limits = dict(examples_per_second=speed, slowest=speed // 2, fastest=2 * speed, turns=7, chosen=False)
        return {"data": "digits", "way": way, "batch_size": 64, **limits, **values}

    rows = [one("memory", 1000, ratio=2.0, peer="theirs"), one("device", 4000, chosen=True), one("theirs", 500)]
    lines = list(bench_show.DATA.table(rows))
    assert lines[0] == "digits, batches of 64; median of 7 turns\n" and lines[1].endswith("   by theirs")
    assert lines[2].split() == ["memory", "1,000", "500", "2,000", "2.00", "x"]
    assert lines[3].startswith("* device ") and lines[-1] == "\n* the way a run of this config goes"
    assert bench_show.DATA.bar(rows[1]) == bench_show.Bar("device", {"": 4000}, 8000, "4.00k *")
