"""The fake cloud itself: its states follow each other as those of the real one, its faults come when they are told to,
what Google does not document it refuses, and no process of it outlives what it belongs to."""

import json
import re
import subprocess
import time

import pytest
from cloud import ROOT, Cloud
from fake import documented, faults, hosts, lifecycle, sayings, store
from faults import harness

from tpu import gcloud as commands
from tpu.settings import Settings

PLACE = ("--project=p", "--zone=z")
QUEUED, NODES = ("compute", "tpus", "queued-resources"), ("compute", "tpus", "tpu-vm")
CREATE = (*QUEUED, "create", "a", *PLACE, "--accelerator-type=v5p-16", "--runtime-version=r", "--node-id=a", "--spot")
DESCRIBE = (*QUEUED, "describe", "a", *PLACE, "--format=json")
DELETE = (*QUEUED, "delete", "a", *PLACE, "--quiet", "--force")


@pytest.fixture
def machine(gcloud):
    """A machine that is there, of two hosts."""
    assert gcloud(*CREATE)[0] == 0
    assert any(state_of(gcloud) == "ACTIVE" for _ in range(20))


def state_of(gcloud):
    return json.loads(gcloud(*DESCRIBE)[1])["state"]["state"]


def ssh(command, worker="all"):
    return (*NODES, "ssh", "a", *PLACE, f"--worker={worker}", f"--command={command}")


def states(gcloud, count):
    return [state_of(gcloud) for _ in range(count)]


def test_a_request_goes_through_the_states_of_a_queue(gcloud, fake_cloud):
    fake_cloud.plan(polls={"WAITING_FOR_RESOURCES": 2, "PROVISIONING": 0})
    assert gcloud(*CREATE)[0] == 0
    waiting = "WAITING_FOR_RESOURCES"
    assert states(gcloud, 5) == ["ACCEPTED", waiting, waiting, "ACTIVE", "ACTIVE"]
    found = json.loads(gcloud(*DESCRIBE)[1])
    assert found["name"] == "projects/p/locations/z/queuedResources/a" and found["spot"] == {}
    assert [spec["nodeId"] for spec in found["tpu"]["nodeSpec"]] == ["a"]
    (node,) = json.loads(gcloud(*NODES, "list", *PLACE, "--format=json")[1])
    assert (node["name"], node["state"], len(node["networkEndpoints"])) == (
        "projects/p/locations/z/nodes/a",
        "READY",
        2,
    )


def test_slices_are_nodes_of_one_request(gcloud, fake_cloud):
    fake_cloud.plan(polls=dict.fromkeys(store.POLLS, 0))
    words = [word for word in CREATE if not word.startswith("--node-id")]
    assert gcloud(*words, "--node-count=2", "--node-prefix=n")[0] == 0
    assert state_of(gcloud) == "ACTIVE"
    nodes = json.loads(gcloud(*NODES, "list", *PLACE, "--format=json")[1])
    assert [node["name"].rpartition("/")[2] for node in nodes] == ["n-0", "n-1"]
    words = (*NODES, "ssh", "n-1", *PLACE, "--worker=1", "--command=echo $MEGASCALE_SLICE_ID $JAX_PROCESS_ID")
    assert gcloud(*words)[:2] == (0, "1 3\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*CREATE, "--preemptible"), "unrecognized arguments: --preemptible"),
        ((*CREATE, "--best-effort"), "unrecognized arguments: --best-effort"),
        ((*CREATE, "--spot=yes"), "unrecognized arguments: --spot=yes"),
        ((*CREATE, "--node-count=2"), "Exactly one of (--node-id | --node-count)"),
        (CREATE[:6], "Exactly one of (--runtime-version)"),
        ((*QUEUED, "describe", *PLACE), "Must be specified"),
        ((*QUEUED, "describe", "a", "b", *PLACE), "unrecognized arguments: a b"),
        ((*QUEUED, "delete", "a", *PLACE), "prompt could not be answered"),
        ((*QUEUED, "wait", "a", *PLACE), "Invalid choice: 'wait'"),
        ((*NODES, "ssh", "a", *PLACE, "--worker=all", "--batch-size=2", "--command=true"), "--batch-size"),
        ((*NODES, "ssh", "a", *PLACE, "--tunnel-through-iap"), "--tunnel-through-iap"),
        ((*QUEUED, "describe", "a", "--zone=z"), "--project"),
        ((*QUEUED, "describe", "a", "--zone", "--project=p"), "--zone: expected one argument"),
    ],
)
def test_words_that_are_not_documented_are_refused(gcloud, words, said):
    code, out, err = gcloud(*words)
    assert (code, out) == (2, "") and said in err and err.startswith("ERROR: (gcloud.")


