"""Losses: (outputs, batch) -> {"loss": (sum, count), "accuracy": (sum, count), ...}.

The only place of numerics that turn outputs into numbers. Everything is computed in float32. `batch["weights"]` has
the shape of the targets it weighs; a weight of 0 takes an element out of sums and counts, and, where its outputs are
finite, out of the gradient.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flaxmodels import chunked, registry
from flaxmodels.metrics import Metrics, weighted
from flaxmodels.registry import Fraction, Positive

Loss = Callable[[Any, Mapping[str, Any]], Metrics]
Extra = Literal["accuracy", "top_k", "perplexity", "bits_per_byte"]


def softmax_cross_entropy(
    outputs: jax.Array | Mapping[str, jax.Array],
    batch: Mapping[str, Any],
    *,
    label_smoothing: Fraction = 0.0,
    z_loss: float = 0.0,
    metrics: tuple[Extra, ...] = ("accuracy",),
    top_k: Positive = 5,
    token_bytes: tuple[int, ...] | None = None,
    chunks: Positive = 1,
) -> Metrics:
    """Cross-entropy of logits with class numbers or probabilities, in nats; one target an example, or one a token.

    Args:
      outputs: logits (..., classes), any float dtype; or what a model with `split_head` returns,
        {"features": (..., D), "kernel": (D, classes)} of one float dtype, whose product the logits are.
      batch: {"targets": (...) int, or (..., classes) float, the probabilities of the classes, as mixup makes them;
        "weights": (...)}. To "accuracy" and "top_k" the most probable class is the target, of equal ones the first.
      label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv:1512.00567).
      z_loss: weight of log(Z)^2, which keeps logits from drifting (Chowdhery et al. 2022, arXiv:2204.02311, sec. 5).
      metrics: what to report beside the loss. "perplexity" and "bits_per_byte" leave out smoothing and z-loss.
      top_k: k of the metric "top_k".
      token_bytes: UTF-8 bytes of each of the classes, for "bits_per_byte"; the data source knows it.
      chunks: parts into which each device cuts its tokens, so that it holds the logits of one part at a time. Then only
        "loss" has a gradient, by features and kernel. The gradient of the kernel, (D, classes) float32, is held as
        well: a part of fewer than D tokens saves little more, so choose tokens of a device / D or somewhat above (16
        for 8 x 1,024 tokens of width 768), with at least 256 tokens a part, or the matrix units idle.

    Returns:
      (sum, count) of "loss" and of each of `metrics`.

    Raises:
      ValueError: fewer than 2 classes; integer targets do not have the shape of outputs without their last axis, float
        ones not that of outputs, or weights not the former; parts of a head that do not fit each other.
      UserError: "bits_per_byte" without `token_bytes` or of float targets, `top_k` over the number of classes, or
        `chunks` of logits, which are there already.
    """
    features, kernel = _head(outputs)
    targets, weights = batch["targets"], batch["weights"]
    shape = features.shape if kernel is None else (*features.shape[:-1], kernel.shape[-1])
    soft = jnp.issubdtype(targets.dtype, jnp.floating)
    _check_classes(shape, targets, weights, soft)
    if "top_k" in metrics and top_k > shape[-1]:
        raise registry.UserError(f"loss.top_k={top_k} is over the {shape[-1]} classes of the outputs.")
    if "bits_per_byte" in metrics and token_bytes is None:
        raise registry.UserError("loss.metrics has 'bits_per_byte', but this data is not text: leave it out.")
    if "bits_per_byte" in metrics and soft:
        raise registry.UserError("loss.metrics has 'bits_per_byte', but the targets are probabilities: leave it out.")
    measure = partial(
        _of_logits,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        metrics=metrics,
        top_k=top_k,
        token_bytes=token_bytes,
    )
    batch = {"targets": targets, "weights": weights}
    if kernel is None:
        if chunks > 1:
            raise registry.UserError(
                f"loss.chunks={chunks} is for a model that leaves its last layer to the loss, such as "
                "model.name='transformer' with model.split_head=True. These outputs are logits, all there already: "
                "leave loss.chunks out."
            )
        return measure(features.astype(jnp.float32), batch)
    if chunks == 1:
        return measure(chunked.product(features, kernel), batch)
    return chunked.summed(measure, chunks, features, kernel, batch)


def is_head(outputs: Any) -> bool:
    """Whether these are the parts of a split head: {"features", "kernel"}."""
    return isinstance(outputs, Mapping) and set(outputs) == {"features", "kernel"}


def _head(outputs: jax.Array | Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """(logits, None), or the features and the kernel of a split head."""
    if not isinstance(outputs, Mapping):
        return outputs, None
    if not is_head(outputs):
        raise ValueError(
            f"outputs have the keys {sorted(outputs)}: expected logits, or the parts of a head, features and kernel."
        )
    features, kernel = outputs["features"], outputs["kernel"]
    if kernel.ndim != 2 or features.shape[-1:] != kernel.shape[:1] or features.dtype != kernel.dtype:
        raise ValueError(
            f"features have shape {features.shape} and dtype {features.dtype}, the kernel {kernel.shape} and "
            f"{kernel.dtype}: expected (..., D) and (D, classes) of one dtype."
        )
    return features, kernel


def _check_classes(shape: tuple[int, ...], targets: jax.Array, weights: jax.Array, soft: bool) -> None:
    if shape[-1] < 2:  # of one class, any output has loss 0, and is right
        raise ValueError(
            f"outputs have shape {shape}, and softmax_cross_entropy is of at least 2 classes. For numbers set "
            "loss.name=mean_squared_error, for one answer of yes or no sigmoid_cross_entropy; targets that number "
            "classes must be integers, which floats such as 0.0, 1.0 and 2.0 are not."
        )
    expected = shape if soft else shape[:-1]
    if targets.shape != expected:  # broadcasting here would be silent nonsense
        raise ValueError(
            f"outputs have shape {shape}, targets {targets.shape}: "
            f"expected {expected} for the targets, of {targets.dtype}."
        )
    if weights.shape != shape[:-1]:
        raise ValueError(f"outputs have shape {shape}, weights {weights.shape}: expected {shape[:-1]} for the weights.")


def _of_logits(
    logits: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    label_smoothing: float,
    z_loss: float,
    metrics: tuple[Extra, ...],
    top_k: int,
    token_bytes: tuple[int, ...] | None,
) -> Metrics:
    """`softmax_cross_entropy` of logits (..., classes) float32, checked."""
    targets, weights = batch["targets"], batch["weights"]
    soft = jnp.issubdtype(targets.dtype, jnp.floating)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of an index: its gradient is no scatter, and logits sharded over classes stay sharded.
    # Both int32: the ids of 300 classes do not fit into targets of uint8.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    wanted = (jnp.argmax(targets, axis=-1) if soft else targets)[..., None].astype(jnp.int32)
    hit = ids == wanted
    target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    nll = _cross_entropy(logits, log_z, targets) if soft else log_z - target_logit
    loss = nll
    if label_smoothing:  # times 0 would be NaN where a model masks a class by a logit of minus infinity
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    if z_loss:
        loss += z_loss * log_z**2
    # The place of the target among the logits; of equal ones the first wins, as in argmax. Nothing is under a NaN, so
    # a model that has diverged is never right.
    best = target_logit[..., None]
    ahead = jnp.where(ids < wanted, ~(logits < best), ~(logits <= best))
    rank = jnp.sum(ahead, axis=-1)
    found = {"loss": weighted(loss, weights)}
    for name in metrics:
        found[name] = {
            "accuracy": lambda: weighted(rank == 0, weights),
            "top_k": lambda: weighted(rank < top_k, weights),
            "perplexity": lambda: weighted(nll, weights),
            "bits_per_byte": lambda: _per_byte(nll, targets, weights, token_bytes),
        }[name]()
    return found


def _cross_entropy(logits: jax.Array, log_z: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum of p log q over the classes. A class of probability 0 has no part, also where its logit is not finite."""
    p = targets.astype(jnp.float32)
    return -jnp.sum(jnp.where(p == 0, 0.0, p * (logits - log_z[..., None])), axis=-1)


