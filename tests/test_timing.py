"""What is timed takes turns, and only steps are timed; what is too unsteady is not judged."""

import re
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from flaxmodels.job import assemble
from flaxmodels.perf import compiling, energy, timing, ways
from flaxmodels.perf.running import STEPS, Run, first_feeds
from flaxmodels.perf.timing import Turn


class Clocked:
    """Stands in for a `Run`: each dispatch of four steps takes the same time, and half as much of a processor."""

    def __init__(self, name, cost, clock, log):
        self.name, self.cost, self.clock, self.log, self.step = name, cost, clock, log, 0

    def prepare(self):
        self.clock[0] += 1000  # not to be seen anywhere
        self.clock[1] += 1000
        self.log.append(f"prepare {self.name}")
        return 8

    def dispatch(self):
        self.clock[0] += self.cost
        self.clock[1] += self.cost / 2
        self.step += 4
        self.log.append(self.name)
        return np.zeros(1)


@pytest.fixture
def clock(monkeypatch):
    """[seconds on the wall, seconds of the processor]."""
    now = [0.0, 0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: now[1])
    return now


def test_turns_alternate_and_only_steps_are_timed(clock):
    log = []
    runs = {name: Clocked(name, cost, clock, log) for name, cost in (("a", 0.5), ("b", 1.0))}
    found = timing.measure(runs, 14.0, 7, lambda: 3 * clock[1])
    order = [name for name in log if not name.startswith("prepare")]
    order = [name for name, before in zip(order, ["", *order], strict=False) if name != before]
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]  # each turn begins with what the last one ended with
    assert [len(found[name]) for name in "ab"] == [7, 7]
    turn = found["b"][0]
    assert turn == Turn((0.25,) * 3, (1.0,) * 3, 0.125, 0.375)  # of a step, but for the calls; at least three
    assert len(found["a"][0].seconds) == 4  # 2 s, of dispatches of half a second


def test_what_is_prepared_may_not_last(clock):
    log = []
    found = timing.measure({"a": Clocked("a", 1.0, clock, log)}, 12.0, 1)["a"][0]
    left_out = timing.SETTLED + 1
    assert log == [*(["prepare a"] + ["a"] * 8) * 2, "prepare a", *["a"] * (left_out + 2)]
    assert found.seconds == (0.25,) * 12 and found.cpu == 0.125 and found.joules is None


def test_figures_are_medians():
    turns = [Turn((1.0, 2.0, 9.0), (0.1, 0.1, 0.2), cpu, None) for cpu in (1.0, 2.0, 3.0)]
    found = timing.figures(turns)
    assert found["step_ms"] == 2000 and found["p95_ms"] == 9000 and found["cpu_ms"] == 2000
    assert found["spread"] == 0 and found["cpu_spread"] == 0.5 and found["dispatch_us"] == 1e5
    assert found["joules"] is None and (found["dispatches"], found["turns"]) == (9, 3)
    assert timing.figures([Turn((1.0,), (1.0,), 1.0, j) for j in (1.0, 7.0, 2.0)])["joules"] == 2


def turns(walls, cpus):
    return [Turn((wall,), (0.1,), cpu, None) for wall, cpu in zip(walls, cpus, strict=True)]


STEADY, WILD = [1.0] * 7, [1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("walls", "cpus", "platform", "words"),
    [
        ([2.0] * 7, STEADY, "cpu", "2.00 x slower by wall time"),
        ([0.5] * 7, STEADY, "tpu", "2.00 x faster by wall time"),
        ([1.04] * 7, [2.0] * 7, "cpu", r"no difference by wall time \(under 5%\)"),
        (WILD, [1.1] * 7, "cpu", "1.10 x slower by CPU time"),
        (WILD, [1.1] * 7, "gpu", "not judged: a spread of 50% of wall time, over 15%"),
        (WILD, WILD, "cpu", "not judged: a spread of 50% of wall time and 50% of CPU time, over 15%"),
    ],
)
def test_verdicts(walls, cpus, platform, words):
    found = timing.against(turns(walls, cpus), turns(STEADY, STEADY), platform)
    assert pytest.approx(np.median(walls)) == found["ratio"] and pytest.approx(np.median(cpus)) == found["cpu_ratio"]
    assert re.match(words, found["verdict"])


def test_what_slows_both_cancels():
    slow = [1.0, 3.0, 2.0, 1.0, 5.0, 1.0, 4.0]
    found = timing.against(turns([2 * x for x in slow], slow), turns(slow, slow), "cpu")
    assert found["ratio"] == 2 and found["ratio_spread"] == 0


# Programs


