"""Arrays by name, from a file or from Python. Nothing here unpickles."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels.registry import UserError, suggest

# A path of an .npz or a .safetensors file; or name -> an array, or the path of an .npy file.
Arrays = str | dict

_SUFFIXES = (".npz", ".safetensors")
_EXPECTED = 'expected an .npz or a .safetensors file, or {"inputs": "x.npy", "targets": "y.npy"}'


def names(given: Arrays, where: str) -> tuple[str, ...]:
    """The names of the arrays in `given`; `where` is the config key that holds it, for messages."""
    if isinstance(given, Mapping):
        return tuple(given)
    path = _archive(given, where)
    if path.suffix.lower() == ".npz":
        with _refusing(path), np.load(path, allow_pickle=False) as file:
            return tuple(file.files)
    with _refusing(path), _safetensors(path) as file:
        return tuple(file.keys())


def read(given: Arrays, wanted: Iterable[str], where: str) -> dict[str, np.ndarray]:
    """Those arrays of `given` that are `wanted`, and no others.

    Raises:
      UserError: a file that is missing, damaged or of another kind; an array that is not there, or holds objects.
    """
    there = names(given, where)
    for name in wanted:
        if name not in there:
            raise UserError(f"{where} has no array {name!r}. {suggest(name, there)}")
    if isinstance(given, Mapping):
        return {name: _value(given[name], f"{where}.{name}") for name in wanted}
    path, found = _archive(given, where), {}
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            for name in wanted:
                with _refusing(path, name):
                    found[name] = file[name]
                if not isinstance(found[name], np.ndarray):  # any other file in a zip comes as its bytes
                    raise UserError(f"{path}: {name!r} is not an array. Write the file with numpy.savez.")
    else:
        with _safetensors(path) as file:
            for name in wanted:
                try:
                    found[name] = file.get_tensor(name)
                except AttributeError as error:  # of numbers of 8 bits or fewer with a fraction
                    kind = file.get_slice(name).get_dtype()
                    raise UserError(f"{path}: {name!r} is of {kind}, which NumPy has not. Write it as F32.") from error
    return found


def _value(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, str):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise UserError(f"{where} is not an array: {error}.") from error
    path = _file(value, where, (".npy",))
    if path.suffix.lower() != ".npy":
        raise UserError(f"{where}={value!r}: expected an .npy file.")
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{path} is not an .npy file. Write it with numpy.save.")
    with _refusing(path):
        return np.load(path, allow_pickle=False)


def _archive(given: str, where: str) -> Path:
    path = _file(given, where, _SUFFIXES)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{where}={given!r}: {_EXPECTED}.")
    if path.suffix.lower() == ".npz" and not zipfile.is_zipfile(path):  # also one whose end is cut off
        raise UserError(f"{path} is not a whole .npz file. Write it again with numpy.savez.")
    return path


def _file(given: str, where: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(given).expanduser()
    if path.is_dir():
        raise UserError(f"{where}={given!r} is a folder: expected {' or '.join(suffixes)}.")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*") if p.suffix.lower() in suffixes]
        hint = f"In its folder: {suggest(path.name, near)}" if near else f"Paths are taken from {Path.cwd()}."
        raise UserError(f"{where}={given!r}: there is no such file. {hint}")
    return path


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole .safetensors file: {error}.") from error


@contextlib.contextmanager
def _refusing(path: Path, name: str | None = None) -> Iterator[None]:
    """What reading a file raises -> UserError with the names of the file and of the array."""
    what = str(path) if name is None else f"{path}: the array {name!r}"
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{what} does not fit into memory: {error}.") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{what} is damaged: {error}. Write it again.") from error
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{what} holds Python objects, which only pickle can read, and a pickle can run anything: refused. "
                "Save numbers: array.astype(numpy.float32)."
            ) from error
        raise UserError(f"{what} is damaged: {error}. Write it again.") from error
