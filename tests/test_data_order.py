import numpy as np
import pytest

from flaxmodels.data import order


@pytest.mark.parametrize(("batch_size", "size"), [(7, 30), (1, 5), (32, 32), (13, 101), (100, 17), (64, 3)])
def test_every_example_once_per_epoch(batch_size, size):
    epochs = 3
    steps = -(-epochs * size // batch_size)
    seen = np.concatenate([order.train_index(11, s, batch_size, size) for s in range(steps)])[: epochs * size]
    for epoch in seen.reshape(epochs, size):
        assert sorted(epoch) == list(range(size))


def test_index_type_and_shape():
    index = order.train_index(0, 5, 8, 20)
    assert index.dtype == np.int32 and index.shape == (8,)
    assert order.eval_index(0, 8, 20).dtype == np.int32


@pytest.mark.parametrize("split", [(12,), (1, 11), (5, 4, 3), (1,) * 12])
def test_same_index_however_steps_are_grouped(split):
    whole = order.train_indices(3, 100, 12, 9, 31)
    parts, first = [], 100
    for steps in split:
        parts.append(order.train_indices(3, first, steps, 9, 31))
        first += steps
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_batch_size_regroups_one_sequence():
    """The same examples in the same sequence, at any batch size: only the step boundaries move."""
    small = order.train_indices(3, 0, 24, 4, 31).ravel()
    np.testing.assert_array_equal(order.train_indices(3, 0, 8, 12, 31).ravel(), small)


def test_epochs_and_seeds_differ():
    orders = [order.permutation(seed, epoch, 50).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == 16


def test_permutation_is_uniform():
    """Each example stands in each place about equally often: chi-squared with 81 degrees of freedom, 5 sigma."""
    size, epochs = 10, 4000
    places = np.stack([order.permutation(0, e, size) for e in range(epochs)])
    counts = np.stack([(places == i).sum(0) for i in range(size)])
    expected = epochs / size
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 5 * np.sqrt(2 * 81)


def test_permutation_is_shared_and_read_only():
    first = order.permutation(5, 0, 10)
    assert first is order.permutation(5, 0, 10)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 3


def test_order_is_the_version_it_says():
    """Pinned: if these numbers change, resumed runs see other data, so ORDER_VERSION must be raised with them.

    They come from raw Philox output, which NumPy keeps stable, so no other version of anything changes them.
    """
    assert order.ORDER_VERSION == 1
    assert order.permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order.permutation(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert order.permutation(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert order.train_index(7, 123, 5, 1442).tolist() == [792, 1171, 233, 172, 1200]


def test_late_steps_do_not_overflow():
    index = order.train_index(0, 10**9, 4096, 1000)  # position 4e12, epoch 4e9
    assert index.shape == (4096,) and index.min() >= 0 and index.max() < 1000


@pytest.mark.parametrize(("batch_size", "size"), [(7, 30), (10, 30), (64, 30), (1, 3)])
def test_eval_counts_every_example_once(batch_size, size):
    batches = [order.eval_index(b, batch_size, size) for b in range(order.eval_batches(batch_size, size))]
    assert all(len(b) == batch_size for b in batches)
    index = np.concatenate(batches)
    assert index[index >= 0].tolist() == list(range(size))
    assert (index[size:] == -1).all()
    assert (batches[-1] >= 0).any(), "no batch is padding alone"


@pytest.fixture
def computed(monkeypatch):
    """Orders computed place by place, also of small sets."""
    monkeypatch.setattr(order, "SORTED", 0)
    monkeypatch.setattr(order, "RUN", 64)
    order._computed.cache_clear()
    yield
    order._computed.cache_clear()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4095, 4096, 4097])
@pytest.mark.parametrize("epoch", [0, 1])
def test_computed_order_is_a_permutation(computed, size, epoch):
    found = order.permuted(3, epoch, np.arange(size), size)
    assert found.dtype == np.int32 and sorted(found) == list(range(size))


@pytest.mark.slow
def test_computed_order_is_a_permutation_of_a_large_set():
    size = order.SORTED + 7
    found = order.permuted(0, 0, np.arange(size), size)
    assert np.bincount(found, minlength=size).max() == 1
    some = np.array([5, 0, size - 1])
    np.testing.assert_array_equal(order.permuted(0, 0, some, size), found[some])


def test_computed_order_is_uniform(computed):
    """Places as in `test_permutation_is_uniform`; and what follows an example, which a weak network would show."""
    size, epochs = 10, 4000
    found = np.stack([order.permuted(0, e, np.arange(size), size) for e in range(epochs)])
    for pairs, cells in ((found * size + np.arange(size), 100), (found[:, :-1] * size + found[:, 1:], 90)):
        counts = np.bincount(pairs.ravel(), minlength=size**2)
        counts = counts[counts > 0]
        expected = pairs.size / cells
        assert len(counts) == cells
        assert ((counts - expected) ** 2 / expected).sum() < cells + 5 * np.sqrt(2 * cells)


def test_computed_order_of_epochs_and_seeds_differ(computed):
    orders = [tuple(order.permuted(seed, epoch, np.arange(50), 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_an_epoch_of_a_billion_begins_at_once():
    size = 2**30 + 1
    index = order.train_indices(0, 10**7, 2, 512, size)
    assert index.shape == (2, 512) and index.min() >= 0 and index.max() < size and len(np.unique(index)) == 1024


MIXTURE = ((40, 700), (5000, 299), (7, 1))


def parts(index):
    return np.digitize(index, np.cumsum([size for size, _ in MIXTURE])[:-1])


def mixed(first, steps, batch_size, seed=3):
    return order.train_indices(seed, first, steps, batch_size, 5047, MIXTURE)


def test_a_mixture_keeps_its_shares_in_every_period():
    index = mixed(0, 30, 100).reshape(3, order.PERIOD)
    for block in parts(index):
        assert np.bincount(block).tolist() == [700, 299, 1]
    assert not np.array_equal(parts(index)[0], parts(index)[1])
    halves = [np.bincount(parts(block[:500]), minlength=3)[0] for block in index]
    assert all(300 < half < 400 for half in halves), "mixed through, not one part after the other"


def test_each_part_of_a_mixture_has_whole_epochs():
    index = mixed(0, 70, 100).ravel()
    small = index[parts(index) == 0]
    for epoch in small[: len(small) // 40 * 40].reshape(-1, 40):
        assert sorted(epoch) == list(range(40))
    large = index[parts(index) == 1]
    assert len(set(large)) == len(large) == 7 * 299 and large.min() >= 40 and large.max() < 5040
    assert set(index[parts(index) == 2]) <= set(range(5040, 5047))


def test_a_mixture_is_a_function_of_the_step():
    whole = mixed(0, 24, 31)
    np.testing.assert_array_equal(np.concatenate([mixed(0, 5, 31), mixed(5, 18, 31), mixed(23, 1, 31)]), whole)
    np.testing.assert_array_equal(mixed(0, 12, 62).ravel(), whole.ravel())
    assert not np.array_equal(mixed(0, 24, 31, seed=4), whole)


def test_a_mixture_and_a_computed_order_are_the_version_they_say():
    """See `test_order_is_the_version_it_says`."""
    assert order.ORDER_VERSION == 1
    assert order.permuted(7, 1, np.arange(4), 2**24 + 1).tolist() == [5636883, 7440596, 2698932, 14255756]
    assert mixed(123, 1, 6, seed=7)[0].tolist() == [22, 4, 4380, 39, 9, 20]
