"""Data sets prepared by TFDS as ArrayRecord, decoded once into `.npy` files that lie beside them.

    <data_dir>/<name>/<version>/*.array_record-*                     what TFDS writes
    <data_dir>/<name>/<version>/flaxmodels_arrays_v1/manifest.json   dtype, shape and sha256 of each array
    <data_dir>/<name>/<version>/flaxmodels_arrays_v1/<split>/<feature>.npy

A start that finds the arrays reads them in milliseconds, and does not import TFDS. Read `load` first.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels.data import builders
from flaxmodels.data.split import describe, fingerprint
from flaxmodels.registry import UserError

_ARRAYS = "flaxmodels_arrays_v1"
_CHUNK = 8192  # records decoded at a time: bounds the memory that undecoded ones take

Arrays = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The decoded arrays of a data set.

    Attributes:
      arrays: split -> feature -> (N, ...) array, read-only, in the order the builder generated.
      fingerprint: `split.fingerprint` of them all, named "split/feature".
    """

    arrays: Arrays
    fingerprint: str


def load(recipe: builders.Recipe, data_dir: str | None = None, manual_dir: str | None = None) -> Prepared:
    """Read a data set, after preparing it if this is the first time.

    Processes that start at once wait for each other: one prepares, the others read.

    Args:
      recipe: which data set.
      data_dir: TFDS's data directory; None is TFDS's own default.
      manual_dir: a folder with the original archives, for machines without a network; not looked at once prepared.

    Raises:
      UserError: archives are missing or damaged, or `data_dir` can't be written.
    """
    root = data_root(data_dir)
    folder = root / recipe.name / recipe.version / _ARRAYS
    if (prepared := _read(folder)) is not None:
        return prepared
    with only_process(root / recipe.name):
        if _read(folder) is None:
            _write(_decode_all(builders.prepare(recipe, root, manual_dir)), folder)
        prepared = _read(folder)
    if prepared is None:
        raise UserError(f"{folder} could not be read back. Is the disk full? Remove the folder, and start again.")
    return prepared


def data_root(data_dir: str | None) -> Path:
    """The folder that `data_dir` means, by TFDS's rules, without importing TFDS: absolute, not necessarily there."""
    text = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in text:
        where = "data.data_dir" if data_dir else "TFDS_DATA_DIR"
        raise UserError(
            f"{where}={text!r} must be a local folder: arrays are read from it at every start. Leave it out, and data "
            "are prepared in ~/tensorflow_datasets, once on each machine; or copy what is there to a disk."
        )
    return Path(text).expanduser().absolute()


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when a process dies. TFDS has none: two at once collide."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".flaxmodels.lock").open("a")
    except OSError as error:
        raise UserError(
            f"data_dir {str(folder.parent)!r} can't be written: {error.strerror}. Set --config.data.data_dir=FOLDER, "
            "or TFDS_DATA_DIR, to a folder that can."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _decode_all(builder: Any) -> Arrays:
    try:
        return {split: _decode(builder.as_data_source(split)) for split in builder.info.splits}
    except RuntimeError as error:  # what ArrayRecord says of a file that is missing, cut off or damaged
        raise UserError(
            f"{builder.data_path} is damaged: {error}. Remove the folder; the next start prepares it again."
        ) from error


def _decode(records: Any) -> dict[str, np.ndarray]:
    """All records of one split -> feature -> (N, ...) array."""
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(records), _CHUNK):
        chunk = records.__getitems__(range(start, min(start + _CHUNK, len(records))))
        for feature in chunk[0]:
            columns.setdefault(feature, []).append(_stack([record[feature] for record in chunk]))
    return {feature: np.concatenate(chunks) for feature, chunks in columns.items()}


def _stack(values: list[Any]) -> np.ndarray:
    """One column: text as (N, length) uint8, and integers as int32, JAX's own default."""
    array = np.stack([np.frombuffer(v, np.uint8) if isinstance(v, bytes) else np.asarray(v) for v in values])
    return array.astype(np.int32) if array.dtype == np.int64 else array


def _write(arrays: Mapping[str, Mapping[str, np.ndarray]], folder: Path) -> None:
    """Write all files under another name, then rename: who finds the folder finds it whole."""
    temporary = folder.with_name(folder.name + ".incomplete")
    for stale in (temporary, folder):  # of a process that was killed, or not what its manifest says
        shutil.rmtree(stale, ignore_errors=True)
    try:
        described = {}
        for split, features in arrays.items():
            (temporary / split).mkdir(parents=True)
            for feature, array in features.items():
                np.save(temporary / split / f"{feature}.npy", array)
                described[f"{split}/{feature}"] = describe(array)
        (temporary / "manifest.json").write_text(json.dumps(described, indent=1))
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} can't be written: {error.strerror}. Make room, and start again.") from error


def _read(folder: Path) -> Prepared | None:
    """The arrays in `folder`; None if they are not there, or not of the size and type that the manifest says."""
    arrays: Arrays = {}
    try:
        described = json.loads((folder / "manifest.json").read_text())
        for name, expected in described.items():
            split, _, feature = name.partition("/")
            array = np.load(folder / split / f"{feature}.npy")
            if array.dtype.str != expected["dtype"] or list(array.shape) != expected["shape"]:
                return None
            array.setflags(write=False)
            arrays.setdefault(split, {})[feature] = array
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):  # the last two: of half a file
        return None
    return Prepared(arrays, fingerprint(described))
