"""TFDS builder for the 1,797 handwritten digits that come with scikit-learn."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import DIGITS

_CITATION = """@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998}, publisher = {UCI Machine Learning Repository}, doi = {10.24432/C50P49}}"""


def held_out(label: np.ndarray, every: int = 5) -> np.ndarray:
    """The first of each class and every fifth after it, in the order they come: (N,) int -> (N,) bool."""
    held = np.zeros(len(label), bool)
    for value in np.unique(label):
        held[np.flatnonzero(label == value)[::every]] = True
    return held


class Builder(tfds.core.GeneratorBasedBuilder):
    """8x8 images of digits, uint8 in 0..16; splits "train" (1,433) and "test" (364)."""

    name = DIGITS.name
    VERSION = tfds.core.Version(DIGITS.version)
    RELEASE_NOTES: ClassVar = {DIGITS.version: "The first of each class and every fifth after it are held out."}
    URLS = ()

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test set of the UCI Optical Recognition of Handwritten Digits, as in scikit-learn.",
            citation=_CITATION,
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset",
            features=tfds.features.FeaturesDict(
                {
                    # Without "bytes" each pixel is stored as a varint, and read back at half the speed.
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keeps the order of scikit-learn, not that of a hash inside TFDS
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        image, label = digits.images.astype(np.uint8)[..., None], digits.target
        held = held_out(label)
        return {
            "train": self._generate_examples(image[~held], label[~held]),
            "test": self._generate_examples(image[held], label[held]),
        }

    def _generate_examples(self, image: np.ndarray, label: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(label)):
            yield i, {"image": image[i], "label": int(label[i])}
