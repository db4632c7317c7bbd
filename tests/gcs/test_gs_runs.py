"""Runs whose workdir is in a bucket, in processes of their own: as on a disk, bit for bit, whatever is killed."""

import itertools
import os
import random
import sys
import time
from pathlib import Path

import pytest
from faults import harness
from faults.harness import T1, T2x4

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
slow, nightly = pytest.mark.slow, pytest.mark.nightly


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(topology, *flags): the workdir of tiny.py's run on a disk, left alone."""
    made = {}

    def run(topology=T1, *flags):
        if (topology, flags) not in made:
            workdir = tmp_path_factory.mktemp("whole") / topology.name
            with harness.start(workdir, topology, *flags) as group:
                assert set(group.wait()) == {0}, group
            made[topology, flags] = workdir
        return made[topology, flags]

    return run


@pytest.fixture
def start(cloud, workdir, tmp_path):
    """start(topology, *flags, machine=...): the processes of a run with that workdir."""

    def begin(topology=T1, *flags, machine="one", program=("train.py",), limits=("--heartbeat_timeout=20",)):
        words = [sys.executable, *map(str, program), f"--config={harness.TINY}", f"--workdir={workdir}", *flags]
        commands = [words] * topology.processes
        if topology.processes > 1:
            where = (f"--coordinator_address=localhost:{harness.free_port()}", f"--num_processes={topology.processes}")
            commands = [[*words, *where, *limits, f"--process_id={rank}"] for rank in range(topology.processes)]
        env = harness.environment(topology, {**cloud.environment(), "XDG_CACHE_HOME": str(tmp_path / machine)})
        return harness.Group(commands, tmp_path / f"{machine}.out", env)

    return begin


def fetched(cloud, workdir, to):
    """What the bucket holds of a workdir, as a folder."""
    for name, data in cloud.objects("bucket", f"{workdir.key}/").items():
        file = to / name.removeprefix(f"{workdir.key}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return to


def committed(cloud, workdir):
    names = cloud.objects("bucket", f"{workdir.key}/checkpoints/")
    found = (name.split("/")[-2] for name in names if name.endswith("/MANIFEST.json"))
    return sorted(int(step) for step in found if step.isdecimal())


def all_whole(workdir):
    """Every step that is listed has the bytes of its manifest."""
    from flaxmodels import disk, manifest

    folder = workdir / "checkpoints"
    return not any(manifest.verify(folder / str(step)) for step in disk.committed(folder))


def killed(cloud, workdir, start, topology, moments):
    """Start the run, kill it when the storage is asked for the n-th time since, and so on; then let it end.

    It holds at step 56: where there is nothing more to come, it is killed there, once. Two machines take turns.
    """
    held, kills = ("tests/faults/held.py", 56, "/dev/null/never"), 0
    for moment, machine in zip(moments, itertools.cycle(("one", "two"))):
        if 56 in committed(cloud, workdir):
            break
        cloud.requests.clear()
        with start(topology, program=held, machine=machine) as group:
            while len(cloud.requests) < moment and 56 not in committed(cloud, workdir) and group.running():
                time.sleep(0.005)
            assert group.running(), f"kill {kills} at {moment}: {group}"
            group.kill()
            group.wait()
        kills += 1
        assert all_whole(workdir)
    assert kills >= 2
    with start(topology) as group:
        assert set(group.wait()) == {0}, group


@slow
def test_a_run_that_is_killed_ends_as_one_on_a_disk(cloud, workdir, start, whole, tmp_path):
    """In a later save, or while the log is copied; the run can't end before. Other moments are nightly."""
    flags = ("--config.train.duration=24",)
    with start(T1, *flags, program=("tests/faults/held.py", 20, tmp_path / "never")) as group:
        assert harness.wait_for(lambda: committed(cloud, workdir) or not group.running()), group
        moment = len(cloud.requests) + 50
        assert harness.wait_for(lambda: len(cloud.requests) >= moment or not group.running()), group
        assert group.running(), group
        group.kill()
        group.wait()
    assert all_whole(workdir) and committed(cloud, workdir)
    with start(T1, *flags, machine="two") as group:
        assert group.wait() == [0], group
        said = group.output()
    assert "resumed at step" in said and "finished: all steps made" in said
    there = fetched(cloud, workdir, tmp_path / "fetched")
    assert harness.same(there, whole(T1, *flags), 24) == ""
    steps = sorted(int(file.name) for file in (there / "checkpoints").iterdir())  # and nothing else
    assert harness.on_disk(there) == harness.on_disk(whole(T1, *flags)) == steps
    assert (there / "curves.png").exists() and list((there / "tensorboard").iterdir())
    assert 1 <= len((there / "goodput.jsonl").read_text().splitlines()) <= 2  # one that lived for a second left none
    assert not (there / ".lock").exists()


@nightly
@pytest.mark.parametrize("topology", [T1, T2x4], ids=lambda topology: topology.name)
def test_killed_at_many_moments(cloud, workdir, start, whole, tmp_path, topology):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    killed(cloud, workdir, start, topology, [draw.randrange(20, 900) for _ in range(6)])
    assert harness.same(fetched(cloud, workdir, tmp_path / "fetched"), whole(topology)) == ""


SHORT = ("--config.train.duration=12", "--config.checkpoint.every=6", "--config.train.eval_every=0")


@nightly
def test_two_processes(cloud, workdir, start, tmp_path):
    """That they end as on a disk, killed or not, is a nightly test: two more processes that compile."""
    with start(harness.Topology("pair", 2, 1), *SHORT) as group:
        assert set(group.wait()) == {0}, group
    there = fetched(cloud, workdir, tmp_path / "fetched")
    assert harness.on_disk(there)[-1] == harness.last_step(there) == 12 and all_whole(workdir)
    assert {"host-0000.log", "host-0001.log"} <= {file.name for file in (there / "logs").iterdir()}


@nightly
def test_a_second_run_is_refused(cloud, workdir, start):
    with start(T1, "--config.train.duration=100000") as first:
        assert harness.wait_for(lambda: committed(cloud, workdir), 60), first
        with start(T1, machine="two") as second:
            assert second.wait() == [2]
            assert "belongs to another running process: pid" in second.output(), second
        assert first.running()
        first.kill(signum=15)
        assert first.wait() == [143], first
    assert not (workdir / ".lock").exists()
    assert f"saved step {committed(cloud, workdir)[-1]} of" in first.output()


@nightly
def test_a_supervisor_starts_it_again_and_keeps_its_account(cloud, workdir, start, whole, tmp_path):
    with start(T1, "--max_restarts=3") as group:
        assert harness.wait_for(lambda: committed(cloud, workdir)), group
        children = Path(f"/proc/{group.processes[0].pid}/task/{group.processes[0].pid}/children").read_text().split()
        os.kill(int(children[0]), 9)
        assert group.wait() == [0], group
        assert "killed by SIGKILL" in group.output()
    assert harness.same(fetched(cloud, workdir, tmp_path / "fetched"), whole()) == ""
