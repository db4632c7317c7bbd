"""Losses: against optax and float64 references; what weights take out; what they refuse."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import losses, metrics
from flaxmodels.registry import UserError

# As in a step: jitted, so that each is one program to compile. Data are numpy arrays for the same reason.
softmax_cross_entropy = jax.jit(
    losses.softmax_cross_entropy,
    static_argnames=("label_smoothing", "z_loss", "metrics", "top_k", "token_bytes", "chunks"),
)
sigmoid_cross_entropy = jax.jit(losses.sigmoid_cross_entropy, static_argnames="label_smoothing")
mean_squared_error = jax.jit(losses.mean_squared_error)

B, T, C = 4, 6, 7


def normal(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def batch(*shape, classes=C, seed=1, weights=None):
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 2, shape) if weights is None else np.broadcast_to(weights, shape)
    return {
        "targets": generator.integers(0, classes, shape, np.int32),
        "weights": np.asarray(drawn, np.float32),
    }


def mean(pair):
    return float(pair[0]) / float(pair[1])


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


# softmax_cross_entropy


@pytest.mark.parametrize("shape", [(B,), (B, T), (B, 2, 3)])
def test_softmax_cross_entropy_is_that_of_optax_and_of_float64(shape):
    logits, data = normal(*shape, C), batch(*shape)
    found = softmax_cross_entropy(logits, data)
    each = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, data["targets"])
    np.testing.assert_allclose(found["loss"][0], np.sum(np.asarray(each) * data["weights"]), rtol=1e-6)
    assert float(found["loss"][1]) == float(data["weights"].sum())
    exact = -np.take_along_axis(log_softmax64(logits), data["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found["loss"][0], np.sum(exact * data["weights"]), rtol=1e-6)
    assert found["accuracy"][0] == np.sum((np.argmax(logits, -1) == data["targets"]) * data["weights"])


def test_its_gradient_is_that_of_optax():
    logits, data = normal(B, T, C), batch(B, T)

    def reference(logits):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
        return jnp.sum(each * data["weights"])

    ours = jax.jit(jax.grad(lambda x: softmax_cross_entropy(x, data)["loss"][0]))(logits)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(reference))(logits), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_cross_entropy_with_a_spread_target(smoothing):
    logits, data = normal(B, C), batch(B, weights=1)
    soft = (1 - smoothing) * np.eye(C)[data["targets"]] + smoothing / C
    found = softmax_cross_entropy(logits, data, label_smoothing=smoothing)["loss"][0]
    np.testing.assert_allclose(found, -np.sum(soft * log_softmax64(logits)), rtol=1e-5)


def test_z_loss_is_the_square_of_log_z():
    logits, data = normal(B, C), batch(B, weights=1)
    plain, more = (softmax_cross_entropy(logits, data, z_loss=z)["loss"][0] for z in (0.0, 0.3))
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(more - plain, 0.3 * np.sum(log_z**2), rtol=1e-5)


def test_smoothing_and_z_loss_add_up():
    logits, data = normal(B, C), batch(B, weights=1)
    both = softmax_cross_entropy(logits, data, label_smoothing=0.1, z_loss=0.3)["loss"][0]
    smooth, z, plain = (
        softmax_cross_entropy(logits, data, **options)["loss"][0]
        for options in ({"label_smoothing": 0.1}, {"z_loss": 0.3}, {})
    )
    np.testing.assert_allclose(both, smooth + z - plain, rtol=1e-5)


# softmax_cross_entropy of probabilities


def probabilities(*shape, seed=5):
    drawn = np.random.default_rng(seed).random(shape).astype(np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(B,), (B, T)])
def test_probabilities_as_targets_are_that_of_optax_and_of_float64(shape, smoothing):
    logits, data = normal(*shape, C), {**batch(*shape), "targets": probabilities(*shape, C)}
    found = softmax_cross_entropy(logits, data, label_smoothing=smoothing, metrics=("accuracy", "perplexity"))
    smooth = (1 - smoothing) * data["targets"].astype(np.float64) + smoothing / C
    exact = -np.sum(smooth * log_softmax64(logits), -1)
    np.testing.assert_allclose(found["loss"][0], np.sum(exact * data["weights"]), rtol=1e-5)
    each = jax.jit(optax.softmax_cross_entropy)(logits, smooth.astype(np.float32))
    np.testing.assert_allclose(found["loss"][0], np.sum(np.asarray(each) * data["weights"]), rtol=1e-5)
    plain = -np.sum(data["targets"] * log_softmax64(logits), -1)
    np.testing.assert_allclose(found["perplexity"][0], np.sum(plain * data["weights"]), rtol=1e-5)
    right = np.argmax(logits, -1) == np.argmax(data["targets"], -1)
    assert found["accuracy"][0] == np.sum(right * data["weights"])
    assert {float(count) for _, count in found.values()} == {float(data["weights"].sum())}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probabilities_of_one_class_are_that_class(dtype):
    logits, data = normal(B, T, C), batch(B, T)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "metrics": ("accuracy", "top_k", "perplexity"), "top_k": 3}
    hard = softmax_cross_entropy(logits, data, **options)
    soft = softmax_cross_entropy(logits, {**data, "targets": jnp.eye(C, dtype=dtype)[data["targets"]]}, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), hard, soft)


def test_the_gradient_of_probabilities_is_that_of_optax():
    logits, data = normal(B, T, C), {**batch(B, T), "targets": probabilities(B, T, C)}
    ours = jax.jit(jax.grad(lambda x: softmax_cross_entropy(x, data)["loss"][0]))(logits)
    reference = jax.jit(jax.grad(lambda x: jnp.sum(optax.softmax_cross_entropy(x, data["targets"]) * data["weights"])))
    np.testing.assert_allclose(ours, reference(logits), atol=1e-6)


def test_of_probabilities_the_largest_is_the_target_and_of_equal_ones_the_first():
    logits = 9 * np.eye(C, dtype=np.float32)[[2, 4, 2, 4]]
    targets = np.zeros((B, C), np.float32)
    targets[:2, [2, 4]], targets[2:, [2, 4]] = 0.5, (0.4, 0.6)
    data = {"targets": targets, "weights": np.ones(B)}
    right = [softmax_cross_entropy(logits[i : i + 1], {k: v[i : i + 1] for k, v in data.items()}) for i in range(B)]
    assert [float(found["accuracy"][0]) for found in right] == [1, 0, 0, 1]
    assert softmax_cross_entropy(logits, data, metrics=("top_k",), top_k=C)["top_k"][0] == B


def test_a_class_masked_by_minus_infinity_has_no_part_in_probabilities():
    logits, targets = normal(B, C), np.concatenate([probabilities(B, C - 1), np.zeros((B, 1), np.float32)], -1)
    logits[:, -1] = -np.inf
    data = {"targets": targets, "weights": np.ones(B, np.float32)}
    found, gradient = jax.jit(jax.value_and_grad(lambda x: softmax_cross_entropy(x, data)["loss"][0]))(logits)
    alone = softmax_cross_entropy(logits[:, :-1], {**data, "targets": targets[:, :-1]})["loss"][0]
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[:, -1])


@pytest.mark.parametrize("shape", [(B,), (B, 1), (1, C), (B, C + 1), ()])
def test_probabilities_of_another_shape_are_refused(shape):
    data = {"targets": np.ones(shape, np.float32), "weights": np.ones(B)}
    with pytest.raises(ValueError, match=r"targets .*: expected \(4, 7\) for the targets, of float32"):
        softmax_cross_entropy(normal(B, C), data)


def test_bits_per_byte_is_not_for_probabilities():
    data = {"targets": probabilities(B, C), "weights": np.ones(B)}
    with pytest.raises(UserError, match="the targets are probabilities: leave it out"):
        softmax_cross_entropy(normal(B, C), data, metrics=("bits_per_byte",), token_bytes=(1,) * C)


LOSS_CASES = [
    (softmax_cross_entropy, {}),
    (softmax_cross_entropy, {"label_smoothing": 0.1, "z_loss": 1e-2, "metrics": ("accuracy", "top_k", "perplexity")}),
    (sigmoid_cross_entropy, {"label_smoothing": 0.1}),
    (mean_squared_error, {}),
]


@pytest.mark.parametrize(("loss", "options"), LOSS_CASES)
def test_a_weight_of_zero_takes_a_row_out_of_sum_count_and_gradient(loss, options):
    outputs = normal(B, T, C)
    targets = batch(B, T)["targets"] if loss is softmax_cross_entropy else np.clip(normal(B, T, C, seed=2), 0, 1)
    weights = np.ones((B, T), np.float32)
    weights[1:3] = weights[0, 4] = 0.0

    def sums(outputs):
        found = loss(outputs, {"targets": targets, "weights": weights}, **options)
        return found["loss"][0], found

    gradients = jax.jit(jax.grad(sums, has_aux=True))
    gradient, found = gradients(outputs)
    gradient = np.asarray(gradient)
    assert all(float(count) == B * T - 2 * T - 1 for _, count in found.values())
    assert not np.any(gradient[weights == 0])
    assert np.all(np.any(gradient[weights == 1] != 0, axis=-1))
    # Whatever stands in a padded place, also where it is huge: the same sums.
    padded = np.where(weights[..., None] == 0, np.float32(1e30) * outputs, outputs)
    other, same = gradients(padded)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    np.testing.assert_array_equal(gradient, other)
    # And the same as without the padding.
    kept = np.asarray([0, 3])
    alone = loss(outputs[kept], {"targets": targets[kept], "weights": weights[kept]}, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, alone)


@pytest.mark.parametrize(("loss", "options"), LOSS_CASES)
def test_halves_add_up_to_the_whole(loss, options):
    outputs = normal(B, C)
    targets = batch(B)["targets"] if loss is softmax_cross_entropy else np.clip(normal(B, C, seed=2), 0, 1)
    weights = np.asarray([1.0, 0.0, 2.0, 1.0], np.float32)
    whole = loss(outputs, {"targets": targets, "weights": weights}, **options)
    parts = [
        loss(outputs[part], {"targets": targets[part], "weights": weights[part]}, **options)
        for part in (np.asarray([0]), np.asarray([1, 2, 3]))
    ]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, np.add(b, c), rtol=1e-6), whole, *parts)


def test_of_equal_logits_the_first_wins():
    rows = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 2, 2], [0, 2, 2]], np.float32)
    targets = np.asarray([0, 1, 0, 2, 1, 2])
    right = [
        float(softmax_cross_entropy(row[None], {"targets": target[None], "weights": np.ones(1)})["accuracy"][0])
        for row, target in zip(rows, targets)
    ]
    assert right == [1, 0, 1, 0, 1, 0] == list(np.argmax(rows, -1) == targets)


def test_a_constant_model_is_right_once_in_all_classes():
    data = {"targets": np.arange(C), "weights": np.ones(C)}
    found = softmax_cross_entropy(np.zeros((C, C)), data, metrics=("accuracy", "top_k"), top_k=3)
    assert (found["accuracy"][0], found["top_k"][0]) == (1, 3)


@pytest.mark.parametrize("place", ["all", 0, 3, 6])
def test_a_model_that_gives_nan_is_not_right(place):
    logits = 9.0 * np.eye(C)
    logits[:, slice(None) if place == "all" else place] = np.nan
    data = {"targets": np.arange(C), "weights": np.ones(C)}
    assert softmax_cross_entropy(logits, data)["accuracy"][0] == 0


def test_top_k_is_in_the_k_largest():
    logits, data = normal(50, C), batch(50, weights=1)
    places = np.argsort(-logits, axis=-1)
    for k in (1, 2, 5, C):
        found = softmax_cross_entropy(logits, data, metrics=("top_k",), top_k=k)["top_k"]
        assert found[0] == np.sum(places[:, :k] == data["targets"][:, None])
        assert found[1] == 50
    assert found[0] == 50  # all classes
    with pytest.raises(UserError, match=r"loss.top_k=8 is over the 7 classes"):
        softmax_cross_entropy(logits, data, metrics=("top_k",), top_k=8)


def test_perplexity_and_bits_per_byte_are_finished_after_merging_unequal_counts():
    logits, data = normal(B, T, C), batch(B, T)
    sizes = tuple(range(1, C + 1))
    options = {"metrics": ("perplexity", "bits_per_byte"), "token_bytes": sizes, "label_smoothing": 0.2, "z_loss": 0.1}
    totals = {}
    for rows in (np.asarray([0]), np.asarray([1, 2, 3])):
        found = softmax_cross_entropy(logits[rows], {k: v[rows] for k, v in data.items()}, **options)
        for name, (total, count) in found.items():
            old = totals.get(name, (0.0, 0.0))
            totals[name] = (old[0] + float(total), old[1] + float(count))
    weights, targets = data["weights"], data["targets"]
    nll = (
        -np.take_along_axis(log_softmax64(logits), targets[..., None], -1)[..., 0] * weights
    )  # no smoothing, no z-loss
    done = metrics.means(totals)
    np.testing.assert_allclose(done["perplexity"], np.exp(nll.sum() / weights.sum()), rtol=1e-5)
    count = np.sum(np.asarray(sizes)[targets] * weights)
    np.testing.assert_allclose(done["bits_per_byte"], nll.sum() / np.log(2) / count, rtol=1e-5)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    data = batch(B, T, classes=256, weights=1)
    found = softmax_cross_entropy(np.zeros((B, T, 256)), data, metrics=("bits_per_byte",), token_bytes=(1,) * 256)
    done = metrics.means({k: (float(a), float(b)) for k, (a, b) in found.items()})
    np.testing.assert_allclose(done["bits_per_byte"], 8, rtol=1e-6)
    with pytest.raises(UserError, match="this data is not text: leave it out"):
        softmax_cross_entropy(np.zeros((B, T, 256)), data, metrics=("bits_per_byte",))


def test_a_class_masked_by_minus_infinity_has_no_part():
    logits, data = normal(B, C), batch(B, classes=C - 1, weights=1)
    logits[:, -1] = -np.inf
    found, gradient = jax.jit(jax.value_and_grad(lambda x: softmax_cross_entropy(x, data)["loss"][0]))(logits)
    np.testing.assert_allclose(found, softmax_cross_entropy(logits[:, :-1], data)["loss"][0], rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[:, -1])


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_all_logits_changes_nothing(shift):
    logits, data = np.round(normal(B, C) * 8) / 8, batch(B, weights=1)  # eighths: the shifted logits are exact
    near, far = (softmax_cross_entropy(x, data)["loss"][0] for x in (logits, logits + np.float32(shift)))
    np.testing.assert_allclose(near, far, rtol=1e-3)


def test_bfloat16_logits_are_computed_in_float32():
    logits, data = jnp.asarray(normal(B, T, 300), jnp.bfloat16), batch(B, T, classes=300, weights=1)
    low, high = (softmax_cross_entropy(x, data, z_loss=0.1)["loss"] for x in (logits, logits.astype(jnp.float32)))
    assert low[0].dtype == jnp.float32
    np.testing.assert_array_equal(low[0], high[0])


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.int32, jnp.uint32])
def test_targets_of_any_integer_dtype(dtype):
    logits, data = normal(B, 300), batch(B, classes=100, weights=1)  # 300 ids do not fit into uint8
    same = softmax_cross_entropy(
        logits, {**data, "targets": data["targets"].astype(dtype)}, metrics=("accuracy", "top_k")
    )
    jax.tree.map(
        np.testing.assert_array_equal, same, softmax_cross_entropy(logits, data, metrics=("accuracy", "top_k"))
    )


@pytest.mark.parametrize("shape", [(B, 1), (1,), (B, C), ()])
def test_targets_that_would_broadcast_are_refused(shape):
    data = {"targets": np.zeros(shape, np.int32), "weights": np.ones(shape)}
    with pytest.raises(ValueError, match=r"outputs have shape \(4, 7\), targets .*: expected \(4,\) for the targets"):
        softmax_cross_entropy(normal(B, C), data)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, mean_squared_error])
def test_outputs_and_targets_of_different_shape_are_refused(loss):
    with pytest.raises(ValueError, match=r"outputs have shape \(4, 1\), targets \(4,\): expected the same"):
        loss(normal(B, 1), {"targets": np.ones(B), "weights": np.ones(B)})


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy, mean_squared_error])
def test_weights_of_another_shape_are_refused(loss):
    targets = np.zeros((B, B), np.int32) if loss is softmax_cross_entropy else np.zeros((B, B, C))
    with pytest.raises(ValueError, match="weights"):
        loss(normal(B, B, C), {"targets": targets, "weights": np.ones((B, 3))})
    if loss is softmax_cross_entropy:
        with pytest.raises(ValueError, match="weights"):
            loss(normal(B, B, C), {"targets": targets, "weights": np.ones(B)})


@pytest.mark.parametrize("targets", [np.zeros(B, np.int32), np.ones((B, 1), np.float32), np.full((B, 2), 7.0)])
def test_one_class_is_refused(targets):
    """Every output would be right, with a loss of 0; so is it with floats that number classes, or are to be matched."""
    with pytest.raises(ValueError, match=r"\(4, 1\).* at least 2 classes.*mean_squared_error.*sigmoid.*be integers"):
        softmax_cross_entropy(normal(B, 1), {"targets": targets, "weights": np.ones(B)})


# softmax_cross_entropy of a split head, in chunks

D, V = 5, 97  # a vocabulary that no other size here can be taken for
ALL = {
    "label_smoothing": 0.1, "z_loss": 0.01, "metrics": ("accuracy", "top_k", "perplexity", "bits_per_byte"), "top_k": 9,
    "token_bytes": tuple(i % 7 for i in range(V)),
}  # fmt: skip


def head(*shape, dtype=np.float32):
    return {
        "features": normal(*shape, D, scale=1.0).astype(dtype),
        "kernel": normal(D, V, seed=1, scale=1.0).astype(dtype),
    }


def value_and_gradient(**options):
    """(parts of a head, batch) -> (gradient of the sum of losses by the parts, metrics)."""

    def objective(parts, data):
        found = losses.softmax_cross_entropy(parts, data, **options)
        return found["loss"][0], found

    return jax.jit(jax.grad(objective, has_aux=True))


def off(a, b):
    """Relative distance of two arrays."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def agree(found, expected, gradients=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[1], expected[1])
    errors = jax.tree.map(off, found[0], expected[0])
    assert max(jax.tree.leaves(errors)) < gradients, errors


