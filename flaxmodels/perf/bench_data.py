"""How many examples a second the data of a config come at, by every way there is to load them. No model is involved.

The ways take turns in one run, so that whatever else the machine does slows all of them alike. Read `bench` first.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmodels import data, registry, sections, sharding
from flaxmodels.data import host_augment, tfds_sets, tfds_source
from flaxmodels.data.feed import RESIDENT_BYTES, Feed, choose
from flaxmodels.data.loading import Loading
from flaxmodels.data.split import Split
from flaxmodels.durations import parse
from flaxmodels.job import Job

# Each way has so many turns, of so many seconds at the least.
TURNS, SHORTEST = 7, 0.3
# Seconds at the beginning of a turn that do not count: a loader first gives what it had ready.
SETTLED = 0.2
# Worker processes to try.
WORKERS = (1, 2)
# The way that a run goes, by placement.
TO_DEVICE = {"device": "device", "host": "memory to device", "disk": "disk to device"}
# A way: opened, it gives the number of examples done, batch by batch; on leaving, its threads and processes end.
Way = Callable[[], contextlib.AbstractContextManager[Iterator[int]]]


def bench(config: Mapping[str, Any], seconds: float = 3.0, against: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Measure the training split of a config.

    Args:
      config: of a run, with all its sections.
      seconds: that each way is measured for, all turns together.
      against: whose loaders to measure besides, with the same work: ("grain",), its DataLoader.

    Returns:
      A row for each way, ready for JSON: "data", "way", "batch_size", "examples_per_second" (median of all turns),
      "slowest" and "fastest" (turn), "turns", and whether it is "chosen" by the config. With `against` each of ours has
      "ratio", the median over turns of its speed by that of "peer", the fastest of theirs.

    Raises:
      UserError: the config is wrong, or nobody in `against` is known.
    """
    makers = [registry.pick({"grain": _grain}, name, "--against") for name in against]
    checked = sections.check(config, lambda text, where: parse(text, where) and text)
    batching, options = sections.split_data(checked["data"])
    mesh = sharding.make_mesh(**checked["mesh"])
    sharding.check_batch(mesh, batching["batch_size"])
    source = data.load(**options)
    loading, functions = batching["loading"], host_augment.make(batching["host_augment"])
    on_host = "data.host_augment" if functions else f"data.workers={loading.workers}" if loading.workers else ""
    placed, _ = choose(batching["placement"], source, mesh, on_host=on_host)
    feed = functools.partial(Feed, mesh=mesh, batch_size=batching["batch_size"], functions=functions)
    steps = checked["train"].get("steps_per_dispatch", sections.Cadence.steps_per_dispatch)
    ours = dict(_ours(source.train, feed, loading, checked["seed"], steps))
    peers: dict[str, Way] = {}
    for maker in makers:
        peers.update(maker(source.train, options, batching["batch_size"], checked["seed"]))
    speeds = measure({**ours, **peers}, seconds)
    best = max(peers, key=lambda way: statistics.median(speeds[way]), default=None)
    return [
        {
            "data": source.name,
            "way": way,
            "batch_size": batching["batch_size"],
            "examples_per_second": round(statistics.median(found)),
            "slowest": round(min(found)),
            "fastest": round(max(found)),
            "turns": TURNS,
            "chosen": way == TO_DEVICE[placed],
            **({"ratio": _ratio(found, speeds[best]), "peer": best} if best and way in ours else {}),
        }
        for way, found in speeds.items()
    ]


def _ratio(speeds: Sequence[float], others: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(speeds, others, strict=True)), 3)


def speed(job: Job, seconds: float = 1.0) -> tuple[str, float]:
    """How a run of this job loads its training split, and how many examples a second that gives."""
    feed = job.train
    placed = "device" if feed.resident else "disk" if feed.split.stored else "host"
    measured = _resident if feed.resident else _sent
    way = functools.partial(measured, feed, job.seed, job.cadence.steps_per_dispatch)
    found = measure({"run": way}, seconds, turns=3)
    return TO_DEVICE[placed], statistics.median(found["run"])


def measure(ways: Mapping[str, Way], seconds: float, turns: int = TURNS) -> dict[str, list[float]]:
    """Examples a second of each way, turn by turn.

    Args:
      ways: name -> way.
      seconds: for each of them, all turns together.
      turns: how many.
    """
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(way()) for name, way in ways.items()}
        for done in opened.values():
            next(done)  # processes start, programs compile
        for _ in range(turns):
            for name, done in opened.items():
                _speed(done, SETTLED)
                speeds[name].append(_speed(done, max(SHORTEST, seconds / turns)))
    return speeds


def _speed(done: Iterator[int], seconds: float) -> float:
    start, count, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        count += next(done)
        passed = time.perf_counter() - start
    return count / passed


