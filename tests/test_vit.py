"""The vision transformer: its patches, its classes, and its refusals; the blocks have tests of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import sharding
from flaxmodels.models import build
from flaxmodels.models.vit import ViT
from flaxmodels.registry import UserError

SMALL = ViT(classes=5, patch=4, layers=2, width=16, heads=4)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def random_params(model, inputs=IMAGES, seed=0):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(inputs))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)


def run(model, params, inputs=IMAGES):
    return np.asarray(jax.jit(model.apply)(params, jnp.asarray(inputs)))


@pytest.mark.slow
def test_parameters_have_these_names_and_shapes():
    def shapes(model):
        leaves = jax.tree.leaves_with_path(random_params(model)["params"])
        return {"/".join(k.key for k in path): x.shape for path, x in leaves if path[0].key != "blocks"}

    common = {
        "patches/kernel": (48, 16), "patches/bias": (16,), "norm/scale": (16,), "norm/bias": (16,),
        "head/kernel": (16, 5), "head/bias": (5,),
    }  # fmt: skip
    assert shapes(SMALL) == common | {"class_token": (16,), "embed_positions/embedding": (7, 16)}
    assert shapes(SMALL.clone(pool="mean")) == common | {"embed_positions/embedding": (6, 16)}


@pytest.mark.slow
def test_patches_are_those_of_a_convolution():
    """Without blocks, classes of the mean are those of a convolution with strides as large as its window."""
    model = SMALL.clone(pool="mean", layers=1)
    params = random_params(model)["params"]
    for branch in (params["blocks"]["attention"]["out"], params["blocks"]["mlp"]["down"]):
        branch.update(kernel=0 * branch["kernel"], bias=0 * branch["bias"])
    convolution = nn.Conv(16, (4, 4), strides=(4, 4), padding="VALID")
    kernel = {"kernel": params["patches"]["kernel"].reshape(4, 4, 3, 16), "bias": params["patches"]["bias"]}
    places_BxTxD = np.asarray(convolution.apply({"params": kernel}, jnp.asarray(IMAGES))).reshape(2, 6, 16)
    places_BxTxD = places_BxTxD + np.asarray(params["embed_positions"]["embedding"])[None]
    centred = places_BxTxD - places_BxTxD.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True)) * np.asarray(params["norm"]["scale"])
    mean_BxD = (normed + np.asarray(params["norm"]["bias"])).mean(1)
    expected = mean_BxD @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(run(model, {"params": params}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_every_patch_counts_for_the_class():
    params = random_params(SMALL)
    gradient = jax.jit(jax.grad(lambda images: SMALL.apply(params, images)[0, 0]))(jnp.asarray(IMAGES))
    patches = np.abs(gradient[0]).reshape(2, 4, 3, 4, 3).max((1, 3, 4))
    assert (patches > 0).all() and not np.any(gradient[1])


@pytest.mark.nightly
def test_a_mesh_changes_nothing():
    images = np.concatenate([IMAGES] * 4)
    params = random_params(SMALL)
    mesh = sharding.make_mesh(data=4, tensor=2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        found = run(SMALL, params, jax.device_put(images, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(found, run(SMALL, params, images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_pixels_may_be_bytes_and_the_compute_bfloat16():
    images = jnp.zeros((2, 8, 12, 3), jnp.uint8)
    low = jax.eval_shape(SMALL.clone(dtype="bfloat16").apply, random_params(SMALL), images)
    assert (low.shape, low.dtype) == ((2, 5), jnp.float32)


def test_the_model_says_which_attention_it_has():
    said = ViT(classes=5, width=768, heads=12).chosen(sharding.make_mesh(), jnp.zeros((8, 224, 224, 3)))
    assert said == ("attention: xla (CPU, length 197, head size 64)",)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 8, 10, 3), np.float32), r"shape \(2, 8, 10, 3\).*sides that patch=4 divides"),
        (np.zeros((2, 8), np.float32), r"shape \(2, 8\): expected \(batch, height, width, channels\)"),
        ({"tokens": np.zeros((2, 8), np.int32)}, r"a dict with the keys tokens: this model takes one array"),
    ],
)
def test_what_is_no_image_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.init, jax.random.key(0), inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 0}, r"model: patch=0 must be at least 1"),
        ({"width": 20}, r"model: width=20 must be a multiple of heads=3"),
        ({"dropout": 1.0}, r"model: dropout=1.0 must be in \[0, 1\)"),
        ({"attention": "ring"}, r"model.attention='ring' has the wrong type"),
    ],
)
def test_build_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        build("vit", classes=3, **fields)