def test_the_logits_of_a_split_head_are_the_product_of_its_parts():
    parts, data = head(B, T), batch(B, T, classes=V)
    split, whole = (softmax_cross_entropy(x, data) for x in (parts, parts["features"] @ parts["kernel"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), split, whole)


@pytest.mark.parametrize("chunks", [2, 5, 24, 1000])
def test_chunks_are_the_whole_in_every_metric_and_gradient(chunks):
    """Of 24 tokens: parts of equal size, a last one that is filled up, one for each, and more than there are."""
    data = {**batch(B, T, classes=V), "weights": np.arange(B * T, dtype=np.float32).reshape(B, T) % 3}
    agree(*(value_and_gradient(**ALL, chunks=n)(head(B, T), data) for n in (chunks, 1)))


def test_chunks_of_probabilities_are_the_whole():
    options = {**ALL, "metrics": ("accuracy", "top_k", "perplexity")}
    data = {**batch(B, T), "targets": probabilities(B, T, V)}
    agree(*(value_and_gradient(**options, chunks=n)(head(B, T), data) for n in (5, 1)))


def test_chunks_of_examples_without_a_length_are_the_whole():
    agree(*(value_and_gradient(chunks=n)(head(B), batch(B, classes=V, weights=1)) for n in (3, 1)))


def test_chunks_evaluate_as_they_train():
    """Without a gradient it is another program, which computes none."""
    parts, data = head(B, T), batch(B, T, classes=V)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        softmax_cross_entropy(parts, data, chunks=4, **ALL), value_and_gradient(chunks=4, **ALL)(parts, data)[1],
    )  # fmt: skip


