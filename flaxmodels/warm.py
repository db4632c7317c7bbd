"""A new run that starts from parts of another one's checkpoint, or of a directory of Hugging Face; all of it by name.

Read `choose`, which says what comes from where before any array is read; `begin` reads and puts it together.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels import fitting, hub, lora, registry, shelf, storage, stored
from flaxmodels.fitting import Leaf
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.runtime import peers
from flaxmodels.state import BASE

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
      workdir: of another run, or a directory of Hugging Face, whose arrays have the paths that they would have here
        (see `hub`); None starts from newly initialised parameters.
      step: "best", "latest", or a number; a directory of Hugging Face has none.
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

    A parameter that does not train, "extra/base/NAME", is "params/NAME" here, as it is in other runs. Factors of `lora`
    that are not in the store are new.

    Args:
      origin: the section `start`.
      saved: path -> leaf of what is stored.
      wanted: path -> leaf of the new state.
      what: the store, for messages.

    Raises:
      UserError: a selected path is neither in the store nor `fresh`, or does not fit: the message lists all; or a regex
        selects nothing; or the store has factors that this state has not.
    """
    inside = {outside(path): path for path in wanted}
    wanted = {name: wanted[path] for name, path in inside.items()}
    factors = [path for path in saved if path.startswith(fitting.PARAMS) and lora.is_factor(path)]
    if lost := [path for path in factors if path not in wanted]:
        raise UserError(
            f"{what} was trained with lora, and this run has no such factors ({lost[0]}): start from its parameters "
            "with their factors in them, which `flaxmodels merge` writes."
        )
    only, fresh = re.compile(origin.only), fitting.compiled(origin.fresh, "start.fresh")
    given = {path: leaf for path, leaf in wanted.items() if path in saved or not lora.is_factor(path)}
    selected = {path: leaf for path, leaf in given.items() if only.search(path) and path != "step"}
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
    if factors and any(path not in found and not lora.is_factor(path) for path in covered):
        raise UserError(
            f"{what} holds factors of lora apart from the parameters that they change, which this run needs: start "
            "from these with the factors in them, which `flaxmodels merge` writes."
        )
    if lines:
        raise UserError(fitting.refusal(f"this run can't start from {what}", lines, FIX))
    sources = {inside[path]: names[path] for path in covered}
    used = set(sources.values())
    used |= {path for path, average in averages.items() if average in used} | {"step"}
    unused = tuple(path for path in saved if path not in used)
    return Choice(sources, tuple(inside[path] for path in selected if path not in covered), unused, bool(averages))


