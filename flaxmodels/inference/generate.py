"""Text from a language model: prompts in, tokens out as they are made; read `Generator`.

Requests take the rows of a batch of fixed shape as these become free. The host reads what a dispatch made, ends the
requests that met a stop string, and lets new ones in. What a request gives depends on its prompt, its number and the
options, never on the others: its rows are computed by the same two programs whatever lies beside them.
"""

import collections
import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmodels import sharding
from flaxmodels.data.split import Tokenizer
from flaxmodels.inference import beams, cache, decoding, scoring, stops
from flaxmodels.inference.request import Piece as Piece
from flaxmodels.inference.request import Request
from flaxmodels.inference.sampling import Sampling, numbers
from flaxmodels.registry import UserError
from flaxmodels.step import compile_step, strict

# Seconds of a dispatch: a terminal shows its tokens together, and a stop string wastes those after it.
DISPATCH = 0.1


def prompt_ids(tokenizer: Tokenizer, text: str, begin: Sequence[int] | None = None) -> list[int]:
    """The ids of a prompt.

    Args:
      tokenizer: of the model.
      text: of the prompt.
      begin: ids that stand before each text; None: as the tokenizer says. Where there are none, and no text, what ends
        a document stands before the next one.

    Raises:
      UserError: there is nothing of all that, so nothing to continue.
    """
    found = [*(scoring.beginning(tokenizer) if begin is None else begin), *tokenizer.encode(text).tolist()]
    if not found and tokenizer.end is None:
        raise UserError("the prompt is empty, and the model knows no token that begins a text: give it some.")
    return found or [tokenizer.end]


