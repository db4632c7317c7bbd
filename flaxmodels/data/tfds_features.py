"""What of a TFDS example becomes inputs and targets, and how many examples are decoded at once.

`choose` picks two features; `decode` turns records into their values. Examples that hold numbers of fixed shape alone
are decoded together (`records.columns`), all others one by one: by TFDS, and their images by Pillow.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from flaxmodels.data.records import Field, Records, columns, corrupt
from flaxmodels.registry import UserError, suggest

# Pillow's mode by the number of channels of 8 bits.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_EXPECTED = (
    "expected an image, numbers of a fixed shape, or a class label as targets. Text is read by "
    'data.name="csv", "jsonl", "parquet" or "text"'
)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature, as rows have it.

    Attributes:
      name: in the data set; "outer/inner" where they are nested.
      kind: what it is.
      shape: of one row. An image has 0 for what only its file says.
      dtype: of rows.
      stored: how an example holds it, if that is so simple that many can be decoded at once.
      square: pixels that an image is scaled and cropped to; 0 leaves it as it is.
      labels: names of the classes.
    """

    name: str
    kind: Literal["image", "label", "numbers"]
    shape: tuple[int, ...]
    dtype: str
    stored: Field | None = None
    square: int = 0
    labels: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def choose(info: Any, inputs: str | None, targets: str | None, size: int | None) -> tuple[Feature, Feature]:
    """The features to learn from, and to learn.

    Args:
      info: the `tfds.core.DatasetInfo`.
      inputs: name of the one; None is what the builder says.
      targets: name of the other; None is what the builder says.
      size: pixels of the square that images are made to be; None leaves them as they are.

    Raises:
      UserError: there is no such feature, or it is of a kind that can't be used.
    """
    there = _flat(info.features)
    keys = info.supervised_keys
    usual = keys if isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(k, str) for k in keys) else None
    names = {}
    for where, name, default in zip(("inputs", "targets"), (inputs, targets), usual or (None, None)):
        names[where] = name or default
        if names[where] is None:
            raise UserError(
                f"{info.full_name} does not say which feature is to be data.{where}: set it. {suggest('', there)}"
            )
        if names[where] not in there:
            raise UserError(
                f"data.{where}={names[where]!r} is no feature of {info.full_name}. {suggest(names[where], there)}"
            )
    chosen = _feature(names["inputs"], there[names["inputs"]], size)
    target = _feature(names["targets"], there[names["targets"]], None)
    if chosen is None or chosen.kind == "label":
        raise UserError(f"data.inputs={names['inputs']!r} is {there[names['inputs']]}: {_EXPECTED}.")
    if target is None or target.kind == "image":
        raise UserError(f"data.targets={names['targets']!r} is {there[names['targets']]}: {_EXPECTED}.")
    if size is not None and not chosen.square:
        raise UserError(f"data.size={size} is for images of 8 bits; {chosen.name!r} is {there[chosen.name]}.")
    if target.kind == "numbers":  # values to come near to: (B, K), as a model's outputs are
        target = dataclasses.replace(target, dtype="float32")
    return chosen, target


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """Name -> feature, "outer/inner" where they are nested."""
    import tensorflow_datasets as tfds

    found: dict[str, Any] = {}
    for name, feature in features.items():
        inside = isinstance(feature, tfds.features.FeaturesDict)
        found |= _flat(feature, f"{prefix}{name}/") if inside else {prefix + name: feature}
    return found


