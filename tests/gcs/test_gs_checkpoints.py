"""Checkpoints in a bucket, by Orbax itself: committed last, verified, passed over, retired, read by every verb."""

import contextlib
import json

import jax
import numpy as np
import pytest
from fake_gcs import Fault

from flaxmodels import capsule, cli, disk, manifest, mirror, shelf, stored
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.registry import UserError
from flaxmodels.runtime import lease
from flaxmodels.runtime.exits import FaultError
from flaxmodels.state import TrainState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def state(step):
    """A pure function of the step."""
    params = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) * step}
    return TrainState(np.int32(step), params, {}, {"mu": np.full(5, step, np.float32)})


def abstract():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))


def fill(folder, steps, **options):
    """Checkpoints with these steps committed."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(state(step), step, {"memory": step}, float(step), facts={"git": None})
    checkpoints.wait()
    return checkpoints


def arrays(cloud, folder, step):
    """Name of the largest object of array data of a step."""
    found = cloud.objects("bucket", f"{folder.key}/{step}/")
    return max((name for name in found if "/d/" in name), key=lambda name: len(found[name]))


def flip(cloud, name):
    data = bytearray(cloud.objects("bucket", name)[name])
    data[len(data) // 2] ^= 4
    cloud.put("bucket", name, bytes(data))


def same(found, step):
    return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(state(step))))


def test_saved_committed_last_and_restored(workdir, cloud, monkeypatch):
    flushed, confirmed = [], []
    monkeypatch.setattr(mirror, "flush", lambda where: flushed.append((where, disk.committed(workdir / "checkpoints"))))
    monkeypatch.setattr(lease, "confirm", lambda where: confirmed.append((where, (folder / "4" / "params").exists())))
    folder = workdir / "checkpoints"
    with contextlib.closing(fill(folder, [4], keep=3)) as checkpoints:
        writes = [name.split()[2] for name in cloud.requests if name.startswith("POST write ")]
        assert writes[-1] == f"{folder.key}/4/MANIFEST.json" and writes.count(writes[-1]) == 1
        assert flushed == [(workdir, [])], "before the commit, so that the log is never behind it"
        assert confirmed == [(workdir, True)], "by who still holds the lock"
        assert checkpoints.good() == checkpoints.best() == 4 and checkpoints.meta(4)["memory"] == 4
        assert same(checkpoints.restore(4, abstract()), 4)
        checkpoints.save(state(4), 4, {"memory": 5}, 1.0, replace=True)
        assert checkpoints.meta(4)["memory"] == 5
        checkpoints.save(state(8), 8, {"memory": 8}, facts={"parent": None})
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.steps() == [4, 8] and disk.facts(folder, 8)["parent"] == 4
        assert same(checkpoints.restore(8, abstract()), 8)
    assert list(stored.arrays(folder / "8", ["params/kernel"])["params/kernel"][2]) == [64, 72, 80, 88]


def test_retired_and_discarded(workdir, cloud):
    folder = workdir / "checkpoints"
    with contextlib.closing(fill(folder, range(1, 6), keep=2, keep_best=1)) as checkpoints:
        assert checkpoints.steps() == [1, 4, 5]
        assert {path.name for path in folder.iterdir()} == {"1", "4", "5"}
        checkpoints.discard(4)
        assert checkpoints.steps() == [1, 4]
        checkpoints.save(state(5), 5, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4, 5] and same(checkpoints.restore(5, abstract()), 5)


@pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
def test_what_is_damaged_is_refused_by_name_or_passed_over(workdir, cloud, harm):
    folder = workdir / "checkpoints"
    fill(folder, [4, 8]).close()
    name = arrays(cloud, folder, 8)
    if harm == "flip":
        flip(cloud, name)
    elif harm == "cut":
        cloud.put("bucket", name, cloud.objects("bucket", name)[name][:-1])
    else:
        cloud.delete("bucket", name)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        with pytest.raises(UserError, match=f"checkpoint 8 in .* is damaged: {name.partition('/8/')[2]}"):
            checkpoints.good()
        with pytest.raises(UserError, match="is damaged"):
            checkpoints.restore(8, abstract())
    before = {key.partition("/8/")[2]: data for key, data in cloud.objects("bucket", f"{folder.key}/8/").items()}
    with contextlib.closing(Checkpoints(folder, damaged="pass over")) as checkpoints:
        assert checkpoints.good() == 4 and checkpoints.steps() == [4]
        assert "moved to damaged/8; going on from step 4" in checkpoints.notes()[0]
        assert same(checkpoints.restore(4, abstract()), 4)
        checkpoints.save(state(8), 8, {})
    moved = cloud.objects("bucket", f"{folder.key}/damaged/8/")
    assert {key.partition("/8/")[2]: data for key, data in moved.items()} == before, "nothing of it is deleted"
    assert manifest.verify(folder / "8") == []


@pytest.mark.parametrize(
    ("where", "code"),
    [("MANIFEST", 403), ("params/", 403), ("commit_success", 403), ("_METADATA", 401), ("_CHECKPOINT_METADATA", 401)],
)
def test_a_save_that_fails_leaves_the_one_before(workdir, cloud, where, code):
    folder = workdir / "checkpoints"
    with contextlib.closing(fill(folder, [4], failed="go on")) as checkpoints:
        cloud.faults.append(Fault(f"write .*/8/.*{where}", code))
        checkpoints.save(state(8), 8, {})
        with contextlib.suppress(FaultError):  # told while it is waited for, or before, as a note
            checkpoints.wait()
        assert checkpoints.latest() == 4 and disk.committed(folder) == [4]
        cloud.faults.clear()
        for step in (12, 16):  # parts of step 8 may still be under way, and fail the next one
            checkpoints.save(state(step), step, {})
            with contextlib.suppress(FaultError):
                checkpoints.wait()
            assert 8 not in disk.committed(folder)
        assert checkpoints.latest() == 16 and same(checkpoints.restore(16, abstract()), 16)
    assert {path.name for path in folder.iterdir()} <= {"4", "12", "16"}, "what was half written is freed"


@pytest.mark.parametrize("where", ["_METADATA", "params/"])
def test_a_save_that_fails_is_told_once(workdir, cloud, where):
    checkpoints = fill(workdir / "checkpoints", [4])
    cloud.faults.append(Fault(f"write .*/8/.*{where}", 403))
    with pytest.raises(FaultError, match="the save of step 8 to "):
        checkpoints.save(state(8), 8, {})
        checkpoints.wait()
    checkpoints.close()  # two parts of it failed


def test_what_goes_on_writing_for_a_save_that_failed_commits_nothing(workdir):
    folder = workdir / "checkpoints"
    with contextlib.closing(fill(folder, [4])) as checkpoints:
        (folder / "8" / "params").write_bytes(b"half")
        with pytest.raises(OSError, match="cancel"):
            checkpoints._writer._commit(folder / "8")
        assert disk.committed(folder) == [4]


def test_a_storage_that_does_not_answer_is_no_damage(workdir, cloud, impatient):
    folder = workdir / "checkpoints"
    with contextlib.closing(fill(folder, [4], damaged="pass over")) as checkpoints:
        cloud.faults.append(Fault("read .*/4/params", 503))
        with pytest.raises(FaultError, match="/checkpoints: gs://bucket does not answer as it should"):
            checkpoints.good()
        cloud.faults.clear()
        assert checkpoints.good() == 4 and disk.committed(folder) == [4]


def test_a_storage_that_does_not_answer_is_no_damage_to_who_looks_at_a_step(workdir, cloud, impatient, monkeypatch):
    """TensorStore asks for minutes before it says the same: here it gives up at once."""

    def given_up(handler, where):
        raise ValueError(f"UNAVAILABLE: {where}")

    fill(workdir / "checkpoints", [4]).close()
    monkeypatch.setattr(stored.ocp.PyTreeCheckpointHandler, "metadata", given_up)
    with pytest.raises(UserError, match=r"step 4 in 'gs://.*/checkpoints' can't be read: UNAVAILABLE"):
        stored.tree(workdir / "checkpoints" / "4")
    cloud.faults.append(Fault("stat|list", 503))
    with pytest.raises(FaultError, match=f"{workdir}: gs://bucket does not answer as it should"):
        stored.tree(workdir / "checkpoints" / "4")


def test_a_step_cut_off_by_a_kill_is_set_aside(workdir, cloud):
    folder = workdir / "checkpoints"
    fill(folder, [4, 8]).close()
    cloud.delete("bucket", f"{folder.key}/8/MANIFEST.json")
    assert [(entry.step, entry.committed) for entry in shelf.entries(workdir)] == [(4, True), (8, False)]
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.steps() == [4] and "moved to uncommitted/8" in checkpoints.notes()[0]
        checkpoints.save(state(8), 8, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 8] and not (folder / disk.UNCOMMITTED).exists()


def test_looked_at_and_pruned_by_the_verbs(workdir, cloud, capsys):
    fill(workdir / "checkpoints", [4, 8, 12], keep=3).close()

    def said(*arguments, code=0):
        assert cli.main(["checkpoint", *arguments, f"--workdir={workdir}", "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [(row["step"], row["state"], row["best"]) for row in said("list", "--verify")] == [
        (4, "whole", True), (8, "whole", False), (12, "whole", False),
    ]  # fmt: skip
    sizes = {name: len(data) for name, data in cloud.objects("bucket", f"{workdir.key}/checkpoints/8/").items()}
    assert said("list")[1]["bytes"] == sum(sizes.values())
    assert "params/kernel" in [row["path"] for row in said("inspect", "8") if row["kind"] == "tensor"]
    assert any(row["kind"] == "tensor" for row in said("diff", "4", f"{workdir}:8"))
    flip(cloud, arrays(cloud, workdir / "checkpoints", 12))
    assert [row["state"] for row in said("verify", code=1)] == ["whole", "whole", "damaged"]
    assert [row["what"] for row in said("prune", "--keep=1", "--damaged", "--yes")] == ["delete", "keep", "delete"]
    assert [row["step"] for row in said("list")] == [8]
    assert not (workdir / ".lock").exists()
    with pytest.raises(UserError, match="--to='gs://bucket/new': this is written to a folder of this machine only"):
        cli.checkpoint.checkpoint(["average", "8", f"--workdir={workdir}", "--to=gs://bucket/new"])
    with pytest.raises(UserError, match="--workdir='gs://bucket/nothing' is not there"):
        cli.checkpoint.checkpoint(["list", "--workdir=gs://bucket/nothing"])


def test_a_capsule(workdir, cloud):
    folder = capsule.write(workdir, state(8), {"step": 8, "examples": [1]})
    assert str(folder) == f"{workdir}/capsules/8" and capsule.steps(workdir) == [8]
    assert capsule.read(folder)["examples"] == [1] and same(capsule.restore(folder, abstract()), 8)
    again = capsule.write(workdir, state(8), capsule.read(folder))  # by a run that was killed, and comes there again
    assert again == folder and same(capsule.restore(folder, abstract()), 8)
    flip(cloud, arrays(cloud, workdir / "capsules", 8))
    with pytest.raises(UserError, match="is damaged"):
        capsule.read(folder)
