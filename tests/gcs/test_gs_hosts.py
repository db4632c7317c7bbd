"""Several hosts and a bucket: the log of each comes there, however it ends; and the doctor looks at a bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gcs import Fault

from flaxmodels import storage
from flaxmodels.verify import bucket

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
