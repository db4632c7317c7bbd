"""Where words begin and end, by the names of tokens."""

import json

import numpy as np

from flaxmodels.data.byte_pairs import BytePairs
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.vocabularies import Bytes, Characters, Words
from flaxmodels.registry import UserError

# White space as GPT-2's alphabet of bytes writes it, and SentencePiece's.
_SPACES = frozenset("\u0120\u010a\u0109\u010d\u2581 \n\t\r")


def edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens begin a word, (size,) bool, and which end one.

    Words are what white space separates; of WordPiece, its words.

    Raises:
      UserError: a tokenizer that is none of ours.
    """
    size = tokenizer.size
    if isinstance(tokenizer, Words):
        return np.ones(size, bool), np.ones(size, bool)
    if isinstance(tokenizer, Bytes | Characters):
        alphabet = [chr(i) for i in range(128)] if isinstance(tokenizer, Bytes) else tokenizer.characters
        space = np.zeros(size, bool)
        space[: len(alphabet)] = [character.isspace() for character in alphabet]
        return space, space
    if not isinstance(tokenizer, BytePairs):
        raise UserError(f"whole_words needs to know where words begin, and {type(tokenizer).__name__} does not say.")
    model = json.loads(tokenizer.definition)["model"]
    listed = model["vocab"]
    names = dict(listed) if isinstance(listed, dict) else {name: number for number, (name, _) in enumerate(listed)}
    begins, ends = np.zeros(size, bool), np.zeros(size, bool)
    pieces = model.get("type") == "WordPiece"
    inner = model.get("continuing_subword_prefix", "##")
    for name, number in names.items():
        begins[number] = not name.startswith(inner) if pieces else name[:1] in _SPACES
        ends[number] = not pieces and name[-1:] in _SPACES
    return begins, ends
