"""What is done to machines and workers: twice is as good as once, and what is not so good is said."""

from pathlib import Path

import pytest
from answers import Google, request
from fake import sayings

from tpu import acts, gcloud, processes, remote
from tpu.acts import Resource
from tpu.gcloud import Cloud, CloudError
from tpu.goodcase import GoodCase
from tpu.processes import Done
from tpu.settings import Settings, UserError
from tpu.shipping import Parcel

A, B = "us-west4-a", "us-west1-c"
S = Settings("a", "p", (A, B), "v5litepod-16", bucket="gs://b")
TWO = Settings("a", "p", (A, B), "v5litepod-16", slices=2, bucket="gs://b")
PARCEL = Parcel(Path("x.tar"), "0123456789ab", "r", "", (), "d")


def states(what="running", attempt=1, code="-", sha="0123456789ab", numbers=range(4)):
    return Done(0, "".join(f"worker {i}: state {what} attempt={attempt} code={code} sha={sha}\n" for i in numbers), "")


@pytest.fixture
def google(monkeypatch):
    made = Google(A, B)
    monkeypatch.setattr(processes, "run", made)
    return made


@pytest.fixture
def cloud(google):
    return Cloud(echo=[].append, sleep=google.slept.append)


def test_where_nothing_is_there_is_nothing(cloud):
    assert acts.resource(cloud, S, A) == Resource()
    assert acts.find(cloud, S) == []


def test_a_request_is_found_in_any_of_the_zones(google, cloud):
    google.there[B] = request("WAITING_FOR_RESOURCES")
    assert acts.find(cloud, S) == [(B, Resource("WAITING_FOR_RESOURCES", type="v5litepod-16", slices=1))]


def test_why_a_request_failed_is_told(google, cloud):
    google.there[A] = request("FAILED", failedData={"error": {"code": 8, "message": "no more capacity"}})
    assert acts.resource(cloud, S, A).why == "no more capacity"


@pytest.mark.parametrize(
    ("nodes", "state", "why"),
    [
        ({"a": {"state": "READY"}}, "ACTIVE", ""),
        ({"a": {"state": "PREEMPTED"}}, "SUSPENDED", "TPU VM a is PREEMPTED"),
        ({"a": {"state": "TERMINATED"}}, "SUSPENDED", "TPU VM a is TERMINATED"),
        ({}, "SUSPENDED", "TPU VM a is gone"),
        ({"a": {"state": "CREATING"}}, "PROVISIONING", "TPU VM a is CREATING"),
        ({"a": {"state": "REPAIRING"}}, "PROVISIONING", "TPU VM a is REPAIRING"),
    ],
)
def test_a_request_that_says_active_is_as_good_as_its_machines(google, cloud, nodes, state, why):
    google.there[A], google.nodes[A] = request("ACTIVE"), nodes
    found = acts.resource(cloud, S, A)
    assert (found.state, found.why, found.nodes) == (state, why, tuple(nodes))


def test_one_of_two_slices_that_is_lost_is_the_machine_lost(google, cloud):
    google.there[A] = request("ACTIVE")
    google.nodes[A] = {"a-0": {"state": "READY"}, "a-1": {"state": "PREEMPTED"}}
    found = acts.resource(cloud, TWO, A)
    assert (found.state, found.why) == ("SUSPENDED", "TPU VM a-1 is PREEMPTED")


def test_what_another_run_holds_is_not_ours_whatever_its_name(google, cloud):
    google.nodes[A] = {
        "a-1": {"state": "READY", "queuedResource": "projects/1/locations/z/queuedResources/a-1"},
        "ab": {"state": "READY"},
    }
    assert acts.left(cloud, TWO) == []
    acts.delete(cloud, TWO, A)
    assert ("delete", A) not in google.did


def test_a_machine_of_this_name_and_another_type_is_refused(google, cloud):
    google.there[A] = request("ACTIVE", type="v4-8")
    with pytest.raises(UserError, match=r"taken in us-west4-a: a v4-8 .*, not the v5litepod-16.*down --name=a"):
        acts.same(S, A, acts.resource(cloud, S, A))
    google.there[A] = request("ACTIVE", slices=2)
    with pytest.raises(UserError, match=r"a v5litepod-16 \(2 slices\), not the v5litepod-16 \(1 slice\) asked for"):
        acts.same(S, A, acts.resource(cloud, S, A))
    acts.same(TWO, A, acts.resource(cloud, TWO, A))
    acts.same(S, A, Resource("ACTIVE"))  # where it is not told


