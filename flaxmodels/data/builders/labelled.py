"""What the TFDS builders of labelled images have in common."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import Recipe


class LabelledImages(tfds.core.GeneratorBasedBuilder):
    """Images of one shape, uint8, each with a label; splits "train" and "test", in the order they come in.

    Attributes:
      RECIPE: whose name and version this is; its labels name the classes.
      SHAPE: (height, width, channels).
      ABOUT: "description", "homepage" and "citation", for TFDS.
      URLS: of the archives.
    """

    RECIPE: ClassVar[Recipe]
    SHAPE: ClassVar[tuple[int, int, int]]
    ABOUT: ClassVar[Mapping[str, str]]
    URLS: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Split -> images (N, *SHAPE) uint8 and labels (N,)."""

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    # Without "bytes" each pixel is stored as a varint, and read back at half the speed.
                    "image": tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.ClassLabel(names=self.RECIPE.labels),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keeps the order they come in, not that of a hash inside TFDS
            **self.ABOUT,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(*arrays) for split, arrays in self.arrays(dl_manager).items()}

    def _generate_examples(self, image: np.ndarray, label: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(label)):
            yield i, {"image": image[i], "label": int(label[i])}
