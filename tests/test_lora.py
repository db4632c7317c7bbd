"""Factors beside matrices: what they compute, what trains, where the base lies, and how it is found again."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxmodels import basis, fingerprints, loop, lora, models, optim, sharding, shelf, state, step, stored, warm
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.evaluating import evaluate_checkpoint
from flaxmodels.fitting import Leaf
from flaxmodels.hub import adapters, families, tensor_files
from flaxmodels.inference import loading, merging
from flaxmodels.job import assemble
from flaxmodels.lora import Lora
from flaxmodels.registry import UserError
from flaxmodels.state import BASE
from flaxmodels.warm import Origin

SCALE = 0.3


class Kinds(nn.Module):
    """A matrix of each kind: of linear maps, of several axes in and out, in a scan, of a convolution, of its own."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="plain", dtype=self.dtype)(x)
        x = nn.DenseGeneral((2, 3), name="wide", dtype=self.dtype)(x)
        x = nn.DenseGeneral(6, axis=(-2, -1), name="narrow", dtype=self.dtype)(x)
        x = nn.DenseGeneral(2, axis=-1, batch_dims=(0,), name="rows", dtype=self.dtype)(x)
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=2
        )
        x, _ = layers(self.dtype, name="layers")(x)
        x = nn.Conv(4, (3,), name="conv", dtype=self.dtype)(x)
        own = self.param("own", nn.initializers.normal(0.5), (4, 3))
        return x.astype(jnp.float32) @ own + self.param("bias", nn.initializers.zeros, (3,))[None, None]


class Layer(nn.Module):
    """A linear map, for a scan."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(2, name="inner", dtype=self.dtype)(x)), None


OPTIONS = Lora(rank=2, alpha=2 * SCALE, targets=("kernel$", "own"), whole=("^bias$",))
# Inputs (B, T, 5) of `Kinds`.
X = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)


def filled(tree, seed=0):
    """The same with random numbers, since factors begin as a product of zero."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype) / 2, tree)


@pytest.fixture(scope="module")
def made():
    """(the module, what trains, the base) of `Kinds`."""
    model = lora.adapted(Kinds(), OPTIONS, "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return model, filled(shapes["params"], 1), filled(shapes[BASE], 2)


def test_what_is_adapted(made):
    _, params, base = made
    found = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    assert found == {
        "plain/kernel_lora_a": (5, 2), "plain/kernel_lora_b": (2, 6),
        "wide/kernel_lora_a": (6, 2), "wide/kernel_lora_b": (2, 2, 3),
        "narrow/kernel_lora_a": (2, 3, 2), "narrow/kernel_lora_b": (2, 6),
        "rows/kernel_lora_sum_a": (2, 6, 2), "rows/kernel_lora_sum_b": (2, 2, 2),
        "layers/inner/kernel_lora_a": (2, 2, 2), "layers/inner/kernel_lora_b": (2, 2, 2),
        "conv/kernel_lora_sum_a": (3, 2, 2), "conv/kernel_lora_sum_b": (3, 2, 4),
        "own_lora_sum_a": (4, 2), "own_lora_sum_b": (2, 3),
        "bias": (3,),
    }  # fmt: skip
    bare = jax.eval_shape(Kinds().init, jax.random.key(0), X)["params"]
    every = {path for path in flatten_dict(bare, sep="/") if path != "bias"}
    assert set(flatten_dict(base, sep="/")) == every


def test_factors_are_added_to_what_a_layer_gives():
    """In numbers: x W + b + alpha / rank * x A B."""
    model = lora.adapted(nn.Dense(3), Lora(rank=2, alpha=5.0, targets=("kernel",)), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    (params, base) = filled(shapes["params"], 1), filled(shapes[BASE], 2)
    found = jax.jit(lambda x: model.apply({"params": params, BASE: base}, x))(X)
    product = X @ params["kernel_lora_a"] @ params["kernel_lora_b"]
    np.testing.assert_allclose(found, X @ base["kernel"] + base["bias"] + 2.5 * product, atol=1e-5)


@pytest.mark.slow
def test_factors_compute_what_the_merged_matrix_does_and_so_do_their_gradients(made):
    model, params, base = made
    flat = flatten_dict(params, sep="/")
    begun = unflatten_dict({path: x * (not path.endswith("_b")) for path, x in flat.items()}, sep="/")

    def apart(params):
        return model.apply({"params": params, BASE: base}, X)

    def together(params):
        return Kinds().apply({"params": lora.merged(params, base, OPTIONS)}, X)

    def value_and_gradient(function, params):
        return jax.value_and_grad(lambda params: ((y := function(params)).var(), y), has_aux=True)(params)

    @jax.jit
    def everything():
        whole = lora.merged(params, base, OPTIONS)
        pairs = [value_and_gradient(function, params) for function in (apart, together)]
        return pairs, lora.unmerged(whole, params, OPTIONS), apart(begun), together(begun)

    (((_, one), grads), ((_, other), expected)), unmerged, first, bare = everything()
    np.testing.assert_allclose(one, other, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), grads, expected)
    assert all(np.any(x) for x in jax.tree.leaves(grads))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), unmerged, base)
    assert np.array_equal(first, bare) and not np.allclose(one, bare, atol=0.01)


