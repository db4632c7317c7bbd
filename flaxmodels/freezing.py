"""Gradients of the parameters that train only: those of frozen ones are never computed, added up or kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels.metrics import Metrics
from flaxmodels.paths import path_of
from flaxmodels.step import Apply, Batch, Gradient


def freezing(make: Callable[[Apply], Gradient], apply: Apply, frozen: Callable[[str], bool]) -> Gradient:
    """The gradient `make(apply)`, zero for frozen parameters, which are constants to it.

    A backward pass so leaves out the products that give their gradients, and stops where nothing below trains; a sum
    over microbatches holds no zeros. The zeros of the result are constants that a compiler does not store.

    Args:
      make: apply -> gradient, such as `step.make_gradient`, with what wraps it.
      apply: of `step.make_apply`.
      frozen: path of a parameter -> whether it is.
    """

    def gradient(params: Any, extra: Any, batch: Batch, rngs: Any) -> tuple[Any, Any, Metrics]:
        trained, held = split(params, frozen)

        def rest(part: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
            return apply(joined(part, held), *arguments, **options)

        grads, extra, metrics = make(rest)(trained, extra, batch, rngs)
        return joined(grads, jax.tree.map(jnp.zeros_like, held)), extra, metrics

    return gradient


def split(tree: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """A tree as two: without the chosen leaves, and with these alone. None stands where the other one has a leaf."""
    keep = [
        jax.tree.map_with_path(lambda k, x, own=own: x if chosen(path_of(k)) is own else None, tree)
        for own in (False, True)
    ]
    return keep[0], keep[1]


def joined(one: Any, other: Any) -> Any:
    """The tree that was `split`."""
    return jax.tree.map(lambda x, y: y if x is None else x, one, other, is_leaf=lambda x: x is None)
