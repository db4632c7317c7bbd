"""Keras on JAX: a model, `compile`, and `fit` on arrays, which is how its users train."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

from flaxmodels.perf.peers.trainer import Trainer
from flaxmodels.perf.peers.works import ENDLESS, VOCABULARY, WARM, Work


class Ended(keras.callbacks.Callback):
    """Counts the steps that have ended, and takes the mean loss of the first ones, which Keras computes anyway.

    Args:
      each: steps of an execution, after which Keras calls.
    """

    async_safe = True  # else Keras would wait for every step

    def __init__(self, each: int = 1) -> None:
        super().__init__()
        self.steps, self._count = 0, itertools.count(each, each)
        self.loss: float | None = None

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        """Called in any thread."""
        self.steps = next(self._count)
        if batch >= WARM - 1 and self.loss is None and logs:
            self.loss = float(logs["loss"])


class Places(keras.layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Make the table, (T, D)."""
        self.table = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, x: Any) -> Any:
        """(B, T, D) -> (B, T, D)."""
        return x + self.table


def start(work: Work, folder: Path, cores: int, most: int = 1) -> Trainer:
    """Set up.

    Args:
      work: what to train.
      folder: with the data.
      cores: those that this process is pinned to.
      most: steps of an execution at the most; as many as divide those of an epoch.
    """
    keras.utils.set_random_seed(0)
    model = _MODELS[work.model](work.config["model"])
    inputs, targets = (np.load(folder / f"{name}.npy") for name in ("inputs", "targets"))
    if work.model == "mlp":
        inputs = inputs.reshape(len(inputs), -1)
    examples = len(inputs) if work.fed else work.ready * work.batch_size
    epoch = math.ceil(examples / work.batch_size)
    each = max(n for n in range(1, most + 1) if epoch % n == 0)
    model.compile(
        optimizer=_optimizer(**work.config["optim"]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=each,
    )
    inputs, targets, ended = inputs[:examples], targets[:examples], Ended(each)

    def run() -> None:
        model.fit(inputs, targets, batch_size=work.batch_size, epochs=ENDLESS, verbose=0, callbacks=[ended])

    def loss() -> float | None:  # the second epoch begins with another compilation
        return ended.loss if ended.steps > len(inputs) / work.batch_size + 1 else None

    versions = {"keras": keras.__version__, "jax": jax.__version__}
    return Trainer(run, lambda: ended.steps, loss, versions, model.count_params())


def _optimizer(
    name: str, learning_rate: float, b2: float = 0.999, weight_decay: float = 0.0, clip_norm: float | None = None
) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {"beta_2": b2, "epsilon": 1e-8, "global_clipnorm": clip_norm}
    if name == "adam":
        return keras.optimizers.Adam(learning_rate, **common)
    return keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay, **common)


def _dense(width: int, **options: Any) -> keras.layers.Layer:
    return keras.layers.Dense(width, kernel_initializer="lecun_normal", **options)


def _mlp(fields: Any) -> keras.Model:
    return keras.Sequential(
        [keras.Input((784,)), *(_dense(w, activation="relu") for w in fields["hidden"]), _dense(10)]
    )


def _cnn(fields: Any) -> keras.Model:
    def convolution(width: int) -> keras.layers.Layer:
        return keras.layers.Conv2D(width, 3, padding="same", activation="relu", kernel_initializer="lecun_normal")

    (first, second), rate = fields["features"], fields["dropout"]
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            convolution(first),
            keras.layers.MaxPooling2D(),
            convolution(second),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(rate),
            _dense(fields["dense"], activation="relu"),
            keras.layers.Dropout(rate),
            _dense(10),
        ]
    )


def _gelu(x: Any) -> Any:
    """As ours: by tanh."""
    return keras.activations.gelu(x, approximate=True)


def _gpt(fields: Any) -> keras.Model:
    layers, width, heads, length = (fields[name] for name in ("layers", "width", "heads", "max_length"))
    normal = keras.initializers.RandomNormal
    last = 0.02 / math.sqrt(2 * layers)

    def norm() -> keras.layers.Layer:
        return keras.layers.LayerNormalization(epsilon=1e-6, center=False)

    def linear(features: int, std: float = 0.02, **options: Any) -> keras.layers.Layer:
        return keras.layers.Dense(features, use_bias=False, kernel_initializer=normal(stddev=std), **options)

    tokens = keras.Input((length,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(VOCABULARY, width, embeddings_initializer=normal(stddev=0.02))
    x = Places()(embedding(tokens))
    for _ in range(layers):
        attention = keras.layers.MultiHeadAttention(
            heads, width // heads, use_bias=False, kernel_initializer=normal(stddev=0.02)
        )
        y = norm()(x)
        x = x + attention(y, y, use_causal_mask=True)
        x = x + linear(width, last)(linear(4 * width, activation=_gelu)(norm()(x)))
    return keras.Model(tokens, embedding(norm()(x), reverse=True))


_MODELS: Mapping[str, Callable[[Any], keras.Model]] = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}
