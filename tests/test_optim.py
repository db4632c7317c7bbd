"""Optimizers and schedules: against optax and numpy; per-parameter rules; decay masks; averages."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxmodels import optim
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(seed=0):
    """Parameters of a small network, with the names that models here have."""
    names = {
        "hidden_0": {"kernel": (6, 5), "bias": (5,)}, "norm": {"scale": (5,)}, "embed": {"embedding": (7, 5)},
        "blocks": {"mlp": {"up": {"kernel": (3, 5, 8), "bias": (3, 8)}}, "norm_mlp": {"scale": (3, 5)}},
        "head": {"kernel": (5, 4)},
    }  # fmt: skip
    shapes, tree = jax.tree.flatten(names, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)])


def make(name="sgd", learning_rate=0.1, total_steps=100, **options):
    return optim.make(name, learning_rate=learning_rate, total_steps=total_steps, **options)


def run(tx, params, gradients):
    """Parameters after one update for each of `gradients`, all after all, and the last state."""

    @jax.jit
    def update(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, history = jax.jit(tx.init)(params), [params]
    for gradient in gradients:
        params, state = update(params, state, gradient)
        history.append(params)
    return history, state


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 0, "atol": 0})), a, b)


# optimizers


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("adam", 0.1, {}), ("adam", 0.1, {"nesterov": True}), ("adamw", 0.1, {}), ("sgd", 0.02, {}),
        ("sgd", 0.1, {"momentum": 0.0}), ("sgd", 0.02, {"nesterov": True}), ("lion", 0.03, {}), ("muon", 0.3, {}),
        ("adafactor", 0.1, {"min_factored": 4}),
    ],
)  # fmt: skip
def test_every_optimizer_descends(name, rate, options):
    tx, _ = make(name, rate, **options)
    params = {"dense": {"kernel": normal(4, 4) + 1, "bias": normal(4) + 1}}
    history = quadratic(tx, params, steps=60)
    assert history[-1] < 0.2 * history[0]


def quadratic(tx, params, steps):
    def loss(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    def one(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(one, (params, tx.init(params)), None, steps)[1])
    return np.asarray(run(params))


def test_all_names_are_tested_above():
    assert set(optim.OPTIMIZERS) == {"adam", "adamw", "sgd", "lion", "muon", "adafactor"}


def test_adamw_is_that_of_optax_with_the_same_mask():
    params, gradients = network(), [network(seed) for seed in (20, 40, 60)]
    decays = jax.tree.map_with_path(
        lambda keys, x: keys[-1].key in ("kernel", "embedding"), params
    )  # optax.adamw itself decays all
    ours, _ = run(make("adamw", 3e-3, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1)[0], params, gradients)
    theirs, _ = run(optax.adamw(3e-3, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=decays), params, gradients)
    same(ours, theirs, atol=1e-6)
    all_of_it, _ = run(make("adamw", 3e-3, weight_decay=0.1, decay_mask="all")[0], params, gradients)
    same(all_of_it, run(optax.adamw(3e-3, weight_decay=0.1), params, gradients)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda: optax.adam(0.1)),
        ("sgd", lambda: optax.sgd(0.1, momentum=0.9)),
        ("lion", lambda: optax.lion(0.1, weight_decay=0.0)),
    ],
)
def test_without_decay_they_are_those_of_optax(name, reference):
    params, gradients = network(), [network(seed) for seed in (20, 40)]
    same(run(make(name, weight_decay=0.0)[0], params, gradients)[0], run(reference(), params, gradients)[0], atol=1e-6)


def test_each_optimizer_has_the_decay_it_is_known_for():
    params = {"kernel": np.ones((2, 2), np.float32)}
    nothing = {"kernel": np.zeros((2, 2), np.float32)}
    for name in optim.OPTIMIZERS:
        left = run(make(name, 0.5)[0], params, [nothing])[0][1]["kernel"]
        np.testing.assert_allclose(left, 1 - 0.5 * optim.DEFAULT_DECAY.get(name, 0.0), rtol=1e-6, err_msg=name)
    assert set(optim.DEFAULT_DECAY) == {"adamw", "lion", "muon"}


def test_decay_is_decoupled_from_the_moments():
    """With a zero gradient an update is the decay alone, for ever: it has not entered a moment."""
    params, nothing = {"kernel": normal(3, 3)}, {"kernel": np.zeros((3, 3), np.float32)}
    for name in ("adam", "sgd"):
        history, _ = run(make(name, 0.1, weight_decay=0.5)[0], params, [nothing] * 3)
        same(history[-1], {"kernel": params["kernel"] * 0.95**3}, rtol=1e-5)


def test_matrices_decay_and_biases_and_scales_never_do_even_when_stacked():
    params = network()
    nothing = jax.tree.map(np.zeros_like, params)
    (_, after), _ = run(make("sgd", 1.0, weight_decay=0.5)[0], params, [nothing])
    factor = jax.tree.map_with_path(lambda keys, x: 0.5 if keys[-1].key in ("kernel", "embedding") else 1.0, params)
    same(after, jax.tree.map(lambda x, f: x * np.float32(f), params, factor))


def test_decay_mask_may_be_a_regex_of_paths():
    params = network()
    nothing = jax.tree.map(np.zeros_like, params)
    (_, after), _ = run(make("sgd", 1.0, weight_decay=0.5, decay_mask="mlp/.*bias|^head")[0], params, [nothing])
    moved = {
        path_of(keys)
        for keys, equal in jax.tree.leaves_with_path(jax.tree.map(np.array_equal, params, after))
        if not equal
    }
    assert moved == {"blocks/mlp/up/bias", "head/kernel"}
    with pytest.raises(UserError, match=r"optim.decay_mask: '\(' is not a regular expression"):
        make(decay_mask="(")


@pytest.mark.parametrize("norm", [0.5, 1e3])
def test_clipping_is_by_the_norm_of_all_gradients(norm):
    params, gradient = network(), network(20)
    (_, after), _ = run(make("sgd", 1.0, clip_norm=norm, momentum=0.0)[0], params, [gradient])
    step = jax.tree.map(lambda a, b: np.asarray(a) - b, params, after)
    length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    same(step, jax.tree.map(lambda g: g * np.float32(min(1, norm / length)), gradient), atol=1e-6)


def test_decay_is_not_clipped():
    params, nothing = {"kernel": np.full((2, 2), 100, np.float32)}, {"kernel": np.zeros((2, 2), np.float32)}
    (_, after), _ = run(make("sgd", 0.1, weight_decay=1.0, clip_norm=1e-3)[0], params, [nothing])
    np.testing.assert_allclose(after["kernel"], 90, rtol=1e-6)


# muon


def singular(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def test_muon_takes_a_stack_of_layers_as_a_batch_of_matrices():
    stack = {"blocks": {"mlp": {"up": {"kernel": normal(3, 6, 8)}}}}
    gradients = [{"blocks": {"mlp": {"up": {"kernel": normal(3, 6, 8, seed=s)}}}} for s in (1, 2)]
    together = run(make("muon")[0], stack, gradients)[0][-1]["blocks"]["mlp"]["up"]["kernel"]

    def one(tree, i):
        return {"up": {"kernel": tree["blocks"]["mlp"]["up"]["kernel"][i]}}

    for i in range(3):
        alone = run(make("muon")[0], one(stack, i), [one(g, i) for g in gradients])[0][-1]["up"]["kernel"]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "shape", "matrix"),
    [
        ("hidden_0", (6, 8), (6, 8)),
        ("conv_0", (3, 3, 2, 8), (18, 8)),
        ("attention/query", (8, 2, 4), (8, 8)),
        ("attention/out", (2, 4, 8), (8, 8)),
    ],
)
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.slow
def test_muon_makes_the_update_of_a_kernel_orthogonal(path, shape, matrix, layered):
    """Whatever the singular values of the gradient, those of the update are near one value; Adam's are not."""
    scale = np.logspace(0, -1.5, matrix[1]).astype(np.float32)
    kernel = (normal(*matrix) * scale).reshape(shape)
    steep = singular(kernel.reshape(matrix))
    assert steep[0] / steep[-1] > 10
    names = [*(["blocks"] if layered else []), *path.split("/"), "kernel"]
    tree = kernel[None].repeat(2, 0) if layered else kernel
    for name in reversed(names):
        tree = {name: tree}
    (_, after), _ = run(make("muon", 1.0, weight_decay=0.0)[0], jax.tree.map(np.zeros_like, tree), [tree])
    update = np.asarray(jax.tree.leaves(after)[0])
    update = (update[0] if layered else update).reshape(matrix)
    values = singular(update)
    assert values[0] / values[-1] < 3
    # consistent_rms: as large an update as one of Adam, 0.2 x sqrt(larger side) for each singular value.
    np.testing.assert_allclose(np.median(values), 0.2 * max(matrix) ** 0.5, rtol=0.35)


