"""Batches made ahead of need by threads of this process, in order. The threads are Grain's.

Read `threaded` first, then `bounded`.
"""

import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flaxmodels.runtime.exits import FaultError

# The end of messages about batches that do not come.
SLOW = "A disk that does not answer? If reading is slow, and nothing else, raise data.timeout."


class LoadingError(FaultError):
    """Batches no longer come, by no fault of config or data that is known: the same command may well go on."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """How batches are made ahead of need; this never changes which.

    Attributes:
      workers: processes that make them; 0: threads of this process do.
      threads: that make them, in each process.
      ahead: batches that are ready in each process, besides those that its threads are at.
      timeout: seconds within which an awaited batch must come; a worker process has time to start besides.
    """

    workers: int = 0
    threads: int = 8
    ahead: int = 2
    timeout: float = 40.0


@contextlib.contextmanager
def threaded(make: Callable[[int], Any], numbers: range, threads: int, ahead: int) -> Iterator[Iterator[Any]]:
    """`map(make, numbers)`, made by `threads`; `ahead` results may wait. Each ends, at the latest, after what it is at.

    Raises:
      TypeError: `make` returned None, or raised StopIteration.
    """
    import grain

    def whole(number: int) -> Any:
        rows = None
        with contextlib.suppress(StopIteration):
            rows = make(number)
        if rows is None:  # which Grain would leave out; and StopIteration would be the end of all, in silence
            raise TypeError(f"There is no batch {number}: what makes batches must return dicts of numpy arrays.")
        return rows

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + ahead)
    with contextlib.closing(iter(grain.MapDataset.source(numbers).map(whole).to_iter_dataset(options))) as made:
        yield made


@contextlib.contextmanager
def bounded(make: Callable[[int], Any], seconds: float) -> Iterator[Callable[[int], Any]]:
    """`make`, for threads that must come back: it raises LoadingError after `seconds`. Leaving waits for its threads.

    Python can't end a thread, and before it exits it waits for those of a pool, as Grain's are: one that is stuck in a
    read would keep the process from ever ending. So each has a partner, a daemon thread, that makes its calls, and that
    can be left behind.
    """
    own, stuck, lock, left = threading.local(), threading.Event(), threading.Lock(), threading.Event()
    pairs: list[tuple[threading.Thread, threading.Thread, queue.SimpleQueue[int | None]]] = []

    def work(asked: queue.SimpleQueue[int | None], answers: queue.SimpleQueue[Any]) -> None:
        while (number := asked.get()) is not None:
            try:
                answers.put((make(number), None))
            except BaseException as error:
                answers.put((None, error))

    def answer(wait: float) -> Any:
        with contextlib.suppress(queue.Empty):
            return own.answers.get(timeout=wait)
        return () if stuck.is_set() else None

    def call(number: int) -> Any:
        if not hasattr(own, "asked"):
            own.asked, own.answers = queue.SimpleQueue(), queue.SimpleQueue()
            partner = threading.Thread(target=work, args=(own.asked, own.answers), name="loading", daemon=True)
            with lock:
                if left.is_set():  # a thread of the pool that begins this late would have nobody to end its partner
                    del own.asked
                    raise LoadingError(f"Batch {number} is no longer wanted.")
                partner.start()
                pairs.append((threading.current_thread(), partner, own.asked))
        own.asked.put(number)
        if not (answered := within(seconds, answer)):
            stuck.set()  # the others need not wait as long
            raise LoadingError(f"Batch {number} was not made within {seconds:g} s. {SLOW}")
        rows, error = answered
        if error is not None:
            raise error
        return rows

    try:
        yield call
    finally:
        with lock:
            left.set()
        for thread, partner, asked in pairs:
            thread.join()
            asked.put(None)
            partner.join(0 if stuck.is_set() else None)


def within(seconds: float, wait: Callable[[float], Any]) -> Any:
    """The first result of `wait(part of seconds)` that is not None; None after `seconds`.

    In parts, since this process may have stood still meanwhile (Ctrl-Z, a laptop that slept): that costs one part.
    """
    parts = math.ceil(seconds)
    return next((found for _ in range(parts) if (found := wait(seconds / parts)) is not None), None)