def outside(path: str) -> str:
    """The path that a parameter of this state has in runs that train it."""
    return path.replace(f"extra/{BASE}/", fitting.PARAMS, 1)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A new state that was started from another run.

    Attributes:
      state: on the mesh of its abstract tree; its step is 0.
      notes: lines for the log.
      origin: "WORKDIR:STEP", or a directory of Hugging Face, which it came from.
    """

    state: Any
    notes: tuple[str, ...]
    origin: str


# Where a run may start from.
Store = shelf.Entry | hub.Described


def find(origin: Origin) -> Store:
    """What to start from: a checkpoint, whose files are verified, or a directory; all processes call it.

    Raises:
      UserError: it is not there, or damaged.
    """
    folder = storage.place(origin.workdir or "")
    if hub.is_directory(folder):
        if origin.step != Origin.step:
            raise UserError(
                f"start.step={origin.step!r}: {str(folder)!r} is no workdir, and has no steps. Leave it out."
            )
        described = hub.describe(folder)
        peers.compare({"start": {"arrays": len(described.leaves), "bytes": described.nbytes}})
        return described
    entry = shelf.find(folder, origin.step, "start.workdir")
    peers.compare({"start": {"step": entry.step}})
    found = shelf.problems(entry, peers.me(), peers.count())
    peers.settle(f"start.workdir: {entry} is damaged: {'; '.join(found[:3])}. Choose another start.step." * bool(found))
    return entry


def tree(store: Store, wanted: Iterable[str] = ()) -> dict[str, Leaf]:
    """Path -> leaf of all that there is; no array is read. Of a directory as `hub.laid` has it for the wanted paths."""
    if isinstance(store, hub.Described):
        return {path: place.leaf for path, place in hub.laid(store, wanted).items()}
    return stored.tree(store.folder)


def sharded(store: Store, places: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """Path -> array, whole or in shards as `places` says of each."""
    if isinstance(store, hub.Described):
        return hub.sharded(store, places)
    return stored.sharded(store.folder, places)


def begin(origin: Origin, entry: Store, fresh: Callable[[], Any], abstract: Any, init: Callable[[Any], Any]) -> Begun:
    """A new state, with what the section `start` says read from where it starts.

    Args:
      origin: the section.
      entry: of `find`.
      fresh: () -> a newly initialised train state, born sharded.
      abstract: its `jax.ShapeDtypeStruct` tree, with shardings.
      init: parameters -> a new optimizer state, which may remember them, as an average does.

    Raises:
      UserError: what is asked for is not in the checkpoint, does not fit, or overflows in the dtype of a cast.
    """
    found, notes = read(origin, entry, abstract)
    state = fresh()
    for x in jax.tree.leaves(state.opt_state):
        x.delete()
    state = filled(state.replace(opt_state=None), found)
    # The optimizer starts from these parameters, and not from those that they replaced.
    shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    opt_state = jax.jit(init, out_shardings=shardings)(state.params)
    state = filled(state.replace(opt_state=opt_state), found)
    step = "" if isinstance(entry, hub.Described) else f":{entry.step}"
    return Begun(state, notes, f"{origin.workdir}{step}")


def read(origin: Origin, entry: Store, abstract: Any) -> tuple[dict[str, jax.Array], tuple[str, ...]]:
    """What the section `start` says of a new state, or of a part of it.

    Args:
      origin: the section.
      entry: of `find`.
      abstract: `jax.ShapeDtypeStruct` tree, with shardings; its paths are those of a train state.

    Returns:
      (path -> array as `abstract` has it, lines for the log).

    Raises:
      UserError: what is asked for is not in the checkpoint, does not fit, or overflows in the dtype of a cast.
    """
    places = {path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(abstract)}
    saved = tree(entry, map(outside, places))
    choice = choose(origin, saved, fitting.leaves(abstract), str(entry))
    arrays = sharded(entry, {old: places[new].sharding for new, old in choice.sources.items()})
    found = {new: arrays.pop(old) for new, old in choice.sources.items()}
    changed = [path for path, x in found.items() if x.dtype != places[path].dtype]
    found |= _cast({path: found[path] for path in changed}, places)
    return found, tuple(_notes(choice, entry, changed, origin))


def filled(tree: Any, found: Mapping[str, jax.Array]) -> Any:
    """A tree with some of its leaves replaced; arrays that they replace are deleted."""

    def leaf(keys: tuple[Any, ...], old: Any) -> Any:
        new = found.get(path_of(keys), old)
        if new is not old and isinstance(old, jax.Array):
            old.delete()
        return new

    return jax.tree.map_with_path(leaf, tree)


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


def _notes(choice: Choice, entry: Store, cast: Sequence[str], origin: Origin) -> Iterator[str]:
    kind = ", averaged parameters" if choice.averaged else ", which kept no average" if origin.average else ""
    yield f"start: {len(choice.sources)} arrays from {entry}{kind}: {_brief(list(choice.sources))}"
    if cast:
        yield f"start: cast to other floats: {_brief(cast)}"
    if choice.fresh:
        yield f"start: newly initialised by start.fresh: {_brief(choice.fresh)}"
    if isinstance(entry, hub.Described) and entry.unused:
        yield f"start: tensors that no model here computes with: {_brief(entry.unused)}"
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
