"""Conversations as tokens: chat templates, and which parts of a conversation a model learns.

A template turns messages into pieces: text, and special tokens ("marks") by name. What a message says is always text:
the name of a mark in it is encoded letter by letter, so that nobody ends a turn, or begins one, by writing so. Learned
is what the assistant says, with the mark that ends it; a text is encoded by itself where learning begins and ends, as
it is when a model answers.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from flaxmodels.data import chat_jinja, tokenizer
from flaxmodels.data.split import Tokenizer
from flaxmodels.registry import UserError, suggest

# {"role": one of ROLES, "content": text}
Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
# What others call them, in the keys "from" and "value".
_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a conversation.

    Attributes:
      text: to encode; of a mark its name, or "" for the token that ends a document.
      mark: whether it is a special token.
      learned: whether it is a target of the loss.
    """

    text: str
    mark: bool = False
    learned: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
      name: for messages.
      pieces: (messages, whether an answer is asked for, names of special tokens) -> pieces.
      marks: names of the special tokens that it needs.
    """

    name: str
    pieces: Callable[[Sequence[Message], bool, Collection[str]], list[Piece]]
    marks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Turns:
    """A template that writes one turn after the other.

    Attributes:
      header: what stands before a turn, with {role} or {Role}.
      footer: the mark that ends a turn; "" the token that ends a document.
      after: what stands after it.
      begin: what stands before all turns.
      lead: what stands before the content of a turn, and is learned with it.
      assistant: the name of that role.
      system: whether it is a role; else what the system says stands before what the user does.
      strip: whether contents lose white space at their ends.
    """

    header: str
    footer: str = ""
    after: str = ""
    begin: str = ""
    lead: str = ""
    assistant: str = "assistant"
    system: bool = True
    strip: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of special tokens."""
        return tuple(dict.fromkeys(_MARK.findall(self.begin + self.header + self.footer)))

    def pieces(self, messages: Sequence[Message], prompt: bool, special: Collection[str]) -> list[Piece]:
        """See `Template.pieces`."""
        found = _cut(self.begin, self.marks)
        for message in messages if self.system else _without_system(messages):
            learned = message["role"] == "assistant"
            content = message["content"].strip() if self.strip else message["content"]
            found += self._head(message["role"])
            found += [Piece(self.lead + content, learned=learned), Piece(self.footer, True, learned), Piece(self.after)]
        return found + (self._head("assistant") if prompt else [])

    def _head(self, role: str) -> list[Piece]:
        role = self.assistant if role == "assistant" else role
        return _cut(self.header.format(role=role, Role=role.capitalize()), self.marks)


