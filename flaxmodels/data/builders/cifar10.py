"""TFDS builder for CIFAR-10, from its binary version: the one for Python is a pickle."""

import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from flaxmodels.data.builders import CIFAR10
from flaxmodels.data.builders.labelled import LabelledImages
from flaxmodels.registry import UserError

_FOLDER = "cifar-10-batches-bin/"
_FILES = {
    "train": tuple(f"{_FOLDER}data_batch_{i}.bin" for i in range(1, 6)),
    "test": (f"{_FOLDER}test_batch.bin",),
}  # split -> its files, in order
EXAMPLES = 10_000  # in each of them

_CITATION = """@techreport{krizhevsky2009learning,
  title={Learning multiple layers of features from tiny images}, author={Krizhevsky, Alex}, year={2009}}"""


def read(
    archive: Path, files: Mapping[str, tuple[str, ...]], examples: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The splits in the archive, which is read once from front to end, and nothing of it written to disk.

    Args:
      archive: a gzipped tar file.
      files: split -> names of its members; each is `examples` records of a byte for the label, then the red, the green
        and the blue plane of 32x32 bytes.
      examples: in each member.

    Returns:
      split -> images (N, 32, 32, 3) uint8 and labels (N,) uint8.

    Raises:
      UserError: not such an archive; a member is missing, or of another size; a label over 9.
    """
    shape = (3, 32, 32)
    record = 1 + int(np.prod(shape))
    wanted = {name for names in files.values() for name in names}
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                if member.name in wanted:
                    content = _content(members, member, examples * record, archive)
                    found[member.name] = np.frombuffer(content, np.uint8).reshape(examples, record)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive} is not a whole .tar.gz archive: {error}. Fetch the original one.") from error
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{archive} lacks {', '.join(missing)}: expected the binary version of CIFAR-10.")
    for name, records in found.items():
        if (wrong := records[:, 0] > 9).any():
            at = int(wrong.argmax())
            raise UserError(f"{archive}: record {at} of {name} has the label {records[at, 0]}: expected 0 to 9.")
    splits = {}
    for split, names in files.items():
        planes = np.concatenate([found[name][:, 1:].reshape(-1, *shape) for name in names])
        splits[split] = planes.transpose(0, 2, 3, 1), np.concatenate([found[name][:, 0] for name in names])
    return splits


def _content(members: tarfile.TarFile, member: tarfile.TarInfo, size: int, archive: Path) -> bytes:
    # Looked at before it is read: what an archive says must not decide how much memory it takes.
    file = members.extractfile(member) if member.isfile() and member.size == size else None
    if file is None:
        raise UserError(
            f"{archive}: {member.name} is not a file of {size} bytes, as in the binary version of CIFAR-10."
        )
    return file.read()


class Builder(LabelledImages):
    """32x32x3 photographs, uint8 in 0..255; splits "train" (50,000) and "test" (10,000)."""

    name = CIFAR10.name
    VERSION = tfds.core.Version(CIFAR10.version)
    RELEASE_NOTES: ClassVar = {CIFAR10.version: "In the order of the archive."}
    RECIPE = CIFAR10
    SHAPE = (32, 32, 3)
    URLS = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)
    ABOUT: ClassVar = {
        "description": "Colour images of ten classes of things.",
        "homepage": "https://www.cs.toronto.edu/~kriz/cifar.html",
        "citation": _CITATION,
    }

    def arrays(self, dl_manager: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `LabelledImages.arrays`."""
        # Not download_and_extract: TFDS extracts with TensorFlow.
        return read(Path(dl_manager.download(self.URLS[0])), _FILES, EXAMPLES)
