"""The sections of a config, and the functions whose signatures are their schema.

`check` holds a config against them; `resolved` lists every value with its origin, for `flaxmodels config`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from flaxmodels import data, losses, models, optim, precision, registry, sharding
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data.feed import Placement
from flaxmodels.data.loading import Loading
from flaxmodels.durations import parse
from flaxmodels.guard import Guard
from flaxmodels.lora import Lora
from flaxmodels.registry import LONGEST, Range, Seed, Steps, UserError
from flaxmodels.warm import Origin

Convert = Callable[[str, str], Any]
BatchSize = Annotated[int, Range(1, 2**24)]  # what is above is a slip of the keyboard, and no machine's memory


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When things happen; a step is one optimizer update.

    Attributes:
      duration: of the whole run.
      log_every: training metrics are the mean since the last line.
      eval_every: 0 evaluates at the end only.
      steps_per_dispatch: steps that one call of the compiled program makes where nothing has to happen between them.
        Pays for small models; not for convolutions on a CPU.
      metric: what "best" and early stopping look at.
      mode: whether more or less of it is better.
      microbatches: parts of a global batch whose gradients are computed one after the other and added up, so that a
        batch may be larger than what memory holds; 1 computes it whole.
      patience: stop after so many evaluations without a better `metric`; 0 never does.
    """

    duration: Steps
    log_every: Annotated[int, Range(1, LONGEST), "duration"] = 100
    eval_every: Steps = 0
    steps_per_dispatch: Annotated[int, Range(1, 10_000)] = 1
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 0
    microbatches: Annotated[int, Range(1, 2**16)] = 1


def batching(
    batch_size: BatchSize,
    eval_batch_size: BatchSize | None = None,
    placement: Placement = "auto",
    workers: Annotated[int, Range(0, 1024)] = 0,
    threads: Annotated[int, Range(1, 1024)] = 8,
    prefetch: Annotated[int, Range(1, 1024)] = 2,
    timeout: Annotated[float, Range(1, 86400)] = 40.0,
    augment: tuple[dict, ...] = (),
    host_augment: tuple[dict, ...] = (),
) -> dict[str, Any]:
    """The options of `data` that are not the source's own.

    Args:
      batch_size: examples of one step, over all devices and hosts: the global batch.
      eval_batch_size: of one evaluation batch; None takes `batch_size`.
      placement: where the data set lives; see `data.feed`. "auto" decides by its size, and says so in the log.
      workers: processes that read and augment, where rows pass through the host; 0: threads of this process do.
      threads: that read, in each process.
      prefetch: batches that are ready ahead of need.
      timeout: seconds without a batch after which data workers count as stuck.
      augment: what is done to training batches on the device: ({"name": ..., options}, ...), see `data.augment`.
      host_augment: what is done to each training example on the host; see `data.host_augment`.
    """
    return {
        "batch_size": batch_size,
        "eval_batch_size": eval_batch_size or batch_size,
        "placement": placement,
        "loading": Loading(workers=workers, threads=threads, ahead=prefetch, timeout=timeout),
        "augment": augment,
        "host_augment": host_augment,
    }


def rules(rules: tuple = ()) -> sharding.Rules:
    """The options of `sharding`: ((regex, spec), ...), tried before the built-in rules."""
    return sharding.check_rules(rules)


def model_class(options: Mapping[str, Any]) -> Any:
    """The module class that `model.name` stands for (UserError)."""
    return models.check_class(_named(models.MODELS, options, "model"), options["name"])


def loss_functions(options: Mapping[str, Any]) -> list[Callable[..., Any]]:
    """`losses.make`, and the function that `loss.name` stands for (UserError)."""
    default = inspect.signature(losses.make).parameters["name"].default
    return [losses.make, _named(losses.LOSSES, {"name": default, **options}, "loss")]


def _optim_functions(options: Mapping[str, Any]) -> list[Callable[..., Any]]:
    defaults = inspect.signature(optim.make).parameters
    return [optim.make, *optim.targets(*(options.get(key, defaults[key].default) for key in ("name", "schedule")))]


def _named(table: Mapping[str, Any], options: Mapping[str, Any], section: str) -> Any:
    if "name" not in options:
        raise UserError(f"{section}.name is not set. {registry.suggest('', table)}")
    return registry.pick(table, options["name"], f"{section}.name")


