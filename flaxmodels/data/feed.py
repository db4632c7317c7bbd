"""From a split to batches on the mesh: which rows, where they are gathered, and their transfer ahead of need.

Three placements with the same batches. "device": the whole split lies on every device, only indices travel, and rows
are gathered inside the jitted step. "host": it lies in the memory of each process; numpy gathers rows, and they travel.
"disk": rows are read when a batch needs them, by the threads or worker processes of `loading`.

Read `choose`, then `Feed`.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxmodels import hardware, sharding
from flaxmodels.data import host_augment, order
from flaxmodels.data.loading import Loading, stream
from flaxmodels.data.split import SKIP, Batch, Rows, Source, Split
from flaxmodels.registry import LONGEST, UserError

Placement = Literal["auto", "device", "host", "disk"]

# A data set moves onto the device by itself up to this share of the device's memory, and this many bytes.
RESIDENT_SHARE, RESIDENT_BYTES = 0.05, 2**28
# Indices that are sent in one piece for a resident split.
INDICES = 2**17


def choose(asked: Placement, source: Source, mesh: Mesh, *, on_host: str = "") -> tuple[Placement, str]:
    """Where a data set is to live.

    Args:
      asked: what the config says; "auto" decides by size.
      source: the data set.
      mesh: whose devices' memory is looked at.
      on_host: the option for which rows must pass through the host; "" for none.

    Returns:
      ("device", "host" or "disk", why, in words for the log).

    Raises:
      UserError: the placement that the config asks for can't be.
    """
    stored = bool(source.train.stored or source.test.stored)
    if asked == "device" and on_host:
        raise UserError(
            f"data.placement='device' leaves nothing to do for {on_host}: rows do not pass through the host. "
            "Leave one of the two out."
        )
    if asked == "disk" and not stored:
        raise UserError(
            f"data.placement='disk': data.name={source.name!r} reads everything into memory when it is loaded. "
            "Use 'auto', 'host' or 'device'."
        )
    if asked != "auto":
        return asked, f"data on the {asked}, as the config says"
    elsewhere: Placement = "disk" if stored else "host"
    if on_host:
        return elsewhere, f"data on the {elsewhere}: {on_host} needs it there"
    limit = resident_limit(mesh)
    fits = source.nbytes <= limit
    where: Placement = "device" if fits else elsewhere
    relation = "within" if fits else "over"
    return where, f"data on the {where}: {source.nbytes / 2**20:.1f} MiB are {relation} {limit / 2**20:.0f} MiB"


def resident_limit(mesh: Mesh) -> float:
    """Bytes of a data set that may move onto the devices by itself."""
    memory = hardware.memory(mesh.devices.flat[0])
    return min(RESIDENT_BYTES, RESIDENT_SHARE * memory) if memory else RESIDENT_BYTES


@dataclasses.dataclass(frozen=True)
class Reader:
    """What one process does on its host for one step, or for one batch of an evaluation. Plain data: it can be pickled.

    Attributes:
      gather: of a `Split`.
      arrays: of a `Split`.
      index: number -> (batch_size,) int32, the examples of the global batch.
      spans: the columns of it, (start, stop), that are this process's.
      seed: of `functions`.
      functions: of `host_augment`.
    """

    gather: Callable[[Mapping[str, Any], Any], Rows]
    arrays: Mapping[str, np.ndarray]
    index: Callable[[int], np.ndarray]
    spans: tuple[tuple[int, int], ...]
    seed: int = 0
    functions: tuple[Callable[..., Any], ...] = ()

    def __call__(self, number: int) -> dict[str, Any]:
        """This process's part of a batch: {"index": (b,) int32, "rows": each (b, ...)}."""
        index = _columns(self.index(number), self.spans)
        rows = self.gather(self.arrays, index)
        return {"index": index, "rows": host_augment.apply(self.functions, rows, self.seed, number, index)}