def _per_byte(nll: jax.Array, targets: jax.Array, weights: jax.Array, token_bytes: Any) -> tuple[jax.Array, jax.Array]:
    sizes = jnp.asarray(token_bytes, jnp.float32)[targets]
    return weighted(nll, weights)[0], jnp.sum(sizes * weights)


def sigmoid_cross_entropy(outputs: jax.Array, batch: Mapping[str, Any], *, label_smoothing: Fraction = 0.0) -> Metrics:
    """Binary cross-entropy of logits, in nats, for one label or many independent ones an example.

    Args:
      outputs: logits (B,) or (B, ..., labels).
      batch: {"targets": same shape as outputs, 0 to 1; "weights": (B, ...), shape of a prefix of outputs}.
      label_smoothing: moves targets towards 1/2 by this share.

    Returns:
      (sum, count) of "loss" and "accuracy" (right side of 0), both averaged over labels.

    Raises:
      ValueError: outputs and targets differ in shape.
    """
    logits, targets = _matching(outputs, batch)
    smooth = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    loss = jax.nn.softplus(logits) - logits * smooth
    right = (logits > 0) == (targets > 0.5)
    return {"loss": _per_row(loss, batch["weights"]), "accuracy": _per_row(right, batch["weights"])}


def mean_squared_error(outputs: jax.Array, batch: Mapping[str, Any]) -> Metrics:
    """Mean over all axes of (output - target)^2.

    Args:
      outputs: (B, ...) any float dtype.
      batch: {"targets": same shape; "weights": (B, ...), shape of a prefix of outputs}.

    Returns:
      (sum, count) of "loss" and "absolute_error".

    Raises:
      ValueError: outputs and targets differ in shape.
    """
    outputs, targets = _matching(outputs, batch)
    error = outputs - targets
    weights = batch["weights"]
    return {"loss": _per_row(error**2, weights), "absolute_error": _per_row(jnp.abs(error), weights)}


