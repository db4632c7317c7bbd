"""Run the step of an autopsy capsule again, and find out what went wrong in it.

Read `run`. It rebuilds the job from the capsule's own config, makes sure that the data are those of then, restores the
state, and makes the step once more with the program of training. Then it looks inside: for numbers that are not finite
at the operation that made the first of them (`origins`), for a spike at the gradient of each module, compared with
those of the batches before; and at each example of the batch by itself.
"""

import contextlib
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import capsule, config, guard, metrics, sections, sharding, step
from flaxmodels.job import Job, assemble
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError, plain, storable
from flaxmodels.state import TrainState
from flaxmodels.verify import origins

# Lines that a report has at the most of one kind, and good batches that a spike is compared with.
LINES, BEFORE = 8, 3
# A name of a config that stands for code: "package.module:attribute".
_CODE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
# Sections that say where and when things happen: a replay need not have them as they were.
_FREE = ("mesh", "sharding", "checkpoint", "guard")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a replay found.

    Attributes:
      reproduced: the step was bad again, in the same way.
      same: loss and gradient norm are those of then, bit for bit.
      module: the first that went wrong, or whose gradient grew most; "" where nothing was found.
      examples: ids of those that go wrong by themselves, or of the highest losses.
    """

    reproduced: bool
    same: bool
    module: str
    examples: tuple[int, ...]


def run(
    folder: Path,
    *,
    given: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
    devices: Sequence[jax.Device] | None = None,
    show: Callable[[str], None] = print,
) -> Verdict:
    """Replay a capsule.

    Args:
      folder: the capsule.
      given: a config that the user names; None takes the capsule's own, in which no name may stand for code.
      overrides: dotted key -> value, as on a command line: what shall be otherwise than it was.
      devices: to run on; None takes all there are.
      show: where lines of the report go.

    Raises:
      UserError: the capsule is damaged, its config is refused, or the data are not those of then.
    """
    facts = capsule.read(folder)
    job = _job(facts, given, overrides or {}, devices)
    _same_data(job, facts)
    loss, norm = (float.fromhex(facts[name]) for name in ("loss", "grad_norm"))
    number = facts["step"]
    show(f"batch {number}, {len(facts['examples'])} examples: {facts['why']}, {_said(loss, norm)}")
    then, now = ({key: found[key] for key in capsule.topology(job)} for found in (facts, capsule.topology(job)))
    changed = "; ".join(f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if then[key] != now[key])
    show(f"on {sharding.describe(job.mesh)}, {f'not as then: {changed}' if changed else 'as then'}")
    state = capsule.restore(folder, job.abstract)
    params, extra = jax.tree.map(jnp.copy, (state.params, state.extra))  # the step takes the state's memory
    code, again, norm_again = _again(job, state, number)
    reproduced = capsule.WHY.get(code) == facts["why"]
    same = [x.hex() for x in (again, norm_again)] == [facts["loss"], facts["grad_norm"]]
    verdict = "the same, bit for bit" if same else "not the same bits"
    show(f"again: {_said(again, norm_again)}; {verdict}{'' if reproduced else ', and not bad this time'}")
    if not reproduced:
        return Verdict(False, same, "", ())
    look = _Look(job, params, extra, number, tuple(facts["examples"]), show)
    module, examples = look.not_finite() if code == guard.NOT_FINITE else look.spike()
    return Verdict(True, same, module, examples)


def _job(
    facts: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    overrides: Mapping[str, str],
    devices: Sequence[jax.Device] | None,
) -> Job:
    stored = facts["config"]
    if given is None:
        if names := sorted(set(_code(stored))):
            raise UserError(
                f"the capsule's config names code: {', '.join(names)}. A stored file is not trusted to say what is "
                "run: name the config that it was trained with, --config=FILE."
            )
        given = stored
    changed = config.ConfigDict(plain(given))
    for key, text in overrides.items():
        config.override(changed, key, text)
    written: dict[str, Any] = plain(changed)
    now = storable(sections.check(written, lambda text, where: text))
    differ = [line for key, line in _differences(stored, now) if key not in overrides]
    if differ:
        raise UserError(
            f"--config is not what the capsule was trained with: {'; '.join(differ[:5])}. Give what the command line "
            "of the run changed here, too."
        )
    devices = sharding.find_devices(written.get("mesh", {}).get("platform")) if devices is None else devices
    if len(devices) != facts["devices"] and not any(key.startswith("mesh.") for key in overrides):
        batch = len(facts["examples"]) // written["train"].get("microbatches", 1)
        devices = devices if batch % len(devices) == 0 else devices[:1]
        written["mesh"] = {"data": len(devices)}
    return assemble(written, devices)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, what it was and is) of what may change the numbers."""
    for key in sorted({*_keys(then), *_keys(now)}):
        if key.split(".")[0] not in _FREE and _at(then, key) != _at(now, key):
            yield key, f"{key} was {_at(then, key)!r}, is {_at(now, key)!r}"


