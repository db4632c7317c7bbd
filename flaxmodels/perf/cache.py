"""Results that took long to find, in the user's cache folder: JSON, by a key that holds all they follow from.

There are two keys. That of a program, `program_key`, holds its text, the compiler, its flags and devices. That of a
config, `config_key`, spares even the lowering: it holds the config, the content of the data, our sources, all versions
and settings.

An entry that is damaged, or that belongs to another key, is as good as none; so is a folder that can't be written.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxmodels import data, hardware, registry, sections
from flaxmodels.durations import parse
from flaxmodels.memory import on_a_device
from flaxmodels.state import TrainState

# Entries of one kind; what is above goes, oldest first.
MOST = 2000
# Packages that a program, or what is read from it, follows from; and variables that its compiler reads.
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# What reads a compiled program.
READERS = ("memory.py", "perf/compiled.py", "perf/collectives.py", "perf/hlo.py")


def folder(kind: str) -> Path:
    """Where results of a kind lie; it need not exist."""
    return hardware.cache_folder() / kind


def key(*parts: Any) -> str:
    """SHA-256 of what a result follows from: anything that JSON can hold."""
    return hashlib.sha256(_text(parts).encode()).hexdigest()


def config_key(
    config: Mapping[str, Any], target: str, devices: Sequence[jax.Device], chip: Mapping[str, Any]
) -> str | None:
    """The key of what a config comes to on some devices.

    Args:
      config: of a run.
      target: the name of the devices.
      devices: of one kind.
      chip: figures that were counted with.

    Returns:
      None where the config names code of the user's own: nobody can know what that follows from.

    Raises:
      UserError: the config, or its data, are wrong.
    """
    config = registry.plain(config)
    if not _known(config):
        return None
    checked = sections.check(config, lambda text, where: parse(text, where) and text)
    options = sections.split_data(checked["data"])[1]
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items())
    return key(
        config, _data(json.dumps(options, sort_keys=True)), target, chip, _compiler(devices), sources(), settings
    )


def program_key(lowered: jax.stages.Lowered, state: TrainState, mesh: Mesh) -> str:
    """The key of what the compiler says of a train step.

    Args:
      lowered: the step.
      state: what it starts from, which tells which of its arguments are parameters.
      mesh: of its devices.
    """
    sizes = [on_a_device(part) for part in (state.params, state.opt_state, state.extra)]
    devices = list(mesh.devices.flat)
    places = [device.id for device in devices]
    return key(lowered.as_text(), sizes, dict(mesh.shape), places, _compiler(devices), sources(*READERS))


def _known(config: Any) -> bool:
    """Whether all of a config is plain data, and nothing in it is a name such as "my_package.module:MyNet"."""
    if isinstance(config, Mapping):
        return all(map(_known, config.values()))
    if isinstance(config, tuple):
        return all(map(_known, config))
    if isinstance(config, str):
        return not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", config)
    return config is None or type(config) in (bool, int, float)


@functools.lru_cache(maxsize=2)
def _data(options: str) -> list[Any]:
    """All of a data set that a program follows from: its content decides on sizes and shapes."""
    source = data.load(**registry.plain(json.loads(options)))
    return [source.fingerprint, source.train.size, source.test.size, source.tokens_per_example, source.nbytes]


def look_again() -> None:
    """Read data anew for the next key: they may have changed since the last one."""
    _data.cache_clear()


def _compiler(devices: Sequence[jax.Device]) -> list[Any]:
    """The compiler of some devices, and what it goes by beside the program."""
    client = devices[0].client
    flags = {name: os.environ.get(name) for name in FLAGS}
    kind, memory = devices[0].device_kind, hardware.memory(devices[0])
    return [kind, len(devices), client.platform_version, platform.machine(), versions(), flags, memory]


@functools.cache
def versions() -> dict[str, str]:
    """Of `PACKAGES` that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def sources(*parts: str) -> str:
    """SHA-256 of some of our own files, or of all."""
    package, total = Path(__file__).parents[1], hashlib.sha256()
    found = (file for pattern in ("*.py", "*.toml") for file in package.rglob(pattern))
    for file in [package / part for part in parts] or sorted(found):
        total.update(f"{file.relative_to(package)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return total.hexdigest()


def get(kind: str, key: str) -> Any:
    """What `put` stored under this key; None where there is nothing, or nothing that can be trusted."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads((folder(kind) / f"{key}.json").read_text())
        if entry["seal"] == _seal(key, entry["value"]):
            return entry["value"]
    return None


def put(kind: str, key: str, value: Any) -> None:
    """Store a value, whole or not at all; several processes may do so at once."""
    text = json.dumps({"seal": _seal(key, value), "value": value})
    with contextlib.suppress(OSError, RuntimeError):
        place = hardware.make_cache_folder(kind)
        number, name = tempfile.mkstemp(prefix=".new_", dir=place)
        try:
            with os.fdopen(number, "w") as out:
                out.write(text)
            Path(name).replace(place / f"{key}.json")
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        entries = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in entries[:-MOST]:
            old.unlink(missing_ok=True)


def _seal(key: str, value: Any) -> str:
    return hashlib.sha256(f"{key}{_text(value)}".encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
