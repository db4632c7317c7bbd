"""Which examples a step sees: a pure function of (seed, step), and nothing else.

The training set is one endless sequence: a permutation of all examples for epoch 0, another for epoch 1, and so on.
Step `s` takes positions `s * batch_size` up to `(s + 1) * batch_size` of it. So batches straddle the ends of epochs, no
example is dropped or repeated within an epoch, and the step counter is the whole state of the data pipeline. Hosts and
microbatches slice these global batches; how many there are changes nothing here.

A mixture is several such sequences, each with epochs of its own, dealt out in blocks of `PERIOD` positions: every block
holds exactly the same number of examples of each part, in an order of its own.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

# Raised when the same (seed, step) gives other examples than before; a resumed run compares it.
ORDER_VERSION = 1

# Up to this size an epoch's order is a sorted array, 4 bytes an example; above it is computed, `RUN` places at a time,
# so that an epoch of a billion windows takes no memory and no time to begin.
SORTED, RUN = 2**22, 2**14
# Positions in a block of a mixture; a part's share is a whole number of them.
PERIOD = 1000

_ROUNDS = 6
_MIXTURE = 2**63  # set in the epoch's half of a key, where no epoch comes to: the dealing of a mixture


def _raw(seed: int, stream: int, count: int) -> np.ndarray:
    """(count,) uint64, uniform. NumPy promises that raw streams never change; it does not for its `Generator`."""
    return np.random.Philox(key=(seed % 2**64) | (stream << 64)).random_raw(count)


@functools.lru_cache(maxsize=64)  # two epochs of each part of a mixture
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: (size,) int32, read-only, each of 0 .. size - 1 once.

    The examples sorted by raw Philox output with the key (seed, epoch).
    """
    raw = _raw(seed, epoch, size)
    order = np.argsort(raw)  # five times as fast as a stable sort, and the same where no two are equal
    found = raw[order]
    if (found[1:] == found[:-1]).any():
        order = np.argsort(raw, kind="stable")
    order = order.astype(np.int32)
    order.setflags(write=False)
    return order


def permuted(seed: int, epoch: int, places: np.ndarray, size: int) -> np.ndarray:
    """What stands at `places` (N,) of an epoch's order, each in 0 .. size - 1: (N,) int32."""
    if size <= SORTED:
        return permutation(seed, epoch, size)[places]
    found = np.empty(len(places), np.int32)
    runs, within = np.divmod(places, RUN)
    for run in np.unique(runs):
        now = runs == run
        found[now] = _computed(seed, epoch, int(run), size)[within[now]]
    return found


@functools.lru_cache(maxsize=64)
def _computed(seed: int, epoch: int, run: int, size: int) -> np.ndarray:
    """What stands at the places from run * `RUN` on: (up to RUN,) int32.

    By a Feistel network (Luby and Rackoff 1988, doi:10.1137/0217022), which is a permutation of the numbers of so many
    bits, whatever its round function; walked until it lands below `size` it is one of those (Black and Rogaway 2002,
    doi:10.1007/3-540-45760-7_9). After an even number of rounds the halves have their sizes again.
    """
    bits = max((size - 1).bit_length(), 2)
    widths = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    keys = _raw(seed, epoch, _ROUNDS)
    found = np.arange(run * RUN, min((run + 1) * RUN, size), dtype=np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        high, low = widths
        left, right = found[walking] >> low, found[walking] & _ones(low)
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & _ones(high))
            high, low = low, high
        found[walking] = left << low | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int32)


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


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
    start, stop = first_step * batch_size, (first_step + steps) * batch_size
    index = np.empty(stop - start, np.int32)
    if not mixture:
        for at in _epochs(start, stop, size):
            epoch, place = divmod(at.start, size)
            index[at.start - start : at.stop - start] = _stretch(seed, epoch, place, len(at), size)
        return index.reshape(steps, batch_size)
    positions = np.arange(start, stop, dtype=np.int64)
    part, places = _dealt(seed, positions, tuple(slots for _, slots in mixture))
    offset = 0
    for number, (length, _) in enumerate(mixture):
        chosen = part == number
        # A seed of its own for each part, beyond those of a config: else two of one size came in the same order.
        _in_epochs(seed + (number << 48), places[chosen], length, index, chosen)
        index[chosen] += np.int32(offset)
        offset += length
    return index.reshape(steps, batch_size)


def _epochs(start: int, stop: int, size: int) -> Iterator[range]:
    """Cut the positions from `start` to `stop` at the ends of epochs."""
    while start < stop:
        end = min((start // size + 1) * size, stop)
        yield range(start, end)
        start = end


def _stretch(seed: int, epoch: int, place: int, count: int, size: int) -> np.ndarray:
    """What stands at `count` places of an epoch's order from `place` on: (count,) int32."""
    if size <= SORTED:
        return permutation(seed, epoch, size)[place : place + count]
    return permuted(seed, epoch, np.arange(place, place + count), size)


def _in_epochs(seed: int, positions: np.ndarray, size: int, out: np.ndarray, where: np.ndarray) -> None:
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
    dealt = np.argsort(_raw(seed, _MIXTURE | block, PERIOD), kind="stable")
    parts = np.repeat(np.arange(len(slots)), slots)[dealt]
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
