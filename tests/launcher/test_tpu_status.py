"""The verb `status`: a line for each thing that one asks about a run that one has not looked at for a while."""

import argparse
from dataclasses import replace

import pytest
from modelled import kept, settings

from tpu import acts, state, status, steps
from tpu.acts import Resource
from tpu.cost import Life
from tpu.gcloud import Cloud
from tpu.processes import Done
from tpu.remote import Worker
from tpu.state import Held

NOW = 1.7e9
RAN = kept(
    phase="running",
    why="attempt 3",
    since=NOW - 4000,
    held=Held("z1-a", NOW - 7200, met=True),
    attempt=3,
    step=40,
    lives=(Life("z1-a", NOW - 7200, None, 16, 3.84), Life("z2-b", NOW - 9000, NOW - 7200, 16, 3.84, "preempted")),
)
WORKERS = (Worker(0, "running", 3, None, "c0de"), Worker(1, "ended", 3, 75, "c0de"), Worker(2, "silent"))
LEFT = ["queued resource a in z1-a: ACTIVE"]


def lines(s=None, remembered=RAN, found=None, workers=WORKERS, step=50, left=LEFT, owner="watch, pid 3 on laptop"):
    found = {"z1-a": Resource("ACTIVE")} if found is None else found
    table = status.table(s or settings(), remembered, found, workers, step, left, owner, NOW)
    return [f"{key}: {text}" for key, text in table]


def test_all_is_said():
    assert lines(settings(max_hours=24.0, max_cost=50.0)) == [
        "run: a: train",
        "code: c0de: revision 111111111111",
        "phase: running for 1 h 6 min: attempt 3",
        "machine: ACTIVE in z1-a",
        "worker 0: running attempt 3, code c0de",
        "worker 1: ended attempt 3 with exit code 75, code c0de",
        "worker 2: silent",
        "step: 50, the newest checkpoint in /bucket/a",
        "hours: 2.50 of 24 on 2 machines",
        "USD: 9.60 of 50",
        "watch: watch, pid 3 on laptop",
        "there: queued resource a in z1-a: ACTIVE",
    ]


def test_what_is_unknown_is_said():
    parcel = replace(RAN.parcel, files=("train.py", "x.py"))
    said = lines(remembered=replace(RAN, parcel=parcel, lives=(Life("z1-a", NOW - 60, None, 16, None),)), step=None)
    assert "code: c0de: revision 111111111111 and a patch to 2 files" in said
    assert "step: 40 when last seen" in said and "USD: no price is known" in said
    assert "hours: 0.02 on 1 machine" in said


def test_a_machine_that_nobody_watches_is_a_warning():
    assert "watch: nobody does: what is there costs till `watch` or `down`" in lines(owner="")
    said = lines(owner="", left=[], found={}, workers=(), remembered=state.Kept(), step=0)
    assert said[-1] == "there: nothing"
    assert not [line for line in said if line.startswith(("watch", "phase", "code", "machine", "worker"))]


def test_the_verb_looks_and_changes_nothing(tmp_path, monkeypatch):
    s = settings(state=tmp_path, zones=("z1-a",))
    state.save(s.folder, RAN)
    before = (s.folder / state.FILE).read_bytes()
    asked = []
    monkeypatch.setattr(acts, "find", lambda cloud, s: asked.append(s.zones) or [("z1-a", Resource("ACTIVE"))])
    monkeypatch.setattr(acts, "workers", lambda cloud, s, zone: WORKERS)
    monkeypatch.setattr(acts, "left", lambda cloud, s: LEFT)
    monkeypatch.setattr(steps, "newest", lambda cloud, s: 50)
    said = []
    assert status.status(s, Cloud(echo=said.append), argparse.Namespace()) == 0
    assert "machine   ACTIVE in z1-a" in said and "step      50, the newest checkpoint in /bucket/a" in said
    assert asked == [("z1-a", "z2-b")]  # also where the run has had a machine before
    assert (s.folder / state.FILE).read_bytes() == before and not list(s.folder.glob("*.lock"))


@pytest.mark.parametrize("there", ["gs", "folder", "nowhere"])
def test_the_newest_checkpoint_has_a_manifest(tmp_path, there):
    names = ["5", "20", "100", "notes"]
    if there == "gs":
        s, text = settings(bucket="gs://b"), "".join(f"gs://b/a/checkpoints/{n}/MANIFEST.json\n" for n in names)
    else:
        s, text = settings(bucket=str(tmp_path)), ""
        for name in names if there == "folder" else []:
            (tmp_path / "a/checkpoints" / name).mkdir(parents=True)
            (tmp_path / "a/checkpoints" / name / "MANIFEST.json").touch()
        if there == "folder":
            (tmp_path / "a/checkpoints/300").mkdir()  # not committed
    cloud = Cloud(dry_run=True, echo=lambda line: None, good=lambda words: Done(0, text, ""))
    assert steps.newest(cloud, s) == (None if there == "nowhere" else 100)


@pytest.mark.parametrize("said, step", [("One or more URLs matched no objects.", 0), ("403 forbidden", None)])
def test_no_checkpoint_is_another_thing_than_no_answer(said, step):
    cloud = Cloud(dry_run=True, echo=lambda line: None, good=lambda words: Done(1, "", said))
    assert steps.newest(cloud, settings(bucket="gs://b")) == step