class Generator:
    """A model that is ready to generate.

    Args:
      model: a causal `Transformer`.
      params: its parameters, on `mesh`. They may be replaced by others like them: nothing is compiled again.
      extra: its other collections.
      batch: requests that are computed at the same time.
      length: tokens of a text that the model sees at once, at most its `max_length`; None: that many. A text that
        grows longer goes on from its newer half: the context is emptied, and that half read again.
      mesh: over which all of it lies.
      tokenizer: for text and stop strings; None: tokens only.
      ends: ids that end a text; None: the tokenizer's `end`.
      chunk: tokens of the prompts that are read at once.
      steps: the most tokens that one dispatch makes.

    Raises:
      UserError: the model can't generate, or a size does not fit it.

    Attributes:
      compiling: seconds that compiling took so far.
    """

    def __init__(
        self, model: Any, params: Any, extra: Any = None, *, batch: int = 1, length: int | None = None, mesh: Mesh,
        tokenizer: Tokenizer | None = None, ends: Sequence[int] | None = None, chunk: int = 64, steps: int = 32,
    ) -> None:  # fmt: skip
        cache.check(model)
        longest = model.max_length
        self.length = longest if length is None else length
        if not 2 <= self.length <= longest:
            raise UserError(f"length={self.length} does not fit the model: expected 2 to its max_length={longest}.")
        if tokenizer is not None and tokenizer.size > model.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.size} tokens, the model knows {model.vocab_size}: is it another one's?"
            )
        self.model, self.params, self.extra, self.mesh, self.tokenizer = model, params, extra or {}, mesh, tokenizer
        own = () if tokenizer is None or tokenizer.end is None else (tokenizer.end,)
        self.ends = own if ends is None else tuple(ends)
        self.vocab_size = model.vocab_size if tokenizer is None else tokenizer.size
        self._cache = cache.abstract(model, batch, cache.slots(model, self.length), mesh)
        self.batch, self.steps, self.chunk = batch, steps, min(chunk, self._cache["places"].shape[1])
        self._logits = decoding.logits_of(model, self.vocab_size)
        self._places, self._whole = jax.tree.map(lambda x: x.sharding, self._cache), sharding.replicated(mesh)
        self._programs: dict[Any, Any] = {}
        self.compiling = 0.0

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, most: int = 128, stops: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """Continue prompts; pieces come as they are made, those of several requests between each other.

        Args:
          prompts: ids of each, at least one, at most `length`.
          sampling: how tokens are chosen. Request i draws by the key (seed, i, place of the token).
          most: tokens to make for each.
          stops: strings that end a text; they are not a part of it.

        Returns:
          An iterator whose last piece of each request has `ended`.

        Raises:
          UserError: a prompt is empty, too long, or has ids that the model does not know; or `stops` without tokenizer.
          FaultError: the model gives NaN.
        """
        # Several processes must agree on the tokens of a dispatch, and their clocks don't.
        return self._started(prompts, sampling, most, stops, 1 if jax.process_count() == 1 else self.steps)

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, most: int = 128, stops: Sequence[str] = ()
    ) -> list[Piece]:
        """Continue prompts, and wait for all: as `stream`, with one piece for each prompt, in their order."""
        whole = {i: Piece(i, "", ()) for i in range(len(prompts))}
        for new in self._started(prompts, sampling, most, stops, self.steps):
            old = whole[new.request]
            whole[new.request] = Piece(new.request, old.text + new.text, old.tokens + new.tokens, new.ended)
        return list(whole.values())

    def _started(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, most: int, stops: Sequence[str], least: int
    ) -> Iterator[Piece]:
        """See `stream`; a dispatch makes `least` tokens, or as many more as `DISPATCH` allows."""
        given: list[list[int]] = [np.asarray(prompt, np.int64).tolist() for prompt in prompts]
        for i, prompt in enumerate(given):
            self._check(i, prompt, most if sampling.beams > 1 else 0)
        if most < 1:
            raise UserError(f"{most} tokens to make: expected at least 1.")
        if stops and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer: give one, or end texts by ids with `ends`.")
        if sampling.beams > self.batch:
            raise UserError(f"beams={sampling.beams} needs a batch of as many rows, and it is {self.batch}.")
        requests = [self._request(i, prompt, most, stops) for i, prompt in enumerate(given)]
        if sampling.beams > 1:
            return self._searched(requests, sampling)
        return self._streamed(requests, sampling, least)

    def _check(self, number: int, prompt: Sequence[int], room: int) -> None:
        """UserError for a prompt that the model can't continue, by `room` tokens within its context."""
        if not prompt:
            raise UserError(f"prompt {number} has no token: a model continues at least one.")
        if len(prompt) + room > self.length:
            fewer = ", or ask for fewer tokens" if room else ""
            more = f" and is to get {room} more by beam search" if room else ""
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens{more}; the model sees {self.length} at once: "
                f"shorten it{fewer}."
            )
        if unknown := [i for i in prompt if not 0 <= i < self.model.vocab_size]:
            raise UserError(
                f"prompt {number} has the id {unknown[0]}: the model knows those from 0 to {self.model.vocab_size - 1}."
            )

    def _request(self, number: int, prompt: list[int], most: int, stop: Sequence[str]) -> Request:
        reader = None if self.tokenizer is None else stops.Reader(self.tokenizer, prompt, stop)
        return Request(number, prompt, most, reader)

    def _streamed(self, requests: Sequence[Request], sampling: Sampling, least: int) -> Iterator[Piece]:
        told = numbers(sampling)
        waiting, slots = collections.deque(requests), dict[int, Request]()
        state, count = self._empty("repetition_penalty" in told), least
        while waiting or slots:
            free = (slot for slot in range(self.batch) if slot not in slots)
            reading = {slot: waiting.popleft() for slot in itertools.islice(free, len(waiting))}
            slots |= reading
            for slot, request in slots.items():
                if request.position >= self.length:
                    request.offset = len(request.ids) - max(self.length // 2, 1)
                    reading[slot] = request
            if reading:
                made = self._begin(state, reading, told)
            else:
                begun = time.monotonic()
                made = self._write(state, slots, count, told)
                seconds = time.monotonic() - begun
                if 2 * seconds < DISPATCH:
                    count = min(2 * count, self.steps)
                elif seconds > DISPATCH:
                    count = max(count // 2, least)
            for slot, request in list((reading or slots).items()):
                piece = request.hear(made[slot][made[slot] != decoding.NOTHING].tolist(), self.ends)
                if piece.ended:
                    del slots[slot]
                if piece.tokens or piece.ended:
                    yield piece

    def _searched(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Piece]:
        size = sampling.beams
        for first in range(0, len(requests), self.batch // size):
            group = requests[first : first + self.batch // size]
            slots = {slot: group[slot // size] for slot in range(len(group) * size)}
            state = self._empty(penalised=False)
            self._read(state, slots)
            position = np.zeros(self.batch, np.int32)
            position[: len(slots)] = [len(request.ids) for request in slots.values()]
            _, made, scores = self._run(
                beams.search, self.params, self.extra, state["cache"], state["found"], position,
                np.int32(group[0].left), np.float32(sampling.length_penalty),
                donate=(2,), out=(self._places, self._whole, self._whole),
                logits=self._logits, beams=size, ends=self.ends, most=self.length,
            )  # fmt: skip
            for request, tokens, score in zip(group, np.asarray(made), np.asarray(scores)):
                kept = tokens[tokens != decoding.NOTHING].tolist()
                yield request.hear(kept if math.isfinite(score) else [decoding.BROKEN], self.ends)

    def _empty(self, penalised: bool) -> dict[str, Any]:
        """The state of a batch in which nothing lies; programs use its memory for what comes after it."""
        zeros = np.zeros(self.batch, np.int32)
        rows = dict.fromkeys(("token", "position", "place", "request", "left"), zeros)
        seen = np.zeros((self.batch, self.model.vocab_size), bool) if penalised else None
        found = np.zeros((self.batch, self.model.vocab_size), np.float32)
        rest = jax.device_put({"rows": rows, "seen": seen, "found": found}, self._whole)
        return {"cache": cache.empty(self._cache), **rest}

    def _read(self, state: dict[str, Any], reading: Mapping[int, Request]) -> None:
        """Take the texts of some rows into the cache."""
        texts = {slot: request.ids[request.offset :] for slot, request in reading.items()}
        for start in range(0, max(map(len, texts.values())), self.chunk):
            tokens = np.zeros((self.batch, self.chunk), np.int32)
            positions = np.full_like(tokens, cache.EMPTY)
            last = np.full(self.batch, -1, np.int32)
            for slot, ids in texts.items():
                part = ids[start : start + self.chunk]
                tokens[slot, : len(part)] = part
                positions[slot, : len(part)] = range(start, start + len(part))
                last[slot] = len(part) - 1
            piece = {"tokens": tokens, "positions": positions, "last": last}
            state["cache"], state["found"] = self._run(
                decoding.read, self.params, self.extra, state["cache"], state["found"], piece,
                donate=(2, 3), out=(self._places, self._whole), logits=self._logits,
            )  # fmt: skip

    def _begin(self, state: dict[str, Any], reading: Mapping[int, Request], told: Any) -> np.ndarray:
        """Read the texts of some rows, and make a token for each: (B, 1)."""
        self._read(state, reading)
        read = np.zeros(self.batch, bool)
        read[list(reading)] = True
        rows = {name: np.zeros(self.batch, np.int32) for name in state["rows"]}
        seen = None if state["seen"] is None else np.zeros(state["seen"].shape, bool)
        for slot, request in reading.items():
            position = request.position + 1
            of = {"position": position, "place": len(request.ids), "request": request.number}
            of["left"] = min(request.left - 1, self.length - position)
            for name, value in of.items():
                rows[name][slot] = value
            if seen is not None:
                seen[slot, request.ids] = True
        state["rows"], state["seen"], made = self._run(
            decoding.begin, state["rows"], state["seen"], state["found"], {"read": read, "rows": rows, "seen": seen},
            told, donate=(0, 1), out=self._whole,
        )  # fmt: skip
        return np.asarray(made)[:, None]

    def _write(self, state: dict[str, Any], slots: Mapping[int, Request], count: int, told: Any) -> np.ndarray:
        """Make up to `count` tokens in the rows where requests lie: (B, steps)."""
        going = np.zeros(self.batch, bool)
        going[list(slots)] = True
        state["cache"], state["rows"], state["seen"], made = self._run(
            decoding.write, self.params, self.extra, state["cache"], state["rows"], state["seen"], going,
            np.int32(count), told, donate=(2, 3, 4), out=(self._places, *(self._whole,) * 3),
            logits=self._logits, ends=self.ends, most=self.steps,
        )  # fmt: skip
        return np.asarray(made)

    def _run(self, function: Callable[..., Any], *given: Any, donate: tuple[int, ...], out: Any, **options: Any) -> Any:
        """Call a function with arguments like which it was compiled for once, or is now; memory of `donate` is used."""
        key = function, jax.tree.structure(given), options.get("beams")
        if key not in self._programs:
            begun = time.monotonic()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", self._whole)), given
            )
            lowered = compile_step(
                functools.partial(function, **options), *like, mesh=self.mesh, out_shardings=out, donate=donate
            )
            self._programs[key] = strict(lowered.compile(), list(inspect.signature(function).parameters))
            self.compiling += time.monotonic() - begun
        return self._programs[key](*given)
