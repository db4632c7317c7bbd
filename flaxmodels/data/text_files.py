"""Files by path or glob, and their text as it is, in constant memory."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from flaxmodels.registry import UserError, suggest

# Bytes read at a time.
PIECE = 2**20


def find(path: str, where: str) -> list[Path]:
    """The file that `path` is, or those that it matches, in the order of their names; UserError where there is none."""
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


def check_encoding(encoding: str) -> None:
    """UserError where Python knows no such encoding of text."""
    try:
        "a".encode(encoding)
    except LookupError as error:
        raise UserError(
            f"data.encoding={encoding!r} is not known. {suggest(encoding, ('utf-8', 'latin-1', 'cp1252', 'utf-16'))}"
        ) from error


def lines(file: Path, encoding: str) -> Iterator[str]:
    r"""Lines without their "\n", and without the mark that some editors put before the first."""
    rest, first = "", True
    for piece in decoded(file, encoding):
        *whole, rest = (rest + piece.removeprefix("\ufeff") if first else rest + piece).split("\n")
        first = False
        yield from whole
    if rest:
        yield rest


def decoded(file: Path, encoding: str) -> Iterator[str]:
    """The content of a file as it is, in pieces of up to `PIECE` bytes, cut anywhere between characters."""
    decoder, offset, lines = codecs.getincrementaldecoder(encoding)(), 0, 0
    try:
        with file.open("rb") as stream:  # not as text, which would change the ends of lines
            while content := stream.read(PIECE):
                piece = decoder.decode(content)
                yield piece
                offset, lines = offset + len(content), lines + piece.count("\n")
            yield decoder.decode(b"", True)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        before = offset - (len(error.object) - len(content)) + error.start
        line = lines + error.object.count(b"\n", 0, error.start) + 1
        other = 'data.encoding="latin-1"' if codecs.lookup(encoding).name == "utf-8" else "data.encoding"
        raise UserError(
            f"{file}:{line} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {before}. "
            f"Say what it is, as in {other}, or convert it: iconv -f latin1 -t utf-8."
        ) from error
