"""Weights for generation: codes stand for what was given, products are exact but for that, and no kernel is float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import sharding
from flaxmodels.inference import weights
from flaxmodels.models.transformer import Transformer, unstack

SMALL = dict(vocab_size=61, layers=2, width=32, heads=4, max_length=16)
FORMS = {
    "gpt2": dict(norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True),
    "llama": dict(kv_heads=2),
    "biased": dict(head_bias=True, qkv_bias=True, head_softcap=5.0),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def model_of(form):
    """A model, and parameters that are far from those it would begin with."""
    model = Transformer(**SMALL, **FORMS[form])
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])
    draw = np.random.default_rng(0).normal
    return model, jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), jnp.float32) * 0.1, like)


def logits_of(model, params, tokens):
    with weights.reading():
        return np.asarray(jax.jit(lambda params: model.apply({"params": params}, tokens))(params))


TOKENS = np.random.default_rng(1).integers(0, 61, (2, 6)).astype(np.int32)


# --- kernels


@pytest.mark.parametrize(("shape", "inputs"), [((8, 3, 2), 1), ((3, 2, 8), 2)])
def test_a_kernel_is_rounded_to_the_nearest_code(shape, inputs):
    kernel = normal(*shape)
    made = weights.round_kernel(jnp.asarray(kernel), inputs)
    codes, scale = np.asarray(made["codes"]), np.asarray(made["scale"])
    assert codes.dtype == np.int8 and codes.shape == shape[inputs:] + shape[:inputs]
    assert scale.shape == shape[inputs:] and scale.dtype == np.float32
    outputs = codes.ndim - inputs
    stands_for = codes * scale.reshape(*scale.shape, *(1,) * inputs)
    expected = np.moveaxis(kernel, range(inputs), range(outputs, kernel.ndim))
    assert np.all(np.abs(stands_for - expected) <= scale.max() / 2 * 1.001)
    assert np.all(np.abs(codes).reshape(*scale.shape, -1).max(-1) == 127), (
        "the largest of each output has the last code"
    )


def test_outputs_without_weights():
    made = weights.round_kernel(jnp.zeros((4, 3)), 1)
    assert not np.any(made["codes"]) and not np.any(made["scale"])
    assert not np.any(weights.product(jnp.ones((2, 4)), made["codes"], made["scale"]))


@pytest.mark.parametrize(("rows", "form"), [(1, "digits"), (5, "digits"), (5, "floats")])
def test_a_product_keeps_15_bits_of_activations(rows, form, monkeypatch):
    """Also of a row in which one activation is far larger than others; a row of zeros gives zeros."""
    if form == "floats":  # of other devices than CPUs
        monkeypatch.setattr(weights, "_by_digits", weights._by_floats)
    x, codes = normal(rows, 7, 2, 24), np.random.default_rng(1).integers(-127, 128, (5, 3, 2, 24)).astype(np.int8)
    x[0, 0], x[0, 1, 0, 3] = 0, 1000.0
    scale = np.abs(normal(5, 3))
    found = np.asarray(jax.jit(weights.product)(x, codes, scale))
    assert found.shape == (rows, 7, 5, 3) and found.dtype == np.float32
    exact = np.einsum("rtih,noih->rtno", x.astype(np.float64), codes.astype(np.float64)) * scale
    most = np.abs(x).max((2, 3))[..., None, None] * np.abs(codes.astype(np.float64)).sum((2, 3)) * scale
    assert np.all(np.abs(found - exact) <= most * 2.0**-15 + 1e-6)
    assert not np.any(found[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_no_kernel_is_made_in_float32(rows):
    """The program reads codes; were it to make them floats first, it would move five times as many bytes."""
    given = (jax.ShapeDtypeStruct((rows, 96), "float32"), jax.ShapeDtypeStruct((160, 96), "int8"))
    program = jax.jit(weights.product).lower(*given, jax.ShapeDtypeStruct((160,), "float32")).compile().as_text()
    assert "s8[160,96]" in program
    for dtype in ("f32", "bf16", "s32"):
        assert f"{dtype}[160,96]" not in program and f"{dtype}[96,160]" not in program


# --- models


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS][1:])
def test_a_rounded_model_is_the_model_of_its_codes(form):
    """Against the same model in float32 whose kernels are what the codes stand for."""
    model, params = model_of(form)
    apart, rounded = weights.prepare(model, params, "int8")
    assert not apart.stacked
    found = logits_of(apart, rounded, TOKENS)

    def stands_for(given, made, name=""):
        if "codes" not in made:
            return {
                key: stands_for(given[key], made[key], key) if isinstance(x, dict) else x for key, x in given.items()
            }
        codes, scale = made["codes"], made["scale"]
        inputs = codes.ndim - scale.ndim
        kernel = np.moveaxis(
            codes * scale.reshape(*scale.shape, *(1,) * inputs), range(scale.ndim), range(-scale.ndim, 0)
        )
        return {**given, "kernel": kernel}

    plain = unstack(params)
    equal = stands_for(plain, rounded)
    expected = logits_of(apart, equal, TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    near = logits_of(model, params, TOKENS)
    assert np.abs(found - near).max() < 0.06 * np.abs(near).max() and np.abs(found - near).max() > 0


@pytest.mark.slow
def test_given_weights_give_the_same_numbers():
    model, params = model_of("biased")
    apart, kept = weights.prepare(model, params)
    expected = logits_of(model, params, TOKENS)
    np.testing.assert_allclose(logits_of(apart, kept, TOKENS), expected, atol=1e-5)
    again, same = weights.prepare(apart, kept)
    assert again is apart and same == kept


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["given", "int8"])
@pytest.mark.parametrize("form", ["gpt2", "biased"])
def test_the_head_by_itself(form, precision):
    """`logits` of features are those of the whole model, whose head is tied or has a bias."""
    model, params = model_of(form)
    apart, made = weights.prepare(model, params, precision)
    apart = apart.clone(head_softcap=0.0)

    @jax.jit
    def both(made):
        with weights.reading():
            split = apart.clone(split_head=True).apply({"params": made}, TOKENS)
            return weights.logits(split["features"], made, split["kernel"]), apart.apply({"params": made}, TOKENS)

    found, expected = both(made)
    if precision == "int8" and not model.tied_head:
        assert "kernel" not in made["head"]
    tolerance = 1e-5 if precision == "given" else 0.02  # tied: the whole model multiplies by the embedding
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
def test_codes_lie_where_their_kernels_did():
    """On eight devices as on one."""
    model, params = model_of("llama")
    expected = logits_of(*weights.prepare(model, params, "int8"), TOKENS)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    places = sharding.shard_tree(jax.eval_shape(lambda: params), mesh)
    apart, made = weights.prepare(model, jax.device_put(params, places), "int8")
    kernel = NamedSharding(mesh, P(*places["blocks"]["attention"]["query"]["kernel"].spec[1:]))
    query = made["blocks_0"]["attention"]["query"]
    assert kernel.shard_shape((32, 4, 8)) == tuple(np.roll(query["codes"].sharding.shard_shape((4, 8, 32)), 1))
    assert query["codes"].sharding.shard_shape((4, 8, 32))[0] == 2, "heads over tensor"
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits_of(apart, made, TOKENS), expected, atol=1e-3)
