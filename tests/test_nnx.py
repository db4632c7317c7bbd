"""An NNX module trains as the Linen module that it equals, with the same step, shardings and checkpoints."""

import io
import re
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from flaxmodels import evaluating, loop, losses, models, sections, step
from flaxmodels.durations import parse
from flaxmodels.job import assemble
from flaxmodels.registry import Positive, UserError


class Net(nnx.Module):
    """A CNN with BatchNorm, dropout, and layers in a list."""

    def __init__(self, classes: int, width: Positive = 8, dropout: float = 0.1, *, rngs: nnx.Rngs):
        if dropout >= 1:
            raise ValueError(f"dropout={dropout} leaves nothing.")
        self.conv = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width * 16, rngs=rngs), nnx.Linear(width * 16, classes, rngs=rngs)])

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images))).mean((1, 2))
        return self.layers[1](self.drop(nnx.relu(self.layers[0](x))))


class LinenLayers(nn.Module):
    widths: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.widths[1], name="1")(nn.relu(nn.Dense(self.widths[0], name="0")(x)))


class LinenNet(nn.Module):
    """The same without dropout."""

    classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Conv(self.width, (3, 3), name="conv")(images)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x)).mean((1, 2))
        return LinenLayers((self.width * 16, self.classes), name="layers")(x)


class Typed(nnx.Module):
    def __init__(self, classes: int, dtype: Literal["float32", "bfloat16"] = "float32", *, rngs: nnx.Rngs):
        self.head = nnx.Linear(64, classes, dtype=dtype, rngs=rngs)

    def __call__(self, images):
        return self.head(images.reshape(len(images), -1))


class Held(nnx.Variable):
    pass


class Odd(nnx.Module):
    """What else NNX modules do."""

    def __init__(self, *, rngs: nnx.Rngs):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"))
        self.first = nnx.Linear(4, 4, kernel_init=kernel, rngs=rngs)
        self.blocks = nnx.Dict(tied=self.first, own=nnx.Linear(4, 4, use_bias=False, rngs=rngs))
        self.calls = Held(jnp.zeros((), jnp.int32))
        self.table, self.noise = jnp.arange(4.0), jax.random.normal(rngs.params(), (4,))
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
        self.stack = make(rngs)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=nnx.Rngs(0))])

    def __call__(self, x, train):
        self.calls.set_value(self.calls.get_value() + train)
        self.seen = nnx.Intermediate(x)
        ones = jnp.ones((x.shape[0], 4))
        x = self.blocks["own"](self.blocks["tied"](self.first(x))) + (self.table * self.noise)[None]
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
        return {"x": x, "masks": jnp.stack([drop(ones) for drop in self.drops])}


def config(**changes):
    base = small.config("cnn", train=dict(duration=6, log_every=1))
    return {**base, "model": dict(name=f"{__name__}:Net"), **changes}


def paths(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def odd():
    """(variables, train, evaluate) of one: train(params, extra, step) and evaluate(params, extra)."""
    model, x = models.build(f"{__name__}:Odd"), jnp.ones((64, 4))
    apply = step.make_apply(model)
    start = jax.jit(partial(model.init, train=False))
    train = jax.jit(lambda params, extra, at: apply(params, extra, x, train=True, rngs=step.streams(3, at)))
    return start(jax.random.key(0), x), train, jax.jit(lambda params, extra: apply(params, extra, x, train=False))


def test_gradients_and_statistics_are_those_of_the_linen_module():
    model = models.build(f"{__name__}:Net", classes=3, dropout=0.0)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(16, 4, 4, 1)), jnp.float32)
    linen = LinenNet(3)
    same = [jax.eval_shape(partial(m.init, train=False), jax.random.key(0), images) for m in (model, linen)]
    assert paths(same[0]) == paths(same[1])
    extra = jax.tree.map(lambda x: 0.3 * jnp.asarray(rng.normal(size=x.shape) ** 2, x.dtype), same[1])
    params = extra.pop("params")
    batch = {"inputs": images, "targets": jnp.arange(16) % 3, "weights": jnp.ones(16)}

    @partial(jax.jit, static_argnums=0)
    def both(module, params, extra):
        apply = step.make_apply(module)
        gradient = step.make_gradient(apply, losses.make("softmax_cross_entropy")[0])
        grads, after, metrics = gradient(params, extra, batch, step.streams(0, 0))
        return grads, after, metrics, apply(params, after, images, train=False)[0]

    ours, theirs = (both(module, params, extra) for module in (model, linen))
    assert np.abs(ours[1]["batch_stats"]["norm"]["mean"] - extra["batch_stats"]["norm"]["mean"]).max() > 0.01
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), ours, theirs)


