"""A config that trains alike on every mesh passes; one that does not is caught, with the step and the tensor."""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
import small

from flaxmodels import cli, step
from flaxmodels.job import assemble
from flaxmodels.registry import UserError
from flaxmodels.verify import mesh, tracing
from flaxmodels.verify.mesh import DIFFERS, EQUAL, REFERENCE, SKIPPED, Cell, Row


class Counting(nn.Module):
    """A module that is wrong: what it computes depends on the mesh that it is on."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16, name="inner")(x.reshape(x.shape[0], -1)))
        tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
        return nn.Dense(self.classes, name="outer")(x * (1 + 1e-3 * (tensor - 1)))


class Normed(nn.Module):
    """A small module with BatchNorm."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


def plain(**sections):
    model = dict(name="mlp", hidden=(32,))
    base = dict(model=model, data=small.IMAGES, optim=small.ADAM, train=dict(duration=20))
    return base | sections


def found(config, **options):
    lines = []
    rows = mesh.run(config, **dict(steps=3, devices=2, accumulation=(1, 2)) | options, show=lines.append)
    assert len(lines) == len(rows) + 1
    return {(row.cell.mesh, row.cell.microbatches): row for row in rows}


@pytest.mark.slow
def test_what_trains_alike_passes():
    rows = found(plain(), devices=4, accumulation=(2,))
    assert len(rows) == 2 + 4 + 5
    skipped = {cell for cell, row in rows.items() if row.verdict == SKIPPED}
    assert skipped == {cell for cell in rows if "sequence" in cell[0]}
    assert rows.pop(("one device", 1)).verdict == REFERENCE
    compared = [row for cell, row in rows.items() if cell not in skipped]
    assert all(row.verdict == EQUAL and 0 <= row.loss <= 1e-6 and row.grad_norm <= 1e-6 for row in compared)
    assert mesh.verdict(tuple(rows.values()), 2e-5)[0]


@pytest.mark.slow
def test_a_model_that_knows_the_mesh_is_caught_with_step_and_tensor():
    model = dict(name=f"{__name__}:Counting")
    rows = found(plain(model=model), accumulation=(1,))
    assert {cell[0]: row.verdict for cell, row in rows.items()} == {
        "one device": REFERENCE, "data 2": EQUAL, "fsdp 2": EQUAL, "tensor 2": DIFFERS, "sequence 2": SKIPPED,
    }  # fmt: skip
    why = rows["tensor 2", 1].why
    assert why.startswith("step 1: the loss is off by") and "First tensor: step 1: gradient inner/bias is off by" in why
    passed, said = mesh.verdict(tuple(rows.values()), 2e-5)
    assert not passed and "1 of 3 cells differ" in said and "tensor 2" in said


@pytest.mark.slow
def test_wrong_accumulation_is_caught(monkeypatch):
    right = step.accumulated

    def wrong(gradient, parts):
        def doubled(*arguments):
            grads, extra, metrics = right(gradient, parts)(*arguments)
            return jax.tree.map(lambda g: g * (1 + 1e-3 * (parts - 1)), grads), extra, metrics

        return doubled

    monkeypatch.setattr(step, "accumulated", wrong)
    rows = found(plain(), accumulation=(2,))
    assert {row.verdict for cell, row in rows.items() if cell[1] == 2} == {DIFFERS, SKIPPED}


@pytest.mark.nightly
def test_microbatches_of_batchnorm_are_held_against_their_like():
    rows = found(plain(model=dict(name=f"{__name__}:Normed")), steps=2, accumulation=(2,))
    assert rows["one device", 2].verdict == REFERENCE and "BatchNorm" in rows["one device", 2].why
    assert rows["data 2", 2].verdict == rows["fsdp 2", 2].verdict == EQUAL


@pytest.mark.slow
def test_whether_the_loss_depends_on_random_bits_is_seen():
    for rate in (0.0, 0.1):
        model = dict(name="mlp", hidden=(16,), dropout=rate)
        assert tracing.draws(assemble(plain(model=model), devices=jax.devices()[:1])) == (rate > 0)


def proof(expected, *, fresh="a", by_design=""):
    """A proof whose reference is known; nothing is compiled."""
    made = mesh._Proof({}, len(expected.loss), 1e-3, ())
    made._batch_size, made._fresh, made._by_design, made._explained = 8, {"params/w": fresh}, by_design, True
    made._references = {1: (None, expected)}
    return made


def trace(loss=(2.0, 1.0), norm=(1.0, 1.0), bits=("x", "y")):
    return tracing.Trace(tuple({"inputs": b, "weights": "w"} for b in bits), np.array(loss), np.array(norm))


