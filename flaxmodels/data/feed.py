"""From a split to batches on the mesh: which rows, where they are gathered, and their transfer ahead of need.

Two placements with the same batches. "host": numpy gathers rows, which travel, one dispatch ahead. "device": the whole
split lies on every device, only indices travel, and rows are gathered inside the jitted step.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmodels import sharding
from flaxmodels.data import order
from flaxmodels.data.split import Batch, Split

Placement = Literal["auto", "host", "device"]

# A split moves onto the device by itself up to this share of the device's memory, and this many bytes.
RESIDENT_SHARE, RESIDENT_BYTES = 0.05, 2**28
# Indices that are sent in one piece for a resident split.
INDICES = 2**17


def choose(placement: Placement, nbytes: int, mesh: Mesh) -> tuple[bool, str]:
    """Whether `nbytes` of data live on the device, and why, in words for the log."""
    if placement != "auto":
        return placement == "device", f"data on the {placement}, as the config says"
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = min(RESIDENT_BYTES, RESIDENT_SHARE * (stats or {}).get("bytes_limit", RESIDENT_BYTES / RESIDENT_SHARE))
    fits = nbytes <= limit
    relation = "within" if fits else "over"
    reason = f"{nbytes / 2**20:.1f} MiB are {relation} {limit / 2**20:.0f} MiB"
    return fits, f"data on the {'device' if fits else 'host'}: {reason}"


class Feed:
    """One split, ready to be stepped through.

    What a step is given is `(each, every)`: `each` differs from step to step, `every` does not. `batch` turns the two
    into a batch, inside the jitted step.

    Args:
      split: the examples.
      mesh: where batches go.
      batch_size: examples of one global batch, over all processes.
      resident: gather on the device.
    """

    def __init__(self, split: Split, mesh: Mesh, batch_size: int, *, resident: bool) -> None:
        self.split, self.mesh, self.batch_size, self.resident = split, mesh, batch_size, resident

    @functools.cached_property
    def every(self) -> dict[str, jax.Array]:
        """What all steps see: the arrays of a resident split, on every device from the first use on."""
        arrays = dict(self.split.arrays) if self.resident else {}
        return jax.tree.map(lambda a: _everywhere(a, self.mesh), arrays)

    def abstract(self, lead: tuple[int, ...] = ()) -> tuple[Any, Any]:
        """(each, every) as `jax.ShapeDtypeStruct` with shardings; `lead` is (steps,) for those of one dispatch."""
        index = np.zeros(1, np.int32)
        each: dict[str, Any] = {"index": index}
        if not self.resident:
            each["rows"] = self.split.gather(self.split.arrays, index)
        split = sharding.batch_sharding(self.mesh, lead=len(lead))
        whole = sharding.replicated(self.mesh)
        arrays = dict(self.split.arrays) if self.resident else {}
        return (
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((*lead, self.batch_size, *a.shape[1:]), a.dtype, sharding=split), each
            ),
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arrays),
        )

    def rows(self, most: int) -> int:
        """Steps whose indices are sent in one piece, at least `most`.

        A resident split needs nothing else from the host, so that many dispatches share a piece: sending a few numbers
        costs the host more than a small step costs the device.
        """
        return max(most, INDICES // self.batch_size) if self.resident else most

    def abstract_dispatch(self, most: int) -> dict[str, Any]:
        """What `dispatches` yields, as `jax.ShapeDtypeStruct`."""
        each, every = self.abstract((self.rows(most),))
        number = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(self.mesh))
        return {"count": number, "first": number, "each": each, "every": every}

    def example(self) -> Batch:
        """Shapes and dtypes of a batch."""
        return jax.eval_shape(self.batch, *self.abstract())

    def batch(self, each: dict[str, Any], every: dict[str, Any]) -> Batch:
        """(each, every) -> {"inputs", "targets", "weights"}; traceable."""
        rows = self.split.gather(every, each["index"]) if self.resident else each["rows"]
        return self.split.prepare(rows, each["index"])

    def place(self, index: np.ndarray) -> dict[str, Any]:
        """Send what `index` names to the mesh: (B,) one batch, or (steps, B) those of one dispatch.

        Each process gathers and sends the rows of its own devices only.
        """
        where = sharding.batch_sharding(self.mesh, lead=index.ndim - 1)
        local = index if jax.process_count() == 1 else _local(index, where)
        each: dict[str, Any] = {"index": local}
        if not self.resident:
            each["rows"] = self.split.gather(self.split.arrays, local)
        if jax.process_count() == 1:
            return jax.device_put(each, where)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(where, a, (*index.shape, *a.shape[index.ndim :])), each
        )

    def dispatches(self, seed: int, stretches: Iterable[tuple[int, int]], most: int, ahead: int = 2) -> Generator[Any]:
        """What each dispatch is given, prepared and sent by a thread ahead of need.

        Args:
          seed: of the run.
          stretches: (first step, number of steps) of each dispatch, one after the other; numbers up to `most`.
          most: steps that a dispatch has room for.
          ahead: how many pieces may wait.

        Yields:
          The feed of `step.repeated`.
        """
        rows = self.rows(most)

        def make(piece: list[tuple[int, int]]) -> list[dict[str, Any]]:
            first, total = piece[0][0], sum(count for _, count in piece)
            index = np.zeros((rows, self.batch_size), np.int32)
            index[:total] = order.train_indices(seed, first, total, self.batch_size, self.split.size)
            shared = {"first": self._number(first), "each": self.place(index), "every": self.every}
            return [{"count": self._count(count), **shared} for _, count in piece]

        with contextlib.closing(_ahead(make, _pieces(stretches, rows), ahead)) as pieces:
            for piece in pieces:
                yield from piece

    def _number(self, value: int) -> jax.Array:
        return _everywhere(np.asarray(value, np.int32), self.mesh)

    @functools.cached_property
    def _count(self) -> Callable[[int], jax.Array]:
        return functools.cache(self._number)

    def evaluation(self, ahead: int = 2) -> Generator[tuple[Any, Any]]:
        """(each, every) of one pass over the split, in order, the last batch padded with index -1."""
        batches = range(order.eval_batches(self.batch_size, self.split.size))
        return _ahead(
            lambda i: (self.place(order.eval_index(i, self.batch_size, self.split.size)), self.every), batches, ahead
        )


def _pieces(stretches: Iterable[tuple[int, int]], rows: int) -> Iterator[list[tuple[int, int]]]:
    """Group dispatches, one after the other, so that each group has at most `rows` steps."""
    piece: list[tuple[int, int]] = []
    for first, count in stretches:
        if piece and first + count - piece[0][0] > rows:
            yield piece
            piece = []
        piece.append((first, count))
    if piece:
        yield piece


def _everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    where = sharding.replicated(mesh)
    return jax.make_array_from_callback(array.shape, where, lambda part: np.asarray(array[part], order="C"))


def _local(index: np.ndarray, where: jax.sharding.NamedSharding) -> np.ndarray:
    """The columns of `index` that this process's devices hold."""
    parts = [part[-1] for part in where.addressable_devices_indices_map(index.shape).values() if part is not None]
    spans = sorted({(part.start or 0, part.stop or index.shape[-1]) for part in parts})
    return np.concatenate([index[..., start:stop] for start, stop in spans], axis=-1)


def _ahead(make: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Generator[Any]:
    """`map(make, items)` on a thread, up to `ahead` results early. An error comes out where its result would."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
    done, stopped = object(), threading.Event()

    def put(result: Any, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((result, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put(make(item))
            put(done)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            result, error = ready.get()
            if error is not None:
                raise error
            if result is done:
                return
            yield result
    finally:
        stopped.set()
        thread.join()
