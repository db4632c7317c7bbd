"""Which examples a step sees: a pure function of (seed, step), and nothing else.

The training set is one endless sequence: a permutation of all examples for epoch 0, another for epoch 1, and so on.
Step `s` takes positions `s * batch_size` up to `(s + 1) * batch_size` of it. So batches straddle the ends of epochs, no
example is dropped or repeated within an epoch, and the step counter is the whole state of the data pipeline. Hosts and
microbatches slice these global batches; how many there are changes nothing here.
"""

import functools

import numpy as np

# Raised when the same (seed, step) gives other examples than before; a resumed run compares it.
ORDER_VERSION = 1


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: (size,) int32, read-only, each of 0 .. size - 1 once.

    The examples sorted by raw Philox output with the key (seed, epoch). NumPy promises that raw streams never change;
    it makes no such promise for `Generator.permutation`, which would tie a run to a NumPy version.
    """
    key = (seed % 2**64) | (epoch << 64)
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order


def train_indices(seed: int, first_step: int, steps: int, batch_size: int, size: int) -> np.ndarray:
    """The examples of several steps in a row: (steps, batch_size) int32 of 0 .. size - 1.

    Args:
      seed: of the order; any integer.
      first_step: from 0.
      steps: how many steps.
      batch_size: examples in one global batch; may be larger than `size`.
      size: examples in the split.
    """
    positions = np.arange(first_step * batch_size, (first_step + steps) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, size)
    index = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        index[epochs == epoch] = permutation(seed, int(epoch), size)[offsets[epochs == epoch]]
    return index.reshape(steps, batch_size)


def train_index(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """The examples of one step: (batch_size,) int32. See `train_indices`."""
    return train_indices(seed, step, 1, batch_size, size)[0]


def eval_batches(batch_size: int, size: int) -> int:
    """How many batches cover a split, the last one padded."""
    return -(-size // batch_size)


def eval_index(batch: int, batch_size: int, size: int) -> np.ndarray:
    """The examples of one evaluation batch, in order: (batch_size,) int32, -1 for padding after the last example."""
    index = np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.int64)
    return np.where(index < size, index, -1).astype(np.int32)
