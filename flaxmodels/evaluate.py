"""One full weighted pass over a split: every example counts once, also in a padded last batch."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flaxmodels import metrics
from flaxmodels.runtime import progress

# Batches in flight: enough to overlap transfer and compute; an unbounded number hangs XLA's CPU collectives.
IN_FLIGHT = 2


class StoppedError(Exception):
    """An evaluation was asked to stop before its end; it has no result."""


def evaluate(
    program: Callable[..., Any],
    params: Any,
    extra: Any,
    batches: Iterable[tuple[Any, Any]],
    names: Sequence[str],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], float]:
    """Run `program` over all batches and take the means once.

    Args:
      program: compiled (params, extra, each, every) -> packed metrics (names, 2) float32.
      params: parameters, or their average.
      extra: the model's other collections.
      batches: what `Feed.evaluation` yields.
      names: of the packed metrics, sorted.
      stop: asked between batches.

    Returns:
      (means by name, the weight that counted: examples, or tokens of a language model).

    Raises:
      StoppedError: `stop` said so.
    """
    totals = np.zeros((len(names), 2), np.float64)
    waiting: deque[Any] = deque()
    for each, every in batches:
        if stop():
            raise StoppedError
        waiting.append(program(params, extra, each, every))
        if len(waiting) > IN_FLIGHT:
            totals += _ended(waiting.popleft())
    for packed in waiting:
        totals += _ended(packed)
    pairs = {name: (total, count) for name, (total, count) in zip(names, totals.tolist())}
    return metrics.means(pairs), pairs["loss"][1]


def _ended(packed: jax.Array) -> np.ndarray:
    """The result of a batch, when it is there: only then something has moved on."""
    found = np.asarray(jax.block_until_ready(packed))
    progress.beat()
    return found