def shapes_of_products(jaxpr):
    """Shapes of the results of all matrix products of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(eqn.outvars[0].aval.shape)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_of_products(inner)


def test_no_gradient_of_a_matrix_is_computed():
    model = lora.adapted(nn.Sequential([nn.Dense(6), nn.Dense(7)]), Lora(rank=2, targets=("kernel",)), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)

    def gradient(params, base):
        return jax.grad(lambda params: model.apply({"params": params, BASE: base}, X).sum())(params)

    found = set(shapes_of_products(jax.make_jaxpr(gradient)(shapes["params"], shapes[BASE]).jaxpr))
    assert not found & {(5, 6), (6, 5), (6, 7), (7, 6)}
    assert found & {(5, 2), (2, 5)} and found & {(2, 7), (7, 2)}


@pytest.mark.slow
def test_dropout_is_of_what_factors_see_and_in_training_only():
    """With W = 0 and A, B so that y = scale * sum(x), the mean over many rows is that, and its spread is known."""
    options = Lora(rank=1, alpha=1.0, targets=("kernel",), dropout=0.25)
    model = lora.adapted(nn.Dense(1), options, "float32")
    variables = {"params": {"kernel_lora_a": jnp.ones((16, 1)), "kernel_lora_b": jnp.ones((1, 1))}}
    variables[BASE] = {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)}
    x = jnp.ones((4096, 16))
    y = model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    # 16 draws of 0 or 4/3: the variance of their sum is 16/3.
    assert abs(y.mean() - 16) < 5 * (16 / 3 / 4096) ** 0.5 and 4.8 < y.var() < 5.9
    assert np.array_equal(model.apply(variables, x, train=False), jnp.full((4096, 1), 16.0))


@pytest.mark.slow
def test_statistics_of_the_module_come_back():
    """Collections other than parameters change in training, and the base does not."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    model = lora.adapted(Normed(), Lora(rank=1, targets=("kernel",)), "float32")
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), X)
    params = filled(shapes.pop("params"))
    extra = filled(shapes)
    apply = step.make_apply(model)
    _, after = apply(params, extra, X, train=True, rngs={})
    assert jax.tree.structure(after) == jax.tree.structure(extra)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y or np.array_equal(x, y), after[BASE], extra[BASE]))
    assert not np.array_equal(after["batch_stats"]["BatchNorm_0"]["mean"], extra["batch_stats"]["BatchNorm_0"]["mean"])


GPT2 = dict(
    vocab_size=50257, layers=12, width=768, heads=12, max_length=1024, norm="layer", positions="learned", mlp="gelu",
    tied_head=True, use_bias=True,
)  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((1, 8), "int32")


