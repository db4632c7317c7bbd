"""What a config need not say of its model: fields that follow from the data, the precision and the loss."""

from collections.abc import Mapping
from typing import Any

from flaxmodels import registry, sections
from flaxmodels.data.split import Source
from flaxmodels.registry import UserError


def fill(
    model: Mapping[str, Any], source: Source, *, precision: Mapping[str, Any], compute: str, chunks: int
) -> dict[str, Any]:
    """The options of a model, complete.

    Args:
      model: the section of the config.
      source: the data: its facts, such as the number of classes.
      precision: the section of the config.
      compute: the dtype that follows from it.
      chunks: of the loss; over 1, the model must leave its head to the loss.

    Raises:
      UserError: a field contradicts what it follows from, or is missing and nothing tells it.
    """
    options = dict(model)
    fields = registry.parameters([sections.model_class(options)])
    _facts(options, fields, source)
    _check_causal(options, fields, source)
    if "dtype" in fields:
        dtype = options.setdefault("dtype", compute)
        if precision.get("compute", "auto") not in ("auto", dtype):
            raise UserError(
                f"model.dtype={dtype!r} contradicts precision.compute={precision['compute']!r}: leave one of them out."
            )
    if chunks > 1:
        if "split_head" not in fields:
            raise UserError(
                f"loss.chunks={chunks} needs a model that leaves its last layer to the loss, by a field split_head; "
                f"model.name={options['name']!r} has none. Leave loss.chunks out."
            )
        if not options.setdefault("split_head", True):
            raise UserError(f"model.split_head=False contradicts loss.chunks={chunks}: leave one of them out.")
    return options


def _facts(options: dict[str, Any], fields: Mapping[str, Any], source: Source) -> None:
    """Fields that the data know: set where the config leaves them out, checked where it does not."""
    for key, value in source.facts.items():
        if key in fields and isinstance(value, bool) and options.setdefault(key, value) != value:
            raise UserError(
                f"model.{key}={options[key]} contradicts data.objective, which needs {key}={value}: leave it out."
            )
        if key in fields and options.setdefault(key, value) < value:
            raise UserError(
                f"model.{key}={options[key]} is too small: data {source.name!r} has {key}={value}. "
                "Leave it out to take it from the data."
            )
    for key in sections.SECTIONS["model"].filled:
        if key in fields and fields[key].default is fields[key].empty and key not in options:
            knows = ", ".join(f"{name}={value}" for name, value in source.facts.items()) or "nothing of the kind"
            raise UserError(
                f"model.{key} is not set, and data {source.name!r} does not tell: it knows {knows}. "
                f"Is model.name={options['name']!r} for such data? If so, set --config.model.{key}=NUMBER."
            )


def _check_causal(options: Mapping[str, Any], fields: Mapping[str, Any], source: Source) -> None:
    """UserError where a model sees both sides of the text that it is to predict: it would see its targets."""
    if "causal" not in fields or options.get("causal", fields["causal"].default) or source.facts.get("causal") is False:
        return
    if source.tokenizer is not None and "classes" not in source.facts:
        raise UserError(
            f"model.name={options['name']!r} sees the tokens on both sides (causal=False), and of data "
            f"{source.name!r} each next token is learned, which it would see: set --config.data.objective.name=masked, "
            "or use a model with causal=True."
        )
