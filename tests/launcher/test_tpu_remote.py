import shlex
import subprocess
from pathlib import Path

import pytest

from tpu import remote
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.shipping import Parcel

PARCEL = Parcel(Path("parcel-0123456789ab.tar"), "0123456789ab", "revision", "", (), "digest")
S = Settings(
    "a", type="v5litepod-16", bucket="gs://b", command=("python", "train.py", "--config.x='two words'; rm -rf /")
)


def test_a_worker_is_silent_till_a_line_tells_otherwise():
    text = """WARNING: something of ssh
worker 1: state installed attempt=0 code=- sha=0123456789ab
Using ssh batch size of 1. worker 3: state ended attempt=12 code=143 sha=0123456789ab
worker 4: state dead attempt=2 code=- sha=ba9876543210
worker 5: state running attempt=3 code=- sha=ba9876543210
worker 6: state absent attempt=0 code=- sha=-
worker 7: state flying attempt=0 code=- sha=-
worker ?: problem: the metadata server
"""
    assert remote.parse(text, 8) == (
        Worker(0, "silent"),
        Worker(1, "installed", sha="0123456789ab"),
        Worker(2, "silent"),
        Worker(3, "ended", 12, 143, "0123456789ab"),
        Worker(4, "dead", 2, sha="ba9876543210"),
        Worker(5, "running", 3, sha="ba9876543210"),
        Worker(6, "absent"),
        Worker(7, "silent"),
    )
    assert remote.parse("", 1) == (Worker(0, "silent"),)


def test_problems_are_the_first_of_each_worker():
    text = "worker 1: x\nworker 1: problem: a\nworker 1: problem: b\nno\nworker 0: problem: c\n"
    assert remote.problems(text) == {1: "a", 0: "c"}
    assert next(remote.lines(text)) == (1, "x")


def test_words_reach_a_worker_as_they_are():
    text = remote.start(S, 3)
    script = text.replace("flaxmodels/a/worker.sh", '-c \'printf "%s\\n" "$@"\' sh')
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == ["start", "3", "gs://b/a", *S.training]


def test_a_worker_of_a_later_slice_knows_its_number():
    first = {text.partition("sh ")[0] for text in (remote.start(S, 1), remote.stop(S, 5), remote.follow(S, 1))}
    assert first == {""}
    assert remote.check(S, slice=2).startswith("FIRST=8 sh ")
    assert "FIRST=4 sh" in remote.install(S, PARCEL, slice=1) and "$((4 + " in remote.state(S, slice=1)


def test_all_slices_are_checked_together():
    slices = Settings("a", type="v5litepod-16", bucket="gs://b", slices=2)
    assert remote.check(slices, slice=1).endswith("worker.sh check 8 32")


@pytest.mark.parametrize("given", ["3", ""])
def test_a_machine_without_anything_says_that_it_is_absent(tmp_path, given):
    (tmp_path / "curl").write_text("#!/bin/sh\nexit 22\n")  # a TPU of one host has no number
    (tmp_path / "curl").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "TPU_WORKER_ID": given}
    said = subprocess.run(
        ["sh", "-c", remote.state(S, slice=1)], env=environment, capture_output=True, text=True, check=True
    )
    number = 4 + int(given or 0)
    assert said.stdout == f"worker {number}: state absent attempt=0 code=- sha=-\n" and not said.stderr
    assert remote.log(S, 5, slice=1).endswith(remote.state(S, slice=1).partition("; else")[2])


def test_every_text_is_one_that_a_shell_reads():
    for text in (remote.state(S), remote.install(S, PARCEL), remote.follow(S, 5), remote.check(S, slice=1)):
        assert subprocess.run(["sh", "-n", "-c", text], capture_output=True).returncode == 0
        assert shlex.split(text)
