"""A bad step run again: the module, the operation and the examples that go wrong are named."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from flaxmodels import capsule
from flaxmodels.cli.replay import replay as verb
from flaxmodels.data import order
from flaxmodels.loop import fit
from flaxmodels.registry import UserError
from flaxmodels.verify import origins, replay

BATCH, EXAMPLES = 16, 64


def layered(params, x):
    """Four layers in a scan, of which the one with a parameter below 0 takes its logarithm; and a mask of -inf."""

    def layer(x, w):
        with jax.named_scope("block"):
            return x + jnp.log(w), None

    with jax.named_scope("Net"):
        x, _ = jax.lax.scan(layer, x, params)
        with jax.named_scope("mask"):
            x = jnp.where(jnp.arange(3) < 2, x, -jnp.inf)
        return jax.nn.softmax(x)


def test_the_layer_that_makes_nan_is_found():
    found, bad = origins.find(layered, {"params": np.array([1.0, 1.0, -2.0, 1.0], np.float32), "x": np.ones(3, "f")})
    first = found[0]
    assert (first.path, first.operation, first.backward, first.made) == (
        "block[2]",
        "log",
        False,
        "float32: nothing finite, 1 NaN",
    )
    assert first.operands == ("float32: -2 to -2",) and "test_replay.py" in first.source
    assert list(bad) == [""]


def test_a_mask_is_not_accused():
    found, bad = origins.find(layered, {"params": np.ones(4, np.float32), "x": np.ones(3, "f")})
    assert (found, bad) == ([], {})


def test_what_comes_in_is_named():
    found, _ = origins.find(layered, {"params": np.ones(4, np.float32), "x": np.array([1, np.nan, 1], np.float32)})
    assert [(origin.path, origin.operation, origin.rows) for origin in found] == [("x", "", (1,))]


@pytest.mark.parametrize(
    ("stack", "place"),
    [
        ("jvp(Net)/blocks/mlp", ("blocks/mlp", False)),
        ("transpose(jvp(Net))/[2]/blocks/mlp", ("blocks[2]/mlp", True)),
        ("transpose(jvp(Net))/[2]/rematted_computation/blocks/mlp", ("blocks[2]/mlp", False)),
        ("jvp()", ("", False)),
        ("[1]/jvp(Net)/norm", ("norm", False)),
    ],
)
def test_names_of_places(stack, place):
    assert origins._place(stack) == place


def test_names_of_code_are_seen():
    config = {
        "model": {"name": "mine:Net"},
        "data": {"augment": [{"name": "a.b:c"}, {"name": "flip"}], "dir": "/a:b c"},
    }
    assert sorted(replay._code(config)) == ["a.b:c", "mine:Net"]


def test_a_folder_that_is_no_capsule_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        verb([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"MANIFEST.json is missing"):
        verb([str(tmp_path)])


def config(bad, **sections):
    return (
        dict(
            data=dict(name="poison:marked_images", examples=EXAMPLES, bad=bad, batch_size=BATCH),
            optim=dict(name="adam", learning_rate=3e-3),
            train=dict(duration=12, log_every=12),
            checkpoint=dict(every_seconds=0.0),
        )
        | sections
    )


@pytest.fixture(scope="module")
def poison():
    sys.path.insert(0, str(ROOT / "tests/faults"))
    yield
    sys.path.remove(str(ROOT / "tests/faults"))


def of_batch(number, row=5):
    return int(order.train_indices(0, number, 1, BATCH, EXAMPLES)[0, row])


@pytest.mark.slow
def test_the_module_the_layer_and_the_example_are_named(tmp_path, poison):
    given = config((of_batch(2),), model=dict(name="poison:Layers", kind="backward", remat=True))
    fit(given | {"train": dict(duration=4)}, tmp_path / "run", devices=jax.devices()[:1])
    folder, lines = tmp_path / "run/capsules/2", list[str]()
    given = given | {"train": dict(duration=4)}
    found = replay.run(folder, given=given, devices=jax.devices()[:1], show=lines.append)
    assert found == replay.Verdict(True, True, "blocks[2]/trap", (of_batch(2),))
    text = "\n".join(lines)
    assert "the same, bit for bit" in text and "poison.py" in text and f"example {of_batch(2)} (row 5)" in text

    with pytest.raises(UserError, match=r"names code: poison:Layers, poison:marked_images.*--config=FILE"):
        replay.run(folder)
    with pytest.raises(UserError, match=r"data.bad was .* is \[1\]"):
        replay.run(folder, given={**given, "data": {**given["data"], "bad": (1,)}})
    with pytest.raises(UserError, match=r"is not what the capsule was trained on: .*content was"):
        replay.run(folder, given=given, overrides={"data.bad": "(1,)"}, devices=jax.devices()[:1])
    part = next(f for f in (folder / "params").rglob("*") if f.is_file() and f.stat().st_size > 100)
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        capsule.read(folder)


@pytest.mark.slow
def test_the_example_of_a_spike_is_named_on_another_mesh(tmp_path, poison):
    given = config(
        (of_batch(11),), model=dict(name="mlp", hidden=(8,)), loss=dict(name="poison:spiky"),
        guard=dict(spikes="skip", window=8),
    )  # fmt: skip
    given["data"]["examples"] = 256
    bad = int(order.train_indices(0, 11, 1, BATCH, 256)[0, 5])
    given["data"]["bad"] = (bad,)
    fit(given, tmp_path / "run", devices=jax.devices()[:1])
    lines = list[str]()
    found = replay.run(tmp_path / "run/capsules/11", given=given, devices=jax.devices()[:4], show=lines.append)
    assert found.reproduced and found.examples == (bad,) and found.module
    assert "devices was 1, is 4" in lines[1]
