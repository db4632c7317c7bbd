"""Text for language models, as tokens that are characters or bytes: any UTF-8 files, CPython's docs, Shakespeare.

A split is one long array of tokens. Example `i` reads the `length` tokens from `i * length` on and predicts the token
after each. So each token of a split but its first is a target exactly once; the last example is padded by weights.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxmodels.data import builders, prepared
from flaxmodels.data.split import Batch, Rows, Source, Split, describe, fingerprint, take
from flaxmodels.registry import Fraction, Positive, UserError

Tokens = Literal["bytes", "characters"]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Between text and token ids.

    Attributes:
      characters: token id -> character, in the order of code points; None where tokens are UTF-8 bytes.
    """

    characters: tuple[str, ...] | None

    @property
    def size(self) -> int:
        """Number of tokens: ids are below it."""
        return 256 if self.characters is None else len(self.characters)

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) UTF-8 bytes of each token."""
        return (1,) * 256 if self.characters is None else tuple(len(c.encode()) for c in self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Token ids: (N,) uint8, or uint16 or int32 where ids need it. UserError for an unknown character."""
        if self.characters is None:
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        known, points = _points("".join(self.characters)), _points(text)
        ids = np.searchsorted(known, points).clip(0, len(known) - 1)
        if (unknown := known[ids] != points).any():
            at = int(unknown.argmax())
            raise UserError(
                f"The character {text[at]!r} (position {at}) is not among the {self.size} of the vocabulary. "
                "Leave it out, or train with --config.data.tokens=bytes, which knows all."
            )
        return ids.astype(np.uint8 if self.size <= 2**8 else np.uint16 if self.size <= 2**16 else np.int32)

    def decode(self, ids: Any) -> str:
        """The text of token ids (N,); bytes that are not UTF-8 become the replacement character."""
        ids = np.asarray(ids)
        if self.characters is None:
            return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return "".join(self.characters[i] for i in ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """A source of text, with the vocabulary that its tokens mean."""

    vocabulary: Vocabulary


def text(path: str, tokens: Tokens = "characters", length: Positive = 64, validation: Fraction = 0.1) -> TextSource:
    """Your own text.

    Args:
      path: a UTF-8 file, or a glob; the files are read in the order of their names, and joined as they are.
      tokens: what a token is; the vocabulary of characters is those that occur in the whole text.
      length: tokens in a context window.
      validation: the part of the text, at its end, that is held out.

    Raises:
      UserError: no such file, not UTF-8, or too short for `length` and `validation`.
    """
    where = f"data.path={path!r}"
    return _source("text", "".join(map(_read, _files(path, where))), where, tokens, length, validation)


def pydocs(tokens: Tokens = "characters", length: Positive = 64, validation: Fraction = 0.1) -> TextSource:
    """The language reference inside CPython (`pydoc_data.topics`), English, some 700,000 characters. No download.

    Each Python version has its own text, and so its own vocabulary and fingerprint. Arguments: see `text`.
    """
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    return _source("pydocs", whole, "data.name='pydocs'", tokens, length, validation)


def tiny_shakespeare(
    manual_dir: str | None = None,
    data_dir: str | None = None,
    tokens: Tokens = "characters",
    length: Positive = 64,
    validation: Fraction = 0.1,
) -> TextSource:
    """Tiny Shakespeare: 1,115,394 characters of 65 kinds. Downloads 1.1 MB at first use.

    Args:
      manual_dir: a folder with `input.txt`, for machines without a network; verified by sha256.
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.
      tokens: see `text`.
      length: see `text`.
      validation: see `text`.

    Raises:
      UserError: the text is missing, damaged, or can't be downloaded.
    """
    found = prepared.load(builders.TINY_SHAKESPEARE, data_dir, manual_dir)
    whole = found.arrays["whole"]["text"][0].tobytes().decode("utf-8")
    return _source("tiny_shakespeare", whole, "data.name='tiny_shakespeare'", tokens, length, validation)


def _files(path: str, where: str) -> list[Path]:
    named = Path(path).expanduser()
    if named.is_file():  # also one whose name has a "*" or a "[" in it
        return [named]
    if named.is_dir():
        raise UserError(f"{where} is a folder. For the files in it, say {str(named / '*')!r}.")
    try:
        found = Path(named.anchor).glob(str(named.relative_to(named.anchor)))
        files = sorted(f for f in found if f.is_file())
    except ValueError as error:
        raise UserError(f"{where} is not a file, nor a pattern for files: {error}.") from error
    if not files:
        raise UserError(
            f"{where}: there is no such file. Paths are taken from {Path.cwd()}; globs such as 'texts/*.txt' work too."
        )
    return files


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()  # not read_text, which would change the ends of lines
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"data.path: {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}, line {line}. "
            "Convert it: iconv -f latin1 -t utf-8."
        ) from error


def _points(text: str) -> np.ndarray:
    """Code points: (N,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _source(name: str, whole: str, where: str, tokens: Tokens, length: int, validation: float) -> TextSource:
    characters = tuple(map(chr, np.unique(_points(whole)))) if tokens == "characters" else None
    vocabulary = Vocabulary(characters)
    cut = len(whole) - round(len(whole) * validation)
    train, test = vocabulary.encode(whole[:cut]), vocabulary.encode(whole[cut:])
    if len(train) <= length:
        raise UserError(
            f"{where}: {len(train)} {tokens} to train on, with data.validation={validation:g} held out, make no window "
            f"of data.length={length} and a token to predict. Use more text, or a smaller length or validation."
        )
    if len(test) < 2:
        raise UserError(
            f"{where}: data.validation={validation:g} of {len(whole)} characters holds out {len(test)} {tokens}; "
            "at least 2 are needed. Use more text, or a larger fraction."
        )
    parts = {"train/tokens": train, "test/tokens": test, "vocabulary": _points("".join(characters or ()))}
    return TextSource(
        name,
        window_split(train, length),
        window_split(test, length),
        facts={"vocab_size": vocabulary.size, "max_length": length},
        fingerprint=fingerprint({part: describe(array) for part, array in parts.items()}),
        tokens_per_example=length,
        token_bytes=vocabulary.token_bytes,
        vocabulary=vocabulary,
    )


def window_split(tokens: np.ndarray, length: int) -> Split:
    """A split of {"tokens": (N,)} with N >= 2: ceil((N - 1) / length) windows that overlap by one token."""
    if len(tokens) + length >= 2**31:
        raise UserError(f"{len(tokens)} tokens are too many: positions are int32. Use at most 2**31 - data.length.")
    return Split(
        size=-(-(len(tokens) - 1) // length),
        arrays={"tokens": tokens},
        gather=functools.partial(_gather, length=length, count=len(tokens)),
        prepare=functools.partial(_prepare, length=length, count=len(tokens)),
    )


def _gather(arrays: Mapping[str, Any], index: Any, length: int, count: int) -> Rows:
    """Windows with the token after them: {"tokens": (B, length + 1)}; past the end, the last token again."""
    positions = index.clip(0)[:, None] * np.int32(length) + np.arange(length + 1, dtype=np.int32)[None, :]
    return {"tokens": take(arrays["tokens"], positions.clip(0, count - 1))}


def _prepare(rows: Rows, index: Any, length: int, count: int) -> Batch:
    """Inputs and targets (B, length) int32, weights (B, length) float32."""
    tokens = rows["tokens"].astype(np.int32)
    targets = index[:, None] * np.int32(length) + np.arange(1, length + 1, dtype=np.int32)[None, :]
    real = (index >= 0)[:, None] & (targets < count)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": real.astype(np.float32)}
