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

from flaxmodels import data, losses, metrics, models, optim, registry, sections, sharding, state, step
from flaxmodels.data import augment, host_augment
from flaxmodels.data.feed import Feed, choose
from flaxmodels.data.order import ORDER_VERSION
from flaxmodels.data.split import Source
from flaxmodels.durations import Clock, parse
from flaxmodels.registry import UserError
from flaxmodels.sections import Cadence
from flaxmodels.state import TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a config says, as objects.

    Attributes:
      config: checked, with durations as written.
      source: the data.
      model: a Linen module.
      tx: the optimizer.
      schedule: step -> learning rate.
      losses: (to train with, to evaluate with).
      mesh: over which all of it lies.
      train: the feed of the training split.
      test: the feed of the evaluation split.
      augment: (batch, index, step) -> batch, of training.
      cadence: when things happen; its duration is the number of steps of the run.
      checkpoint: options of `Checkpoints`.
      fresh: () -> a new state, born sharded.
      abstract: its `jax.ShapeDtypeStruct` tree, with shardings.
      notes: lines for the log, on what was chosen.
    """

    config: dict[str, Any]
    source: Source
    model: nn.Module
    tx: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]
    losses: tuple[losses.Loss, losses.Loss]
    mesh: Mesh
    train: Feed
    test: Feed
    augment: Callable[..., Any]
    cadence: Cadence
    checkpoint: dict[str, Any]
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
            "augment": registry.storable(options.get("augment", ())),
            "host_augment": registry.storable(options.get("host_augment", ())),
            "global batch": self.train.batch_size,
            "seed": self.seed,
            "order version": ORDER_VERSION,
        }

    def lower_train(self) -> tuple[jax.stages.Lowered, list[str]]:
        """The train step, lowered, donating its state; and the names of the packed metrics it returns.

        The program is (state, feed of `step.repeated`) -> (state, (steps of a dispatch, names, 2) float32).
        """
        gradient = step.make_gradient(step.make_apply(self.model), self.losses[0])
        gradient = step.accumulated(gradient, self.cadence.microbatches)
        update = partial(step.train_step, gradient=gradient, tx=self.tx, schedule=self.schedule, seed=self.seed)
        names: list[str] = []

        def packed(state: TrainState, item: tuple[Any, Any]) -> tuple[TrainState, jax.Array]:
            state, found = update(state, self.augment(self.train.batch(*item), item[0]["index"], state.step))
            names[:] = sorted(found)
            return state, metrics.pack(found)

        most = self.cadence.steps_per_dispatch
        feed = self.train.abstract_dispatch(most)
        places = (jax.tree.map(lambda x: x.sharding, self.abstract), sharding.replicated(self.mesh))
        program = step.repeated(packed, most)
        lowered = step.compile_step(program, self.abstract, feed, mesh=self.mesh, out_shardings=places, donate=(0,))
        return lowered, names

    def lower_eval(self) -> tuple[jax.stages.Lowered, list[str]]:
        """The evaluation step, lowered: (params, extra, each, every) -> packed metrics; and their names."""
        apply, names = step.make_apply(self.model), list[str]()

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
    mesh = sharding.make_mesh(**written["mesh"], devices=devices)
    batching, options = sections.split_data(written["data"])
    sharding.check_batch(mesh, batching["batch_size"])
    sharding.check_batch(mesh, batching["eval_batch_size"], "data.eval_batch_size")
    source = data.load(**options)
    clock = Clock(batching["batch_size"], source.train.size, source.tokens_per_example)
    checked = sections.check(written, dataclasses.replace(clock, total_steps=_total(written, clock)).steps)
    _check_targets(source, checked["loss"])
    cadence = Cadence(**checked["train"])
    _check_microbatches(mesh, batching["batch_size"], cadence.microbatches)
    model = models.build(**_fill(checked["model"], source))
    tx, schedule = optim.make(**checked["optim"], total_steps=cadence.duration)
    source, train, test, placed = _feeds(source, mesh, batching)
    augmented = augment.make(batching["augment"], seed=written["seed"], facts=source.facts)
    index = jax.ShapeDtypeStruct((train.batch_size,), "int32")
    jax.eval_shape(augmented, train.example(), index, jax.ShapeDtypeStruct((), "int32"))  # does it fit the data?
    rules = sections.rules(**checked["sharding"])
    with bad_fit():
        fresh, abstract = state.init(model, tx, train.example()["inputs"], written["seed"], mesh, rules)
    if not jax.tree.leaves(abstract.params):
        raise UserError(f"model.name={written['model']['name']!r} has no parameters: there is nothing to train.")
    whole = sharding.replicated_report(abstract.params)
    cut = [part["texts cut"] for part in _transforms(source) if "texts cut" in part]
    lost = (f"texts longer than data.length, which lose their ends: {', '.join(cut)}",) if cut else ()
    return Job(
        config=written, source=source, model=model, tx=tx, schedule=schedule, mesh=mesh, train=train, test=test,
        augment=augmented,
        losses=losses.make(**checked["loss"], **_token_bytes(checked["loss"], source)), cadence=cadence,
        checkpoint=checked["checkpoint"], fresh=fresh, abstract=abstract,
        notes=(f"mesh: {sharding.describe(mesh)}", placed, *lost, *whole),
    )  # fmt: skip


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
        section = {"flaxmodels.models": "model", "flaxmodels.losses": "loss"}.get(where)
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


def _check_microbatches(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    if batch_size % microbatches:
        raise UserError(
            f"train.microbatches={microbatches} does not divide data.batch_size={batch_size}: choose one that does."
        )
    sharding.check_batch(mesh, batch_size // microbatches, "data.batch_size / train.microbatches")


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


def _fill(options: dict[str, Any], source: Source) -> dict[str, Any]:
    """Model fields that the data knows: set where the config leaves them out, checked where it does not."""
    fields = registry.parameters([sections.model_class(options)])
    for key, value in source.facts.items():
        if key in fields and options.setdefault(key, value) < value:
            raise UserError(
                f"model.{key}={options[key]} is too small: data {source.name!r} has {key}={value}. "
                "Leave it out to take it from the data."
            )
    for key in sections.SECTIONS["model"].filled:
        if key in fields and fields[key].default is fields[key].empty and key not in options:
            knows = ", ".join(f"{name}={value}" for name, value in source.facts.items()) or "nothing of the kind"
            raise UserError(
                f"model.{key} is not set, and data {source.name!r} does not tell: it knows {knows}. "
                f"Is model.name={options['name']!r} for such data? If so, set --config.model.{key}=NUMBER."
            )
    return options
