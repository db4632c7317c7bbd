"""One line on one array: where it stands among our parameters and in a file of others, and how its axes turn."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

BLOCKS = "blocks/"


@dataclasses.dataclass(frozen=True)
class Link:
    """Where one array of ours stands in a file.

    Attributes:
      ours: its path in the parameters. One that begins with "blocks/" is one array of each block.
      theirs: the name of the tensor; "{}" is the number of the block.
      form: axes of ours -> of theirs, as `einops` writes them: "d n h -> (n h) d". A letter is a size (see `sizes`).
      part: (k, n): ours is the k-th of n equal parts of the tensor's last axis.
    """

    ours: str
    theirs: str
    form: str
    part: tuple[int, int] = (0, 1)

    @property
    def of_blocks(self) -> bool:
        """Whether each block has one."""
        return self.ours.startswith(BLOCKS)

    def names(self, layers: int) -> list[str]:
        """The tensors in a file: of each block, or one."""
        return [self.theirs.format(i) for i in range(layers)] if self.of_blocks else [self.theirs]

    @property
    def sides(self) -> tuple[list[list[str]], list[list[str]]]:
        """The letters of each axis, of ours and of theirs."""
        ours, _, theirs = self.form.partition(" -> ")
        return _groups(ours), _groups(theirs or ours)

    @property
    def _turn(self) -> list[int]:
        """Where each letter of ours stands among theirs."""
        ours, theirs = (list(itertools.chain.from_iterable(side)) for side in self.sides)
        return [theirs.index(letter) for letter in ours]

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of our array, of one block."""
        return _shape(self.sides[0], sizes)

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        *first, last = _shape(self.sides[1], sizes)
        return (*first, last * self.part[1])

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our array of theirs, of one block; a view of it where that can be."""
        k, n = self.part
        width = tensor.shape[-1] // n
        part = tensor[..., k * width : (k + 1) * width] if n > 1 else tensor
        apart = part.reshape([sizes[letter] for group in self.sides[1] for letter in group])
        return apart.transpose(self._turn).reshape(self.our_shape(sizes))

    def to_theirs(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Their tensor of ours, of one block; one part of it where there are several."""
        apart = array.reshape([sizes[letter] for group in self.sides[0] for letter in group])
        return apart.transpose(np.argsort(self._turn)).reshape(_shape(self.sides[1], sizes))


def _groups(side: str) -> list[list[str]]:
    return [axis.strip("()").replace("1", "").split() for axis in re.findall(r"\([^)]*\)|\w", side)]


def _shape(groups: list[list[str]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)
