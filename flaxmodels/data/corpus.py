"""The text that `flaxmodels prepare` reads: which files and columns, and which part of it is held out.

It is read several times, a piece after the other, and never held in memory.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flaxmodels import registry
from flaxmodels.data import held_out, reading, tables, text
from flaxmodels.data.reading import Record
from flaxmodels.data.vocabularies import width
from flaxmodels.registry import UserError

# The sources whose text can be prepared: what each does with its options, `prepare` does with the same ones.
SOURCES: Mapping[str, Callable[..., Any]] = {
    "text": text.text,
    "lines": tables.lines,
    "csv": tables.csv,
    "tsv": tables.tsv,
    "jsonl": tables.jsonl,
    "parquet": tables.parquet,
}
# Options that name files.
PATHS = ("path", "test_path")
# Options that matter when tokens are read, and not when they are made; and those of what is no plain text.
_LATER = ("length", "windows")
_OTHERS = ("label", "prompt", "completion", "pair", "messages", "template", "begin")
# Bytes read at a time.
_READ = 2**22


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text, or the next part of one.

    Attributes:
      split: "train" or "test".
      text: the characters.
      closed: whether the text ends here.
    """

    split: str
    text: str
    closed: bool


@dataclasses.dataclass(frozen=True)
class Survey:
    """What there is, counted.

    Attributes:
      texts: how many.
      pieces: how many they come in; one more where the end of the training split cuts one in two.
      characters: in all of them.
      nbytes: the same in UTF-8.
    """

    texts: int
    pieces: int
    characters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts, and how a part of them is held out.

    Attributes:
      records: gives them; each call from the start.
      hold_out: "tail": the last characters of all; "content": some texts, by a hash; "given": all of `test_records`.
      validation: the part to hold out.
      test_records: texts that are held out as they are.
    """

    records: Callable[[], Iterator[Record]]
    hold_out: Literal["tail", "content", "given"]
    validation: float
    test_records: Callable[[], Iterator[Record]] = lambda: iter(())

    def survey(self, progress: Callable[[int], None]) -> Survey:
        """Count everything. So a record that can't be read is found before hours of work, and not after them.

        Args:
          progress: told how many bytes a piece had.

        Raises:
          UserError: what `reading.read` raises; or a split would be empty.
        """
        texts, pieces, characters, nbytes, held = 0, 0, 0, 0, 0
        for piece in self.pieces(None):
            size = width(piece.text)
            texts, pieces, characters = texts + piece.closed, pieces + 1, characters + len(piece.text)
            nbytes, held = nbytes + size, held + (piece.split == "test")
            progress(size)
        if self.hold_out == "tail":
            held, pieces = round(characters * self.validation), pieces + 1
        total, unit = (characters, "character") if self.hold_out == "tail" else (texts, "text")
        if not 0 < held < total:
            raise UserError(
                f"data.validation={self.validation:g} of {counted(total, unit)} holds out {held}: expected at least "
                "one, and one to train on. Change it, or use more text."
            )
        return Survey(texts, pieces, characters, nbytes)

    def pieces(self, survey: Survey | None) -> Iterator[Piece]:
        """All texts, in order. With "tail" and no survey, nothing is held out."""
        if self.hold_out == "tail":
            total = survey.characters if survey else 0
            yield from _tail(self.records(), total - round(total * self.validation) if survey else None)
            return
        for record in self.records():
            out = self.hold_out == "content" and held_out.by_content(record.text, self.validation)
            yield Piece("test" if out else "train", record.text, record.last)
        for record in self.test_records():
            yield Piece("test", record.text, record.last)


def _tail(records: Iterator[Record], left: int | None) -> Iterator[Piece]:
    """The first `left` characters are to train on."""
    for record in records:
        cut = len(record.text) if left is None else min(left, len(record.text))
        left = None if left is None else left - cut
        if cut:
            yield Piece("train", record.text[:cut], record.last and cut == len(record.text))
        if cut < len(record.text):
            yield Piece("test", record.text[cut:], record.last)


def from_options(name: str, options: Mapping[str, Any]) -> tuple[Corpus, dict[str, Any]]:
    """The corpus that a data section of a config means, and all its options, with defaults, that tokens depend on.

    Args:
      name: one of `SOURCES`.
      options: of that source.

    Raises:
      UserError: another source, a wrong option, or something else than plain text.
    """
    if name not in SOURCES:
        raise UserError(f"data.name={name!r} can't be prepared. {registry.suggest(name, SOURCES)}")
    bound = registry.bind(SOURCES[name], options, where="data")
    known = registry.parameters([SOURCES[name]])
    said = {key: bound.get(key, parameter.default) for key, parameter in known.items() if key not in _LATER}
    for key in _OTHERS:
        if said.pop(key, None):
            raise UserError(
                f"data.{key}={options[key]!r}: only texts can be prepared, for a language model. Leave it out, and "
                f"name the column of texts in data.text; or train on {name!r} directly, which reads all of these."
            )
    columns = {key: said[key] for key in ("text", "encoding") if key in said}

    def records(path: reading.Paths, key: str) -> Callable[[], Iterator[Record]]:
        return lambda: reading.read(name, path, **columns, key=key)

    train = records(said["path"], "data.path")
    if (test_path := said.get("test_path")) is not None:
        return Corpus(train, "given", 0, records(test_path, "data.test_path")), said
    return Corpus(train, "tail" if name == "text" else "content", said["validation"]), said


def inputs(options: Mapping[str, Any]) -> list[tuple[Path, int]]:
    """The files that `options` name, and the bytes of each."""
    found = [reading.inputs(options[key], f"data.{key}") for key in PATHS if options.get(key) is not None]
    return [one for of_key in found for one in of_key]


def counted(number: int, thing: str) -> str:
    """1 and "text": "1 text"; 2 and "text": "2 texts"."""
    return f"{number} {thing}{'s' * (number != 1)}"


def describe(files: Sequence[tuple[Path, int]], progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each of the `inputs`, ready for JSON: {"file", "bytes", "sha256"}."""
    found = []
    for file, size in files:
        sha256 = hashlib.sha256()
        try:
            with file.open("rb") as content:
                while part := content.read(_READ):
                    sha256.update(part)
                    progress(len(part))
        except OSError as error:
            raise UserError(f"{file} can't be read: {error.strerror}.") from error
        found.append({"file": file.name, "bytes": size, "sha256": sha256.hexdigest()})
    return found