CASES = {
    "equal": (trace(), EQUAL, ""),
    "within": (trace(loss=(2.0, 1.0009)), EQUAL, ""),
    "loss": (trace(loss=(2.0, 1.002)), DIFFERS, "step 2: the loss is off by 2.0e-03, the gradient's norm by 0.0e+00"),
    "norm": (trace(norm=(1.002, 1.0)), DIFFERS, "step 1: the loss is off by 0.0e+00, the gradient's norm by 2.0e-03"),
    "nan": (trace(loss=(float("nan"), 1.0)), DIFFERS, "step 1: the loss is off by nan"),
    "batch": (trace(bits=("x", "z")), DIFFERS, "step 2: inputs of the batch has other bits"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cell_is_judged(case):
    seen, verdict, why = CASES[case]
    row = proof(trace()).row(Cell(2, {"data": 2}, 1), mesh._Prepared({"params/w": "a"}, {1: lambda steps: seen}))
    assert row.verdict == verdict and row.why.startswith(why) and bool(row.why) == bool(why)


def test_other_initial_bits_differ():
    row = proof(trace()).row(Cell(2, {"data": 2}, 1), mesh._Prepared({"params/w": "b"}, {}))
    assert row.verdict == DIFFERS and row.why.startswith("before the first step: params/w has other bits")


def test_batches_that_do_not_divide_are_skipped_with_one_that_would():
    made = proof(trace())
    row = made.row(Cell(8, {"data": 8}, 4), mesh._Prepared({}, {}))
    assert (row.verdict, row.why) == (
        SKIPPED, "8 examples in 4 parts do not divide over 8 devices: --config.data.batch_size=32 would"
    )  # fmt: skip
    assert made._impossible(Cell(8, {"fsdp": 4, "tensor": 2}, 2)) == ""
    assert "16 would" in made._impossible(Cell(1, {}, 16))


def test_nothing_compared_is_no_proof():
    skipped, equal = (Row(Cell(2, {"data": 2}, 1), verdict, why="why") for verdict in (SKIPPED, EQUAL))
    assert mesh.verdict((skipped,), 1e-5) == (False, "FAILED: nothing could be compared; 1 were skipped")
    assert mesh.verdict((skipped, equal), 1e-5)[0]


def test_each_number_of_devices_is_split_in_every_way():
    for count in (2, 4, 8):
        axes = mesh._meshes(count)
        assert all(np.prod(list(each.values())) == count for each in axes)
        assert {name for each in axes for name in each} == {"data", "fsdp", "sequence", "tensor"}
    assert mesh._counts(8) == [2, 4, 8]


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="--devices=6"):
        mesh.run(plain(), devices=6)
    with pytest.raises(UserError, match="--steps: 0"):
        mesh.run(plain(), steps=0)
    with pytest.raises(UserError, match="--accumulation: 0"):
        mesh.run(plain(), accumulation=(4, 0))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="--tolerance="):
            mesh.run(plain(), tolerance=wrong)
    with pytest.raises(UserError, match="verify 'mess': there is no such proof"):
        cli._verb(["verify", "mess"])


@pytest.mark.parametrize(("verb", "one"), [("verify", "mesh"), ("bench", "step")])
def test_a_verb_of_several_words_says_which_there_are(verb, one, capsys):
    assert cli._verb([verb, "--help"]) == 0
    assert f"flaxmodels {verb} {one} --help" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{verb}: say first which .* There are: .*{one}"):
        cli._verb([verb, "--config=configs/digits_mlp.py"])


def test_everything_is_computed_in_float32():
    written = plain(model=dict(name="transformer", dtype="bfloat16"), precision=dict(param="bfloat16"))
    copied = tracing.in_float32(written)
    assert copied["model"]["dtype"] == "float32" and copied["precision"] == {"compute": "float32"}
    assert written["model"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_first_tensor_is_found_where_only_an_update_differs():
    """All gradients of the first step agree; the learning rate does not."""
    one = assemble(plain(train=dict(duration=4)), devices=jax.devices()[:1])
    other = assemble(
        plain(train=dict(duration=4), optim=small.ADAM | dict(learning_rate=6e-3)), devices=jax.devices()[:1]
    )
    difference = tracing.first_difference(one, other, 2, 1e-5)
    assert difference is not None
    assert (difference.step, difference.what) == (1, "parameter") and difference.relative > 1e-3
    assert tracing.first_difference(one, dataclasses.replace(one), 2, 0.0) is None
