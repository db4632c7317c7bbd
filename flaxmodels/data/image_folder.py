"""Images of your own: one folder a class. They are decoded when a batch needs them, so that any number of them fits.

`_found` lists the files, `_gather` decodes those of one batch.
"""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxmodels.data import held_out, images
from flaxmodels.data.split import SKIP, Rows, Source, Split, fingerprint
from flaxmodels.registry import Fraction, Positive, UserError, suggest

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Images that are left out, and counted; any other file is none.
OTHERS = (".avif", ".gif", ".heic", ".heif", ".tif", ".tiff")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # what Pillow may try, whatever else it knows
# Up to this many bytes in all, the content of the files is part of the fingerprint.
HASHED = 2**30

_TRAIN, _TESTS = "train", ("test", "val", "validation")

Channels = Literal[1, 3]
Policy = Literal["raise", "skip"]


def image_folder(
    path: str,
    size: Positive,
    test_path: str | None = None,
    validation: Fraction = 0.1,
    channels: Channels = 3,
    on_corrupt: Policy = "raise",
) -> Source:
    """Your own images, one folder a class: `path/CLASS/*.png`, also jpg, jpeg, webp and bmp, and folders within.

    Or `path/train/CLASS`, with `path/test/CLASS`, `path/val/CLASS` or `path/validation/CLASS` to evaluate on. Names
    that begin with a dot, links to folders inside of a class, and files of other kinds there are left alone; the
    transform "left out" is how many of these are images all the same, such as .gif and .tiff. Classes are numbered, and
    images come, in the order of their names.

    Each image is turned upright as its EXIF data say, scaled with antialiasing so that it covers the square, and
    cropped around its centre. What is transparent becomes white; 16-bit grey is scaled to 8 bits.

    The fingerprint is of names and contents, if all files together are up to 1 GiB; above that of names and sizes, so
    that a start need not read everything.

    Args:
      path: the folder.
      size: height and width of the square, in pixels.
      test_path: a folder of the same classes to evaluate on; None takes the one in `path`, else holds a part out.
      validation: the part that is held out where there is nothing to evaluate on, of each class the same share.
      channels: 3 for colour, 1 for grey.
      on_corrupt: what to do about a file that can't be decoded: "raise", or "skip", which leaves it out of the loss.

    Raises:
      UserError: there is no such folder, or fewer than two classes in it; a class has no images, or is not one of those
        to train on; a file can't be read. Later, when it is needed, an image that is damaged.
    """
    root, found, left_out = _found(path, test_path)
    labels = tuple(sorted(found[0]))
    known, *others = (_files(part, labels) for part in found)
    if others:
        unseen = others[0]
    else:
        held = held_out.stratified(known.label, validation)
        if not held.any():
            raise UserError(
                f"data.validation={validation:g} of the {len(held)} images in {root} holds out none: at least one is "
                "needed to evaluate on, of a class that has two. Set data.test_path, or give more."
            )
        known, unseen = known[~held], known[held]
    whole = known.bytes + unseen.bytes <= HASHED
    train, test = (_split(files, size, channels, on_corrupt) for files in (known, unseen))
    return Source(
        "image_folder",
        train,
        test,
        facts={"classes": len(labels)},
        fingerprint=fingerprint({"train": _digest(known, root, whole), "test": _digest(unseen, root, whole)}),
        transforms={"size": size, "channels": channels, **({"left out": left_out} if left_out else {})},
        labels=labels,
    )


@dataclasses.dataclass(frozen=True)
class _Files:
    """The images of one split: `path` (N,) encoded file names, as numpy packs them; `label` and `size`, of each."""

    path: np.ndarray
    label: np.ndarray
    size: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "_Files":
        return _Files(self.path[rows], self.label[rows], self.size[rows])

    @property
    def bytes(self) -> int:
        return int(self.size.sum())


def _found(path: str, test_path: str | None) -> tuple[str, list[dict[str, list[str]]], int]:
    """The folder; class -> images, to train on and, if there are such, to evaluate on; and how many `OTHERS`."""
    root = _folder(path, "data.path")
    inside = {entry.name: entry.path for entry in _entries(root) if entry.is_dir()}
    tests = [inside[name] for name in _TESTS if name in inside]
    divided = _TRAIN in inside
    if divided and (others := sorted(set(inside) - {_TRAIN, *_TESTS})):
        # A folder named "train" may well be a class, of vehicles; but then it has images in it.
        divided = False
        if not any(_is_image(entry.name) for entry in _entries(inside[_TRAIN])):
            raise UserError(
                f"data.path={path!r} has {_TRAIN!r}, with folders in it, and {others[0]!r}: classes, or splits? For "
                f"splits, set --config.data.path={inside[_TRAIN]} and --config.data.test_path=FOLDER."
            )
    train = inside[_TRAIN] if divided else root
    if test_path is not None:
        parts = [train, _folder(test_path, "data.test_path")]
    elif divided and len(tests) > 1:
        raise UserError(
            f"{' and '.join(tests)}: which is to evaluate on? Set --config.data.test_path={tests[0]}, for example."
        )
    else:
        parts = [train, *(tests if divided else ())]
    classes, left_out = zip(*map(_classes, parts))
    if len(classes[0]) == 1:
        raise UserError(
            f"{train} has the class {min(classes[0])!r} only: expected at least two, each a folder with its images."
        )
    if len(classes) == 2 and (extra := sorted(set(classes[1]) - set(classes[0]))):
        raise UserError(
            f"{parts[1]} has the class {extra[0]!r}, which {parts[0]} has not: nothing would be trained for it. "
            f"{suggest(extra[0], classes[0])}"
        )
    return root, list(classes), sum(left_out)


