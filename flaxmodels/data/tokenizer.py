"""Tokenizers by name: bytes, characters, words, byte-level BPE; how each is trained, saved and loaded.

One JSON file, `tokenizer.json`, holds one of them: of ours, with the key "flaxmodels"; of BPE, as the `tokenizers`
library writes it, so that the files of others load too. Read `make` first.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from flaxmodels import registry, storage
from flaxmodels.data import byte_pairs
from flaxmodels.data.byte_pairs import ENDS, BytePairs
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.vocabularies import UNKNOWN, WORD, Bytes, Characters, Words, code_points, cut
from flaxmodels.registry import UserError

Kind = Literal["bytes", "characters", "words", "bpe"]
KINDS: tuple[str, ...] = get_args(Kind)
FILE = "tokenizer.json"
OURS = (BytePairs, Bytes, Characters, Words)  # what `save` writes


def encode_many(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """`tokenizer.encode` of each text, at once where that is faster."""
    if isinstance(tokenizer, BytePairs):
        return tokenizer.encode_many(texts)
    return [tokenizer.encode(text) for text in texts]


def make(
    tokens: str, texts: Callable[[], Iterable[str]], *, vocab_size: int | None = None, documents: bool = False
) -> Tokenizer:
    """The tokenizer that the option `tokens` of a data source means: trained on `texts`, or loaded.

    Args:
      tokens: one of `KINDS`, or the path of a `tokenizer.json`.
      texts: see `train`; not called where nothing is trained.
      vocab_size: see `train`; None for a path.
      documents: whether an `end` is needed.

    Raises:
      UserError: what `train` and `load` raise; or `documents`, and the file has no token to end one.
    """
    if tokens in KINDS:
        return train(tokens, texts, vocab_size=vocab_size, documents=documents)
    tokenizer = load(tokens)
    if vocab_size is not None:
        raise UserError(
            f"data.vocab_size={vocab_size}: data.tokens={tokens!r} is trained already, with {tokenizer.size} tokens. "
            "Leave data.vocab_size out."
        )
    if documents and tokenizer.end is None:
        raise UserError(
            f"data.tokens={tokens!r} has no token to end a document: expected a special one named "
            f"{', '.join(ENDS[:-1])} or {ENDS[-1]}. Train another, for example with data.tokens=bpe."
        )
    return tokenizer


def extended(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with special tokens of these names: those that it lacks come after all others, in this order.

    Raises:
      UserError: it lacks some, and is not one that `train` or `load` made.
    """
    new = tuple(name for name in dict.fromkeys(names) if name not in tokenizer.special)
    if not new:
        return tokenizer
    if isinstance(tokenizer, BytePairs):
        return tokenizer.extended(new)
    if isinstance(tokenizer, Bytes | Characters | Words):
        return dataclasses.replace(tokenizer, marks=(*tokenizer.marks, *new))
    raise UserError(f"{type(tokenizer).__name__} has no special token {new[0]!r}, and none can be added to it.")


def train(
    kind: str, texts: Callable[[], Iterable[str]], *, vocab_size: int | None = None, documents: bool = False
) -> Tokenizer:
    """Train a tokenizer. Equal texts make equal tokenizers, on every machine.

    Args:
      kind: one of `KINDS`.
      texts: gives the texts, one after the other; called once, or not at all. They are not held in memory together;
        but for "words" and "bpe", the words that differ are, with a count each.
      vocab_size: the most tokens to have, with `UNKNOWN` and `end`; for "words" and "bpe", which need it, alone.
      documents: whether to have an `end`, the last id.

    Raises:
      UserError: an unknown kind; `vocab_size` is missing, too small, or given where it means nothing; no text at all.
    """
    if kind not in KINDS:
        raise UserError(f"data.tokens={kind!r} is not a kind of tokens. {registry.suggest(kind, KINDS)}")
    check_size(kind, vocab_size)
    if kind == "bytes":
        return Bytes(documents)
    if kind == "characters":
        seen = np.zeros(0x110000, bool)
        for text in texts():
            seen[code_points(text)] = True
        return Characters(tuple(map(chr, np.flatnonzero(seen).tolist())), documents)
    assert vocab_size is not None
    if kind == "bpe":
        return byte_pairs.train(texts(), vocab_size, documents)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts():
        for piece in cut(text):
            counts.update(WORD.findall(piece))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return Words((UNKNOWN, *frequent[: vocab_size - 1 - documents]), documents)


