"""A conversation with a model: in which words it is put to it, and how much of it the model can see."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.data import chat, chat_jinja
from flaxmodels.data.chat import Message, Piece, Template
from flaxmodels.data.split import Tokenizer
from flaxmodels.registry import UserError, suggest


def template_of(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Template:
    """The template that a model knows: that which it was trained with; else that in its folder; else ChatML, whose
    marks the tokenizer has.

    A model that was trained on prompts and completions is given the last question as it is: it knows no turns.

    Args:
      folder: of the model: a workdir, or a directory of Hugging Face.
      config: what it was trained with: dotted key -> value.
      tokenizer: of the model.

    Raises:
      UserError: it knows none.
    """
    if config.get("data.messages"):
        return chat.pick(config.get("data.template"), str(config.get("data.tokens", "")))
    if config.get("data.prompt"):
        return Template("prompt", _question)
    if chat_jinja.find(str(folder)) is not None:
        return chat.pick(str(folder), "")
    if set(chat.TEMPLATES["chatml"].marks) <= set(tokenizer.special):
        return chat.TEMPLATES["chatml"]
    raise UserError(
        f"{str(folder)!r} does not say how conversations are written: is it a model for that? Name its template with "
        f"--template. {suggest('', chat.TEMPLATES)}"
    )


def _question(messages: Sequence[Message], prompt: bool, special: Collection[str]) -> list[Piece]:
    return [Piece(messages[-1]["content"])]


def ids_of(template: Template, tokenizer: Tokenizer, messages: Sequence[Message], most: int) -> tuple[list[int], int]:
    """A conversation up to where an answer begins, without the oldest turns where it is too long.

    What the system says first stays, and each turn that is left out goes with its answer.

    Args:
      template: how it is written.
      tokenizer: of the model.
      messages: the last is of the user.
      most: tokens that are seen.

    Returns:
      Its tokens, and how many messages were left out.

    Raises:
      UserError: the last message alone is too long.
    """
    first = int(messages[0]["role"] == "system")
    for left_out in range(0, len(messages) - first, 2):
        kept = [*messages[:first], *messages[first + left_out :]]
        ids, _ = chat.encode(template, tokenizer, kept, prompt=True)
        if len(ids) <= most:
            return ids.tolist(), left_out
    raise UserError(
        f"the message has {len(ids)} tokens with what stands around it, and there is room for {most}: shorten it."
    )