def _matching(outputs: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    if isinstance(outputs, Mapping):
        raise ValueError(
            f"outputs have the keys {sorted(outputs)}: expected one array. Only loss.name=softmax_cross_entropy takes "
            "the parts of a head: for others leave model.split_head out."
        )
    if outputs.shape != batch["targets"].shape:  # broadcasting here would be silent nonsense
        raise ValueError(f"outputs have shape {outputs.shape}, targets {batch['targets'].shape}: expected the same.")
    return outputs.astype(jnp.float32), batch["targets"].astype(jnp.float32)


def _per_row(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean over the axes that weights do not have, then the weighted pair."""
    return weighted(jnp.mean(values, axis=tuple(range(weights.ndim, values.ndim)), dtype=jnp.float32), weights)


LOSSES: Mapping[str, Callable[..., Metrics]] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "mean_squared_error": mean_squared_error,
}

# Options that shape the gradient; an evaluation leaves them out, so that its loss compares across configs.
REGULARISERS = ("label_smoothing", "z_loss")


def make(name: str = "softmax_cross_entropy", **options: Any) -> tuple[Loss, Loss]:
    """The loss to train with, and the one to evaluate with (the same without `REGULARISERS`).

    Args:
      name: a key of `LOSSES`, or "package.module:function" of the same form.
      **options: keyword arguments of that function.

    Raises:
      UserError: the name or an option does not exist, or has the wrong type.
    """
    function = registry.pick(LOSSES, name, "loss.name")
    options = registry.bind(function, options, where="loss", provided=("outputs", "batch"))
    kept = {k: v for k, v in options.items() if k not in REGULARISERS}
    return partial(function, **options), partial(function, **kept)
