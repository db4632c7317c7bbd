"""BERT and the classifiers: what they add to the transformer's blocks, whose own tests are elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels.models import build
from flaxmodels.models.bert import Bert, BertClassifier
from flaxmodels.models.classifier import TextClassifier
from flaxmodels.models.transformer import Transformer
from flaxmodels.registry import UserError

SIZES = {"vocab_size": 16, "layers": 2, "width": 16, "heads": 4, "max_length": 8}
TOKENS = np.arange(16).reshape(2, 8) * 3 % 16
LENGTHS = np.array([8, 5])


def random_params(model, seed=0):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)


def padded(tokens=TOKENS):
    """Rows of which the second ends in padding."""
    places = np.tile(np.arange(8), (2, 1))
    segments = (places < LENGTHS[:, None]).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "positions": jnp.asarray(places)}


def run(model, params, inputs):
    return np.asarray(jax.jit(model.apply)(params, inputs))


@pytest.mark.slow
def test_what_stands_in_padding_changes_nothing():
    params, other = random_params(Bert(**SIZES)), np.where(np.arange(8) < LENGTHS[:, None], TOKENS, 0)
    first, second = (run(Bert(**SIZES), params, padded(tokens)) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1, :5], second[1, :5])
    assert not np.array_equal(first[1, 5:], second[1, 5:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [padded(), pytest.param(jnp.asarray(TOKENS), marks=pytest.mark.nightly)], ids=["padded", "whole"]
)
def test_a_row_is_pooled_from_its_real_tokens(inputs):
    body = Transformer(**SIZES, split_head=True, tied_head=True)
    params = random_params(body)["params"]
    heads = {"head": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}  # so that outputs are pooled features
    pools = ("last", "first", "mean")

    @jax.jit
    def every():
        pooled = [
            TextClassifier(**SIZES, classes=16, pool=pool).apply({"params": params | heads}, inputs) for pool in pools
        ]
        return body.apply({"params": params}, inputs)["features"], *pooled

    features, *pooled = every()
    lengths = LENGTHS if isinstance(inputs, dict) else [8, 8]
    rows = [x[:n] for x, n in zip(np.asarray(features), lengths, strict=True)]
    expected = [np.stack([row[-1] for row in rows]), np.stack([row[0] for row in rows])]
    for found, wanted in zip(pooled, [*expected, np.stack([row.mean(0) for row in rows])], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("pooler", ["tanh", "relu"])
def test_a_pooler_is_a_dense_layer_of_the_pooled_features(pooler):
    model = BertClassifier(**SIZES, classes=3, pooler=pooler)
    params = random_params(model)["params"]
    identity = {"head": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    plain = BertClassifier(**SIZES, classes=16, pooler=None)
    first_BxD = run(plain, {"params": params | identity}, padded())
    dense = first_BxD @ params["pooler"]["kernel"] + params["pooler"]["bias"][None]
    first_BxD = np.tanh(dense) if pooler == "tanh" else np.maximum(dense, 0)
    expected = first_BxD @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(run(model, {"params": params}, padded()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_that_learned_from_text_fit_a_classifier():
    def shapes(model):
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
        return {"/".join(k.key for k in path): x.shape for path, x in jax.tree.leaves_with_path(params)}

    for first, second in (
        (Bert(**SIZES), BertClassifier(**SIZES, classes=3)),
        (Transformer(**SIZES), TextClassifier(**SIZES, classes=3, pooler="relu")),
    ):
        old, new = shapes(first), shapes(second)
        own = {path for path in new if path.split("/")[0] in ("head", "pooler")}
        assert own == {"head/kernel", "head/bias", "pooler/kernel", "pooler/bias"}
        assert {path: new[path] for path in set(new) - own} == {
            path: shape for path, shape in old.items() if not path.startswith(("head", "transform"))
        }
    assert shapes(BertClassifier(**SIZES, classes=3))["head/kernel"] == (16, 3)


@pytest.mark.slow
def test_without_types_there_is_no_embedding_of_them():
    params = jax.eval_shape(Bert(**SIZES, types=0).init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    assert "embed_types" not in params and "embed_norm" in params and "norm" not in params


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 0}, r"model: classes=0 must be at least 1"),
        ({}, r"model.classes is not set"),
        ({"classes": 3, "split_head": True}, r"model: split_head=True is of logits of tokens"),
        (
            {"classes": 3, "pool": "max"},
            r"model.pool='max' has the wrong type: expected one of 'last', 'first', 'mean'",
        ),
    ],
)
def test_build_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        build("classifier", vocab_size=16, **fields)
