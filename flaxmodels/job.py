"""A job: a config, checked and unpacked into pieces. Here the config stops.

`assemble` calls what `sections` lists; the loop, and whatever measures or proves, starts from a `Job`.
"""

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flaxmodels import (
    data,
    freezing,
    guard,
    hardware,
    lora,
    losses,
    metrics,
    models,
    optim,
    precision,
    registry,
    sections,
    sharding,
    state,
    step,
)
from flaxmodels.data import augment, host_augment
from flaxmodels.data.feed import Feed, choose
from flaxmodels.data.order import ORDER_VERSION
from flaxmodels.data.split import Source
from flaxmodels.durations import Clock, parse
from flaxmodels.filling import fill
from flaxmodels.guard import Guard
from flaxmodels.lora import Lora
from flaxmodels.precision import Policy
from flaxmodels.registry import UserError
from flaxmodels.sections import Cadence
from flaxmodels.state import TrainState
from flaxmodels.step import Gradient, Step
from flaxmodels.warm import Origin


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a config says, as objects.

    Attributes:
      config: checked, with durations as written.
      source: the data.
      model: a Linen module.
      policy: the precision.
      tx: the optimizer.
      schedule: step -> learning rate.
      losses: (to train with, to evaluate with).
      mesh: over which all of it lies.
      train: the feed of the training split.
      test: the feed of the evaluation split.
      augment: (batch, index, step) -> batch, of training.
      cadence: when things happen; its duration is the number of steps of the run.
      guard: what a bad step is, and what is done about it.
      checkpoint: options of `Checkpoints`.
      origin: what a workdir without a checkpoint starts from.
      fresh: () -> a new state, born sharded.
      abstract: its `jax.ShapeDtypeStruct` tree, with shardings.
      notes: lines for the log, on what was chosen.
    """

    config: dict[str, Any]
    source: Source
    model: nn.Module
    policy: Policy
    tx: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]
    losses: tuple[losses.Loss, losses.Loss]
    mesh: Mesh
    train: Feed
    test: Feed
    augment: Callable[..., Any]
    cadence: Cadence
    guard: Guard
    checkpoint: dict[str, Any]
    origin: Origin
    fresh: Callable[[], TrainState]
    abstract: TrainState
    notes: tuple[str, ...]

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self.config["seed"]

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.cadence.duration

    @property
    def identity(self) -> dict[str, Any]:
        """All that the batches of a run follow from, by name, ready for JSON."""
        options, source = self.config["data"], self.source
        return {
            "source": source.name,
            "options": registry.storable(_own_options(sections.split_data(options)[1])),
            "content": source.fingerprint,
            "examples": source.train.size,
            "test examples": source.test.size,
            "transforms": registry.storable(source.transforms),
            "tokenizer": source.tokenizer and source.tokenizer.fingerprint,
            "labels": list(source.labels),
            "augment": registry.storable(options.get("augment", ())),
            "host_augment": registry.storable(options.get("host_augment", ())),
            "global batch": self.train.batch_size,
            "seed": self.seed,
            "order version": ORDER_VERSION,
        }

    @property
    def gradient(self) -> Gradient:
        """Of a batch, in as many parts as the config says, of the parameters that it does not freeze."""

        def make(apply: step.Apply) -> Gradient:
            return step.accumulated(step.make_gradient(apply, self.losses[0]), self.cadence.microbatches)

        apply, rules = step.make_apply(self.model, self.policy), self.config["optim"].get("rules", ())
        return freezing.freezing(make, apply, optim.frozen(rules)) if rules else make(apply)

    def update(self, around: Callable[[Gradient], Gradient] = lambda gradient: gradient) -> tuple[Step, list[str]]:
        """The program of `lower_train` with `around` its gradient; and, once it is traced, the names of its metrics."""
        gradient = around(self.gradient)
        bare = partial(step.train_step, gradient=gradient, tx=self.tx, schedule=self.schedule, seed=self.seed)
        update = guard.guarded(bare, self.guard)
        names: list[str] = []

        def packed(state: TrainState, item: tuple[Any, Any]) -> tuple[TrainState, jax.Array]:
            state, found = update(state, self.augment(self.train.batch(*item), item[0]["index"], state.step))
            names[:] = sorted(found)
            return state, metrics.pack(found)

        return step.repeated(packed, self.cadence.steps_per_dispatch), names

    def lower_train(self) -> tuple[jax.stages.Lowered, list[str]]:
        """The train step, lowered, donating its state; and the names of the packed metrics it returns.

        The program is (state, feed of `step.repeated`) -> (state, (steps of a dispatch, names, 2) float32).

        Raises:
          UserError: the compiler would get its gradients wrong on this mesh.
        """
        program, names = self.update()
        feed = self.train.abstract_dispatch(self.cadence.steps_per_dispatch)
        places = (jax.tree.map(lambda x: x.sharding, self.abstract), sharding.replicated(self.mesh))
        with bad_fit():
            lowered = step.compile_step(program, self.abstract, feed, mesh=self.mesh, out_shardings=places, donate=(0,))
        sharding.check_program(self.mesh, lowered)
        return lowered, names

    def lower_eval(self) -> tuple[jax.stages.Lowered, list[str]]:
        """The evaluation step, lowered: (params, extra, each, every) -> packed metrics; and their names."""
        apply, names = step.make_apply(self.model, self.policy), list[str]()

        def packed(params: Any, extra: Any, each: Any, every: Any) -> jax.Array:
            found = step.eval_step(params, extra, self.test.batch(each, every), apply=apply, loss=self.losses[1])
            names[:] = sorted(found)
            return metrics.pack(found)

        each, every = self.test.abstract()
        with bad_fit():
            lowered = step.compile_step(
                packed, self.abstract.params, self.abstract.extra, each, every,
                mesh=self.mesh, out_shardings=sharding.replicated(self.mesh),
            )  # fmt: skip
        return lowered, names

    def lower_norm(self) -> jax.stages.Lowered:
        """Norm of the parameters, lowered. Not in the step: a pass over all parameters costs a small model a tenth."""
        return step.compile_step(metrics.norm, self.abstract.params, mesh=self.mesh)


def assemble(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Job:
    """Unpack a config.

    Args:
      config: section -> options, and "seed".
      devices: to use; None uses all that there are.

    Raises:
      UserError: bad input of any kind, found before anything is computed.
    """
    written = sections.check(config, lambda text, where: parse(text, where) and text)
    devices = sharding.find_devices(written["mesh"].get("platform")) if devices is None else devices
    if asked := _asked(written):  # before the data are read: what is wrong with the axes is said at once
        _check_batches(sharding.make_mesh(**written["mesh"], devices=devices), written)
    policy = precision.policy(**written["precision"], platform=devices[0].platform)
    batching, options = sections.split_data(written["data"])
    source = data.load(**options)
    clock = Clock(batching["batch_size"], source.train.size, source.tokens_per_example)
    checked = sections.check(written, dataclasses.replace(clock, total_steps=_total(written, clock)).steps)
    _check_targets(source, checked["loss"])
    cadence, guarding, origin = Cadence(**checked["train"]), Guard(**checked["guard"]), Origin(**checked["start"])
    options = fill(
        checked["model"], source, precision=written["precision"], compute=policy.compute,
        chunks=checked["loss"].get("chunks", 1),
    )  # fmt: skip
    bare = models.build(**options)
    model = lora.adapted(bare, Lora(**checked["lora"]), policy.compute)
    policy = dataclasses.replace(policy, compute=options.get("dtype", policy.compute))
    tx, schedule = optim.make(**checked["optim"], total_steps=cadence.duration)
    axes, why = ({}, "") if asked else _automatic(model, tx, source, written, policy, devices)
    mesh = sharding.make_mesh(**written["mesh"] | axes, devices=devices)
    _check_batches(mesh, written)
    source, train, test, placed = _feeds(source, mesh, batching)
    augmented = augment.make(batching["augment"], seed=written["seed"], facts=source.facts, draw=source.draw)
    index = jax.ShapeDtypeStruct((train.batch_size,), "int32")
    jax.eval_shape(augmented, train.example(), index, jax.ShapeDtypeStruct((), "int32"))  # does it fit the data?
    rules = sections.rules(**checked["sharding"])
    with bad_fit():
        fresh, abstract = state.init(
            model, guard.init_of(tx, guarding), train.example()["inputs"], written["seed"], mesh, rules,
            param_dtype=policy.param,
        )  # fmt: skip
    if not jax.tree.leaves(abstract.params):
        raise UserError(f"model.name={written['model']['name']!r} has no parameters: there is nothing to train.")
    every = state.parameters(abstract.params, abstract.extra)
    whole = sharding.replicated_report(every, rules=rules)
    whole += sharding.padding_report(every, rules=rules, fields=registry.parameters([type(bare)]))
    cut = [part["texts cut"] for part in _transforms(source) if "texts cut" in part]
    lost = (f"texts longer than data.length, which lose their ends: {', '.join(cut)}",) if cut else ()
    return Job(
        config=written, source=source, model=model, policy=policy, tx=tx, schedule=schedule, mesh=mesh, train=train,
        test=test,
        augment=augmented,
        losses=losses.make(**checked["loss"], **_token_bytes(checked["loss"], source)), cadence=cadence,
        guard=guarding, checkpoint=checked["checkpoint"], origin=origin, fresh=fresh, abstract=abstract,
        notes=(
            f"mesh: {sharding.describe(mesh, written['mesh'].get('num_slices'))}{why}",
            *_chosen(policy, model, mesh, train.example()["inputs"]), placed, *lost, *whole,
            *lora.report(abstract.params, abstract.extra),
        ),
    )  # fmt: skip


# Modules that raise a ValueError on purpose, and the section of a config that it is about.
OURS = {
    "flaxmodels.models": "model", "flaxmodels.attention": "model",
    "flaxmodels.ring": "model", "flaxmodels.losses": "loss", "flaxmodels.chunked": "loss",
}  # fmt: skip


@contextlib.contextmanager
def bad_fit() -> Iterator[None]:
    """Where a model or a loss of ours meets the data: a ValueError that it raises on purpose is bad input.

    What a user's own module raises, or JAX and Flax beneath ours, passes through.
    """
    try:
        yield
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        where = ".".join(frame.f_globals.get("__name__", "").split(".")[:2])
        section = OURS.get(where)
        if isinstance(error, UserError) or section is None:
            raise
        raise UserError(f"{section}: {error}\nCheck that {section}.name and its options fit data.name.") from error


def _own_options(options: Mapping[str, Any]) -> Any:
    """Options of sources that are not ours: we can't know which of them decide what the data are."""
    if options["name"] in data.SOURCES:
        return [_own_options(part) for part in options.get("sources", ())]
    return options