def test_muon_leaves_embeddings_heads_biases_and_scales_to_adam():
    params, gradients = network(), [network(seed) for seed in (20, 40)]
    muon = run(make("muon", weight_decay=0.0)[0], params, gradients)[0][-1]
    adam = run(make("adam", b1=0.9, b2=0.95, nesterov=True)[0], params, gradients)[0][-1]
    equal = jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-5)), muon, adam)
    differs = {path_of(keys) for keys, equal in jax.tree.leaves_with_path(equal) if not equal}
    assert differs == {"hidden_0/kernel", "blocks/mlp/up/kernel"}


# schedules


def curve(steps, **options):
    _, schedule = make("sgd", **options)
    return np.asarray(jax.jit(jax.vmap(schedule))(np.asarray(steps, np.int32)))


def test_warmup_rises_from_zero_to_the_peak():
    found = curve([0, 1, 5, 9, 10, 11, 99], learning_rate=2.0, warmup=10)
    np.testing.assert_allclose(found, [0, 0.2, 1.0, 1.8, 2.0, 2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 7])
def test_a_schedule_is_continuous_and_never_above_the_peak(schedule, warmup):
    found = curve(np.arange(1001), learning_rate=0.5, total_steps=1000, schedule=schedule, warmup=warmup)
    assert np.isclose(found[warmup], 0.5, rtol=1e-6)
    assert found.max() <= 0.5 * (1 + 1e-6) and found.min() >= 0
    assert np.all(np.diff(found[warmup:]) <= 1e-7)
    assert np.abs(np.diff(found[warmup:])).max() < 0.5 / 100
    assert curve([0], schedule=schedule, warmup=warmup)[0] == (0 if warmup else np.float32(0.1))


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1), ("linear", 0), ("cosine", 0), ("wsd", 0)])
def test_the_end_of_a_run(schedule, end):
    last, after = curve([100, 500], learning_rate=1.0, schedule=schedule, warmup=10)
    assert abs(last - end) < 1e-6 and abs(after - end) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_schedule_may_end_above_zero(schedule):
    np.testing.assert_allclose(curve([100], learning_rate=2.0, schedule=schedule, final=0.1), 0.2, rtol=1e-5)
    for steps in (7, 49, 1000, 9999):  # and never falls below that, however the division is rounded
        found = curve(np.arange(steps + 2), learning_rate=1.0, schedule=schedule, final=0.1, total_steps=steps)
        assert found.min() >= np.float32(0.1) * (schedule != "cosine" or 1 - 1e-6)


