"""Image classification sets: digits (8x8, comes with scikit-learn) and MNIST (28x28)."""

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
    return _source("digits", prepared.load(builders.DIGITS, data_dir), levels=16)


def mnist(manual_dir: str | None = None, data_dir: str | None = None) -> Source:
    """MNIST, 28x28x1: 60,000 to train on, 10,000 held out. Downloads 11.6 MB at first use.

    Args:
      manual_dir: a folder with the four original archives, for machines without a network; verified by sha256.
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Raises:
      UserError: an archive is missing, damaged, or can't be downloaded.
    """
    return _source("mnist", prepared.load(builders.MNIST, data_dir, manual_dir), levels=255)


def _source(name: str, found: prepared.Prepared, levels: int) -> Source:
    train, test = (image_split(found.arrays[s], levels) for s in ("train", "test"))
    return Source(name, train, test, facts={"classes": 10}, fingerprint=found.fingerprint)


def image_split(arrays: Mapping[str, np.ndarray], levels: int) -> Split:
    """A split of {"image": (N, H, W, C) uint8 in 0..levels, "label": (N,) int32}."""
    return Split(len(arrays["label"]), arrays, gather_rows, functools.partial(_prepare, levels=levels))


def _prepare(rows: Rows, index: Any, levels: int) -> Batch:
    """Inputs (B, H, W, C) float32 in 0..1, targets (B,) int32, weights (B,) float32."""
    # Multiplied, not divided: XLA may turn a division into this, and the last bit must not depend on who computes.
    scale = np.float32(1 / levels)
    return {
        "inputs": rows["image"].astype(np.float32) * scale,
        "targets": rows["label"],
        "weights": (index >= 0).astype(np.float32),
    }