FULL = dict(network="n", subnetwork="s", service_account="x@y", labels=("a=b",), tags=("t",), internal_ips=True)


@pytest.mark.parametrize("others", [{}, {"slices": 2, "capacity": "on demand"}, {"capacity": "reserved", **FULL}])
def test_all_that_the_launcher_says_to_gcloud_is_documented(others, tmp_path):
    s = Settings(name="a", project="p", zones=("z",), type="v5litepod-16", ssh_flags=("--internal-ip",), **others)
    script = (ROOT / "tpu/worker.sh").read_text()
    by_worker = re.findall(r"gcloud (storage [a-z]+ [-a-z ]+) ", script)
    for words in (
        commands.create(s, "z"),
        commands.describe(s, "z"),
        commands.list_queued(s, "z"),
        commands.list_nodes(s, "z"),
        commands.delete(s, "z"),
        commands.delete_node(s, "z", "a"),
        commands.ssh(s, "z", "true"),
        commands.ssh(s, "z", "", worker=0),
        commands.scp(s, "z", [tmp_path], "name"),
        commands.storage("ls", "gs://b/a/logs/"),
        commands.storage("cp", "--recursive", "gs://b/a/logs/attempt-1", "folder"),
        *(("gcloud", *found.split(), "file", "gs://b/file") for found in by_worker),
    ):
        assert documented.parse(list(words[1:])).name in documented.FORMS
    assert by_worker


def test_flags_that_take_a_value_take_it_either_way(fake_cloud):
    command = documented.parse([*QUEUED, "describe", "a", "--zone", "z", "--project=p"])
    assert command.flags == {"--zone": "z", "--project": "p"} and command.words == ("a",)


def test_a_name_is_there_once_and_goes_when_it_is_deleted(gcloud, machine):
    code, _, err = gcloud(*CREATE)
    assert code == 1 and "ALREADY_EXISTS" in err
    code, _, err = gcloud(*[word for word in DELETE if word != "--force"])
    assert code == 1 and "FAILED_PRECONDITION" in err
    assert gcloud(*DELETE)[0] == 0
    for words in (DESCRIBE, DELETE, ssh("true")):
        code, _, err = gcloud(*words)
        assert code == 1 and "NOT_FOUND" in err
    assert json.loads(gcloud(*QUEUED, "list", *PLACE, "--format=json")[1]) == []


def test_deleting_may_be_left_to_the_service(gcloud, machine):
    assert gcloud(*DELETE, "--async")[0] == 0
    assert state_of(gcloud) == "DELETING"
    assert gcloud(*DESCRIBE)[0] == 1


def test_a_zone_says_no_as_often_as_it_is_told_to(gcloud, fake_cloud):
    fake_cloud.plan({"do": "say", "saying": "capacity", "verb": "queued-resources create", "zone": "z", "times": 2})
    for _ in range(2):
        code, _, err = gcloud(*CREATE)
        assert code == 1 and '"code": 8' in err and 'no more capacity in the zone \\"z\\"' in err
    assert gcloud(*CREATE)[0] == 0


def test_a_command_that_half_works_has_done_what_it_says_it_has_not(gcloud, fake_cloud):
    fake_cloud.plan({"do": "say", "saying": "internal", "verb": "queued-resources create", "after": True})
    assert gcloud(*CREATE)[0] == 1
    assert fake_cloud.resources() == {"z/a": "ACCEPTED"}


@pytest.mark.parametrize("kind", sayings.SAYINGS)
def test_sayings_name_the_command_that_says_them(kind):
    fields = dict.fromkeys(("command", "project", "zone", "name", "number", "kind", "type", "state"), "x")
    assert "ERROR: (x)" in sayings.said(kind, **fields)