_MARK = re.compile(r"<[^<>\n]+>")
_TURNS = {
    "chatml": _Turns("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": _Turns(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", begin="<|begin_of_text|>", strip=True
    ),
    "gemma": _Turns(
        "<start_of_turn>{role}\n", "<end_of_turn>", "\n", "<bos>", assistant="model", system=False, strip=True
    ),
    "plain": _Turns("{Role}:", lead=" "),
}
# ChatML (OpenAI, 2023; Qwen), Llama 3 (arXiv:2407.21783), Gemma (arXiv:2403.08295), and one without marks of its own.
TEMPLATES: Mapping[str, Template] = {name: Template(name, t.pieces, t.marks) for name, t in _TURNS.items()}


def pick(name: str | None, tokens: str) -> Template:
    """The template that the option `template` of a data source means.

    Args:
      name: a key of `TEMPLATES`; or the path of a Jinja template (`chat_template.jinja`), of a `tokenizer_config.json`
        with one, or of a folder with either. None: that of the tokenizer's folder where there is one, else "chatml".
      tokens: the option `tokens`: a kind of tokens, or a path.

    Raises:
      UserError: neither a template nor a file with one; or jinja2 is not installed.
    """
    if name is not None and name in TEMPLATES:
        return TEMPLATES[name]
    own = "" if tokens in tokenizer.KINDS else tokens
    written = chat_jinja.find(own if name is None else name)
    if written is None:
        if name is None:
            return TEMPLATES["chatml"]
        raise UserError(
            f"data.template={name!r} is neither a template nor a file with one: chat_template.jinja, or "
            f"tokenizer_config.json with the key chat_template. {suggest(name, TEMPLATES)}"
        )

    def pieces(messages: Sequence[Message], prompt: bool, special: Collection[str]) -> list[Piece]:
        found: list[Piece] = []
        answered = False  # up to the mark that ends it, what follows an answer is learned with it
        for text, number in chat_jinja.render(written, messages, prompt):
            if number is None:
                for piece in _cut(text, special):
                    found.append(dataclasses.replace(piece, learned=answered))
                    answered = answered and not piece.mark
            else:
                answered = messages[number]["role"] == "assistant"
                found.append(Piece(text, learned=answered))
        return found

    return Template(written.where, pieces)


def encode(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as tokens.

    Args:
      template: how it is written.
      tokenizer: with all marks of the template: see `tokenizer.extended`.
      messages: of the conversation.
      prompt: end with what stands before an answer, for a model to go on.

    Returns:
      The tokens (N,), and which of them are learned, (N,) bool.
    """
    tokens, _, learned = encode_many(template, tokenizer, [messages], prompt=prompt)
    return tokens, learned


def encode_many(
    template: Template, made: Tokenizer, conversations: Sequence[Sequence[Message]], *, prompt: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conversations as tokens, one after the other: `encode` of each.

    Returns:
      The tokens (N,), the place after the last of each conversation, (D,) int64, and which are learned, (N,) bool.

    Raises:
      UserError: the tokenizer lacks a mark of the template, or the template refuses a conversation.
    """
    ids = {**made.special, "": made.end}
    pieces = [_joined(template.pieces(messages, prompt, made.special)) for messages in conversations]
    flat = [piece for of_one in pieces for piece in of_one]
    if lacking := [piece.text for piece in flat if piece.mark and ids.get(piece.text) is None]:
        what = repr(lacking[0]) if lacking[0] else "that ends a document"
        raise UserError(f"The template {template.name!r} needs a special token {what}, and the tokenizer has none.")
    texts = iter(tokenizer.encode_many(made, [piece.text for piece in flat if not piece.mark]))
    found = [np.array([ids[piece.text]], np.int64) if piece.mark else next(texts).astype(np.int64) for piece in flat]
    sizes = np.array([len(part) for part in found], np.int64)
    last = np.cumsum([len(of_one) for of_one in pieces], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *found]).astype(np.min_scalar_type(made.size - 1))
    learned = np.repeat(np.array([piece.learned for piece in flat], bool), sizes)
    return tokens, np.concatenate([[0], np.cumsum(sizes)])[last], learned


def stops(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: the marks that are learned with one, and the end of a document."""
    asked = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    names = [p.text for p in template.pieces(asked, False, tokenizer.special) if p.mark and p.learned]
    ids = [*(tokenizer.special.get(name) for name in names if name), tokenizer.end]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def checked(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a conversation with an answer in it.

    Args:
      value: [{"role": ..., "content": ...}, ...], or with the keys "from" and "value", as ShareGPT writes it.
      where: for messages.

    Raises:
      UserError: it is something else, or has no answer of the assistant.
    """
    expected = f'expected a list of {{"role": one of {", ".join(ROLES)}, "content": a text}}'
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: a conversation is {type(value).__name__}: {expected}.")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: message {number} is {type(message).__name__}: {expected}.")
        role = message.get("role", message.get("from"))
        role = _ALIASES.get(str(role), role)
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r}. {suggest(role, ROLES)}")
        if not isinstance(content, str) or not content:
            raise UserError(f"{where}: message {number}, of the {role}, has no text: {expected}.")
        if role == "system" and number:
            raise UserError(f"{where}: message {number} is of the system: expected it to be the first, or none.")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: the assistant says nothing, so there is nothing to learn. Take the row out.")
    return tuple(messages)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """What the system says, before the first message of the user."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    first = next((number for number, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise UserError("This template has no place for what the system says, but before a message of the user.")
    rest[first] = {**rest[first], "content": f"{system['content'].strip()}\n\n{rest[first]['content']}"}
    return rest


def _cut(text: str, marks: Collection[str]) -> list[Piece]:
    """A text at the marks in it."""
    if not marks:
        return [Piece(text)]
    longest = sorted(marks, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest))})", text)
    return [Piece(part, mark=bool(place % 2)) for place, part in enumerate(parts) if part]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Texts that stand side by side, and are both learned or both not, as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and not piece.mark and not found[-1].mark and piece.learned == found[-1].learned:
            found[-1] = dataclasses.replace(found[-1], text=found[-1].text + piece.text)
        elif piece.text or piece.mark:
            found.append(piece)
    return found
