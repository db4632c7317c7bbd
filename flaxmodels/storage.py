"""Where a workdir lies: in a folder of a file system, or in a bucket of Google Cloud Storage, "gs://BUCKET/NAME".

Both are handled as `pathlib.Path`; of a bucket the path is a `buckets.Objects`, which has the same methods as far as
they make sense there. What differs between the two, and is not a method of a path, is here. Nothing of this loads
anything for a folder.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flaxmodels.registry import UserError

if TYPE_CHECKING:
    from flaxmodels.buckets import Objects

SCHEME = "gs://"
PATTERN = "*?[]{}\\"  # have a meaning of their own where a name is looked for in a bucket
OTHERS = ("s3://", "az://", "hf://", "abfs://", "http://", "https://")


def place(text: str | os.PathLike[str]) -> Path:
    """The path that a text names; one in a bucket where it begins with "gs://".

    Raises:
      UserError: it names no bucket, or storage of another kind.
    """
    name = os.fspath(text)
    if not name.startswith(SCHEME):
        if name.startswith(OTHERS):
            raise UserError(f"{name!r} is no place for a run: expected a folder, or {SCHEME}BUCKET/NAME.")
        return Path(name)
    bucket, _, inside = name.removeprefix(SCHEME).partition("/")
    if not bucket or not inside.strip("/") or ".." in inside.split("/"):
        raise UserError(f"{name!r} names no place in a bucket: expected {SCHEME}BUCKET/NAME.")
    if found := sorted(set(PATTERN) & set(name)):
        raise UserError(f"{name!r} has {' '.join(found)} in it: expected {SCHEME}BUCKET/NAME without any of {PATTERN}")
    from flaxmodels.buckets import Objects

    return cast(Path, Objects(name))


def local(text: str, flag: str) -> Path:
    """The folder of this machine that a text names. UserError where it names a bucket; `flag` is what named it."""
    path = place(text)
    if is_object(path):
        raise UserError(
            f"{flag}={text!r}: this is written to a folder of this machine only. Name one, and copy it there after: "
            f"gcloud storage cp --recursive FOLDER {text}"
        )
    return path.expanduser()


def is_object(path: Path) -> bool:
    """Whether a path lies in a bucket."""
    return not isinstance(path, Path)


def objects(path: Path) -> "Objects":
    """A path of which `is_object` is true, as what it is."""
    return cast("Objects", path)


def for_orbax(path: Path) -> Path:
    """A path as Orbax shall have it: absolute, and in a bucket of the kind that it makes of a text itself."""
    if not is_object(path):
        return path.absolute()
    from etils import epath

    return cast(Path, epath.Path(str(path)))


def sizes(folder: Path) -> dict[str, int]:
    """Name, with "/", -> bytes of all files below a folder."""
    if is_object(folder):
        return {name: int(blob.size) for name, blob in objects(folder).below().items()}
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def changed(path: Path) -> float:
    """When a file, or a folder, was written last, in seconds since 1970. Raises FileNotFoundError."""
    if not is_object(path) or path.is_file():
        return path.stat().st_mtime
    if not (found := objects(path).below()):
        raise FileNotFoundError(str(path))
    return max(float(blob.updated.timestamp()) for blob in found.values())


def threads(path: Path, most: int) -> int:
    """How many threads read there at a time: at most so many, and fewer from a bucket."""
    if not is_object(path):
        return most
    from flaxmodels.buckets import THREADS

    return THREADS


def write(file: Path, data: bytes) -> None:
    """Put a file in the place of what is there, whole or not at all; on storage when this returns. Raises OSError."""
    if is_object(file):
        objects(file).write_bytes(data)
        return
    new = file.with_name(f"{file.name}.tmp")
    with new.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to storage; in a bucket all is. Raises OSError."""
    if is_object(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(file: Path, to: Path) -> None:
    """Copy a file out of a workdir into a folder, or another workdir. Raises OSError."""
    if is_object(file) or is_object(to):
        to.write_bytes(file.read_bytes())
    else:
        shutil.copyfile(file, to)


def remove(folder: Path) -> None:
    """Delete a folder and all below, as far as that goes."""
    if not is_object(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    from flaxmodels import buckets

    try:
        inside = objects(folder)
        buckets.all_of(lambda name: (inside / name).unlink(missing_ok=True), list(inside.below()))
    except OSError:  # what is left goes with the next call
        return


def move(folder: Path, to: Path, last: str) -> None:
    """Move a folder in a bucket: all of it is copied before any goes.

    Args:
      folder: of objects.
      to: where nothing is.
      last: name of the object that says that the folder is whole: it is copied last, and deleted first.

    Raises:
      OSError: killed or failed in between, it is left without `last` at one of the places, and whole at the other.
    """
    from flaxmodels import buckets

    source, target = objects(folder), objects(to)
    names = sorted(source.below())
    buckets.all_of(lambda name: (source / name).copy_to(target / name), [name for name in names if name != last])
    if last in names:
        (source / last).copy_to(target / last)
        (source / last).unlink(missing_ok=True)
    buckets.all_of(lambda name: (source / name).unlink(missing_ok=True), [name for name in names if name != last])