def test_of_chunks_only_the_loss_has_a_gradient_and_it_scales():
    parts, data = head(B, T), batch(B, T, classes=V)

    def total(parts, name):
        return 3 * softmax_cross_entropy(parts, data, chunks=4, metrics=("perplexity",))[name][0]

    triple, none = (jax.jit(jax.grad(total), static_argnums=1)(parts, name) for name in ("loss", "perplexity"))
    once = value_and_gradient(chunks=4)(parts, data)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6), triple, once)
    assert not any(np.any(x) for x in jax.tree.leaves(none))


def sizes_with_classes(text):
    """How many rows of V numbers each array of a lowered program has."""
    shapes = {tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+\d+)x[a-z]", text)}
    shapes |= {tuple(map(int, dims.split(","))) for dims in re.findall(r"[a-z]\d+\[(\d+(?:,\d+)*)\]", text)}
    return {math.prod(shape) // V for shape in shapes if V in shape}


def test_chunks_never_hold_all_logits():
    parts, data = head(B, T), batch(B, T, classes=V)
    whole, cut = (sizes_with_classes(value_and_gradient(chunks=n).lower(parts, data).as_text()) for n in (1, 8))
    assert B * T in whole and cut == {D, B * T // 8}


def test_the_gradient_of_a_bfloat16_kernel_adds_up_in_float32():
    """1,024 chunks of equal gradient; a sum in bfloat16 would stand still at 256 times one of them."""
    ones = {"features": jnp.ones((1024, D), jnp.bfloat16), "kernel": jnp.zeros((D, V), jnp.bfloat16)}
    data = {"targets": np.zeros(1024, np.int32), "weights": np.ones(1024, np.float32)}
    gradient, found = value_and_gradient(chunks=1024)(ones, data)
    assert {x.dtype for x in gradient.values()} == {jnp.dtype(jnp.bfloat16)} and found["loss"][0].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(gradient["kernel"][:, 0], np.float32), 1024 * (1 / V - 1), rtol=1e-2)


def test_bfloat16_chunks_are_float32_up_to_its_rounding():
    low, data = head(B, T, dtype=jnp.bfloat16), batch(B, T, classes=V, weights=1)
    high = {k: np.asarray(x, np.float32) for k, x in low.items()}
    agree(value_and_gradient(**ALL, chunks=4)(low, data), value_and_gradient(**ALL)(high, data), gradients=1e-2)


def on_mesh(axes, chunks, rows=8, length=16):
    """(what it finds and its gradient, the compiled program's text) with parts and batch spread over a mesh."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(axes), ("data", "fsdp", "sequence", "tensor"))
    parts = {"features": normal(rows, length, W, scale=1.0), "kernel": normal(W, 8 * V, seed=1, scale=1.0)}
    data = batch(rows, length, classes=8 * V)
    tokens, kernel = (NamedSharding(mesh, spec) for spec in (P(("data", "fsdp"), "sequence"), P("fsdp", "tensor")))
    places = ({"features": tokens, "kernel": kernel}, {"targets": tokens, "weights": tokens})
    program = jax.jit(
        value_and_gradient(**{**ALL, "token_bytes": (1,) * 8 * V}, chunks=chunks), out_shardings=(places[0], None)
    )
    rules = (("batch", ("data", "fsdp")), ("length", "sequence"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        compiled = program.lower(*jax.device_put((parts, data), places)).compile()
    return compiled(*jax.device_put((parts, data), places)), compiled.as_text()


W = 24  # a width that no other size there can be taken for
AXES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8)]


@pytest.mark.parametrize(
    "axes", AXES[1:2] + [pytest.param(axes, marks=pytest.mark.slow) for axes in AXES[:1] + AXES[2:]]
)
def test_chunks_on_a_mesh_are_the_whole_on_one_device(axes):
    chunks = 4
    parts = {"features": normal(8, 16, W, scale=1.0), "kernel": normal(W, 8 * V, seed=1, scale=1.0)}
    alone = value_and_gradient(**{**ALL, "token_bytes": (1,) * 8 * V})(parts, batch(8, 16, classes=8 * V))
    found, text = on_mesh(axes, chunks)
    agree(found, alone)
    # A device has the logits of its share of the tokens of one chunk, and of the vocabulary, and sends none of them.
    tensor, wide = axes[3], 8 * V // axes[3]
    logits = [shape for shape in arrays(text) if {8 * V, wide} & set(shape) and not {W, W // axes[1]} & set(shape)]
    assert max(map(math.prod, logits)) == 8 * 16 * tensor // 8 // chunks * wide
    sent = [line for line in text.splitlines() if re.search(r" (all-|reduce-scatter|collective-permute)[\w-]*\(", line)]
    wides = [line for line in sent if [shape for shape in arrays(line.split("(%")[0]) if {8 * V, wide} & set(shape)]]
    assert all(W in shape for line in wides for shape in arrays(line.split("(%")[0]) if {8 * V, wide} & set(shape))
    # The kernel is gathered, and its gradient added up, outside of the loop.
    assert len(wides) <= 2 and not [line for line in wides if "while" in line]
    assert wides or tensor == 8


def arrays(text):
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d[\d,]*)\]", text)}


@pytest.mark.slow
def test_chunks_of_a_real_vocabulary_take_an_eighth_of_the_memory():
    shapes = {
        "features": jax.ShapeDtypeStruct((8, 1024, 768), "float32"),
        "kernel": jax.ShapeDtypeStruct((768, 50304), "float32"),
    }
    data = {"targets": jax.ShapeDtypeStruct((8, 1024), "int32"), "weights": jax.ShapeDtypeStruct((8, 1024), "float32")}
    plain, cut = (
        value_and_gradient(chunks=n).lower(shapes, data).compile().memory_analysis().temp_size_in_bytes for n in (1, 16)
    )
    assert plain > 8 * 1024 * 50304 * 4 and cut <= plain / 8
    # And they agree, on fewer tokens.
    parts = {"features": normal(2, 64, 768, scale=1.0), "kernel": normal(768, 50304, seed=1, scale=0.05)}
    agree(*(value_and_gradient(chunks=n)(parts, batch(2, 64, classes=50304)) for n in (16, 1)))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            normal(B, T, V),
            r"loss.chunks=2 is for a model that leaves its last layer to the loss.*leave loss.chunks out",
        ),
        ({"logits": normal(B, T, V)}, r"outputs have the keys \['logits'\]: expected logits, or the parts of a head"),
        ({**head(B, T), "kernel": normal(V, D)}, r"\(4, 6, 5\) and dtype float32, the kernel \(97, 5\).*of one dtype"),
        ({**head(B, T), "kernel": jnp.ones((D, V), jnp.bfloat16)}, r"the kernel \(5, 97\) and bfloat16.*of one dtype"),
        (head(B, T + 1), r"outputs have shape \(4, 7, 97\), targets \(4, 6\)"),
        ({**head(B, T), "kernel": normal(D, 1)}, r"outputs have shape \(4, 6, 1\).* at least 2 classes"),
    ],
)
def test_chunks_refuse(outputs, message):
    with pytest.raises(ValueError, match=message):
        losses.softmax_cross_entropy(outputs, batch(B, T, classes=V), chunks=2)


# sigmoid_cross_entropy, mean_squared_error


@pytest.mark.parametrize("loss", [losses.sigmoid_cross_entropy, losses.mean_squared_error])
def test_the_others_refuse_a_split_head(loss):
    with pytest.raises(
        ValueError, match=r"keys \['features', 'kernel'\]: expected one array.*leave model.split_head out"
    ):
        loss(head(B, T), batch(B, T, classes=V))


@pytest.mark.parametrize("shape", [(B,), (B, C), (B, T, C)])
def test_sigmoid_cross_entropy_is_that_of_optax(shape):
    logits = normal(*shape)
    targets = (normal(*shape, seed=3) > 0).astype(np.float32)
    weights = np.asarray([1.0, 0.0, 2.0, 1.0], np.float32)
    found = sigmoid_cross_entropy(logits, {"targets": targets, "weights": weights})
    each = np.asarray(jax.jit(optax.sigmoid_binary_cross_entropy)(logits, targets)).reshape(B, -1).mean(-1)
    np.testing.assert_allclose(mean(found["loss"]), np.average(each, weights=weights), rtol=1e-5)
    right = ((logits > 0) == (targets == 1)).reshape(B, -1).mean(-1)
    np.testing.assert_allclose(mean(found["accuracy"]), np.average(right, weights=weights), rtol=1e-6)


def test_sigmoid_smoothing_moves_targets_to_a_half():
    logits, targets, weights = normal(B), np.asarray([0.0, 1.0, 1.0, 0.0]), np.ones(B)
    smooth = sigmoid_cross_entropy(logits, {"targets": targets, "weights": weights}, label_smoothing=0.2)
    moved = sigmoid_cross_entropy(logits, {"targets": 0.8 * targets + 0.1, "weights": weights})
    np.testing.assert_allclose(smooth["loss"][0], moved["loss"][0], rtol=1e-6)
    assert smooth["accuracy"] == moved["accuracy"]


@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_sigmoid_of_large_logits_is_exact(logit):
    data = {"targets": np.asarray([0.0, 1.0]), "weights": np.ones(2)}
    both = jax.jit(jax.value_and_grad(lambda x: sigmoid_cross_entropy(x, data)["loss"][0]))
    value, gradient = both(np.asarray([logit, logit]))
    assert value == 200 and np.all(np.isfinite(gradient))


def test_mean_squared_error_is_the_mean_over_all_axes():
    outputs, targets = normal(B, 2, 3), normal(B, 2, 3, seed=4)
    weights = np.asarray([1.0, 0.0, 1.0, 1.0], np.float32)
    found = mean_squared_error(outputs, {"targets": targets, "weights": weights})
    kept = (outputs - targets).astype(np.float64)[weights == 1]
    np.testing.assert_allclose(mean(found["loss"]), np.mean(kept**2), rtol=1e-5)
    np.testing.assert_allclose(mean(found["absolute_error"]), np.mean(np.abs(kept)), rtol=1e-5)


def test_integer_targets_and_bfloat16_outputs_are_compared_in_float32():
    outputs = jnp.full(B, 256.0, jnp.bfloat16)
    found = mean_squared_error(outputs, {"targets": np.full(B, 257), "weights": np.ones(B)})
    assert mean(found["loss"]) == 1


def test_nothing_that_counts_gives_zero_sums():
    data = batch(B, weights=0)
    for total, count in softmax_cross_entropy(normal(B, C), data, metrics=("accuracy", "top_k", "perplexity")).values():
        assert (float(total), float(count)) == (0, 0)


# make


def test_evaluation_leaves_the_regularisers_out():
    logits, data = normal(B, C), batch(B, weights=1)
    train, test = losses.make(label_smoothing=0.3, z_loss=0.1, metrics=("top_k",), top_k=2)
    trained, tested = (jax.jit(loss)(logits, data) for loss in (train, test))
    plain = softmax_cross_entropy(logits, data, metrics=("top_k",), top_k=2)
    jax.tree.map(np.testing.assert_array_equal, tested, plain)
    assert trained["loss"][0] > plain["loss"][0]
    assert set(trained) == set(tested) == {"loss", "top_k"}
    assert [loss.keywords["chunks"] for loss in losses.make(chunks=3)] == [3, 3]  # memory is short there as well


def test_every_name_makes_a_pair_of_losses():
    for name, function in losses.LOSSES.items():
        assert [loss.func for loss in losses.make(name)] == [function] * 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "softmax_crossentropy",
            {},
            r"loss.name='softmax_crossentropy' does not exist. Did you mean 'softmax_cross_entropy'",
        ),
        (
            "softmax_cross_entropy",
            {"smoothing": 0.1},
            r"loss.smoothing=0.1: unknown key. Did you mean 'label_smoothing'",
        ),
        ("softmax_cross_entropy", {"label_smoothing": 1.5}, r"label_smoothing=1.5 is out of range.*between 0 and 1"),
        ("softmax_cross_entropy", {"z_loss": -1.0}, r"loss.z_loss=-1.0 is out of range"),
        ("softmax_cross_entropy", {"metrics": ("acuracy",)}, r"loss.metrics=\('acuracy',\) has the wrong type"),
        ("softmax_cross_entropy", {"metrics": "accuracy"}, r"expected a list of one of 'accuracy'"),
        ("softmax_cross_entropy", {"top_k": 0}, r"loss.top_k=0 is out of range"),
        ("softmax_cross_entropy", {"chunks": 0}, r"loss.chunks=0 is out of range"),
        ("softmax_cross_entropy", {"outputs": 1}, r"loss.outputs=1: unknown key"),
        ("mean_squared_error", {"label_smoothing": 0.1}, r"unknown key.*There are: none"),
        ("math:pi", {}, r"3.14.* takes no options"),
    ],
)
def test_make_refuses(name, options, message):
    with pytest.raises(UserError, match=message):
        losses.make(name, **options)


def test_a_users_own_loss(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from flaxmodels.metrics import weighted\n"
        "def hinge(outputs, batch, *, margin: float = 1.0, z_loss: float = 0.0):\n"
        "    return {'loss': weighted(margin - outputs, batch['weights'])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train, test = losses.make("my_losses:hinge", margin=3, z_loss=1.0)
    assert train.keywords == {"margin": 3, "z_loss": 1.0} and test.keywords == {"margin": 3}
    assert math.isclose(mean(train(np.ones(2), {"weights": jnp.ones(2)})["loss"]), 2)
