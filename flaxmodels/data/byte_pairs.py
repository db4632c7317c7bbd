"""Byte-level BPE, and other tokenizers of the `tokenizers` library."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxmodels.data.split import fingerprint
from flaxmodels.data.vocabularies import BEGINS, cut, dtype, utf8, width
from flaxmodels.registry import UserError

# What the token that ends a document may be called; ours is the first.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
# Characters that are encoded together: bounds the memory that takes.
_BATCH = 2**22


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A tokenizer of the `tokenizers` library: a byte-level BPE trained here, or one that others trained.

    Text is text: the name of a special token in it is encoded letter by letter, and nothing is cut off or added.

    Attributes:
      definition: the content of its `tokenizer.json`.
    """

    definition: str

    def __reduce__(self) -> tuple[Any, ...]:
        return BytePairs, (self.definition,)

    @functools.cached_property
    def _library(self) -> Any:
        library = _package().Tokenizer.from_str(self.definition)
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        return library

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(i for i, token in self._library.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def size(self) -> int:
        """The highest id and one."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def end(self) -> int | None:
        """The id of the first of `ENDS` that it has as a special token."""
        ids = (self._library.token_to_id(name) for name in ENDS)
        return next((i for i in ids if i in self._special), None)

    @functools.cached_property
    def begin(self) -> int | None:
        """The id of the special token that its post processor puts before a text.

        Without a post processor, of the first of `BEGINS` that it has as a special token.
        """
        if json.loads(self.definition).get("post_processor"):
            ids = self._library.encode("a", add_special_tokens=True).ids
            return ids[0] if ids and ids[0] in self._special else None
        return next((self.special[name] for name in BEGINS if name in self.special), None)

    @functools.cached_property
    def special(self) -> Mapping[str, int]:
        """Id of each special token, by its name."""
        return {t.content: i for i, t in self._library.get_added_tokens_decoder().items() if t.special}

    @functools.cached_property
    def token_bytes(self) -> tuple[int, ...]:
        """(size,) bytes that each token adds to a text; 0 for special tokens, and for ids without one."""
        library, added = self._library, self._library.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.definition)["decoder"])
        widths = [0] * self.size
        for token, i in library.get_vocab(with_added_tokens=True).items():
            if i in added:
                widths[i] = 0 if i in self._special else width(token)
            elif byte_level:  # each character stands for a byte
                widths[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                widths[i] = 1
            else:  # twice, since decoders may take a space off the first
                widths[i] = width(library.decode([i, i])) - width(library.decode([i]))
        return tuple(widths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of `definition`, without what is not used of it."""
        parts, unused = json.loads(self.definition), ("version", "truncation", "padding", "post_processor")
        return fingerprint({k: v for k, v in parts.items() if k not in unused})

    def extended(self, names: Sequence[str]) -> "BytePairs":
        """With special tokens of these names; ids that are new come after all others."""
        library = _package().Tokenizer.from_str(self.definition)
        library.add_special_tokens([_package().AddedToken(name, special=True, normalized=False) for name in names])
        return BytePairs(library.to_str(pretty=True))

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,)."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (N,) of each text, encoded by the library's threads."""
        pieces = [list(cut(text)) if self._cuttable else [text] for text in texts]
        ids = (array for batch in _batches(pieces) for array in self._encode(batch))
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in pieces]

    @functools.cached_property
    def _cuttable(self) -> bool:
        """Whether a text that was `cut` is encoded as the whole is: where words are found as GPT-2 does, not else."""
        parts = json.loads(self.definition)
        words = {"use_regex": True, **(parts.get("pre_tokenizer") or {}), "trim_offsets": None}
        gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": None}
        plain = not parts.get("normalizer") and self._special == set(self._library.get_added_tokens_decoder())
        return plain and words == gpt2

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            found = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            for text in texts:
                utf8(text)  # names what can't be encoded
            raise
        return [np.array(one.ids, dtype(self.size)) for one in found]

    def decode(self, ids: Any) -> str:
        """The text of ids (N,); special tokens are nothing."""
        return str(self._library.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True))


def train(texts: Iterable[str], vocab_size: int, documents: bool) -> BytePairs:
    """Train a byte-level BPE of at most `vocab_size` tokens: see `tokenizer.train`."""
    package = _package()
    library = package.Tokenizer(package.models.BPE())
    library.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - documents,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(map(_checked, itertools.chain.from_iterable(map(cut, texts))), trainer)
    if documents:
        library.add_special_tokens([package.AddedToken(ENDS[0], special=True, normalized=False)])
    return BytePairs(library.to_str(pretty=True))


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("A BPE needs the package tokenizers: pip install tokenizers.") from error
    return tokenizers


def _checked(text: str) -> str:
    utf8(text)  # the library would name nothing
    return text


def _batches(pieces: Iterable[Iterable[str]]) -> Iterator[list[str]]:
    """All pieces, in order, in lists of about `_BATCH` characters."""
    batch: list[str] = []
    room = _BATCH
    for piece in itertools.chain.from_iterable(pieces):
        batch.append(piece)
        if (room := room - len(piece)) <= 0:
            yield batch
            batch, room = [], _BATCH
    yield batch
