"""The keys of a settings file, which are the names of the flags too: what each may hold, and how it is read."""

import dataclasses
import difflib
import math
import re
import shlex
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

Capacity = Literal["spot", "reserved", "on demand"]
CAPACITIES = typing.get_args(Capacity)


class UserError(ValueError):
    """Bad input: shown without a traceback, and the command leaves with exit code 2."""


def suggest(name: str, known: Collection[str]) -> str:
    """What to say after an unknown name: the nearest one, and all there are."""
    near = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"There are: {', '.join(sorted(known))}."


def _wrong(key: str, value: object, expected: str) -> UserError:
    return UserError(f"--{key}={value!r}: expected {expected}.")


def _matching(pattern: str, expected: str) -> Callable[[str, object], str]:
    def read(key: str, value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise _wrong(key, value, expected)
        return value

    return read


def number(key: str, value: object) -> float:
    """A number above 0, or its text; UserError where it is none."""
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise _wrong(key, value, "a number above 0")
    return found


def _count(key: str, value: object) -> int:
    found = number(key, value)
    if found != int(found):
        raise _wrong(key, value, "a whole number, at least 1")
    return int(found)


def _switch(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _path(key: str, value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise _wrong(key, value, "a path")
    return Path(value).expanduser()


def _words(key: str, value: object) -> tuple[str, ...]:
    """The words of a command, as a list or as a shell would read them."""
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise _wrong(key, value, f"words as a shell reads them ({error})") from error
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise _wrong(key, value, "words, such as 'python train.py --config=configs/digits_mlp.py'")
    return tuple(words)


def _names(key: str, value: object) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise _wrong(key, value, "names with commas between, or a list of names")
    return tuple(names)


def _zones(key: str, value: object) -> tuple[str, ...]:
    zones = _names(key, value)
    for zone in zones:
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z][a-z0-9]*", zone):
            raise _wrong(
                key, zone, "a zone, such as 'us-west4-a' (a region and a letter), or several with commas between"
            )
    return tuple(dict.fromkeys(zones))


def _capacity(key: str, value: object) -> Capacity:
    found = next((one for one in CAPACITIES if isinstance(value, str) and re.sub("[-_]", " ", value) == one), None)
    if found is None:
        raise UserError(f"--{key}={value!r} is no kind of capacity. {suggest(str(value), CAPACITIES)}")
    return found


def _labels(key: str, value: object) -> tuple[str, ...]:
    pairs = tuple(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else _names(key, value)
    for pair in pairs:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}", pair):
            raise _wrong(key, pair, "KEY=VALUE of small letters, digits, '-' and '_'")
    return pairs


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the file and its flag. `read` checks and converts; `field` of Settings, where it has another name."""

    read: Callable[[str, object], Any]
    said: str
    field: str = ""

    @property
    def switch(self) -> bool:
        """Whether its flag has no value."""
        return self.read is _switch


_WORD = r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*"
_BUCKET = _matching(
    r"gs://[a-z0-9]([a-z0-9._-]*[a-z0-9])?(/[^\s/]+)*/?|/\S*", "'gs://NAME', or a folder from / on that all workers see"
)
KEYS: Mapping[str, Key] = {
    # Google's own limit of a TPU's name is 63 letters; slices add a number.
    "name": Key(
        _matching(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", "a small letter, then at most 49 small letters, digits or '-'"),
        "of the run, of the machine, and of its folder in the bucket",
    ),
    "project": Key(
        _matching(r"[a-z]([-a-z0-9:.]*[a-z0-9])?", "the id of a project, such as 'my-project-123'"),
        "the Google Cloud project that pays; `gcloud projects list` names yours",
    ),
    "zone": Key(_zones, "where, such as us-west4-a; several with commas between are tried in turn", "zones"),
    "type": Key(
        _matching(_WORD, "an accelerator type, such as 'v5litepod-16'"), "accelerator type, such as v5litepod-16"
    ),
    "runtime_version": Key(
        _matching(_WORD, "such as 'v2-alpha-tpuv5-lite'"), "of the image (default: that of the type)"
    ),
    "capacity": Key(_capacity, "spot, reserved or 'on demand' (default: spot)"),
    "slices": Key(_count, "how many slices of the type (default: 1)"),
    "bucket": Key(_BUCKET, "gs://NAME, where the run saves, or a folder that all workers see"),
    "max_hours": Key(number, "of machines: after that the run is saved and the machine deleted"),
    "max_cost": Key(number, "USD of machines, likewise"),
    "idle_minutes": Key(number, "without training, after which the machine is deleted (default: 30)"),
    "queue_hours": Key(number, "after which a request that still waits lapses (default: 12)"),
    "zone_patience": Key(number, "minutes to wait in a zone, where there are several (default: 30)"),
    "command": Key(_words, "of the training; or everything after --"),
    "install": Key(_words, "what pip installs on the workers (default: -e '.[tpu,gcs,logging,text]')"),
    "prices": Key(_path, "TOML file over flaxmodels/perf/prices.toml"),
    "state": Key(_path, "folder for what is known of runs (default: runs/tpu)"),
    "network": Key(_matching(_WORD, "the name of a network"), "of the machine (default: the project's)"),
    "subnetwork": Key(_matching(_WORD, "the name of a subnetwork"), "of the machine"),
    "service_account": Key(
        _matching(_WORD, "an account's address"), "that the machine acts as (default: the project's)"
    ),
    "labels": Key(_labels, "KEY=VALUE,... of the machine, for the bill"),
    "tags": Key(_names, "of the machine, for the firewall"),
    "internal_ips": Key(_switch, "no address outside the network"),
    "ssh_flags": Key(_words, "words for every ssh and scp, such as --internal-ip"),
}
