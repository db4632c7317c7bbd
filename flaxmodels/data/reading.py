"""Records of text, one after the other, from files of the common formats, in constant memory.

`read` is the way in. Every format becomes rows of (line, values), and `_record` says what a value may be.
"""

import csv
import dataclasses
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from flaxmodels.data import chat
from flaxmodels.data.chat import Message
from flaxmodels.data.text_files import check_encoding, decoded, find, lines
from flaxmodels.registry import UserError, suggest

Kind = Literal["text", "lines", "csv", "tsv", "jsonl", "parquet"]
KINDS: tuple[str, ...] = get_args(Kind)
Paths = str | tuple[str, ...]

# Characters from which on a text is handed over in pieces.
PIECE = 2**20
# Rows of a parquet file read at a time.
ROWS = 1024
# A line end between two lines that are not blank: words and BPE see the same left and right of it as in one piece.
_BREAK = re.compile(r"(?s).*\S\n(?=\S)")

# What a header that is one column may be separated by, and what to do then.
_SEPARATORS = {
    "\t": "Read it with data.name='tsv'.",
    ";": "Convert it to commas.",
    "|": "Convert it to commas.",
    ",": "Read it with data.name='csv'.",
}

# The number of a line (of a row in parquet), and its values in the order of the columns that were asked for.
_Row = tuple[int, Sequence[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What one line, row or piece of a file says.

    Attributes:
      text: the text; of a prompt with a completion, the prompt; of a pair, the first; of a conversation, "".
      label: its class, if it has one.
      completion: what follows a prompt.
      where: "file:line" of its first line; in parquet, of its row.
      last: False where more pieces of the same document follow.
      second: the second text of a pair.
      messages: of a conversation; () where it is none.
    """

    text: str
    label: str | int | None = None
    completion: str | None = None
    where: str = ""
    last: bool = True
    second: str | None = None
    messages: tuple[Message, ...] = ()


def read(
    kind: str,
    path: Paths,
    *,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    pair: str | None = None,
    messages: str | None = None,
    encoding: str = "utf-8",
    key: str = "data.path",
) -> Iterator[Record]:
    """Read records in the order of the files and of the lines in them.

    Args:
      kind: "text": a file is a document, in pieces of about 1 MiB that are cut at line ends; files without a byte are
        left out. "lines": each line that is not blank is one. "csv": comma separated with a header (RFC 4180). "tsv":
        tab separated with a header, where quotes mean nothing. "jsonl": a JSON object a line, whose keys are the
        columns; keys of objects or lists inside of it are not. "parquet": columns of strings. Blank lines of tables are
        left out.
      path: a file, a glob, or several of them.
      text: the column of texts.
      label: the column of labels, read without the space around them; or for "lines" the word "file": the stem of the
        file's name, or its suffix where all stems are equal.
      prompt: the column of prompts; with `completion`, instead of `text`.
      completion: the column of what follows the prompts.
      pair: the column of second texts, with `text` and `label`: what has the label is the pair.
      messages: the column of conversations (see `chat.checked`), alone; for jsonl and parquet.
      encoding: of all but parquet.
      key: the option that `path` is from, for messages.

    Raises:
      UserError: a file is missing or empty, not in `encoding`, or no `kind`; a column is missing; a row has another
        number of fields than the header; a text is empty or no text; a label is missing. Each names file and line.
    """
    files = [file for file, _ in inputs(path, key)]
    check_encoding(encoding)
    if kind == "text":
        return _texts(files, encoding, key)
    if kind == "lines":
        if label not in (None, "file"):
            raise UserError(
                f"data.label={label!r}: lines have no columns. Their only label is their file's name: 'file'."
            )
        return _examples(files, encoding, label)
    if kind not in KINDS:
        raise UserError(f"{kind!r} is not a kind of file. {suggest(kind, KINDS)}")
    prompted = prompt is not None or completion is not None
    if prompted and text is not None:
        raise UserError(f"data.text={text!r} and data.prompt={prompt!r} are both set: use one, or the other.")
    if prompted and label is not None:
        raise UserError(f"data.label={label!r} means nothing beside data.prompt and data.completion: leave it out.")
    if pair is not None and label is None:
        raise UserError(f"data.pair={pair!r} is the second text of what has a label: set data.text and data.label.")
    columns = {"prompt": prompt, "completion": completion} if prompted else {"text": text}
    others = {"label": label, "pair": pair}
    columns |= {option: column for option, column in others.items() if column is not None}
    if messages is not None:
        if alone := {option: column for option, column in columns.items() if column is not None}:
            option, column = next(iter(alone.items()))
            raise UserError(f"data.{option}={column!r} means nothing beside data.messages={messages!r}: leave it out.")
        columns = {"messages": messages}
    return _records(kind, files, columns, encoding)


def inputs(path: Paths, key: str = "data.path") -> list[tuple[Path, int]]:
    """The files that `path` means, and the bytes of each: of a tuple in its order, of a glob in the order of names.

    Args:
      path: a file, a glob, or several of them.
      key: the option that `path` is from, for messages.

    Raises:
      UserError: there is no such file, or it is a folder.
    """
    found = [file for part in ([path] if isinstance(path, str) else path) for file in find(part, f"{key}={part!r}")]
    if not found:
        raise UserError(f"{key} names no file.")
    return [(file, file.stat().st_size) for file in found]


def _texts(files: Sequence[Path], encoding: str, key: str) -> Iterator[Record]:
    empty = True
    for file in files:
        text, line = "", 1
        for piece in decoded(file, encoding):
            if piece and len(text) >= PIECE:
                cut = _cut(text)
                yield Record(text[:cut], where=f"{file}:{line}", last=False)
                line, text = line + text.count("\n", 0, cut), text[cut:]
            text += piece
        if text:
            empty = False
            yield Record(text, where=f"{file}:{line}")
    if empty:
        raise UserError(f"{key}: {files[0]} is empty{' and all others are' if len(files) > 1 else ''}: expected text.")


def _cut(text: str) -> int:
    """Where to cut a text: at a line end, else at a space, else anywhere; never at its end."""
    if found := _BREAK.match(text):
        return found.end()
    return (text.rfind("\n", 0, -1) + 1) or (text.rfind(" ", 0, -1) + 1) or len(text) - 1


def _examples(files: Sequence[Path], encoding: str, label: str | None) -> Iterator[Record]:
    names: list[str] | list[None] = _names(files) if label else [None] * len(files)
    for file, name in zip(files, names):
        count = 0
        for number, line in enumerate(lines(file, encoding), 1):
            if line.strip():
                count += 1
                yield Record(line.removesuffix("\r"), name, where=f"{file}:{number}")
        if not count:
            raise UserError(f"{file} is empty: expected an example on each line.")


def _names(files: Sequence[Path]) -> list[str]:
    """What tells files apart: their stems, or, where those are all equal, their suffixes."""
    names = [file.stem for file in files]
    if len(set(names)) == 1:
        names = [file.suffix.removeprefix(".") for file in files]
    if len(set(names)) == 1:
        raise UserError(
            f"data.label='file': {files[0]} is the only name of a file, so that all labels would be equal. "
            "Expected a glob with a file for each label, such as 'reviews/*.txt'."
        )
    return names


def _records(kind: str, files: Sequence[Path], columns: Mapping[str, str | None], encoding: str) -> Iterator[Record]:
    for file in files:
        if kind == "parquet":
            rows = _parquet(file, columns)
        elif kind == "jsonl":
            rows = _jsonl(file, columns, encoding)
        else:
            rows = _table(file, columns, _csv(file, encoding) if kind == "csv" else _tsv(file, encoding))
        number = 0
        for number, values in rows:
            yield _record(dict(zip(columns, values)), columns, f"{file}:{number}")
        if not number:
            raise UserError(f"{file} has no rows: expected one for each example.")


def _record(values: Mapping[str, Any], columns: Mapping[str, str | None], where: str) -> Record:
    if "messages" in values:
        return Record("", where=where, messages=chat.checked(values["messages"], where))
    label = values.get("label")
    if isinstance(label, str):
        label = label.strip()  # " a" and "a" would be two classes that look alike
    for option, value in values.items():
        column = columns[option]
        if option == "label":
            if label is None or label == "":
                raise UserError(f"{where} has no label: {column!r} is empty there. Fill it in, or take the row out.")
            if not isinstance(label, str | int):
                raise UserError(
                    f"{where}: the label {column!r} is {reprlib.repr(value)}: expected a string or an integer. "
                    "Name a column of classes, or leave data.label out."
                )
        elif value is None or value == "":
            said = "null" if value is None else "empty"
            raise UserError(f"{where}: {column!r} is {said}: expected a text. Take the row out.")
        elif not isinstance(value, str):
            raise UserError(
                f"{where}: {column!r} is {reprlib.repr(value)}, of type {type(value).__name__}: expected a text. "
                f"Name a column of texts in data.{option}, or write its values as strings."
            )
    text = values["text"] if "text" in values else values["prompt"]
    label = int(label) if isinstance(label, bool) else label
    return Record(text, label, values.get("completion"), where, second=values.get("pair"))


def _find(columns: Mapping[str, str | None], names: Sequence[str], where: str, more: str = "") -> list[int]:
    """The place among `names` of each column; `more` is said in the end where one is missing."""
    for option, column in columns.items():
        if column is None:
            raise UserError(f"data.{option} is not set: it says which column of {where} to read. {suggest('', names)}")
        if column not in names:
            raise UserError(f"{where} has no column {column!r} (data.{option}). {suggest(column, names)}{more}")
        if names.count(column) > 1:
            raise UserError(
                f"{where} has {names.count(column)} columns {column!r} (data.{option}): expected one. Rename some."
            )
    return [names.index(column) for column in columns.values() if column is not None]


def _table(file: Path, columns: Mapping[str, str | None], rows: Iterator[tuple[int, list[str]]]) -> Iterator[_Row]:
    _, header = next(rows, (0, None))
    if header is None:
        raise UserError(f"{file} is empty: expected a header with the names of the columns, and a row an example.")
    other = next((mark for mark in _SEPARATORS if len(header) == 1 and mark in header[0]), None)
    more = f" Its header is one column, with {other!r} in it. {_SEPARATORS[other]}" if other else ""
    places = _find(columns, header, str(file), more)
    for line, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{file}:{line}: the number of fields is {len(fields)}: expected {len(header)}, as in the header. In "
                "csv, a field with a comma or a line end stands in double quotes; in tsv, none can have a tab."
            )
        yield line, [fields[place] for place in places]


def _tsv(file: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines(file, encoding), 1):
        if line.strip(" \r"):
            yield number, line.removesuffix("\r").split("\t")


def _csv(file: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # by default a document of 128 KiB is an error
    reader = csv.reader((line + "\n" for line in lines(file, encoding)), strict=True)
    first = 1
    try:
        for fields in reader:
            if fields and not (len(fields) == 1 and fields[0].isspace()):
                yield first, fields
            first = reader.line_num + 1
    except csv.Error as error:
        # The module says how its caller should open the file.
        said = "it has a carriage return (CR) outside of quotes" if "new-line" in str(error) else str(error)
        raise UserError(
            f"{file}:{first}: the row that begins here is no CSV: {said}. A field with a comma, a quote or a line end "
            "stands in double quotes, and a quote in it is doubled. Where quotes mean nothing, use tsv."
        ) from error


def _jsonl(file: Path, columns: Mapping[str, str | None], encoding: str) -> Iterator[_Row]:
    for number, line in enumerate(lines(file, encoding), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is no JSON: {error}. Expected one object on each line.") from error
        if not isinstance(found, dict):
            raise UserError(f"{file}:{number} is {type(found).__name__}: expected a JSON object on each line.")
        if any(column not in found for column in columns.values()):
            _find(columns, list(found), f"{file}:{number}", " Keys are looked up at the top level of the object.")
        yield number, [found[column] for column in columns.values() if column is not None]


def _parquet(file: Path, columns: Mapping[str, str | None]) -> Iterator[_Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need the package pyarrow: pip install pyarrow.") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as content:
            _find(columns, content.schema_arrow.names, str(file))
            wanted = [column for column in columns.values() if column is not None]
            for batch in content.iter_batches(ROWS, columns=wanted):
                values = [batch.column(column).to_pylist() for column in wanted]
                for row in zip(*values):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} can't be read as parquet, after row {number}: {str(error).rstrip('.')}. Make or copy it again."
        ) from error