def _folder(path: str, where: str) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        said = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{where}={path!r} {said}. Expected a folder with one folder a class in it.")
    return str(folder)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; unlike a Path, an entry knows without asking the disk again whether it is a folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}.") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _classes(folder: str) -> tuple[dict[str, list[str]], int]:
    """Class -> its images; and how many `OTHERS` are beside them."""
    entries = _entries(folder)
    if stray := sorted(entry.path for entry in entries if _is_image(entry.name) and not entry.is_dir()):
        raise UserError(f"{stray[0]} is in no class: expected images in {folder}/CLASS/.")
    there = {entry.name: list(_images(entry.path)) for entry in entries if entry.is_dir()}
    classes = {name: list(filter(_is_image, files)) for name, files in there.items()}
    if not classes:
        raise UserError(f"{folder} has no folders in it: expected one a class, with images.")
    for name, files in sorted(classes.items()):
        if not files:
            raise UserError(
                f"{folder}/{name} has no images: expected files that end in {', '.join(SUFFIXES)}. "
                "Remove the folder, if it is no class."
            )
    return classes, sum(map(len, there.values())) - sum(map(len, classes.values()))


def _images(folder: str) -> Iterator[str]:
    """All images within, `OTHERS` too."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):  # a link may lead back up
            yield from _images(entry.path)
        elif entry.name.lower().endswith((*SUFFIXES, *OTHERS)):
            yield entry.path


def _files(classes: Mapping[str, list[str]], labels: tuple[str, ...]) -> _Files:
    """In the order of classes, and of the paths within them: the same wherever they lie."""
    ordered = [(file, number) for number, label in enumerate(labels) for file in sorted(classes.get(label, ()))]
    return _Files(
        np.array([os.fsencode(file) for file, _ in ordered]),
        np.array([number for _, number in ordered], np.int32),
        np.array([_of_disk(file, lambda path: path.stat().st_size) for file, _ in ordered], np.int64),
    )


def _of_disk(file: str, ask: Callable[[Path], Any]) -> Any:
    try:
        return ask(Path(file))
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}. Restore it, or remove it.") from error


def _digest(files: _Files, root: str, whole: bool) -> str:
    """sha256 of the relative path of each file, and of its content if `whole`, of its size if not."""
    total = hashlib.sha256()
    for encoded, size in zip(files.path, files.size):
        file = os.fsdecode(encoded)
        said = hashlib.sha256(_of_disk(file, Path.read_bytes)).digest() if whole else str(size).encode()
        total.update(os.fsencode(os.path.relpath(file, root)) + b"\0" + said + b"\0")
    return total.hexdigest()


def _split(files: _Files, size: int, channels: int, on_corrupt: Policy) -> Split:
    gather = functools.partial(
        _gather, path=files.path, label=files.label, size=size, channels=channels, skip=on_corrupt == "skip"
    )
    count = len(files.label)
    return Split(count, {}, gather, images.prepare, stored=count * (size * size * channels + 4))


def _gather(
    arrays: Mapping[str, Any],
    index: np.ndarray,
    path: np.ndarray,
    label: np.ndarray,
    size: int,
    channels: int,
    skip: bool,
) -> Rows:
    """Rows {"image": (B, size, size, channels) uint8, "label": (B,) int32}, and `SKIP` (B,) bool where that may be."""
    rows = {"image": np.zeros((len(index), size, size, channels), np.uint8), "label": label[index.clip(0)]}
    damaged = np.zeros(len(index), bool)
    for row in np.flatnonzero(index >= 0):
        file = os.fsdecode(path[index[row]])
        try:
            rows["image"][row] = decode(file, size, channels)
        except Exception as error:  # of a damaged file Pillow raises nearly anything
            if not skip:
                raise UserError(
                    f"{file} is no image that can be decoded: {_why(error)}. Remove it or repair it, "
                    "or leave such files out with --config.data.on_corrupt=skip."
                ) from error
            damaged[row] = True
    return {**rows, SKIP: damaged} if skip else rows


def _why(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Pillow names an address in memory instead.
    return "not BMP, JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(file: str, size: int, channels: int) -> np.ndarray:
    """The image in a file, upright, scaled to cover a square and cropped to it: (size, size, channels) uint8.

    Raises:
      Exception: of many types, for what is no image, or half of one.
    """
    from PIL import Image, ImageOps

    content = io.BytesIO(Path(file).read_bytes())
    with Image.open(content, formats=FORMATS) as image:
        if image.format == "PNG":  # checks the sums that decoding does not look at; the file can't be used after it
            image.verify()
    with Image.open(content, formats=FORMATS) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG alone: skips detail that scaling would only average away
        plain = _plain(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
        side = min(plain.size)
        left, top = ((length - side) / 2 for length in plain.size)
        square = plain.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square).reshape(size, size, channels)


def _plain(image: Any, mode: str) -> Any:
    """As "L" or "RGB", without a palette, transparency, or more than 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which Pillow itself would cut off at 255
        grey = np.asarray(image).astype(np.float32) * np.float32(255 / 65535)
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert(mode)
