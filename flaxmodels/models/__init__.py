"""Flax models, and `build`, which makes one from a config.

A model is single-device code: `model(inputs, train=False)` returns float32 outputs, and its fields are all there is to
configure. How it is spread over a mesh is said elsewhere (`sharding.py`). The names below are imported only when they
are picked, so one model does not load the others. Ours are Linen modules; one of your own may be an NNX module, which
`from_nnx.py` turns into a Linen one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from flaxmodels.registry import UserError, bind, pick, suggest

MODELS = {
    "mlp": "flaxmodels.models.mlp:MLP",
    "cnn": "flaxmodels.models.cnn:CNN",
    "ngrams": "flaxmodels.models.ngrams:NGrams",
    "resnet": "flaxmodels.models.resnet:ResNet",
    "transformer": "flaxmodels.models.transformer:Transformer",
    "classifier": "flaxmodels.models.classifier:TextClassifier",
    "bert": "flaxmodels.models.bert:Bert",
    "bert_classifier": "flaxmodels.models.bert:BertClassifier",
    "vit": "flaxmodels.models.vit:ViT",
}


def expand(options: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a config with the fields of a preset, where its name is one.

    Args:
      options: "name" and fields.

    Returns:
      The name of the model, the fields of the preset, and those of `options`, which count where both have one. What
      names a model, or one of your own, comes back as it is.

    Raises:
      UserError: the name is neither a model's nor a preset's.
    """
    from flaxmodels.models.presets import PRESETS

    name = options.get("name")
    if not isinstance(name, str) or name in MODELS or ":" in name:
        return dict(options)
    if name not in PRESETS:
        raise UserError(
            f"model.name={name!r} does not exist. {suggest(name, (*MODELS, *PRESETS))} "
            'Your own is named "package.module:attribute".'
        )
    model, fields = PRESETS[name]
    return {**fields, **options, "name": model}


def build(name: str, **fields: Any) -> nn.Module:
    """The module `name` with its `fields`, as the `model` section of a config gives them.

    Args:
      name: a key of `MODELS`, or `"package.module:Class"` for a Linen or an NNX module of your own.
      **fields: the fields of that class, of an NNX module the arguments of its constructor. Lists become tuples.

    Raises:
      UserError: there is no such model, it is not a class of Flax modules, a field is unknown, missing or of the wrong
        type, or the module itself refuses the values.
    """
    make = check_class(pick(MODELS, name, "model.name"), name)
    checked = bind(make, fields, where="model")
    try:
        return make(**checked)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def check_class(found: Any, name: str) -> Callable[..., nn.Module]:
    """What makes modules of the class `found`: itself, or a function with the signature of an NNX class.

    Args:
      found: what `name` stands for.
      name: for the message.

    Raises:
      UserError: it is not a class of Flax modules.
    """
    bases = found.__mro__ if isinstance(found, type) else ()
    if nn.Module in bases:
        return found
    if any(base.__module__ == "flax.nnx.module" for base in bases):  # asking NNX itself would load it for every model
        from flaxmodels.models import from_nnx

        return from_nnx.maker(found)
    raise UserError(
        f"model.name={name!r} is {found!r}: expected a class that derives from flax.linen.Module or flax.nnx.Module."
    )