def test_cosine_and_linear_are_their_formulas():
    steps = np.arange(0, 101, 10)
    np.testing.assert_allclose(
        curve(steps, learning_rate=1.0, schedule="cosine"), (1 + np.cos(np.pi * steps / 100)) / 2, atol=1e-6
    )
    np.testing.assert_allclose(curve(steps, learning_rate=1.0, schedule="linear"), 1 - steps / 100, atol=1e-6)


def test_rsqrt_is_its_formula():
    steps = np.arange(0, 100, 7)
    found = curve(steps, learning_rate=3.0, schedule="rsqrt", timescale=20, warmup=14)
    after = np.maximum(steps - 14, 0)
    expected = 3 * np.where(steps < 14, steps / 14, np.sqrt(20 / (after + 20)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert curve([0], learning_rate=1.0, schedule="rsqrt", timescale=0)[0] == 1


def test_wsd_is_flat_and_then_falls():
    found = curve([0, 79, 80, 90, 100], learning_rate=1.0, schedule="wsd", decay=0.2)
    np.testing.assert_allclose(found, [1, 1, 1, 0.5, 0], atol=1e-6)
    found = curve([0, 79, 100], learning_rate=1.0, schedule="wsd", decay=0.0)
    np.testing.assert_allclose(found, [1, 1, 0], atol=1e-6)


def test_the_optimizer_follows_the_schedule_that_is_returned():
    tx, schedule = make("sgd", 0.5, schedule="cosine", total_steps=4, warmup=1, momentum=0.0)
    one = {"kernel": np.ones((2, 2), np.float32)}
    history, _ = run(tx, one, [one] * 4)
    steps = [float(a["kernel"][0, 0] - b["kernel"][0, 0]) for a, b in itertools.pairwise(history)]
    np.testing.assert_allclose(steps, [float(schedule(i)) for i in range(4)], rtol=1e-5, atol=1e-7)


# rules


def test_rules_set_multiplier_and_decay_and_the_first_one_holds():
    params = network()
    gradient = jax.tree.map(np.ones_like, params)
    rules = (
        ("head", {"learning_rate": 0.5}),
        ("embed", {"weight_decay": 0.25}),
        ("scale$", {"learning_rate": 0.0}),
        ("blocks|head", {"learning_rate": 10.0, "weight_decay": 0.0}),
    )
    tx, _ = make("sgd", 1.0, momentum=0.0, weight_decay=0.125, rules=rules)
    (_, after), _ = run(tx, params, [gradient])
    found = jax.tree.map(lambda a, b: np.asarray(a) - b, params, after)
    expected = jax.tree.map_with_path(lambda keys, x: np.ones_like(x), params)
    expected["head"]["kernel"] = 0.5 * (1 + 0.125 * params["head"]["kernel"])
    expected["embed"]["embedding"] = 1 + 0.25 * params["embed"]["embedding"]
    expected["hidden_0"]["kernel"] = 1 + 0.125 * params["hidden_0"]["kernel"]
    expected["blocks"]["mlp"]["up"] = {"kernel": 10 * np.ones((3, 5, 8)), "bias": 10 * np.ones((3, 8))}
    expected["blocks"]["norm_mlp"]["scale"], expected["norm"]["scale"] = np.zeros((3, 5)), np.zeros(5)
    same(found, expected, atol=1e-5)


def test_a_rules_own_decay_reaches_what_the_mask_leaves_out():
    params = {"bias": normal(3)}
    tx, _ = make("sgd", 1.0, rules=(("bias", {"weight_decay": 0.5}),))
    (_, after), _ = run(tx, params, [{"bias": np.zeros(3, np.float32)}])
    same(after, {"bias": params["bias"] / 2}, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_state(name):
    params, gradients = network(), [network(seed) for seed in (20, 40)]
    rules = (("embed|blocks", {"freeze": True}),)
    history, state = run(make(name, weight_decay=0.5, rules=rules)[0], params, gradients)
    frozen = ("embed", "blocks")
    for key in params:
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), params[key], history[-1][key])
        assert not any(jax.tree.leaves(moved)) if key in frozen else all(jax.tree.leaves(moved))
    held = [path_of(keys) for keys, x in jax.tree.leaves_with_path(state)]
    assert held and not [path for path in held if "embed" in path or "blocks" in path]

    # And the others move as if the frozen ones were not there.
    def rest(tree):
        return {k: v for k, v in tree.items() if k not in frozen}

    alone, _ = run(make(name, weight_decay=0.5)[0], rest(params), [rest(g) for g in gradients])
    same(rest(history[-1]), alone[-1], atol=1e-6)


def test_frozen_parameters_are_out_of_the_norm_that_clips():
    params = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    gradient = {"a": np.asarray([1, 0, 0], np.float32), "b": np.asarray([1e6, 0, 0], np.float32)}
    tx, _ = make("sgd", 1.0, clip_norm=1.0, rules=(("b", {"freeze": True}),))
    (_, after), _ = run(tx, params, [gradient])
    np.testing.assert_allclose(after["a"], [-1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (("hed", {"freeze": True}),),
            r"optim.rules: 'hed' matches no parameter. There are: blocks/mlp/up/bias, blocks",
        ),
        ((("head/kernal", {"freeze": True}),), r"Did you mean 'head/kernel'"),
        ((("head", {}), ("^mlp", {})), r"optim.rules: '\^mlp' matches no parameter"),
        ((("", {"freeze": True}),), r"optim.rules freeze all \d+ parameters, so nothing would train"),
    ],
)
def test_a_rule_that_is_a_slip_is_an_error(rules, message):
    tx, _ = make(rules=rules)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tx.init, network())


