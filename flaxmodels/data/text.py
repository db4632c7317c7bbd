"""Text for language models: your own files, CPython's docs, Shakespeare; as bytes, characters, words or BPE tokens."""

from collections.abc import Sequence

import numpy as np

from flaxmodels.data import builders, documents, prepared, reading, tokenizer
from flaxmodels.data.documents import Documents, Windows
from flaxmodels.data.split import Source, describe, fingerprint
from flaxmodels.data.vocabularies import Characters, code_points, utf8
from flaxmodels.registry import Fraction, Positive, UserError


def text(
    path: str | tuple[str, ...],
    tokens: str = "characters",
    vocab_size: Positive | None = None,
    length: Positive = 64,
    validation: Fraction = 0.1,
    windows: Windows = "contiguous",
    encoding: str = "utf-8",
) -> Source:
    """Your own text. A file is a document; where there are several, a token of its own ends each.

    Args:
      path: a file, a glob, or several of them; the files are read in the order of their names, as they are.
      tokens: "bytes", "characters", "words", "bpe", or the path of a `tokenizer.json`. The vocabulary of characters is
        those that occur in the whole text; "words" and "bpe" are learned from the training split.
      vocab_size: the most tokens of "words" and "bpe".
      length: tokens in a context window.
      validation: the part of the text, at its end, that is held out.
      windows: "contiguous": one window after the other. "packed": none reaches over the end of a document. "padded":
        one document a window, cut to `length`.
      encoding: of the files.

    Raises:
      UserError: no such file, not in `encoding`, or too short for `length` and `validation`.
    """
    whole: list[str] = []
    pieces: list[str] = []
    for record in reading.read("text", path, encoding=encoding):
        pieces.append(record.text)
        if record.last:
            whole.append("".join(pieces))
            pieces = []
    return _source("text", whole, f"data.path={path!r}", tokens, vocab_size, length, validation, windows)


def pydocs(
    tokens: str = "characters",
    vocab_size: Positive | None = None,
    length: Positive = 64,
    validation: Fraction = 0.1,
    windows: Windows = "contiguous",
) -> Source:
    """The language reference inside CPython (`pydoc_data.topics`), English, some 700,000 characters. No download.

    Each Python version has its own text, and so its own vocabulary and fingerprint. Arguments: see `text`.
    """
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    return _source("pydocs", [whole], "data.name='pydocs'", tokens, vocab_size, length, validation, windows)


def tiny_shakespeare(
    manual_dir: str | None = None,
    data_dir: str | None = None,
    tokens: str = "characters",
    vocab_size: Positive | None = None,
    length: Positive = 64,
    validation: Fraction = 0.1,
    windows: Windows = "contiguous",
) -> Source:
    """Tiny Shakespeare: 1,115,394 characters of 65 kinds. Downloads 1.1 MB at first use.

    Args:
      manual_dir: a folder with `input.txt`, for machines without a network; verified by sha256.
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.
      tokens: see `text`.
      vocab_size: see `text`.
      length: see `text`.
      validation: see `text`.
      windows: see `text`.

    Raises:
      UserError: the text is missing, damaged, or can't be downloaded.
    """
    found = prepared.load(builders.TINY_SHAKESPEARE, data_dir, manual_dir)
    whole = found.arrays["whole"]["text"][0].tobytes().decode("utf-8")
    name = "tiny_shakespeare"
    return _source(name, [whole], f"data.name={name!r}", tokens, vocab_size, length, validation, windows)


def _source(
    name: str,
    texts: Sequence[str],
    key: str,
    tokens: str,
    vocab_size: int | None,
    length: int,
    validation: float,
    windows: Windows,
) -> Source:
    several = len(texts) > 1
    pieces, closed = _hold_out(texts, validation)
    learned = texts if tokens == "characters" else pieces["train"]
    made = tokenizer.make(tokens, lambda: learned, vocab_size=vocab_size, documents=several)
    (train, train_ends), (test, test_ends) = (
        documents.encode(made, pieces[split], closed[split] & several) for split in ("train", "test")
    )
    units = tokens if tokens in tokenizer.KINDS else "tokens"
    if len(train) <= length:
        raise UserError(
            f"{key}: {len(train)} {units} to train on, with data.validation={validation:g} held out, make no "
            f"window of data.length={length} and a token to predict. Use more text, or a smaller length or validation."
        )
    if len(test) < 2:
        raise UserError(
            f"{key}: data.validation={validation:g} of {sum(map(len, texts))} characters holds out {len(test)} "
            f"{units}; at least 2 are needed. Use more text, or a larger fraction."
        )
    if isinstance(made, Characters) and not several:
        described = {
            "train/tokens": train,
            "test/tokens": test,
            "vocabulary": code_points("".join(made.characters)),
        }
    else:  # the text itself, whatever its tokens
        described = {"vocabulary": code_points("")}
        for split, of_split in pieces.items():
            described[f"{split}/tokens"] = np.frombuffer(utf8("".join(of_split)), np.uint8)
            if several:
                described[f"{split}/sizes"] = np.array([len(piece) for piece in of_split], np.int64)
    found = Documents(train, train_ends), Documents(test, test_ends)
    return Source(
        name,
        documents.windows(found[0], windows, length),
        documents.windows(found[1], windows, length),
        facts={"vocab_size": made.size, "max_length": length},
        fingerprint=fingerprint({part: describe(array) for part, array in described.items()}),
        tokens_per_example=length,
        token_bytes=made.token_bytes,
        transforms=documents.transforms(found, windows, length),
        tokenizer=made,
    )


def _hold_out(texts: Sequence[str], validation: float) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """The pieces of texts in each split, the last ones in the test; and (P,) bool, which of them end a text."""
    total = sum(map(len, texts))
    left = total - round(total * validation)
    pieces: dict[str, list[str]] = {"train": [], "test": []}
    closed: dict[str, list[bool]] = {"train": [], "test": []}
    for text in texts:
        cut = min(left, len(text))
        left -= cut
        for split, piece in (("train", text[:cut]), ("test", text[cut:])):
            if piece:
                pieces[split].append(piece)
                closed[split].append(split == "test" or cut == len(text))
    none: list[str] = [""]
    return (
        {split: found or none for split, found in pieces.items()},
        {split: np.array(found or [False]) for split, found in closed.items()},
    )
