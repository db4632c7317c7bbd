"""The words of each command, how commands are run, and what their errors mean."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake import documented, sayings

from tpu import gcloud, meaning, processes
from tpu.gcloud import Cloud, CloudError
from tpu.processes import Done
from tpu.settings import Settings

S = Settings("a", "p", ("us-west4-a",), "v5litepod-16")
ALL = Settings(
    "a", "p", ("us-west4-a",), "v5litepod-16", runtime_version="v2-x", capacity="reserved", slices=2, queue_hours=1.5,
    network="n", subnetwork="s", service_account="x@y.z", labels=("team=t",), tags=("f", "g"), internal_ips=True,
    ssh_flags=("--internal-ip",),
)  # fmt: skip


def python(text):
    return [sys.executable, "-c", text]


def runs(file):
    """Whether the process of a number that was written down runs, and is not only to be buried."""
    try:
        return Path(f"/proc/{file.read_text().strip()}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def until(condition):
    """Wait for it."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 60
        time.sleep(0.01)


def test_a_request_for_one_slice():
    assert " ".join(gcloud.create(S, "us-west4-a")) == (
        "gcloud compute tpus queued-resources create a --node-id=a --project=p --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
        "--valid-until-duration=720m --labels=flaxmodels=a --quiet"
    )


def test_a_request_for_two_slices_with_all_that_can_be_said():
    assert " ".join(gcloud.create(ALL, "us-west4-a")) == (
        "gcloud compute tpus queued-resources create a --node-count=2 --node-prefix=a --project=p --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-x --reserved --valid-until-duration=90m "
        "--network=n --subnetwork=s --service-account=x@y.z --labels=team=t,flaxmodels=a --tags=f,g "
        "--internal-ips --quiet"
    )
    assert gcloud.node_names(S) == ("a",)
    assert gcloud.node_names(ALL) == ("a-0", "a-1")


def test_deleting_a_request_deletes_its_machine_and_asks_nothing():
    assert gcloud.delete(S, "z")[-2:] == ("--force", "--quiet")
    assert gcloud.delete_node(S, "z", "a-1")[5] == "a-1" and gcloud.delete_node(S, "z", "a-1")[-1] == "--quiet"


def test_on_demand_is_what_no_flag_says():
    words = gcloud.create(Settings("a", "p", ("z",), "v4-8", capacity="on demand"), "z")
    assert not {"--spot", "--reserved", "--guaranteed"} & set(words)


@pytest.mark.parametrize("s", [S, ALL])
def test_google_documents_each_command_and_flag(s):
    """As the fake cloud knows them; it refuses what is not documented."""
    zone = "us-west4-a"
    commands = [
        gcloud.create(s, zone), gcloud.describe(s, zone), gcloud.list_queued(s, zone), gcloud.list_nodes(s, zone),
        gcloud.delete(s, zone), gcloud.delete_node(s, zone, "a"), gcloud.ssh(s, zone, "ls"), gcloud.ssh(s, zone, "", 0),
        gcloud.scp(s, zone, [Path("x.tar")], "y.tar"), gcloud.storage("ls", "gs://b/a/"),
    ]  # fmt: skip
    for words in commands:
        documented.parse(list(words[1:]))


def test_a_command_for_the_workers_is_one_word():
    words = gcloud.ssh(S, "us-west4-a", "echo 'a b'", node="a")
    assert "--command=echo 'a b'" in words and "--worker=all" in words and "--quiet" in words
    words = gcloud.ssh(ALL, "us-west4-a", "", 1, "a-1")
    assert words[5] == "a-1" and "--worker=1" in words and "--internal-ip" in words
    assert "--quiet" not in words  # a user may answer


def test_every_command_is_printed_as_a_shell_would_take_it():
    said = []
    Cloud(echo=said.append).run([sys.executable, "-c", "print('a b')"])
    assert said == [f"$ {sys.executable} -c 'print('\"'\"'a b'\"'\"')'"]


def test_a_poll_is_printed_the_first_time_only():
    said = []
    cloud = Cloud(True, said.append)
    for _ in range(3):
        cloud.run(["poll"], quiet=True)
    cloud.run(["act"])
    cloud.run(["act"])
    assert said == ["$ poll", "$ act", "$ act"]


def test_a_dry_run_runs_nothing(tmp_path):
    file = tmp_path / "made"
    cloud = Cloud(True, [].append, sleep=lambda seconds: pytest.fail("it slept"))
    assert cloud.run(["touch", str(file)]) == Done(0, "", "")
    assert cloud.attach(["touch", str(file)]) == 0
    assert cloud.json(["touch", str(file)]) is None
    cloud.sleep(100)
    assert not file.exists()


