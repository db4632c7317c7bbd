"""The policy of dtypes: what it casts, what it never does, and training under it."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from flaxmodels import losses, metrics, optim, precision, sharding, step
from flaxmodels import state as states
from flaxmodels.job import assemble
from flaxmodels.models import build
from flaxmodels.precision import Policy
from flaxmodels.registry import UserError

B, D, C = 16, 5, 3
MIXED = Policy("float32", "bfloat16", "float32")
SEEN = []


class Own(nn.Module):
    """A user's module that knows nothing of dtypes; it tells what it computes in."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        SEEN.append(x.dtype)
        return nn.Dense(C)(x)


def batch(seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(B, D)).astype(np.float32)
    targets = np.argmax(inputs[:, :C], axis=-1).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "weights": np.ones(B, np.float32)}


def setup(model, policy=None, **options):
    """(an abstract state, the gradient, a program that trains: () -> first state, last state, metrics of each step)."""
    tx, schedule = optim.make("adamw", learning_rate=0.02, total_steps=100, **options)
    gradient = step.make_gradient(step.make_apply(model, policy), losses.make()[0])
    update = partial(step.train_step, gradient=gradient, tx=tx, schedule=schedule, seed=0)
    param = "float32" if policy is None else policy.param
    create = partial(states.create, model, tx, batch()["inputs"], 0, param)

    @jax.jit
    def train():
        state, data = create(), batch()
        return state, *jax.lax.scan(lambda state, _: update(state, data), state, None, 30)

    return jax.eval_shape(create), gradient, train


def loss_of(found):
    return np.asarray(found["loss"][0] / found["loss"][1])


def alike(a, b):
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(f"{x} {y}"), a, b)


