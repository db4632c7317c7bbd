"""From documents to windows of a fixed length: contiguous, packed or padded.

Read `windows` first. "Inputs" of a document are its tokens but the last, and "targets" all but the first: so a document
of n tokens has n - 1 of each.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from flaxmodels.data.packing import packed_split
from flaxmodels.data.split import Batch, Rows, Split, Tokenizer, take
from flaxmodels.data.token_rows import LOUD, Stored, nothing, places_of, ranges, read_rows, skipped, stored_split
from flaxmodels.data.tokenizer import encode_many
from flaxmodels.registry import UserError

Windows = Literal["contiguous", "packed", "padded"]


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts as tokens, one after the other.

    Attributes:
      tokens: (N,) unsigned, in memory or on disk.
      ends: (D,) int64, the place after each document's last token; the last is N.
      labels: (D,) int32, the class of each; None where there are none.
      prompts: (D,) int32, how many leading tokens of each are no targets of the loss; None for none.
      learned: (N,) bool, which tokens are targets of the loss, where `prompts` does not say it; None for all.
      seconds: (D,) int32, how many tokens the first of a pair of texts has, with what ends it; None for single texts.
    """

    tokens: np.ndarray | Stored
    ends: np.ndarray
    labels: np.ndarray | None = None
    prompts: np.ndarray | None = None
    learned: np.ndarray | None = None
    seconds: np.ndarray | None = None

    @property
    def begins(self) -> np.ndarray:
        """(D,) int64, the place of each document's first token."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @property
    def loud(self) -> np.ndarray | None:
        """(N,) bool, which tokens are targets of the loss: `learned`, or all but `prompts`; None for all."""
        if self.prompts is None:
            return self.learned
        sizes = self.ends - self.begins
        return ranges(sizes) >= np.repeat(self.prompts, sizes)


def windows(documents: Documents, kind: Windows, length: int, where: Sequence[str] = ()) -> Split:
    """A split of windows with `length` inputs each.

    Args:
      documents: what is read. Labels need "padded", and what is not learned "packed" or "padded".
      kind: "contiguous": documents are one long text; inputs (B, length) int32. In the two others, inputs are
        {"tokens", "segments", "positions"}, each (B, length) int32: segments count the documents of a window from 1 on,
        with 0 for padding, and positions start at 0 in each. "packed": as many documents a window as fit, and longer
        ones in pieces; each token but the first of a document is a target once, or never where it is not learned.
        "padded": one document a window, cut to `length`.
      length: inputs in a window.
      where: (D,) where each document was read, for messages.

    Returns:
      A split whose targets and weights are (B, length); or (B,), with labels, for "padded". With `seconds`, inputs
      have {"types"}, too, (B, length) int32: 1 for the second text of a pair.

    Raises:
      UserError: labels, or what is not learned, with another kind; too many windows; no window has a target; or a
        document of "padded" has none in the window.
    """
    if documents.labels is not None and kind != "padded":
        raise UserError(f"data.windows={kind!r}: with labels each window has one text. Use windows='padded'.")
    loud = documents.loud
    if loud is not None and kind == "contiguous":
        raise UserError("data.windows='contiguous' would learn the prompts, too. Use windows='packed' or 'padded'.")
    if kind == "packed":
        return packed_split(documents.tokens, documents.begins, documents.ends, loud, length)
    if kind == "padded":
        return _padded(documents, loud, length, where)
    tokens = documents.tokens
    if tokens.size < 2:
        raise nothing()
    return window_split(tokens, length) if isinstance(tokens, np.ndarray) else _stored_windows(tokens, length)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], closed: np.ndarray, opened: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as tokens, one after the other.

    Args:
      tokenizer: what encodes; each text by itself.
      texts: P of them.
      closed: (P,) bool, after which of them the tokenizer's `end` stands.
      opened: (P,) bool, before which of them the tokenizer's `begin` stands; None for none.

    Returns:
      The tokens (N,), and the place (P,) int64 after the last of each text.
    """
    found = encode_many(tokenizer, texts)
    opened = np.zeros(len(texts), bool) if opened is None else opened
    sizes = np.array([len(ids) for ids in found], np.int64) + closed + opened
    places = np.cumsum(sizes)
    if not closed.any() and not opened.any():
        return np.concatenate(found), places
    tokens = np.zeros(places[-1], found[0].dtype)
    is_text = np.ones(len(tokens), bool)
    for marked, at, token in ((closed, places - 1, tokenizer.end), (opened, places - sizes, tokenizer.begin)):
        if marked.any():
            tokens[at[marked]] = token
            is_text[at[marked]] = False
    tokens[is_text] = np.concatenate(found)
    return tokens, places