def test_a_dry_run_takes_the_answers_of_the_good_case():
    cloud = Cloud(True, [].append, good=lambda words: Done(int(words[0] == "bad"), '{"a": 1}', "NOT_FOUND"))
    assert cloud.json(["good"]) == {"a": 1}
    with pytest.raises(CloudError) as error:
        cloud.run(["bad"])
    assert error.value.kind == "missing"


def test_what_fails_in_passing_is_tried_again_and_what_fails_is_not(monkeypatch):
    slept, answers = [], []
    monkeypatch.setattr(processes, "run", lambda commands, limit, stream: [answers.pop(0)])
    cloud = Cloud(echo=[].append, sleep=slept.append)
    transient = Done(1, "", sayings.said("transient", command="x"))
    answers[:] = [transient, transient, Done(0, "yes", "")]
    assert cloud.run(["x"]).out == "yes"
    assert slept == [1.0, 5.0]
    answers[:] = [transient] * 4
    with pytest.raises(CloudError, match="UNAVAILABLE"):
        cloud.run(["x"])
    assert not answers
    answers[:] = [Done(1, "", "no such thing: ERROR")]
    with pytest.raises(CloudError):
        cloud.run(["x"])
    answers[:] = [transient]
    assert cloud.run(["x"], check=False) == transient
    answers[:] = [Done(processes.EXPIRED, "", "")]
    with pytest.raises(CloudError, match="did not end in time"):
        cloud.run(["x"])


def test_an_answer_that_is_no_json_is_an_error():
    with pytest.raises(CloudError, match="printed no JSON"):
        Cloud(True, [].append, good=lambda words: Done(0, "{", "")).json(["x"])


def test_gcloud_that_is_not_installed_is_said_so_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (Cloud(echo=[].append).run, Cloud(echo=[].append).attach):
        with pytest.raises(CloudError, match=r"not installed.*cloud.google.com/sdk/docs/install") as error:
            act(["gcloud"])
        assert error.value.kind == "gone"


def test_lines_come_while_the_command_runs(tmp_path):
    """The second one is not printed before the first one came."""
    came, file = [], tmp_path / "came"
    text = f'echo one; while [ ! -e {file} ]; do sleep 0.01; done; printf "two"'
    (done,) = processes.run([["sh", "-c", text]], 60, lambda line: (came.append(line), file.touch()))
    assert came == ["one", "two"]
    assert (done.code, done.out) == (0, "one\ntwo")


def test_commands_run_at_the_same_time_and_each_has_its_own_end(tmp_path):
    """Each waits for a file that the other makes."""
    text = 'touch "$1"; while [ ! -e "$2" ]; do sleep 0.01; done; echo "$3"; exit "$4"'
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = processes.run([["sh", "-c", text, "sh", a, b, "a", "0"], ["sh", "-c", text, "sh", b, a, "b", "3"]], 30)
    assert [(done.code, done.out) for done in found] == [(0, "a\n"), (3, "b\n")]


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    """Its time is up as soon as it has said something."""
    file, ahead = tmp_path / "pid", [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda clock=time.monotonic: clock() + ahead[0])
    ignores = f"(trap '' TERM; sleep 1000) & echo $! >{file}; echo said; wait"
    (done,) = processes.run([["sh", "-c", ignores]], 600, lambda line: ahead.append(ahead.pop() + 600))
    assert (done.code, done.out) == (processes.EXPIRED, "said\n")
    until(lambda: not runs(file))


