"""What JSON says, as dataclasses and what stands in them; anything else than they are annotated with is refused."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def read(kind: Any, value: Any, where: str) -> Any:
    """`value` of JSON as what an annotation says.

    Raises:
      ValueError: it is something else, as the message says.
    """
    origin, words = typing.get_origin(kind), typing.get_args(kind)
    record = dataclasses.is_dataclass(kind) and isinstance(value, dict)
    if record:
        hints = _hints(kind)
        if strange := sorted(set(value) ^ set(hints)):
            raise ValueError(f"{where}.{strange[0]} is {'missing' if strange[0] in hints else 'unknown'}")
        return kind(**{name: read(hints[name], value[name], f"{where}.{name}") for name in hints})
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in words:
            return None
        return read(next(word for word in words if word is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(read(words[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: read(words[1], one, f"{where}.{name}") for name, one in value.items()}
    if origin is Literal and value in words:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) < float("inf"):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {str(value)[:40]!r}")
