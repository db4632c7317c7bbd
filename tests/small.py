"""Small jobs that tests share: one a model family, with BatchNorm and dropout, and data made on the spot."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import evaluate as evaluation
from flaxmodels import metrics
from flaxmodels.data.split import SKIP, Source, Split, gather_rows
from flaxmodels.data.synthetic import synthetic_images
from flaxmodels.job import Job
from flaxmodels.state import TrainState

IMAGES = dict(name="synthetic_images", batch_size=16)
TOKENS = dict(name="synthetic_tokens", batch_size=16)
ADAM = dict(name="adam", learning_rate=3e-3)


class Ordinary(nn.Module):
    """A module as people write them: its fields have defaults that JSON does not know."""

    classes: int
    activation: Any = nn.relu
    dtype: Any = jnp.float32
    widths: dict[str, int] = dataclasses.field(default_factory=lambda: {"hidden": 8})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.widths["hidden"], dtype=self.dtype)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.classes)(self.activation(x))


def config(model: str, **sections: Any) -> dict[str, Any]:
    """A config of a family: "mlp", "cnn" (BatchNorm), "resnet" or "transformer"."""
    models = {
        "mlp": dict(name="mlp", hidden=(64,), dropout=0.1),
        "cnn": dict(name="cnn", features=(8, 16), norm="batch", dropout=0.1, dense=64),
        "resnet": dict(name="resnet", width=8),
        "transformer": dict(name="transformer", layers=2, width=32, heads=2, dropout=0.1),
    }
    data = TOKENS if model == "transformer" else IMAGES
    base: dict[str, Any] = dict(model=models[model], data=data, optim=ADAM, train=dict(duration=20, log_every=1))
    for name, options in sections.items():
        base[name] = {**base.get(name, {}), **options} if isinstance(options, Mapping) else options
    return base


def train(job: Job, steps: int | None = None) -> tuple[TrainState, np.ndarray, list[str]]:
    """Train a job without the loop: (state, packed metrics (steps, names, 2), names)."""
    lowered, names = job.lower_train()
    program, state, most = lowered.compile(), job.fresh(), job.cadence.steps_per_dispatch
    total = steps or job.total_steps
    plan = [(first, min(most, total - first)) for first in range(0, total, most)]
    rows = []
    for (_, count), feed in zip(plan, job.train.dispatches(job.seed, plan, most), strict=True):
        state, packed = program(state, feed)
        rows.append(np.asarray(packed)[:count])
    return state, np.concatenate(rows), names


def means(packed: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Metric -> its mean at each step."""
    rows = [metrics.means({n: tuple(pair) for n, pair in zip(names, row.tolist())}) for row in packed]
    return {name: np.array([row[name] for row in rows]) for name in names}


def bits(tree: Any) -> list[bytes]:
    """The bytes of each leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


def evaluate(job: Job, state: TrainState) -> tuple[dict[str, float], float]:
    """(metrics, the weight that counted) of the whole evaluation split."""
    lowered, names = job.lower_eval()
    return evaluation.evaluate(lowered.compile(), state.params, state.extra, job.test.evaluation(), names)


def stored_images(
    examples: int = 1024, test_examples: int = 256, seed: int = 0, unreadable: tuple[int, ...] = ()
) -> Source:
    """`synthetic_images` as if it lay on a disk; `unreadable` training examples are left out."""
    source = synthetic_images(examples, test_examples, seed=seed)
    train = _stored(source.train, unreadable)
    return dataclasses.replace(source, name="stored_images", train=train, test=_stored(source.test, ()))


def _stored(split: Split, unreadable: tuple[int, ...]) -> Split:
    read = functools.partial(_read, held=dict(split.arrays), unreadable=unreadable)
    return dataclasses.replace(split, arrays={}, gather=read, stored=split.nbytes)


def _read(_: Any, index: np.ndarray, held: dict[str, np.ndarray], unreadable: tuple[int, ...]) -> dict[str, Any]:
    rows = gather_rows(held, index)
    skip = np.isin(index, unreadable)
    rows["image"][skip] = 0
    return rows | ({SKIP: skip} if unreadable else {})