def check_size(kind: str, vocab_size: int | None) -> None:
    """UserError where `vocab_size` is missing, too small, or means nothing."""
    least = {"bpe": 256, "words": 2}.get(kind)
    if least is None:
        if vocab_size is not None:
            raise UserError(
                f"data.vocab_size={vocab_size}: data.tokens={kind} has as many tokens as there are {kind}. "
                "Leave it out, or use data.tokens=words or bpe."
            )
    elif vocab_size is None:
        raise UserError(
            f"data.vocab_size is not set: data.tokens={kind} needs the most tokens to have. "
            "For example: --config.data.vocab_size=4096."
        )
    elif vocab_size < least + 1:
        what = "256 bytes and a token" if kind == "bpe" else f"{UNKNOWN}, a word and a token"
        raise UserError(
            f"data.vocab_size={vocab_size} is too small for data.tokens={kind}: expected at least {least + 1}, for "
            f"{what} more. For example: --config.data.vocab_size=4096."
        )


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write one of ours to a file. Equal tokenizers write equal bytes."""
    Path(path).write_text(dump(tokenizer), encoding="utf-8")


def dump(tokenizer: Tokenizer) -> str:
    """What `save` writes."""
    if isinstance(tokenizer, BytePairs):
        return tokenizer.definition
    if isinstance(tokenizer, Bytes | Characters | Words):
        return json.dumps(tokenizer.described)
    raise UserError(f"{type(tokenizer).__name__} can't be saved: expected a tokenizer that `train` or `load` made.")


def load(path: str | Path) -> Tokenizer:
    """Read what `save` wrote, or a `tokenizer.json` of the `tokenizers` library.

    Args:
      path: the file, or a folder with a `tokenizer.json`.

    Raises:
      UserError: no such file, or it is damaged, or no tokenizer.
    """
    file = storage.place(path).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        content = file.read_text(encoding="utf-8")
        described = json.loads(content)
    except FileNotFoundError as error:
        near = [f.name for f in file.parent.glob("*tokenizer*.json")] if file.parent.is_dir() else []
        raise UserError(
            f"data.tokens={str(path)!r} is neither a kind of tokens nor a file that is there. "
            f"{registry.suggest(file.name, (*KINDS, *near))}"
        ) from error
    except OSError as error:
        raise UserError(f"data.tokens: {file} can't be read: {error.strerror}.") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{file} is damaged: {error}. Copy or prepare it again.") from error
    if not isinstance(described, dict) or not {"flaxmodels", "model"} & set(described):
        raise UserError(
            f'{file} is not a tokenizer: expected the key "flaxmodels" (ours) or "model" (of the tokenizers library).'
        )
    return _ours(described, file) if "flaxmodels" in described else _of_others(content, described, file)


def _ours(described: Mapping[str, Any], file: Path) -> Tokenizer:
    made: Bytes | Characters | Words | None = None
    try:
        kind, documents = described["kind"], described["documents"] is True
        marks = tuple(map(str, described.get("special", ())))
        if kind == "bytes":
            made = Bytes(documents, marks)
        elif kind == "characters":
            made = Characters(tuple(map(chr, described["characters"])), documents, marks)
        elif kind == "words":
            made = Words(tuple(map(str, described["words"])), documents, marks)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is damaged: {error!r}. Copy or prepare it again.") from error
    if made is None or made.described != described:
        raise UserError(
            f"{file} is damaged, or of a later version: kind {described.get('kind')!r}, format "
            f"{described['flaxmodels']!r}; expected one of {', '.join(KINDS[:3])}, and format 1."
        )
    return made


def _of_others(content: str, described: dict[str, Any], file: Path) -> BytePairs:
    changed = [t for t in described.get("added_tokens") or () if t.get("content") in ENDS and not t.get("special")]
    for token in changed:  # or text could end a document
        token["special"] = True
    tokenizer = BytePairs(json.dumps(described) if changed else content)
    try:
        _ = tokenizer.size, tokenizer.end, tokenizer.token_bytes
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{file} is damaged, or no tokenizer: {error}. Copy or prepare it again.") from error
    return tokenizer