def _feature(name: str, feature: Any, size: int | None) -> Feature | None:
    """A feature of TFDS as one of ours; None if it can't be one."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        stored = Field(name, "int", "int64", ())
        return Feature(name, "label", (), "int32", stored, labels=tuple(feature.names))
    dtype, shape = np.dtype(feature.np_dtype), feature.shape
    if isinstance(feature, tfds.features.Image):
        if len(shape) != 3 or (dtype == np.uint16 and shape[-1] != 1):
            return None
        shape = (shape[0] or 0, shape[1] or 0, shape[2] or 3)
        square = size if size is not None and dtype == np.uint8 else 0
        return Feature(name, "image", (square, square, shape[2]) if square else shape, dtype.name, square=square)
    if not isinstance(feature, tfds.features.Tensor) or None in shape or dtype.kind not in "iuf":
        return None
    kept = "float32" if dtype.kind == "f" else "uint8" if dtype == np.uint8 and shape else "int32"
    return Feature(name, "numbers", shape or (1,), kept, _stored(name, feature, dtype))


def _stored(name: str, feature: Any, dtype: np.dtype) -> Field | None:
    """How an example holds a tensor; None for those ways that are left to TFDS."""
    import tensorflow_datasets as tfds

    info = feature.get_tensor_info()
    if type(feature) not in (tfds.features.Tensor, tfds.features.Scalar) or info.optional:
        return None
    encoding, written = feature.to_json_content().encoding, feature.get_serialized_info()
    if encoding == "bytes":
        return Field(name, "bytes", dtype.str, info.shape)
    if encoding != "none" or (written.shape, np.dtype(written.np_dtype)) != (info.shape, dtype):
        return None
    if dtype.kind == "f":
        return Field(name, "float", dtype.str, info.shape)
    return None if info.shape or dtype == np.uint64 else Field(name, "int", dtype.str, ())


def decode(
    records: Records, numbers: np.ndarray, folder: str, features: Sequence[Feature]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Read and decode examples.

    Args:
      records: where they lie.
      numbers: (B,) of the records; those below 0 are left out.
      folder: of the data set, with its features.json.
      features: what to take from them, shapes known.

    Returns:
      (B, *shape) array for each feature, and (B,) bool: whether the row is there. Rows that are not are zeros.

    Raises:
      UserError: a record can't be read or decoded, and the policy is "raise"; an image has another shape, or a number
        is beyond 32 bits.
    """
    raw: list[bytes | None] = [None] * len(numbers)
    wanted = np.flatnonzero(numbers >= 0)
    for place, record in zip(wanted.tolist(), records.read(numbers[wanted])):
        raw[place] = record
    fields = [f.stored for f in features if f.stored is not None]
    if len(fields) == len(features):
        found, decoded = columns(raw, fields)
        values = [_kept(found[f.name].reshape(-1, *f.shape), f) for f in features]
    else:
        values = [np.zeros((len(raw), *f.shape), f.dtype) for f in features]
        decoded = np.zeros(len(raw), bool)
    for place in np.flatnonzero(~decoded).tolist():
        if (record := raw[place]) is None:
            continue
        number = int(numbers[place])
        try:
            example = one(record, folder, features)
        except Exception as error:  # what a damaged image, or a record of something else, makes decoders raise is open
            if records.on_corrupt == "raise":
                raise corrupt(records.where(number), number, f"it can't be decoded ({error})") from error
            continue
        for feature, array, value in zip(features, values, example):
            if value.shape != array.shape[1:]:
                raise UserError(
                    f"{feature.name!r} has the shape {value.shape} in record {number}, others {array.shape[1:]}: set "
                    "data.size, in pixels, to have all images scaled and cropped to a square."
                )
            array[place] = _kept(value, feature)
        decoded[place] = True
    return values, decoded


def one(record: bytes, folder: str, features: Sequence[Feature]) -> list[np.ndarray]:
    """The values of one example, of any shape and dtype. Raises nearly anything for a damaged one."""
    example = _decoder(folder, tuple(features))(record)
    values = []
    for feature in features:
        value: Any = example
        for name in feature.name.split("/"):
            value = value[name]
        whole = _image(value, feature) if feature.kind == "image" else np.asarray(value)
        values.append(whole.reshape(feature.shape) if feature.kind == "numbers" else whole)
    return values


@functools.lru_cache(maxsize=8)
def _decoder(folder: str, features: tuple[Feature, ...]) -> Callable[[bytes], Any]:
    """TFDS's decoder of an example, for these features alone, and with images as they are in their files."""
    import tensorflow_datasets as tfds

    there = _flat(tfds.features.FeatureConnector.from_config(folder))
    chosen: dict[str, Any] = {}
    skipped: dict[str, Any] = {}
    for feature in features:
        *outer, name = feature.name.split("/")
        inside, without = chosen, skipped
        for step in outer:
            inside, without = inside.setdefault(step, {}), without.setdefault(step, {})
        inside[name] = there[feature.name]
        if feature.kind == "image":
            without[name] = tfds.decode.SkipDecoding()
    whole = tfds.features.FeaturesDict(chosen)
    return functools.partial(whole.deserialize_example_np, decoders=skipped)


def _image(content: bytes, feature: Feature) -> np.ndarray:
    """An image file -> (H, W, C) array."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        if feature.dtype == "uint16":
            return np.asarray(image, np.uint16)[..., None]
        if feature.dtype == "float32":  # TFDS keeps the four bytes of each number as the four channels of a pixel
            return np.ascontiguousarray(image.convert("RGBA")).view(np.float32)
        plain = image.convert(_MODES[feature.shape[-1]])
        if feature.square:
            plain = ImageOps.fit(plain, (feature.square, feature.square), Image.Resampling.BICUBIC)
        return np.asarray(plain).reshape(plain.height, plain.width, -1)


def _kept(values: np.ndarray, feature: Feature) -> np.ndarray:
    """Values in the dtype of rows."""
    kept = values.astype(feature.dtype, copy=False)
    if kept.dtype.kind == "i" and values.dtype.itemsize > 4 and (kept != values).any():
        raise UserError(f"{feature.name!r} holds {values[kept != values].flat[0]}, which does not fit into 32 bits.")
    return kept
