"""What a peer gives to be measured: something that trains for ever, and two ways to look at it from another thread."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from flaxmodels.perf.peers.works import WARM


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A peer, set up.

    Attributes:
      run: trains, for ever; called in the main thread.
      steps: how many have ended.
      loss: the mean over the first `WARM` steps; None before they have ended.
      versions: of the libraries that compute, by name.
      parameters: how many numbers are trained; None where nobody asks.
      compiles: how many programs were compiled so far; None where nobody counts them.
    """

    run: Callable[[], None]
    steps: Callable[[], int]
    loss: Callable[[], float | None]
    versions: dict[str, str]
    parameters: int | None = None
    compiles: Callable[[], int] | None = None


def stepping(
    step: Callable[[int], Any],
    mean: Callable[[Sequence[Any]], float],
    versions: dict[str, str],
    parameters: int,
    each: int = 1,
) -> Trainer:
    """A peer whose loop is: make a step, again and again.

    Args:
      step: makes step i, or call i of `each` steps, and returns its loss or losses in any form.
      mean: of what was returned for the first `WARM` steps.
      versions: of `Trainer`.
      parameters: of `Trainer`.
      each: steps of a call.
    """
    made, found = 0, list[float]()

    def run() -> None:
        nonlocal made
        losses = []
        for i in itertools.count():
            loss = step(i)
            if not found:
                losses.append(loss)
                if len(losses) * each >= WARM:
                    found.append(mean(losses))
            made += each

    return Trainer(run, lambda: made, lambda: found[0] if found else None, versions, parameters)


def repeating(
    call: Callable[[], Any], loss: float, versions: dict[str, str], parameters: int, warm: int = 2
) -> Trainer:
    """A peer that does not learn: a step is a call.

    Args:
      call: of a step; what it returns has been computed.
      loss: of `Trainer`, told after `warm` steps.
      versions: of `Trainer`.
      parameters: of `Trainer`.
      warm: steps in which things are compiled.
    """
    made = 0

    def run() -> None:
        nonlocal made
        while True:
            call()
            made += 1

    return Trainer(run, lambda: made, lambda: loss if made >= warm else None, versions, parameters)