def test_a_create_of_what_is_there_takes_it(google, cloud):
    google.there[A] = request("ACCEPTED")
    google.say["queued-resources create"] = ["ERROR: ALREADY_EXISTS: it already exists"]
    acts.create(cloud, S, A)
    google.there[A] = request("ACTIVE", type="v4-8")
    google.say["queued-resources create"] = ["ERROR: ALREADY_EXISTS: it already exists"]
    with pytest.raises(UserError, match="taken"):
        acts.create(cloud, S, A)


def test_a_create_that_says_it_failed_and_did_not_is_taken(google, cloud):
    google.there[A] = request("WAITING_FOR_RESOURCES")
    google.say["queued-resources create"] = ["ERROR: something odd"]
    acts.create(cloud, S, A)


@pytest.mark.parametrize("left", [None, request("FAILED")])
def test_a_create_without_room_says_so_whether_the_request_is_left_or_not(google, cloud, left):
    google.there[A] = left
    google.say["queued-resources create"] = ["ERROR: There is no more capacity in the zone"]
    with pytest.raises(CloudError) as error:
        acts.create(cloud, S, A)
    assert error.value.kind == "capacity"


def test_a_type_that_a_zone_has_not_is_answered_with_zones_that_have_it(google, cloud):
    said = sayings.said("unknown type", command="x", type="v5litepod-16", zone="us-east1-d")
    google.there["us-east1-d"], google.say["queued-resources create"] = None, [said]
    with pytest.raises(CloudError, match="v5e is offered in us-central1-a") as error:
        acts.create(cloud, S, "us-east1-d")
    assert error.value.kind == "usage"


def test_deleting_what_is_not_there_does_nothing(google, cloud):
    acts.delete(cloud, S, A)
    assert google.did == [("describe", A), ("list", A)]


def test_deleting_waits_till_it_is_gone_and_asks_again(google, cloud):
    google.there[A], google.nodes[A] = request("PROVISIONING"), {}
    google.say["queued-resources delete"] = ["ERROR: FAILED_PRECONDITION: not while it is made"] * 2
    acts.delete(cloud, S, A)
    assert google.there[A] is None
    assert google.did.count(("delete", A)) == 3
    assert google.slept == [acts.POLL] * 2


def test_a_machine_that_no_request_holds_is_deleted_too(google, cloud):
    google.nodes[A] = {"a": {"state": "READY"}}
    assert acts.left(cloud, S) == [f"TPU VM a in {A}: READY"]
    acts.delete(cloud, S, A)
    assert acts.left(cloud, S) == []


def test_what_stays_is_said_after_a_while(google, cloud):
    google.there[A] = request("ACTIVE")
    google.say["queued-resources delete"] = ["ERROR: FAILED_PRECONDITION: never"] * 1000
    with pytest.raises(CloudError, match=r"still there after 20 minutes.*never"):
        acts.delete(cloud, S, A)
    google.say["queued-resources delete"] = ["ERROR: PERMISSION_DENIED"]
    with pytest.raises(CloudError, match="PERMISSION_DENIED"):
        acts.delete(cloud, S, A)


def test_all_that_is_left_is_named(google, cloud):
    google.there[B], google.nodes[A] = request("SUSPENDED"), {"a": {"state": "PREEMPTED"}}
    assert acts.left(cloud, S) == [f"TPU VM a in {A}: PREEMPTED", f"queued resource a in {B}: SUSPENDED"]


def test_who_does_not_answer_is_silent(google, cloud):
    google.workers["a"] = states(numbers=[0, 1, 3])
    assert [one.what for one in acts.workers(cloud, S, A)] == ["running", "running", "silent", "running"]
    google.workers.clear()
    assert {one.what for one in acts.workers(cloud, S, A)} == {"silent"}


def test_why_a_worker_is_silent_is_said_once(google):
    said = []
    cloud = Cloud(echo=said.append)
    why = sayings.SILENT.format(address="10.0.0.2", verb="SSH")
    google.workers["a"] = Done(255, states(numbers=[0, 1, 3]).out, why)
    for _ in range(3):
        acts.workers(cloud, S, A)
    (line,) = [line for line in said if line.startswith("#")]
    assert "port 22: Connection timed out" in line and "firewall" in line and "ssh-add" not in line


