"""`bench step`: the ways to compute an update agree, or differ as they are said to; and they are timed fairly."""

import json

import jax
import numpy as np
import pytest
import small

from flaxmodels import cli
from flaxmodels.job import assemble
from flaxmodels.perf import bench_step, ways
from flaxmodels.registry import UserError

WAYS = ("jit", "shard_map", "pmap")
PLAIN = dict(dropout=0.0)


@pytest.fixture
def quick(monkeypatch):
    """One turn of next to nothing: what is tested is not how fast it is."""
    monkeypatch.setattr(bench_step, "TURNS", 1)
    monkeypatch.setattr(bench_step, "SHORTEST", 1)


def config(family, fields=PLAIN, **sections):
    base = small.config(family, **sections)
    return {**base, "model": {**base["model"], **fields}}


def agreement(rows):
    return {(row["way"], found["against"]): found for row in rows for found in row["agreement"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mlp", "transformer"])
def test_explicit_collectives_agree_with_a_run(quick, family):
    """Weights of examples, microbatches and several steps a dispatch are all in it; the mesh of the config is not."""
    sections = dict(train=dict(steps_per_dispatch=3, microbatches=2), mesh=dict(fsdp=2)) if family == "mlp" else {}
    fields = PLAIN if family == "mlp" else dict(PLAIN, layers=1, width=16)
    rows = bench_step.bench(config(family, fields, **sections), WAYS, 0.0)
    assert [row["way"] for row in rows] == list(WAYS) and {row["mesh"] for row in rows} == {"8 x cpu: data=8"}
    found = agreement(rows)
    assert found.keys() == {("shard_map", "jit"), ("pmap", "jit")}
    for differences in found.values():
        assert differences["equal"] and differences["steps"] == 5
        assert max(differences[name] for name in ("loss", "grad_norm", "params", "extra")) < 2e-5
    assert all(row["by_design"] == [] for row in rows)


@pytest.mark.slow
def test_what_differs_by_design_agrees_with_the_parts_in_turn(quick):
    rows = bench_step.bench(config("cnn", dict(features=(4,), dense=16)), ("jit", "pmap"), 0.0)
    found = agreement(rows)
    assert not found["pmap", "jit"]["equal"] and found["pmap", "jit"]["loss"] > 1e-4
    assert found["pmap", "in turn"]["equal"] and ("jit", "in turn") not in found
    assert found["pmap", "jit"]["extra"] > 1e-4
    assert [why.partition(":")[0] for why in rows[1]["by_design"]] == ["dropout", "batch_stats"]
    assert bench_step.agree(rows)


@pytest.mark.slow
def test_a_wrong_sum_is_seen(quick, monkeypatch):
    """A mean of the devices' gradients is an eighth of their sum: Adam hides it from the loss, not from the norm."""

    def averaged(gradient, axis):
        def over(*arguments):
            grads, extra, metrics = gradient(*arguments)
            return jax.lax.pmean(grads, axis), extra, jax.lax.psum(metrics, axis)

        return over

    monkeypatch.setattr(ways, "summed", averaged)
    rows = bench_step.bench(config("mlp"), ("jit", "shard_map"), 0.0)
    found = agreement(rows)
    assert not found["shard_map", "jit"]["equal"] and not bench_step.agree(rows)
    np.testing.assert_allclose(found["shard_map", "jit"]["grad_norm"], 7 / 8, rtol=0.05)


@pytest.mark.parametrize(
    ("family", "fields", "augment", "words"),
    [
        ("mlp", PLAIN, ("flip",), []),
        ("mlp", {}, (), ["dropout"]),
        ("cnn", PLAIN, (), ["batch_stats"]),
        ("mlp", PLAIN, ("flip", "mixup"), ["mixup"]),
    ],
)
def test_reasons(family, fields, augment, words):
    options = dict(augment=tuple({"name": name} for name in augment))
    found = ways.by_design(assemble(config(family, fields, data=options)))
    assert [why.partition(":")[0] for why in found] == words


def test_pmap_may_be_gone(monkeypatch):
    job = assemble(small.config("mlp"))
    monkeypatch.delattr(jax, "pmap")
    with pytest.raises(UserError, match=r"has no pmap any more: leave it out, --compare=jit,shard_map"):
        ways.pmap(job)


def test_bad_input(capsys):
    with pytest.raises(UserError, match=r"--compare='pjit' does not exist. Did you mean 'jit'\?"):
        bench_step.bench(small.config("mlp"), ("jit", "pjit"))
    with pytest.raises(UserError, match=r"data\.batch_size=12 does not divide over the 8 devices"):
        bench_step.bench(small.config("mlp", data=dict(batch_size=12)))
    assert cli.main(["bench", "stp"]) == 2
    assert "Did you mean 'step'?" in capsys.readouterr().err


class Clocked:
    """Stands in for a `Run`: each dispatch of four steps takes the same time."""

    def __init__(self, name, cost, clock, log):
        self.name, self.cost, self.clock, self.log, self.step = name, cost, clock, log, 0

    def dispatch(self):
        self.clock[0] += self.cost
        self.step += 4
        self.log.append(self.name)
        return np.zeros(1)


def test_turns_alternate_and_times_are_of_a_step(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: clock[0])
    runs = {name: Clocked(name, cost, clock, log) for name, cost in (("a", 0.5), ("b", 1.0))}
    times = bench_step.measure(runs, 14.0)
    order = [name for name, before in zip(log, ["", *log], strict=False) if name != before]
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]  # each turn begins with what the last one ended with
    assert [len(times[name]) for name in "ab"] == [bench_step.TURNS] * 2
    found = bench_step._times(times["b"], times["a"])
    assert (found["step_ms"], found["p95_ms"], found["ratio"], found["turns"]) == (250.0, 250.0, 2.0, 7)
    assert found["dispatches"] == 7 * bench_step.SHORTEST  # 1 s each, of the 2 s of a turn
    assert len(times["a"][0]) == 4


def row(name, agreement=(), by_design=()):
    return {
        "way": name, "data": "digits", "batch_size": 64, "mesh": "8 x cpu: data=8", "compile_seconds": 1.25,
        "step_ms": 0.5, "p95_ms": 0.75, "ratio": 1.1, "dispatches": 90, "turns": 7, "by_design": list(by_design),
        "agreement": list(agreement),
    }  # fmt: skip


def difference(against, equal, size):
    return {
        "steps": 5,
        "loss": size,
        "grad_norm": size,
        "params": size,
        "extra": size,
        "equal": equal,
        "against": against,
    }


def test_what_is_printed(capsys):
    differ = [difference("jit", False, 0.1), difference("in turn", True, 1e-7)]
    why = ["dropout: masks"]
    bad = [difference("in turn", False, 0.1)]
    rows = [row("jit", (), why), row("shard_map", differ, why), row("pmap", bad, why)]
    assert bench_step.agree(rows[:2]) and not bench_step.agree(rows)
    assert bench_step.agree([row("pmap"), row("jit", [difference("pmap", False, 0.1)], why)])
    bench_step.show(rows)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line]
    assert [json.loads(line) for line in lines if line.startswith("{")] == rows
    assert lines[0] == "digits, batches of 64 on 8 x cpu: data=8; 7 turns"
    starts = {line.split()[0]: line for line in lines if line.startswith("  ") or line.startswith("* jit")}
    assert starts["*"].split() == ["*", "jit", "1.2", "s", "0.500", "ms", "0.750", "ms", "1.10", "x"]
    (one, other, bad) = [line for line in lines if "e-" in line and not line.startswith("{")]
    assert one.split() == ["shard_map", "jit", *["1.0e-01"] * 4, "by", "design"]
    assert other.endswith("1.0e-07  equal up to rounding") and bad.endswith("DIFFERENT")
    assert "dropout: masks." in lines and any(line.startswith("in turn: the parts of all") for line in lines)
