"""The loop: what is logged, evaluated and saved, when it stops, and that a resumed run is one that never stopped."""

import io
import json
import re
import signal
import time

import jax
import jax.monitoring
import numpy as np
import pytest
import small

from flaxmodels import evaluating, loop, registry, run
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data.feed import Feed
from flaxmodels.evaluate import evaluate
from flaxmodels.job import assemble
from flaxmodels.run import Run
from flaxmodels.runtime.signals import Stop
from flaxmodels.runtime.windows import PARTS

COMPILED = "/jax/core/compile/backend_compile_duration"


def fit(config, workdir, devices=1):
    return loop.fit(config, workdir, devices=jax.devices()[:devices], stream=io.StringIO())


def logged(workdir):
    """Rows of the log without timings, which no two runs share."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def small_config(**sections):
    base = dict(train=dict(duration=30, log_every=4, eval_every=10, steps_per_dispatch=4), checkpoint=dict(every=7))
    return small.config("mlp", **{**base, **sections})


class StopAfter(Stop):
    """Asks to stop once it has been asked `polls` times; stands in for a signal at an exact moment."""

    def __init__(self, polls, number=signal.SIGTERM):
        super().__init__()
        self.left, self.number = polls, number

    def __bool__(self):
        self.left -= 1
        if self.left < 0:
            self.signal = self.number
        return self.left < 0


def test_log_is_complete_and_evaluation_counts_every_example(tmp_path):
    outcome = fit(small_config(), tmp_path)
    rows = logged(tmp_path)
    assert [r["step"] for r in rows if "train/loss" in r] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [r["step"] for r in rows if "eval/loss" in r] == [10, 20, 30]
    assert outcome.finished and outcome.exit_code == 0 and outcome.step == int(outcome.state.step) == 30
    assert outcome.metrics["eval/loss"] == rows[-1]["eval/loss"]
    assert {"train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate"} <= rows[0].keys()
    assert (tmp_path / "curves.png").stat().st_size > 1000


RESUMED = {"train": {"patience": 9}, "data": {"eval_batch_size": 128}}  # two batches an evaluation


def resumable_config():
    config = small_config(data=RESUMED["data"])
    config["train"] = {**config["train"], **RESUMED["train"]}
    return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(log, outcome, how often the run asked whether to stop)."""
    asked, workdir = StopAfter(10**6), tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Stop", lambda end: asked)
        outcome = fit(resumable_config(), workdir)
    return logged(workdir), outcome, 10**6 - asked.left


@pytest.mark.parametrize(
    "moment", [0, 0.5, -1, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (1, 4, 0.7, -4, -3, -2))]
)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, uninterrupted, moment):
    """Whether the signal comes before the first step, between dispatches, or within an evaluation, the last one too."""
    rows, whole, polls = uninterrupted
    polls = int(moment * polls) if isinstance(moment, float) else moment % polls
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stop", lambda end: StopAfter(polls))
        stopped = fit(resumable_config(), tmp_path)
    assert stopped.exit_code == 143 and not stopped.finished
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == stopped.step
    resumed = fit(resumable_config(), tmp_path)
    assert small.bits(resumed.state) == small.bits(whole.state)
    assert logged(tmp_path) == rows
    assert (resumed.finished, resumed.metrics, resumed.exit_code) == (whole.finished, whole.metrics, 0)
    best = min((row["eval/loss"], row["step"]) for row in rows if "eval/loss" in row)[1]
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).best() == best


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.5, -4])
def test_what_several_processes_decide_resumes_alike(tmp_path, monkeypatch, uninterrupted, moment):
    """`Together` answers one question late: between dispatches, and within the last evaluation."""
    rows, whole, polls = uninterrupted
    polls = int(moment * polls) if isinstance(moment, float) else moment % polls
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stop", lambda end: StopAfter(polls))
        patch.setattr(loop.agreement, "make", loop.agreement.Together)
        stopped = fit(resumable_config(), tmp_path)
        assert stopped.exit_code == 143 and not stopped.finished
        patch.setattr(loop, "Stop", lambda end: StopAfter(10**6))
        resumed = fit(resumable_config(), tmp_path)
    assert small.bits(resumed.state) == small.bits(whole.state)
    assert logged(tmp_path) == rows and resumed.finished == whole.finished