def _feeds(source: Source, mesh: Mesh, batching: Mapping[str, Any]) -> tuple[Source, Feed, Feed, str]:
    """The source, read into memory where that is its place; the feeds of its splits; and a line for the log."""
    loading, functions = batching["loading"], host_augment.make(batching["host_augment"])
    asked = {"data.host_augment": functions, f"data.workers={loading.workers}": loading.workers}
    on_host = next((name for name, value in asked.items() if value), "")
    placed, why = choose(batching["placement"], source, mesh, on_host=on_host)
    if placed == "host" and loading.workers and not functions:
        raise UserError(
            f"data.workers={loading.workers} would have nothing to do: the data are in memory, where one thread "
            "gathers rows faster than processes could send them. Leave it out."
        )
    if placed != "disk":
        source = dataclasses.replace(source, train=source.train.read(), test=source.test.read())
    feed = partial(Feed, mesh=mesh, resident=placed == "device", loading=loading)
    train = feed(source.train, batch_size=batching["batch_size"], functions=functions)
    test = feed(source.test, batch_size=batching["eval_batch_size"])
    return source, train, test, why


def _transforms(source: Source) -> tuple[Mapping[str, Any], ...]:
    """The transforms of a source, and of its parts where it is a mixture."""
    return source.transforms, *source.transforms.get("parts", ())


