"""Made-up data that can be learned: for tests, and to measure speed at any shape without a download.

All of it comes from raw Philox output, which NumPy promises never to change: a seed means the same data everywhere.
"""

import numpy as np

from flaxmodels.data.documents import window_split
from flaxmodels.data.images import image_split
from flaxmodels.data.split import Source, describe, fingerprint
from flaxmodels.registry import Positive

_PATTERNS, _TRAIN, _TEST = range(3)  # streams of one seed


def synthetic_images(
    examples: Positive = 1024,
    test_examples: Positive = 256,
    classes: Positive = 10,
    side: Positive = 8,
    channels: Positive = 1,
    seed: int = 0,
) -> Source:
    """Noise around one random pattern per class; a linear model separates them.

    Args:
      examples: in the training split; each class equally often, within one.
      test_examples: in the test split.
      classes: number of classes.
      side: height and width in pixels.
      channels: number of channels.
      seed: of the patterns and the noise.
    """
    shape = (side, side, channels)
    pattern = _bytes(seed, _PATTERNS, (classes, *shape))
    splits = {}
    for stream, size in ((_TRAIN, examples), (_TEST, test_examples)):
        label = np.arange(size, dtype=np.int32) % np.int32(classes)
        image = pattern[label] // 2 + _bytes(seed, stream, (size, *shape)) // 2
        splits[stream] = {"image": image, "label": label}
    described = {f"{s}/{name}": describe(array) for s, arrays in splits.items() for name, array in arrays.items()}
    train, test = (image_split(splits[s], levels=255) for s in (_TRAIN, _TEST))
    return Source("synthetic_images", train, test, {"classes": classes}, fingerprint(described))


def synthetic_tokens(
    examples: Positive = 1024,
    test_examples: Positive = 128,
    vocab_size: Positive = 64,
    length: Positive = 64,
    seed: int = 0,
) -> Source:
    """Tokens that count up by one, modulo `vocab_size`, and at every fourth place or so jump anywhere.

    Args:
      examples: windows in the training split.
      test_examples: windows in the test split.
      vocab_size: number of tokens.
      length: tokens in a window.
      seed: of the jumps.
    """
    train = _counting(seed, _TRAIN, examples * length + 1, vocab_size)
    test = _counting(seed, _TEST, test_examples * length + 1, vocab_size)
    return Source(
        "synthetic_tokens",
        window_split(train, length),
        window_split(test, length),
        facts={"vocab_size": vocab_size, "max_length": length},
        fingerprint=fingerprint({"train/tokens": describe(train), "test/tokens": describe(test)}),
        tokens_per_example=length,
    )


def _raw(seed: int, stream: int, size: int) -> np.ndarray:
    """(size,) uint64, uniform."""
    return np.random.Philox(key=seed % 2**64 | stream << 64).random_raw(size)


def _bytes(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform uint8 of `shape`."""
    size = int(np.prod(shape))
    return _raw(seed, stream, -(-size // 8)).astype("<u8").view(np.uint8)[:size].reshape(shape)


def _counting(seed: int, stream: int, size: int, vocab_size: int) -> np.ndarray:
    """(size,) int32 below vocab_size: three steps in four are +1, the others uniform."""
    raw = _raw(seed, stream, size)
    steps = np.where(raw & np.uint64(3), np.uint64(1), (raw >> np.uint64(2)) % np.uint64(vocab_size))
    return (np.cumsum(steps) % np.uint64(vocab_size)).astype(np.int32)
