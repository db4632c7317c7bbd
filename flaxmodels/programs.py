"""What a run calls: its compiled programs, each compiled once; and what may watch the train step at work."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import jax

from flaxmodels import guard
from flaxmodels.job import Job
from flaxmodels.runtime import compile_cache, progress


class Programs:
    """What a run compiles, each program once.

    Args:
      job: what to train.
      train: of `job.lower_train()`.
      evaluation: of `job.lower_eval()`.
      compiled: the train step is added here, for who explains errors of memory.

    Attributes:
      names: of the train step's metrics.
      eval_names: of the evaluation step's.
      move: of `guard.mover`.
      unsound: of `guard.checker`.
    """

    def __init__(
        self,
        job: Job,
        train: tuple[jax.stages.Lowered, list[str]],
        evaluation: tuple[jax.stages.Lowered, list[str]],
        compiled: list[jax.stages.Compiled],
    ) -> None:
        (self._train, self.names), (self._evaluation, self.eval_names) = train, evaluation
        self._job, self._compiled = job, compiled
        self.move, self.unsound = guard.mover(job.abstract, job.mesh), guard.checker(job.abstract, job.mesh)

    @functools.cached_property
    def evaluation(self) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """The evaluation step, and the norm of the parameters."""
        with progress.phase("compile"):
            return self._evaluation.compile(), self._job.lower_norm().compile()

    def train(self, note: Callable[[str], None]) -> jax.stages.Compiled:
        """The train step. `note` is told how long compiling took."""
        if not self._compiled:
            begun = time.monotonic()
            with progress.phase("compile"):
                self._compiled.append(self._train.compile())
                compile_cache.seal(compile_cache.folder())
            note(f"compiled in {time.monotonic() - begun:.1f} s")
        return self._compiled[-1]


class Profiler(Protocol):
    """What watches some of the dispatches, such as `perf.profile.Profile`."""

    def check(self, total_steps: int) -> None:
        """Raise UserError where a run of so many steps has nothing to watch."""

    def before(self, step: int, end: int, program: jax.stages.Compiled) -> None:
        """A dispatch of the steps from `step` to `end` is about to be made."""

    def after(self, step: int, packed: jax.Array) -> Iterable[str]:
        """A dispatch up to `step` was made, and `packed` will be there when it ends. Returns lines for the log."""

    def stop(self) -> None:
        """The run ends by an error: let go, and say nothing."""

    def close(self) -> Iterable[str]:
        """There are no more. Returns lines for the log; called again, none."""
