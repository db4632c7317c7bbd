"""Which examples a step sees: a pure function of (seed, step), and nothing else.

The training set is one endless sequence: a permutation of all examples for epoch 0, another for epoch 1, and so on.
Step `s` takes positions `s * batch_size` up to `(s + 1) * batch_size` of it. So batches straddle the ends of epochs, no
example is dropped or repeated within an epoch, and the step counter is the whole state of the data pipeline. Hosts and
microbatches slice these global batches; how many there are changes nothing here.

A mixture is several such sequences, each with epochs of its own, dealt out in blocks of `PERIOD` positions: every block
holds exactly the same number of examples of each part, in an order of its own.
"""

import functools
from collections.abc import Sequence

import numpy as np

# Raised when the same (seed, step) gives other examples than before; a resumed run compares it.
ORDER_VERSION = 1

# Up to this size an epoch's order is a sorted array, 4 bytes an example; above it is computed place by place, so that
# an epoch of a billion windows takes no memory and no time to begin.
SORTED = 2**20
# Positions in a block of a mixture; a part's share is a whole number of them.
PERIOD = 1000

_ROUNDS = 6
_MIXTURE = 2**63  # set in the epoch's half of a key, where no epoch comes to: the dealing of a mixture


def _raw(seed: int, stream: int, count: int) -> np.ndarray:
    """(count,) uint64, uniform. NumPy promises that raw streams never change; it does not for its `Generator`."""
    return np.random.Philox(key=(seed % 2**64) | (stream << 64)).random_raw(count)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: (size,) int32, read-only, each of 0 .. size - 1 once.

    The examples sorted by raw Philox output with the key (seed, epoch).
    """
    order = np.argsort(_raw(seed, epoch, size), kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order


def permuted(seed: int, epoch: int, places: np.ndarray, size: int) -> np.ndarray:
    """What stands at `places` (N,) of an epoch's order, each in 0 .. size - 1: (N,) int32.

    Above `SORTED` a Feistel network (Luby and Rackoff 1988, doi:10.1137/0217022): it is a permutation of the numbers
    below a power of four, whatever its round function; walked until it lands below `size` it is one of those (Black and
    Rogaway 2002, doi:10.1007/3-540-45760-7_9).
    """
    if size <= SORTED:
        return permutation(seed, epoch, size)[places]
    bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    keys, mask = _raw(seed, epoch, _ROUNDS), (np.uint64(1) << bits) - np.uint64(1)
    found = places.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right = found[walking] >> bits, found[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[walking] = left << bits | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195): every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_indices(
    seed: int,
    first_step: int,
    steps: int,
    batch_size: int,
    size: int,
    mixture: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """The examples of several steps in a row: (steps, batch_size) int32 of 0 .. size - 1.

    Args:
      seed: of the order; any integer.
      first_step: from 0.
      steps: how many steps.
      batch_size: examples in one global batch; may be larger than `size`.
      size: examples in the split.
      mixture: (size, positions in each `PERIOD`) of each part of the split; () for a split of one part.
    """
    positions = np.arange(first_step * batch_size, (first_step + steps) * batch_size, dtype=np.int64)
    index = np.empty(len(positions), np.int32)
    if not mixture:
        _in_epochs(seed, positions, size, index, slice(None))
        return index.reshape(steps, batch_size)
    part, places = _dealt(seed, positions, tuple(slots for _, slots in mixture))
    offset = 0
    for number, (length, _) in enumerate(mixture):
        chosen = part == number
        # A seed of its own for each part: two parts of one size would else come in the same order.
        _in_epochs(seed + (number << 32), places[chosen], length, index, chosen)
        index[chosen] += np.int32(offset)
        offset += length
    return index.reshape(steps, batch_size)


def _in_epochs(seed: int, positions: np.ndarray, size: int, out: np.ndarray, where: slice | np.ndarray) -> None:
    """Write what stands at `positions` (N,) of the endless sequence of one part to `out[where]`."""
    epochs, places = np.divmod(positions, size)
    found = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        found[now] = permuted(seed, int(epoch), places[now], size)
    out[where] = found


def _dealt(seed: int, positions: np.ndarray, slots: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which part each position (N,) of a mixture belongs to, and which place in that part's own sequence it is."""
    part, places = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
    blocks, within = np.divmod(positions, PERIOD)
    for block in np.unique(blocks):
        now = blocks == block
        parts, before = _block(seed, int(block), slots)
        part[now] = parts[within[now]]
        places[now] = block * np.asarray(slots)[part[now]] + before[within[now]]
    return part, places


@functools.lru_cache(maxsize=4)
def _block(seed: int, block: int, slots: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One block: (PERIOD,) the part at each position, and how many of that part come before it."""
    parts = np.repeat(np.arange(len(slots)), slots)[permutation(seed, _MIXTURE | block, PERIOD)]
    before = np.empty(PERIOD, np.int64)
    for number in range(len(slots)):
        here = parts == number
        before[here] = np.arange(here.sum())
    return parts, before


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