def dtypes(tree):
    return {jnp.dtype(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


# words


@pytest.mark.parametrize(
    ("platform", "compute", "expected"),
    [
        ("cpu", "auto", "float32"), ("gpu", "auto", "bfloat16"), ("tpu", "auto", "bfloat16"),
        ("cpu", "bfloat16", "bfloat16"), ("tpu", "float32", "float32"),
    ],
)  # fmt: skip
def test_the_policy_of_a_platform(platform, compute, expected):
    assert precision.policy(compute=compute, platform=platform) == Policy("float32", expected, "float32")


@pytest.mark.parametrize("key", ["param", "compute", "output"])
def test_other_dtypes_are_refused(key):
    with pytest.raises(UserError, match=rf"precision.{key}='float16' has the wrong type: expected one of .*'bfloat16'"):
        precision.policy(**{key: "float16"}, platform="gpu")


def test_a_policy_in_words():
    assert str(MIXED) == "parameters float32, computation bfloat16, outputs float32"


# casts


def test_only_real_floats_are_cast():
    tree = {
        "f": jnp.ones(2), "i": jnp.ones(2, jnp.int32), "b": jnp.ones(2, bool), "u": np.ones(2, np.uint8),
        "c": jnp.ones(2, jnp.complex64), "key": jax.random.key(0), "none": None, "h": np.ones(2, np.float16),
    }  # fmt: skip
    cast = precision.cast(tree, "bfloat16")
    assert cast["f"].dtype == cast["h"].dtype == BF16
    assert all(cast[name] is tree[name] for name in ("i", "b", "u", "c", "key", "none"))
    assert precision.cast(tree, "float32")["f"] is tree["f"] and precision.cast(tree, None) is tree


def test_cast_like_gives_each_leaf_the_dtype_of_its_pair():
    like = {"a": np.ones(1, np.float32), "b": np.ones(1, np.int8)}
    found = precision.cast_like({"a": jnp.ones(1, BF16), "b": jnp.ones(1)}, like)
    assert found["a"].dtype == found["b"].dtype == F32


# a module that has no dtype


def test_a_users_module_computes_in_bfloat16_with_float32_parameters_gradients_and_statistics():
    state, gradient, train = setup(Own(), MIXED)
    SEEN.clear()
    grads, extra, found = jax.eval_shape(gradient, state.params, state.extra, batch(), step.streams(0, 0))
    assert set(SEEN) == {BF16}
    assert dtypes(grads) == dtypes(extra) == dtypes(found) == dtypes(state) == {F32}
    alike(jax.eval_shape(train)[1], state)


@pytest.mark.slow
def test_a_users_module_trains_in_bfloat16_nearly_as_in_float32():
    low, high = (loss_of(setup(Own(), policy)[2]()[2]) for policy in (MIXED, None))
    np.testing.assert_allclose(low, high, atol=0.05)
    assert low[-1] < 0.5 * low[0] and not np.array_equal(low, high)


def test_a_policy_of_float32_changes_nothing():
    data = batch()
    (state, plain, _), (_, gradient, _) = setup(Own()), setup(Own(), Policy("float32", "float32", "float32"))
    arguments = (state.params, state.extra, data, step.streams(0, 0))
    assert str(jax.make_jaxpr(plain)(*arguments)) == str(jax.make_jaxpr(gradient)(*arguments))


def test_evaluation_computes_as_training_does():
    state, _, _ = setup(Own(), MIXED)
    SEEN.clear()
    apply = step.make_apply(Own(), MIXED)
    outputs, extra = jax.eval_shape(partial(apply, train=False), state.params, state.extra, batch()["inputs"])
    assert set(SEEN) == {BF16} and outputs.dtype == F32 and extra == {}


def test_statistics_of_bfloat16_activations_add_up_in_float32():
    """The mean of 4,096 numbers near 300, where bfloat16 counts by twos."""
    inputs = np.random.default_rng(0).integers(290, 310, (4096, 1)).astype(np.float32)
    norm = nn.BatchNorm(use_running_average=False, momentum=0.0)
    apply = step.make_apply(norm, Policy("float32", "bfloat16", "float32"))
    extra = {"batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
    norm_of = jax.jit(partial(apply, train=True))(
        {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, extra, inputs.astype(BF16)
    )
    mean = norm_of[1]["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, inputs.astype(BF16).astype(np.float64).mean(0), rtol=1e-5)


def test_statistics_that_a_module_writes_in_bfloat16_are_kept_in_the_dtype_they_had():
    class Careless(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(D))
            mean.value = x.mean(0)
            return nn.Dense(C)(x)

    assert dtypes(jax.eval_shape(setup(Careless(), MIXED)[2])[1].extra) == {F32}


def test_integers_reach_a_module_as_they_are():
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            SEEN.append((inputs["ids"].dtype, inputs["x"].dtype))
            return nn.Embed(9, C)(inputs["ids"]) + nn.Dense(C)(inputs["x"])

    inputs = {"ids": np.zeros(B, np.int32), "x": np.zeros((B, D), np.float32)}
    params = jax.eval_shape(Tokens().init, jax.random.key(0), inputs)["params"]
    SEEN.clear()
    jax.eval_shape(partial(step.make_apply(Tokens(), MIXED), train=True), params, {}, inputs)
    assert set(SEEN) == {(jnp.dtype("int32"), BF16)}


# a module with a dtype


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_module_with_a_dtype_casts_by_itself(compute):
    class Low(nn.Module):
        dtype: str = compute

        @nn.compact
        def __call__(self, x):
            SEEN.append((x.dtype, self.param("w", nn.initializers.ones, (D, C)).dtype))
            return nn.Dense(C, dtype=self.dtype)(x)

    params = jax.eval_shape(Low().init, jax.random.key(0), batch()["inputs"])["params"]
    SEEN.clear()
    outputs, _ = jax.eval_shape(partial(step.make_apply(Low(), MIXED), train=True), params, {}, batch()["inputs"])
    assert set(SEEN) == {(F32, F32)} and outputs.dtype == F32


def test_outputs_have_the_dtype_of_the_policy_but_for_a_split_head():
    class Split(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"features": x, "kernel": self.param("kernel", nn.initializers.ones, (D, C))}

    params = jax.eval_shape(Split().init, jax.random.key(0), batch()["inputs"])["params"]
    split, _ = jax.eval_shape(partial(step.make_apply(Split(), MIXED), train=True), params, {}, batch()["inputs"])
    assert dtypes(split) == {BF16}
    low = step.make_apply(build("mlp", classes=C, hidden=()), Policy("float32", "float32", "bfloat16"))
    params = jax.eval_shape(build("mlp", classes=C, hidden=()).init, jax.random.key(0), batch()["inputs"])["params"]
    assert jax.eval_shape(partial(low, train=False), params, {}, batch()["inputs"])[0].dtype == BF16


# parameters in bfloat16


@pytest.mark.slow
def test_parameters_in_bfloat16_start_from_those_in_float32_and_train():
    low = Policy("bfloat16", "bfloat16", "float32")
    (state, _, train), (_, _, whole) = setup(Own(), low, average=0.9), setup(Own())
    assert dtypes(state.params) == {BF16} and dtypes(state.extra) == dtypes(state.opt_state) == {F32}
    first, last, found = train()
    jax.tree.map(np.testing.assert_array_equal, first.params, precision.cast(whole()[0].params, BF16))
    alike(last, state)
    assert loss_of(found)[-1] < 0.5 * loss_of(found)[0]
    alike(optim.parameters_average(last.opt_state, last.params), state.params)


def test_what_a_module_makes_in_another_dtype_stays_so():
    model = nn.Dense(C, param_dtype=jnp.bfloat16)
    for dtype in ("float32", "bfloat16"):
        state = jax.eval_shape(partial(states.create, model, optax.identity(), batch()["inputs"], 0, dtype))
        assert dtypes(state.params) == {BF16}


def test_parameters_in_bfloat16_lie_as_those_in_float32():
    mesh, model = sharding.make_mesh(fsdp=8), build("mlp", classes=8, hidden=(256,))
    tx, _ = optim.make("adamw", learning_rate=0.1, total_steps=10, moments="bfloat16")
    high, low = (
        states.init(model, tx, batch()["inputs"], 0, mesh, param_dtype=dtype)[1] for dtype in ("float32", "bfloat16")
    )
    jax.tree.map(lambda a, b: (a.shape, a.sharding) == (b.shape, b.sharding) or pytest.fail(f"{a} {b}"), high, low)
    assert dtypes(low.params) == {BF16} and not low.params["hidden_0"]["kernel"].sharding.is_fully_replicated


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    """Microbatches whose gradients are 256 and then ones, which a sum in bfloat16 would lose."""

    def gradient(params, extra, data, rngs):
        return {"w": jnp.sum(data["inputs"]).astype(BF16)[None]}, extra, {"loss": metrics.once(0.0)}

    data = {"inputs": np.asarray([256.0] + [1.0] * 7, np.float32)}
    found, _, _ = jax.jit(step.accumulated(gradient, 8))({"w": jnp.zeros(1, BF16)}, {}, data, {})
    assert found["w"].dtype == F32 and found["w"][0] == 263


def test_norms_of_bfloat16_are_computed_in_float32():
    tree = {"a": jnp.full(10_000, 3.0, BF16)}
    np.testing.assert_allclose(metrics.norm(tree), 300, rtol=1e-6)
    tx, _ = optim.make("sgd", learning_rate=1.0, total_steps=1, clip_norm=1.0, momentum=0.0)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(metrics.norm(updates), 1, rtol=1e-5)


def test_a_dtype_of_the_model_is_the_precision_of_the_run():
    config = small.config("mlp")
    job = assemble(config | {"model": config["model"] | {"dtype": "bfloat16"}})
    assert job.policy.compute == "bfloat16" and any("computation bfloat16" in note for note in job.notes)


def test_what_a_loss_refuses_is_bad_input_wherever_the_step_is_lowered():
    job = assemble(small.config("mlp", loss=dict(name="mean_squared_error")))
    with pytest.raises(UserError, match="loss: outputs have shape"):
        job.lower_train()
