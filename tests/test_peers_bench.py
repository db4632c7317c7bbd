"""`bench peers`: what is timed is whole steps of a process that alone runs; ratios are told only where they can be."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxmodels.cli import peers as verb
from flaxmodels.job import assemble
from flaxmodels.perf import count
from flaxmodels.perf.peers import bench, judging, machine, plain_jax, process, table, trainer, worker, works
from flaxmodels.perf.peers.judging import Chunk
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

# --- what is timed


class Clock:
    """Time that goes on only while one sleeps; a quarter of it on a processor."""

    now = 0.013

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / 4


@pytest.mark.parametrize(("unit", "seconds", "steps"), [(1, 0.05, 3), (3, 0.05, 3), (3, 0.07, 6), (1, 0.0, 1)])
def test_whole_steps_are_timed(monkeypatch, unit, seconds, steps):
    """Of steps of 20 ms, in units of one or three: from the end of one to the end of another."""
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    found = worker.chunk(trainer.Trainer(lambda: None, lambda: int(clock.now / 0.02), lambda: 1.0, {}), seconds, unit)
    assert found["steps"] == steps and "compiles" not in found
    assert found["wall"] == pytest.approx(steps * 0.02, abs=2 * worker.LOOK)
    assert found["cpu"] == pytest.approx(found["wall"] / 4)
    assert found["own"] == pytest.approx((clock.now - 0.013) / 4), "waiting for the first end is our own, too"


def test_compiles_in_between_are_counted():
    made, compiled = iter(range(10**6)), iter(range(10**6))
    peer = trainer.Trainer(lambda: None, lambda: next(made), lambda: 1.0, {}, compiles=lambda: next(compiled))
    assert worker.chunk(peer, 0.0)["compiles"] == 1


@pytest.mark.parametrize("each", [1, 16])
def test_the_loss_is_of_the_first_steps(each):
    """Whether a call makes one step or several, and not of later ones."""

    class EnoughError(Exception):
        pass

    def step(i):
        if i * each >= works.WARM + 40:
            raise EnoughError
        return np.arange(i * each, (i + 1) * each)

    def mean(losses):
        return float(np.concatenate(losses)[: works.WARM if each > 1 else None].mean())

    peer = trainer.stepping(step, mean, {"x": "1"}, 7, each)
    assert peer.loss() is None and peer.steps() == 0
    with pytest.raises(EnoughError):
        peer.run()
    assert peer.loss() == np.arange(works.WARM).mean()
    assert peer.steps() >= works.WARM + 40 and peer.steps() % each == 0 and peer.parameters == 7


def test_calls_are_steps():
    """Of what generates: its loss is known before, and told when all has been compiled."""

    class EnoughError(Exception):
        pass

    calls = iter(range(3))

    def call():
        told.append((peer.steps(), peer.loss()))
        if next(calls) == 2:
            raise EnoughError

    told = []
    peer = trainer.repeating(call, 10.9, {"x": "1"}, 7)
    with pytest.raises(EnoughError):
        peer.run()
    assert told == [(0, None), (1, None), (2, 10.9)] and peer.parameters == 7


# --- processes

ECHO = """
import json, sys
print("noise", file=sys.stderr)
print(json.dumps({"loss": 1.0}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": float(line)}), flush=True)
"""


def python(code, folder, name="peer"):
    return process.Process(name, [sys.executable, "-S", "-c", code], folder, dict(os.environ))


def stopped(pid):
    """Whether a process is, or is soon, stopped; one that waits for input is not."""
    deadline = time.monotonic() + 60
    while True:
        late = time.monotonic() > deadline  # before the last look
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        if late:
            return False
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peer_is_stopped_but_in_its_turn(tmp_path):
    with python(ECHO, tmp_path) as peer:
        assert peer.ready() == {"loss": 1.0} and stopped(peer.pid)
        for seconds in (0.0, 0.25):
            assert peer.ask(seconds) == {"seconds": seconds} and stopped(peer.pid)
        pid = peer.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_peer_that_ends_says_why(tmp_path):
    said = r"torch_compiled: it ended. The end of its output:\n    no compiler"
    ends = python("raise SystemExit('no compiler')", tmp_path, "torch_compiled")
    with ends as peer, pytest.raises(FaultError, match=said):
        peer.ready()
    with python(ECHO + "    sys.exit('worn out')", tmp_path) as peer:
        peer.ready()
        peer.ask(1.0)
        with pytest.raises(FaultError, match="worn out"):
            peer.ask(1.0)


def test_a_peer_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SET_UP", 0.2)
    with python("import time; time.sleep(1000)", tmp_path) as peer:
        with pytest.raises(FaultError, match="did not answer"):
            peer.ready()
        assert peer._process.wait(60) == -signal.SIGKILL, "it would take the time of others"


def test_each_has_an_environment_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = process.environment("keras", tmp_path, (3, 4))
    assert found["KERAS_BACKEND"] == "jax" and found["JAX_PLATFORMS"] == "cpu" and found["OMP_NUM_THREADS"] == "2"
    assert "XLA_FLAGS" not in found and "JAX_ENABLE_X64" not in found
    assert "KERAS_BACKEND" not in process.environment("torch", tmp_path, ())
    assert "OMP_NUM_THREADS" not in process.environment("torch", tmp_path, ())


# --- the machine


def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 9}, raising=False)
    assert machine.cores(2) == (5, 9)
    with pytest.raises(UserError, match="--cores=4: this process may use 3"):
        machine.cores(4)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores(64) == ()


def test_what_others_used(tmp_path, monkeypatch):
    """Of core 1 alone: 100 ticks busy, a tenth of them ours; waiting for a disk is idle, stolen time is busy."""
    file = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", file)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    file.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 5 0 0 0 0 0 0 0 0 0\ncpu1 10 0 0 50 0 0 0 0 0 0\nintr 1\n")
    share = machine.others((1,))
    file.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 900 0 0 0 0 0 0 0 0 0\ncpu1 60 0 30 99 77 0 0 20 0 0\nintr 1\n")
    assert share(0.1) == pytest.approx((1.0 - 0.1) / 2.0)


def test_where_nobody_tells_what_others_used(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_STAT", tmp_path / "none")
    assert machine.others((0,))(0.1) is None
    assert Chunk(1, 1.0, 1.0).quiet


# --- judging


def chunks(cpu, wall=1.0, others=0.0, rounds=9, jitter=0.0, compiles=None):
    """Turns of 100 steps; `jitter` of every other one, as a part."""
    return [
        Chunk(100, 0.1 * wall * (1 + jitter * (i % 2)), 0.1 * cpu * (1 + jitter * (i % 2)), others, compiles)
        for i in range(rounds)
    ]


def warm(loss=1.0, parameters=10):
    return {"loss": loss, "seconds": 2.0, "parameters": parameters, "versions": {"x": "1"}}


def judged(work="mlp", cores=1, ready=None, absent=None, **found):
    ready = ready or {peer: warm() for peer in found}
    return {row["peer"]: row for row in judging.rows(work, cores, ready, found, absent or {})}


def test_processor_time_judges_on_one_core():
    rows = judged(fit=chunks(2.0, wall=9.0, others=0.9, compiles=0), torch=chunks(4.0, wall=1.0, others=0.9))
    assert rows["torch"]["by"] == "cpu" and rows["torch"]["ratio"] == 0.5 and rows["torch"]["refused"] == ""
    assert rows["fit"]["cpu_ms"] == 2.0 and rows["fit"]["wall_ms"] == 9.0 and rows["fit"]["ratio"] == 1.0
    assert rows["fit"]["compiles"] == 0 and rows["torch"]["compiles"] is None and rows["fit"]["quiet"] == 0


def test_the_wall_judges_on_more_cores_and_where_data_are_loaded():
    rows = judged(cores=2, fit=chunks(2.0, wall=3.0), torch=chunks(4.0, wall=2.0))
    assert rows["torch"]["by"] == "wall" and rows["torch"]["ratio"] == 1.5
    rows = judged("epoch", fit=chunks(2.0, wall=3.0), torch=chunks(4.0, wall=2.0))
    assert rows["torch"]["by"] == "wall" and rows["torch"]["unit_seconds"] == pytest.approx(469 * 2e-3)


def test_the_wall_is_believed_only_in_quiet_rounds():
    """Five quiet rounds of nine are enough, and only they count; four are not."""
    quiet, loud = chunks(1.0, wall=1.0, rounds=5), chunks(1.0, wall=7.0, others=0.5, rounds=4)
    rows = judged(cores=2, fit=quiet + loud, torch=chunks(1.0, wall=2.0))
    assert rows["torch"]["ratio"] == 0.5 and rows["torch"]["refused"] == "" and rows["fit"]["quiet"] == 5
    rows = judged(cores=2, fit=quiet[:4] + loud, torch=chunks(1.0, wall=2.0, rounds=8))
    assert rows["torch"]["ratio"] is None and "4 of 8 rounds quiet" in rows["torch"]["refused"]


def test_on_one_core_processor_time_helps_out():
    """On several it can't: threads that wait for each other use it, too."""
    busy = dict(fit=chunks(1.0, others=0.5), torch=chunks(2.0, others=0.5))
    assert judged("epoch", **busy)["torch"]["by"] == "cpu" and judged("epoch", **busy)["torch"]["ratio"] == 0.5
    assert judged("epoch", cores=2, **busy)["torch"]["refused"]


def test_a_spread_of_rounds_is_refused():
    rows = judged(fit=chunks(1.0, jitter=0.4), torch=chunks(1.0), jax=chunks(1.0, jitter=0.4))
    assert "spread 40%" in rows["torch"]["refused"] and rows["torch"]["cpu_spread"] == 0
    assert rows["fit"]["cpu_spread"] == 0.4
    assert rows["jax"]["refused"] == "", "what slows both alike leaves their ratio as it is"


def test_other_work_is_refused():
    found = dict(fit=chunks(1.0), torch=chunks(1.0), jax=chunks(1.0))
    ready = {"fit": warm(1.0, None), "torch": warm(1.05), "jax": warm(2.0)}
    rows = judged(ready=ready, **found)
    assert [rows[peer]["agrees"] for peer in found] == [True, True, False] and not judging.agree(list(rows.values()))
    assert "other work" in rows["jax"]["refused"] and not rows["torch"]["refused"]
    ready = {"fit": warm(1.0, None), "torch": warm(1.0, 10), "jax": warm(1.0, 11)}
    assert not any(row["agrees"] for row in judged(ready=ready, **found).values())
    ready = {"fit": warm(float("nan")), "torch": warm(), "jax": warm()}
    rows = judged(ready=ready, **found)
    assert not rows["fit"]["agrees"] and all(row["refused"] for row in rows.values())


def test_fit_over_its_compiled_step():
    rows = judged(fit=chunks(0.55), bare=chunks(0.5))
    assert rows["fit"]["over_bare_us"] == [50.0, 50.0, 50.0] and rows["fit"]["over_bare"] == 0.1
    assert "over_bare" not in rows["bare"] and "over_bare" not in judged(fit=chunks(1.0))["fit"]


def test_the_table_says_what_is_not_there():
    found = dict(fit=chunks(0.55, compiles=0), bare=chunks(0.54), torch=chunks(1.1), jax=chunks(0.5, jitter=0.6))
    rows = list(judged(absent={"keras": "keras not installed: left out"}, **found).values())
    json.dumps(rows)
    text = "\n".join(table.lines(rows))
    for part in (
        "mlp: MLP 784-128-10", "1 core, 9 rounds", "0.50 x 0% by CPU time\n", ", alike", "not judged: spread 38%",
        "Keras on JAX, Model.fit: keras not installed: left out", "+10.0 us of a step (+1.8%)",
        "programs compiled after the warm-up of ours: 0",
    ):  # fmt: skip
        assert part in text, text
    bars = [table.VIEW.bar(row) for row in rows]
    assert bars[0].parts == {"": 1.0} and bars[3].parts == {"": 2.0} and bars[-1].said == "left out"


# --- the works


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_plain_jax_does_the_same_work(name):
    """As many parameters, and as many floating-point operations: those of Adam and of the loss are not counted."""
    work = works.WORKS[name]
    small = dict(work.config["data"], examples=24, test_examples=12, batch_size=12)
    job = assemble({**work.config, "data": small}, jax.devices()[:1])
    fields = work.config["model"]
    init, apply = plain_jax.MODELS[work.model]
    params = jax.eval_shape(lambda: init(jax.random.key(0), fields))
    ours = sum(x.size for x in jax.tree.leaves(job.abstract.params))
    assert sum(x.size for x in jax.tree.leaves(params)) == ours
    inputs = job.train.example()["inputs"]
    inputs = jax.ShapeDtypeStruct((12, 784), "float32") if name == "mlp" else inputs

    def loss(params, inputs):
        return apply(params, inputs, jax.random.key(0), fields.get("dropout") or fields.get("heads")).sum()

    with jax.numpy_rank_promotion("allow"):  # written as people write it
        theirs = count.count(jax.make_jaxpr(jax.grad(loss))(params, inputs))
    assert sum(theirs.flops.values()) == pytest.approx(sum(count.of_job(job).model.flops.values()), rel=0.01)


def test_works_and_peers_fit_together():
    assert works.ENDLESS > 10**6 and works.OURS in works.PEERS and works.BARE in works.PEERS
    for peer in works.PEERS.values():
        assert set(peer.works) <= set(works.WORKS)
    for name, work in works.WORKS.items():
        assert name in works.PEERS[works.OURS].works and work.ready >= works.WARM
        assert bool(work.tokens) == (work.model == "gpt2")
        assert work.ready * work.batch_size <= 60_000


def test_what_is_not_installed_is_found(monkeypatch):
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    assert process.missing("torch") == ["torch"] and process.missing("fit") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--work=mpl"], "mlp"), (["--peers=tensorflow"], "torch"), (["--rounds=3"], "at least 5"),
        (["--round=9"], "--rounds"), (["--to=x.pdf"], "png"), (["--cores=100000"], "--cores=100000"),
    ],
)  # fmt: skip
def test_bad_input(words, said):
    with pytest.raises(UserError, match=said):
        verb.bench_peers(words)


