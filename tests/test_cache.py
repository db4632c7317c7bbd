"""The memory of generation: what is computed with it is what would be computed without."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import sharding
from flaxmodels.inference import cache
from flaxmodels.models.mlp import MLP
from flaxmodels.models.transformer import Transformer
from flaxmodels.registry import UserError

SIZES = {"vocab_size": 32, "layers": 2, "width": 16, "heads": 4, "max_length": 32}
LLAMA = Transformer(**SIZES, kv_heads=2, qkv_bias=True, qk_norm=True, rope_scaling=(8.0, 1.0, 4.0, 16))
GPT2 = Transformer(**SIZES, norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True)
GEMMA = Transformer(
    **SIZES, kv_heads=2, head_size=8, windows=(4, 0), softcap=5.0, head_softcap=3.0, query_scale=0.3, embed_scale=True,
    norm_plus_one=True, post_norms=True, mlp="geglu", tied_head=True,
)  # fmt: skip
MISTRAL = Transformer(**SIZES, kv_heads=2, windows=(6,))
# Each on a mesh of its own, and one of them with layers that are not stacked.
MODELS = {
    "llama": (LLAMA, {"data": 1}),
    "gpt2": (GPT2.clone(stacked=False), {"data": 4, "fsdp": 1, "tensor": 2}),
    "gemma": (GEMMA, {"data": 1, "fsdp": 1, "tensor": 8}),  # more than its heads
}
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 24))


def random_params(model, seed=0):
    """Every parameter drawn anew, so that no bias is zero and no scale is one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


def pieces(sizes, lengths=(24,) * 4):
    """Tokens and positions (4, T) of calls of so many places; rows have only their first tokens, then padding."""
    start = 0
    for size in sizes:
        places = np.tile(np.arange(start, start + size), (4, 1))
        real = places < np.array(lengths)[:, None]
        yield np.where(real, TOKENS[:, start : start + size], 0), np.where(real, places, cache.EMPTY)
        start += size


def with_cache(model, params, sizes, slots, lengths=(24,) * 4, axes=None):
    """Logits (4, T, V) of calls of `sizes` places one after the other on a mesh, and the last cache."""
    axes = axes or {"data": 1}
    mesh = sharding.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    like = cache.abstract(model, 4, slots, mesh)
    held, found = cache.empty(like), []
    params = jax.device_put(params, sharding.shard_tree(params, mesh))
    out = (sharding.replicated(mesh), jax.tree.map(lambda x: x.sharding, like))

    @functools.partial(jax.jit, out_shardings=out)
    def call(params, held, tokens, positions):
        return model.apply({"params": params}, {"tokens": tokens, "positions": positions}, cache=held)

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        for tokens, positions in pieces(sizes, lengths):
            logits, held = call(params, held, tokens, positions)
            found.append(np.asarray(logits))
    return np.concatenate(found, 1), held


def without(model, params, tokens=TOKENS):
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(tokens)))(params))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name == "llama")) for name in MODELS]
)
def test_with_a_cache_as_without(name):
    """Read in pieces, then token by token; rows of unequal length, and the rest is padding."""
    (model, axes), lengths = MODELS[name], (20, 17, 5, 20)
    params = random_params(model)
    expected = without(model, params)
    found, held = with_cache(model, params, [9, 9, 1, 1], 32, lengths, axes)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=1e-5)
        assert held["places"][row].tolist() == [*range(length), *[cache.EMPTY] * (32 - length)]


@pytest.mark.slow
def test_a_ring_as_small_as_the_window_is_enough():
    """What a window no longer sees is written over; also where a call is as long as the ring. On eight devices."""
    params = random_params(MISTRAL)
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    found, held = with_cache(MISTRAL, params, [6, 6, 1, 1, 1, 1, 6, 1, 1], 6, axes=axes)
    np.testing.assert_allclose(found, without(MISTRAL, params), atol=1e-5)
    assert sorted(held["places"][0].tolist()) == list(range(18, 24))
    assert held["blocks"]["key"].sharding.shard_shape((2, 4, 2, 6, 4)) == (2, 1, 1, 6, 4)


@pytest.mark.nightly
def test_in_bfloat16():
    model = GPT2.clone(dtype="bfloat16")
    params = random_params(model)
    found, held = with_cache(model, params, [8, 1, 1], 16)
    assert held["blocks"]["key"].dtype == jnp.bfloat16
    expected = without(model, params)
    np.testing.assert_allclose(found, expected[:, :10], atol=0.02 * np.abs(expected).max())


def held_by(axis):
    """A cache of three rows and two slots whose row i holds i, with layers on `axis` 0 or in a tuple."""
    rows = np.arange(3.0)[:, None, None, None] * np.ones((3, 2, 1, 1))
    block = {"key": rows[None], "value": rows[None]} if axis else ({"key": rows, "value": rows},)
    return {"places": np.arange(6).reshape(3, 2), "blocks": block}


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_change_places(axis):
    found = cache.reorder(held_by(axis), np.array([2, 0, 0]))
    assert found["places"].tolist() == [[4, 5], [0, 1], [0, 1]]
    block = found["blocks"] if axis else found["blocks"][0]
    for array in block.values():
        assert np.moveaxis(array, axis, 0).reshape(3, -1)[:, 0].tolist() == [2.0, 0.0, 0.0]


def test_how_many_slots_are_needed():
    assert cache.slots(LLAMA, 30) == cache.slots(GEMMA, 30) == 30
    assert cache.slots(MISTRAL, 30) == 6 and cache.slots(MISTRAL, 4) == 4


def test_what_can_not_generate_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match="keeps no cache"):
        cache.abstract(MLP(classes=2), 1, 4, mesh)
    with pytest.raises(UserError, match="sees what follows"):
        cache.abstract(LLAMA.clone(causal=False), 1, 4, mesh)
