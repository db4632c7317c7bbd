"""What a stored tree of arrays and a wanted one differ in, and the one message that says so before any is read.

Orbax by itself casts on restore without a word (int32 300 into int8 is 44), and its partial restore passes missing,
extra and renamed keys. Here a path that is in both with the same shape and dtype fits, a float where a cast was asked
for by name fits in another float dtype, and everything else is a difference. Paths are those of a train state:
"params/...", "extra/...", "opt_state/...", "step".
"""

import dataclasses
import difflib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels.paths import path_of
from flaxmodels.registry import UserError, suggest

# Differences that a message lists; how many more there are, it says.
LISTED = 20
# How alike two paths must be to be taken for one that was renamed (difflib), and how many pairs are looked at.
ALIKE = 0.6
PAIRS = 2**14
PARAMS = "params/"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of an array before it is read.

    Attributes:
      shape: whole.
      dtype: its name, such as "float32".
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def nbytes(self) -> int:
        """What the array takes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def leaves(tree: Any) -> dict[str, Leaf]:
    """Path -> leaf of each array of a tree: of arrays, `jax.ShapeDtypeStruct`, or what Orbax says of stored ones."""
    found = jax.tree.leaves_with_path(tree)
    return {path_of(keys): Leaf(tuple(x.shape), str(jnp.dtype(x.dtype))) for keys, x in found}


def compiled(patterns: Sequence[str], where: str) -> tuple[re.Pattern[str], ...]:
    """Regexes of paths, which match anywhere in one; "^params/head/" pins its beginning.

    Args:
      patterns: as written in a config.
      where: the key that holds them, for the message.

    Raises:
      UserError: one is no regex.
    """
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression: {error}.") from error
    return tuple(found)


def selects(patterns: Collection[re.Pattern[str]], path: str) -> bool:
    """Whether one of the patterns is found in a path."""
    return any(pattern.search(path) for pattern in patterns)


def can_cast(saved: str, wanted: str) -> bool:
    """Whether a cast from one dtype to another may be asked for: of floats only, which never wrap around."""
    return all(jnp.issubdtype(jnp.dtype(name), jnp.floating) for name in (saved, wanted))


def renames(missing: Mapping[str, Leaf], extra: Mapping[str, Leaf]) -> dict[str, str]:
    """The wanted paths that probably have another name in the store: wanted -> saved.

    Args:
      missing: path -> leaf of what is wanted and not saved.
      extra: path -> leaf of what is saved and not wanted.
    """
    names = {path.removeprefix(PARAMS) for path in (*missing, *extra) if path.startswith(PARAMS)}
    mirrors = {path: name for path in (*missing, *extra) if (name := _mirrored(path, names))}
    free: dict[tuple[str, Leaf], list[str]] = defaultdict(list)
    for path, leaf in extra.items():
        if path not in mirrors:
            free[_kind(path), leaf].append(path)
    found: dict[str, str] = {}
    pairs = 0
    for path, leaf in missing.items():
        others = [] if path in mirrors else free[_kind(path), leaf]
        pairs += len(others)
        if pairs > PAIRS:  # thousands of arrays that all differ: no more names are guessed
            break
        if near := difflib.get_close_matches(path, others, n=1, cutoff=ALIKE):
            found[path] = near[0]
            others.remove(near[0])
    for path, leaf in missing.items():
        name = mirrors.get(path, "")
        old = found.get(PARAMS + name, "").removeprefix(PARAMS)
        before = path.removesuffix(name) + old
        if name and old and extra.get(before) == leaf:
            found[path] = before
    return found


def _kind(path: str) -> str:
    """Parameters, optimizer state or another collection: no array changes from one to the other."""
    return path.partition("/")[0]


def _mirrored(path: str, names: Collection[str]) -> str:
    """The parameter whose moment or average this is, one of `names`; "" where it is none. It is renamed as that is."""
    parts = path.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(2, len(parts)))
    return next((name for name in suffixes if name in names), "")


def differences(
    saved: Mapping[str, Leaf],
    wanted: Mapping[str, Leaf],
    cast: Sequence[str] = (),
    *,
    where: str = "checkpoint.cast",
    whole: bool = True,
) -> list[str]:
    """What a stored tree and a wanted one differ in, a line each; [] where the one can be restored into the other.

    Args:
      saved: path -> leaf of what is stored.
      wanted: path -> leaf of what it shall become.
      cast: regexes of the paths of floats that may be restored in another float dtype.
      where: the key that holds `cast`, for the messages.
      whole: what is saved and not wanted is a difference, too.

    Raises:
      UserError: a regex of `cast` is none, or names no wanted path.
    """
    asked = compiled(cast, where)
    for pattern in asked:
        if not any(pattern.search(path) for path in wanted):
            raise UserError(f"{where}: {pattern.pattern!r} matches no path. {suggest(pattern.pattern, wanted)}")
    missing = {path: leaf for path, leaf in wanted.items() if path not in saved}
    extra = {path: leaf for path, leaf in saved.items() if path not in wanted}
    renamed = renames(missing, extra)
    lines = [f"{old} was probably renamed to {new}, both {wanted[new]}" for new, old in renamed.items()]
    lines += [f"{path} is missing: wanted {leaf}" for path, leaf in missing.items() if path not in renamed]
    old_names = set(renamed.values())
    if whole:
        lines += [f"{path} is not wanted: saved {leaf}" for path, leaf in extra.items() if path not in old_names]
    for path, leaf in wanted.items():
        if path in saved and saved[path] != leaf:
            lines += _changed(path, saved[path], leaf, selects(asked, path), where)
    return lines


def _changed(path: str, saved: Leaf, wanted: Leaf, asked: bool, where: str) -> list[str]:
    """How a leaf that is in both trees differs, in at most one line."""
    line = f"{path} was {saved}, is {wanted}"
    if saved.shape != wanted.shape:
        return [line]
    if not can_cast(saved.dtype, wanted.dtype):
        return [f"{line}; {where} casts floats only"]
    return [] if asked else [f"{line}; {where} does not name it"]


def refusal(what: str, lines: Sequence[str], fix: str) -> str:
    """The one message on all differences: the first `LISTED`, how many more, and the fix.

    Args:
      what: can't be done, such as "checkpoint 3 in 'runs/a' can't be restored into this model and optimizer".
      lines: of `differences`, at least one.
      fix: what to do.
    """
    count = "one difference" if len(lines) == 1 else f"{len(lines)} differences"
    shown = [f"  {line}" for line in lines[:LISTED]]
    more = [f"  and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([f"{what}: {count}", *shown, *more, fix])


def fix(lines: Sequence[str]) -> str:
    """What to do about differences between a run's own checkpoint and the model and optimizer of its config."""
    parts = ["Go back to the config that it was trained with, or choose another --workdir"]
    if any(line.endswith("does not name it") for line in lines):
        parts.append("cast floats by name with checkpoint.cast=(REGEX, ...)")
    if any("probably renamed" in line or "is missing" in line or "is not wanted" in line for line in lines):
        parts.append("start a new workdir from parts of it with start.workdir, start.rename and start.fresh")
    return "; or ".join(parts) + "."
