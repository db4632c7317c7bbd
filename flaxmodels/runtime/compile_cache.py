"""JAX's folder of compiled programs, where one is set: an entry that is not what was written there is removed.

JAX takes whatever lies under a name for the program that it asked for. Another one's entry runs in its place, with
other numbers and without a word; a flipped bit is found by zlib, not by zstandard, which JAX uses where it is
installed; and a damaged entry stays, since JAX never writes over one: each start warns, and compiles again.

So beside each entry lies its seal, the SHA-256 of its name and bytes. What has none yet, because JAX wrote it a moment
ago or a process was killed before it could seal it, is believed if it can be unpacked; what can't be may be half
written by another process just now, and is left alone while it is young.
"""

import contextlib
import hashlib
import importlib
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax

from flaxmodels import hardware

ENTRY, SEAL = "-cache", ".sha256"
# Of the folder that `keep` chooses: bytes, above which what was used longest ago goes; and seconds, that compiling a
# program takes at the least, so that keeping it pays.
MOST, WORTH = 2 * 2**30, 0.05
NUMBER = 2000  # of programs, above which the same: each is looked at when a run starts
YOUNG = 60.0  # seconds
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how its data begin


def keep() -> None:
    """Keep compiled programs in this user's cache folder, where JAX was told no other: the second start is faster.

    For a command, which has its process to itself, before anything is compiled. Nothing changes where JAX has a folder
    (JAX_COMPILATION_CACHE_DIR), or is to have none (JAX_ENABLE_COMPILATION_CACHE=false), or where the folder can't be
    made, or others could write in it: what lies there is run. Each kind of CPU has a folder of its own, since homes are
    shared between machines, and code for one may not run on another.
    """
    chosen, enabled = _settings()
    if chosen or not enabled:
        return
    try:
        place = hardware.make_cache_folder("compiled", hashlib.sha256(instructions().encode()).hexdigest()[:12])
        for found in (part.stat() for part in (place.parents[1], place.parent, place)):
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return
        if not os.access(place, os.W_OK):
            return
        _shrink(place)
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def instructions() -> str:
    """What this machine's CPU can do beyond the least that XLA makes code for; "" where the system doesn't say."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return " ".join(sorted(word for word in found[1].split() if re.search("avx|amx|fma|bmi|sve|asimd", word)))
    return ""


def _shrink(place: Path) -> None:
    """Remove what was read or written longest ago, while all of it is more than `MOST` or `NUMBER`."""
    used = []
    for entry in place.glob(f"*{ENTRY}"):
        with contextlib.suppress(OSError):  # another process has just removed it
            found = entry.stat()
            used.append((max(found.st_atime, found.st_mtime), found.st_size, entry))
    size, number = sum(size for _, size, _ in used), len(used)
    for _, freed, entry in sorted(used):
        if size <= MOST and number <= NUMBER:
            return
        entry.unlink(missing_ok=True)
        size, number = size - freed, number - 1


@contextlib.contextmanager
def verified() -> Iterator[list[str]]:
    """Around all that is compiled: removes what is damaged before, seals what is new after.

    Yields:
      What was removed, a line for the log each.
    """
    place = folder()
    if place is None:
        yield []
        return
    lines = check(place)
    try:
        yield lines
    finally:
        seal(place)


def folder() -> Path | None:
    """The folder that JAX keeps compiled programs in; None where it keeps none, or keeps them in a bucket."""
    name = place()
    return Path(name) if name and "://" not in name else None


def place() -> str:
    """Where JAX keeps compiled programs, a folder or a bucket; "" where it keeps none."""
    name, enabled = _settings()
    return name if name and enabled else ""


def _settings() -> tuple[str | None, bool]:
    """JAX's folder, and whether it is to be used."""
    name, enabled = (getattr(jax.config, f"jax_{key}") for key in ("compilation_cache_dir", "enable_compilation_cache"))
    return name, enabled


def check(place: Path) -> list[str]:
    """Remove every entry that differs from its seal, or is older, has none, and can't be unpacked; seal the others.

    Args:
      place: a folder of JAX's; it need not exist.

    Returns:
      A line for each entry that was removed.
    """
    removed = []
    for entry in sorted(place.glob(f"*{ENTRY}")):
        sealed = entry.with_name(entry.name + SEAL)
        with contextlib.suppress(OSError):  # another process has just removed it, or it is not ours
            expected, _, untouched = (sealed.read_text() if sealed.exists() else "").partition(" ")
            if untouched == _touched(entry):  # a folder of gigabytes is not read at each start
                continue
            data = entry.read_bytes()
            if expected == _digest(entry, data) or (not expected and _unpacks(data)):
                _write(sealed, _seal(entry, data))
                continue
            if not expected and abs(time.time() - entry.stat().st_mtime) < YOUNG:
                continue
            entry.unlink(missing_ok=True)
            sealed.unlink(missing_ok=True)
            why = "can't be unpacked" if not expected else "is not what was written"
            removed.append(f"warning: compiled program {entry.name} in {place} {why}: removed, and compiled again")
    return removed


def seal(place: Path | None) -> None:
    """Seal the entries that JAX has written since; called when something was compiled. Never raises OSError.

    Args:
      place: as `folder` says; None does nothing.
    """
    for entry in [] if place is None else place.glob(f"*{ENTRY}"):
        sealed = entry.with_name(entry.name + SEAL)
        if not sealed.exists():
            with contextlib.suppress(OSError):
                data = entry.read_bytes()
                if _unpacks(data):  # else another process is about to write it
                    _write(sealed, _seal(entry, data))
    for sealed in [] if place is None else place.glob(f"*{ENTRY}{SEAL}"):
        if not sealed.with_name(sealed.name.removesuffix(SEAL)).exists():
            with contextlib.suppress(OSError):  # JAX removes entries, where its folder has a size limit
                sealed.unlink()


def _seal(entry: Path, data: bytes) -> str:
    return f"{_digest(entry, data)} {_touched(entry)}"


def _digest(entry: Path, data: bytes) -> str:
    return hashlib.sha256(entry.name.encode() + b"\0" + data).hexdigest()


def _touched(entry: Path) -> str:
    """What changes with every write to an entry, and when another file takes its place."""
    found = entry.stat()
    return f"{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}-{found.st_size}"


def _write(file: Path, text: str) -> None:
    """Whole or not at all, also when several processes write it at once."""
    number, name = tempfile.mkstemp(prefix=".seal_", dir=file.parent)
    try:
        with os.fdopen(number, "w") as out:
            out.write(text)
        Path(name).replace(file)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _unpacks(data: bytes) -> bool:
    """Whether JAX could unpack an entry: by zstandard where that is installed, else by zlib."""
    if data.startswith(_ZSTANDARD):
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:  # Python 3.14 has one of its own
            return True
        with contextlib.suppress(zstandard.ZstdError):
            zstandard.ZstdDecompressor().decompress(data)
            return True
        return False
    with contextlib.suppress(zlib.error):
        zlib.decompress(data)
        return True
    return False
