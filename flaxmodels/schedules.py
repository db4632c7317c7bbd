"""Curves of the learning rate: step -> its share of the peak.

Each function takes the steps that the curve spans, and what a config may set.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxmodels.registry import Fraction, Steps

Schedule = Callable[[Any], jax.Array]


def constant(steps: int) -> Schedule:
    """1 for ever."""
    return optax.constant_schedule(1.0)


def linear(steps: int, final: Fraction = 0.0) -> Schedule:
    """From 1 to `final` in a straight line over `steps`."""
    return _down(final, max(steps, 1))


def cosine(steps: int, final: Fraction = 0.0) -> Schedule:
    """From 1 to `final` along half a cosine over `steps` (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    return optax.cosine_decay_schedule(1.0, max(steps, 1), alpha=final)


def rsqrt(steps: int, timescale: Steps = 10_000) -> Schedule:
    """sqrt(timescale / (step + timescale)): no end is built in (Zhai et al. 2021, arXiv:2106.04560, sec. 3.5)."""
    timescale = max(timescale, 1)
    return lambda step: jnp.sqrt(timescale / (step + timescale))


def wsd(steps: int, decay: Fraction = 0.2, final: Fraction = 0.0) -> Schedule:
    """Warmup-stable-decay (arXiv:2404.06395): 1, then linearly to `final` over the last `decay` share of `steps`."""
    length = max(math.ceil(steps * decay), 1)
    return _down(final, length, first=max(steps - length, 0))


def _down(final: float, steps: int, first: int = 0) -> Schedule:
    """1 until step `first`, then linearly to `final`, and never below: XLA may divide by multiplying, which rounds."""
    line = optax.linear_schedule(1.0, final, steps, transition_begin=first)
    return lambda step: jnp.maximum(line(step), final)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant, "linear": linear, "cosine": cosine, "rsqrt": rsqrt, "wsd": wsd,
}  # fmt: skip


def rated(peak: float, curve: Schedule, warmup: int) -> Schedule:
    """`peak` times the curve, which starts after a linear rise from 0 over `warmup` steps."""
    if not warmup:
        return lambda step: peak * curve(step)
    rise = optax.linear_schedule(0.0, 1.0, warmup)
    return lambda step: peak * jnp.where(step < warmup, rise(step), curve(jnp.maximum(step - warmup, 0)))
