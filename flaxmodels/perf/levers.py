"""What of a config may be changed so that a step needs less memory, or runs faster.

Read `look`, which looks at a config on one device, without compiling; then `layouts`, the meshes that it could have,
and `savers`, the other keys. What is estimated here only decides what is compiled first.
"""

import contextlib
import dataclasses
import inspect
import itertools
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from flaxmodels import job, meshes, optim, registry, sections, sharding
from flaxmodels.durations import parse
from flaxmodels.memory import on_a_device
from flaxmodels.paths import path_of
from flaxmodels.perf import chips
from flaxmodels.perf.cells import Target, changed
from flaxmodels.registry import UserError
from flaxmodels.state import TrainState

# Values of `model.remat`, from that which keeps most; the last two are of a user's own module.
REMAT = ("none", "dots", "nothing", False, True)
CHUNKS = (1, 8, 16, 32, 64)
LATENCY = 5e-6  # seconds until the first byte of a collective arrives, roughly
LEAST_CHUNK = 256  # tokens of a part below which matrix units idle: see `losses.softmax_cross_entropy`


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh that a config could have, and what is known of it before anything is compiled.

    Attributes:
      axes: name -> devices, of all four.
      state: bytes of the train state on one device.
      sent: seconds that a device spends sending in a step, if nothing overlaps; a rough estimate, see `_seconds`.
    """

    axes: dict[str, int]
    state: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Lever:
    """One thing of a config that may be changed.

    Attributes:
      name: a key, or "mesh".
      part: the field of `cells.Cell`, or of its memory, that becomes smaller; "state" is all of the train state.
      steps: changes by dotted key, from the smallest to the largest.
    """

    name: str
    part: str
    steps: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Look:
    """What the changes of a config depend on.

    Attributes:
      values: every key of the config, set or not, such as "train.microbatches".
      given: the keys of `mesh` that the config sets.
      abstract: the train state, as shapes.
      rules: of sharding, the config's own.
      batch_sizes: what data x fsdp has to divide, by name.
      tokens: of an example; 1 where examples are not sequences.
      marked: axes of a mesh over which the model says that activations are split.
      resident: whether the data set lives on a device that is not the host itself.
      remats: values that `model.remat` may have, of `REMAT`; none where there is no such field.
      split_head: whether `loss.chunks` may be more than 1.
      moments: whether the optimizer keeps a first moment, of a dtype to choose.
    """

    values: dict[str, Any]
    given: tuple[str, ...]
    abstract: TrainState
    rules: sharding.Rules
    batch_sizes: dict[str, int]
    tokens: int
    marked: tuple[str, ...]
    resident: bool
    remats: tuple[Any, ...]
    split_head: bool
    moments: bool

    def chunks(self, axes: Mapping[str, int], batch_size: int) -> list[int]:
        """What `loss.chunks` may be on a mesh."""
        tokens = batch_size * self.tokens // math.prod(axes[axis] for axis in ("data", "fsdp", "sequence"))
        return [n for n in CHUNKS if n == 1 or n <= tokens // LEAST_CHUNK] if self.split_head else []


def look(config: Mapping[str, Any], target: Target) -> Look:
    """Assemble a config for one device of a target, whatever mesh it asks for.

    Raises:
      UserError: the config can't be, on any mesh.
    """
    values = {key: value for key, value, _ in sections.resolved(config)}
    given = sections.check(config, lambda text, where: parse(text, where) and text)["mesh"]
    one = job.assemble(changed(config, {"mesh": {"platform": given.get("platform")}}), target.devices[:1])
    fields = registry.parameters([type(one.model)])
    marked: tuple[str, ...] = ()
    if len(target.devices) > 1 and any(x.ndim == 2 for x in jax.tree.leaves(one.train.example()["inputs"])):
        text = one.lower_eval()[0].as_text()
        lines = "".join(line for line in text.splitlines() if "sharding_constraint" in line)
        marked = tuple(axis for axis in sharding.AXES if f'"{axis}"' in lines)
    sizes = {"data.batch_size": one.train.batch_size, "data.eval_batch_size": one.test.batch_size}
    micro = {"data.batch_size / train.microbatches": one.train.batch_size // one.cadence.microbatches}
    return Look(
        values=values, given=tuple(given), abstract=one.abstract, rules=sections.rules(**one.config["sharding"]),
        batch_sizes=sizes | micro, tokens=one.source.tokens_per_example, marked=marked,
        resident=one.train.resident and target.chip.name != chips.CPU,
        remats=_remats(fields.get("remat")),
        split_head="split_head" in fields,
        moments="moments" in registry.parameters(optim.targets(values["optim.name"], values["optim.schedule"])[:1]),
    )  # fmt: skip


def _remats(field: inspect.Parameter | None) -> tuple[Any, ...]:
    """Values that a field of a model may have; none where nobody can tell."""
    annotation = field and field.annotation
    told = annotation is bool or typing.get_origin(annotation) is Literal
    return tuple(value for value in REMAT if told and registry.accepts(value, annotation))


def savers(seen: Look, axes: Mapping[str, int]) -> list[Lever]:
    """What makes a step need less memory on a mesh, in the order of how little it changes the results of a run.

    The first four change none beyond rounding, but for the order in which microbatches draw random numbers, and for
    BatchNorm's statistics, which are then those of a microbatch. The mesh is not among them: see `layouts`.
    """
    own, parts = seen.values, axes["data"] * axes["fsdp"]
    size, micro = own["data.batch_size"], own["train.microbatches"]
    remat = own.get("model.remat")
    kept = seen.remats.index(remat) + 1 if remat in seen.remats else 1
    found: dict[tuple[str, str], Iterable[Any]] = {
        ("data.placement", "data"): ["host"] * seen.resident,
        ("train.steps_per_dispatch", "batch"): [1] * (own["train.steps_per_dispatch"] > 1),
        ("model.remat", "activations"): seen.remats[kept:],
        ("loss.chunks", "activations"): (n for n in seen.chunks(axes, size) if n > own["loss.chunks"]),
        ("train.microbatches", "activations"): (
            n for n in _divisors(size) if n > micro and n % micro == 0 and size // n % parts == 0
        ),
        ("optim.moments", "optimizer"): ["bfloat16"] * (seen.moments and own["optim.moments"] == "float32"),
        ("data.batch_size", "activations"): (
            size // n for n in _divisors(size) if n > 1 and size // n % (parts * micro) == 0
        ),
    }
    levers = [Lever(name, part, tuple({name: value} for value in values)) for (name, part), values in found.items()]
    return [lever for lever in levers if lever.steps]


def layouts(seen: Look, target: Target) -> list[Layout]:
    """The meshes on which `sharding` lets a config lie, those first that would send least.

    `data` x `fsdp` divides every batch; `tensor` what the built-in rules split, and is at most `meshes.MOST_TENSOR`;
    `sequence` the length of examples, where the model marks activations along it. Only `data` goes between slices.
    """
    found = []
    for axes in _factors(len(target.devices)):
        if not _splits(seen, axes):
            continue
        with contextlib.suppress(UserError):
            asked: dict[str, Any] = {**axes, "num_slices": seen.values["mesh.num_slices"]}
            mesh = sharding.make_mesh(**asked, devices=target.devices)
            for where, size in seen.batch_sizes.items():
                sharding.check_batch(mesh, size, where)
            found.append(_layout(seen, axes, mesh, target))
    return sorted(found, key=lambda layout: (layout.sent, layout.state))


def of_layout(seen: Look, axes: Mapping[str, int]) -> dict[str, int]:
    """The changes that give a config the mesh of a layout: as few keys as will do."""
    changes = {}
    for axis in ("fsdp", "tensor", "sequence"):
        if axes[axis] != (seen.values[f"mesh.{axis}"] or 1):
            changes[f"mesh.{axis}"] = axes[axis]
    if "data" in seen.given and axes["data"] != seen.values["mesh.data"]:
        changes["mesh.data"] = axes["data"]
    if not changes and not set(seen.given) & set(sharding.AXES):  # any axis keeps "auto" from choosing another mesh
        changes["mesh.data"] = axes["data"]
    return changes


def _factors(count: int) -> Iterator[dict[str, int]]:
    for fsdp, sequence, tensor in itertools.product(_divisors(count), repeat=3):
        if count % (inner := fsdp * sequence * tensor) == 0:
            yield {"data": count // inner, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}


def _splits(seen: Look, axes: Mapping[str, int]) -> bool:
    tensor, sequence = axes["tensor"], axes["sequence"]
    sizes = sharding.tensor_sizes(seen.abstract.params) if tensor > 1 else ()
    whole = tensor == 1 or (sizes and tensor <= meshes.MOST_TENSOR and not any(size % tensor for size in sizes))
    long = sequence == 1 or ("sequence" in seen.marked and seen.tokens % sequence == 0)
    return bool(whole and long)


def _layout(seen: Look, axes: dict[str, int], mesh: Mesh, target: Target) -> Layout:
    places = sharding.shard_tree(seen.abstract, mesh, seen.rules, seen.abstract.params)
    placed = jax.tree.map(_placed, seen.abstract, places)
    slices = len(meshes.slices(target.devices, seen.values["mesh.num_slices"]))
    return Layout(axes, on_a_device(placed), _seconds(seen, axes, placed.params, slices, target))


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _seconds(seen: Look, axes: Mapping[str, int], params: Any, slices: int, target: Target) -> float:
    """Seconds of sending, as if one thing came after the other, by the formulas of a ring, and `LATENCY` for each.

    `data` adds gradients up; `fsdp` and `sequence` gather parameters twice and scatter gradients; `tensor` adds an
    activation up for each matrix that it splits, and `sequence` gathers as many. A layer axis counts as it is long.
    """
    held, arrays = on_a_device(params), len(jax.tree.leaves(params))
    within, shards, tensor = axes["data"] // slices, axes["fsdp"] * axes["sequence"], axes["tensor"]
    gathered = held * (shards - 1)  # what a device does not have itself
    width, matrices = _width(seen)
    across = tensor * axes["sequence"]
    rows = seen.batch_sizes["data.batch_size"] * seen.tokens * tensor / math.prod(axes.values())
    near = 2 * held * _share(within) + 3 * gathered + 2 * _share(across) * rows * width * 4
    far = 2 * held * _share(slices)
    times = (within * slices > 1) + 3 * arrays * (shards > 1) + 2 * matrices * (across > 1)
    return times * LATENCY + near / target.chip.link + (far / target.chip.slow_link if far else 0.0)


def _share(count: int) -> float:
    return (count - 1) / count


def _width(seen: Look) -> tuple[int, int]:
    """Of all matrices that `tensor` would split: numbers of a token that pass between devices; how many matrices."""
    width = matrices = 0
    for keys, x in jax.tree.leaves_with_path(seen.abstract.params):
        path = path_of(keys)
        spec = next((spec for pattern, spec in sharding.RULES if re.search(f"(?:{pattern})$", path)), ())
        if spec and len(spec) <= len(x.shape) and not re.search(sharding.VOCABULARY, path):
            layers = math.prod(x.shape[: len(x.shape) - len(spec)])
            whole = [size for size, axis in zip(x.shape[len(x.shape) - len(spec) :], spec) if axis is None]
            width, matrices = width + layers * max(whole, default=1), matrices + layers
    return width, matrices


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
