"""How likely a language model finds a text: perplexity, bits per byte, accuracy of the next token.

Read `measure`; then `windows`, which says what each token is predicted from, and `scores`, which runs the model.
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flaxmodels import metrics, sharding, step
from flaxmodels.data.reading import Record
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.tokenizer import encode_many
from flaxmodels.data.vocabularies import utf8
from flaxmodels.evaluate import IN_FLIGHT
from flaxmodels.losses import softmax_cross_entropy
from flaxmodels.registry import UserError
from flaxmodels.runtime import progress

# Elements of the logits of a batch, where nobody says how many rows it has: 1 GiB of float32.
LOGITS = 2**28
# The fewest inputs in a row. Rows are as long as the next power of 2, so that few programs serve all lengths.
SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens, of which some are predicted.

    Attributes:
      ids: (N,) integers.
      silent: how many of them are context only: from 1, since nothing stands before the first, to N - 1.
    """

    ids: np.ndarray
    silent: int = 1


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a span.

    Attributes:
      nll: the sum of -log p of its targets, in nats.
      hits: how many targets were the most probable token.
      tokens: how many targets there were.
    """

    nll: float
    hits: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model makes of texts; sums over all of them.

    Attributes:
      documents: how many texts.
      nll: the sum of -log p of all targets, in nats.
      hits: how many targets were the most probable token.
      tokens: how many targets there were.
      nbytes: UTF-8 bytes of the text that they stand for.
    """

    documents: int
    nll: float
    hits: int
    tokens: int
    nbytes: int

    @property
    def means(self) -> dict[str, float]:
        """Over all targets: "loss" (nats a token), "perplexity", "bits_per_byte" and "accuracy"."""
        pairs = {
            "loss": (self.nll, self.tokens),
            "perplexity": (self.nll, self.tokens),
            "bits_per_byte": (self.nll, self.nbytes),
            "accuracy": (self.hits, self.tokens),
        }
        return metrics.means(pairs)


def measure(
    model: nn.Module,
    params: Any,
    extra: Any,
    tokenizer: Tokenizer,
    texts: Iterable[Record],
    *,
    mesh: Mesh,
    begin: Sequence[int] = (),
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
) -> Measured:
    """Perplexity, bits per byte and accuracy of a model on texts.

    Bytes are those of the texts, whatever the tokens keep of them. The end of a text is not predicted; nor is its first
    token, with the bytes of that, where nothing stands before it.

    Args:
      model: a causal language model, (B, T) int32 -> logits (B, T, V), or the parts of a split head.
      params: its parameters, on `mesh`.
      extra: its other collections, on `mesh`.
      tokenizer: of the model.
      texts: each a text, or, up to one that is `last`, a piece of it.
      mesh: where it all lies.
      begin: ids that stand before each text, for a model that was trained so: see `beginning`.
      length: see `scores`.
      stride: see `scores`.
      batch: see `scores`.

    Raises:
      UserError: what `scores` raises, or no text has a token to predict.
    """
    spans, nbytes, documents = [], 0, 0
    for whole in _documents(texts):
        documents += 1
        ids = np.concatenate([np.array(begin, np.int64), *encode_many(tokenizer, whole)])
        nbytes += sum(len(utf8(piece)) for piece in whole)
        if len(ids) and not begin:
            nbytes -= tokenizer.token_bytes[int(ids[0])]
        if len(ids) > 1:
            spans.append(Span(ids))
    if not spans:
        raise UserError(f"no text has a token to predict: {documents} of them, none of 2 tokens or more.")
    found = scores(model, params, extra, spans, mesh=mesh, length=length, stride=stride, batch=batch)
    nll = math.fsum(score.nll for score in found)
    return Measured(documents, nll, sum(score.hits for score in found), sum(score.tokens for score in found), nbytes)


def beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that stand before each text: of the token that begins one, where the tokenizer has it."""
    return () if tokenizer.begin is None else (tokenizer.begin,)


def _documents(texts: Iterable[Record]) -> Iterator[list[str]]:
    pieces: list[str] = []
    for record in texts:
        pieces.append(record.text)
        if record.last:
            yield pieces
            pieces = []


def windows(size: int, silent: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a span in which each target counts once.

    The first one begins where the span does, and each next one `stride` tokens later, so that all targets but the first
    have at least `length - stride` inputs before them (as `transformers` documents for perplexity). With
    `stride = length` windows lie side by side, as those of a contiguous evaluation split do.

    Args:
      size: tokens of the span.
      silent: as in `Span`.
      length: the most inputs of a window.
      stride: from the begin of one window to that of the next.

    Yields:
      (first, last, loud): inputs are the tokens from `first` up to `last`, targets those one later, and the targets
      before the token `loud` are left out.
    """
    done = silent
    for first in range(0, size - 1, stride):
        last = min(first + length, size - 1)
        if last + 1 > done:
            yield first, last, done
            done = last + 1
        if last == size - 1:
            return


