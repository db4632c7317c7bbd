"""What `flaxmodels shardings` says of a config: sizes that add up, and a warning for each thing that is wasted."""

import io
import json
import math

import jax
import pytest
import small

from flaxmodels import cli
from flaxmodels.job import assemble
from flaxmodels.perf import shardings


def found(family="transformer", compile=False, fields=(), **sections):
    config = small.config(family, **sections)
    config["model"] |= dict(fields)
    return shardings.report(assemble(config), compile=compile)


@pytest.fixture(scope="module")
def plain():
    job = assemble(small.config("transformer", mesh=dict(fsdp=4, tensor=2)))
    return job, shardings.report(job)[0]


@pytest.mark.slow
def test_bytes_are_those_of_the_arrays(plain):
    job, report = plain
    state = job.fresh()
    trees = {
        "parameters": state.params,
        "optimizer state": state.opt_state,
        "other state": (state.step, state.extra),
    }
    for name, tree in trees.items():
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        assert report.totals[name] == (held, sum(x.nbytes for x in jax.tree.leaves(tree)))
    rows = {row.path: row for row in report.parameters}
    assert sum(row.device_bytes for row in rows.values()) == report.totals["parameters"][0]
    up = rows["blocks/mlp/up/kernel"]
    assert (up.shape, up.dtype, up.spec) == ((2, 32, 128), "float32", "-, fsdp, tensor")
    assert up.bytes == 4 * math.prod(up.shape) == 8 * up.device_bytes
    assert report.axes == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert report.mesh == "8 x cpu: fsdp=4, tensor=2" and report.notes == job.notes
    assert report.warnings == ()


@pytest.mark.slow
def test_rules_that_do_nothing():
    rules = (
        ("mlp/up/kernel", (None, "tensor")),
        ("up/kernel", (None, "fsdp")),
        ("mlp/(up|gate)/kernel", (None, "fsdp")),
        ("head/kernel", (None, None)),  # whole, on purpose
    )
    warnings = found(mesh=dict(fsdp=4), sharding=dict(rules=rules))[0].warnings
    assert warnings == (
        "sharding.rules: 'mlp/up/kernel' splits nothing, since this mesh has tensor=1, and keeps the fallback from "
        "splitting blocks/mlp/up/kernel: leave it out.",
        "sharding.rules: 'up/kernel' is never reached: 'mlp/up/kernel', before it, matches all that it does.",
    )


@pytest.mark.slow
def test_what_does_not_divide_is_named_by_its_key(monkeypatch):
    monkeypatch.setattr(shardings, "SMALL", 1024)
    warnings = found(mesh=dict(tensor=4), fields=dict(vocab_size=66, heads=2))[0].warnings
    for text in ("model.vocab_size, 66, does not", "model.heads, 2, does not", "model.kv_heads, 2, does not"):
        assert [line for line in warnings if line.startswith(text)], text


@pytest.mark.slow
def test_axes_along_which_all_devices_do_the_same():
    warnings = found("cnn", mesh=dict(sequence=2))[0].warnings
    assert [text for text in warnings if text.startswith("mesh.sequence=2: model.name='cnn' says of nothing")]
    assert not [text for text in found(mesh=dict(sequence=2))[0].warnings if "mesh.sequence" in text]


@pytest.mark.slow
def test_a_length_that_sequence_does_not_divide():
    config = small.config("transformer", mesh=dict(sequence=8), data=dict(length=60))
    job = assemble(config)
    said = list(shardings.idle_axes(job, job.lower_train()[0]))
    assert said == ["data.length=60 does not divide over mesh.sequence=8: use 64."]


def test_a_state_that_is_not_donated_is_named(plain):
    job, _ = plain
    lowered = jax.jit(lambda state, feed: (state, feed)).lower(job.abstract, 0)
    said = list(shardings.warned(job, lowered))
    assert len(said) == len(jax.tree.leaves(job.abstract))
    assert "params/blocks/mlp/up/kernel of the train state is not donated: the step holds it twice." in said


@pytest.mark.slow
def test_the_compiled_step_is_shown():
    report, lines = found("mlp", compile=True, mesh=dict(fsdp=8))
    assert report.warnings == () and any("donated: one copy at a time" in line for line in lines)
    assert any("all-reduce" in line or "reduce" in line for line in lines)


def command(capsys, *words):
    code = cli.main(["shardings", "--config=configs/digits_mlp.py", *words])
    return code, capsys.readouterr()


@pytest.mark.slow
def test_the_command(capsys):
    code, said = command(capsys, "--config.mesh.fsdp=4", "--devices=4")
    assert code == 0, said.err
    assert said.out.startswith("mesh: 4 x cpu: fsdp=4")
    for text in ("hidden_0/kernel", "fsdp", "optimizer state", "no warnings: what is large is split"):
        assert text in said.out


def test_what_is_not_split_is_not_said_to_be():
    for axes, said in [({"data": 8, "fsdp": 1}, "whole on each device"), ({"data": 1, "fsdp": 8}, "large is split")]:
        stream = io.StringIO()
        rows = (shardings.Row("w", (8,), "float32", "-", 32, 32),)
        shardings.show(shardings.Report("", axes, (), rows, {"parameters": (32, 32)}, ()), [], stream)
        assert said in stream.getvalue().splitlines()[-1]


@pytest.mark.slow
def test_the_command_for_a_program(capsys):
    code, said = command(capsys, "--config.mesh.fsdp=8", "--json")
    assert code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert {row["kind"] for row in rows} == {"mesh", "parameter", "total"}
    assert sum(row["bytes"] for row in rows if row["kind"] == "parameter") == next(
        row["bytes"] for row in rows if row.get("of") == "parameters"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices=2", "--topology=v5e:2x2"], "leave one of them out"),
        (["--num_slices=2"], "--config.mesh.num_slices=2"),
        (["--devices=9"], "JAX has started with 8"),
        (["--devices=0"], "expected 1 or more"),
    ],
)
def test_the_command_refuses(capsys, words, message):
    try:
        code, said = command(capsys, *words)
    except SystemExit as left:  # argparse
        code, said = left.code, capsys.readouterr()
    assert code == 2 and message in said.err


@pytest.mark.slow
def test_devices_are_simulated_in_a_process_that_has_one(run):
    done = run("-m", "flaxmodels", "shardings", "--config=configs/digits_mlp.py", "--devices=16", XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mesh: 16 x cpu: data=16")
