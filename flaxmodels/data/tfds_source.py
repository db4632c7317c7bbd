"""Any data set of tensorflow-datasets, read from its ArrayRecord files when a batch needs it.

`tfds_sets.py` finds or prepares the set, `tfds_features.py` decodes it; here splits are cut out of its files.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels.data import held_out, images, tfds_features, tfds_sets
from flaxmodels.data.records import OnCorrupt, Records
from flaxmodels.data.split import SKIP, Batch, Rows, Source, Split, fingerprint
from flaxmodels.data.tfds_features import Feature
from flaxmodels.registry import Fraction, Positive, UserError, suggest

_CHUNK = 8192  # labels read at a time


def tfds(
    dataset: str,
    train: str = "train",
    test: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    inputs: str | None = None,
    targets: str | None = None,
    size: Positive | None = None,
    validation: Fraction = 0.1,
    on_corrupt: OnCorrupt = "raise",
) -> Source:
    """Any data set of TFDS, prepared as ArrayRecord; prepared now if it is not there, which some need TensorFlow for.

    Inputs are images, as float32 in 0..1; or numbers of a fixed shape: bytes as float32 in 0..1, other integers as
    int32, floats as float32. Targets are class labels, int32, and the fact "classes" is their number; or numbers,
    float32 (B, ...), and the fact "classes" is the width of what a model gives. Examples come in the order of the
    files.

    Args:
      dataset: "mnist", "mnist:3.0.1", "emnist/letters:3.1.0". Without a version, the highest that is prepared.
      train: what to train on: a split, or any expression of splits: "train[:80%]", "train+validation".
      test: what to evaluate on. None is "test" if there is one, else "validation", else a part of `train`.
      data_dir: TFDS's data directory; None is `TFDS_DATA_DIR` or ~/tensorflow_datasets.
      manual_dir: a folder with the original archives, for machines without a network; not looked at once prepared.
      inputs: name of the feature, "outer/inner" if nested; None is what the builder says.
      targets: name of the feature, as `inputs`.
      size: scales images so that they cover a square of so many pixels, and crops them around the centre; None leaves
        them as they are, all of one shape.
      validation: the part that is held out where there is nothing to evaluate on, of each class the same share. To
        know the classes, all records are read once at each start.
      on_corrupt: what to do about a record that is damaged, or whose file is missing or cut off: "raise", or "skip",
        which leaves it out of the loss.

    Raises:
      UserError: no such set, split or feature; it can't be prepared, or is prepared in another format only; a split is
        empty. Later, when it is needed, a record that is damaged, an image of another shape, a missing label.
    """
    builder = tfds_sets.find(dataset, data_dir, manual_dir)
    info, folder = builder.info, str(builder.data_path)
    chosen = tfds_features.choose(info, inputs, targets, size)
    known = _part(info, train, "train", on_corrupt)
    other = test or next((name for name in ("test", "validation") if name in info.splits), None)
    if 0 in chosen[0].shape:
        chosen = (_seen(known, folder, chosen), chosen[1])
    if other is not None:
        unseen = _part(info, other, "test", on_corrupt)
    else:
        held = held_out.stratified(_classes(known, folder, chosen[1]), validation)
        if not held.any():
            raise UserError(
                f"data.validation={validation:g} of the {len(held)} examples of {train!r} holds out none: at least one "
                f"is needed to evaluate on. Set data.test to a split, or a slice. {suggest('', info.splits)}"
            )
        known, unseen = known[~held], known[held]
    target = chosen[1]
    values = {} if target.kind == "label" else {"values": "numbers"}
    return Source(
        info.full_name,
        _split(known, folder, chosen),
        _split(unseen, folder, chosen),
        facts={"classes": len(target.labels) if target.kind == "label" else target.shape[-1]},
        fingerprint=_fingerprint(info, Path(folder), (known, unseen), None if other else validation),
        transforms={"inputs": chosen[0].name, "targets": target.name, "shape": list(chosen[0].shape), **values},
        labels=target.labels,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """The examples of one split: `chosen` (N,) numbers among `records`; None is all of them. `said`: for messages."""

    records: Records
    chosen: np.ndarray | None
    said: str

    @property
    def size(self) -> int:
        return self.records.size if self.chosen is None else len(self.chosen)

    def __getitem__(self, rows: np.ndarray) -> "_Part":
        chosen = np.flatnonzero(rows) if self.chosen is None else self.chosen[rows]
        return dataclasses.replace(self, chosen=chosen.astype(np.int64))

    def numbers(self, index: np.ndarray) -> np.ndarray:
        """Examples (B,) -> records (B,); below 0 stays below."""
        return np.where(index < 0, -1, index if self.chosen is None else self.chosen[index])


def _part(info: Any, expression: str, where: str, on_corrupt: OnCorrupt) -> _Part:
    """The files of a split expression, and which of their records."""
    try:
        pieces = info.splits[expression].file_instructions
    except (ValueError, AssertionError, KeyError) as error:
        why = str(error).splitlines()[-1].partition(" Should be")[0]
        raise UserError(
            f"data.{where}={expression!r} is no split of {info.full_name}: {why} {suggest(expression, info.splits)}"
        ) from error
    lengths = {piece.filename: piece.examples_in_shard for piece in pieces}
    records = Records(tuple(lengths), tuple(lengths.values()), on_corrupt)
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist()))
    if not pieces:
        raise UserError(f"data.{where}={expression!r} of {info.full_name} has no examples.")
    chosen = np.concatenate([starts[p.filename] + np.arange(p.skip, p.skip + p.take) for p in pieces])
    whole = np.array_equal(chosen, np.arange(records.size))
    return _Part(records, None if whole else chosen, f"data.{where}={expression!r}")


def _seen(part: _Part, folder: str, chosen: Sequence[Feature]) -> Feature:
    """The inputs, with the shape of the first image that can be read: all others must have it too."""
    inputs = chosen[0]
    for start in range(part.size):
        number = int(part.numbers(np.arange(start, start + 1))[0])
        (record,) = part.records.read(np.array([number]))
        try:
            if record is not None:
                (image,) = tfds_features.one(record, folder, (inputs,))
                return dataclasses.replace(inputs, shape=image.shape)
        except Exception:  # a damaged one: reading it for a batch will say so
            continue
    raise UserError(f"{part.said}: none of its {part.size} images can be read.")


def _classes(part: _Part, folder: str, target: Feature) -> np.ndarray:
    """(N,) the class of each example, -1 where it can't be read; all 0 where there are no classes."""
    labels = np.zeros(part.size, np.int32)
    for start in range(0, part.size if target.kind == "label" else 0, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, part.size))
        (found,), there = tfds_features.decode(part.records, part.numbers(index), folder, (target,))
        labels[index] = np.where(there, found, -1)
    return labels


