"""Looking at data: any past or future batch as a picture or as text, and what a data set is made of.

`batch_at` is what the step will see, augmentation and padding included: it runs the same functions.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from flaxmodels.console import human, human_bytes
from flaxmodels.data import order
from flaxmodels.data.split import SKIP, Source, Split, Tokenizer
from flaxmodels.job import Job
from flaxmodels.perf import bench_data
from flaxmodels.registry import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Which = Literal["train", "test"]

# Examples of a split that `summary` looks at: of more, this many spread evenly.
SAMPLE = 2**17
_CHUNK = 1024
_BAR, _BARS = 40, 24  # characters of the longest bar; the most bars


@dataclasses.dataclass(frozen=True)
class Shown:
    """One batch, on the host.

    Attributes:
      index: (B,) the example ids; -1 is padding.
      unread: (B,) bool, examples that could not be read.
      inputs: (B, ...) array, or a dict of them.
      targets: (B, ...).
      weights: (B, ...) float32.
    """

    index: np.ndarray
    unread: np.ndarray
    inputs: Any
    targets: np.ndarray
    weights: np.ndarray


def batch_at(job: Job, step: int, which: Which = "train") -> Shown:
    """The batch of training that makes step number `step` + 1, or batch number `step` of an evaluation.

    Raises:
      UserError: an evaluation has no such batch.
    """
    if which == "train":
        each, every = job.train.train_at(job.seed, step)
        augmented = jax.jit(lambda e, all, at: job.augment(job.train.batch(e, all), e["index"], at))
        batch = augmented(each, every, np.int32(step))
    else:
        batches = order.eval_batches(job.test.batch_size, job.test.split.size)
        if step >= batches:
            raise UserError(f"--step={step}: an evaluation has {batches} batches, numbered from 0.")
        each, every = job.test.eval_at(step)
        batch = jax.jit(job.test.batch)(each, every)
    found = jax.device_get({"index": each["index"], **batch})
    feed = job.train if which == "train" else job.test
    rows = feed.split.gather(feed.split.arrays, found["index"]) if feed.resident else jax.device_get(each["rows"])
    unread = rows.get(SKIP, np.zeros(len(found["index"]), bool))
    return Shown(found["index"], unread, found["inputs"], found["targets"], found["weights"])


def is_image(inputs: Any) -> bool:
    """Whether inputs look like (B, H, W, 1 or 3 channels) floats."""
    return getattr(inputs, "ndim", 0) == 4 and inputs.shape[-1] in (1, 3) and inputs.dtype.kind == "f"


def is_text(inputs: Any) -> bool:
    """Whether inputs look like token ids: (B, T) integers, or a dict with "tokens"."""
    if isinstance(inputs, dict):
        inputs = inputs["tokens"] if {"tokens", "segments"} <= set(inputs) else 0.0
    tokens = np.asarray(inputs)
    return tokens.ndim == 2 and tokens.dtype.kind in "iu"


def picture(shown: Shown, labels: Sequence[str] = (), most: int = 64) -> "Image":
    """A grid of images, each with its label and its example id.

    Args:
      shown: of images, values in 0..1.
      labels: names of the classes; () shows numbers.
      most: images to show, from the front of the batch.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = shown.inputs[:most]
    height, width = images.shape[1:3]
    times = max(1, -(-72 // min(height, width)))
    columns, font, caption = min(len(images), math.ceil(len(images) ** 0.5)), ImageFont.load_default(11), 28
    cell = max(width * times, 72) + 6, height * times + caption + 6
    sheet = Image.new("RGB", (columns * cell[0] + 6, -(-len(images) // columns) * cell[1] + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, pixels in enumerate(images):
        left, top = 6 + place % columns * cell[0], 6 + place // columns * cell[1]
        bytes_ = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        tile = Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_)
        sheet.paste(tile.resize((width * times, height * times), Image.Resampling.NEAREST), (left, top))
        said = _label(shown.targets[place], labels) if shown.weights[place].any() else "weight 0"
        said = "unreadable" if shown.unread[place] else said
        for line, text in enumerate((said, f"#{shown.index[place]}")):
            draw.text((left, top + height * times + 1 + 13 * line), _fitting(text, cell[0] - 6, font), "black", font)
    return sheet


def _fitting(text: str, width: float, font: Any) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def _label(target: Any, labels: Sequence[str]) -> str:
    """A class by name; a soft target by its classes with their shares; another target as its numbers."""

    def name(number: int) -> str:
        return _printable(labels[number]) if 0 <= number < len(labels) else str(number)

    target = np.asarray(target)
    if target.ndim == 0:
        return name(int(target)) if target.dtype.kind in "iu" else f"{target:.4g}"
    if target.size == 1:
        return f"{target.item():.4g}"
    if target.dtype.kind != "f" or target.ndim > 1 or target.min() < 0 or abs(target.sum() - 1) > 1e-3:
        more = ", ..." if target.size > 4 else ""
        return f"[{', '.join(f'{value:.4g}' for value in target.ravel()[:4].tolist())}{more}]"
    shares = [i for i in np.argsort(-target, kind="stable")[:2] if target[i] > 0.005]
    return ", ".join(f"{name(int(i))} {target[i]:.0%}" if len(shares) > 1 else name(int(i)) for i in shares)


def windows(shown: Shown, tokenizer: Tokenizer | None, labels: Sequence[str] = (), most: int = 8) -> Iterator[str]:
    """A paragraph for each window: its text with the boundaries of documents and the parts without loss marked.

    Special tokens, such as "[MASK]", stand by their names.

    Args:
      shown: of token ids.
      tokenizer: between ids and text; None shows ids.
      labels: names of the classes, where a window has one target.
      most: windows to show, from the front of the batch.
    """
    yield "‖ a new document   {…} without loss   ⌁n padding of n tokens"
    tokens = shown.inputs["tokens"] if isinstance(shown.inputs, dict) else shown.inputs
    for place in range(min(most, len(tokens))):
        segments = shown.inputs["segments"][place] if isinstance(shown.inputs, dict) else np.ones(len(tokens[place]))
        per_token = shown.targets.ndim == 2
        weights = shown.weights[place] if per_token else np.ones(len(segments))
        later = per_token and _one_later(tokens[place], shown.targets[place], weights)
        label = "" if per_token else f"  label {_label(shown.targets[place], labels)}"
        counted = f"{int((weights * (segments > 0)).astype(bool).sum())} of {len(segments)} tokens count"
        if shown.index[place] < 0 or shown.unread[place]:
            why = "padding" if shown.index[place] < 0 else "could not be read"
            yield f"\n#{shown.index[place]}  row {place}  {why}: nothing counts"
            continue
        yield f"\n#{shown.index[place]}  row {place}{label}  {counted}"
        yield _marked(tokens[place], segments, _shifted(weights, segments) if later else weights, tokenizer)


def _one_later(tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bool:
    """Whether what is learned are the tokens that follow, and not, as with masks, those that were in their places."""
    learned = weights[:-1] > 0
    return not learned.any() or bool((targets[:-1] == tokens[1:])[learned].mean() > 0.5)


def _shifted(weights: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The weight of each token, where that at t is the one of the token at t + 1."""
    # The first token of a document is nobody's target: as the next one.
    follows = segments[1:] == segments[:-1]
    return np.concatenate([weights[:1], np.where(follows, weights[:-1], weights[1:])])


def _marked(tokens: np.ndarray, segments: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Runs of tokens of one document and one weight, each decoded in one piece."""
    state = np.stack([segments, weights > 0])
    starts = [0, *(np.flatnonzero((state[:, 1:] != state[:, :-1]).any(0)) + 1), len(tokens)]
    text, before = "", segments[0]
    for start, stop in itertools.pairwise(starts):
        run = tokens[start:stop]
        if segments[start] == 0:
            text += f"⌁{stop - start}"
            continue
        said = " ".join(map(str, run)) if tokenizer is None else _printable(_said(run, tokenizer))
        text += ("‖" if segments[start] != before else "") + (said if weights[start] > 0 else "{" + said + "}")
        before = segments[start]
    return text


def _said(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with the names of special ones but the end of a document."""
    names = {number: name for name, number in tokenizer.special.items() if number != tokenizer.end}
    runs = itertools.groupby(tokens.tolist(), key=names.get)
    return "".join(name * len(list(run)) if name else tokenizer.decode(list(run)) for name, run in runs)


def _printable(text: str) -> str:
    """Without characters that would move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def numbers(shown: Shown, most: int = 16) -> Iterator[str]:
    """A line for each example that is neither an image nor text."""
    for place in range(min(most, len(shown.index))):
        leaves = [np.asarray(leaf[place], np.float64) for leaf in jax.tree.leaves(shown.inputs)]
        inputs = "  ".join(f"{leaf.shape} {leaf.min():.4g}..{leaf.max():.4g} mean {leaf.mean():.4g}" for leaf in leaves)
        weight = float(np.mean(shown.weights[place]))
        target = "could not be read" if shown.unread[place] else f"target {_label(shown.targets[place], ())}"
        yield f"#{shown.index[place]:<8} inputs {inputs}  {target}  weight {weight:g}"


def write_batch(job: Job, step: int, which: Which, to: Path, most: int | None = None) -> Iterator[str]:
    """Lines that show a batch; of images, a PNG in `to` as well.

    Raises:
      UserError: there is no such batch, or `to` can't be written.
    """
    shown, source = batch_at(job, step, which), job.source
    first = step * job.train.batch_size
    epoch = f", epoch {first / source.train.size:.2f}" if which == "train" else ""
    yield f"{which} batch of step {step}{epoch}: {len(shown.index)} examples of {source.name!r}"
    if is_image(shown.inputs):
        image = picture(shown, source.labels, most or 64)
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            image.save(to)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--to={str(to)!r} can't be written: {error}. Name a file that can, such as batch.png."
            ) from error
        yield f"ids: {' '.join(map(str, shown.index[: most or 64]))}"
        yield f"picture: {to}"
    elif is_text(shown.inputs):
        yield from windows(shown, source.tokenizer, source.labels, most or 8)
    else:
        yield from numbers(shown, most or 16)


def summary(job: Job) -> Iterator[str]:
    """Lines on a data set: splits, class balance, lengths, and what its identity is made of."""
    source, size = job.source, job.train.batch_size
    yield f"source  {source.name}: {human_bytes(source.nbytes)} in memory once read"
    for name, feed in (("train", job.train), ("test", job.test)):
        yield ""
        yield from _split_lines(name, feed.split, source)
    yield ""
    steps = source.train.size / size
    yield f"global batch {size}: {steps:.4g} steps an epoch"
    way, speed = bench_data.speed(job)
    yield f"loads   {human(speed)} examples a second, {way}"
    yield "identity, which a resumed run must share:"
    yield from (f"  {name:<14} {value}" for name, value in job.identity.items())


def verify(job: Job) -> Iterator[str]:
    """Read every example of both splits once; a line for each. UserError for what is damaged, unless it is skipped."""
    for name, feed in (("train", job.train), ("test", job.test)):
        split, left_out = feed.split, 0
        for start in range(0, split.size, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, split.size), dtype=np.int32)
            left_out += int(split.gather(split.arrays, index).get(SKIP, np.False_).sum())
        yield f"{name}: read {split.size:,} examples; {left_out:,} could not be read"


def _split_lines(name: str, split: Split, source: Source) -> Iterator[str]:
    targets, lengths, unread = _looked_at(split)
    looked = "" if len(lengths) + unread == split.size else f" ({len(lengths) + unread:,} looked at)"
    yield f"{name}  {split.size:,} examples{looked}" + (f"; {unread:,} could not be read" if unread else "")
    if not len(lengths):
        return
    start = 0
    for number, (size, slots) in enumerate(split.mixture):
        yield f"  part {number}  ids {start:,} to {start + size - 1:,}: {slots / order.PERIOD:.1%} of each batch"
        start += size
    if lengths.max(initial=1) > 1:
        total = lengths.sum() * (split.size / max(len(lengths), 1))
        yield f"  tokens that count: {human(float(total))}, {lengths.mean():.1f} an example"
        edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 9).round().astype(int))
        counts, _ = np.histogram(lengths, edges)
        yield from _bars([f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)], counts)
    if targets.ndim == 1 and targets.dtype.kind in "iu" and "classes" in source.facts:
        counts = np.bincount(targets, minlength=source.facts["classes"])
        yield from _bars([_label(np.int32(i), source.labels) for i in range(len(counts))], counts)
    elif targets.dtype.kind == "f" and targets.ndim <= 2:
        for number, values in enumerate(targets.reshape(len(targets), -1).T[:8]):
            spread = f"{values.min():.4g}..{values.max():.4g}, mean {values.mean():.4g}, std {values.std():.4g}"
            yield f"  target {number}: {spread}"


def _looked_at(split: Split) -> tuple[np.ndarray, np.ndarray, int]:
    """(targets (N, ...), how many weights of each are not 0 (N,), how many more could not be read)."""
    prepare = jax.jit(split.prepare)
    chosen = np.unique(np.linspace(0, split.size - 1, min(split.size, SAMPLE)).astype(np.int32))
    targets, lengths, unread = [], [], 0
    for start in range(0, len(chosen), _CHUNK):
        index = np.full(_CHUNK, -1, np.int32)  # one shape, so that it compiles once
        index[: len(chosen) - start] = chosen[start : start + _CHUNK]
        rows = dict(split.gather(split.arrays, index))
        skip = rows.pop(SKIP, np.False_) & (index >= 0)
        index, unread = np.where(skip, np.int32(-1), index), unread + int(skip.sum())
        batch = jax.device_get(prepare(rows, index))
        inputs = batch["inputs"]
        real = batch["weights"]
        if real.ndim == 1 and isinstance(inputs, dict) and "segments" in inputs:
            real = inputs["segments"]
        there = index >= 0
        targets.append(batch["targets"][there])
        lengths.append((real.reshape(len(real), -1) > 0).sum(1)[there])
    return np.concatenate(targets), np.concatenate(lengths), unread


def _bars(names: Sequence[str], counts: np.ndarray) -> Iterator[str]:
    """A bar each; of more than `_BARS` the largest and the smallest."""
    chosen = list(range(len(counts)))
    if len(counts) > _BARS:
        chosen = np.argsort(-counts, kind="stable").tolist()
        yield f"  {len(counts):,} of them; the {_BARS // 2} largest and smallest:"
        chosen = [*chosen[: _BARS // 2], *chosen[-(_BARS // 2) :]]
    width, most = max(len(names[i]) for i in chosen), max(int(counts.max()), 1)
    for i in chosen:
        yield f"  {names[i]:>{width}}  {counts[i]:>9,}  {'█' * round(_BAR * counts[i] / most)}".rstrip()
