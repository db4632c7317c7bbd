"""Tokens that need no library: bytes, characters, words. What `tokenizer.py` trains, saves and loads."""

import abc
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flaxmodels.data.split import fingerprint
from flaxmodels.registry import UserError

UNKNOWN = "<unk>"
# What the special token that begins a text may be called; where one is added, it is the first.
BEGINS = ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>")
# A word or number, one mark, or the end of a line. Other white space separates, and is not kept.
WORD = re.compile(r"\w+|[^\w\s]|\n")
# Where `Words.decode` puts no space: before the first, and after the second. "'" is mostly that of "it's".
_CLOSING, _OPENING = frozenset(".,;:!?)]}%'\u2019\u201d\u00bb\n"), frozenset("([{'\u2018\u2019\u201c\u00ab\n")
# Where a long text may be cut: no word, and no token of a byte-level BPE, reaches over the end of a match.
_CUT = re.compile(r"\S(?= \S)|(?<=\S)\n(?=\S)")
# Characters of a piece of a long text; of the sizes tried, the library encodes this one the fastest.
_PIECE = 2**12


class _Special(abc.ABC):
    """The tokens that stand for no text: `marks`, the last ids."""

    marks: tuple[str, ...]

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of all tokens."""

    @property
    def special(self) -> Mapping[str, int]:
        """Id of each of `marks`."""
        return dict(zip(self.marks, range(self.size - len(self.marks), self.size)))

    @property
    def begin(self) -> int | None:
        """The id of the first of `BEGINS` that it has."""
        return next((self.special[name] for name in BEGINS if name in self.marks), None)

    @property
    def _marked(self) -> dict[str, Any]:
        """What `described` says of them: nothing where there are none."""
        return {"special": list(self.marks)} if self.marks else {}


@dataclasses.dataclass(frozen=True)
class Bytes(_Special):
    """UTF-8 bytes; with `documents`, 256 ends one.

    Attributes:
      documents: whether there is an `end`.
      marks: names of special tokens, after all others.
    """

    documents: bool = False
    marks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """256, one more with `documents`, and `marks`."""
        return 256 + self.documents + len(self.marks)

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        return 256 if self.documents else None

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) bytes of each token; 0 for `end` and special tokens."""
        return (1,) * 256 + (0,) * (self.size - 256)

    @property
    def described(self) -> dict[str, Any]:
        """What `save` writes."""
        return {"flaxmodels": 1, "kind": "bytes", "documents": self.documents, **self._marked}

    @property
    def fingerprint(self) -> str:
        """A hash of `described`."""
        return fingerprint(self.described)

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,)."""
        return np.frombuffer(utf8(text), np.uint8).astype(dtype(self.size), copy=False)

    def decode(self, ids: Any) -> str:
        """The text of ids (N,); bytes that are not UTF-8 become the replacement character, special tokens nothing."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Characters(_Special):
    """One id for each character, in the order of code points.

    Attributes:
      characters: id -> character.
      documents: whether the id after these, that of no character, ends a document.
      marks: names of special tokens, after all others.
    """

    characters: tuple[str, ...]
    documents: bool = False
    marks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of characters, one more with `documents`, and `marks`."""
        return len(self.characters) + self.documents + len(self.marks)

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        return len(self.characters) if self.documents else None

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) UTF-8 bytes of each character; 0 for `end` and special tokens."""
        return (*map(width, self.characters), *(0,) * (self.size - len(self.characters)))

    @property
    def described(self) -> dict[str, Any]:
        """What `save` writes: code points, which JSON can't garble."""
        points = [ord(c) for c in self.characters]
        said = {"flaxmodels": 1, "kind": "characters", "documents": self.documents, "characters": points}
        return said | self._marked

    @property
    def fingerprint(self) -> str:
        """A hash of `described`."""
        return fingerprint(self.described)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Code point -> id, -1 for one that is unknown; the last stands for all points above."""
        known = code_points("".join(self.characters))
        table = np.full(int(known.max(initial=0)) + 2, -1, np.int32)
        table[known] = np.arange(len(known))
        return table

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,). UserError for an unknown character."""
        points = code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if ids.min(initial=0) < 0:
            at = int((ids < 0).argmax())
            raise UserError(
                f"The character {text[at]!r} (position {at}) is not among the {len(self.characters)} of the "
                "vocabulary. Leave it out, or train with --config.data.tokens=bytes, which knows all."
            )
        return ids.astype(dtype(self.size))

    def decode(self, ids: Any) -> str:
        """The text of ids (N,); `end` and special tokens are nothing."""
        ids = np.asarray(ids, np.int64)
        known = code_points("".join(self.characters))
        return known[ids[ids < len(known)]].tobytes().decode("utf-32-le", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class Words(_Special):
    r"""Words, numbers, single marks and ends of lines: what `\w+|[^\w\s]|\n` finds. Other white space is not kept.

    Attributes:
      words: id -> word; id 0 is `UNKNOWN`, for all words that are not here.
      documents: whether the id after these, that of no word, ends a document.
      marks: names of special tokens, after all others.
    """

    words: tuple[str, ...]
    documents: bool = False
    marks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of words with `UNKNOWN`, one more with `documents`, and `marks`."""
        return len(self.words) + self.documents + len(self.marks)

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        return len(self.words) if self.documents else None

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) UTF-8 bytes of each word, without spaces; 0 for `UNKNOWN`, whose length nobody knows.

        So bits per byte count too few bytes: the figure is an upper bound. `end` and special tokens have none.
        """
        return (0, *map(width, self.words[1:]), *(0,) * (self.size - len(self.words)))

    @property
    def described(self) -> dict[str, Any]:
        """What `save` writes."""
        said = {"flaxmodels": 1, "kind": "words", "documents": self.documents, "words": list(self.words)}
        return said | self._marked

    @property
    def fingerprint(self) -> str:
        """A hash of `described`."""
        return fingerprint(self.described)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,); 0 for a word that is unknown."""
        known, found = self._ids.get, map(WORD.findall, cut(text))
        ids = [np.array([known(word, 0) for word in words], dtype(self.size)) for words in found]
        return np.concatenate(ids)

    def decode(self, ids: Any) -> str:
        """A readable text of ids (N,): words, with spaces where English has them; special tokens are nothing."""
        parts, before = [], "\n"
        for i in np.asarray(ids, np.int64).tolist():
            if i >= len(self.words):
                continue
            word = self.words[i]
            parts.append(word if word in _CLOSING or before in _OPENING else " " + word)
            before = word
        return "".join(parts)


def dtype(size: int) -> np.dtype[Any]:
    """The smallest unsigned dtype for ids below `size`."""
    return np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32)


def code_points(text: str) -> np.ndarray:
    """Code points: (N,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def width(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text.encode("utf-8", "surrogatepass"))


def utf8(text: str) -> bytes:
    """The UTF-8 of a text. UserError where it has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text[error.start]!r} at position {error.start} is half of a character (a lone surrogate), which has no "
            "bytes. Take it out of the text."
        ) from error


def cut(text: str) -> Iterator[str]:
    """The text in pieces of `_PIECE` characters and a little more, cut where no word is cut."""
    start = 0
    while found := _CUT.search(text, start + _PIECE):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
