"""Augmentation on the host: plain functions of one example, before it becomes part of a batch.

For what the device can't do: other libraries, images of any size or dtype, text. A function `(example, rng, **options)
-> example` gets one row, {"image": (H, W, C) uint8, "label": ()} for instance, and a generator made from (seed, step,
example): so the result is the same after a resume, on any number of hosts, and in any thread or worker process.
`augment.py` is the same on the device, where it costs the host nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxmodels.data.augment import bound
from flaxmodels.data.augment_images import TRIES, Mode, Ratios, Shares
from flaxmodels.data.split import SKIP, Rows
from flaxmodels.registry import Fraction, UserError

Example = dict[str, np.ndarray]
Function = Callable[[Example, np.random.Generator], Example]

AUGMENTATIONS: Mapping[str, str] = {
    "crop": "flaxmodels.data.host_augment:crop",
    "flip": "flaxmodels.data.host_augment:flip",
    "resized_crop": "flaxmodels.data.host_augment:resized_crop",
}

# In the upper half of the first word of a Philox key, where `order.permutation` and `synthetic` have zeros.
PURPOSE = 1


def make(specs: Sequence[Mapping[str, Any]]) -> tuple[functools.partial, ...]:
    """The functions of `data.host_augment`, for `apply`; they can be pickled.

    Args:
      specs: each {"name": a key of `AUGMENTATIONS`, or "package.module:function", and its options}.

    Raises:
      UserError: an unknown name or option, or a value of the wrong type or range.
    """
    return bound(specs, AUGMENTATIONS, "data.host_augment", ("example", "rng"), {})


def apply(functions: Sequence[Function], rows: Rows, seed: int, step: int, index: np.ndarray) -> Rows:
    """Each example of `rows` through all of `functions`, in order.

    Pure and thread-safe, where the functions are: nothing is shared between calls, and `rows` stay as they were.

    Args:
      functions: from `make`.
      rows: of a batch or of a part of it, each (B, ...); from `Split.gather`.
      seed: of the run.
      step: which the rows are for.
      index: (B,) of the examples; those of -1, and those that could not be read, are left alone.

    Raises:
      UserError: a function returned other entries, shapes or dtypes than it got, which no batch can hold.
    """
    if not functions:
        return rows
    result = {name: np.array(values) for name, values in rows.items()}
    wanted = (index >= 0) & ~result.get(SKIP, np.zeros(len(index), np.bool_))
    # To make a generator takes ten times as long as to set the state of one.
    philox = np.random.Philox(key=0)
    rng, state = np.random.Generator(philox), philox.state
    for place in np.flatnonzero(wanted):
        state["state"]["key"][:] = seed % 2**32 | PURPOSE << 32, int(step) << 32 | int(index[place])
        philox.state = state
        before = {name: values[place, ...] for name, values in result.items() if name != SKIP}
        after = before
        for number, function in enumerate(functions):
            after = function(dict(after), rng)
            _check_kept(before, after, f"data.host_augment[{number}]")
        for name, value in after.items():
            result[name][place] = value
    return result


def _check_kept(before: Example, after: Any, where: str) -> None:
    def looks(example: Any) -> Any:
        if not isinstance(example, dict):
            return type(example).__name__
        return {name: (np.shape(value), getattr(value, "dtype", type(value))) for name, value in example.items()}

    if looks(after) != looks(before):
        found, expected = (str(looks(example)) for example in (after, before))
        raise UserError(f"{where} returned {found}: entries, shapes and dtypes must stay what they were, {expected}.")


def flip(
    example: Example, rng: np.random.Generator, *, horizontal: Fraction = 0.5, vertical: Fraction = 0.0
) -> Example:
    """Mirror the image left to right with probability `horizontal`, and upside down with probability `vertical`."""
    entry, image = _image(example, "flip")
    across, down = rng.random(2) < (horizontal, vertical)
    return {**example, entry: image[:: -1 if down else 1, :: -1 if across else 1]}


def crop(example: Example, rng: np.random.Generator, *, padding: int = 4, mode: Mode = "zeros") -> Example:
    """Pad the image by `padding` pixels on each side and cut the old size out, anywhere."""
    entry, image = _image(example, "crop")
    height, width, _ = image.shape
    if mode == "reflect" and padding >= min(height, width):
        raise UserError(
            f"data.host_augment has 'crop' with mode='reflect' and {padding} pixels of padding: "
            f"it must be less than the sides of the image, {height} x {width}."
        )
    row, column = rng.integers(0, 2 * padding, 2, endpoint=True)
    wide = np.pad(image, [(padding, padding)] * 2 + [(0, 0)], mode="reflect" if mode == "reflect" else "constant")
    return {**example, entry: wide[row : row + height, column : column + width]}


def resized_crop(
    example: Example, rng: np.random.Generator, *, area: Shares = (0.08, 1.0), aspect: Ratios = (3 / 4, 4 / 3)
) -> Example:
    """Cut a box out and stretch it to the size of the image, with Pillow; see `augment_images.resized_crop`.

    Args:
      example: "image" or "inputs", (H, W, C) uint8.
      rng: of the example.
      area: range of the box's share of the image; uniform.
      aspect: range of its width over its height; uniform in the logarithm.
    """
    from PIL import Image

    entry, image = _image(example, "resized_crop")
    height, width, channels = image.shape
    if image.dtype != np.uint8:
        raise UserError(
            f"data.host_augment has 'resized_crop', which is for images of uint8: an example has {image.dtype} "
            f"{image.shape}. Use the one of data.augment."
        )
    share, stretch = rng.random((2, TRIES))
    covered = area[0] + share * (area[1] - area[0])
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** stretch * (height / width)
    tall, wide = np.sqrt(covered / ratio), np.sqrt(covered * ratio)
    first = np.argmax((tall <= 1) & (wide <= 1))  # where none fits the first, cut to the image
    high, long = min(tall[first], 1) * height, min(wide[first], 1) * width
    top, left = rng.random(2) * (height - high, width - long)
    # Clipped: rounding may lead out of the image by a bit, which Pillow refuses.
    box = (left, top, min(left + long, width), min(top + high, height))
    # Of two or four channels Pillow would take the last for opacity.
    parts = [image] if channels == 3 else [image[..., channel] for channel in range(channels)]
    size, how = (width, height), Image.Resampling.BILINEAR
    found = [np.asarray(Image.fromarray(part).resize(size, how, box)) for part in parts]
    return {**example, entry: found[0] if channels == 3 else np.stack(found, axis=-1)}


def _image(example: Example, name: str) -> tuple[str, np.ndarray]:
    """The entry that holds the image, and the image (H, W, C): "image", or "inputs" of bytes, as `arrays` has it."""
    for entry in ("image", "inputs"):
        image = example.get(entry)
        if image is not None and image.ndim == 3 and (entry == "image" or image.dtype == np.uint8):
            return entry, image
    found = ", ".join(f"{entry!r} {value.dtype} {value.shape}" for entry, value in example.items())
    raise UserError(
        f"data.host_augment has {name!r}, which is for an entry 'image' (height, width, channels), or 'inputs' of that "
        f"shape and of uint8. An example has {found}: leave it out."
    )