# --- the whole


@pytest.mark.nightly
def test_ours_beside_plain_jax(tmp_path, capsys, monkeypatch):
    """What is not installed everywhere takes part in the nightly test."""
    short = dataclasses.replace(works.WORKS["mlp"], seconds=0.05)
    monkeypatch.setattr(bench, "WORKS", {**works.WORKS, "mlp": short})
    to = tmp_path / "peers.jsonl"
    code = verb.bench_peers(["--work=mlp", "--peers=jax", "--rounds=5", f"--to={to}", "--json"])
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows and code == 0
    assert [row["peer"] for row in rows] == ["fit", "jax"]
    for row in rows:
        assert row["rounds"] == 5 and 0 < row["cpu_ms"] < 1000 and row["agrees"]
    assert rows[0]["compiles"] == 0


@pytest.mark.nightly
def test_all_that_are_installed_do_the_same_work(tmp_path):
    for work in works.WORKS:
        rows = bench.bench([work], rounds=5)
        assert judging.agree(rows), rows
        for row in rows:
            assert "left_out" not in row or "not installed" in row["left_out"], row
        picture = tmp_path / "peers.png"
        from flaxmodels.perf import bench_show

        bench_show.show(rows, table.VIEW, as_json=False, to=[picture])
        assert picture.stat().st_size > 10_000
