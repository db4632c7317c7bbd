"""Files of the safetensors format: headers read and checked, arrays mapped, files written tensor by tensor.

The format, as the library `safetensors` documents it: 8 bytes, the length of a header; the header, JSON: name -> dtype,
shape and the two ends of its bytes; then all bytes, without gaps. The `safetensors` library returns whole copies; here
an array is a view of the mapped file, of which only what is used is read, and a file never stands in memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxmodels.fitting import Leaf
from flaxmodels.registry import UserError

# In the order in which the library stores them: so all are aligned, and equal contents are equal files.
DTYPES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES.values())
# Bytes of the length of the header, the multiple of which its end is, and the most that a header may have.
_WORD, _LONGEST = 8, 100_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where an array stands.

    Attributes:
      file: that holds it.
      start: its first byte in the file.
      leaf: its shape and dtype.
    """

    file: Path
    start: int
    leaf: Leaf

    def view(self) -> np.ndarray:
        """The array, mapped: what is not used of it is not read, and what was is let go with it."""
        dtype = jnp.dtype(self.leaf.dtype)
        if not math.prod(self.leaf.shape):
            return np.zeros(self.leaf.shape, dtype)  # nothing can't be mapped
        try:
            return np.memmap(self.file, dtype, "r", self.start, self.leaf.shape)
        except OSError as error:
            raise UserError(f"{self.file} can't be read: {error.strerror}.") from error


def tensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of one file; of it the header alone is read.

    Raises:
      UserError: the file can't be read, is cut off, or is none of this format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_WORD), "little")
            header = opened.read(length) if length <= min(size, _LONGEST) else b""
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}.") from error
    begin = _WORD + length
    try:
        described = json.loads(header)
        found = {name: _tensor(file, begin, said) for name, said in described.items() if name != "__metadata__"}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a whole .safetensors file: its header is damaged. Copy it again.") from error
    end = max((tensor.start + tensor.leaf.nbytes for tensor in found.values()), default=begin)
    if end != size:
        raise UserError(f"{file} has {size:,} bytes, and its header describes {end:,}: copy it again.")
    return found


def _tensor(file: Path, begin: int, said: Mapping[str, Any]) -> Tensor:
    start, end = said["data_offsets"]
    if said["dtype"] not in DTYPES:
        raise UserError(f"{file}: the dtype {said['dtype']!r} is unknown: expected one of {', '.join(DTYPES)}.")
    leaf = Leaf(tuple(map(int, said["shape"])), DTYPES[said["dtype"]])
    if start < 0 or min(leaf.shape, default=1) < 0 or end - start != leaf.nbytes:
        raise ValueError(said)
    return Tensor(file, begin + start, leaf)


def write(file: Path, leaves: Mapping[str, Leaf], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a file, holding one array at a time; it is on storage when this returns.

    Args:
      file: to write.
      leaves: name -> leaf of all that it will hold.
      arrays: (name, array) of each of them, in any order.

    Raises:
      OSError: it can't be written.
    """
    starts, header, at = {}, dict[str, Any](), 0
    header["__metadata__"] = {"format": "pt"}  # what others ask for before they read
    for name in sorted(leaves, key=lambda name: (_ORDER.index(leaves[name].dtype), name)):
        leaf = leaves[name]
        starts[name], at = at, at + leaf.nbytes
        header[name] = {"dtype": _NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [starts[name], at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(_WORD, "little") + text)
        for name, array in arrays:
            if Leaf(array.shape, str(array.dtype)) != leaves[name]:
                raise ValueError(f"{name} is {array.shape} {array.dtype}: {leaves[name]} was announced.")
            opened.seek(_WORD + len(text) + starts[name])
            opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        opened.truncate(_WORD + len(text) + at)
        opened.flush()
        os.fsync(opened.fileno())
