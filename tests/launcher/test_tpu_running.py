import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from tpu import acts, logs, running, shipping, ssh, state
from tpu.gcloud import Cloud
from tpu.goodcase import GoodCase
from tpu.meaning import CloudError
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.shipping import Parcel

SHA = "0123456789ab"
PARCEL = Parcel(Path("parcel.tar"), SHA, "revision", "", (), "digest")


@pytest.fixture
def s(tmp_path):
    return Settings(
        "a", project="p", zones=("z",), type="v5litepod-16", bucket=str(tmp_path / "bucket"), state=tmp_path / "state"
    )


@pytest.fixture
def did(monkeypatch):
    """What is done to the machine, in order; `found` is what its workers say, `text` what they print."""
    told = argparse.Namespace(acts=[], found=(), text="")
    monkeypatch.setattr(ssh, "place", lambda cloud, s: "z")
    monkeypatch.setattr(acts, "workers", lambda cloud, s, zone: told.found)
    monkeypatch.setattr(shipping, "pack", lambda repository, folder, dry_run: PARCEL)
    for name in ("ship", "install", "check", "start", "stop"):
        monkeypatch.setattr(acts, name, lambda cloud, s, zone, *rest, name=name: told.acts.append((name, *rest)))
    monkeypatch.setattr(logs, "follow", lambda cloud, s, zone, lines: told.text)
    monkeypatch.setattr(logs, "fetch", lambda cloud, s, zone: {0: "step 1", 1: "error: bad"})
    return told


def cloud():
    said: list[str] = []
    made = Cloud(echo=said.append)
    made.said = said
    return made


def states(*said: str) -> str:
    return "\n".join(f"worker {number}: state {text} sha={SHA}" for number, text in enumerate(said))


def four(*workers: Worker) -> tuple[Worker, ...]:
    return tuple(dataclasses.replace(workers[min(n, len(workers) - 1)], number=n) for n in range(4))


@pytest.mark.parametrize("kept, logged", [(5, 7), (7, 5)])
def test_a_new_machine_gets_the_code_and_an_attempt_of_its_own(s, did, kept, logged):
    did.found = four(Worker(0, "absent"))
    did.text = states(*["ended attempt=8 code=0"] * 4)
    s.folder.mkdir(parents=True)
    state.save(s.folder, state.Kept(attempt=kept))
    Path(s.workdir, "logs", f"attempt-{logged}").mkdir(parents=True)  # of a machine that is gone
    assert running.run(s, cloud(), argparse.Namespace()) == 0
    assert did.acts == [("ship", PARCEL), ("install", PARCEL), ("check",), ("start", 8)]
    kept = state.load(s.folder)
    assert (kept.attempt, kept.parcel.sha, kept.command) == (8, SHA, s.command)
    assert (kept.phase, kept.why) == ("running", "attempt 8")


@pytest.mark.parametrize("sha", [SHA, "ba9876543210"])
def test_what_runs_is_attached_to(s, did, sha):
    did.found = four(Worker(0, "running", 3, sha=sha))
    did.text = states(*["ended attempt=3 code=0"] * 4)
    told = cloud()
    assert running.run(s, told, argparse.Namespace()) == 0
    assert did.acts == []
    assert told.said[0].startswith("# attempt 3 runs") and ("watch --update" in told.said[0]) == (sha != SHA)


def test_an_attempt_that_was_begun_on_some_workers_is_started_on_the_others(s, did):
    did.found = four(Worker(0, "running", 3, sha=SHA), Worker(0, "ended", 2, 1, SHA))
    did.text = states(*["ended attempt=3 code=0"] * 4)
    running.run(s, cloud(), argparse.Namespace())
    assert did.acts == [("start", 3)]


def test_a_broken_group_is_stopped_and_started_as_the_next_attempt(s, did):
    did.found = four(Worker(0, "running", 3, sha=SHA), Worker(0, "dead", 3, sha=SHA))
    did.text = states(*["ended attempt=4 code=0"] * 4)
    running.run(s, cloud(), argparse.Namespace())
    assert did.acts == [
        ("stop", running.SECONDS), ("ship", PARCEL), ("install", PARCEL), ("check",), ("start", 4),
    ]  # fmt: skip


def test_who_is_silent_is_named_before_anything_is_done(s, did):
    did.found = four(Worker(0, "absent"), Worker(0, "silent"))
    with pytest.raises(CloudError, match="no answer from worker 1, 2, 3"):
        running.run(s, cloud(), argparse.Namespace())
    assert did.acts == []


def test_ctrl_c_leaves_the_training_alone_and_says_so(s, did, monkeypatch):
    def interrupted(cloud, s, zone, lines):
        raise KeyboardInterrupt

    did.found = four(Worker(0, "running", 3, sha=SHA))
    monkeypatch.setattr(logs, "follow", interrupted)
    told = cloud()
    assert running.run(s, told, argparse.Namespace()) == 0
    assert "The training goes on, and the machine costs." in told.said[-1] and did.acts == []


@pytest.mark.parametrize("codes, expected", [((0, 2, 1, 1), 2), ((1, 1, 1, 75), 1), ((143,) * 4, 1)])
def test_how_the_attempt_ended_is_said(s, did, codes, expected):
    did.found = four(Worker(0, "running", 1, sha=SHA))
    did.text = states(*(f"ended attempt=1 code={code}" for code in codes))
    told = cloud()
    assert running.run(s, told, argparse.Namespace()) == expected
    assert told.said[-1] == "first error, of worker 1:\n  error: bad"


def test_a_connection_that_was_lost_is_no_end(s, did):
    did.found = four(Worker(0, "running", 1, sha=SHA))
    did.text = states("ended attempt=1 code=0")
    with pytest.raises(CloudError, match="connection to worker 1, 2, 3 was lost"):
        running.run(s, cloud(), argparse.Namespace())


def test_a_dry_run_leaves_no_file(s, monkeypatch):
    monkeypatch.setattr(shipping, "pack", lambda repository, folder, dry_run: PARCEL if dry_run else None)
    said: list[str] = []
    made = Cloud(True, said.append, good=GoodCase(s, there=True))
    assert running.run(s, made, argparse.Namespace()) == 0
    verbs = [re.findall(r"worker\.sh (install|check|start|state|follow)", line) for line in said]
    assert [verb[-1] for verb in verbs if verb and verb[-1] != "state"] == ["install", "check", "start", "follow"]
    assert sum("tpu-vm scp" in line for line in said) == 1 and not s.folder.exists()