def scores(
    model: nn.Module,
    params: Any,
    extra: Any,
    spans: Sequence[Span],
    *,
    mesh: Mesh,
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
) -> list[Score]:
    """The log-likelihood of the targets of spans.

    Args:
      model: a causal language model, (B, T) int32 -> logits (B, T, V), or the parts of a split head.
      params: its parameters, on `mesh`.
      extra: its other collections, on `mesh`.
      spans: what is scored.
      mesh: where it all lies.
      length: the most inputs of a window; None: `model.max_length`.
      stride: of windows, see there; None: half of `length`.
      batch: rows that are computed together, a multiple of the mesh's data parallel devices; None: as many as have
        `LOGITS` elements in their logits.

    Returns:
      The score of each span, in their order.

    Raises:
      UserError: the model is no causal language model; `length`, `stride` or `batch` is out of range; or the model
        gives numbers that are not finite.
    """
    length, stride = sizes(model, length, stride)
    groups: dict[int, list[tuple[int, int, int, int]]] = {}
    for i, span in enumerate(spans):
        for first, last, loud in windows(len(span.ids), span.silent, length, stride):
            width = max(SHORTEST, 1 << (last - first - 1).bit_length())
            groups.setdefault(min(width, length), []).append((i, first, last, loud))
    totals, place = np.zeros((len(spans), 2), np.float64), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        for width, rows in sorted(groups.items()):
            count = _batch(model, mesh, width, len(rows), batch)
            program = _program(model, params, extra, mesh, (count, width))
            waiting: deque[tuple[list[int], Any]] = deque()
            for start in range(0, len(rows), count):
                some = rows[start : start + count]
                laid = jax.device_put(_laid(spans, some, count, width), place)
                waiting.append(([row[0] for row in some], program(params, extra, laid)))
                if len(waiting) > IN_FLIGHT:
                    _add(totals, *waiting.popleft())
            for which, sums in waiting:
                _add(totals, which, sums)
    if not np.isfinite(totals).all():
        raise UserError(
            "the model gives numbers that are not finite: it has diverged, or a token is outside of its vocabulary. "
            "Choose another step, or its own tokenizer."
        )
    return [
        Score(float(nll), round(hits), len(span.ids) - span.silent) for (nll, hits), span in zip(totals.tolist(), spans)
    ]


def sizes(model: nn.Module, length: int | None, stride: int | None = None) -> tuple[int, int]:
    """Length and stride of windows, checked."""
    most = getattr(model, "max_length", None)
    if most is None or not getattr(model, "causal", True) or hasattr(model, "classes"):
        raise UserError(
            f"{type(model).__name__} can't be asked how likely a text is: expected a causal language model, such as "
            "model.name='transformer'."
        )
    length = most if length is None else length
    if not 1 <= length <= most:
        raise UserError(f"length={length} is out of range: expected 1 to the model's max_length={most}.")
    stride = max(length // 2, 1) if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} is out of range: expected 1 to the length of a window, {length}.")
    return length, stride


def _batch(model: nn.Module, mesh: Mesh, width: int, rows: int, asked: int | None) -> int:
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    if asked is not None:
        sharding.check_batch(mesh, asked, "batch")
        return asked
    most = LOGITS // (width * getattr(model, "vocab_size", LOGITS))
    return max(min(most, rows) // parts, 1) * parts


def _program(model: nn.Module, params: Any, extra: Any, mesh: Mesh, shape: tuple[int, int]) -> jax.stages.Compiled:
    """(params, extra, rows) -> (B, 2) float32: the sum of -log p of each row's targets, and how many were right."""
    apply = step.make_apply(model)
    of_row = functools.partial(softmax_cross_entropy, metrics=("accuracy",))

    def sums(params: Any, extra: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        outputs, _ = apply(params, extra, rows["inputs"], train=False)
        axes = {"features": 0, "kernel": None} if isinstance(outputs, Mapping) else 0
        found = jax.vmap(of_row, in_axes=(axes, 0))(outputs, {key: rows[key] for key in ("targets", "weights")})
        return jax.numpy.stack([found["loss"][0], found["accuracy"][0]], axis=-1)

    place = sharding.batch_sharding(mesh)
    rows = {
        key: jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for key, kind in (("inputs", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    lowered = step.compile_step(sums, params, extra, rows, mesh=mesh, out_shardings=sharding.replicated(mesh))
    with progress.phase("compile"):
        return lowered.compile()


def _laid(spans: Sequence[Span], rows: Sequence[tuple[int, int, int, int]], count: int, width: int) -> dict[str, Any]:
    """Rows as arrays (count, width), filled up with elements of weight 0."""
    inputs, targets = np.zeros((2, count, width), np.int32)
    weights = np.zeros((count, width), np.float32)
    for row, (i, first, last, loud) in enumerate(rows):
        ids = spans[i].ids[first : last + 1]
        inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        weights[row, loud - first - 1 : len(ids) - 1] = 1
    return {"inputs": inputs, "targets": targets, "weights": weights}


def _add(totals: np.ndarray, which: Sequence[int], sums: jax.Array) -> None:
    """Add up what the rows of a batch gave, when it is there."""
    found = np.asarray(jax.block_until_ready(sums), np.float64)
    progress.beat()
    np.add.at(totals, list(which), found[: len(which)])
