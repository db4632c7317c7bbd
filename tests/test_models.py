"""MLP, CNN, ResNet, and models by name."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxmodels.models import MODELS, build
from flaxmodels.models.cnn import CNN, max_pool
from flaxmodels.models.mlp import MLP
from flaxmodels.models.resnet import ResNet
from flaxmodels.registry import UserError


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fill(model, inputs):
    """Variables for `model` with random kernels: many times faster than compiling its own initialization."""
    start = {"bias": 0, "mean": 0, "scale": 1, "var": 1}

    def leaf(path, x):
        name = path[-1].key
        return jnp.full(x.shape, start[name], x.dtype) if name in start else 0.3 * normal(*x.shape)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), inputs))


def run(model, variables, inputs, **options):
    return jax.jit(lambda variables, inputs: model.apply(variables, inputs, **options))(variables, inputs)


# build


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_its_model(name):
    fields = {"vocab_size": 5} if name in ("transformer", "classifier", "bert", "bert_classifier") else {}
    fields |= {} if name in ("transformer", "bert") else {"classes": 3}
    model = build(name, **fields)
    assert type(model).__module__ == f"flaxmodels.models.{name.partition('_')[0]}"
    assert all(getattr(model, key) == value for key, value in fields.items())


def test_build_turns_lists_into_tuples():
    assert build("mlp", classes=3, hidden=[4, 5]).hidden == (4, 5)


def test_a_users_module_is_named_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "import flax.linen as nn\n"
        "class Mine(nn.Module):\n"
        "    width: int = 7\n"
        "    @nn.compact\n"
        "    def __call__(self, inputs, train=False):\n"
        "        return nn.Dense(self.width)(inputs)\n"
        "def not_a_class(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build("my_nets:Mine", width=3)
    assert model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape == (2, 3)
    with pytest.raises(UserError, match=r"my_nets:not_a_class.*expected a class that derives from flax.linen.Module"):
        build("my_nets:not_a_class")
    with pytest.raises(UserError, match=r"has no 'Mime'. Did you mean 'Mine'"):
        build("my_nets:Mime")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mpl", {"classes": 3}, r"model.name='mpl' does not exist. Did you mean 'mlp'\? There are: bert, bert_cl"),
        ("no_such_package:Net", {}, r"there is no module 'no_such_package'"),
        ("json:dumps", {}, r"json:dumps.*expected a class that derives from flax.linen.Module"),
        ("collections:OrderedDict", {}, r"expected a class that derives from flax.linen.Module"),
        ("mlp", {"classes": 3, "hiden": (4,)}, r"model.hiden=\(4,\): unknown key. Did you mean 'hidden'"),
        ("mlp", {"classes": 3, "parent": None}, r"model.parent=None: unknown key"),
        ("mlp", {}, r"model.classes is not set"),
        ("mlp", {"classes": "ten"}, r"model.classes='ten' has the wrong type: expected an integer"),
        (
            "mlp",
            {"classes": 3, "activation": "rely"},
            r"model.activation='rely' has the wrong type: expected one of 'relu'",
        ),
        ("mlp", {"classes": 3, "dtype": "float8"}, r"expected one of 'float32', 'bfloat16'"),
        ("mlp", {"classes": 0}, r"model: classes=0 must be at least 1"),
        ("mlp", {"classes": 3, "hidden": (4, 0)}, r"model: hidden=\(4, 0\) must be at least 1"),
        ("mlp", {"classes": 3, "dropout": 1.0}, r"model: dropout=1.0 must be in \[0, 1\)"),
        ("cnn", {"classes": 3, "features": (0,)}, r"model: features=\(0,\) must be at least 1"),
        ("cnn", {"classes": 3, "pool": 0}, r"model: pool=0 must be at least 1"),
        ("cnn", {"classes": 3, "dropout": 1.5}, r"model: dropout=1.5 must be in \[0, 1\)"),
        ("resnet", {"classes": 3, "stages": ()}, r"model: stages=\(\) must be at least 1, and there must be a stage"),
    ],
)
def test_build_refuses(name, fields, message):
    with pytest.raises(UserError, match=message):
        build(name, **fields)


def test_only_the_model_that_is_picked_is_imported():
    code = (
        "import sys; from flaxmodels.models import build; build('mlp', classes=2)\n"
        "print(*sorted(m for m in sys.modules if m.startswith('flaxmodels.models.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["flaxmodels.models.mlp"]


# All of them


IMAGES = normal(2, 8, 8, 3)
SMALL = [
    MLP(3, hidden=(5,)),
    MLP(3, hidden=()),
    CNN(3, features=(4, 5), dense=6),
    CNN(3, features=(4,), dense=6, norm="layer", activation="gelu"),
    CNN(3, features=(4,), dense=6, norm="batch"),
    ResNet(3, stages=(1, 1), width=4),
]


@pytest.mark.parametrize("model", SMALL, ids=lambda m: type(m).__name__)
@pytest.mark.slow
def test_logits_and_parameters_stay_float32_when_the_compute_is_bfloat16(model):
    variables = fill(model, IMAGES)
    exact = run(model, variables, IMAGES)
    low = model.clone(dtype="bfloat16")
    rough = run(low, variables, IMAGES)
    state = jax.eval_shape(low.init, jax.random.key(0), IMAGES)
    assert exact.shape == (2, 3)
    assert rough.dtype == exact.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(rough, exact, atol=0.03 * np.abs(exact).max())
    assert not np.array_equal(rough, exact)


@pytest.mark.parametrize("model", SMALL, ids=lambda m: type(m).__name__)
def test_integer_pixels_are_the_same_as_float_ones(model):
    pixels = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.uint8).reshape(2, 8, 8, 3)
    variables = fill(model, IMAGES)
    np.testing.assert_array_equal(run(model, variables, pixels), run(model, variables, pixels.astype(jnp.float32)))


@pytest.mark.parametrize("model", [MLP(3), CNN(3), ResNet(3)], ids=lambda m: type(m).__name__)
def test_a_dict_of_inputs_is_refused(model):
    inputs = {"tokens": np.zeros((2, 8), np.int32), "segments": np.ones((2, 8), np.int32)}
    message = r"inputs are a dict with the keys (tokens, segments|segments, tokens): .* one array. .* the transformer"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), inputs)


# MLP


@pytest.mark.slow
def test_mlp_learns_xor():
    x, y = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32), jnp.array([0, 1, 1, 0])
    model, tx = MLP(2, hidden=(16,)), optax.adam(0.05)
    params = fill(model, x)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    assert loss(params) < 0.02
    assert (model.apply(params, x).argmax(-1) == y).all()


def test_mlp_flattens_all_but_the_batch():
    variables = fill(MLP(3), jnp.ones((2, 12)))
    x = normal(2, 2, 3, 2)
    np.testing.assert_array_equal(MLP(3).apply(variables, x), MLP(3).apply(variables, x.reshape(2, 12)))


def dropped(model, params, train):
    # All activations are 1 and the head is the identity: the logits are what dropout made of them.
    return model.apply(params, jnp.ones((8, 1)), train, rngs={"dropout": jax.random.key(1)})


def test_dropout_has_its_rate_in_training_and_is_off_otherwise():
    width, rate = 512, 0.2
    model = MLP(width, hidden=(width,), dropout=rate)
    layers = {"hidden_0": {"kernel": jnp.ones((1, width)), "bias": jnp.zeros(width)}}
    layers["head"] = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    params = {"params": layers}
    np.testing.assert_array_equal(dropped(model, params, train=False), 1)
    kept = dropped(model, params, train=True)
    np.testing.assert_allclose(kept[kept != 0], 1 / (1 - rate), rtol=1e-6)
    assert abs((kept == 0).mean() - rate) < 4 * (rate * (1 - rate) / kept.size) ** 0.5  # four standard deviations


# CNN


@pytest.mark.parametrize(
    ("shape", "p"), [((2, 8, 8, 3), 2), ((2, 6, 9, 2), 3), ((2, 7, 8, 3), 2), ((1, 34, 34, 1), 17)]
)
@pytest.mark.slow
def test_max_pool_and_its_gradient_are_those_of_linen(shape, p):
    def linen(x):
        return nn.max_pool(x, window_shape=(p, p), strides=(p, p))

    x = normal(*shape)
    y, pull = jax.vjp(lambda x: max_pool(x, p), x)
    y_linen, pull_linen = jax.vjp(linen, x)
    g = normal(*y.shape, seed=1)
    np.testing.assert_array_equal(y, y_linen)
    np.testing.assert_allclose(pull(g)[0], pull_linen(g)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_pool_gives_the_gradient_of_ties_to_one_place(dtype):
    x = jnp.zeros((2, 4, 4, 3), dtype)
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(x)
    assert gradient.dtype == x.dtype
    np.testing.assert_array_equal(gradient.reshape(2, 2, 2, 2, 2, 3).sum((2, 4)), 1)
    assert set(np.unique(gradient.astype(jnp.float32))) == {0, 1}


def test_max_pool_of_nan_is_nan():
    assert jnp.isnan(max_pool(jnp.zeros((1, 2, 2, 1)).at[0, 1, 0, 0].set(jnp.nan), 2)).all()


def test_cnn_layers_are_named_and_sized_by_its_fields():
    params = jax.eval_shape(CNN(10).init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))["params"]
    kernels = {name: layer["kernel"].shape for name, layer in params.items()}
    assert kernels == {
        "conv_0": (3, 3, 1, 32),
        "conv_1": (3, 3, 32, 64),
        "dense": (7 * 7 * 64, 128),
        "head": (128, 10),
    }


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 3, 8, 1), (2, 192)])
def test_cnn_names_the_shape_it_refuses(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, height, width, channels\), and sides of at least .*=4"):
        CNN(3, features=(4, 4)).init(jax.random.key(0), jnp.ones(shape))


def test_resnet_names_the_shape_it_refuses():
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 192\): expected \(batch, height, width, channels\)"):
        ResNet(3).init(jax.random.key(0), jnp.ones((2, 192)))


# Batch norm


@pytest.mark.parametrize("model", [CNN(3, features=(4,), dense=6, norm="batch"), SMALL[-1]], ids=["cnn", "resnet"])
def test_batch_statistics_change_in_training_only(model):
    variables = fill(model, IMAGES)
    before = variables["batch_stats"]
    _, same = run(model, variables, IMAGES, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], before)
    _, after = run(model, variables, IMAGES, train=True, mutable=["batch_stats"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), after["batch_stats"], before)
    assert all(jax.tree.leaves(changed))


def test_running_averages_move_a_tenth_of_the_way():
    model = CNN(3, features=(4,), dense=6, norm="batch")
    variables = fill(model, IMAGES)
    _, after = run(model, variables, IMAGES, train=True, mutable=["batch_stats"])
    conv = nn.Conv(4, (3, 3), use_bias=False).apply({"params": variables["params"]["conv_0"]}, IMAGES)
    stats = after["batch_stats"]["norm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-4)


# ResNet


def test_resnet_halves_the_sides_and_doubles_the_channels_in_each_stage():
    model = ResNet(3, stages=(2, 1, 1), width=4)
    _, state = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES, capture_intermediates=True))
    shapes = {name: x["__call__"][0].shape for name, x in state["intermediates"].items() if name.startswith("stage")}
    assert shapes == {
        "stage_0_block_0": (2, 8, 8, 4),
        "stage_0_block_1": (2, 8, 8, 4),
        "stage_1_block_0": (2, 4, 4, 8),
        "stage_2_block_0": (2, 2, 2, 16),
    }


def test_a_new_resnet_block_passes_its_input_through():
    model = ResNet(3, stages=(2,), width=4)
    _, state = model.init_with_output(jax.random.key(0), IMAGES, capture_intermediates=True)
    x = nn.relu(state["intermediates"]["norm_stem"]["__call__"][0])
    np.testing.assert_array_equal(state["intermediates"]["stage_0_block_1"]["__call__"][0], x)