@dataclasses.dataclass(frozen=True)
class Section:
    """What one section of a config may hold.

    Attributes:
      functions: options -> the functions they are passed to.
      provided: parameters of these that the program passes itself.
      filled: parameters that a config may leave out although they have no default: the data tells.
    """

    functions: Callable[[Mapping[str, Any]], Sequence[Callable[..., Any]]]
    provided: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()


# They stand above: loaded when a config is held against them.
SAMPLES = ("flaxmodels.inference.samples:Samples", "flaxmodels.inference.sampling:Sampling")

SECTIONS: Mapping[str, Section] = {
    "model": Section(
        lambda options: [models.build, model_class(options)], filled=("classes", "vocab_size", "max_length")
    ),
    "loss": Section(loss_functions, provided=("outputs", "batch", "token_bytes")),
    "optim": Section(_optim_functions, provided=("total_steps", "steps")),
    "data": Section(lambda options: [data.load, _named(data.SOURCES, options, "data"), batching]),
    "mesh": Section(lambda _: [sharding.make_mesh], provided=("devices",)),
    "sharding": Section(lambda _: [rules]),
    "precision": Section(lambda _: [precision.policy], provided=("platform",)),
    "train": Section(lambda _: [Cadence]),
    "guard": Section(lambda _: [Guard]),
    "checkpoint": Section(lambda _: [Checkpoints], provided=("directory", "best_mode", "read_only")),
    "start": Section(lambda _: [Origin]),
    "lora": Section(lambda _: [Lora]),
    "samples": Section(lambda _: [registry.pick({}, name, "samples") for name in SAMPLES]),
}


def check(config: Mapping[str, Any], convert: Convert) -> dict[str, Any]:
    """Hold every section of a config against its signatures.

    Args:
      config: section -> options, and "seed".
      convert: what a duration becomes; called as `convert(text, key)`.

    Returns:
      The same, plain (dicts and tuples), with every section there, and "seed".

    Raises:
      UserError: naming the first key that is unknown, missing, of a wrong type or out of range.
    """
    given = _spelled(config)
    for key, value in given.items():
        if key not in (*SECTIONS, "seed"):
            raise UserError(f"{key}={value!r}: unknown section. {registry.suggest(key, (*SECTIONS, 'seed'))}")
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{key}={value!r} has the wrong type: expected a section with keys of its own.")
    checked: dict[str, Any] = {"seed": registry.check(given.get("seed", 0), Seed, "seed")}
    for name, section in SECTIONS.items():
        options = given.get(name, {})
        options = models.expand(options) if name == "model" else options
        functions = section.functions(options)
        checked[name] = registry.bind(
            functions, options, where=name, provided=section.provided, optional=section.filled, convert=convert
        )
    return checked


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain data; `mesh: auto` is the same as no word on the mesh."""
    given = dict(registry.plain(config))
    return {**given, "mesh": {}} if given.get("mesh") == "auto" else given


def split_data(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `data` section as (what `batching` gives, options of the source)."""
    ours = inspect.signature(batching).parameters
    return (
        batching(**{k: v for k, v in options.items() if k in ours}),
        {k: v for k, v in options.items() if k not in ours},
    )


def resolved(config: Mapping[str, Any], overridden: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """Every key of a config, set or not: (dotted key, value, origin).

    Args:
      config: as given.
      overridden: keys that the command line set.

    Returns:
      Rows in the order of `SECTIONS`; the origin is "command line", "config", "preset", "default" or "from the data".

    Raises:
      UserError: as `check`.
    """
    checked = check(config, lambda text, where: parse(text, where) and text)
    given = _spelled(config)
    rows = [("seed", checked["seed"], "config" if "seed" in given else "default")]
    for name, section in SECTIONS.items():
        options, own = checked[name], given.get(name, {})
        for key, parameter in registry.parameters(section.functions(options), section.provided).items():
            missing = "from the data" if parameter.default is parameter.empty else "default"
            value = options.get(key, None if missing == "from the data" else parameter.default)
            origin = missing if key not in options else "config" if own.get(key) == value else "preset"
            rows.append((f"{name}.{key}", value, origin))
    return [(key, value, "command line" if key in overridden else origin) for key, value, origin in rows]