@pytest.mark.parametrize("state", ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
def test_a_machine_may_be_taken_in_each_state(gcloud, fake_cloud, state):
    fake_cloud.plan({"do": "preempt", "state": state})
    assert gcloud(*CREATE)[0] == 0
    for _ in range(10):
        seen = state_of(gcloud)
    assert seen == "SUSPENDED" and fake_cloud.fired() == 1
    assert gcloud(*CREATE)[0] == 1, "the name is free when it is deleted, not before"
    assert gcloud(*DELETE)[0] == gcloud(*CREATE)[0] == 0


def test_a_node_is_gone_before_its_request_says_so(gcloud, machine, fake_cloud):
    fake_cloud.plan({"do": "preempt", "verb": "tpu-vm ssh", "late": 1})
    code, _, err = gcloud(*ssh("true"))
    assert code == 1 and 'terminal state "PREEMPTED"' in err
    assert states(gcloud, 3) == ["ACTIVE", "SUSPENDING", "SUSPENDED"]


def test_a_request_may_fail_in_the_queue(gcloud, fake_cloud):
    fake_cloud.plan({"do": "fail", "saying": "capacity", "state": "WAITING_FOR_RESOURCES"})
    assert gcloud(*CREATE)[0] == 0
    assert states(gcloud, 3)[-1] == "FAILED"
    assert json.loads(gcloud(*DESCRIBE)[1])["state"]["failedData"]["error"]["code"] == 8


def test_a_command_runs_on_all_workers_and_fails_where_one_does(gcloud, machine):
    code, out, err = gcloud(*ssh("echo from $TPU_WORKER_ID; exit $((TPU_WORKER_ID * 3))"))
    assert sorted(out.split()) == ["0", "1", "from", "from"] and code == 3
    assert "##### Command execution on worker 1 failed with exit status 3. Continuing." in err
    assert gcloud(*ssh("echo $HOME", worker=1))[1].endswith("/0-1\n")
    code, _, err = gcloud(*ssh("true", worker=2))
    assert code == 2 and "worker index 2 is larger" in err


def test_a_host_that_ssh_does_not_reach_says_nothing_and_the_others_do(gcloud, machine, fake_cloud):
    fake_cloud.plan({"do": "mute", "worker": 0, "verb": "tpu-vm ssh", "text": "echo", "nth": 2, "times": 2})
    answers = [gcloud(*ssh("echo $TPU_WORKER_ID")) for _ in range(4)]
    assert [(code, sorted(out.split())) for code, out, _ in answers] == [
        (0, ["0", "1"]), (255, ["1"]), (255, ["1"]), (0, ["0", "1"]),
    ]  # fmt: skip
    assert "Connection timed out" in answers[1][2]


def test_files_are_copied_to_all_homes(gcloud, machine, fake_cloud, tmp_path):
    (tmp_path / "file").write_text("text")
    scp = (*NODES, "scp", str(tmp_path / "file"))
    assert gcloud(*scp, "a:name", *PLACE, "--worker=all")[0] == 0
    assert gcloud(*ssh("echo $(cat name)"))[1] == "text\ntext\n"
    code, _, err = gcloud(*scp, "a:folder/", *PLACE, "--worker=all")
    assert code == 1 and "No such file" in err
    fake_cloud.plan({"do": "mute", "worker": 1, "verb": "tpu-vm scp"})
    assert gcloud(*scp, "a:", *PLACE, "--worker=all")[0] == 255
    assert gcloud(*ssh("echo $(cat file)"))[1].split() == ["text"]


def living(cloud):
    uid = next(iter(cloud.state()["resources"].values()))["uid"]
    return {worker: len(hosts.processes(hosts.HOST, f"{uid}/0/{worker}")) for worker in (0, 1)}


SLEEPER = "exec -a --workdir=x sleep 1000 >/dev/null 2>&1 & disown"


def asleep(gcloud, cloud):
    """Start a process on each host. For a moment, while it becomes another program, it has no environment."""
    assert gcloud(*ssh(f"({SLEEPER})"))[0] == 0
    assert harness.wait_for(lambda: living(cloud) == {0: 1, 1: 1}, 60)


def test_processes_outlive_ssh_and_die_with_their_host(gcloud, machine, fake_cloud):
    asleep(gcloud, fake_cloud)
    fake_cloud.plan({"do": "kill", "host": 1, "verb": "queued-resources describe"})
    assert state_of(gcloud) == "ACTIVE" and living(fake_cloud) == {0: 1, 1: 0}
    fake_cloud.plan({"do": "preempt", "verb": "queued-resources describe"})
    assert state_of(gcloud) == "SUSPENDING" and living(fake_cloud) == {0: 0, 1: 0}
    assert fake_cloud.processes() == {}


@pytest.mark.parametrize("flags", [(), ("--async",)])
def test_processes_die_with_their_machine(gcloud, machine, fake_cloud, flags):
    asleep(gcloud, fake_cloud)
    assert gcloud(*DELETE, *flags)[0] == 0
    assert fake_cloud.processes() == {}


def test_a_notice_comes_before_the_end(gcloud, machine, fake_cloud, tmp_path):
    said = tmp_path / "said"
    script = f'trap "echo $TPU_WORKER_ID >>{said}; exit" TERM; echo up >>{said}; while :; do sleep 0.01; done'
    assert gcloud(*ssh(f"setsid sh -c '{script}' >/dev/null 2>&1 &"))[0] == 0
    assert harness.wait_for(lambda: said.exists() and len(said.read_text().split()) == 2, 60)
    fake_cloud.plan({"do": "preempt", "verb": "queued-resources describe", "notice": 5})
    assert state_of(gcloud) == "SUSPENDING"
    assert sorted(said.read_text().split()) == ["0", "1", "up", "up"] and fake_cloud.processes() == {}


def test_a_step_of_the_run_is_seen_at_once(gcloud, machine, fake_cloud, tmp_path):
    fake_cloud.plan({"do": "kill", "host": 0, "step": 4}, {"do": "preempt", "step": 8}, workdir=str(tmp_path / "run"))
    asleep(gcloud, fake_cloud)
    for step, wanted in ((3, {0: 1, 1: 1}), (5, {0: 0, 1: 1}), (8, {0: 0, 1: 0})):
        manifest = tmp_path / f"run/checkpoints/{step}/MANIFEST.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        deadline = time.monotonic() + 60
        while living(fake_cloud) != wanted or (step == 8 and fake_cloud.processes()):
            assert time.monotonic() < deadline, (step, living(fake_cloud), fake_cloud.processes())
            time.sleep(0.01)
    assert state_of(gcloud) == "SUSPENDING" and fake_cloud.fired() == 2


def test_a_command_is_on_path_and_recorded(cloud):
    done = cloud.gcloud(*DESCRIBE)
    assert done.returncode == 1 and "NOT_FOUND" in done.stderr
    (row,) = cloud.commands()
    assert row["words"] == ["gcloud", *DESCRIBE] and row["code"] == 1 and cloud.ended("describe a") == [1]


def test_nothing_is_left_when_a_test_ends(cloud):
    with subprocess.Popen(["sleep", "1000"], env=cloud.env, start_new_session=True):
        assert harness.wait_for(lambda: len(cloud.processes()) == 1, 60)
        cloud.close()
    assert cloud.processes() == {}


def test_machines_of_two_clouds_are_not_mistaken(gcloud, machine, fake_cloud, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    other = Cloud.at(tmp_path / "other")
    asleep(gcloud, fake_cloud)
    monkeypatch.setenv("FAKE_CLOUD", str(other.folder))
    assert gcloud(*CREATE)[0] == gcloud(*DELETE)[0] == 0
    assert living(fake_cloud) == {0: 1, 1: 1} and other.processes() == {}


def test_what_can_happen_is_known(fake_cloud):
    with pytest.raises(ValueError, match="'explode'"):
        faults.do({"fired": {}}, {"do": "explode"}, {})
    assert lifecycle.shape("v5p-16") == (2, 4) and lifecycle.shape("v5litepod-8") == (1, 8)
    assert lifecycle.shape("v9-8") is None
