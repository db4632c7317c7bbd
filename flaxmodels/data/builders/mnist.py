"""TFDS builder for MNIST."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import MNIST, idx
from flaxmodels.data.builders.labelled import LabelledImages

_CITATION = """@article{lecun2010mnist,
  title={MNIST handwritten digit database},
  author={LeCun, Yann and Cortes, Corinna and Burges, CJ},
  journal={ATT Labs [Online]. Available: http://yann.lecun.com/exdb/mnist}, volume={2}, year={2010}}"""


class Builder(LabelledImages):
    """28x28x1 images of digits, uint8 in 0..255; splits "train" (60,000) and "test" (10,000)."""

    name = MNIST.name
    VERSION = tfds.core.Version(MNIST.version)
    RELEASE_NOTES: ClassVar = {MNIST.version: "In the order of the archives."}
    RECIPE = MNIST
    SHAPE = idx.SHAPE
    URLS = idx.urls("https://storage.googleapis.com/cvdf-datasets/mnist/")
    ABOUT: ClassVar = {
        "description": "The MNIST database of handwritten digits.",
        "homepage": "http://yann.lecun.com/exdb/mnist/",
        "citation": _CITATION,
    }

    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `LabelledImages.arrays`."""
        return idx.read(dl_manager, self.URLS)
