"""How the next token is chosen from logits: the likeliest one, or one drawn from what the options leave of them.

`Sampling` is what a user says; `numbers` makes arrays of it, whose keys say what is done, so that one compiled program
serves every temperature; `pick` is the choice itself.

No option sorts the vocabulary: which tokens `top_k` and `top_p` leave is said by the logit of the last one, found bit
by bit. So all works over a vocabulary that is split over devices, and ties stay together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import registry
from flaxmodels.registry import Fraction, Positive, Range, Seed
from flaxmodels.state import base_key

Numbers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The options apply in the order below, each to what the ones before it leave.

    Attributes:
      repetition_penalty: logits of tokens that the text has already are divided by it where they are positive, else
        multiplied (https://arxiv.org/abs/1909.05858); 1 is off.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only so many of the likeliest tokens; 0 is off.
      top_p: only the likeliest tokens that together have this probability (https://arxiv.org/abs/1904.09751); 1 is off.
      min_p: only tokens with this share of the probability of the likeliest (https://arxiv.org/abs/2407.01082); 0: off.
      seed: what is drawn is a function of it, the request's number and the token's place in its text; never of what
        else is computed at the same time.
      beams: over 1, search for the likeliest text with so many hypotheses; nothing is drawn.
      length_penalty: of beam search: the logarithm of a text's probability is divided by its length to this power.

    Raises:
      UserError: a number is out of range, or says something that another one leaves no room for.
    """

    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    temperature: Annotated[float, Range(0, 100)] = 1.0
    top_k: int = 0
    top_p: Fraction = 1.0
    min_p: Fraction = 0.0
    seed: Seed = 0
    beams: Positive = 1
    length_penalty: registry.Signed = 1.0

    def __post_init__(self) -> None:
        registry.bind(type(self), dataclasses.asdict(self), where="sampling")
        if not self.top_p:
            raise registry.UserError("sampling.top_p=0 leaves no token: use temperature=0 for the likeliest one.")
        idle = DRAWN[1:] if self.beams == 1 else ("repetition_penalty", *DRAWN[1:])
        told = [name for name in idle if getattr(self, name) != _OFF[name]]
        if self.beams > 1 and self.temperature not in (0, 1):
            told.insert(0, "temperature")
        if self.greedy and told:
            why = f"beams={self.beams} searches" if self.beams > 1 else "temperature=0 takes the likeliest token"
            raise registry.UserError(f"sampling.{told[0]}={getattr(self, told[0])!r}: {why}. Leave one of them out.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return not self.temperature or self.beams > 1


# What matters only where tokens are drawn. (A seed changes nothing where they are not, and does no harm.)
DRAWN = ("temperature", "top_k", "top_p", "min_p")
_OFF = {"repetition_penalty": 1, "temperature": None, "top_k": 0, "top_p": 1, "min_p": 0}


def numbers(sampling: Sampling) -> dict[str, Any]:
    """What `pick` is told: scalars by the names of `Sampling`, float32 but for "seed", uint32; only what is in use."""
    names = ("repetition_penalty",) if sampling.greedy else ("repetition_penalty", *DRAWN)
    used = {name: np.float32(getattr(sampling, name)) for name in names if getattr(sampling, name) != _OFF[name]}
    return used if sampling.greedy else {**used, "seed": np.uint32(sampling.seed)}


def pick(
    logits: jax.Array, numbers: Numbers, request: jax.Array, place: jax.Array, seen: jax.Array | None = None
) -> jax.Array:
    """The next tokens; pure and traceable.

    Args:
      logits: (B, V) float32.
      numbers: of the function `numbers`; without "temperature", the likeliest tokens.
      request: (B,) int32, the number of each row's request.
      place: (B,) int32, of the new token in the text of its request.
      seen: (B, V) bool, the tokens that the text has; needed with "repetition_penalty".

    Returns:
      (B,) int32. Of equal logits the first counts as the likeliest.
    """
    if "repetition_penalty" in numbers:
        assert seen is not None
        logits = penalised(logits, numbers["repetition_penalty"], seen)
    if "temperature" not in numbers:
        return _likeliest(logits)
    logits = left(logits / numbers["temperature"], numbers)

    def drawn(logits_V: jax.Array, request: jax.Array, place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(base_key(numbers["seed"]), request), place)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(drawn)(logits, request, place).astype(jnp.int32)


def _likeliest(logits: jax.Array) -> jax.Array:
    """(B,) int32, the first of the largest of (B, V): on CPUs two reductions are many times faster than argmax."""
    V = logits.shape[-1]
    largest = logits >= jnp.max(logits, -1, keepdims=True)
    return jnp.min(jnp.where(largest, jnp.arange(V, dtype=jnp.int32)[None], V - 1), -1)


def penalised(logits: jax.Array, penalty: jax.Array, seen: jax.Array) -> jax.Array:
    """Logits (..., V) with those of `seen` tokens made smaller."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def left(logits: jax.Array, numbers: Numbers) -> jax.Array:
    """Logits (B, V) float32 with -inf for the tokens that top_k, top_p and min_p leave out, each where it is given."""
    if "top_k" in numbers:
        ones = jnp.ones_like(logits)
        logits = _from(logits, _threshold(logits, ones, jnp.minimum(numbers["top_k"], logits.shape[-1])))
    if "top_p" in numbers:
        logits = _from(logits, _threshold(logits, jax.nn.softmax(logits), numbers["top_p"]))
    if "min_p" in numbers:
        least = jnp.max(logits, -1, keepdims=True) + jnp.log(numbers["min_p"])
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _from(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(_ordered(logits) < threshold, -jnp.inf, logits)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 of the same order as the float32 numbers `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _threshold(logits: jax.Array, weights: jax.Array, need: jax.Array) -> jax.Array:
    """(B, 1), the largest t for which the weights of all tokens with `_ordered(logits)` >= t add up to `need`.

    It is 0, which leaves all, where rounding keeps the sum of all below that.
    """
    keys = _ordered(logits)

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        enough = jnp.sum(jnp.where(keys >= (found | bit), weights, 0), -1, keepdims=True) >= need
        return jnp.where(enough, found | bit, found)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros((*logits.shape[:-1], 1), jnp.uint32))
