"""`bench data`: what it measures is what a run does, and the ways are compared fairly."""

import contextlib
import functools
import json

import numpy as np
import pytest

from flaxmodels import data, sharding
from flaxmodels.data import order
from flaxmodels.data.feed import Feed
from flaxmodels.data.loading import Loading
from flaxmodels.perf import bench_data, bench_show
from flaxmodels.registry import UserError


def config(**options):
    return {
        "model": {"name": "mlp"},
        "data": {"name": "digits", "batch_size": 64, **options},
        "optim": {"name": "adam", "learning_rate": 1e-3},
        "train": {"duration": 10, "steps_per_dispatch": 4},
    }


@pytest.fixture
def quick(monkeypatch):
    """Two turns of next to nothing: what is tested is not how fast it is."""
    monkeypatch.setattr(bench_data, "TURNS", 2)
    monkeypatch.setattr(bench_data, "SHORTEST", 0.01)
    monkeypatch.setattr(bench_data, "SETTLED", 0.001)
    monkeypatch.setattr(bench_data, "WORKERS", ())


@pytest.fixture
def clock(monkeypatch):
    """Time passes only when a way says so."""
    now = [0.0]
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: now[0])
    return now


def test_speeds_are_those_of_what_is_not_ready_yet(clock):
    """What a loader has ready when its turn begins costs no time, and tells nothing of its speed."""
    events = []

    @contextlib.contextmanager
    def way(name, cost):
        ready = []

        def done():
            while True:
                if not events or events[-1] != name:
                    ready[:] = [10] * 500
                events.append(name)
                if not ready:
                    clock[0] += cost
                yield ready.pop() if ready else 10

        yield done()
        events.append(f"{name} left")

    ways = {"a": functools.partial(way, "a", 0.01), "b": functools.partial(way, "b", 0.02)}
    speeds = bench_data.measure(ways, 7.0)
    assert {name: len(found) for name, found in speeds.items()} == {"a": bench_data.TURNS, "b": bench_data.TURNS}
    np.testing.assert_allclose(speeds["a"], 1000, rtol=1e-6)
    np.testing.assert_allclose(speeds["b"], 500, rtol=1e-6)
    turns = [name for name, before in zip(events, ["", *events], strict=False) if name != before]
    assert turns == ["a", "b"] * (1 + bench_data.TURNS) + ["b left", "a left"]


def test_turns_are_long_enough(clock):
    @contextlib.contextmanager
    def way():
        def done():
            while True:
                clock[0] += 0.05
                spent.append(clock[0])
                yield 1

        yield done()

    for seconds, least in ((0.0, 0.3), (21.0, 3.0)):
        spent = []
        bench_data.measure({"one": way}, seconds)
        assert spent[-1] - spent[0] >= 7 * (0.2 + least) - 1e-6


def test_ways_to_load_what_is_in_memory(quick, capsys):
    rows = bench_data.bench(config(), 0.0)
    assert [row["way"] for row in rows] == ["memory", "memory to device", "device"]
    assert [row["chosen"] for row in rows] == [False, False, True]
    for row in rows:
        assert row["slowest"] <= row["examples_per_second"] <= row["fastest"] and "ratio" not in row
        assert (row["data"], row["batch_size"], row["turns"]) == ("digits", 64, 2)
    bench_show.show(rows, bench_show.DATA, as_json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    lines = list(bench_show.DATA.table(rows))
    assert sum(line.startswith("* device ") for line in lines) == 1


def test_functions_on_the_host_are_part_of_it(quick):
    rows = bench_data.bench(config(host_augment=({"name": "flip"},)), 0.0)
    assert [row["way"] for row in rows] == ["memory, threads", "memory to device"]
    assert [row["chosen"] for row in rows] == [False, True]


@pytest.mark.slow
def test_a_peer_does_the_same_work(quick):
    rows = bench_data.bench(config(), 0.0, against=("grain",))
    speeds = {row["way"]: row for row in rows}
    assert list(speeds) == ["memory", "memory to device", "device", "grain.DataLoader, threads"]
    assert all(row["peer"] == "grain.DataLoader, threads" and row["ratio"] > 0 for row in rows[:3])
    assert "ratio" not in rows[3] and not rows[3]["chosen"]
    split = data.load("digits").train
    examples = bench_data._Examples(split)
    assert len(examples) == split.size
    for name, value in examples[7].items():
        np.testing.assert_array_equal(value, split.arrays[name][7])


def test_a_ratio_is_taken_turn_by_turn():
    """What slows the machine in one turn slows both."""
    assert bench_data._ratio([10, 2, 30], [5, 1, 10]) == 2


@pytest.mark.parametrize("way", ["_gathered", "_sent", "_read", "_resident"])
def test_a_way_counts_the_examples_of_the_run(way):
    """Their indices are the run's, and all that is counted has been gathered."""
    split = data.load("digits").train
    seen = []

    def gather(arrays, index):
        if isinstance(index, np.ndarray):
            seen.append(np.array(index))
        return split.gather(arrays, index)

    watched = data.Split(split.size, split.arrays, gather, split.prepare, stored=way == "_read")
    feed = Feed(watched, sharding.make_mesh(), 64, resident=way == "_resident", loading=Loading(threads=1))
    arguments = (3,) if way == "_read" else (3, 4)
    with getattr(bench_data, way)(feed, *arguments) as done:
        count = sum(next(done) for _ in range(5))
    assert count == 5 * 64 * (1 if way == "_read" else 4)
    if way != "_resident":
        index = np.concatenate([batch for batch in seen if len(batch) > 1])[:count]
        np.testing.assert_array_equal(index, order.train_indices(3, 0, count // 64, 64, split.size).ravel())


def test_a_peer_that_nobody_knows():
    with pytest.raises(UserError, match=r"--against='grian'.*Did you mean 'grain'\?"):
        bench_data.bench(config(), against=("grian",))


def test_a_wrong_config_is_an_error():
    with pytest.raises(UserError, match=r"data\.batchsize"):
        bench_data.bench(config(batchsize=3))


@pytest.mark.slow
def test_ways_to_load_what_is_on_disk(quick, monkeypatch):
    monkeypatch.setattr(bench_data, "WORKERS", (1,))
    data.load("digits")  # prepares it
    options = dict(name="flaxmodels.data.tfds_source:tfds", dataset="flaxmodels_digits", workers=1)
    rows = bench_data.bench(config(**options), 0.0, against=("grain",))
    assert [(row["way"], row["chosen"]) for row in rows] == [
        ("disk, threads", False),
        ("disk, 1 worker", False),
        ("disk to device", True),
        ("memory", False),
        ("memory to device", False),
        ("device", False),
        ("grain.DataLoader, threads", False),
        ("grain.DataLoader, 1 worker", False),
    ]
