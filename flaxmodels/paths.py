"""The one way to write where an array stands in a tree: what rules match, messages name, and files store."""

from typing import Any

import jax


def path_of(keys: tuple[Any, ...]) -> str:
    """A pytree path as text: "params/blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")