def test_variables_become_collections_of_plain_arrays(odd):
    variables = odd[0]
    assert {type(x) for x in jax.tree.leaves(variables)} == {type(jnp.ones(2))}
    assert paths(variables["params"]) == {
        "blocks/own/kernel": (4, 4),
        "blocks/tied/bias": (4,),  # the first way to what is shared
        "blocks/tied/kernel": (4, 4),
        "stack/bias": (3, 4),
        "stack/kernel": (3, 4, 4),
    }
    assert variables.keys() == {"params", "Held"} and paths(variables["Held"]) == {"calls": ()}
    layers = variables["params"]["stack"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


def test_values_that_change_come_back_and_what_a_call_adds_does_not(odd):
    variables, train, evaluate = odd
    params, extra = variables["params"], {"Held": variables["Held"]}
    outputs, extra = train(params, extra, 0)
    assert extra.keys() == {"Held"} and int(extra["Held"]["calls"]) == 1
    evaluated, nothing = evaluate(params, extra)
    assert nothing == {}
    np.testing.assert_array_equal(outputs["x"], evaluated["x"])  # its noise is no variable, but stays the same
    doubled, _ = evaluate(jax.tree.map(lambda x: 2 * x, params), extra)
    assert not np.array_equal(doubled["x"], evaluated["x"])


def test_masks_differ_by_layer_and_step_and_are_off_in_evaluation(odd):
    variables, train, evaluate = odd
    params, extra = variables["params"], {"Held": variables["Held"]}
    one, again, other = (train(params, extra, at)[0]["masks"] for at in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert set(np.unique(one)) == {0.0, 2.0}
    for a, b in ((one[0], one[1]), (one[0], other[0]), (one[1], other[1])):
        assert np.mean(a != b) > 0.3
    assert (evaluate(params, extra)[0]["masks"] == 1).all()


def test_options_are_those_of_the_constructor():
    checked = sections.check(config(), parse)
    assert checked["model"] == {"name": f"{__name__}:Net"}
    rows = {key: (value, origin) for key, value, origin in sections.resolved(config())}
    assert rows["model.width"] == (8, "default") and rows["model.classes"] == (None, "from the data")
    assert "model.rngs" not in rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widht": 4}, r"model.widht=4: unknown key. Did you mean 'width'\? There are: classes, dropout, width"),
        ({"rngs": 0}, r"model.rngs=0: unknown key"),
        ({"width": 0}, r"model.width=0 is out of range: expected a finite number, at least 1"),
        ({"width": "wide"}, r"model.width='wide' has the wrong type: expected an integer"),
        ({"dropout": 1.0}, r"model: dropout=1.0 leaves nothing."),
        ({"classes": None}, r"model.classes=None has the wrong type"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        models.build(f"{__name__}:Net", **{"classes": 3, **fields})
    with pytest.raises(UserError, match=r"model.classes is not set"):
        models.build(f"{__name__}:Net")


def test_classes_come_from_the_data_and_the_state_is_sharded():
    job = assemble(config(mesh=dict(fsdp=8)))
    assert job.model.create.keywords == {"classes": 10}
    kernel = job.abstract.params["layers"]["1"]["kernel"]
    assert kernel.shape == (128, 10) and kernel.sharding.spec[0] == "fsdp"
    assert {x.shape for x in jax.tree.leaves(job.abstract.extra)} == {(8,)}


@pytest.mark.parametrize(
    ("name", "told", "product"), [("Net", None, "conv_general"), ("Typed", "bfloat16", "dot_general")]
)
def test_it_computes_in_bfloat16(name, told, product):
    """A module that takes a dtype is told; of another the parameters and inputs are cast, but no statistics."""
    job = assemble({**config(), "model": dict(name=f"{__name__}:{name}"), "precision": dict(compute="bfloat16")})
    assert getattr(job.model, "dtype", None) == told
    params, extra, images = job.abstract.params, job.abstract.extra, job.train.example()["inputs"]
    apply = step.make_apply(job.model, job.policy)
    outputs, after = jax.eval_shape(partial(apply, train=True, rngs=step.streams(0, 0)), params, extra, images)
    assert {x.dtype for x in jax.tree.leaves((outputs, after, params))} == {np.dtype("float32")}
    traced = str(jax.make_jaxpr(partial(apply, train=False))(params, extra, images))
    assert re.search(rf"bf16\[[\d,]+\] = {product}", traced)


@pytest.mark.slow
def test_it_trains_on_eight_devices_and_resumes_bit_for_bit(tmp_path):
    def fit(duration, workdir):
        changed = config(mesh=dict(fsdp=8), train=dict(duration=duration, log_every=1))
        return loop.fit(changed, tmp_path / workdir, allow_config_change=True, stream=io.StringIO())

    whole = fit(4, "whole")
    assert fit(2, "parts").step == 2
    resumed = fit(4, "parts")
    assert resumed.step == 4 and small.bits(resumed.state) == small.bits(whole.state)
    assert resumed.metrics == whole.metrics and np.isfinite(whole.metrics["eval/loss"])
    kernel = whole.state.params["layers"]["1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 10)
    assert jax.tree.leaves(whole.state.opt_state[0])[1].sharding.mesh == kernel.sharding.mesh
    one = assemble(config(), jax.devices()[:1])
    step_found, measured, count = evaluating.evaluate_checkpoint(one, tmp_path / "parts", "latest")
    assert (step_found, count) == (4, 256)
    np.testing.assert_allclose(measured["loss"], whole.metrics["eval/loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_mesh_changes_nothing():
    one, many = assemble(config(), jax.devices()[:1]), assemble(config(mesh=dict(data=4, fsdp=2)))
    assert small.bits(one.fresh()) == small.bits(many.fresh())
    (_, a, names), (_, b, _) = small.train(one, 4), small.train(many, 4)
    a, b = small.means(a, names), small.means(b, names)
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
    np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
