"""From tokens to text as they come: whole characters only, and no more where a stop string begins.

A token may be a part of a character, and a stop string may begin in one token and end in another. So what is given out
is held back while the next tokens may still change it, and no longer.
"""

from collections.abc import Sequence

from flaxmodels.data.split import Tokenizer
from flaxmodels.registry import UserError

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or none yet


def check(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings, none of them empty (UserError)."""
    if "" in stops:
        raise UserError("a stop string is empty: every text ends with it. Leave it out.")
    return tuple(stops)


class Reader:
    """The text of one request, token by token; all that `push` and `close` give makes up the whole.

    Args:
      tokenizer: that decodes.
      prompt: ids before the first token; not a part of the text, but the spaces of its first word may depend on them.
      stops: strings before which the text ends.

    Attributes:
      stopped: whether a stop string was there; all after it is nothing.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, check(stops)
        self._context = self._whole(prompt)  # ids that are decoded with the new ones, and not given out again
        self._ids: list[int] = []
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def _whole(self, prompt: Sequence[int]) -> list[int]:
        """The last ids of a prompt that begin with a whole character."""
        for size in range(1, len(prompt) + 1):
            text = self._tokenizer.decode(prompt[-size:])
            if text and not text.startswith(BROKEN):
                return list(prompt[-size:])
        return []

    def push(self, token: int) -> str:
        """Read the next token; the text that is certain by now, and was not given out before."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(BROKEN):  # the next token may complete the character
            return ""
        self._context, self._ids = self._ids, []
        return self._out(text, last=False)

    def close(self) -> str:
        """There are no more tokens: the text that was held back."""
        text, self._ids = self._new() if self._ids else "", []
        return self._out(text, last=True)

    def _new(self) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode([*self._context, *self._ids])[len(before) :]

    def _out(self, text: str, *, last: bool) -> str:
        """What of the held text and `text` can be given out."""
        if self.stopped:
            return ""
        whole = self._held + text
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[: min(found)]
        keep = 0 if last else max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text begin a stop string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
