"""F24: gradients that are not finite. F25: loss spikes.

The data mark the examples that go wrong (`poison`), so which batches are bad follows from the order of the data.
"""

import contextlib
import json
import os

import harness
import jax
import numpy as np
import pytest

from flaxmodels import manifest, watch
from flaxmodels.data import order
from flaxmodels.loop import fit
from flaxmodels.runtime.exits import FaultError

BATCH, EXAMPLES = 16, 256
CONFIG = harness.ROOT / "tests/faults/poisoned.py"


def examples(*batches, examples=EXAMPLES):
    """One example of each of these batches, which then is bad in each epoch: ids."""
    return tuple(int(order.train_indices(0, batch, 1, BATCH, examples)[0, 5]) for batch in batches)


def config(bad, steps=16, model=None, **sections):
    base = dict(
        model=dict(name="poison:Net") | (model or {}),
        data=dict(name="poison:marked_images", examples=EXAMPLES, bad=bad, batch_size=BATCH),
        optim=dict(name="adam", learning_rate=3e-3, average=0.9),
        train=dict(duration=steps, log_every=1),
        checkpoint=dict(every=4, every_seconds=0.0),
    )
    for name, options in sections.items():
        base[name] = {**base.get(name, {}), **options}
    return base


def train(given, workdir, devices=1):
    with (workdir.with_suffix(".txt")).open("a") as stream:
        return fit(given, workdir, devices=jax.devices()[:devices], stream=stream)


def finite(state):
    """Whether all is that is trained, and the optimizer's state and BatchNorm's statistics."""
    bare = state.replace(opt_state=state.opt_state.inner)
    leaves = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(bare))]
    return all(np.isfinite(x).all() for x in leaves if x.dtype.kind == "f")


def logged(workdir):
    return [row["step"] for row in harness.rows(workdir) if "train/loss" in row]


def guard_of(state):
    return state.opt_state


def check(end, workdir, bad, streak):
    """The batches were left out, counted, and nothing that is not finite was kept."""
    own = guard_of(end.state)
    assert (end.step, int(own.skipped), int(own.streak), int(own.held)) == (16, len(bad), streak, 0)
    assert finite(end.state)
    assert logged(workdir) == [step for step in range(1, 17) if step - 1 not in bad]
    for step in bad:
        facts = manifest.read(workdir / "capsules" / str(step))
        assert examples(step)[0] in facts["examples"] and facts["step"] == step
        assert manifest.verify(workdir / "capsules" / str(step)) == []


@pytest.mark.slow
def test_f24_on_eight_devices(tmp_path, figures):
    """In the gradient only, which the loss does not show."""
    end = train(config(examples(4, 9), model=dict(kind="backward")), tmp_path / "run", 8)
    check(end, tmp_path / "run", (4, 9), 1)
    figures("F24", injected=2, skipped=2, non_finite=0)


@pytest.mark.slow
def test_f24_for_ever_ends_the_run_and_keeps_the_checkpoints(tmp_path, figures):
    every = tuple(range(EXAMPLES))
    healthy = set(order.train_indices(0, 0, 9, BATCH, EXAMPLES).ravel().tolist())
    given = config(tuple(set(every) - healthy), 200, guard=dict(max_bad_steps=4, capsules=1), checkpoint=dict(keep=2))
    with pytest.raises(FaultError, match=r"4 bad steps in a row, 9 to 12,.*\n.*replay .*capsules/9"):
        train(given, tmp_path / "run")
    assert harness.on_disk(tmp_path / "run") == [4, 8]
    assert [f.name for f in (tmp_path / "run/capsules").iterdir()] == ["9"]
    with pytest.raises(FaultError, match="9 to 12"):  # from the checkpoint again, and to the same end
        train(given, tmp_path / "run")
    figures("F24", ended=2, healthy_checkpoints=2)


@pytest.mark.slow
def test_f24_twice_in_a_row_and_resumed_in_between(tmp_path, figures):
    """A run that is stopped between two bad steps has the bits of one that is not."""
    given = config(examples(4, 9, 10), 16)
    whole = train(given, tmp_path / "whole")
    check(whole, tmp_path / "whole", (4, 9, 10), 2)
    train(given | {"train": dict(duration=10, log_every=1)}, tmp_path / "cut", 1)
    cut = fit(given, tmp_path / "cut", devices=jax.devices()[:1], allow_config_change=True)
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(cut.state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    trained = [
        {step["step"]: step["train/loss"] for step in harness.rows(tmp_path / name) if "train/loss" in step}
        for name in ("whole", "cut")
    ]
    assert trained[0] == trained[1]
    figures("F24", injected=6, skipped=6, non_finite=0)


@pytest.mark.parametrize(
    "count", [pytest.param(20, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.nightly)]
)
def test_f24_many(tmp_path, figures, count):
    """Every second batch is bad: none leaves a parameter that is not finite (each save looks, too)."""
    size = 2 * count * BATCH
    bad = examples(*range(1, 2 * count, 2), examples=size)
    given = config(
        bad, 2 * count, model=dict(kind="overflow"), data=dict(examples=size),
        train=dict(log_every=1000, steps_per_dispatch=4),
        checkpoint=dict(every=max(count // 2, 10)), guard=dict(capsules=0),
    )  # fmt: skip
    end = train(given, tmp_path / "run")
    assert finite(end.state) and int(guard_of(end.state).skipped) == count
    figures("F24", injected=count, skipped=count, non_finite=0)


@pytest.mark.nightly
def test_f24_in_two_processes(tmp_path, figures):
    """All leave out the same batches, write one capsule, and end with the same state."""
    flags = [f"--config.data.bad={examples(4, 9)}", "--config.train.duration=12"]
    path = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "tests/faults")])
    with harness.start(tmp_path / "run", harness.T2x4, *flags, config=CONFIG, env={"PYTHONPATH": path}) as group:
        assert group.wait(240) == [0, 0], group
        assert "batch 4 is not finite" in group.output() and "2 steps were left out" in group.output()
    assert sorted(f.name for f in (tmp_path / "run/capsules").iterdir()) == ["4", "9"]
    assert not [f for f in (4, 9) if manifest.verify(tmp_path / "run/capsules" / str(f))]
    assert logged(tmp_path / "run") == [step for step in range(1, 13) if step - 1 not in (4, 9)]
    figures("F24", injected=2, skipped=2, non_finite=0)