def test_tracing_is_told_from_compiling():
    def inner(x):
        time.sleep(0.2)  # while it is traced
        return x + 1

    def slow(x):
        return jax.jit(inner)(x)  # traced inside: part of the whole, and not to be counted twice

    program, seconds = compiling.timed(lambda: jax.jit(slow).lower(np.zeros(3, np.float32)))
    assert seconds.trace >= 0.2 and min(seconds.lower, seconds.compile) > 0
    np.testing.assert_array_equal(program(np.zeros(3, np.float32)), np.ones(3))


def test_a_fresh_cache_is_empty_then_full_then_gone():
    keys = [key for key in jax.config.values if "compilation_cache" in key or "persistent_cache" in key]
    before, hits = {key: jax.config.values[key] for key in keys}, []

    def listen(event, **_):
        hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None

    def compile_it():
        return compiling.timed(lambda: jax.jit(lambda x: x * 7 - 3).lower(np.zeros(5, np.float32)))

    jax.monitoring.register_event_listener(listen)
    try:
        with compiling.fresh_cache():
            folder = Path(jax.config.jax_compilation_cache_dir)
            assert not list(folder.iterdir())
            compile_it()
            assert not hits and list(folder.iterdir())
            compile_it()
            assert len(hits) == 1
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert not folder.exists() and before == {key: jax.config.values[key] for key in keys}


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_run_makes_the_first_steps_and_goes_round(placement):
    """With a learning rate of 0 the loss tells which batch a step had."""
    sections = dict(data=dict(placement=placement), optim=dict(name="sgd", learning_rate=0.0))
    config = small.config("mlp", **sections, train=dict(steps_per_dispatch=3, duration=15))
    job = assemble({**config, "model": dict(name="mlp", hidden=(4,), dropout=0.0)}, jax.devices()[:1])
    _, packed, names = small.train(job, 15)
    losses = small.means(packed, names)["loss"]
    assert len(set(losses)) == 15
    run = Run(ways.jit(job), first_feeds(job))
    means, params, extra = run.results(whole=True)
    np.testing.assert_allclose(means["loss"], losses[:STEPS], rtol=1e-6)
    assert run.first_seconds > 0 and params and extra == {}
    assert run.prepare() == run.prepare() > 2 * STEPS
    seen = []
    for _ in range(STEPS + 1):
        seen += run.way.read(run.dispatch())[:, names.index("loss")].tolist()
    seen = [total / weight for total, weight in seen]
    np.testing.assert_allclose(seen, np.resize(losses, len(seen)), rtol=1e-6)
    assert int(run.state.step) == run.step == STEPS + 3 * (STEPS + 1)


# Energy


def zone(folder, name, now, largest, of="package-0"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "name").write_text(f"{of}\n")
    (folder / name / "energy_uj").write_text(f"{now}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{largest}\n")


def test_packages_are_added_up_and_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.counter("cpu") == (None, f"energy can't be read: there is no counter in {tmp_path}")
    zone(tmp_path, "intel-rapl:2", 7, 9_999_999, "psys")  # the packages, and what is around them
    assert energy.counter("cpu") == (None, f"energy can't be read: there is no counter in {tmp_path}")
    zone(tmp_path, "intel-rapl:0", 9_000_000, 9_999_999)
    zone(tmp_path, "intel-rapl:0:0", 5, 9_999_999, "core")  # part of the package
    zone(tmp_path, "intel-rapl:1", 1_000_000, 9_999_999)
    read, said = energy.counter("cpu")
    assert said == "energy of 2 processor packages, all that runs on them (RAPL)" and read() == 0
    zone(tmp_path, "intel-rapl:0", 1_000_000, 9_999_999)  # 2 J later
    zone(tmp_path, "intel-rapl:1", 1_500_000, 9_999_999)
    assert read() == 2.5 and read() == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir()
    assert energy.counter("cpu") == (
        None, f"energy can't be read: {tmp_path}/intel-rapl:1/energy_uj: Is a directory"
    )  # fmt: skip


def nvml(error=0):
    """Stands in for NVIDIA's library: two GPUs, of which the second has used 1 J more."""

    def put(target, value, result=0):
        target._obj.value = value
        return result

    return types.SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetCount_v2=lambda number: put(number, 2),
        nvmlDeviceGetHandleByIndex_v2=lambda index, gpu: put(gpu, index + 1),
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu, used: put(used, 1000 * gpu.value, error),
    )


def test_gpus_are_added_up(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    assert energy.counter("gpu") == (None, "energy can't be read: libnvidia-ml.so.1 is not installed")
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: nvml())
    read, said = energy.counter("gpu")
    assert read() == 3.0 and said == "energy of 2 GPUs, all that runs on them (NVML)"
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: nvml(error=3))
    assert energy.counter("gpu") == (None, "energy can't be read: NVML error 3")
    assert energy.counter("tpu") == (None, "energy of a tpu can't be read from here")
