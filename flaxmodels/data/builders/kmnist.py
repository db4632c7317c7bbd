"""TFDS builder for Kuzushiji-MNIST."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import KMNIST, idx
from flaxmodels.data.builders.labelled import LabelledImages

_CITATION = """@article{clanuwat2018deep,
  title={Deep Learning for Classical Japanese Literature},
  author={Clanuwat, Tarin and Bober-Irizar, Mikel and Kitamoto, Asanobu
    and Lamb, Alex and Yamamoto, Kazuaki and Ha, David},
  journal={arXiv:1812.01718}, year={2018}}"""


class Builder(LabelledImages):
    """28x28x1 images of hiragana, uint8 in 0..255; splits "train" (60,000) and "test" (10,000)."""

    name = KMNIST.name
    VERSION = tfds.core.Version(KMNIST.version)
    RELEASE_NOTES: ClassVar = {KMNIST.version: "In the order of the archives."}
    RECIPE = KMNIST
    SHAPE = idx.SHAPE
    URLS = idx.urls("http://codh.rois.ac.jp/kmnist/dataset/kmnist/")
    ABOUT: ClassVar = {
        "description": "Cursive hiragana, one character from each of ten rows, in the format of MNIST.",
        "homepage": "http://codh.rois.ac.jp/kmnist/index.html.en",
        "citation": _CITATION,
    }

    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `LabelledImages.arrays`."""
        return idx.read(dl_manager, self.URLS)
