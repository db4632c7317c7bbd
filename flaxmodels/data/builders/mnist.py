"""TFDS builder for MNIST from its four original archives.

TFDS has a builder of its own that needs TensorFlow to unzip, to read and to write; this one needs gzip and numpy.
"""

import gzip
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import MNIST
from flaxmodels.registry import UserError

_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_SPLITS = {
    "train": ("train", 60_000),
    "test": ("t10k", 10_000),
}  # split -> (prefix of its archives, examples)

_CITATION = """@article{lecun2010mnist,
  title={MNIST handwritten digit database},
  author={LeCun, Yann and Cortes, Corinna and Burges, CJ},
  journal={ATT Labs [Online]. Available: http://yann.lecun.com/exdb/mnist}, volume={2}, year={2010}}"""


def parse_idx(archive: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
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


class Builder(tfds.core.GeneratorBasedBuilder):
    """28x28 images of digits, uint8 in 0..255; splits "train" (60,000) and "test" (10,000)."""

    name = MNIST.name
    VERSION = tfds.core.Version(MNIST.version)
    RELEASE_NOTES: ClassVar = {MNIST.version: "In the order of the archives."}
    URLS = tuple(
        f"{_URL}{prefix}-{part}-ubyte.gz" for prefix, _ in _SPLITS.values() for part in ("images-idx3", "labels-idx1")
    )

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The MNIST database of handwritten digits.",
            citation=_CITATION,
            homepage="http://yann.lecun.com/exdb/mnist/",
            features=tfds.features.FeaturesDict(
                {
                    # Without "bytes" each pixel is stored as a varint, and read back at half the speed.
                    "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keeps the order of the archives, not that of a hash inside TFDS
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # Not download_and_extract: TFDS extracts with TensorFlow.
        paths = dl_manager.download({url.removeprefix(_URL): url for url in self.URLS})
        splits = {}
        for split, (prefix, size) in _SPLITS.items():
            images, labels = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
            image = parse_idx(paths[images].read_bytes(), (size, 28, 28), images)[..., None]
            splits[split] = self._generate_examples(image, parse_idx(paths[labels].read_bytes(), (size,), labels))
        return splits

    def _generate_examples(self, image: np.ndarray, label: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(label)):
            yield i, {"image": image[i], "label": int(label[i])}