def _check_targets(source: Source, options: Mapping[str, Any]) -> None:
    """A loss can't see values while it is traced: numbers would pass for shares of classes."""
    softmax = losses.softmax_cross_entropy in sections.loss_functions(options)
    if softmax and any(part.get("values") == "numbers" for part in _transforms(source)):
        raise UserError(
            f"loss.name='softmax_cross_entropy' is for classes, but the targets of data {source.name!r} are numbers: "
            "set --config.loss.name=mean_squared_error, or give classes as integers."
        )


def _asked(written: Mapping[str, Any]) -> bool:
    """Whether the config says how the devices are used."""
    return any(axis in written["mesh"] for axis in sharding.AXES)


def _automatic(
    model: nn.Module,
    tx: optax.GradientTransformation,
    source: Source,
    written: Mapping[str, Any],
    policy: Policy,
    devices: Sequence[jax.Device],
) -> tuple[dict[str, int], str]:
    """Axes for the size of the state and the memory of the devices; and why, for the log."""
    if len(devices) == 1:
        return {}, ""
    memory, params, every, held = hardware.memory(devices[0]), None, None, 0
    if memory is not None:  # elsewhere nothing depends on the size, and tracing a model takes its time
        batch = Feed(source.train, sharding.make_mesh(devices=devices[:1]), 1, resident=False).example()
        with bad_fit():
            shapes = jax.eval_shape(
                partial(state.create, model, tx, param_dtype=policy.param), batch["inputs"], written["seed"]
            )
        params, held = shapes.params, _bytes(shapes)
        every = state.parameters(params, shapes.extra)
    axes, why = sharding.automatic(
        devices, state_bytes=held, gradient_bytes=_bytes(params), memory=memory,
        batch_sizes=tuple(_batch_sizes(written).values()), num_slices=written["mesh"].get("num_slices"),
        tensor_sizes=every and sharding.tensor_sizes(every),
    )  # fmt: skip
    return axes, f" ({why})"


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _batch_sizes(written: Mapping[str, Any]) -> dict[str, int]:
    """What a mesh must divide, by name."""
    batching, parts = sections.split_data(written["data"])[0], written["train"].get("microbatches", 1)
    size = batching["batch_size"]
    if size % parts:
        raise UserError(f"train.microbatches={parts} does not divide data.batch_size={size}: choose one that does.")
    micro = {"data.batch_size / train.microbatches": size // parts} if parts > 1 else {}
    return {"data.batch_size": size, "data.eval_batch_size": batching["eval_batch_size"], **micro}


def _check_batches(mesh: Mesh, written: Mapping[str, Any]) -> None:
    for where, size in _batch_sizes(written).items():
        sharding.check_batch(mesh, size, where)


def _chosen(policy: Policy, model: nn.Module, mesh: Mesh, inputs: Any) -> tuple[str, ...]:
    """What was chosen for the devices, for the log."""
    lower = {policy.param, policy.compute, policy.output} != {"float32"}
    said = (f"precision: {policy}",) if lower else ()
    with bad_fit():
        return (*said, *(model.chosen(mesh, inputs) if hasattr(model, "chosen") else ()))


def _total(written: Mapping[str, Any], clock: Clock) -> int:
    duration = written["train"]["duration"]
    steps = clock.steps(duration, "train.duration") if isinstance(duration, str) else duration
    if steps < 1:
        raise UserError(f"train.duration={duration!r} is no step at all: expected at least one.")
    return steps


def _token_bytes(options: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Bytes of each token, for a loss that asks for them."""
    asked = "token_bytes" in registry.parameters(sections.loss_functions(options))
    return {"token_bytes": source.token_bytes} if asked else {}