SPIKE = dict(
    model=dict(name="mlp", hidden=(16,)), loss=dict(name="poison:spiky"), guard=dict(spikes="skip", window=8, back=5)
)


@pytest.mark.slow
def test_f25_a_spike_is_left_out(tmp_path, figures):
    end = train(config(examples(12), **SPIKE), tmp_path / "run")
    own = guard_of(end.state)
    assert (end.step, int(own.skipped), int(own.rollbacks)) == (16, 1, 0)
    assert manifest.read(tmp_path / "run/capsules/12")["why"] == "spike"
    assert max(row.get("train/loss", 0) for row in harness.rows(tmp_path / "run")) < 10
    figures("F25", injected=1, recovered=1)


@pytest.mark.slow
def test_f25_a_spike_is_rolled_back(tmp_path, figures):
    """The run goes back 5 steps, leaves out these batches, and writes that down; killed meanwhile it ends the same."""
    given = config(examples(12), **SPIKE)
    given["guard"] = {**given["guard"], "spikes": "roll back"}
    end = train(given, tmp_path / "run")
    own = guard_of(end.state)
    assert (end.step, int(own.skipped), int(own.rollbacks)) == (16, 6, 1)
    (entry,) = json.loads((tmp_path / "run" / watch.FILE).read_text())["rollbacks"]
    assert (entry["first"], entry["stop"]) == (7, 13) and float.fromhex(entry["loss"]) > 1e3
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7, 14, 15, 16]

    # Killed between writing that down and going back: a run without the roll back, and then the file.
    unlucky = tmp_path / "unlucky"
    with contextlib.suppress(FaultError):
        train({**given, "guard": {**given["guard"], "spikes": "skip", "max_bad_steps": 1}}, unlucky)
    assert harness.on_disk(unlucky)[-1] == 12
    (unlucky / watch.FILE).write_bytes((tmp_path / "run" / watch.FILE).read_bytes())
    again = fit(given, unlucky, devices=jax.devices()[:1], allow_config_change=True)
    for one, other in zip(jax.tree.leaves(end.state), jax.tree.leaves(again.state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert harness.rows(tmp_path / "run") == harness.rows(unlucky)
    figures("F25", injected=1, recovered=1, replayed=1)


@pytest.mark.nightly
def test_f25_a_spike_is_rolled_back_in_two_processes(tmp_path, figures):
    """Killed after that and started again, they end as they would have: going back is decided by all alike."""
    keys = ("loss.name=poison:spiky", "model.name=mlp", "model.hidden=(16,)", "guard.window=8", "guard.back=5")
    flags = [*(f"--config.{key}" for key in keys), "--config.guard.spikes=roll back"]
    flags += [f"--config.data.bad={examples(12)}", "--config.train.duration=40"]
    path = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "tests/faults")])
    again = dict(config=CONFIG, env={"PYTHONPATH": path})
    with harness.start(tmp_path / "whole", harness.T2x4, *flags, **again) as group:
        assert group.wait(240) == [0, 0], group
        assert group.output().count("going back 5 steps") == 3, group  # once an epoch
    with harness.start(tmp_path / "killed", harness.T2x4, *flags, **again) as group:
        assert harness.wait_for(lambda: "going back" in group.output(), 240), group
        group.kill()
        group.wait()
    with harness.start(tmp_path / "killed", harness.T2x4, *flags, **again) as group:
        assert group.wait(240) == [0, 0], group
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert harness.rows(killed) == harness.rows(whole)
    assert harness.state(killed) == harness.state(whole)
    assert not {8, 9, 10, 11, 12, 13} & set(logged(tmp_path / "whole"))
    figures("F25", injected=3, recovered=3, exact=1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["digits_mlp", "transformer"])
def test_f25_no_false_alarm_in_10000_clean_steps(tmp_path, figures, name):
    if name == "digits_mlp":
        from flaxmodels.config import load_config

        given = load_config(harness.ROOT / "configs/digits_mlp.py").to_dict()
    else:
        given = dict(
            model=dict(name="transformer", layers=2, width=32, heads=2, dropout=0.1),
            data=dict(name="synthetic_tokens", batch_size=16, length=32),
            optim=dict(name="adamw", learning_rate=3e-3, schedule="cosine", warmup=100),
        )
    given["train"] = dict(duration=10_000, log_every=1000, steps_per_dispatch=16)
    given |= {"guard": dict(spikes="skip"), "checkpoint": dict(every_seconds=0.0)}
    end = train(given, tmp_path / "run")
    assert int(guard_of(end.state).skipped) == 0
    figures("F25", clean_steps=10_000, false_skips=0)
