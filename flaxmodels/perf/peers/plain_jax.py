"""A train step written by hand in JAX and optax, as the tutorials of both write it: jit, donated state, no framework.

Metrics are waited for one step late, which is what bounds the steps under way.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxmodels.perf.peers.trainer import Trainer, stepping
from flaxmodels.perf.peers.works import VOCABULARY, Work

Params = dict[str, Any]


def start(work: Work, folder: Path, cores: int) -> Trainer:
    """Set up; the cores are those that this process is pinned to."""
    init, apply = MODELS[work.model]
    params, tx = init(jax.random.key(0), work.config["model"]), _optimizer(**work.config["optim"])
    rate, heads = work.config["model"].get("dropout", 0.0), work.config["model"].get("heads", 0)

    def loss_of(params: Params, inputs: Any, targets: Any, key: Any) -> jax.Array:
        logits = apply(params, inputs, key, rate or heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, opt_state: Any, inputs: Any, targets: Any, number: Any) -> tuple[Any, Any, Any]:
        key = jax.random.fold_in(jax.random.key(1), number)
        loss, grads = jax.value_and_grad(loss_of)(params, inputs, targets, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, before = tx.init(params), None
    batches = _batches(work, folder)

    def step(i: int) -> jax.Array:
        nonlocal params, opt_state, before
        inputs, targets = next(batches)
        params, opt_state, loss = update(params, opt_state, inputs, targets, i)
        jax.block_until_ready(before)
        before = loss
        return loss

    def mean(losses: Sequence[Any]) -> float:
        return float(np.mean(jax.device_get(losses)))

    versions = {"jax": jax.__version__, "optax": optax.__version__}
    return stepping(step, mean, versions, sum(x.size for x in jax.tree.leaves(params)))


def _batches(work: Work, folder: Path) -> Iterator[tuple[Any, Any]]:
    inputs, targets = (np.load(folder / f"{name}.npy") for name in ("inputs", "targets"))
    if work.model == "mlp":
        inputs = inputs.reshape(len(inputs), -1)
    size = work.batch_size
    if work.fed:
        return _shuffled(inputs, targets, size)
    cut = [slice(i * size, (i + 1) * size) for i in range(work.ready)]
    return itertools.cycle([jax.device_put((inputs[part], targets[part])) for part in cut])


def _shuffled(inputs: np.ndarray, targets: np.ndarray, size: int) -> Iterator[tuple[Any, Any]]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(inputs))
        for i in range(0, len(order) - size + 1, size):  # one shape: what is left over comes in another epoch
            rows = order[i : i + size]
            yield inputs[rows], targets[rows]


def _optimizer(
    name: str, learning_rate: float, b2: float = 0.999, weight_decay: float = 0.0, clip_norm: float | None = None
) -> optax.GradientTransformation:
    if name == "adam":
        return optax.adam(learning_rate, b2=b2)

    def matrices(params: Params) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    adamw = optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=matrices)
    return adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def _layers(key: Any, shapes: dict[str, tuple[int, ...]]) -> Params:
    lecun = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": lecun(one, shape), "b": jnp.zeros(shape[-1])} for one, (name, shape) in zip(keys, shapes.items())
    }


def _mlp_init(key: Any, fields: Any) -> Params:
    (hidden,) = fields["hidden"]
    return _layers(key, {"hidden": (784, hidden), "head": (hidden, 10)})


def _mlp(params: Params, x: Any, key: Any, _: float) -> Any:
    x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]


def _cnn_init(key: Any, fields: Any) -> Params:
    (first, second), dense = fields["features"], fields["dense"]
    return _layers(
        key,
        {"0": (3, 3, 1, first), "1": (3, 3, first, second), "dense": (second * 7 * 7, dense), "head": (dense, 10)},
    )


def _cnn(params: Params, x: Any, key: Any, rate: float) -> Any:
    def convolved(x: Any, layer: Params) -> Any:
        x = jax.lax.conv_general_dilated(x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + layer["b"])
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def dropped(x: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)

    first, second = jax.random.split(key)
    x = convolved(convolved(x, params["0"]), params["1"])
    x = dropped(x.reshape(len(x), -1), first)
    x = jax.nn.relu(x @ params["dense"]["w"] + params["dense"]["b"])
    return dropped(x, second) @ params["head"]["w"] + params["head"]["b"]


def _gpt_init(key: Any, fields: Any) -> Params:
    layers, width, length = fields["layers"], fields["width"], fields["max_length"]
    random = (jax.random.fold_in(key, i) for i in itertools.count())

    def normal(*shape: int, std: float = 0.02) -> Any:
        return std * jax.random.normal(next(random), shape)

    last = 0.02 / math.sqrt(2 * layers)
    return {
        "tokens": normal(VOCABULARY, width),
        "places": normal(length, width),
        "norm": jnp.ones(width),
        "blocks": [
            {
                "norm_attention": jnp.ones(width),
                "qkv": normal(width, 3 * width),
                "out": normal(width, width, std=last),
                "norm_mlp": jnp.ones(width),
                "up": normal(width, 4 * width),
                "down": normal(4 * width, width, std=last),
            }
            for _ in range(layers)
        ],
    }


def _gpt(params: Params, tokens: Any, key: Any, heads: int) -> Any:
    x = params["tokens"][tokens] + params["places"]
    for block in params["blocks"]:
        q, k, v = (
            y.reshape(*y.shape[:2], heads, -1)
            for y in jnp.split(_norm(x, block["norm_attention"]) @ block["qkv"], 3, axis=-1)
        )
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(_norm(x, block["norm_mlp"]) @ block["up"]) @ block["down"]
    return _norm(x, params["norm"]) @ params["tokens"].T


def _norm(x: Any, scale: Any) -> Any:
    return jax.nn.standardize(x, epsilon=1e-6) * scale


MODELS: dict[str, tuple[Callable[..., Params], Callable[..., Any]]] = {
    "mlp": (_mlp_init, _mlp),
    "cnn": (_cnn_init, _cnn),
    "gpt": (_gpt_init, _gpt),
}
