"""Chat templates that come with a tokenizer, written in Jinja, as Hugging Face's tokenizers have them.

They run in jinja2's sandbox. Each message is written as a placeholder, and its content put in afterwards: so it is
known where each one stands, and nothing in a content can act as a part of the template.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flaxmodels import storage
from flaxmodels.registry import UserError

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
# Of characters that no text has. The space around it says whether the template takes white space off a content.
_SPACE = "\u2003"
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)")


@dataclasses.dataclass(frozen=True)
class Written:
    """A template as it was found.

    Attributes:
      where: the file.
      source: the template.
      names: special tokens that it may name: bos_token, eos_token, ...
    """

    where: str
    source: str
    names: tuple[tuple[str, str], ...]


def find(path: str) -> Written | None:
    """The template in a file, or beside it, or in a folder; None where there is none. UserError for a damaged file."""
    at = storage.place(path).expanduser()
    if not path or not at.exists():
        return None
    folder = at if at.is_dir() else at.parent
    config: Mapping[str, Any] = {}
    if (file := at if at.suffix == ".json" and at.name != "tokenizer.json" else folder / CONFIG).is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} can't be read as JSON: {error}.") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} is {type(config).__name__}: expected a JSON object.")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = [one for one in source if isinstance(one, dict)]
        source = next((one.get("template") for one in named if one.get("name") == "default"), None)
    own = at if at.suffix in (".jinja", ".jinja2") else folder / FILE
    if own.is_file() and (at != file or source is None):
        try:
            file, source = own, own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{own} can't be read as text: {error}.") from error
    if not isinstance(source, str):
        return None
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    kept = {key: value for key, value in names.items() if key.endswith("_token") and isinstance(value, str)}
    return Written(str(file), source, tuple(sorted(kept.items())))


def render(written: Written, messages: Sequence[Mapping[str, str]], prompt: bool) -> Iterator[tuple[str, int | None]]:
    """The parts of a conversation, in order: (text of the template, None), or (content, number of its message).

    Raises:
      UserError: jinja2 is not installed, the template can't be compiled, refuses the messages, or leaves out the
        content of one of the assistant.
    """
    held = [{**m, "content": f"{_SPACE}\ue000{number}\ue001{_SPACE}"} for number, m in enumerate(messages)]
    template, errors = _compiled(written)
    try:
        text = template.render(messages=held, add_generation_prompt=prompt, tools=None, **dict(written.names))
    except errors as error:
        raise UserError(f"The chat template of {written.where} refuses a conversation: {error}.") from error
    at, seen = 0, set()
    for found in _PLACEHOLDER.finditer(text):
        if found.start() > at:
            yield text[at : found.start()], None
        number = int(found[2])
        content = messages[number]["content"]
        content = content if found[1] else content.lstrip()
        yield content if found[3] else content.rstrip(), number
        at = found.end()
        seen.add(number)
    if at < len(text):
        yield text[at:], None
    if left := [n for n, m in enumerate(messages) if m["role"] == "assistant" and n not in seen]:
        raise UserError(f"The chat template of {written.where} leaves out message {left[0]}, of the assistant.")


@functools.cache
def _compiled(written: Written) -> tuple[Any, tuple[type[Exception], ...]]:
    """The template, compiled with what those of Hugging Face may use; and what it may raise.

    Without `strftime_now`: what is learned must not depend on the day. Templates that ask for it name one of their own.
    """
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise UserError(
            f"The chat template of {written.where} needs the package jinja2: pip install jinja2. Or choose one of "
            "ours: data.template='chatml'."
        ) from error

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}, which marks answers: the same as what is in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(written.source), (jinja2.TemplateError, TypeError, ValueError)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{written.where}:{error.lineno}: the chat template is no Jinja: {error.message}.") from error
