"""TFDS builder for Fashion-MNIST."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import FASHION_MNIST, idx
from flaxmodels.data.builders.labelled import LabelledImages

_CITATION = """@article{xiao2017fashion,
  title={Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author={Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal={arXiv:1708.07747}, year={2017}}"""


class Builder(LabelledImages):
    """28x28x1 images of clothing, uint8 in 0..255; splits "train" (60,000) and "test" (10,000)."""

    name = FASHION_MNIST.name
    VERSION = tfds.core.Version(FASHION_MNIST.version)
    RELEASE_NOTES: ClassVar = {FASHION_MNIST.version: "In the order of the archives."}
    RECIPE = FASHION_MNIST
    SHAPE = idx.SHAPE
    URLS = idx.urls("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/")
    ABOUT: ClassVar = {
        "description": "Zalando's article images, in the format of MNIST.",
        "homepage": "https://github.com/zalandoresearch/fashion-mnist",
        "citation": _CITATION,
    }

    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `LabelledImages.arrays`."""
        return idx.read(dl_manager, self.URLS)
