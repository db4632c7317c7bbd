"""MNIST and the sets made to stand in for it: four gzipped IDX archives of the same names, 28x28, ten classes.

TFDS has builders of its own that need TensorFlow to unzip, to read and to write; these need gzip and numpy.
"""

import gzip
import struct
from typing import Any

import numpy as np

from flaxmodels.registry import UserError

SHAPE = (28, 28, 1)
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # split -> (prefix of its archives, examples)
_PARTS = ("images-idx3", "labels-idx1")


def urls(folder: str) -> tuple[str, ...]:
    """Where the four archives are, below the URL of a folder, which ends in a slash."""
    return tuple(f"{folder}{prefix}-{part}-ubyte.gz" for prefix, _ in SPLITS.values() for part in _PARTS)


def parse(archive: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A gzipped IDX file of bytes -> an array of `shape`, uint8.

    The format: two zero bytes, 8 for "unsigned byte", the number of dimensions, then each dimension as a big-endian
    uint32, then the bytes.

    Raises:
      UserError: it is something else, or of another shape.
    """
    content = gzip.decompress(archive)
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    if not content.startswith(header) or len(content) != len(header) + int(np.prod(shape)):
        raise UserError(f"{name} is not an IDX file of {shape} unsigned bytes. Fetch the original archive.")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def read(dl_manager: Any, urls: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Download the archives at `urls`, or find them -> split -> images (N, *SHAPE) uint8 and labels (N,) uint8."""
    # Not download_and_extract: TFDS extracts with TensorFlow.
    paths = dl_manager.download({url.rpartition("/")[2]: url for url in urls})
    splits = {}
    for split, (prefix, size) in SPLITS.items():
        images, labels = (f"{prefix}-{part}-ubyte.gz" for part in _PARTS)
        image = parse(paths[images].read_bytes(), (size, *SHAPE[:2]), images)
        splits[split] = image[..., None], parse(paths[labels].read_bytes(), (size,), labels)
    return splits