@pytest.mark.slow
def test_nothing_is_sent_in_a_step_and_every_window_is_accounted_for(tmp_path, monkeypatch):
    """All that a step needs is on the devices when it is called; the parts of a window are all of it."""

    def guarded(program):
        def call(*arguments):
            with jax.transfer_guard("disallow"):
                return program(*arguments)

        return call

    monkeypatch.setattr(run, "strict", guarded)
    stream = io.StringIO()
    loop.fit(small_config(), tmp_path, devices=jax.devices()[:1], stream=stream)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if "train/loss" in row]
    assert len(rows) == 8
    for row in rows:
        np.testing.assert_allclose(sum(row[f"perf/{part}"] for part in PARTS), 1, atol=1e-3)
        assert row["perf/examples_per_second"] > 0 and 0 <= row["perf/idle"] <= 1
    said = stream.getvalue()
    assert "perf/device" not in said and "perf/examples_per_second" in said
    assert "\ntime: " in said and "s for the first batch\n" in said


@pytest.mark.slow
def test_a_run_that_waits_for_its_data_says_so(tmp_path, monkeypatch):
    """Each batch takes 60 ms to gather, and the step of a small MLP far less."""
    gathered = Feed._gathered
    monkeypatch.setattr(Feed, "_gathered", lambda feed, index: time.sleep(0.06) or gathered(feed, index))
    stream = io.StringIO()
    config = small_config(train=dict(duration=60, eval_every=0, steps_per_dispatch=1), checkpoint=dict(every=0))
    config["data"] = {**config["data"], "placement": "host", "eval_batch_size": 256}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", lambda *_, **__: None)  # the first one takes its time
        loop.fit(config, tmp_path, devices=jax.devices()[:1], stream=stream)
    assert re.search(
        r"\ninput-bound: the device waits (\d\d|100)% of the time; try data.placement='device'\n", stream.getvalue()
    )