def _split(part: _Part, folder: str, features: tuple[Feature, Feature]) -> Split:
    inputs, targets = features
    levels = np.iinfo(inputs.dtype).max if inputs.dtype in ("uint8", "uint16") else None
    prepare = _as_is if levels is None else functools.partial(images.prepare, levels=levels)
    row = inputs.nbytes + targets.nbytes + (part.records.on_corrupt == "skip")
    gather = functools.partial(_gather, part=part, folder=folder, features=features)
    return Split(part.size, {}, gather, prepare, stored=part.size * row)


def _gather(
    arrays: Mapping[str, Any], index: np.ndarray, part: _Part, folder: str, features: tuple[Feature, Feature]
) -> Rows:
    """Rows {"image": (B, ...), "label": (B, ...)}, and `SKIP` (B,) bool where that may be."""
    (image, label), there = tfds_features.decode(part.records, part.numbers(index), folder, features)
    target = features[1]
    if target.kind == "label" and (wrong := there & ((label < 0) | (label >= len(target.labels)))).any():
        place = int(wrong.argmax())
        raise UserError(
            f"{part.said}: example {index[place]} has the label {label[place]}, which is none of the "
            f"{len(target.labels)} classes. TFDS writes -1 where nobody gave one: choose another split."
        )
    rows = {"image": image, "label": label}
    return {**rows, SKIP: ~there & (index >= 0)} if part.records.on_corrupt == "skip" else rows


def _as_is(rows: Rows, index: Any) -> Batch:
    """A `Split.prepare` for inputs that are numbers."""
    return {"inputs": rows["image"], "targets": rows["label"], "weights": (index >= 0).astype(np.float32)}


def _fingerprint(info: Any, folder: Path, parts: Sequence[_Part], validation: float | None) -> str:
    """Of what the set says of itself, and of the names, sizes and lengths of its files: their content is not read."""
    return fingerprint(
        {
            "set": info.full_name,
            "features": json.loads((folder / "features.json").read_text()),
            "splits": [[s.name, list(s.shard_lengths), int(s.num_bytes)] for s in info.splits.values()],
            "parts": [
                {
                    "what": part.said,
                    "validation": validation,
                    "files": [[Path(f).name, _bytes(f), n] for f, n in zip(part.records.files, part.records.lengths)],
                }
                for part in parts
            ],
        }
    )


def _bytes(file: str) -> int | None:
    """The size of a file; None if it is missing."""
    try:
        return Path(file).stat().st_size
    except OSError:
        return None
