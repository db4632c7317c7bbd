"""A new run that starts from parts of another one's checkpoint: all of it by name, and nothing in silence.

Read `choose`, which says what comes from where before any array is read; `begin` reads and puts it together.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels import fitting, registry, shelf, stored
from flaxmodels.fitting import Leaf
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.runtime import peers

AVERAGE = "/parameters_average/"
FIX = (
    "Narrow start.only; name what is new in start.fresh, what has another name in start.rename=((REGEX, REPLACEMENT), "
    "...), and floats of another dtype in start.cast=(REGEX, ...)."
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a new run starts from; the section `start` of a config.

    It is used where the workdir has no checkpoint of its own. Paths are those of a train state, such as
    "params/blocks/mlp/up/kernel" or "extra/batch_stats/norm/mean". A regex matches anywhere in one.

    Attributes:
      workdir: of another run; None starts from newly initialised parameters.
      step: "best", "latest", or a number.
      only: regex of what of this run's state comes from there; all else is newly initialised. The step never does: a
        new run begins at 0.
      rename: (regex, replacement) rules, applied in their order to the paths that are stored there.
      fresh: regexes of what `only` selects and is newly initialised all the same.
      cast: regexes of the floats that may come in another float dtype.
      average: take the averaged parameters, where that run kept some.

    Raises:
      UserError: a regex is none, or other keys are set without `workdir`.
    """

    workdir: str | None = None
    step: int | str = "best"
    only: str = "^params/"
    rename: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    average: bool = False

    def __post_init__(self) -> None:
        fitting.compiled((self.only,), "start.only")
        fitting.compiled(self.fresh, "start.fresh")
        fitting.compiled(self.cast, "start.cast")
        for pattern, (_, replacement) in zip(
            fitting.compiled([p for p, _ in self.rename], "start.rename"), self.rename
        ):
            _replaced(pattern, replacement, "")
        asked = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if asked and self.workdir is None:
            raise UserError(f"start.{asked[0]} is set, but start.workdir is not: name the run to start from.")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What of a new state comes from where.

    Attributes:
      sources: path of the new state -> path in the store.
      fresh: paths of the new state that are selected, and newly initialised by name.
      unused: paths in the store that go nowhere.
      averaged: whether the parameters are those of the average.
    """

    sources: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    averaged: bool = False


def choose(origin: Origin, saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], what: str = "the store") -> Choice:
    """Say what comes from where.

    Args:
      origin: the section `start`.
      saved: path -> leaf of what is stored.
      wanted: path -> leaf of the new state.
      what: the store, for messages.

    Raises:
      UserError: a selected path is neither in the store nor `fresh`, or does not fit: the message lists all; or a regex
        selects nothing.
    """
    only, fresh = re.compile(origin.only), fitting.compiled(origin.fresh, "start.fresh")
    selected = {path: leaf for path, leaf in wanted.items() if only.search(path) and path != "step"}
    if not selected:
        raise UserError(f"start.only={origin.only!r} matches nothing of this model. {registry.suggest('', wanted)}")
    for pattern in fresh:
        if not any(map(pattern.search, selected)):
            hint = registry.suggest(pattern.pattern, selected)
            raise UserError(f"start.fresh: {pattern.pattern!r} matches nothing that start.only selects. {hint}")
    averages = _averages(saved) if origin.average else {}
    of_parameters = set(averages.values())
    covered = {path: leaf for path, leaf in selected.items() if not fitting.selects(fresh, path)}
    names: dict[str, str] = {}
    for new, old in _names(origin, [path for path in saved if path not in of_parameters], what):
        if new in names and new in covered:
            raise UserError(f"start.rename makes {new!r} of both {names[new]!r} and {old!r} of {what}.")
        names[new] = averages.get(old, old)
    found = {new: saved[old] for new, old in names.items()}
    lines = fitting.differences(found, covered, origin.cast, where="start.cast", whole=False)
    if lines:
        raise UserError(fitting.refusal(f"this run can't start from {what}", lines, FIX))
    sources = {path: names[path] for path in covered}
    used = set(sources.values())
    used |= {path for path, average in averages.items() if average in used} | {"step"}
    unused = tuple(path for path in saved if path not in used)
    return Choice(sources, tuple(path for path in selected if path not in covered), unused, bool(averages))


@dataclasses.dataclass(frozen=True)
class Begun:
    """A new state that was started from another run.

    Attributes:
      state: on the mesh of its abstract tree; its step is 0.
      notes: lines for the log.
      origin: "WORKDIR:STEP", which it came from.
    """

    state: Any
    notes: tuple[str, ...]
    origin: str


def find(origin: Origin) -> shelf.Entry:
    """The checkpoint to start from, whose files are verified; all processes call it.

    Raises:
      UserError: it is not there, or damaged.
    """
    entry = shelf.find(Path(origin.workdir or ""), origin.step, "start.workdir")
    peers.compare({"start": {"step": entry.step}})
    found = shelf.problems(entry, peers.me(), peers.count())
    peers.settle(f"start.workdir: {entry} is damaged: {'; '.join(found[:3])}. Choose another start.step." * bool(found))
    return entry


def begin(
    origin: Origin, entry: shelf.Entry, fresh: Callable[[], Any], abstract: Any, init: Callable[[Any], Any]
) -> Begun:
    """A new state, with what the section `start` says read from a checkpoint.

    Args:
      origin: the section.
      entry: of `find`.
      fresh: () -> a newly initialised train state, born sharded.
      abstract: its `jax.ShapeDtypeStruct` tree, with shardings.
      init: parameters -> a new optimizer state, which may remember them, as an average does.

    Raises:
      UserError: what is asked for is not in the checkpoint, does not fit, or overflows in the dtype of a cast.
    """
    saved, places = stored.tree(entry.folder), {}
    for keys, leaf in jax.tree.leaves_with_path(abstract):
        places[path_of(keys)] = leaf
    choice = choose(origin, saved, fitting.leaves(abstract), str(entry))
    read = stored.sharded(entry.folder, {old: places[new].sharding for new, old in choice.sources.items()})
    found = {new: read.pop(old) for new, old in choice.sources.items()}
    changed = [path for path, x in found.items() if x.dtype != places[path].dtype]
    found |= _cast({path: found[path] for path in changed}, places)
    state = fresh()
    for x in jax.tree.leaves(state.opt_state):
        x.delete()
    state = _with(state.replace(opt_state=None), found)
    # The optimizer starts from these parameters, and not from those that they replaced.
    shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    opt_state = jax.jit(init, out_shardings=shardings)(state.params)
    state = _with(state.replace(opt_state=opt_state), found)
    return Begun(state, tuple(_notes(choice, entry, changed, origin)), f"{origin.workdir}:{entry.step}")


def _with(state: Any, found: Mapping[str, jax.Array]) -> Any:
    """A tree with some of its leaves replaced; what they replace is deleted."""

    def leaf(keys: tuple[Any, ...], old: jax.Array) -> jax.Array:
        new = found.get(path_of(keys), old)
        if new is not old:
            old.delete()
        return new

    return jax.tree.map_with_path(leaf, state)


def _cast(found: dict[str, jax.Array], places: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays in the dtypes of `places`. Raises UserError where a finite value would not stay one."""
    if not found:
        return {}

    def cast(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        new = {path: x.astype(places[path].dtype) for path, x in arrays.items()}
        return new, {path: jnp.sum(jnp.isfinite(x) & ~jnp.isfinite(new[path])) for path, x in arrays.items()}

    new, lost = jax.jit(cast, out_shardings=({path: places[path].sharding for path in found}, None))(found)
    over = [f"{path} ({int(count)} values)" for path, count in lost.items() if int(count)]
    if over:
        listed = ", ".join(over[: fitting.LISTED])
        raise UserError(f"start.cast: too large for {places[over[0].split()[0]].dtype}: {listed}. Do not cast these.")
    return new


def _notes(choice: Choice, entry: shelf.Entry, cast: Sequence[str], origin: Origin) -> Iterator[str]:
    kind = ", averaged parameters" if choice.averaged else ", which kept no average" if origin.average else ""
    yield f"start: {len(choice.sources)} arrays from {entry}{kind}: {_brief(list(choice.sources))}"
    if cast:
        yield f"start: cast to other floats: {_brief(cast)}"
    if choice.fresh:
        yield f"start: newly initialised by start.fresh: {_brief(choice.fresh)}"
    if choice.unused:
        yield f"start: not used of what is stored there: {_brief(choice.unused)}"


def _brief(paths: Sequence[str], most: int = 6) -> str:
    """Paths by name where they are few, else how many begin alike."""
    groups = Counter(path.partition("/")[0] for path in paths)
    for depth in range(2, 1 + max(path.count("/") + 1 for path in paths)):
        longer = Counter("/".join(path.split("/")[:depth]) for path in paths)
        groups = longer if len(longer) <= most else groups
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in groups.items())


