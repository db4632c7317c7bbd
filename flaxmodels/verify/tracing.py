"""What a job does in its first steps, so that two can be compared; and the first tensor in which they differ."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxmodels import metrics, sharding, step
from flaxmodels.job import Job
from flaxmodels.paths import path_of

# A gradient below this share of the norm of all gradients is compared by that share: where terms cancel, as in a bias
# that a normalisation takes out again, what is left is rounding.
CANCELLED = 1e-3


@dataclasses.dataclass(frozen=True)
class Trace:
    """The first steps of a job.

    Attributes:
      batches: of each step, path -> digest of the bits of each array of the batch, before augmentation on the device.
      loss: (steps,) float64, of each step.
      grad_norm: (steps,) float64.
    """

    batches: tuple[Mapping[str, str], ...]
    loss: np.ndarray
    grad_norm: np.ndarray


class Tracer:
    """A job whose dispatches are of one step, compiled.

    Args:
      job: what to train.

    Attributes:
      job: the same.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        lowered, self._names = job.lower_train()
        self._program, self._batches = lowered.compile(), batches(job)

    def __call__(self, steps: int) -> Trace:
        """Train a fresh state."""
        state, batches, found = self.job.fresh(), [], []
        with _feeds(self.job, steps) as feeds:
            for feed in feeds:
                batches.append(digests(self._batches(state.step, feed)))
                state, packed = self._program(state, feed)
                pairs = zip(self._names, np.asarray(packed)[0].tolist(), strict=True)
                means = metrics.means({name: (pair[0], pair[1]) for name, pair in pairs})
                found.append((means["loss"], means["grad_norm"]))
        loss, grad_norm = np.array(found).T
        return Trace(tuple(batches), loss, grad_norm)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first tensor past the tolerance.

    Attributes:
      step: the update, from 1 on; 0 is before the first.
      what: "gradient" or "parameter".
      path: such as "blocks/mlp/up/kernel".
      relative: norm of the difference / norm of the reference's.
      others: how many more tensors of the same kind are past it at that step.
    """

    step: int
    what: str
    path: str
    relative: float
    others: int

    def __str__(self) -> str:
        others = f", and {self.others} more" if self.others else ""
        when = f"step {self.step}" if self.step else "before the first step"
        return f"{when}: {self.what} {self.path} is off by {self.relative:.1e} of its norm{others}"


def in_float32(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config whose computation is in float32: only the order of sums is left to make a difference."""
    copied = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for name, key in (("model", "dtype"), ("optim", "moments")):
        if key in copied.get(name, {}):
            copied[name][key] = "float32"
    return copied | {"precision": {"compute": "float32"}}


def leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree."""
    return {path_of(k): x for k, x in jax.tree.leaves_with_path(tree)}


def digests(tree: Any) -> dict[str, str]:
    """Path -> digest of shape, dtype and bits."""
    arrays = {path: np.asarray(x) for path, x in leaves(tree).items()}
    return {
        path: hashlib.blake2b(f"{x.shape} {x.dtype} ".encode() + x.tobytes(), digest_size=16).hexdigest()
        for path, x in arrays.items()
    }


def draws(job: Job) -> bool:
    """Whether the loss of the first training batch depends on random bits, as dropout's does."""
    apply = step.make_apply(job.model, job.policy)

    def loss(state: Any, feed: Any, number: Any) -> jax.Array:
        batch = job.augment(*_batch(job, state.step, feed), state.step)
        rngs = step.streams(job.seed, number)
        outputs, _ = apply(state.params, state.extra, batch["inputs"], train=True, rngs=rngs)
        return job.losses[0](outputs, batch)["loss"][0]

    program = step.compile_step(loss, job.abstract, _abstract(job), job.abstract.step, mesh=job.mesh).compile()
    state = job.fresh()
    with _feeds(job, 1) as feeds:
        feed = next(feeds)
        losses = [program(state, feed, jax.device_put(np.int32(n), state.step.sharding)) for n in range(2)]
    return len({np.asarray(x).tobytes() for x in losses}) > 1