# averages


def test_the_average_is_its_recursion_and_evaluation_picks_it():
    params, gradients = network(), [network(seed) for seed in range(20, 80, 10)]
    history, state = run(make("sgd", 0.1, average=0.3)[0], params, gradients)
    plain, _ = run(make("sgd", 0.1)[0], params, gradients)
    same(history, plain)  # averaging does not touch training
    expected = params
    for i, new in enumerate(history[1:]):
        now = min(0.3, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda a, p, now=now: a + (1 - now) * (np.asarray(p) - a), expected, new)
    same(optim.parameters_average(state, history[-1]), expected, atol=1e-5)


def test_without_an_average_evaluation_takes_the_parameters():
    params = network()
    state = make("adamw", rules=(("embed", {"freeze": True}),))[0].init(params)
    assert optim.parameters_average(state, params) is params


def test_the_average_holds_frozen_parameters_as_they_are():
    params, gradients = network(), [network(20)]
    tx, _ = make("sgd", average=0.9, rules=(("embed", {"freeze": True}),))
    history, state = run(tx, params, gradients)
    average = optim.parameters_average(state, history[-1])
    same(average["embed"], params["embed"])
    assert not np.array_equal(average["head"]["kernel"], params["head"]["kernel"])


def test_the_average_does_not_share_memory_with_the_parameters():
    """A step donates both: one buffer can't be given twice."""
    params = jax.tree.map(jnp.asarray, {"kernel": normal(3, 3)})
    average = optim.parameters_average(make(average=0.9)[0].init(params), params)
    assert average["kernel"].unsafe_buffer_pointer() != params["kernel"].unsafe_buffer_pointer()


