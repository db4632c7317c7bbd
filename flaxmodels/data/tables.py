"""Texts in tables: csv, tsv, jsonl, parquet, or one on each line. The columns that are named say what is learned.

A text and its label: which class a text has, or with a second text, a pair. A text alone: a language model. A prompt
and its completion: a language model whose loss leaves out the prompt. Messages: one that learns to answer.
"""

import collections
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from flaxmodels.data import chat, documents, held_out, reading, tokenizer
from flaxmodels.data.chat import Template
from flaxmodels.data.documents import Documents, Windows
from flaxmodels.data.reading import Paths, Record
from flaxmodels.data.split import Source, Tokenizer, fingerprint
from flaxmodels.data.vocabularies import BEGINS
from flaxmodels.registry import Fraction, Positive, UserError, suggest


def _table(
    kind: str,
    path: Paths,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    pair: str | None = None,
    messages: str | None = None,
    template: str | None = None,
    begin: bool = False,
    test_path: Paths | None = None,
    validation: Fraction = 0.1,
    tokens: str = "bytes",
    vocab_size: Positive | None = None,
    length: Positive = 128,
    windows: Windows | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Texts in a table.

    Args:
      kind: of files, as in `reading.read`.
      path: a file, a glob, or several of them.
      text: the column of texts; of jsonl, a key of the object on each line, and not of what is inside of it.
      label: the column of labels: integers 0 to n - 1 as they are, others in their order.
      prompt: the column of prompts; with `completion`, instead of `text`.
      completion: the column of what follows the prompts.
      pair: the column of second texts: with `text` and `label`, what has a label is a pair of texts, each with a token
        that ends it. Inputs have {"types"}, too: 0 for the first text and 1 for the second.
      messages: the column of conversations, [{"role": "user", "content": ...}, ...]; alone. What the assistant says is
        learned, and nothing else.
      template: how conversations are written: "chatml", "llama3", "gemma", "plain", or a path; see `chat.pick`. None:
        as the folder of the tokenizer says, else "chatml".
      begin: whether each text begins with the token that the tokenizer has for that, such as "[CLS]" or "<s>"; to a
        tokenizer that is trained here, "[CLS]" is added.
      test_path: what is held out, as `path`; None: a part of `path`.
      validation: that part. With labels, of the different texts of each class the same; else by a hash of the content.
        No text stands on both sides. Not used with `test_path`.
      tokens: "bytes", "characters", "words", "bpe", or the path of a `tokenizer.json`. The vocabulary of characters is
        those that occur anywhere; "words" and "bpe" are learned from the training split.
      vocab_size: the most tokens of "words" and "bpe".
      length: tokens in a window.
      windows: "padded": one text a window, cut to `length`; with labels, the only one. "packed": several texts a
        window, and longer ones in pieces; None is this, without labels. "contiguous", for texts alone: windows reach
        over the ends of texts.
      encoding: of the files; parquet has its own.

    Raises:
      UserError: a file is missing, empty or damaged, a column or a value is missing, a label of the test is in no
        example to train on, or a split is empty.
    """
    read = functools.partial(
        reading.read,
        kind,
        text=text,
        label=label,
        prompt=prompt,
        completion=completion,
        pair=pair,
        messages=messages,
        encoding=encoding,
    )
    if messages is None and template is not None:
        raise UserError(f"data.template={template!r} is for conversations: set data.messages, or leave it out.")
    if messages is not None and begin:
        raise UserError("data.begin=True: conversations begin as data.template says. Leave it out.")
    said = None if messages is None else chat.pick(template, tokens)
    return _source(kind, read, path, test_path, validation, tokens, vocab_size, length, windows, begin, said)


# Comma separated values with a header (RFC 4180); tab separated ones, where quotes mean nothing; a JSON object on each
# line, whose keys are the columns; columns of Parquet files.
csv, tsv, jsonl, parquet = (functools.partial(_table, kind) for kind in ("csv", "tsv", "jsonl", "parquet"))


def lines(
    path: Paths,
    label: Literal["file"] | None = None,
    begin: bool = False,
    test_path: Paths | None = None,
    validation: Fraction = 0.1,
    tokens: str = "bytes",
    vocab_size: Positive | None = None,
    length: Positive = 128,
    windows: Windows | None = None,
    encoding: str = "utf-8",
) -> Source:
    """One text on each line; blank lines are left out.

    Args:
      path: a file, a glob, or several of them.
      label: "file": the name of its file is the label of a text; without its suffix, or, where files differ in that
        alone, the suffix.
      begin: see `csv`, as all that follow.
      test_path: see `csv`.
      validation: see `csv`.
      tokens: see `csv`.
      vocab_size: see `csv`.
      length: see `csv`.
      windows: see `csv`.
      encoding: see `csv`.

    Raises:
      UserError: see `csv`.
    """
    read = functools.partial(reading.read, "lines", label=label, encoding=encoding)
    return _source("lines", read, path, test_path, validation, tokens, vocab_size, length, windows, begin)


def _source(
    kind: str,
    read: Callable[..., Iterator[Record]],
    path: Paths,
    test_path: Paths | None,
    validation: float,
    tokens: str,
    vocab_size: int | None,
    length: int,
    windows: Windows | None,
    begin: bool,
    template: Template | None = None,
) -> Source:
    train = list(read(path))
    if test_path is None:
        train, test = _hold_out(train, validation, path)
    else:
        test = list(read(test_path, key="data.test_path"))
    names = () if train[0].label is None else _classes(train, path)
    learned = train + test if tokens == "characters" else train
    made = tokenizer.make(
        tokens,
        lambda: (text for record in learned for text in _written(record, template)),
        vocab_size=vocab_size,
        documents=True,
    )
    if template is not None:
        made = tokenizer.extended(made, template.marks)
    elif begin and made.begin is None:
        made = _beginning(made, tokens)
    windows = windows or ("padded" if names else "packed")
    found, splits = [], []
    for records in (train, test):
        found.append(
            _documents(records, made, names, begin) if template is None else _conversations(records, made, template)
        )
        splits.append(documents.windows(found[-1], windows, length, [record.where for record in records]))
    return Source(
        kind,
        train=splits[0],
        test=splits[1],
        facts={
            "vocab_size": made.size,
            "max_length": length,
            **({"classes": len(names)} if names else {}),
            **({"types": 2} if train[0].second is not None else {}),
        },
        fingerprint=fingerprint({"train": _content(train), "test": _content(test)}),
        tokens_per_example=length,
        token_bytes=None if names else made.token_bytes,
        transforms={
            **documents.transforms(found, windows, length),
            **({"begin": begin} if begin else {}),
            **({"template": template.name} if template else {}),
        },
        labels=names,
        tokenizer=made,
    )


def _texts(record: Record) -> list[str]:
    """What a record says: one text, or two."""
    if record.messages:
        return [message["content"] for message in record.messages]
    return [text for text in (record.text, record.completion, record.second) if text is not None]


def _written(record: Record, template: Template | None) -> list[str]:
    """All that a tokenizer is to encode of a record."""
    if template is None:
        return _texts(record)
    return [piece.text for piece in template.pieces(record.messages, False, template.marks) if not piece.mark]


def _beginning(made: Tokenizer, tokens: str) -> Tokenizer:
    if tokens not in tokenizer.KINDS:
        raise UserError(
            f"data.begin=True: data.tokens={tokens!r} has no token to begin a text: expected a post processor that "
            f"puts one, or a special token named {', '.join(BEGINS[:-1])} or {BEGINS[-1]}. Leave data.begin out."
        )
    return tokenizer.extended(made, BEGINS[:1])


def _hold_out(records: Sequence[Record], validation: float, path: Paths) -> tuple[list[Record], list[Record]]:
    labels = collections.Counter(str(record.label) for record in records)
    rows: dict[str, list[int]] = {}  # of each text that differs from all others
    for row, record in enumerate(records):
        rows.setdefault("\0".join(_texts(record)), []).append(row)
    if records[0].label is None:
        chosen = [held_out.by_content(text, validation) for text in rows]
    else:  # where equal texts have several labels, they count as the rarest one, so that it can be learned
        rarest = [min({str(records[row].label) for row in of}, key=lambda x: (labels[x], x)) for of in rows.values()]
        chosen = held_out.stratified(np.unique(rarest, return_inverse=True)[1], validation).tolist()
    out = {row for of, held in zip(rows.values(), chosen) if held for row in of}
    train = [record for row, record in enumerate(records) if row not in out]
    test = [record for row, record in enumerate(records) if row in out]
    if not train or not test:
        why = ""
        if len(rows) == 1 < len(records):
            why = "All are equal, and equal texts stay together. "
        elif len(labels) == len(records) > 1:
            why = f"They have {len(labels)} different labels: is what data.label names a class? "
        raise UserError(
            f"data.path={path!r}: data.validation={validation:g} of {len(records)} example{'s' * (len(records) > 1)} "
            f"leaves {len(train)} to train on and holds out {len(test)}; both need one. {why}Change it, use more "
            "examples, or set data.test_path."
        )
    return train, test


def _classes(records: Sequence[Record], path: Paths) -> tuple[str, ...]:
    """The names of the classes: numbers in their order, else strings in theirs."""
    names = {str(record.label) for record in records}
    if len(names) == 1:
        raise UserError(
            f"data.path={path!r}: all {len(records)} labels to train on are {names.pop()!r}: expected at least two "
            "classes."
        )
    if all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _conversations(records: Sequence[Record], made: Tokenizer, template: Template) -> Documents:
    tokens, ends, learned = chat.encode_many(template, made, [record.messages for record in records])
    return Documents(tokens, ends, learned=learned)


def _documents(records: Sequence[Record], made: Tokenizer, names: Sequence[str], begin: bool) -> Documents:
    texts = [text for record in records for text in _texts(record)]
    parts = len(texts) // len(records)
    number, pairs = np.arange(len(texts)) % parts, records[0].second is not None
    tokens, places = documents.encode(made, texts, (number == parts - 1) | pairs, (number == 0) & begin)
    ends = places[parts - 1 :: parts]
    firsts = None
    if parts == 2:
        firsts = (places[::2] - np.concatenate([[0], ends[:-1]])).astype(np.int32)
    if not names:
        return Documents(tokens, ends, prompts=firsts)
    classes = {name: i for i, name in enumerate(names)}
    for record in records:
        if str(record.label) not in classes:
            raise UserError(
                f"{record.where}: the label {str(record.label)!r} is in no example to train on. "
                f"{suggest(record.label, names)}"
            )
    labels = np.array([classes[str(record.label)] for record in records], np.int32)
    return Documents(tokens, ends, labels, seconds=firsts)


def _content(records: Sequence[Record]) -> str:
    rows: list[list[Any]] = [[record.text, record.label, record.completion] for record in records]
    for row, record in zip(rows, records):
        row += [record.second] if record.second is not None else []
        row += [[dict(message) for message in record.messages]] if record.messages else []
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