@pytest.mark.slow
def test_a_finished_run_goes_on_when_it_is_made_longer(tmp_path):
    fit(small_config(train=dict(duration=10, eval_every=5)), tmp_path)
    longer = small_config(train=dict(duration=20, eval_every=5))
    outcome = loop.fit(longer, tmp_path, allow_config_change=True, devices=jax.devices()[:1], stream=io.StringIO())
    assert outcome.step == 20 and outcome.finished == "all steps made"
    assert [row["step"] for row in logged(tmp_path) if "eval/loss" in row] == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_module_with_any_default_trains_and_resumes(tmp_path):
    """Functions, dtypes and factories are ordinary Flax fields; they are stored by name, the same in every process."""
    config = small_config(train=dict(duration=4))
    config["model"] = dict(name="small:Ordinary")
    first = fit(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert first.step == 4 and "0x" not in json.dumps(stored)
    assert stored["model.dtype"] == "jax.numpy:float32"
    assert fit(config, tmp_path).finished == "all steps made"


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(tmp_path):
    first = fit(small_config(), tmp_path)
    before = logged(tmp_path)
    again = fit(small_config(), tmp_path)
    assert logged(tmp_path) == before
    assert (again.metrics, again.finished, again.exit_code) == (first.metrics, first.finished, 0)
    assert first.finished == "all steps made"


def test_the_step_compiles_once(tmp_path):
    """However many dispatches, of different lengths, evaluations and saves there are: five programs, each once."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **details: compiled.append(details["fun_name"]) if event == COMPILED else None
    )
    try:
        jax.clear_caches()
        fit(small_config(train=dict(duration=60, eval_every=7, steps_per_dispatch=4)), tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    # A new state; the norm of the parameters; the evaluation step; the train step, several times a dispatch; whether a
    # state is finite, which a save asks.
    assert sorted(compiled) == ["jit(fresh)", "jit(norm)", "jit(packed)", "jit(several)", "jit(sound)"]


def test_a_compiled_step_refuses_another_shape():
    job = assemble(small_config())
    program = job.lower_train()[0].compile()
    wider = assemble(small_config(data=dict(batch_size=32)))
    feed = next(wider.train.dispatches(0, [(0, 1)], 4))
    with pytest.raises(TypeError, match=r"compiled with int32\[8192,16\] and called with int32\[4096,32\]"):
        program(job.fresh(), feed)


@pytest.mark.parametrize("devices", [1, 8])
def test_padded_evaluation_equals_unpadded(devices):
    """256 examples: batches of 64 fit, batches of 48 leave a padded last one."""
    results = []
    for size in (64, 48):
        job = assemble(small.config("cnn", data=dict(eval_batch_size=size)), devices=jax.devices()[:devices])
        lowered, names = job.lower_eval()
        state = job.fresh()
        found, count = evaluate(lowered.compile(), state.params, state.extra, job.test.evaluation(), names)
        assert count == job.test.split.size == 256
        results.append(found)
    np.testing.assert_allclose(list(results[1].values()), list(results[0].values()), rtol=1e-6)


@pytest.mark.slow
def test_early_stopping(tmp_path):
    """A learning rate of 0 never gets better than the first evaluation."""
    config = small_config(
        optim=dict(learning_rate=0.0), train=dict(duration=1000, eval_every=10, patience=3), checkpoint=dict(every=0)
    )
    outcome = fit(config, tmp_path)
    assert outcome.step == 40 and "no better" in outcome.finished and outcome.exit_code == 0
    assert fit(config, tmp_path).step == 40


@pytest.mark.slow
def test_newest_and_best_are_kept_and_survive_a_restart(tmp_path):
    config = small_config(train=dict(duration=60, eval_every=10, metric="eval/loss"), checkpoint=dict(every=5, keep=1))
    outcome = fit(config, tmp_path)
    evaluated = {r["step"]: r["eval/loss"] for r in logged(tmp_path) if "eval/loss" in r}
    best = min(evaluated, key=lambda step: (evaluated[step], step))
    with_best = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert with_best.best() == best and with_best.latest() == outcome.step == 60
    assert set(with_best.steps()) == {best, 60}
    step, found, count = evaluating.evaluate_checkpoint(assemble(config), tmp_path, "best")
    assert (step, count) == (best, 256)
    np.testing.assert_allclose(found["loss"], evaluated[best], rtol=1e-6)
    assert not (tmp_path / "checkpoints" / "deleted").exists()


@pytest.mark.slow
def test_restore_onto_any_mesh(tmp_path):
    config = small.config("cnn", train=dict(duration=4), mesh=dict(fsdp=8))
    saved = fit(config, tmp_path, devices=8)
    for mesh in (dict(data=8), dict(data=2, fsdp=4), dict(data=4, tensor=2)):
        job = assemble({**config, "mesh": mesh})
        state = Checkpoints(tmp_path / "checkpoints", read_only=True).restore(4, job.abstract)
        assert small.bits(state) == small.bits(saved.state)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, job.abstract)


@pytest.mark.slow
def test_average_is_what_is_evaluated(tmp_path):
    plain = fit(small_config(), tmp_path / "plain")
    averaged = fit(small_config(optim=dict(average=0.99)), tmp_path / "average")
    assert small.bits(averaged.state.params) == small.bits(plain.state.params)
    assert averaged.metrics["eval/loss"] != plain.metrics["eval/loss"]


def test_a_failing_save_ends_the_run_with_its_error(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", broken)
    with pytest.raises(OSError, match="No space"):
        fit(small_config(), tmp_path)


def test_user_errors_come_before_the_first_step(tmp_path):
    with pytest.raises(registry.UserError, match=r"eval/loss"):
        fit(small_config(train=dict(duration=30, metric="eval/accuraccy")), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists() or not logged(tmp_path)


def test_stretches_never_cross_a_mark():
    for start, total, most, marks in [(0, 100, 16, (10, 7)), (13, 57, 5, (0, 8)), (0, 3, 16, ()), (5, 5, 4, (1,))]:
        cuts = list(run.stretches(start, total, most, marks))
        steps = [s for first, count in cuts for s in range(first, first + count)]
        assert steps == list(range(start, total)) and all(0 < count <= most for _, count in cuts)
        ends = {first + count for first, count in cuts}
        assert all(s in ends for m in marks if m for s in range(m, total, m) if s > start)
