"""What is committed, kept, refused, passed over, skipped; how a failure is told; and what a reader never does."""

import datetime
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flaxmodels import disk, manifest
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.registry import UserError, bind
from flaxmodels.runtime import peers
from flaxmodels.runtime.exits import FaultError
from flaxmodels.saving import cause
from flaxmodels.state import TrainState


def state(step):
    """A pure function of the step, small enough to save in a few hundredths of a second."""
    params = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) * step}
    return TrainState(np.int32(step), params, {}, {"mu": np.full(5, step, np.float32)})


def abstract(**changed):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = state(0).replace(**changed)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def fill(folder, steps, *, watched=None, **options):
    """Checkpoints with these steps committed."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(state(step), step, {"memory": step}, (watched or {}).get(step), facts={"git": "abc"})
    checkpoints.wait()
    return checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def arrays(folder, step):
    """The largest file of a step: of array data."""
    return max((folder / str(step)).rglob("*"), key=lambda file: file.stat().st_size if "/d/" in str(file) else 0)


def listing(folder):
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b"" for file in folder.rglob("*")}


def held(monkeypatch, *later):
    """Commits wait for the returned event; or, after the first one, for one of `later` each, where these are given."""
    event, write = threading.Event(), manifest.write
    events = iter([event, *later])

    def late(*arguments, **options):
        assert next(events, event).wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(manifest, "write", late)
    return event


def failing(monkeypatch, error):
    def write(*arguments, **options):
        raise error

    monkeypatch.setattr(manifest, "write", write)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_step_is_whole_and_says_what_it_is(tmp_path):
    checkpoints = fill(tmp_path / "c", [3, 5], watched={3: 0.5})
    assert checkpoints.steps() == [3, 5] and checkpoints.latest() == checkpoints.good() == 5
    assert checkpoints.best() == 3 and checkpoints.meta(5)["memory"] == 5
    facts = disk.facts(tmp_path / "c", 3)
    assert facts["step"] == 3 and facts["watched"] == 0.5 and facts["git"] == "abc"
    assert facts["meta"]["versions"]["jax"] == jax.__version__
    for step in (3, 5):  # nothing is written after the commit
        assert manifest.verify(tmp_path / "c" / str(step)) == []
        found = checkpoints.restore(step, abstract())
        assert jax.tree.all(jax.tree.map(np.array_equal, found, state(step)))
    checkpoints.save(state(9), 5, {"memory": 6}, 0.1)  # a step has one state
    checkpoints.close()
    assert checkpoints.meta(5)["memory"] == 5 and checkpoints.best() == 3


def test_each_says_which_one_was_before_it(tmp_path):
    """Not one that was skipped or lost, nor itself where its result comes later."""
    checkpoints, found = Checkpoints(tmp_path, keep=9), {}
    for step, replace in [(2, False), (4, False), (4, True)]:
        checkpoints.save(state(step), step, {}, facts={"parent": "runs/a:7"}, replace=replace)
        checkpoints.wait()
        found |= {step: disk.facts(tmp_path, step)["parent"]}
    checkpoints.discard(2)
    checkpoints.save(state(5), 5, {}, facts={"parent": "runs/a:7"})
    checkpoints.close()
    assert found | {5: disk.facts(tmp_path, 5)["parent"]} == {2: "runs/a:7", 4: 2, 5: 2}


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_a_step_that_is_saved_already_is_not_due(tmp_path, monkeypatch, busy):
    checkpoints, event = Checkpoints(tmp_path, every=2, busy=busy), held(monkeypatch)
    checkpoints.save(state(2), 2, {})
    assert not checkpoints.due(2) and checkpoints.notes() == []
    event.set()
    checkpoints.close()


def test_a_result_that_comes_later_takes_its_place_at_once(tmp_path, monkeypatch):
    checkpoints = fill(tmp_path, [1, 2], watched={1: 0.5})
    before = listing(tmp_path / "2")
    checkpoints.save(state(2), 2, {"memory": 7}, 0.25, facts={"git": "def"}, replace=True)
    after = listing(tmp_path / "2")
    assert {name for name in before if before[name] != after[name]} == {manifest.NAME} and set(before) == set(after)
    assert checkpoints.best() == 2 and checkpoints.meta(2)["memory"] == 7 and checkpoints.good() == 2
    old, new = (json.loads(found[manifest.NAME])["facts"] for found in (before, after))
    assert new["git"] == "def" and old["seconds"] == new["seconds"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(state(2), 2, {"memory": 8}, 0.1, replace=True)
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    assert again.good() == 2 and again.meta(2)["memory"] == 7


STEPS = [4, 8, 10, 12, 16, 21, 24]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [24]),
        ({"newest": 3}, [16, 21, 24]),
        ({"best": 1}, [8, 24]),
        ({"best": 2}, [8, 16, 24]),
        ({"best": 1, "mode": "max"}, [12, 24]),
        ({"best": 9}, [4, 8, 12, 16, 24]),
        ({"every": 10}, [4, 10, 21, 24]),  # 4 is the nearest to 0
        ({"every": 100}, [4, 24]),
        ({"every_seconds": 80}, [4, 12, 21, 24]),
    ],
)
def test_what_is_kept(options, kept):
    values = {4: 0.4, 8: 0.1, 12: 0.9, 16: 0.2}
    steps = [
        disk.Step(
            step,
            {"watched": values[step]} if step in values else None,
            disk.EPOCH + datetime.timedelta(seconds=10 * step),
        )
        for step in STEPS
    ]
    retention = disk.Retention(**{"newest": 1, "best": 0, "mode": "min", "every": 0, "every_seconds": 0.0} | options)
    assert [step for step in STEPS if step not in retention.surplus(steps)] == kept
    assert retention.surplus([]) == [] and retention.surplus(steps[:1]) == []


def test_old_steps_go_when_a_newer_one_is_committed(tmp_path, monkeypatch):
    checkpoints = fill(tmp_path, [1, 2, 3], watched={1: 0.1, 2: 0.2}, keep=1, keep_best=1)
    assert checkpoints.steps() == [1, 3] and not (tmp_path / disk.TRASH).exists()
    event = held(monkeypatch)
    checkpoints.save(state(4), 4, {})
    until(lambda: (tmp_path / "4").exists())
    assert checkpoints.steps() == [1, 3]  # 4 is all there, but not committed: 3 stays
    event.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4]
    again = fill(tmp_path, [5], keep=1, keep_best=1)  # another process knows what is best, too
    assert again.steps() == [1, 5] and again.best() == 1


@pytest.mark.slow
def test_seconds_of_training_go_on_after_a_restart_and_ignore_the_clock(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("flaxmodels.checkpoint.time", type("Clock", (), {
        "monotonic": staticmethod(lambda: now[0]), "sleep": staticmethod(time.sleep)
    }))  # fmt: skip
    options = dict(keep=1, keep_best=0, keep_every_seconds=100.0, every_seconds=50.0)
    checkpoints = Checkpoints(tmp_path, **options)
    day, real = 86400.0, time.time
    for step, (seconds, jump) in enumerate([(0, 0), (40, day), (70, -day), (20, -2 * day), (90, day)], 1):
        now[0] += seconds
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)  # what Orbax looks at
        assert checkpoints.late() == (seconds >= 50)
        checkpoints.save(state(step), step, {})
        checkpoints.wait()
    assert [disk.facts(tmp_path, step)["seconds"] for step in checkpoints.steps()] == [0, 110, 220]
    assert checkpoints.steps() == [1, 3, 5] and checkpoints.notes() == []
    now[0] += 1e6  # switched off
    checkpoints = Checkpoints(tmp_path, **options)
    now[0] += 60
    checkpoints.save(state(6), 6, {})
    checkpoints.wait()
    assert disk.facts(tmp_path, 6)["seconds"] == 280 and checkpoints.steps() == [1, 3, 5, 6]


def test_a_damaged_step_is_refused_by_name_or_passed_over_loudly(tmp_path):
    fill(tmp_path, [1, 2, 3], keep=3)
    file = arrays(tmp_path, 3)
    flip(file)
    before = listing(tmp_path)
    for checkpoints in (Checkpoints(tmp_path), Checkpoints(tmp_path, read_only=True)):
        with pytest.raises(UserError) as caught:
            checkpoints.good()
        for part in ("checkpoint 3 in", str(file.relative_to(tmp_path / "3")), "damaged='pass over'", "verify"):
            assert part in str(caught.value)
        with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged"):
            checkpoints.restore(3, abstract())
        assert checkpoints.steps() == [1, 2, 3] and checkpoints.restore(2, abstract()).step == 2
    looking = Checkpoints(tmp_path, read_only=True, damaged="pass over")
    assert looking.good() == 2 and "going on from step 2" in looking.notes()[0] and listing(tmp_path) == before
    checkpoints = Checkpoints(tmp_path, damaged="pass over")
    assert checkpoints.good() == 2 and checkpoints.steps() == [1, 2]
    (note,) = checkpoints.notes()
    assert note.startswith("warning: checkpoint 3 is damaged: ") and "moved to damaged/3; going on from step 2" in note
    assert listing(tmp_path / "damaged/3") == {
        name.removeprefix("3/"): content for name, content in before.items() if name.startswith("3/")
    }
    checkpoints.save(state(3), 3, {})  # comes to the same step again
    checkpoints.wait()
    assert checkpoints.good() == 3
    flip(arrays(tmp_path, 3))
    again = Checkpoints(tmp_path, damaged="pass over")
    assert again.good() == 2 and {f.name for f in (tmp_path / "damaged").iterdir()} == {"3", "3.1"}


def test_where_all_are_damaged_no_run_starts_anew_unasked(tmp_path):
    fill(tmp_path, [1, 2])
    (tmp_path / "1" / manifest.NAME).write_text("{}")
    arrays(tmp_path, 2).unlink()
    before = listing(tmp_path)
    for policy in ("refuse", "pass over"):
        with pytest.raises(UserError, match=r"is missing|MANIFEST.json"):
            Checkpoints(tmp_path, damaged=policy).good()
    assert listing(tmp_path) == before
    assert Checkpoints(tmp_path / "none", damaged="pass over").good() is None


@pytest.mark.slow
def test_what_a_kill_left_is_moved_aside_and_goes_with_the_next_commit(tmp_path):
    fill(tmp_path, [1, 2, 5, 6], keep=4)
    for step in (5, 6):
        (tmp_path / str(step) / manifest.NAME).unlink()
    (tmp_path / "7.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    shutil.copytree(tmp_path / "1", tmp_path / disk.TRASH / "0")
    before = listing(tmp_path)
    looking = Checkpoints(tmp_path, read_only=True)
    assert looking.steps() == [1, 2] and looking.good() == 2 and listing(tmp_path) == before
    looking.close()
    checkpoints = Checkpoints(tmp_path, keep=4)
    assert checkpoints.good() == 2
    assert [note.partition(":")[0] for note in checkpoints.notes()] == [
        f"checkpoint {step} was cut off before it was committed" for step in (5, 6)
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"1", "2", disk.UNCOMMITTED}
    for step, left in ((4, {"5", "6"}), (5, {"6"})):
        checkpoints.save(state(step), step, {})
        checkpoints.wait()
        assert {file.name for file in (tmp_path / disk.UNCOMMITTED).iterdir()} == left
    checkpoints.save(state(8), 8, {})
    checkpoints.close()
    assert {file.name for file in tmp_path.iterdir()} == {"2", "4", "5", "8"}


def test_a_failed_save_is_told_at_the_next_look(tmp_path, monkeypatch):
    checkpoints = fill(tmp_path, [1])
    failing(monkeypatch, OSError(28, "No space left on device"))
    checkpoints.save(state(2), 2, {})
    until(lambda: not checkpoints._saving.manager.is_saving_in_progress())
    with pytest.raises(FaultError) as caught:
        checkpoints.check()
    for part in ("the save of step 2 to", str(tmp_path), "No space left on device", "step 1 is there and whole"):
        assert part in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"1"}
    monkeypatch.undo()
    checkpoints.check()
    checkpoints.save(state(2), 2, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and checkpoints.good() == 2 and checkpoints.notes() == []


def test_a_failed_save_may_be_gone_on_from_but_never_the_last(tmp_path, monkeypatch):
    checkpoints = fill(tmp_path, [1], failed="go on")
    failing(monkeypatch, ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"))
    checkpoints.save(state(2), 2, {})
    until(lambda: not checkpoints._saving.manager.is_saving_in_progress())
    checkpoints.check()
    (note,) = checkpoints.notes()
    assert note.startswith("warning: the save of step 2") and "No space left on device" in note and "going on" in note
    checkpoints.save(state(3), 3, {})
    with pytest.raises(FaultError, match=r"save of step 3 .* No space left"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.save(state(4), 4, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4] and checkpoints.notes() == []


def test_of_several_processes_none_goes_on_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "count", lambda: 2)
    with pytest.raises(UserError, match=r"checkpoint.failed='go on' works in a run of one process"):
        Checkpoints(tmp_path, failed="go on")


def test_a_due_save_is_skipped_while_another_is_under_way_but_never_the_last(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=2, every_seconds=1e-9, busy="skip")
    event = held(monkeypatch)
    assert [checkpoints.due(step) for step in (1, 2)] == [False, True] and checkpoints.late()
    checkpoints.save(state(2), 2, {})
    assert not checkpoints.due(4) and not checkpoints.due(5) and not checkpoints.late()
    (note,) = checkpoints.notes()
    assert note.startswith("step 4 was not saved: the save of step 2 ") and note.endswith("is still under way")
    threading.Timer(0.1, event.set).start()
    checkpoints.save(state(5), 5, {})  # not asked whether it is due: it waits
    checkpoints.close()
    assert checkpoints.steps() == [2, 5] and checkpoints.notes() == [] and checkpoints.due(6)


def test_one_save_at_a_time_waits_for_the_one_before(tmp_path, monkeypatch):
    second = threading.Event()
    checkpoints, first = Checkpoints(tmp_path, every=1), held(monkeypatch, second)
    checkpoints.save(state(1), 1, {})
    assert checkpoints.due(2) and checkpoints.steps() == []
    threading.Timer(0.1, first.set).start()
    checkpoints.save(state(2), 2, {})
    assert first.is_set() and checkpoints.steps() == [1]
    second.set()
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("failed", ["stop", "go on"])
def test_a_save_that_takes_too_long_is_told_and_may_still_come(tmp_path, monkeypatch, failed):
    fill(tmp_path, [1])
    checkpoints, event = Checkpoints(tmp_path, failed=failed, deadline_seconds=1000.0), held(monkeypatch)
    checkpoints.save(state(2), 2, {})
    checkpoints.check()
    checkpoints._saving.deadline_seconds = 0.0  # has passed
    if failed == "stop":
        with pytest.raises(FaultError, match=r"save of step 2 .* has not ended after 0 s"):
            checkpoints.check()
    else:
        checkpoints.check()
        checkpoints.check()
        checkpoints.save(state(3), 3, {})  # there is only one queue, of one
        first, second = checkpoints.notes()
        assert "has not ended after 0 s" in first and second.startswith("step 3 was not saved: the save of step 2")
    with pytest.raises(FaultError, match=r"save of step 2 .* has not ended"):
        checkpoints.wait()
    event.set()
    until(lambda: not checkpoints._saving.manager.is_saving_in_progress())
    checkpoints.wait()
    checkpoints._saving.deadline_seconds = 1000.0
    checkpoints.save(state(4), 4, {})
    checkpoints.close()
    assert checkpoints.steps() == [2, 4]


@pytest.mark.slow
def test_rolling_back_deletes_what_came_after(tmp_path):
    checkpoints = fill(tmp_path, [1, 2, 3, 4], keep=9)
    with pytest.raises(ValueError, match=r"below the newest one, 4"):
        checkpoints.save(state(2), 2, {})
    checkpoints.discard(after=2)
    assert checkpoints.steps() == [1, 2] and not (tmp_path / disk.TRASH).exists()
    checkpoints.save(state(3), 3, {"memory": "new"})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.meta(3)["memory"] == "new"


def test_a_reader_changes_nothing_and_needs_nothing(tmp_path):
    looking = Checkpoints(tmp_path / "none", read_only=True)
    assert looking.steps() == [] and looking.good() is looking.best() is looking.latest() is None
    looking.close()
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file can't be written: .*--workdir"):
        Checkpoints(tmp_path / "file")


def test_other_names_than_steps_are_left_alone(tmp_path):
    for name in ("007", "-1", "best", "1.5", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    checkpoints = fill(tmp_path, [1], keep=1)
    assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 7


def test_restoring_another_state_lists_all_that_differs(tmp_path):
    checkpoints = fill(tmp_path, [1])
    other = abstract(params={"kernel": np.zeros((3, 5), np.float32)}, opt_state={"mu": np.zeros(5, np.float16)})
    with pytest.raises(UserError) as caught:
        checkpoints.restore(1, other)
    for part in ("checkpoint 1 in", "2 differences", "params/kernel was (3, 4) float32, is (3, 5)", "opt_state/mu"):
        assert part in str(caught.value)
    asked = Checkpoints(tmp_path, cast=("^opt_state/",), read_only=True)
    half = asked.restore(1, abstract(opt_state={"mu": np.zeros(5, np.float16)}))
    assert half.opt_state["mu"].dtype == np.float16 and half.opt_state["mu"].tolist() == [1] * 5
    with pytest.raises(UserError, match=r"checkpoint.cast"):
        Checkpoints(tmp_path, cast=("(",), read_only=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_best": True}, "keep_best=True has the wrong type: expected an integer"),
        ({"keep_best": -1}, "at least 0"),
        ({"busy": "sleep"}, "busy='sleep' has the wrong type: expected one of 'wait', 'skip'"),
        ({"failed": "ignore"}, "one of 'stop', 'go on'"),
        ({"damaged": "ignore"}, "one of 'refuse', 'pass over'"),
        ({"keep_every_seconds": -1.0}, "at least 0"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(UserError, match=said):
        bind(Checkpoints, options, where="checkpoint", provided=("directory", "best_mode", "read_only"))


def test_the_cause_of_an_error_is_what_the_system_said():
    try:
        try:
            raise OSError(28, "x")
        except OSError as inner:
            raise ValueError("many\nlines") from inner
    except ValueError as outer:
        assert cause(outer) == "No space left on device"
    assert cause(OSError(5, "let it write", "gs://b/run/x")) == "let it write"
    assert cause(ValueError("Error writing: x [os_error_code='5']")) == "Input/output error"
    assert cause(ValueError("first\nsecond")) == "first" and cause(TimeoutError()) == "TimeoutError"


def test_orbax_alone_reads_a_checkpoint_of_ours(tmp_path):
    fill(tmp_path, [1])
    found = ocp.StandardCheckpointer().restore(tmp_path / "1" / "params", abstract().params)
    assert np.array_equal(found["kernel"], state(1).params["kernel"])
