"""Files by path or glob, and their text as it is, in constant memory."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from flaxmodels.registry import UserError, suggest

# Bytes read at a time.
PIECE = 2**20
# What files in an encoding begin with; the longer marks first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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
    r"""Lines without their "\n". UserError where a file seems to end them with "\r" alone."""
    rest, first = "", True
    for piece in decoded(file, encoding):
        if first and "\n" not in piece and "\r" in piece[:-1]:
            raise UserError(
                f"{file} has no line end but the carriage return alone (CR), as long ago on the Mac. Convert it: "
                "tr '\\r' '\\n' < OLD > NEW."
            )
        first = False
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest


def decoded(file: Path, encoding: str) -> Iterator[str]:
    """The content of a file, in pieces of up to `PIECE` bytes, cut anywhere between characters.

    As it is, but for the mark (a "byte order mark") that some editors put before the first character.
    """
    decoder, offset, lines, head = codecs.getincrementaldecoder(encoding)(), 0, 0, b""
    try:
        with file.open("rb") as stream:  # not as text, which would change the ends of lines
            while content := stream.read(PIECE):
                head = head or content[:4]
                piece = decoder.decode(content)
                yield piece if offset else piece.removeprefix("\ufeff")
                offset, lines = offset + len(content), lines + piece.count("\n")
            yield decoder.decode(b"", True)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        before = offset - (len(error.object) - len(content)) + error.start
        line = lines + error.object.count(b"\n", 0, error.start) + 1
        likely = next((name for mark, name in _MARKS if head.startswith(mark)), "latin-1")
        raise UserError(
            f"{file}:{line} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {before}. Say what it "
            f'is, as in data.encoding="{likely}", or convert it: iconv -f {likely.replace("latin-", "latin")} -t utf-8.'
        ) from error