# moments in bfloat16

FIRST = {"adam": ("mu",), "adamw": ("mu",), "lion": ("mu",), "sgd": ("trace",), "muon": ("mu",)}


def moments(state):
    """Path -> leaf, of what is kept for each parameter."""
    leaves = {path_of(keys): x for keys, x in jax.tree.leaves_with_path(state)}
    return {path: x for path, x in leaves.items() if re.search("(kernel|bias|scale|embedding)$", path)}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_first_moments_may_be_bfloat16_and_second_ones_never_are(name):
    params = network()
    low, high = (
        moments(jax.eval_shape(make(name, moments=dtype)[0].init, params)) for dtype in ("bfloat16", "float32")
    )
    assert {path: x.shape for path, x in low.items()} == {path: x.shape for path, x in high.items()}
    assert {str(x.dtype) for x in high.values()} == {"float32"}
    for path, x in low.items():
        first = any(f"/{field}/" in f"/{path}/" for field in FIRST[name])
        assert first or "/nu/" in f"/{path}/", path
        assert x.dtype == ("bfloat16" if first else "float32"), path
    if "adam" in name:
        bytes_of = [sum(x.size * x.dtype.itemsize for x in found.values()) for found in (low, high)]
        assert bytes_of[0] == 0.75 * bytes_of[1]


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.1), ("sgd", 0.02), ("lion", 0.03)])
def test_moments_in_bfloat16_train_nearly_as_float32_and_keep_their_dtype(name, rate):
    params = {"dense": {"kernel": normal(4, 4) + 1, "bias": normal(4) + 1}}
    low, high = (quadratic(make(name, rate, moments=dtype)[0], params, steps=40) for dtype in ("bfloat16", "float32"))
    np.testing.assert_allclose(low, high, atol=0.03 * high[0])
    assert not np.array_equal(low, high)