def transforms(splits: Sequence[Documents], kind: Windows, length: int) -> dict[str, Any]:
    """What `windows` does to all splits, for `Source.transforms`.

    Where "padded" windows lose the ends of documents, "texts cut" says of how many: {"texts cut": "3 of 40"}.
    """
    done: dict[str, Any] = {"windows": kind, "length": length}
    cut = sum(int((found.ends - found.begins - (found.labels is None) > length).sum()) for found in splits)
    if kind == "padded" and cut:
        done["texts cut"] = f"{cut} of {sum(len(found.ends) for found in splits)}"
    return done


def window_split(tokens: np.ndarray, length: int) -> Split:
    """A split of {"tokens": (N,)} with N >= 2: ceil((N - 1) / length) windows that overlap by one token."""
    if len(tokens) + length >= 2**31:
        raise UserError(f"{len(tokens)} tokens are too many: positions are int32. Use at most 2**31 - data.length.")
    return Split(
        size=-(-(len(tokens) - 1) // length),
        arrays={"tokens": tokens},
        gather=functools.partial(_gather_windows, length=length, count=len(tokens)),
        prepare=functools.partial(_prepare_windows, length=length, count=len(tokens)),
    )


def _gather_windows(arrays: Mapping[str, Any], index: Any, length: int, count: int) -> Rows:
    """Windows with the token after them: {"tokens": (B, length + 1)}; past the end, the last token again."""
    positions = index.clip(0)[:, None] * np.int32(length) + np.arange(length + 1, dtype=np.int32)[None, :]
    return {"tokens": take(arrays["tokens"], positions.clip(0, count - 1))}


def _prepare_windows(rows: Rows, index: Any, length: int, count: int) -> Batch:
    """Inputs and targets (B, length) int32, weights (B, length) float32."""
    tokens = rows["tokens"].astype(np.int32)
    targets = index[:, None] * np.int32(length) + np.arange(1, length + 1, dtype=np.int32)[None, :]
    real = (index >= 0)[:, None] & (targets < count)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": real.astype(np.float32)}


def _stored_windows(tokens: Stored, length: int) -> Split:
    """The same windows of tokens on disk, of which there may be more than int32 can count."""
    gather = functools.partial(_gather_stored, tokens=tokens, length=length)
    return stored_split(-(-(tokens.size - 1) // length), gather, _prepare_stored)


def _gather_stored(arrays: Mapping[str, Any], index: np.ndarray, tokens: Stored, length: int) -> Rows:
    """{"tokens": (B, length + 1), "real": (B,) int32, how many of its targets are there}."""
    start = index.clip(0).astype(np.int64) * length
    found, sound = read_rows(tokens, start, length + 1)
    real = np.minimum(tokens.size - 1 - start, length).astype(np.int32)
    return {"tokens": found, "real": real, **skipped(sound)}


def _prepare_stored(rows: Rows, index: Any) -> Batch:
    """Inputs and targets (B, length) int32, weights (B, length) float32."""
    tokens = rows["tokens"].astype(np.int32)
    real = (index >= 0)[:, None] & (places_of(tokens[:, 1:]) < rows["real"][:, None])
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": real.astype(np.float32)}


def _padded(documents: Documents, loud: np.ndarray | None, length: int, where: Sequence[str]) -> Split:
    starts = documents.begins
    sizes = np.minimum(documents.ends - starts, length + (documents.labels is None)).astype(np.int32)
    targets = np.maximum(sizes - 1, 0)
    if loud is not None:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(loud)])
        heard = before[starts + sizes]
        targets = heard - before[starts + np.minimum(sizes, 1)]
        if (silent := heard == before[starts]).any():
            worst = int(silent.argmax())
            whole = loud[starts[worst] : documents.ends[worst]]
            raise UserError(
                f"{where[worst] if where else f'Document {worst}'}: the prompt alone has "
                f"{whole.argmax() if whole.any() else len(whole)} tokens, which leaves nothing of the completion in a "
                f"window of data.length={length}. Use a larger length, or windows='packed'."
            )
    if documents.labels is None and not targets.any():
        raise nothing()
    columns = {"label": documents.labels, "second": documents.seconds}
    gather = functools.partial(
        _gather_padded,
        tokens=documents.tokens,
        width=length + (documents.labels is None),
        starts=starts,
        sizes=sizes,
        loud=loud,
        columns={name: column for name, column in columns.items() if column is not None},
    )
    return stored_split(len(sizes), gather, _prepare_padded if documents.labels is None else _prepare_labelled)


def _gather_padded(
    arrays: Mapping[str, Any],
    index: np.ndarray,
    tokens: np.ndarray | Stored,
    width: int,
    starts: np.ndarray,
    sizes: np.ndarray,
    loud: np.ndarray | None,
    columns: Mapping[str, np.ndarray],
) -> Rows:
    """{"tokens": (B, width), zeros after the document, "size": (B,) int32, its tokens there; `columns`: (B,)}.

    With `loud`, {LOUD: (B, width) bool}, too: which of the tokens are targets of the loss.
    """
    rows = index.clip(0)
    found, sound = read_rows(tokens, starts[rows], width)
    size = sizes[rows]
    there = np.arange(width, dtype=np.int32)[None] < size[:, None]
    heard = {} if loud is None else {LOUD: read_rows(loud, starts[rows], width)[0] & there}
    return {
        "tokens": found * there,
        "size": size,
        **heard,
        **{k: v[rows] for k, v in columns.items()},
        **skipped(sound),
    }


def _prepare_padded(rows: Rows, index: Any) -> Batch:
    """Inputs a dict of (B, length) int32, targets (B, length) int32, weights (B, length) float32."""
    tokens = rows["tokens"].astype(np.int32)
    batch = _padded_inputs(tokens[:, :-1], rows["size"] - 1)
    places = batch["positions"] + 1
    real = (index >= 0)[:, None] & (places < rows["size"][:, None])
    if LOUD in rows:
        real &= rows[LOUD][:, 1:]
    return {"inputs": batch, "targets": tokens[:, 1:], "weights": real.astype(np.float32)}


def _prepare_labelled(rows: Rows, index: Any) -> Batch:
    """Inputs a dict of (B, length) int32, targets (B,) int32, weights (B,) float32."""
    inputs = _padded_inputs(rows["tokens"].astype(np.int32), rows["size"])
    if "second" in rows:
        later = inputs["positions"] >= rows["second"][:, None]
        inputs["types"] = later.astype(np.int32) * inputs["segments"]
    return {
        "inputs": inputs,
        "targets": rows["label"],
        "weights": (index >= 0).astype(np.float32),
    }


def _padded_inputs(tokens: Any, size: Any) -> dict[str, Any]:
    """{"tokens", "segments", "positions"}, each (B, length) int32, of the first `size` (B,) tokens."""
    places = places_of(tokens)
    segments = (places < size[:, None]).astype(np.int32)
    return {"tokens": tokens * segments, "segments": segments, "positions": places}