def first_difference(reference: Job, other: Job, steps: int, tolerance: float) -> Difference | None:
    """Train both side by side, and compare them tensor by tensor on the host till one is past the tolerance.

    Args:
      reference: whose dispatches are of one step.
      other: the same job on another mesh, or in other microbatches.
      steps: to go at most.
      tolerance: relative, of norms.

    Returns:
      None where no gradient and no parameter is past it.
    """
    sides = [_Side(job) for job in (reference, other)]
    with contextlib.ExitStack() as stack:
        feeds = [stack.enter_context(_feeds(side.job, steps)) for side in sides]
        before = [side.params() for side in sides]
        if found := _compare(0, "parameter", before, tolerance, 0.0):
            return found
        for number, pair in enumerate(zip(*feeds, strict=True), 1):
            grads = [side.gradient(feed) for side, feed in zip(sides, pair, strict=True)]
            floor = CANCELLED * math.sqrt(sum(_norm(x) ** 2 for x in grads[0].values()))
            if found := _compare(number, "gradient", grads, tolerance, floor):
                return found
            after = [side.update(feed) for side, feed in zip(sides, pair, strict=True)]
            # What Adam makes of a gradient that is rounding is an update of full size: nothing to compare.
            real = [path for path, x in grads[0].items() if _norm(x) > floor]
            kept = [{path: params[path] for path in real} for params in after]
            if found := _compare(number, "parameter", kept, tolerance, 0.0):
                return found
    return None


class _Side:
    """One of two jobs: its state, and the programs to look into a step."""

    def __init__(self, job: Job) -> None:
        self.job, self.state = job, job.fresh()
        self._program = job.lower_train()[0].compile()
        gradient = job.gradient

        def grads(state: Any, feed: Any) -> Any:
            batch = job.augment(*_batch(job, state.step, feed), state.step)
            return gradient(state.params, state.extra, batch, step.streams(job.seed, state.step))[0]

        self._gradient = step.compile_step(grads, job.abstract, _abstract(job), mesh=job.mesh).compile()

    def params(self) -> dict[str, np.ndarray]:
        """Path -> parameter."""
        return {path: np.asarray(x) for path, x in leaves(self.state.params).items()}

    def gradient(self, feed: Any) -> dict[str, np.ndarray]:
        """Path -> gradient of the sum of losses."""
        return {path: np.asarray(x) for path, x in leaves(self._gradient(self.state, feed)).items()}

    def update(self, feed: Any) -> dict[str, np.ndarray]:
        """Make the step; the parameters after it."""
        self.state, _ = self._program(self.state, feed)
        return self.params()


def _abstract(job: Job) -> Any:
    return job.train.abstract_dispatch(1)


def _batch(job: Job, number: Any, feed: Any) -> tuple[Any, Any]:
    """The batch of a step from what its dispatch is given, and the index of its examples; traceable."""
    each = jax.tree.map(lambda x: x[number - feed["first"]], feed["each"])
    return job.train.batch(each, feed["every"]), each["index"]


def batches(job: Job, most: int = 1) -> Any:
    """The compiled program (step, feed of a dispatch) -> batch.

    Args:
      job: whose feed it is.
      most: steps that a dispatch has room for.
    """
    where = sharding.batch_sharding(job.mesh)

    def program(number: Any, feed: Any) -> Any:
        return _batch(job, number, feed)[0]

    feed = job.train.abstract_dispatch(most)
    return step.compile_step(program, job.abstract.step, feed, mesh=job.mesh, out_shardings=where).compile()


@contextlib.contextmanager
def _feeds(job: Job, steps: int) -> Iterator[Iterator[Any]]:
    with contextlib.closing(job.train.dispatches(job.seed, [(i, 1) for i in range(steps)], 1)) as feeds:
        yield feeds


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64).ravel()))


def _compare(
    number: int, what: str, sides: Sequence[Mapping[str, np.ndarray]], tolerance: float, floor: float
) -> Difference | None:
    """The first tensor of `b` past the tolerance of `a`'s."""
    past, (a, b) = [], sides
    for path, x in a.items():
        off, size = _norm(b[path].astype(np.float64) - x), max(_norm(x), floor)
        relative = off / size if size else (math.inf if off else 0.0)
        if not relative <= tolerance:  # NaN is past any
            past.append((path, relative))
    return Difference(number, what, *past[0], others=len(past) - 1) if past else None