def test_second_moments_of_bfloat16_parameters_do_not_stand_still():
    """With b2 = 0.999 one in bfloat16 would not fall: 0.1 % is less than half the distance to the next number."""
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    tx, _ = make("adam", moments="bfloat16")
    gradients = [{"kernel": jnp.full((2, 2), x, jnp.bfloat16)} for x in [1.0] + [0.0] * 20]
    _, state = run(tx, params, gradients)
    (second,) = (x for path, x in moments(state).items() if "/nu/" in f"/{path}/")
    np.testing.assert_allclose(second, 1e-3 * 0.999**20, rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "optax:scale_by_sign"])
def test_optimizers_without_first_moments_refuse_moments(name):
    with pytest.raises(
        UserError, match=rf"optim.moments='bfloat16': optim.name='{name}' has no first moments.*Leave it"
    ):
        make(name, moments="bfloat16")
    make(name, moments="float32")


def test_a_users_own_optimizer_is_told_of_moments(tmp_path, monkeypatch):
    (tmp_path / "my_moments.py").write_text(
        "import optax\ndef heavy(moments: str): return optax.trace(0.9, accumulator_dtype=moments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = make("my_moments:heavy", moments="bfloat16")[0].init({"kernel": normal(2, 2)})
    assert {str(x.dtype) for x in moments(state).values()} == {"bfloat16"}


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamm"}, r"optim.name='adamm' does not exist. Did you mean 'adam"),
        ({"moments": "float16"}, r"optim.moments='float16' has the wrong type: expected one of 'float32', 'bfloat16'"),
        ({"schedule": "cosin"}, r"optim.schedule='cosin' does not exist. Did you mean 'cosine'"),
        ({"warmup": 100}, r"optim.warmup=100 steps is not shorter than the run of 100 steps"),
        ({"rules": (("(", {}),)}, r"optim.rules: '\(' is not a regular expression"),
        ({"rules": (("head", {"lr": 1}),)}, r"optim.rules\['head'\].lr=1: unknown key"),
        ({"rules": (("head", {"freeze": 1}),)}, r"freeze=1 has the wrong type: expected True or False"),
        ({"rules": (("head", {"learning_rate": -1}),)}, r"learning_rate=-1 is out of range"),
        ({"rules": (("head", {"pattern": "x"}),)}, r"pattern='x': unknown key"),
        ({"momentun": 0.9}, r"optim.momentun=0.9: unknown key. Did you mean 'momentum'"),
        ({"momentum": 1.5}, r"optim.momentum=1.5 is out of range"),
        ({"final": 0.1}, r"optim.final=0.1: unknown key"),  # the constant schedule has no end
        ({"steps": 3}, r"optim.steps=3: unknown key"),
    ],
)
def test_make_refuses(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_no_option_belongs_to_an_optimizer_and_to_a_schedule():
    """A config gives them side by side; one of the same name would go to one and silently not to the other."""
    from flaxmodels import registry

    for direction in optim.OPTIMIZERS.values():
        for schedule in optim.SCHEDULES.values():
            both = [set(registry.parameters([f], ["moments"])) for f in (direction, schedule, optim.make)]
            assert not both[0] & both[1] and not both[0] & both[2] and not both[1] & both[2]


def test_a_users_own_optimizer_and_schedule(tmp_path, monkeypatch):
    (tmp_path / "my_optim.py").write_text(
        "import optax\n"
        "def signs(scale: float = 1.0): return optax.chain(optax.scale_by_sign(), optax.scale(scale))\n"
        "def half(steps, to: float = 0.5): return optax.constant_schedule(to)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tx, schedule = make("my_optim:signs", 1.0, scale=4.0, schedule="my_optim:half", to=0.25)
    params = {"kernel": np.zeros((2, 2), np.float32)}
    (_, after), _ = run(tx, params, [{"kernel": np.full((2, 2), 7, np.float32)}])
    np.testing.assert_allclose(after["kernel"], -1, rtol=1e-6)
    assert schedule(3) == 0.25
