"""Flax Linen models, each in one file of its own, and `build`, which makes one from a config.

A model is single-device code: `model(inputs, train=False)` returns float32 outputs, and its fields are all there is to
configure. How it is spread over a mesh is said elsewhere (`sharding.py`). The names below are imported only when they
are picked, so one model does not load the others.
"""

from typing import Any

import flax.linen as nn

from flaxmodels.registry import UserError, bind, pick

MODELS = {
    "mlp": "flaxmodels.models.mlp:MLP",
    "cnn": "flaxmodels.models.cnn:CNN",
    "resnet": "flaxmodels.models.resnet:ResNet",
    "transformer": "flaxmodels.models.transformer:Transformer",
}


def build(name: str, **fields: Any) -> nn.Module:
    """The module `name` with its `fields`, as the `model` section of a config gives them.

    Args:
      name: a key of `MODELS`, or `"package.module:Class"` for a Linen module of your own.
      **fields: the fields of that class. Lists become tuples.

    Raises:
      UserError: there is no such model, it is not a Linen module class, a field is unknown, missing or of the wrong
        type, or the module itself refuses the values.
    """
    cls = check_class(pick(MODELS, name, "model.name"), name)
    checked = bind(cls, fields, where="model")
    try:
        return cls(**checked)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def check_class(found: Any, name: str) -> type[nn.Module]:
    """`found`, which `name` stands for, if it is a class of Linen modules (UserError)."""
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(
            f"model.name={name!r} is {found!r}: expected a class that derives from flax.linen.Module. "
            "An NNX module needs a Linen wrapper: flax.nnx.bridge.to_linen_class."
        )
    return found
