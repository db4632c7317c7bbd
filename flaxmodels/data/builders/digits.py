"""TFDS builder for the 1,797 handwritten digits that come with scikit-learn."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import DIGITS
from flaxmodels.data.builders.labelled import LabelledImages

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


class Builder(LabelledImages):
    """8x8 images of digits, uint8 in 0..16; splits "train" (1,433) and "test" (364)."""

    name = DIGITS.name
    VERSION = tfds.core.Version(DIGITS.version)
    RELEASE_NOTES: ClassVar = {DIGITS.version: "The first of each class and every fifth after it are held out."}
    RECIPE = DIGITS
    SHAPE = (8, 8, 1)
    ABOUT: ClassVar = {
        "description": "The test set of the UCI Optical Recognition of Handwritten Digits, as in scikit-learn.",
        "homepage": "https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset",
        "citation": _CITATION,
    }

    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `LabelledImages.arrays`."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        image, label = digits.images.astype(np.uint8)[..., None], digits.target
        held = held_out(label)
        return {"train": (image[~held], label[~held]), "test": (image[held], label[held])}
