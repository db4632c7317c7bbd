"""TFDS builder for tiny Shakespeare: one text of 1,115,394 characters, as one example."""

from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from flaxmodels.data.builders import TINY_SHAKESPEARE

_CITATION = """@misc{karpathy2015charrnn,
  author={Karpathy, Andrej}, title={char-rnn}, year={2015}, howpublished={https://github.com/karpathy/char-rnn}}"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """The whole text in one split, "whole": where to cut it is for the one who trains to say."""

    name = TINY_SHAKESPEARE.name
    VERSION = tfds.core.Version(TINY_SHAKESPEARE.version)
    RELEASE_NOTES: ClassVar = {TINY_SHAKESPEARE.version: "One split, not cut."}
    URLS = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",)

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="40,000 lines of Shakespeare from a variety of plays.",
            citation=_CITATION,
            homepage="https://github.com/karpathy/char-rnn",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"whole": self._generate_examples(dl_manager.download(self.URLS[0]).read_bytes())}

    def _generate_examples(self, text: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        yield 0, {"text": text}
