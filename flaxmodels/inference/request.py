"""One request of generation: the text in the making, and what of it is new."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

from flaxmodels.inference import decoding
from flaxmodels.inference.stops import Reader
from flaxmodels.runtime.exits import FaultError

Ended = Literal["", "end", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request has new, or, of `complete`, all of it.

    Attributes:
      request: its number, from 0.
      text: that is certain by now; "" without a tokenizer.
      tokens: ids; an id that ended the text is not among them.
      ended: "" while there is more to come; "end": by a token that ends texts; "stop": by a stop string; "length":
        there are as many tokens as were asked for.
    """

    request: int
    text: str
    tokens: tuple[int, ...]
    ended: Ended = ""


@dataclasses.dataclass
class Request:
    """A text in the making.

    Attributes:
      number: of the request, from 0.
      ids: of the prompt, and those that were made.
      left: how many are still to be made.
      reader: of what was made; None without a tokenizer.
      offset: the first of the ids that lies in the context.
    """

    number: int
    ids: list[int]
    left: int
    reader: Reader | None
    offset: int = 0

    @property
    def position(self) -> int:
        """Of the newest token in the context."""
        return len(self.ids) - 1 - self.offset

    def hear(self, made: Sequence[int], ends: Collection[int]) -> Piece:
        """What is new of it.

        Args:
          made: tokens that were made for it; after its end they are nothing.
          ends: ids that end a text.

        Raises:
          FaultError: the model gave NaN.
        """
        text, tokens = "", list[int]()
        ended: Ended = ""
        for token in made:
            if token == decoding.BROKEN:
                raise FaultError(
                    f"request {self.number}: the model gives NaN after {len(self.ids)} tokens. Is the checkpoint "
                    "sound? `flaxmodels checkpoint inspect` counts what is not finite."
                )
            if token in ends:
                ended = "end"
                break
            tokens.append(token)
            self.ids.append(token)
            self.left -= 1
            text += self.reader.push(token) if self.reader else ""
            ended = "stop" if self.reader and self.reader.stopped else "length" if not self.left else ""
            if ended:
                break
        if self.reader and ended:
            text += self.reader.close()
            ended = "stop" if self.reader.stopped else ended
        return Piece(self.number, text, tuple(tokens), ended)