class Feed:
    """One split, ready to be stepped through.

    What a step is given is `(each, every)`: `each` differs from step to step, `every` does not. `batch` turns the two
    into a batch, inside the jitted step.

    Args:
      split: the examples.
      mesh: where batches go.
      batch_size: examples of one global batch, over all processes.
      resident: gather on the device.
      loading: how rows are read ahead, where that is more than a gather from memory.
      functions: of `host_augment`, for training.

    Attributes:
      streams: rows are more than a gather from memory, and `loading` says who makes them.
      skipped: how many examples could not be read and were left out, as their source was told to.
      seen: of how many: the whole split where it is in memory, else all that were read so far.
    """

    def __init__(
        self,
        split: Split,
        mesh: Mesh,
        batch_size: int,
        *,
        resident: bool,
        loading: Loading | None = None,
        functions: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        self.split, self.mesh, self.batch_size, self.resident = split, mesh, batch_size, resident
        self.loading, self.functions = loading or Loading(), functions
        self.streams = not resident and bool(split.stored or functions)
        self.seen = 0 if self.streams else split.size
        self.skipped = 0 if self.streams else int(split.arrays.get(SKIP, np.False_).sum())
        self._made = self._sent = 0.0

    def fed(self) -> tuple[float, float]:
        """Seconds that what `dispatches` yielded took the thread that prepares it: (to read or make, to send)."""
        return self._made, self._sent

    @functools.cached_property
    def every(self) -> dict[str, jax.Array]:
        """What all steps see: the arrays of a resident split, on every device from the first use on."""
        arrays = dict(self.split.arrays) if self.resident else {}
        return jax.tree.map(lambda a: _everywhere(a, self.mesh), arrays)

    @functools.cached_property
    def _example(self) -> dict[str, Any]:
        """`each` of one example, on the host."""
        index = np.zeros(1, np.int32)
        whole = Reader(self.split.gather, self.split.arrays, lambda _: index, ((0, 1),), functions=self.functions)
        return {"index": index} if self.resident else whole(0)

    def abstract(self, lead: tuple[int, ...] = ()) -> tuple[Any, Any]:
        """(each, every) as `jax.ShapeDtypeStruct` with shardings; `lead` is (steps,) for those of one dispatch."""
        split = sharding.batch_sharding(self.mesh, lead=len(lead))
        whole = sharding.replicated(self.mesh)
        arrays = dict(self.split.arrays) if self.resident else {}
        return (
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((*lead, self.batch_size, *a.shape[1:]), a.dtype, sharding=split),
                self._example,
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
        rows = dict(self.split.gather(every, each["index"]) if self.resident else each["rows"])
        index = each["index"]
        if SKIP in rows:
            index = jnp.where(rows.pop(SKIP), jnp.int32(-1), index)
        return self.split.prepare(rows, index)

    def indices(self, seed: int, first: int, steps: int = 1) -> np.ndarray:
        """The examples of `steps` global batches of training from step `first` on: (steps, batch_size) int32."""
        return order.train_indices(seed, first, steps, self.batch_size, self.split.size, self.split.mixture)

    def dispatches(self, seed: int, stretches: Iterable[tuple[int, int]], most: int) -> Generator[Any]:
        """What each dispatch is given, prepared and sent by a thread ahead of need.

        Args:
          seed: of the run.
          stretches: (first step, number of steps) of each dispatch, one after the other; numbers up to `most`.
          most: steps that a dispatch has room for.

        Yields:
          The feed of `step.repeated`.
        """
        rows = self.rows(most)
        with _ahead(self._pieces(seed, _grouped(stretches, rows), rows), self.loading.ahead) as pieces:
            for group, each in pieces:
                shared = {"first": self._number(group[0][0]), "each": each, "every": self.every}
                for _, count in group:
                    yield {"count": self._count(count), **shared}

    def _pieces(self, seed: int, groups: Iterable[list[tuple[int, int]]], rows: int) -> Generator[Any]:
        """(dispatches that share a piece, `each` of their steps, sent)."""
        with contextlib.ExitStack() as stack:
            read: Iterator[Any] | None = None
            begun = time.monotonic()
            for group in groups:
                first, total = group[0][0], sum(count for _, count in group)
                if self.streams:
                    read = read or stack.enter_context(contextlib.closing(self.stream(seed, first)))
                    each = _stacked(list(itertools.islice(read, total)), rows)
                else:
                    index = np.zeros((rows, self.batch_size), np.int32)
                    index[:total] = self.indices(seed, first, total)
                    each = self._gathered(index)
                made = time.monotonic()
                sent = self._send(each, lead=1)
                now = time.monotonic()
                self._made, self._sent = self._made + made - begun, self._sent + now - made
                yield group, sent
                begun = time.monotonic()

    def stream(self, seed: int, first: int = 0) -> Generator[dict[str, Any]]:
        """What `Reader` gives for each step of training from `first` on, read ahead."""
        return self._read(self._reader(seed), range(first, LONGEST))

    def _reader(self, seed: int) -> Reader:
        index = functools.partial(_train_index, seed, self.batch_size, self.split.size, self.split.mixture)
        return Reader(self.split.gather, self.split.arrays, index, self._spans, seed, self.functions)

    def _read(self, reader: Reader, numbers: range) -> Generator[dict[str, Any]]:
        """`reader` for each of `numbers`, read ahead; counts what could not be read."""
        with contextlib.closing(stream(reader, numbers, self.loading)) as read:
            for each in read:
                self.seen += int((each["index"] >= 0).sum())
                self.skipped += int((each["rows"].get(SKIP, np.False_) & (each["index"] >= 0)).sum())
                yield each

    def train_at(self, seed: int, step: int) -> tuple[Any, Any]:
        """(each, every) of one step of training, any past or future one."""
        if self.resident:
            return self._send(self._gathered(self.indices(seed, step)[0])), self.every
        return self._send(self._reader(seed)(step)), self.every

    def eval_at(self, number: int) -> tuple[Any, Any]:
        """(each, every) of one batch of an evaluation."""
        return self._send(self._gathered(order.eval_index(number, self.batch_size, self.split.size))), self.every

    def evaluation(self) -> Generator[tuple[Any, Any]]:
        """(each, every) of one pass over the split, in order, the last batch padded with index -1."""
        with _ahead(self._batches(), self.loading.ahead) as batches:
            for each in batches:
                yield each, self.every

    def _batches(self) -> Generator[Any]:
        """`each` of every batch of an evaluation, sent."""
        numbers = range(order.eval_batches(self.batch_size, self.split.size))
        index = functools.partial(order.eval_index, batch_size=self.batch_size, size=self.split.size)
        if self.streams:
            reader = Reader(self.split.gather, self.split.arrays, index, self._spans)
            with contextlib.closing(self._read(reader, numbers)) as read:
                for each in read:
                    yield self._send(each)
        else:
            for number in numbers:
                yield self._send(self._gathered(index(number)))

    def _gathered(self, index: np.ndarray) -> dict[str, Any]:
        """`each` for global indices (B,) or (steps, B), on the host; a resident split needs the indices only."""
        local = _columns(index, self._spans)
        each: dict[str, Any] = {"index": local}
        if not self.resident:
            rows = self.split.gather(self.split.arrays, local.reshape(-1))
            each["rows"] = {name: values.reshape(*local.shape, *values.shape[1:]) for name, values in rows.items()}
        return each

    def _send(self, each: dict[str, Any], lead: int = 0) -> Any:
        """To the mesh; each process has the rows of its own devices."""
        where = sharding.batch_sharding(self.mesh, lead=lead)
        if jax.process_count() == 1:
            return jax.device_put(each, where)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(
                where, a, (*a.shape[:lead], self.batch_size, *a.shape[lead + 1 :])
            ),
            each,
        )

    @functools.cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        """The columns of a global batch that this process's devices hold: (start, stop) of each run of them."""
        where = sharding.batch_sharding(self.mesh)
        held = np.zeros(self.batch_size + 2, np.int8)  # with a place that is not held on either side
        for part in where.addressable_devices_indices_map((self.batch_size,)).values():
            held[1:-1][part[0] if part else slice(None)] = 1
        edges = np.flatnonzero(np.diff(held)).tolist()
        return tuple(zip(edges[::2], edges[1::2]))

    def _number(self, value: int) -> jax.Array:
        return _everywhere(np.asarray(value, np.int32), self.mesh)

    @functools.cached_property
    def _count(self) -> Callable[[int], jax.Array]:
        return functools.cache(self._number)


def _train_index(seed: int, batch_size: int, size: int, mixture: tuple[tuple[int, int], ...], step: int) -> np.ndarray:
    return order.train_indices(seed, step, 1, batch_size, size, mixture)[0]


def _grouped(stretches: Iterable[tuple[int, int]], rows: int) -> Iterator[list[tuple[int, int]]]:
    """Group dispatches, one after the other, so that each group has at most `rows` steps."""
    group: list[tuple[int, int]] = []
    for first, count in stretches:
        if group and first + count - group[0][0] > rows:
            yield group
            group = []
        group.append((first, count))
    if group:
        yield group


def _columns(index: np.ndarray, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(..., B) -> (..., b): the columns of `spans`."""
    if spans == ((0, index.shape[-1]),):
        return index
    return np.concatenate([index[..., start:stop] for start, stop in spans], axis=-1)


def _stacked(steps: list[dict[str, Any]], rows: int) -> Any:
    """`each` of several steps, filled up to `rows` steps with the last one, which no dispatch counts."""
    steps += steps[-1:] * (rows - len(steps))
    return jax.tree.map(lambda *values: values[0][None] if rows == 1 else np.stack(values), *steps)


def _everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    where = sharding.replicated(mesh)
    return jax.make_array_from_callback(array.shape, where, lambda part: np.asarray(array[part], order="C"))


@contextlib.contextmanager
def _ahead(items: Generator[Any], ahead: int) -> Iterator[Iterator[Any]]:
    """Iterate `items` on a thread, up to `ahead` results early. An error comes out where its result would."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
    done, stopped = object(), threading.Event()

    def put(result: Any, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((result, error), timeout=0.1)
                return

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
            put(done)
        except BaseException as error:
            put(None, error)

    def results() -> Iterator[Any]:
        while True:
            result, error = ready.get()
            if error is not None:
                raise error
            if result is done:
                return
            yield result

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        stopped.set()
        thread.join()
