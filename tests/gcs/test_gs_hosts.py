"""Several hosts and a bucket: the log of each comes there, however it ends; and the doctor looks at a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gcs import Fault

from flaxmodels import config, storage
from flaxmodels.runtime import distributed, lease, lock, supervisor
from flaxmodels.runtime.exits import FaultError
from flaxmodels.verify import bucket
from flaxmodels.verify import storage as verify_storage

ROOT = Path(__file__).parents[2]

LOG = """
import sys
from flaxmodels import storage
from flaxmodels.runtime import exits, host_log
host_log.keep(storage.place(sys.argv[1]), 3, 4)
print("said by", sys.argv[2])
if sys.argv[2] == "second":
    exits.leave(exits.FaultError("left at once"))
"""


@pytest.mark.slow
def test_the_log_of_each_host_comes_to_the_bucket(cloud, workdir):
    for how, code in (("first", 0), ("second", 1)):
        done = subprocess.run(
            [sys.executable, "-c", LOG, str(workdir), how], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    said = [line[25:] for line in (workdir / "logs/host-0003.log").read_text().splitlines()]
    assert [line for line in said if not line.startswith("=== process")] == [
        "said by first", "=== ends", "said by second", "error: left at once", "=== ends",
    ]  # fmt: skip


def test_a_bucket_that_can_be_used(cloud, workdir):
    (found,) = bucket.bucket(workdir)
    assert found.level in ("ok", "warning") and "writes" in found.text and "a small object takes" in found.text
    assert not storage.sizes(workdir)


def test_a_bucket_that_can_not_be_used(cloud, workdir):
    (found,) = bucket.bucket(storage.place("gs://none/run"))
    assert found.level == "problem" and "gs://none does not exist" in found.text
    cloud.faults.append(Fault("write", 403, times=1))
    (found,) = bucket.bucket(workdir)
    assert found.level == "problem" and "this account may not" in found.text
    cloud.faults.append(Fault("read", 403, times=1))
    (found,) = bucket.bucket(workdir)
    assert found.level == "problem" and not list(workdir.iterdir()), "what was written goes"


def test_a_workdir_in_a_bucket_that_another_run_holds(cloud, workdir, monkeypatch):
    with lock.workdir_lock(workdir):
        (found,) = [one for one in verify_storage.contents(workdir) if one.what == "workdir"]
        assert f"belongs to a running process: pid {os.getpid()} on " in found.text and found.level == "warning"
        monkeypatch.setattr(lease, "DEAD", -10.0)  # one that was not renewed for long
        assert not [one for one in verify_storage.contents(workdir) if one.what == "workdir"]
    assert not [one for one in verify_storage.contents(workdir) if one.what == "workdir"]


ALONE = """
import sys
from flaxmodels import config, mirror, storage
from flaxmodels.runtime import distributed, exits
workdir = storage.place(sys.argv[1])
flags = config.train_parser("").parse_args(["--config=x", "--distributed=off"])
with distributed.joined(flags, workdir), mirror.kept(workdir) as folder:
    (folder / "stacks.0.txt").write_text("here")
    exits.leave(exits.FaultError("stuck"))
"""


@pytest.mark.slow
def test_what_a_process_alone_wrote_last_comes_to_the_bucket(cloud, workdir):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(workdir)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "error: stuck" in done.stderr, done.stderr
    assert (workdir / "stacks.0.txt").read_text() == "here"


def test_a_bucket_that_does_not_answer_at_the_start_is_a_fault(cloud, workdir, impatient):
    cloud.faults.append(Fault("list|read", 503))
    told = pytest.raises(FaultError, match=f"{workdir}: gs://bucket does not answer")
    with told:
        supervisor._supervise(["true"], workdir, 1)
    flags = config.train_parser("").parse_args(
        ["--config=x", "--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1"]
    )
    with told, distributed.joined(flags, workdir):
        pass