def _code(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if _CODE.match(value) else []
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _code(item)


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    for name, section in config.items():
        yield from (f"{name}.{key}" for key in section) if isinstance(section, Mapping) else (name,)


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    name, _, key = dotted.partition(".")
    return config.get(name, {}).get(key) if key else config.get(name)


def _same_data(job: Job, facts: Mapping[str, Any]) -> None:
    then, now = facts["data"], job.identity
    differ = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in now if then.get(name) != now[name]]
    if not differ and job.train.indices(job.seed, facts["step"])[0].tolist() != facts["examples"]:
        differ = [f"the examples of batch {facts['step']} are others"]
    if differ:
        raise UserError(f"data {job.source.name!r} is not what the capsule was trained on: {'; '.join(differ)}.")


def _again(job: Job, state: TrainState, number: int) -> tuple[int, float, float]:
    """(code, loss, gradient norm) of the step, by the program of training."""
    lowered, names = job.lower_train()
    held = state.opt_state
    free = guard.mover(job.abstract, job.mesh)(state, number, int(held.rollbacks))
    with contextlib.closing(job.train.dispatches(job.seed, [(number, 1)], job.cadence.steps_per_dispatch)) as feeds:
        _, packed = lowered.compile()(free, next(feeds))
    row = dict(zip(names, jax.device_get(packed)[0].tolist()))
    loss, norm = row["loss"][0] / row["loss"][1] if row["loss"][1] else row["loss"][0], row["grad_norm"][0]
    return int(row.get(guard.BAD, (0,))[0]), loss, norm