def _ours(
    split: Split, feed: Callable[..., Feed], loading: Loading, seed: int, steps: int
) -> Iterator[tuple[str, Way]]:
    """Our ways to load a split: from the disk where it is stored, and from memory where it fits in.

    Args:
      split: to load.
      feed: (split, resident=, loading=) -> its feed.
      loading: what the config says.
      seed: of the order.
      steps: of a dispatch.
    """
    augmented = bool(feed(split, resident=False).functions)
    if split.stored or augmented:
        where = "disk" if split.stored else "memory"
        for workers in (0, *WORKERS):
            read = feed(split, resident=False, loading=dataclasses.replace(loading, workers=workers))
            yield f"{where}, {_makers(workers)}", functools.partial(_read, read, seed)
    if split.stored:
        yield TO_DEVICE["disk"], functools.partial(_sent, feed(split, resident=False, loading=loading), seed, steps)
    if split.nbytes <= RESIDENT_BYTES or not split.stored:
        split = split.read()
        if not augmented:
            yield "memory", functools.partial(_gathered, feed(split, resident=False), seed, steps)
        host = feed(split, resident=False, loading=loading)
        yield TO_DEVICE["host"], functools.partial(_sent, host, seed, steps)
        if not augmented:
            yield TO_DEVICE["device"], functools.partial(_resident, feed(split, resident=True), seed, steps)


@contextlib.contextmanager
def _read(feed: Feed, seed: int) -> Iterator[Iterator[int]]:
    """Read by threads or worker processes; onto the host."""
    with contextlib.closing(feed.stream(seed)) as read:
        yield (feed.batch_size for _ in read)


@contextlib.contextmanager
def _gathered(feed: Feed, seed: int, steps: int) -> Iterator[Iterator[int]]:
    """Indices made, rows gathered by numpy; they stay on the host."""

    def done() -> Iterator[int]:
        for first in itertools.count(0, steps):
            index = feed.indices(seed, first, steps).reshape(-1)
            feed.split.gather(feed.split.arrays, index)
            yield len(index)

    yield done()


@contextlib.contextmanager
def _sent(feed: Feed, seed: int, steps: int) -> Iterator[Iterator[int]]:
    """The same, by the thread that a run has for it, and sent to the devices."""

    def done() -> Iterator[int]:
        for dispatch in dispatches:
            jax.block_until_ready(dispatch["each"])
            yield steps * feed.batch_size

    with contextlib.closing(feed.dispatches(seed, _stretches(steps), steps)) as dispatches:
        yield done()


@contextlib.contextmanager
def _resident(feed: Feed, seed: int, steps: int) -> Iterator[Iterator[int]]:
    """Indices made and sent; batches gathered and prepared on the devices, in a loop as the train step is."""

    @jax.jit
    def gather(row: Any, dispatch: dict[str, Any]) -> Any:
        def one(i: Any, _: Any) -> Any:
            return feed.batch(jax.tree.map(lambda x: x[row + i], dispatch["each"]), dispatch["every"])

        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), feed.example())
        return jax.lax.fori_loop(0, dispatch["count"], one, empty)

    def done() -> Iterator[int]:
        before = None
        for first, dispatch in zip(itertools.count(0, steps), dispatches, strict=False):
            batch = gather(first - dispatch["first"], dispatch)
            jax.block_until_ready(before)
            before = batch
            yield steps * feed.batch_size

    with contextlib.closing(feed.dispatches(seed, _stretches(steps), steps)) as dispatches:
        yield done()


def _stretches(steps: int) -> Iterator[tuple[int, int]]:
    return ((first, steps) for first in itertools.count(0, steps))


def _grain(split: Split, options: Mapping[str, Any], batch_size: int, seed: int) -> Iterator[tuple[str, Way]]:
    """Grain's own DataLoader: shuffled, example by example. TFDS decodes where the data are its own."""
    source: Any = _Examples(split)
    if registry.pick(data.SOURCES, options["name"], "data.name") is tfds_source.tfds:
        bound = inspect.signature(tfds_source.tfds).bind(**{k: v for k, v in options.items() if k != "name"})
        bound.apply_defaults()
        found = tfds_sets.find(*(bound.arguments[key] for key in ("dataset", "data_dir", "manual_dir")))
        source = found.as_data_source(bound.arguments["train"])
    for workers in (0, *WORKERS):
        way = functools.partial(_data_loader, source, batch_size, seed, workers)
        yield f"grain.DataLoader, {_makers(workers)}", way


def _makers(workers: int) -> str:
    return "threads" if not workers else f"{workers} worker" + "s" * (workers > 1)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """A split as Grain sees it: a sequence of examples."""

    split: Split

    def __len__(self) -> int:
        return self.split.size

    def __getitem__(self, number: int) -> Any:
        rows = self.split.gather(self.split.arrays, np.array([number], np.int32))
        return {name: values[0] for name, values in rows.items()}


@contextlib.contextmanager
def _data_loader(source: Any, batch_size: int, seed: int, workers: int) -> Iterator[Iterator[int]]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # its worker processes are told what Grain's own flags are: as they are by default
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.IndexSampler(
            len(source), shuffle=True, seed=seed, shard_options=grain.sharding.NoSharding()
        ),
        operations=[grain.transforms.Batch(batch_size, drop_remainder=True)],
        worker_count=workers,
    )
    yield (batch_size for _ in loader)
