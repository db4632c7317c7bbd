"""The finite guard: a step whose numbers are bad changes nothing, and holds the run until the host has looked.

`guarded` wraps a step and has its signature. A step is *bad* if its loss or its gradient is not finite, or if its loss
is a spike. Then parameters, other collections, optimizer state and step counter stay what they were, and the state is
*held*: steps that are already under way change nothing either. The host, which reads metrics one dispatch behind and
waits for nothing while all is well, so finds the very state in which the bad step began; it writes a capsule, and lets
go with `moved`, which names the step to go on from. So the numbers of a run do not depend on when the host looked.

What the host decides is in `watch`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxmodels import metrics as metric
from flaxmodels import sharding
from flaxmodels.paths import path_of
from flaxmodels.registry import Positive, Range
from flaxmodels.state import TrainState
from flaxmodels.step import Step, compile_step

# What the metric "bad" of a step says. The metrics of a step that was held are of no batch in particular.
GOOD, NOT_FINITE, SPIKE, HELD = 0, 1, 2, 3
BAD = "bad"
# A spike is also so many times as far above the mean as the highest loss of the window. Losses of a model that knows
# its examples by heart have a heavy tail: of 10,000 clean steps, 285 were 6 standard deviations above the mean.
BEYOND = 5.0


@dataclasses.dataclass(frozen=True)
class Guard:
    """What counts as a bad step, and what is done about it: the options of `guard`.

    Attributes:
      finite: leave out a step whose loss or gradient is not finite. Its norm counts, so a gradient of over 1e19 does.
      spikes: "skip" leaves out the step of a loss spike; "roll back" also forgets the `back` steps before it, and
        leaves these batches out too (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, sec. 5.1); "off" looks for none.
      window: good losses, the last ones, that a spike is measured against; before there are so many, there is none.
      sigma: standard deviations above their mean from which on a loss is a spike.
      rise: and the share of the mean of the first `window` losses by which it must be above it too: near zero, jumps
        of many standard deviations mean nothing. See also `BEYOND`.
      back: steps that "roll back" forgets.
      max_bad_steps: the run ends with so many bad steps, one after the other.
      capsules: that a workdir gets at the most; 0 writes none.
    """

    finite: bool = True
    spikes: Literal["off", "skip", "roll back"] = "off"
    window: Annotated[int, Range(8, 1000)] = 128  # a larger one would be sharded by the fallback of `sharding`
    sigma: Annotated[float, Range(1)] = 6.0
    rise: float = 0.1
    back: Positive = 100
    max_bad_steps: Positive = 10
    capsules: Annotated[int, Range(0, 1000)] = 3


class GuardState(NamedTuple):
    """The state of an optax transform with the guard's own beside it. All but `inner` is whole on every device.

    Attributes:
      inner: of the optimizer.
      held: why the state is held, `NOT_FINITE` or `SPIKE`; `GOOD` while it is not. int32, as all counters.
      skipped: steps left out since the run began.
      streak: how many times in a row there was a bad step.
      resumed: the step to go on from after the last of them.
      rollbacks: how many of the run's roll backs this state has behind it.
      losses: (window,) float32, the loss of step i at i % window; infinite where there was none.
      level: mean of the first `window` losses, float32; infinite before.
    """

    inner: Any
    held: jax.Array
    skipped: jax.Array
    streak: jax.Array
    resumed: jax.Array
    rollbacks: jax.Array
    losses: jax.Array
    level: jax.Array


def init_of(tx: optax.GradientTransformation, options: Guard) -> optax.GradientTransformation:
    """`tx` whose `init` makes a `GuardState`. Its structure depends on no option but `window`."""

    def init(params: Any) -> GuardState:
        held, skipped, streak, resumed, rollbacks = (jnp.zeros((), jnp.int32) for _ in range(5))
        losses = jnp.full((options.window,), jnp.inf, jnp.float32)
        return GuardState(tx.init(params), held, skipped, streak, resumed, rollbacks, losses, jnp.float32(jnp.inf))

    return optax.GradientTransformation(init, tx.update)


def guarded(step: Step, options: Guard) -> Step:
    """The same step on a state whose `opt_state` is a `GuardState`, which leaves out what is bad.

    Args:
      step: (state, batch) -> (state, metrics) with the metrics "loss" and "grad_norm".
      options: what is bad.

    Returns:
      The step; its metrics have one pair more, "bad": (`GOOD`, `NOT_FINITE`, `SPIKE` or `HELD`, 1).
    """

    def guarded_step(state: TrainState, batch: Any) -> tuple[TrainState, metric.Metrics]:
        before: GuardState = state.opt_state
        bare = state.replace(opt_state=before.inner)
        new, metrics = step(bare, batch)
        if not options.finite and options.spikes == "off":
            return new.replace(opt_state=before._replace(inner=new.opt_state)), metrics
        loss = metric.ratio(*metrics["loss"])
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"][0])
        found = jnp.where(finite | (not options.finite), GOOD, NOT_FINITE).astype(jnp.int32)
        guard = before
        if options.spikes != "off":
            found = jnp.where((found == GOOD) & _is_spike(before, loss, options), SPIKE, found)
            guard = _remembered(before, state.step, loss, (before.held == GOOD) & (found == GOOD) & finite)
        held = jnp.where(before.held == GOOD, found, before.held)
        # No `cond`: so the choice is part of the loop that makes the update, and costs no pass over memory of its own.
        kept = jax.tree.map(lambda old, x: jnp.where(held == GOOD, x, old), bare, new)
        metrics[BAD] = metric.once(jnp.where(before.held == GOOD, found, HELD))
        return kept.replace(opt_state=guard._replace(inner=kept.opt_state, held=held)), metrics

    return guarded_step


def _is_spike(guard: GuardState, loss: jax.Array, options: Guard) -> jax.Array:
    """Whether a loss is one, () bool. False while the window is not full, where everything here is infinite or NaN."""
    mean = jnp.mean(guard.losses)
    usual = jnp.maximum(options.sigma * jnp.std(guard.losses), BEYOND * (jnp.max(guard.losses) - mean))
    return loss > mean + jnp.maximum(usual, options.rise * guard.level)


def _remembered(guard: GuardState, step: jax.Array, loss: jax.Array, good: jax.Array) -> GuardState:
    """With the loss of a good step in its place, and the level once the window is full."""
    place = step % guard.losses.shape[0]
    losses = guard.losses.at[place].set(jnp.where(good, loss, guard.losses[place]))
    level = jnp.where(jnp.isfinite(guard.level), guard.level, jnp.mean(losses))
    return guard._replace(losses=losses, level=level)


def moved(state: TrainState, step: Any, rollbacks: Any) -> TrainState:
    """The state let go, to go on from `step`, with the batches up to there left out; pure.

    Args:
      state: held, or about to leave out steps on purpose.
      step: int32, the next one to make; at least `state.step`.
      rollbacks: int32, see `GuardState`.
    """
    guard: GuardState = state.opt_state
    step = jnp.asarray(step, jnp.int32)
    guard = guard._replace(
        held=jnp.zeros_like(guard.held),
        skipped=guard.skipped + step - state.step,
        streak=jnp.where(guard.resumed == state.step, guard.streak, 0) + 1,
        resumed=step,
        rollbacks=jnp.asarray(rollbacks, jnp.int32),
    )
    return state.replace(step=step, opt_state=guard)


def sound(state: TrainState) -> dict[str, jax.Array]:
    """Path -> whether its numbers are finite, () bool, for each floating array of a state but the guard's own; pure.

    A scalar of the optimizer may be infinite: a best value so far begins so.
    """
    found = {}
    for keys, x in jax.tree.leaves_with_path(state.replace(opt_state=state.opt_state.inner)):
        if jnp.issubdtype(x.dtype, jnp.floating):
            path = path_of(keys)
            own = path.startswith("opt_state/") and x.ndim == 0
            found[path] = jnp.all(~jnp.isnan(x) if own else jnp.isfinite(x))
    return found


def mover(abstract: TrainState, mesh: Mesh) -> Callable[[TrainState, int, int], TrainState]:
    """`moved` for states of a mesh, compiled when it is first called; it donates the state."""
    whole = sharding.replicated(mesh)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    places = jax.tree.map(lambda x: x.sharding, abstract)

    @functools.cache
    def compiled() -> jax.stages.Compiled:
        lowered = compile_step(moved, abstract, number, number, mesh=mesh, out_shardings=places, donate=(0,))
        return lowered.compile()

    def everywhere(value: int) -> jax.Array:
        return jax.make_array_from_callback((), whole, lambda _: np.asarray(value, np.int32))

    def move(state: TrainState, step: int, rollbacks: int) -> TrainState:
        new: TrainState = compiled()(state, everywhere(step), everywhere(rollbacks))
        return new

    return move


def checker(abstract: TrainState, mesh: Mesh) -> Callable[[TrainState], list[str]]:
    """What tells the paths of the arrays of a state that are not `sound`; compiled when it is first called."""

    @functools.cache
    def compiled() -> jax.stages.Compiled:
        return compile_step(sound, abstract, mesh=mesh, out_shardings=sharding.replicated(mesh)).compile()

    return lambda state: [path for path, fine in jax.device_get(compiled()(state)).items() if not fine]