class _Look:
    """Looks inside of a step."""

    def __init__(
        self, job: Job, params: Any, extra: Any, number: int, ids: tuple[int, ...], show: Callable[[str], None]
    ) -> None:
        self.job, self.params, self.extra, self.number, self.ids, self.show = job, params, extra, number, ids, show

    def not_finite(self) -> tuple[str, tuple[int, ...]]:
        """(module, ids of examples) of numbers that are not finite."""
        arguments = {
            "params": self.params, "extra": self.extra, "batch": self._batch(self.number),
            "rngs": step.streams(self.job.seed, self.number),
        }  # fmt: skip
        with self._mesh():
            found, bad = origins.find(self.job.gradient, arguments)
        loss = any(path.startswith("2/loss") for path in bad)
        for place, origin in enumerate(found[:LINES]):
            self._origin(origin, "first" if place == 0 else "then", loss)
        if not found:
            self.show("computed operation by operation everything is finite: it depends on how XLA fuses them")
        grads = [path.removeprefix("0/") for path in bad if path.startswith("0/")]
        if grads:
            count = len(jax.tree.leaves(self.params))
            self.show(f"gradients that are not finite: {len(grads)} of {count} parameters, the first {grads[0]}")
        rows = [row for row, (loss, norm) in enumerate(self._alone()) if not math.isfinite(loss + norm)]
        self._examples("are not finite by themselves", rows)
        return found[0].path if found else "", tuple(self.ids[row] for row in rows)

    def _origin(self, origin: origins.Origin, when: str, loss: bool) -> None:
        if not origin.operation:
            self.show(f"{when}: what came in, {origin.path}, {origin.made}")
            return
        kept = "forward pass" if loss else "forward pass, for its gradient"
        side = "backward pass" if origin.backward else kept
        self.show(f"{when}: module {origin.path or '(none: the loss)'}, {side}: {origin.operation}")
        self.show(f"  at {origin.source}")
        for operand in origin.operands:
            self.show(f"  of {operand}")
        self.show(f"  made {origin.made}")

    def spike(self) -> tuple[str, tuple[int, ...]]:
        """(module, ids of examples) of a loss that jumped."""
        norms = self._compiled(self._norms)
        now = self._of_batch(norms, self.number)
        before = [self._of_batch(norms, number) for number in range(max(self.number - BEFORE, 0), self.number)]
        usual = {name: statistics.fmean(found[name] for found in before) for name in now} if before else now
        ratio = {name: now[name] / usual[name] if usual[name] else math.inf for name in now}
        ranked = sorted(now, key=lambda name: -ratio[name])
        self.show(f"norms of gradients by module, against the mean of the {len(before)} batches before:")
        for name in ranked[:LINES]:
            self.show(f"  {name:<40} {now[name]:>12.4g} {usual[name]:>12.4g} {ratio[name]:>10.4g} x")
        losses = [loss for loss, _ in self._alone()]
        rows = sorted(range(len(losses)), key=lambda row: -losses[row])[:LINES]
        median = statistics.median(losses)
        self.show(f"highest losses of examples by themselves; the median is {median:.4g}:")
        for row in rows:
            self.show(f"  example {self.ids[row]} (row {row}): {losses[row]:.6g}")
        beyond = [row for row in rows if losses[row] > 10 * median] or rows[:1]
        return ranked[0], tuple(self.ids[row] for row in beyond)

    def _norms(self, params: Any, extra: Any, batch: Any, rngs: Any) -> dict[str, jax.Array]:
        """Module -> norm of its parameters' gradient."""
        grads, _, found = self.job.gradient(params, extra, batch, rngs)
        modules: dict[str, list[jax.Array]] = {}
        for keys, grad in jax.tree.leaves_with_path(grads):
            path = path_of(keys)
            modules.setdefault(path.rpartition("/")[0] or path, []).append(grad)
        return {name: metrics.ratio(metrics.norm(leaves), found["loss"][1]) for name, leaves in modules.items()}

    def _of_batch(self, program: Callable[..., Any], number: int) -> dict[str, float]:
        found = program(self.params, self.extra, self._batch(number), step.streams(self.job.seed, number))
        return {name: float(value) for name, value in jax.device_get(found).items()}

    def _alone(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each example by itself."""
        job = self.job
        gradient = step.make_gradient(step.make_apply(job.model, job.policy), job.losses[0])
        copies = math.prod(job.mesh.shape[axis] for axis in sharding.BATCH_AXES)  # one for each part of a batch

        def one(params: Any, extra: Any, batch: Any, rngs: Any, row: Any) -> tuple[jax.Array, jax.Array]:
            same = jax.tree.map(lambda a: jnp.broadcast_to(a[row][None], (copies, *a.shape[1:])), batch)
            grads, _, found = gradient(params, extra, same, rngs)
            return metrics.ratio(*found["loss"]), metrics.ratio(metrics.norm(grads), found["loss"][1])

        program, batch = self._compiled(one), self._batch(self.number)
        rngs = step.streams(job.seed, self.number)
        found = [program(self.params, self.extra, batch, rngs, np.int32(row)) for row in range(len(self.ids))]
        return [(float(loss), float(norm)) for loss, norm in jax.device_get(found)]

    def _examples(self, what: str, rows: Sequence[int]) -> None:
        named = ", ".join(f"example {self.ids[row]} (row {row})" for row in rows[:LINES])
        more = f" and {len(rows) - LINES} more" if len(rows) > LINES else ""
        none = "none: it takes several of them together"
        self.show(f"{len(rows)} of {len(self.ids)} examples {what}: {f'{named}{more}' if rows else none}")

    def _batch(self, number: int) -> Any:
        """A batch of training, augmented as in its step."""

        def make(each: Any, every: Any) -> Any:
            return self.job.augment(self.job.train.batch(each, every), each["index"], jnp.int32(number))

        return self._compiled(make)(*self.job.train.train_at(self.job.seed, number))

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function)

        def call(*arguments: Any) -> Any:
            with self._mesh():
                return jitted(*arguments)

        return call

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[None]:
        with jax.set_mesh(self.job.mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
            yield


def _said(loss: float, norm: float) -> str:
    return f"loss {loss:.6g}, gradient norm {norm:.6g}"