def test_at_most_a_fiftieth_trains():
    model = lora.adapted(models.build("transformer", **GPT2), Lora(rank=8), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    few, all_but_factors = (sum(x.size for x in jax.tree.leaves(shapes[name])) for name in ("params", BASE))
    assert all_but_factors == 124_439_808
    assert few == 12 * 8 * (4 * 2 * 768 + 2 * 5 * 768) and few / (few + all_but_factors) < 0.02
    (line,) = lora.report(shapes["params"], shapes)
    assert line == f"lora: {few:,} of {few + all_but_factors:,} parameters train (1.06%)"
    assert not lora.report(shapes["params"], {})


@pytest.mark.slow
def test_the_base_lies_as_it_would_if_it_trained():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    bare = models.build("transformer", vocab_size=64, layers=2, width=64, heads=4)
    model = lora.adapted(bare, Lora(rank=4, dtype="bfloat16"), "float32")
    rules = (("mlp/down/kernel", (None, None, "fsdp")),)
    plain, found = (state.init(module, optax.sgd(0.1), TOKENS, 0, mesh, rules)[1] for module in (bare, model))
    expected = {path: x.sharding.spec for path, x in flatten_dict(plain.params, sep="/").items()}
    assert {path: x.sharding.spec for path, x in flatten_dict(found.extra[BASE], sep="/").items()} == expected
    assert {x.dtype for x in jax.tree.leaves(found.extra)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("float32")}
    factors = {path: x.sharding.spec for path, x in flatten_dict(found.params["blocks"], sep="/").items()}
    assert factors["attention/query/kernel_lora_b"][2] == factors["mlp/up/kernel_lora_b"][2] == "tensor"
    assert factors["attention/out/kernel_lora_a"][1] == factors["mlp/down/kernel_lora_a"][1] == "tensor"


def test_a_module_that_casts_nothing_computes_in_the_dtype_of_the_policy():
    seen = []

    class Looking(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3)(x)
            seen.append((x.dtype, y.dtype))
            return y

    model = lora.adapted(Looking(), Lora(rank=1, targets=("kernel",)), "bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    seen.clear()
    jax.eval_shape(model.apply, shapes, X)
    assert seen == [(jnp.bfloat16, jnp.bfloat16)]
    assert lora.adapted(Kinds(), OPTIONS, "bfloat16").dtype is None
    assert lora.adapted(bare := Kinds(), Lora(), "bfloat16") is bare


def test_what_trains_itself_has_no_factors():
    options = Lora(rank=1, targets=("kernel",), whole=("^head/",))
    paths = ("body/kernel", "body/bias", "body/kernel_lora_a", "head/kernel", "head/bias")
    assert [options.adapts(path) for path in paths[:2] + paths[3:]] == [True, False, False, False]
    assert [options.trains(path) for path in paths] == [False, False, True, True, True]
    model = lora.adapted(nn.Dense(3), Lora(rank=1, targets=("kernel",), whole=(".",)), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    assert set(shapes) == {"params"} and set(shapes["params"]) == {"kernel", "bias"}
    assert jax.eval_shape(model.apply, shapes, X).shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(alpha=8.0), "lora.alpha is set, but lora.rank is not"),
        (dict(rank=2, targets=()), "lora.targets=() and lora.whole=() leave nothing to train"),
        (dict(rank=2, targets=("(",)), "lora.targets: '(' is no regular expression"),
        (dict(rank=2, whole=("*",)), "lora.whole: '*' is no regular expression"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Lora(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(targets=("kernel", "krenel")), "lora.targets: 'krenel' matches no matrix."),
        (dict(targets=("bias",)), "lora.targets: 'bias' matches no matrix."),
        (dict(targets=("kernel",), whole=("haed",)), "lora.whole: 'haed' matches no parameter."),
    ],
)
def test_patterns_that_match_nothing_are_refused(options, said):
    model = lora.adapted(nn.Dense(3), Lora(rank=2, **options), "float32")
    with pytest.raises(UserError, match=re.escape(said)):
        jax.eval_shape(model.init, jax.random.key(0), X)


@pytest.mark.slow
def test_a_fingerprint_is_of_every_bit_and_its_place_and_of_no_mesh():
    draw = np.random.default_rng(0)
    base = {"a": draw.normal(size=(8, 3)).astype(np.float32), "b": {"c": draw.normal(size=16).astype(jnp.bfloat16)}}
    known = fingerprints.of(base)
    mesh = sharding.make_mesh(fsdp=8)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert fingerprints.of(jax.tree.map(lambda x: jax.device_put(x, split), base)) == known

    def changed(path, change):
        flat = {name: x.copy() for name, x in flatten_dict(base, sep="/").items()}
        change(flat[path])
        return fingerprints.of(unflatten_dict(flat, sep="/"))

    def flipped(x, bit, at):
        x.reshape(-1).view(f"u{x.dtype.itemsize}")[at] ^= 1 << bit

    found = [changed("a", lambda x, bit=bit, at=at: flipped(x, bit, at)) for bit in (0, 17, 31) for at in (0, 11, 23)]
    found += [changed("b/c", lambda x, at=at: flipped(x, 15, at)) for at in (0, 15)]

    def swapped(x):
        x[[0, 5]] = x[[5, 0]]

    found += [changed(path, swapped) for path in ("a", "b/c")]
    found += [fingerprints.of({"a": base["b"]["c"], "b": {"c": base["a"]}})]
    assert len({known, *found}) == 1 + len(found)


STORED = {"params/body/kernel": Leaf((4, 8), "float32"), "params/head/kernel": Leaf((8, 10), "float32")}
WANTED = {
    "params/body/kernel_lora_a": Leaf((4, 2), "float32"),
    "params/body/kernel_lora_b": Leaf((2, 8), "float32"),
    "params/head/kernel": Leaf((8, 3), "float32"),
    "extra/base/body/kernel": Leaf((4, 8), "float32"),
}


def test_a_base_starts_from_what_trained_in_another_run():
    choice = warm.choose(Origin(workdir="a", fresh=("^params/head/",)), STORED, WANTED)
    assert choice.sources == {"extra/base/body/kernel": "params/body/kernel"}
    assert choice.fresh == ("params/head/kernel",) and choice.unused == ("params/head/kernel",)
    with pytest.raises(UserError, match=re.escape("params/head/kernel was (8, 10) float32, is (8, 3) float32")):
        warm.choose(Origin(workdir="a"), STORED, WANTED)
    renamed = {"params/trunk/kernel": STORED["params/body/kernel"]}
    options = dict(workdir="a", only="body", rename=(("trunk", "body"),))
    assert list(warm.choose(Origin(**options), renamed, WANTED).sources) == ["extra/base/body/kernel"]


def test_factors_of_another_run_are_taken_or_refused_but_never_lost():
    stored = (
        {path: leaf for path, leaf in WANTED.items() if "lora" in path}
        | STORED
        | {"params/head/kernel": WANTED["params/head/kernel"]}
    )
    assert len(warm.choose(Origin(workdir="a"), stored, WANTED).sources) == 4
    with pytest.raises(UserError, match=re.escape("was trained with lora, and this run has no such factors")):
        warm.choose(Origin(workdir="a"), stored, STORED)


@pytest.mark.parametrize("left_out", [True, False])
def test_factors_without_what_they_change_are_no_start(left_out):
    stored = {path: leaf for path, leaf in WANTED.items() if not (left_out and BASE in path)}
    with pytest.raises(UserError, match="holds factors of lora apart from the parameters that they change"):
        warm.choose(Origin(workdir="a"), stored, WANTED)
    only = Origin(workdir="a", only="lora|head")
    assert len(warm.choose(only, stored, WANTED).sources) == 3
    wide = WANTED | {"params/body/kernel_lora_a": Leaf((4, 3), "float32")}
    with pytest.raises(UserError, match=re.escape("params/body/kernel_lora_a was (4, 2) float32, is (4, 3) float32")):
        warm.choose(only, stored, wide)


def test_a_base_is_left_out_only_where_all_of_it_comes_from_elsewhere():
    extra = {BASE: {"body": {"kernel": jnp.ones((2, 3))}}}
    found = basis.described(Origin(workdir="a", fresh=("head",)), extra)
    assert found == {"fingerprint": fingerprints.of(extra[BASE]), "leaves": {"body/kernel": ((2, 3), "float32")}}
    assert basis.described(Origin(), extra) == basis.described(Origin(workdir="a"), {}) == {}
    assert basis.described(Origin(workdir="a", only="^params/head"), extra) == {}
    assert basis.described(Origin(workdir="a", fresh=("body",)), extra) == {}


def config(base=None, **sections):
    """A run of an MLP; with a workdir, one of factors that starts from it."""
    adapted = dict(lora=dict(rank=2, targets=("kernel",)), start=dict(workdir=str(base), step="latest"))
    common = dict(train=dict(duration=4, log_every=1, eval_every=2), checkpoint=dict(every=2, keep=9))
    common |= dict(optim=dict(average=0.9), data=dict(examples=64, test_examples=32))
    return small.config("mlp", **{**common, **(adapted if base else {}), **sections})


def fit(options, workdir, **allowed):
    """`loop.fit` on one device."""
    return loop.fit(options, workdir, devices=jax.devices()[:1], stream=io.StringIO(), **allowed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(workdir of a run, workdir of one of factors that started from it, how that ended)."""
    folder = tmp_path_factory.mktemp("runs")
    fit(config(), folder / "base")
    return folder / "base", folder / "factors", fit(config(folder / "base"), folder / "factors")


def half_of(workdir, to):
    """A copy of a workdir as it was in its middle."""
    shutil.copytree(workdir, to)
    shutil.rmtree(to / "checkpoints" / "4")
    return to


@pytest.mark.slow
def test_a_run_keeps_its_factors_only_and_goes_on_exactly(runs, tmp_path):
    base, factors, ended = runs
    held = {path for path in stored.tree(factors / "checkpoints" / "4") if path.startswith(("params", "extra"))}
    assert held and all(lora.is_factor(path) for path in held)
    trained = stored.arrays(base / "checkpoints" / "4", list(stored.tree(base / "checkpoints" / "4")))
    for path, x in flatten_dict(ended.state.extra[BASE], sep="/").items():
        assert np.array_equal(x, trained[f"params/{path}"]), path
    # The base has moved meanwhile, and was trained on; start.step=latest would be another one now.
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    fit(config(train=dict(duration=6), checkpoint=dict(every=2, keep=9)), moved, allow_config_change=True)
    again = fit(config(moved), half_of(factors, tmp_path / "half"))
    assert small.bits(again.state) == small.bits(ended.state)


@pytest.mark.slow
def test_another_base_is_refused(runs, tmp_path):
    other, half = tmp_path / "other", half_of(runs[1], tmp_path / "half")
    fit(config(seed=1), other)
    with pytest.raises(UserError, match="is not the base that these factors were trained with: its fingerprint is"):
        fit(config(other), half)
    with pytest.raises(UserError, match=r"start\.workdir=.* is not there"):
        fit(config(tmp_path / "none"), half)


@pytest.mark.slow
def test_a_stored_run_evaluates_and_loads_with_its_factors_in_their_matrices(runs):
    base, factors, ended = runs
    job = assemble(config(base), jax.devices()[:1])
    number, found, _ = evaluate_checkpoint(job, factors, "latest")
    assert number == 4
    assert {f"eval/{name}": value for name, value in found.items()}.items() <= ended.metrics.items()
    loaded = loading.load(factors, "latest", mesh=job.mesh)
    images = np.random.default_rng(0).normal(size=(8, *job.test.example()["inputs"].shape[1:])).astype(np.float32)
    averaged = optim.parameters_average(ended.state.opt_state, ended.state.params)
    apart, _ = step.make_apply(job.model)(averaged, ended.state.extra, images, train=False)
    np.testing.assert_allclose(loaded.model.apply({"params": loaded.params}, images), apart, atol=1e-5)
    assert set(flatten_dict(loaded.params)) == set(flatten_dict(job.abstract.extra[BASE])) and not loaded.extra


@pytest.mark.slow
def test_one_device_computes_what_eight_do():
    """A transformer's loss and the gradients of its factors, over all three axes of a mesh."""
    bare = models.build("transformer", vocab_size=32, layers=2, width=64, heads=4, mlp_width=64)
    model = lora.adapted(bare, Lora(rank=2, whole=("^head/",)), "float32")
    tokens = np.random.default_rng(3).integers(0, 32, (8, 8), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    values = filled(shapes)

    def loss(params, base, tokens):
        return jnp.mean(model.apply({"params": params, BASE: base}, tokens)[..., 0] ** 2)

    found = []
    for mesh in (sharding.make_mesh(data=2, fsdp=2, tensor=2), sharding.make_mesh(devices=jax.devices()[:1])):
        places = sharding.shard_tree(values, mesh, (), state.parameters(values["params"], values))
        given = (*jax.device_put((values["params"], values[BASE]), (places["params"], places[BASE])), tokens)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(*given)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *found)


LLAMA = dict(vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, mlp_width=24)


def test_an_adapter_of_peft_is_the_same_product():
    """B A, added to a matrix as `transformers` has it, is what merging makes of ours."""
    options = Lora(rank=2, alpha=3.0)
    model = lora.adapted(models.build("transformer", **LLAMA), options, "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    params, base = filled(shapes["params"], 1), filled(shapes[BASE], 2)
    fields = families.complete(LLAMA, "transformer")
    links, sizes = families.ARCHITECTURES["LlamaForCausalLM"].links(fields), families.sizes(fields)
    tensors, modules, turned = adapters.translated(flatten_dict(params, sep="/"), links)
    assert modules == {f"self_attn.{name}_proj" for name in "qkvo"} | {
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert len(tensors) == 2 * 2 * 7 and not turned
    whole, plain = (flatten_dict(tree, sep="/") for tree in (lora.merged(params, base, options), base))
    for link in links:
        for i, name in enumerate(link.names(2) if link.of_blocks else ()):
            one, other = (link.to_theirs(np.asarray(tree[link.ours][i]), sizes) for tree in (whole, plain))
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (tensors.get(f"{module}.lora_{kind}.weight") for kind in "AB")
            np.testing.assert_allclose(one, other if a is None else other + 1.5 * b @ a, atol=1e-5)
    gpt2 = families.ARCHITECTURES["GPT2LMHeadModel"].links(families.complete(GPT2, "transformer"))
    with pytest.raises(
        UserError, match=re.escape("blocks/attention/key/kernel is a part of transformer.h.{}.attn.c_attn")
    ):
        adapters.translated(flatten_dict(params, sep="/"), gpt2)
    with pytest.raises(UserError, match="head/kernel trained, which an adapter of PEFT can't hold"):
        adapters.translated({"head/kernel": np.ones((16, 32))}, links)


@pytest.mark.slow
def test_a_run_is_merged_into_a_workdir_like_any_other(runs, tmp_path):
    base, factors, _ = runs
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    entry = merging.merge(factors, "latest", tmp_path / "merged", mesh)
    one, other = (loading.load(folder, "latest", mesh=mesh) for folder in (factors, tmp_path / "merged"))
    assert entry.step == 4 and small.bits(one.params) == small.bits(other.params)
    assert not [key for key in other.config if key.startswith(("lora.", "start."))]
    begun = fit(config(start=dict(workdir=str(tmp_path / "merged"))), tmp_path / "next")
    assert begun.finished
    for workdir, to, said in ((base, "a", "has no factors"), (factors, "merged", "is there already")):
        with pytest.raises(UserError, match=said):
            merging.merge(workdir, "latest", tmp_path / to, mesh)


@pytest.mark.slow
def test_factors_are_written_as_peft_reads_them(tmp_path):
    options = Lora(rank=2)
    model = lora.adapted(models.build("transformer", **LLAMA), options, "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    params, base = filled(shapes["params"]), filled(shapes[BASE])
    begun = {"origin": "runs/a:3", "base": basis.described(Origin(workdir="runs/a"), {BASE: base})}
    settings = {f"lora.{key}": value for key, value in dataclasses.asdict(options).items()}
    meta = {"memory": begun, "model": {"name": "transformer", **LLAMA}, "config": settings}
    with contextlib.closing(Checkpoints(tmp_path / "run" / "checkpoints")) as checkpoints:
        checkpoints.save(state.TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params), {}, ()), 1, meta)
    adapters.release(shelf.find(tmp_path / "run", 1), tmp_path / "peft")
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["r"] == 2 and said["lora_alpha"] == 16 and said["base_model_name_or_path"] == "runs/a:3"
    assert "self_attn.q_proj" in said["target_modules"] and said["task_type"] == "CAUSAL_LM"
    tensors = tensor_files.tensors(tmp_path / "peft" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert [tensors[name.format(kind)].leaf.shape for kind in "AB"] == [(2, 16), (16, 2)]
    assert len(tensors) == 2 * 2 * 7
