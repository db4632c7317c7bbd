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
