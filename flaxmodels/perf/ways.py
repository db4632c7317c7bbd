"""Ways to compute one update: what a run does, and what others write: explicit collectives in `shard_map` or `pmap`.

All split the batch over the devices and hold parameters whole. The update is the same, down to `step.train_step`. Where
collectives are explicit they are in one place, a function that wraps the gradient function (`summed`): each device has
the gradient of its own examples, and what `train_step` divides is the sum over all of them, by the count over all.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import sharding, step
from flaxmodels.job import Job
from flaxmodels.metrics import Metrics
from flaxmodels.perf import compiling
from flaxmodels.perf.compiling import Seconds
from flaxmodels.registry import UserError
from flaxmodels.step import Batch, Gradient

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Way:
    """A compiled update, and how to feed it.

    Attributes:
      program: (state, feed) -> (state, packed metrics), as `Job.lower_train` has it; donates the state.
      start: () -> a state to start from.
      place: a feed, or some keys of one, on the host -> as the program takes it.
      read: a result of the program -> on the host, as a run has it.
      names: of the packed metrics.
      seconds: that tracing, lowering and compiling took.
    """

    program: jax.stages.Compiled
    start: Callable[[], Any]
    place: Callable[[dict[str, Any]], dict[str, Any]]
    read: Callable[[Any], Any]
    names: Sequence[str]
    seconds: Seconds


def jit(job: Job) -> Way:
    """What a run does: `jax.jit` of a program for one device, over sharded arrays. The compiler adds collectives."""
    names: list[str] = []

    def lower() -> jax.stages.Lowered:
        lowered, names[:] = job.lower_train()
        return lowered

    return _way(job, lower, names)


def shard_map(job: Job) -> Way:
    """`jax.shard_map` of the update, with `psum` over the batch axes of the mesh."""
    program, names = job.update(partial(summed, axis=sharding.BATCH_AXES))
    feed = job.train.abstract_dispatch(job.cadence.steps_per_dispatch)
    specs = jax.tree.map(lambda x: x.sharding.spec, feed)
    # Unchecked, as pmap is: with check_vma=True the gradient of what all devices share comes out summed already.
    spread = jax.shard_map(program, mesh=job.mesh, in_specs=(P(), specs), out_specs=P(), check_vma=False)
    return _way(job, lambda: jax.jit(spread, donate_argnums=0).lower(job.abstract, feed), names)


def pmap(job: Job) -> Way:
    """`jax.pmap` of the same: every array gets a first dimension, one entry a device.

    Raises:
      UserError: it has gone from this JAX.
    """
    if not hasattr(jax, "pmap"):
        raise UserError(f"jax {jax.__version__} has no pmap any more: leave it out, --compare=jit,shard_map.")
    devices = list(job.mesh.devices.flat)
    count, where = len(devices), NamedSharding(Mesh(np.array(devices), (AXIS,)), P(AXIS))
    program, names = job.update(partial(summed, axis=AXIS))

    def copied(x: Any) -> Any:
        return np.broadcast_to(x, (count, *x.shape))

    def cut(x: Any) -> Any:  # (steps, B, ...) -> (devices, steps, B / devices, ...)
        return x.reshape(len(x), count, -1, *x.shape[2:]).swapaxes(0, 1)

    def stacked(feed: dict[str, Any]) -> dict[str, Any]:
        return {key: jax.tree.map(cut if key == "each" else copied, value) for key, value in feed.items()}

    feed = job.train.abstract_dispatch(job.cadence.steps_per_dispatch)
    shapes = jax.tree.map(_shape, (jax.tree.map(copied, _blank(job.abstract)), stacked(_blank(feed))))
    mapped = jax.pmap(program, axis_name=AXIS, devices=devices, donate_argnums=0)
    compiled, seconds = compiling.timed(lambda: mapped.lower(*shapes))
    return Way(
        program=compiled,
        seconds=seconds,
        start=lambda: jax.device_put(jax.tree.map(copied, jax.device_get(job.fresh())), where),
        place=lambda feed: jax.device_put(stacked(feed), where),
        read=lambda tree: jax.tree.map(lambda x: x[0], jax.device_get(tree)),
        names=names,
    )


def in_turn(job: Job, parts: int) -> Way:
    """What `shard_map` and `pmap` do on `parts` devices, without either: one device computes one part after the other.

    It shows that they agree where a run differs from them by design: in BatchNorm's statistics, and in dropout's masks.

    Args:
      job: on one device.
      parts: of a batch.
    """
    program, names = job.update(partial(_summed_in_turn, parts=parts))
    feed = job.train.abstract_dispatch(job.cadence.steps_per_dispatch)
    return _way(job, lambda: jax.jit(program, donate_argnums=0).lower(job.abstract, feed), names)


WAYS: Mapping[str, Callable[[Job], Way]] = {"jit": jit, "shard_map": shard_map, "pmap": pmap}


def by_design(job: Job) -> list[str]:
    """Why explicit collectives give other results than a run, in words; nothing where they must give the same."""
    apply = step.make_apply(job.model, job.policy)
    found = []
    try:
        batch = job.train.example()
        jax.eval_shape(partial(apply, train=True, rngs={}), job.abstract.params, job.abstract.extra, batch["inputs"])
    except flax.errors.InvalidRngError:
        found.append("dropout: each device draws masks of its own, where a run draws those of the whole batch")
    if job.abstract.extra:
        kinds = ", ".join(job.abstract.extra)
        found.append(f"{kinds}: of each device's own examples, then averaged, where a run's are of the whole batch")
    mixing = [part["name"] for part in job.config["data"].get("augment", ()) if part["name"] in ("mixup", "cutmix")]
    return found + [f"{name}: only examples of the same device are mixed" for name in mixing]


def summed(gradient: Gradient, axis: Any) -> Gradient:
    """The gradient of all devices' examples, from a function that sees one device's: sums and counts add up.

    Random streams are told apart by the number of the device; other collections are averaged.
    """

    def over(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[Any, Any, Metrics]:
        number = jax.lax.axis_index(axis)
        grads, extra, metrics = gradient(params, extra, batch, _folded(rngs, number))
        grads, metrics = jax.lax.psum((grads, metrics), axis)
        return grads, jax.tree.map(lambda x: jax.lax.pmean(x, axis).astype(x.dtype), extra), metrics

    return over


def _summed_in_turn(gradient: Gradient, parts: int) -> Gradient:
    """The same on one device, whose batch is that of all."""

    def over(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[Any, Any, Metrics]:
        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

        def one(i: Any) -> tuple[Any, Any, Metrics]:
            return gradient(params, extra, jax.tree.map(lambda x: x[i], cut), _folded(rngs, i))

        def body(i: Any, total: Any) -> Any:
            return jax.tree.map(jnp.add, total, one(i))

        grads, total, metrics = jax.lax.fori_loop(1, parts, body, one(0))
        return grads, jax.tree.map(lambda x: (x / parts).astype(x.dtype), total), metrics

    return over


def _folded(rngs: Any, number: Any) -> Any:
    return {name: jax.random.fold_in(key, number) for name, key in rngs.items()}


def _blank(tree: Any) -> Any:
    """Host arrays of the shapes of a tree, in the memory of a number each."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _way(job: Job, lower: Callable[[], jax.stages.Lowered], names: Sequence[str]) -> Way:
    """A way whose arrays lie as those of a run."""
    program, seconds = compiling.timed(lower)
    where = jax.tree.map(lambda x: x.sharding, job.train.abstract_dispatch(job.cadence.steps_per_dispatch))

    def place(feed: dict[str, Any]) -> dict[str, Any]:
        return {key: jax.device_put(value, where[key]) for key, value in feed.items()}

    return Way(program, job.fresh, place, jax.device_get, names, seconds)
