"""When to stop and when to save, decided alike in every process of a run.

A signal may come to one process only, and clocks differ; but a step, or a save, is made by all or hangs. So the
processes ask each other through the devices: beside each dispatch goes a program of one reduction, whose answer is
read when the next one is submitted. All read the same answer at the same place, and none waits.
"""

import functools
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels.runtime import peers
from flaxmodels.runtime.signals import NOTICE, Stop

NOTICED = 2**8  # added to the number of a signal that a notice stands for


def make(stop: Stop, late: Callable[[], bool], mesh: Mesh) -> "Alone | Together":
    """How this run decides: see the two classes."""
    return Alone(stop, late) if jax.process_count() == 1 else Together(stop, late, mesh)


class Alone:
    """What the only process of a run decides.

    Args:
      stop: whether a signal came.
      late: whether the last save is too long ago.
    """

    def __init__(self, stop: Stop, late: Callable[[], bool]) -> None:
        self._stop, self._late = stop, late

    @property
    def signal(self) -> signal.Signals | None:
        """The signal for which to stop."""
        return self._stop.signal

    @property
    def why(self) -> str:
        """Its name, or the words of a notice."""
        return _why(self.signal, self._stop.notice)

    def rest(self, step: int) -> None:
        """All that was computed is on disk, up to `step`: a signal may end the process at once."""
        self._stop.rest(step)

    def working(self) -> None:
        """From now on there is something to save."""
        self._stop.working()

    def stop(self) -> bool:
        """Whether to stop."""
        return bool(self._stop)

    def late(self) -> bool:
        """Whether to save because of the time."""
        return self._late()


class Together:
    """What several processes decide, asked by all at the same places and in the same order.

    A signal that came to any of them, the highest; the clock of process 0. The answer is that of the question before.

    Args:
      stop: whether a signal came to this process.
      late: whether the last save is too long ago; asked in process 0.
      mesh: over all devices of the run.
    """

    def __init__(self, stop: Stop, late: Callable[[], bool], mesh: Mesh) -> None:
        self.signal: signal.Signals | None = None
        self._noticed, self._working = False, False
        self._stop, self._late = stop, late
        self._saves, self._wanted = 0, 0
        self._answer: jax.Array | None = None
        self._where = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        whole = NamedSharding(mesh, P())
        question = jax.ShapeDtypeStruct((self._size, 2), np.int32, sharding=self._where)
        # Nearly always one and the same: sending it would cost more than the reduction does.
        self._question = functools.cache(self._sent)
        self._reduce = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=whole).lower(question).compile()

    @property
    def why(self) -> str:
        """The name of the signal for which to stop, or the words of a notice."""
        return _why(self.signal, NOTICE if self._noticed else "")

    def rest(self, step: int) -> None:
        """All that was computed is on disk, up to `step`: a signal to any process may end all at once."""
        self._working = False
        self._stop.rest(step)

    def working(self) -> None:
        """From now on there is something to save. Waits till all have come here; till then a signal ends all at once.

        Raises:
          UserError or FaultError: another process failed meanwhile, or did not come.
        """
        if not self._working:
            peers.settle("")
            self._stop.working()
            self._working = True

    def stop(self) -> bool:
        """Whether to stop. Asks, and waits for the answer to the question before."""
        # A save is asked for by its number, so that an answer that comes after it was made asks for no second one.
        late = jax.process_index() == 0 and self._late()
        asked = int(self._stop.signal or 0) + NOTICED * bool(self._stop.notice) if self._stop else 0
        question = self._question(asked, self._saves + 1 if late else 0)
        answer, self._answer = self._answer, self._reduce(question)
        if answer is not None:
            number, self._wanted = np.asarray(answer).tolist()
            self._noticed = number >= NOTICED
            self.signal = signal.Signals(number % NOTICED) if number else None
        return self.signal is not None

    def late(self) -> bool:
        """Whether to save because of the time; the caller does."""
        late = self._wanted > self._saves
        self._saves += late
        return late

    def _sent(self, number: int, save: int) -> jax.Array:
        row = np.array([[number, save]], np.int32)
        rows = np.broadcast_to(row, (self._size, 2))
        return jax.make_array_from_callback(rows.shape, self._where, lambda part: rows[part])


def _why(number: signal.Signals | None, notice: str) -> str:
    return notice or (number.name if number else "")