def test_each_slice_is_asked_with_its_own_number(google, cloud):
    google.workers = {"a-0": states(), "a-1": states("ended", 1, "0", numbers=range(4, 8))}
    found = acts.workers(cloud, TWO, A)
    assert [one.what for one in found] == ["running"] * 4 + ["ended"] * 4
    assert google.did == [("ssh", A)] * 2


def test_a_parcel_that_all_have_is_not_copied_again(google, cloud):
    google.workers["a"] = states()
    acts.ship(cloud, S, A, PARCEL)
    assert ("scp", A) not in google.did
    google.workers["a"] = states(numbers=[0, 1, 2])
    acts.ship(cloud, S, A, PARCEL)
    assert ("scp", A) in google.did
    google.say["tpu-vm scp"] = ["ERROR: exited with return code [255]."]
    with pytest.raises(CloudError, match="scp"):
        acts.ship(cloud, S, A, PARCEL)


def test_an_act_on_the_workers_returns_what_they_say_then(google, cloud):
    google.workers["a"] = states("installed", 0)
    for found in (acts.install(cloud, S, A, PARCEL), acts.check(cloud, S, A), acts.start(cloud, S, A, 1)):
        assert {one.what for one in found} == {"installed"}


def test_what_workers_say_is_wrong_is_the_error(google, cloud):
    google.workers["a"] = Done(1, "worker 0: problem: no room\n" + states(numbers=[1, 2, 3]).out, "ERROR: status 1")
    with pytest.raises(CloudError, match=r"`install` on a failed: worker 0: no room\.") as error:
        acts.install(cloud, S, A, PARCEL)
    assert error.value.kind == "worker"
    google.workers["a"] = Done(1, states().out, "##### Command execution on worker 3 failed with exit status 1.")
    with pytest.raises(CloudError, match="worker 3 failed with exit status 1"):
        acts.check(cloud, S, A)
    google.workers["a"] = states(numbers=[0, 1, 3])
    with pytest.raises(CloudError, match=r"no answer from worker 2.*ssh --name=a --worker=2"):
        acts.start(cloud, S, A, 1)
    google.workers["a"] = Done(1, "", 'SSH Key is not present in the SSH agent. Please run "ssh-add /k"')
    with pytest.raises(CloudError, match=r"no answer from worker 0, 1, 2, 3.*eval"):
        acts.check(cloud, S, A)


def test_stopping_is_no_error_where_nobody_answers(google, cloud):
    assert {one.what for one in acts.stop(cloud, S, A, 10)} == {"silent"}


def test_a_parcel_goes_where_the_workers_look_for_it(google, cloud, monkeypatch):
    seen = []
    answer = google.answer
    monkeypatch.setattr(google, "answer", lambda words: seen.append(words) or answer(words))
    acts.ship(cloud, TWO, A, PARCEL)
    copies = [words for words in seen if words[4] == "scp"]
    assert copies == [
        gcloud.scp(TWO, A, [PARCEL.file], remote.landing(TWO, PARCEL), node=node) for node in ("a-0", "a-1")
    ]


@pytest.mark.parametrize("s", [S, TWO])
def test_a_dry_run_takes_a_run_through_its_whole_good_case(s):
    cloud = Cloud(True, [].append, good=GoodCase(s, there=False))
    hosts = 4 * s.slices

    def said():
        return {(one.what, one.attempt, one.code, one.sha) for one in acts.workers(cloud, s, A)}

    assert acts.find(cloud, s) == [] == acts.left(cloud, s)
    acts.create(cloud, s, A)
    assert acts.find(cloud, s) == [(A, Resource("ACTIVE", gcloud.node_names(s), "", s.type, s.slices))]
    assert len(acts.left(cloud, s)) == 1 + s.slices
    assert said() == {("absent", 0, None, "")}
    acts.ship(cloud, s, A, PARCEL)
    assert len(acts.install(cloud, s, A, PARCEL)) == hosts
    acts.check(cloud, s, A)
    assert said() == {("installed", 0, None, PARCEL.sha)}
    acts.start(cloud, s, A, 3)
    assert said() == {("running", 3, None, PARCEL.sha)}
    assert said() == {("ended", 3, 0, PARCEL.sha)}
    acts.delete(cloud, s, A)
    assert acts.find(cloud, s) == [] == acts.left(cloud, s)
    there = Cloud(True, [].append, good=GoodCase(s, there=True, trains=True))
    assert [zone for zone, _ in acts.find(there, s)] == [A]
    assert {one.what for one in acts.stop(there, s, A, 1)} == {"ended"}
