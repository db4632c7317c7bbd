"""Image classification sets that everybody measures with: digits, MNIST, Fashion-MNIST, KMNIST and CIFAR-10.

All of them are prepared once (`prepared.py`), then read whole. Your own images: `image_folder.py` and `arrays.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxmodels.data import builders, prepared
from flaxmodels.data.split import Batch, Rows, Source, Split, gather_rows


def digits(data_dir: str | None = None) -> Source:
    """The 1,797 digits of scikit-learn, 8x8x1; a fifth of each class held out. No download.

    Args:
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.
    """
    return _source("digits", builders.DIGITS, data_dir, levels=16)


def mnist(manual_dir: str | None = None, data_dir: str | None = None) -> Source:
    """MNIST, 28x28x1: 60,000 to train on, 10,000 held out. Downloads 11.6 MB at first use.

    Args:
      manual_dir: a folder with the four original archives, for machines without a network; verified by sha256.
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Raises:
      UserError: an archive is missing, damaged, or can't be downloaded.
    """
    return _source("mnist", builders.MNIST, data_dir, manual_dir)


def fashion_mnist(manual_dir: str | None = None, data_dir: str | None = None) -> Source:
    """Fashion-MNIST, articles of clothing, 28x28x1: 60,000 to train on, 10,000 held out. Downloads 31 MB at first use.

    Arguments and errors: see `mnist`. The archives have the names of MNIST's, so they need a `manual_dir` of their own.
    """
    return _source("fashion_mnist", builders.FASHION_MNIST, data_dir, manual_dir)


def kmnist(manual_dir: str | None = None, data_dir: str | None = None) -> Source:
    """Kuzushiji-MNIST, cursive hiragana, 28x28x1: 60,000 to train on, 10,000 held out. Downloads 21 MB at first use.

    Arguments and errors: see `mnist`. The archives have the names of MNIST's, so they need a `manual_dir` of their own.
    """
    return _source("kmnist", builders.KMNIST, data_dir, manual_dir)


def cifar10(manual_dir: str | None = None, data_dir: str | None = None) -> Source:
    """CIFAR-10, photographs, 32x32x3: 50,000 to train on, 10,000 held out. Downloads 170 MB at first use.

    Arguments and errors: see `mnist`. The archive is that of the binary version, `cifar-10-binary.tar.gz`.
    """
    return _source("cifar10", builders.CIFAR10, data_dir, manual_dir)


def _source(
    name: str, recipe: builders.Recipe, data_dir: str | None, manual_dir: str | None = None, levels: int = 255
) -> Source:
    found = prepared.load(recipe, data_dir, manual_dir)
    train, test = (image_split(found.arrays[s], levels) for s in ("train", "test"))
    return Source(name, train, test, {"classes": len(recipe.labels)}, found.fingerprint, labels=recipe.labels)


def image_split(arrays: Mapping[str, np.ndarray], levels: int) -> Split:
    """A split of {"image": (N, H, W, C) uint8 in 0..levels, "label": (N,) int32}."""
    return Split(len(arrays["label"]), arrays, gather_rows, functools.partial(prepare, levels=levels))


def prepare(rows: Rows, index: Any, levels: int = 255) -> Batch:
    """A `Split.prepare` of rows {"image": (B, H, W, C) uint8 in 0..levels, "label": (B,) int32}.

    Returns:
      Inputs (B, H, W, C) float32 in 0..1, targets (B,) int32, weights (B,) float32.
    """
    return {
        "inputs": scaled(rows["image"], levels),
        "targets": rows["label"],
        "weights": (index >= 0).astype(np.float32),
    }


def scaled(image: Any, levels: int = 255) -> Any:
    """Unsigned bytes in 0..levels, of any shape, as float32 in 0..1."""
    # Multiplied, not divided: XLA may turn a division into this, and the last bit must not depend on who computes.
    return image.astype(np.float32) * np.float32(1 / levels)