def _averages(saved: Mapping[str, Leaf]) -> dict[str, str]:
    """Path of a parameter -> path of its average, where the optimizer kept one."""
    found = ((path.partition(AVERAGE), path) for path in saved if AVERAGE in path)
    return {f"params/{name}": path for (_, _, name), path in found}


def _names(origin: Origin, paths: Sequence[str], what: str) -> list[tuple[str, str]]:
    """(path after all rules, stored path)."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in origin.rename]
    names, used = [], set()
    for path in paths:
        new = path
        for pattern, replacement in rules:
            if pattern.search(new):
                used.add(pattern)
                new = _replaced(pattern, replacement, new)
        names.append((new, path))
    if idle := [pattern.pattern for pattern, _ in rules if pattern not in used]:
        raise UserError(f"start.rename: {idle[0]!r} matches nothing of {what}. {registry.suggest(idle[0], paths)}")
    return names


def _replaced(pattern: re.Pattern[str], replacement: str, path: str) -> str:
    try:
        # Python looks at a replacement only where there is something to replace.
        return pattern.sub(replacement, path) if path else str(re.compile(f"{pattern.pattern}|").sub(replacement, ""))
    except (re.error, IndexError) as error:
        raise UserError(f"start.rename: {replacement!r} does not go with {pattern.pattern!r}: {error}.") from error
