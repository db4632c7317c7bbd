"""Data and a loss that drag, hang or fail where HALT in the environment says; configs name them faults.halting:NAME.

HALT is one of: "compile" (XLA takes minutes over the first program), "hang N" (the Nth batch does not come),
"evaluation" (each batch of one takes its time), "training" (each step does), "raise N" (reading raises at the Nth
batch), "callback N" (so does a function that the program calls in its Nth step). What it prints says that it got there.
HALT_TILL names a file: until it is there, "evaluation" gives no batch, and "training" none beyond the 40th; so that a
test that is late still meets the run there. Without it nothing is held.
"""

import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxmodels.data.split import Rows, Source, Split
from flaxmodels.data.synthetic import synthetic_tokens
from flaxmodels.losses import softmax_cross_entropy
from flaxmodels.metrics import Metrics

HALT = os.environ.get("HALT", "").rstrip(" 0123456789")
NUMBER = int(os.environ.get("HALT", "").removeprefix(HALT) or 0)
# XLA folds a sum over windows of as many numbers when it compiles, at a cost of their square: minutes.
FOLDED = 20_000
HANGS = 600.0  # seconds
MOST = 40  # batches
TILL = Path(os.environ.get("HALT_TILL", os.devnull))
_counts = {"train": 0, "test": 0, "steps": 0}
_lock = threading.Lock()


class HookError(Exception):
    """What a user's own code raises."""


def tokens(examples: int, test_examples: int, vocab_size: int, length: int) -> Source:
    """`synthetic_tokens` as if it lay on a disk."""
    source = synthetic_tokens(examples, test_examples, vocab_size, length)
    train, test = _stored(source.train, "train"), _stored(source.test, "test")
    return dataclasses.replace(source, name="halting", train=train, test=test)


def _stored(split: Split, name: str) -> Split:
    gather = functools.partial(_read, held=dict(split.arrays), of=split.gather, name=name)
    return dataclasses.replace(split, arrays={}, gather=gather, stored=split.nbytes)


def _read(_: Any, index: np.ndarray, held: dict[str, np.ndarray], of: Any, name: str) -> Rows:
    with _lock:
        _counts[name] += len(index) > 1  # one example is read to see its shape
        number = _counts[name]
    if len(index) > 1:
        if name == "train" and HALT == "hang" and number == NUMBER:
            _hang()
        if name == "train" and HALT == "training":
            time.sleep(0.1)
            _held(number > MOST)
        if name == "test" and HALT == "evaluation":
            _say()
            time.sleep(1.0)
            _held(True)
        if name == "train" and HALT == "raise" and number == NUMBER:
            raise HookError(f"batch {number} is not to my liking")
    return of(held, index)


def loss(outputs: jax.Array, batch: Mapping[str, Any]) -> Metrics:
    """Cross-entropy of tokens."""
    found = dict(softmax_cross_entropy(outputs, batch))
    total, count = found["loss"]
    if HALT == "compile":
        numbers = np.arange(FOLDED, dtype=np.float32)
        windows = lax.reduce_window(numbers, np.float32(0), lax.add, (FOLDED,), (1,), "SAME")
        total = total + 0 * windows.sum()
        _say()
    if HALT == "callback":
        total = total + lax.stop_gradient(jax.pure_callback(_step, jax.ShapeDtypeStruct((), jnp.float32), count))
    return found | {"loss": (total, count)}


def _step(count: Any) -> np.ndarray:
    _counts["steps"] += 1
    if _counts["steps"] == NUMBER:
        raise HookError(f"step {NUMBER} is not to my liking")
    return np.zeros((), np.float32)


def _say() -> None:
    print(f"HALT {HALT}", file=sys.stderr, flush=True)


def _held(there: bool) -> None:
    deadline = time.monotonic() + HANGS
    while there and not TILL.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def _hang() -> None:
    _say()
    time.sleep(HANGS)
