"""Metrics are (sum, count) pairs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxmodels import metrics


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


weighted, ratio, norm, pack = map(jax.jit, (metrics.weighted, metrics.ratio, metrics.norm, metrics.pack))


@pytest.mark.parametrize("cuts", [(10,), (3, 7), (1, 2, 7), (9, 1)])
def test_merging_by_addition_equals_one_big_batch(cuts):
    values, weights = numbers(10), np.asarray([1, 0, 1, 1, 0.5, 0, 2, 1, 1, 0], np.float32)
    total, count = 0.0, 0.0
    for part in np.split(np.arange(10), np.cumsum(cuts)[:-1]):
        pair = weighted(values[part], weights[part])
        total, count = total + float(pair[0]), count + float(pair[1])
    expected = np.average(values.astype(np.float64), weights=weights)
    assert count == float(weights.sum())
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_the_mean_of_means_is_not_it():
    """What this design avoids: batches of unequal counts."""
    values = {"loss": (1.0 + 2.0 + 9.0, 3.0)}
    assert metrics.means(values)["loss"] == 4.0 != ((1.0 + 2.0) / 2 + 9.0) / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_of_zero_takes_a_value_out_whatever_it_is(bad):
    total, count = weighted(np.asarray([1.0, bad]), np.asarray([2.0, 0.0]))
    assert (float(total), float(count)) == (2.0, 2.0)
    assert not math.isfinite(weighted(np.asarray([1.0, bad]), np.asarray([2.0, 1.0]))[0])


def test_weighted_sums_in_float32():
    values = jnp.full(1000, 1.01, jnp.bfloat16)
    total, count = weighted(values, jnp.ones(1000, jnp.bfloat16))
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, 1000 * float(jnp.bfloat16(1.01)), rtol=1e-6)
    assert count == 1000  # bfloat16 can't count to it
    assert weighted(np.asarray([True, False]), np.ones(2))[0] == 1


def test_weighted_does_not_broadcast():
    with pytest.raises(ValueError, match=r"values have shape \(3, 2\), weights \(3,\)"):
        weighted(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="expected the same"):
        weighted(np.ones(3), np.ones(()))


def test_once_is_counted_once():
    total, count = metrics.once(3)
    assert (total, count) == (3, 1)
    assert total.dtype == count.dtype == jnp.float32


def test_ratio_is_zero_where_nothing_counted():
    assert ratio(np.float32(0), np.float32(0)) == 0
    assert ratio(np.float32(3), np.float32(2)) == 1.5
    np.testing.assert_array_equal(ratio(np.arange(3.0), np.float32(0.5)), [0, 2, 4])
    gradient = jax.jit(jax.grad(lambda x: ratio(x, 0 * x)))(np.float32(0))
    assert np.isfinite(gradient)


def test_norm_is_optax_global_norm():
    tree = {
        "a": numbers(3, 4, 5),
        "b": [numbers(7, seed=1), np.float32(-2)],
        "c": jnp.asarray(numbers(2, 2), jnp.bfloat16),
    }
    expected = jax.jit(optax.tree.norm)(jax.tree.map(lambda x: np.asarray(x, np.float32), tree))
    np.testing.assert_allclose(norm(tree), expected, rtol=1e-6)
    assert norm(tree).dtype == jnp.float32
    assert norm({}) == 0
    assert norm({"a": np.zeros((0, 3))}) == 0


def test_norm_of_a_sharded_tree_gathers_nothing():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = numbers(64, 16)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    program = jax.jit(metrics.norm).lower(placed).compile()
    np.testing.assert_allclose(program(placed), np.linalg.norm(x), rtol=1e-6)
    assert "all-gather" not in program.as_text()


def test_pack_is_one_array_with_names_sorted():
    packed = pack({"loss": (np.float32(1), np.float32(2)), "accuracy": (3, 4), "z": metrics.once(5)})
    assert packed.dtype == jnp.float32
    np.testing.assert_array_equal(packed, [[3, 4], [1, 2], [5, 1]])


def test_means_are_finished_at_the_end():
    found = metrics.means({"loss": (6.0, 4.0), "perplexity": (6.0, 4.0), "bits_per_byte": (6.0, 4.0)})
    assert found == {"loss": 1.5, "perplexity": math.exp(1.5), "bits_per_byte": 1.5 / math.log(2)}
    assert all(type(x) is float for x in found.values())


def test_perplexity_of_merged_batches_is_no_mean_of_perplexities():
    first, second = (2.0, 1.0), (9.0, 3.0)
    merged = metrics.means({"perplexity": (first[0] + second[0], first[1] + second[1])})["perplexity"]
    np.testing.assert_allclose(merged, math.exp(11 / 4), rtol=1e-12)
    each = [metrics.means({"perplexity": pair})["perplexity"] for pair in (first, second)]
    assert abs(merged - sum(each) / 2) > 1


def test_means_without_a_count_are_nan_and_an_endless_perplexity_is_a_number():
    found = metrics.means({"loss": (0.0, 0.0), "perplexity": (0.0, 0.0), "accuracy": (1.0, 1.0)})
    assert math.isnan(found["loss"]) and math.isnan(found["perplexity"]) and found["accuracy"] == 1
    assert math.isfinite(metrics.means({"perplexity": (1e9, 1.0)})["perplexity"])
    assert math.isnan(metrics.means({"perplexity": (math.nan, 1.0)})["perplexity"])