def test_what_a_command_leaves_behind_does_not_hold_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LINGERS", 0.1)
    file = tmp_path / "pid"
    begun = time.monotonic()
    (done,) = processes.run([["sh", "-c", f"sleep 1000 & echo $! >{file}"]], 600)
    assert done.code == 0 and time.monotonic() - begun < 300
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_ctrl_c_ends_the_command(tmp_path):
    file = tmp_path / "pid"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            said = f"echo $$ >{file}; echo said; exec sleep 1000"
            processes.run([["sh", "-c", said]], 600, lambda line: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not runs(file)


def test_ctrl_c_while_a_command_starts_ends_it_too(monkeypatch):
    """It may come when the command runs already, and `Popen` has not returned."""
    begun = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            begun.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            processes.run([["sleep", "1000"], ["sleep", "1000"]], 600)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [child.returncode for child in begun] == [-signal.SIGTERM]


def test_a_signal_is_told_as_a_shell_does():
    (done,) = processes.run([["sh", "-c", "kill -KILL $$"]], 60)
    assert done.code == 137


KINDS = {
    "capacity": "capacity", "reserved": "capacity", "quota": "quota", "quota of the region": "quota",
    "permission": "permission", "disabled": "permission", "exists": "exists", "missing": "missing",
    "unknown type": "usage", "transient": "transient", "internal": "transient", "in use": "unknown",
}  # fmt: skip


@pytest.mark.parametrize("saying", KINDS)
def test_what_gcloud_is_known_to_say_is_understood(saying):
    fields = dict.fromkeys(("command", "project", "zone", "name", "number", "kind", "type", "state"), "x")
    assert meaning.kind(sayings.said(saying, **fields)) == KINDS[saying]


@pytest.mark.parametrize(
    ("said", "kind", "remedy"),
    [
        ("ERROR: (gcloud.x) You do not currently have an active account selected.", "permission", "gcloud auth login"),
        ("ERROR: There was a problem refreshing your current auth tokens: invalid_grant", "permission", "auth login"),
        ('SSH Key is not present in the SSH agent. Please run "ssh-add /k"', "permission", "ssh-add"),
        ("u@10.0.0.2: Permission denied (publickey).", "permission", "ssh-add"),
        (sayings.SILENT.format(address="10.0.0.2", verb="SSH"), "transient", "firewall"),
        ("Cloud TPU API has not been used in project 1 before", "permission", "services enable tpu.googleapis.com"),
        ("This API method requires billing to be enabled. Billing must be enabled", "permission", "billing"),
        ("Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'", "transient", ""),
        ("HttpError 403: Quota exceeded, rateLimitExceeded", "transient", ""),
        ("ZONE_RESOURCE_POOL_EXHAUSTED", "capacity", "--zone"),
        ("Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted.", "quota", "iam-admin/quotas"),
        ("HttpError 503", "transient", ""),
        ("requests.exceptions.ConnectionError: Max retries exceeded", "transient", ""),
        ("ERROR: (gcloud.x) unrecognized arguments: --foo", "usage", ""),
        ("there are 503 of them", "unknown", ""),
    ],
)
def test_errors_have_a_kind_and_a_remedy(said, kind, remedy):
    error = meaning.error_of(["gcloud", "x"], Done(1, "", said))
    assert error.kind == kind
    assert remedy in error.remedy and said.removeprefix("ERROR: ")[:20] in str(error)


@pytest.mark.parametrize(
    ("said", "kind", "remedy"),
    [
        ("ERROR: (gcloud.storage.ls) gs://b not found: 404.", "missing", "buckets create"),
        ("a@b.c does not have storage.objects.list access to the Google Cloud Storage bucket.", "permission", "yours"),
        (
            "ERROR: (gcloud.storage.ls) You do not currently have an active account selected.",
            "permission",
            "auth login",
        ),
        ("HTTPError 503: backend error", "transient", ""),
    ],
)
def test_what_is_said_of_a_bucket_has_the_remedy_of_a_bucket(said, kind, remedy):
    error = meaning.error_of(gcloud.storage("ls", "gs://b/a/logs/"), Done(1, "", said))
    assert error.kind == kind and remedy in error.remedy and "tpu.admin" not in error.remedy


def test_an_error_is_shown_from_where_it_begins_and_not_without_end():
    text = "Create request issued\nERROR: (gcloud.x) it\n  failed"
    assert meaning.shortened(text) == "ERROR: (gcloud.x) it failed"
    assert len(meaning.shortened("ERROR " + "x" * 10_000)) < 700
    again = sayings.ATTEMPT.format(verb="SSH", worker=1) + "\nu@10.0.0.2: Permission denied (publickey).\n"
    end = "ERROR: (gcloud.x) [/usr/bin/ssh] exited with return code [255]."
    assert meaning.shortened(again * 10 + end) == "u@10.0.0.2: Permission denied (publickey)."
    thread = "Exception in thread Thread-1:\nTraceback (most recent call last):\n  x\nCommandError: y"
    assert meaning.shortened(again * 10 + thread) == "u@10.0.0.2: Permission denied (publickey)."
    assert meaning.shortened(thread).endswith("CommandError: y")
    late = meaning.error_of(["gcloud", "x"], Done(processes.EXPIRED, "", again))
    assert (late.kind, "did not end in time: u@10" in late.said) == ("transient", True)
    assert "it said nothing" in str(meaning.error_of(["gcloud"], Done(1, "", "")))


@pytest.mark.nightly
def test_the_installed_gcloud_has_each_flag():
    """Where there is a real one; its own help, which needs no account."""
    if subprocess.run(["sh", "-c", "command -v gcloud"], capture_output=True).returncode:
        pytest.skip("no gcloud on this machine")
    for words in (gcloud.create(ALL, "z"), gcloud.ssh(ALL, "z", "ls"), gcloud.delete(S, "z")):
        plain = [word for word in words[1:5] if not word.startswith("-")]
        said = subprocess.run(["gcloud", *plain, "--help"], capture_output=True, text=True, timeout=120).stdout
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert flag in said or flag in ("--project", "--quiet"), (plain, flag)
