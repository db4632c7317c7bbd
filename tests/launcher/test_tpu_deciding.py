"""What `watch` does next, for every state of the machine, of its workers and of what is remembered."""

import itertools
from dataclasses import replace

import pytest
from modelled import PARCEL, kept, settings

from tpu import deciding, noting, state
from tpu.acts import Resource
from tpu.cost import Life
from tpu.deciding import decide
from tpu.meaning import CloudError
from tpu.noting import Action, Seen
from tpu.remote import Worker
from tpu.state import Held


@pytest.fixture(autouse=True)
def priced(monkeypatch):
    """Without a file to read each time."""
    monkeypatch.setattr("tpu.machines.price", lambda machine, capacity, prices: 0.24)


NOW = 1.7e9
SHA = PARCEL.sha
STATES = (
    "ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", "FAILED",
    "DELETING", "SOMETHING_NEW",
)  # fmt: skip


def held(**changes):
    return Held(**{"zone": "z1-a", "asked": NOW - 100, "met": True, **changes})


def worker(number, text):
    """ "running 2", "ended 2 1", "installed", "absent", "silent", "dead 2"; "... old" has another code."""
    words = text.split()
    old = words[-1] == "old"
    numbers = [int(word) for word in words[1:] if word != "old"]
    sha = "" if words[0] in ("absent", "silent") else "0ld" if old else SHA
    return Worker(number, words[0], *(numbers[:1] or [0]), code=numbers[1] if len(numbers) > 1 else None, sha=sha)


def seen(state=None, *workers, step=0, zone="z1-a", first=False):
    found = {zone: Resource(state)} if state else {}
    return Seen(found, tuple(worker(i, text) for i, text in enumerate(workers)), step, first)


def life(**changes):
    return Life(**{"zone": "z1-a", "begun": NOW - 100, "ended": None, "chips": 16, "usd_per_hour": 3.84, **changes})


CHECKED = held(checked=True)
RAN = held(checked=True, attempt=2)

# (what is remembered, what is seen) -> (act, phase, words of the reason)
HAS = kept(held=held())
TRAINS = kept(held=RAN, attempt=2)
TABLE = {
    # No machine.
    "nothing there": (kept(), seen(), "create", "waiting", "asking in z1-a"),
    "second zone's turn": (kept(zone="z2-b"), seen(), "create", "waiting", "asking in z2-b"),
    "a pause": (kept(pause=NOW + 60), seen(), "wait", "waiting", "after a pause"),
    "a pause of a wrong clock": (kept(pause=NOW + 1e6), seen(), "create", "waiting", ""),
    "all zones refused": (kept(refused={"z1-a": "quota", "z2-b": "quota"}), seen(), "prove", "stopping", "z1-a: quota"),
    "one zone refused": (kept(refused={"z1-a": "quota"}), seen(), "create", "waiting", "asking in z2-b"),
    "create killed": (kept(held=held(met=False)), seen(), "create", "waiting", ""),
    "not seen once": (HAS, seen(), "wait", "waiting", "no machine is to be seen"),
    "not seen thrice": (kept(held=held(absent=2)), seen(), "prove", "stopping", "someone else deleted"),
    "gone when started again": (HAS, seen(first=True), "create", "waiting", ""),
    "deleted by us": (kept(held=held(deleting=True)), seen(), "create", "waiting", ""),
    # A machine of another's.
    "adopted": (kept(), seen("WAITING_FOR_RESOURCES", zone="z2-b"), "wait", "waiting", "in z2-b"),
    "adopted as it goes": (kept(), seen("DELETING"), "wait", "waiting", "is being deleted"),
    # On its way.
    "accepted": (HAS, seen("ACCEPTED"), "wait", "waiting", "ACCEPTED"),
    "waits": (HAS, seen("WAITING_FOR_RESOURCES"), "wait", "waiting", ""),
    "waits too long": (
        kept(held=held(asked=NOW - 1801)), seen("WAITING_FOR_RESOURCES"), "delete", "waiting", "no room"
    ),
    "waits less long": (kept(held=held(asked=NOW - 1799)), seen("WAITING_FOR_RESOURCES"), "wait", "waiting", ""),
    "waits long in the second round": (
        kept(held=held(asked=NOW - 1801), rounds=1), seen("WAITING_FOR_RESOURCES"), "wait", "waiting", ""
    ),
    "comes": (HAS, seen("PROVISIONING"), "wait", "provisioning", ""),
    "is made": (HAS, seen("CREATING"), "wait", "provisioning", ""),
    "never comes": (
        kept(held=held(), phase="provisioning", since=NOW - 3601), seen("PROVISIONING"), "delete", "waiting", "given up"
    ),
    "a state that is new": (HAS, seen("SOMETHING_NEW"), "wait", "provisioning", "SOMETHING_NEW"),
    "failed": (HAS, seen("FAILED"), "delete", "waiting", "failed"),
    # Taken back.
    "is taken": (kept(held=RAN), seen("SUSPENDING"), "wait", "preempted", "taken back"),
    "taken": (kept(held=RAN), seen("SUSPENDED"), "delete", "preempted", "taken back"),
    "deleted by someone": (kept(held=RAN), seen("DELETING"), "wait", "waiting", "by someone else"),
    "to be deleted": (kept(held=held(deleting=True)), seen("ACTIVE", "absent"), "delete", "waiting", ""),
    # There, nothing runs.
    "bare": (HAS, seen("ACTIVE", "absent", "absent"), "install", "installing", "workers 0, 1"),
    "half installed": (HAS, seen("ACTIVE", "installed", "absent"), "install", "installing", "worker 1"),
    "other code": (HAS, seen("ACTIVE", "installed old", "installed"), "install", "installing", "worker 0"),
    "installed": (HAS, seen("ACTIVE", "installed", "installed"), "check", "installing", ""),
    "checked": (kept(held=CHECKED), seen("ACTIVE", "installed", "installed"), "start", "running", "attempt 1"),
    "no answer yet": (HAS, seen("ACTIVE", "silent", "silent"), "wait", "installing", "any worker"),
    "no workers known": (HAS, seen("ACTIVE"), "wait", "installing", "any worker"),
    "no answer for long": (
        kept(held=held(silent=NOW - 601)), seen("ACTIVE", "absent", "silent"), "delete", "waiting", "worker 1"
    ),
    "no answer, third machine": (
        kept(held=held(silent=NOW - 601), bad=2), seen("ACTIVE", "absent", "silent"), "stop", "stopping", "3 machines"
    ),
    "idle": (
        kept(held=held(idle=NOW - 1801)), seen("ACTIVE", "absent", "absent"), "delete", "stopping", "idle_minutes"
    ),
    # There, and trains.
    "runs": (TRAINS, seen("ACTIVE", "running 2", "running 2"), "wait", "running", "attempt 2"),
    "runs, of another's": (kept(), seen("ACTIVE", "running 7", "running 7"), "wait", "running", "attempt 7"),
    "runs other code": (kept(held=RAN), seen("ACTIVE", "running 2 old", "running 2 old"), "wait", "running", ""),
    "runs other code, update": (
        kept(held=RAN, update=True), seen("ACTIVE", "running 2 old", "running 2 old"), "stop", "running", "new code"
    ),
    "one does not answer": (TRAINS, seen("ACTIVE", "running 2", "silent"), "wait", "running", "1"),
    "one was not started": (
        TRAINS, seen("ACTIVE", "running 2", "ended 1 1"), "start", "running", "not started on worker 1"
    ),
    "one is bare": (TRAINS, seen("ACTIVE", "running 2", "absent"), "stop", "running", "is absent"),
    "one can't be started": (
        kept(held=replace(RAN, split=NOW - 601), attempt=2), seen("ACTIVE", "running 2", "installed"), "stop",
        "running", ""
    ),
    "two attempts": (TRAINS, seen("ACTIVE", "running 2", "running 1"), "stop", "running", "the same"),
    "two codes": (TRAINS, seen("ACTIVE", "running 2", "running 2 old"), "stop", "running", "the same"),
    "one died": (TRAINS, seen("ACTIVE", "running 2", "dead 2"), "stop", "running", "worker 1 is dead"),
    "one failed": (TRAINS, seen("ACTIVE", "ended 2 1", "running 2"), "stop", "running", "worker 0 ended with"),
    "one is done": (TRAINS, seen("ACTIVE", "ended 2 0", "running 2"), "wait", "running", "not yet"),
    "one is done for long": (
        kept(held=replace(RAN, split=NOW - 601), attempt=2), seen("ACTIVE", "ended 2 0", "running 2"), "stop",
        "running", ""
    ),
    "one saved": (TRAINS, seen("ACTIVE", "ended 2 143", "running 2"), "wait", "running", "not yet"),
    # It has ended.
    "failed everywhere": (TRAINS, seen("ACTIVE", "ended 2 1", "ended 2 75"), "start", "running", "attempt 3"),
    "one is done, one failed": (TRAINS, seen("ACTIVE", "ended 2 0", "ended 2 1"), "start", "running", "attempt 3"),
    "killed before the next start": (
        kept(held=replace(RAN, attempt=3), attempt=3), seen("ACTIVE", "ended 2 143", "ended 2 143"), "start", "running",
        "attempt 3 again",
    ),
    "died everywhere": (TRAINS, seen("ACTIVE", "dead 2", "dead 2"), "start", "running", "attempt 3"),
    "start came to nothing": (TRAINS, seen("ACTIVE", "ended 1 1", "ended 1 1"), "start", "running", ""),
    "a signal": (TRAINS, seen("ACTIVE", "ended 2 143", "ended 2 143"), "wait", "running", "a signal"),
    "a signal long ago": (
        kept(held=replace(RAN, idle=NOW - 301), attempt=2), seen("ACTIVE", "ended 2 143", "ended 2 143"), "start",
        "running", "attempt 3"
    ),
    "no progress": (
        kept(held=RAN, attempt=2, fruitless=2), seen("ACTIVE", "ended 2 1", "ended 2 1"), "fetch", "stopping",
        "no newer checkpoint than step 0; worker 0 ended with exit code 1"
    ),
    "progress": (
        kept(held=RAN, attempt=2, fruitless=2), seen("ACTIVE", "ended 2 1", "ended 2 1", step=5), "start", "running", ""
    ),
    "bad input": (TRAINS, seen("ACTIVE", "ended 2 2", "running 2"), "stop", "stopping", "exit code 2"),
    "bad input of old code": (TRAINS, seen("ACTIVE", "ended 2 2 old", "ended 2 2 old"), "install", "installing", ""),
    "done": (TRAINS, seen("ACTIVE", "ended 2 0", "ended 2 0"), "fetch", "stopping", "exit code 0"),
    "done but for one": (TRAINS, seen("ACTIVE", "ended 2 0", "silent"), "wait", "installing", "1"),
    "done, update": (
        kept(held=RAN, attempt=2, update=True), seen("ACTIVE", "ended 2 0", "ended 2 0"), "start", "running",
        "attempt 3"
    ),
    # The end.
    "stopped": (
        kept(held=replace(RAN, stopped=True), attempt=2, end="limit"), seen("ACTIVE", "ended 2 143", "ended 2 143"),
        "fetch", "stopping", ""
    ),
    "fetched": (
        kept(held=replace(RAN, stopped=True, fetched=True), attempt=2, end="limit"), seen("ACTIVE", "ended 2 143",
        "ended 2 143"), "delete", "stopping", ""
    ),
    "ends before anything was installed": (
        kept(held=held(), end="limit"), seen("ACTIVE", "absent", "absent"), "delete", "stopping", ""
    ),
    "ends while it waits": (kept(held=held(), end="limit"), seen("ACCEPTED"), "delete", "stopping", ""),
    "ends when it was taken": (kept(held=RAN, end="done"), seen("SUSPENDED"), "delete", "stopping", ""),
    "goes": (kept(held=held(deleting=True), end="done"), seen("DELETING"), "wait", "stopping", ""),
    "gone": (kept(held=held(deleting=True), end="done"), seen(), "prove", "stopping", ""),
    "an unmet machine at the end": (kept(held=held(met=False), end="failed"), seen(), "prove", "stopping", ""),
    "another one at the end": (kept(end="done"), seen("ACTIVE", zone="z2-b"), "delete", "stopping", ""),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE)
def test_what_comes_next(row):
    before, look, do, phase, why = TABLE[row]
    action = decide(look, before, NOW, settings())
    assert (action.do, action.kept.phase) == (do, phase), action.kept.why
    assert why in action.kept.why
    assert action.kept.looked == NOW


WORKERS = (
    "silent", "absent", "installed", "installed old", "running 1", "running 2", "running 2 old", "ended 1 1",
    "ended 2 0", "ended 2 1", "ended 2 2", "ended 2 143", "dead 2", "ended 3 137",
)  # fmt: skip
MEMORIES = {
    "new": kept(),
    "asked": kept(held=held(met=False), attempt=1),
    "held": kept(held=held(), attempt=1),
    "started": kept(held=RAN, attempt=2, mark=3, step=3),
    "fruitless": kept(held=RAN, attempt=2, fruitless=2),
    "silent": kept(held=held(silent=NOW - 601), attempt=2, bad=1),
    "split": kept(held=replace(RAN, split=NOW - 601), attempt=2),
    "update": kept(held=RAN, attempt=2, update=True),
    "deleting": kept(held=held(deleting=True), attempt=2),
    "elsewhere": kept(held=held(zone="z2-b"), attempt=2),
    "done": kept(held=RAN, attempt=2, end="done"),
    "failed": kept(held=replace(RAN, stopped=True), attempt=2, end="failed"),
    "over": kept(held=RAN, attempt=2, lives=(life(begun=NOW - 1e5),)),
    "refused": kept(refused={"z1-a": "no", "z2-b": "no"}),
}


def sound(look, before, action, s):
    """What no act may ever be."""
    found, after = look.found, action.kept
    active = action.zone in found and found[action.zone].state == "ACTIVE"
    if action.do == "create":
        assert not found and not after.end and after.held.zone == action.zone and action.zone in s.zones
        assert any(one.ended is None and one.zone == action.zone for one in after.lives), "costs are not remembered"
    if action.do == "start":
        assert active and not after.end and after.attempt > 0
        assert all(one.sha == SHA and one.what not in ("absent", "silent") for one in look.workers)
        assert after.attempt >= max(one.attempt for one in look.workers)
        assert after.held.attempt == after.attempt
        again = decide(look, after, NOW, s)  # killed before it began: the same start
        assert (again.do, again.kept.attempt) == ("start", after.attempt)
    if action.do in ("install", "check"):
        assert active and all(one.what not in ("running", "silent") for one in look.workers)
    if action.do in ("stop", "fetch"):
        assert active and action.zone == after.held.zone
    if action.do == "stop":
        assert action.seconds > 0
    if action.do == "delete":
        assert action.zone in found and found[action.zone].state != "DELETING"
    if action.do == "prove":
        assert not found and after.end
    if after.end:
        assert after.phase == "stopping" and action.do in ("stop", "fetch", "delete", "prove", "wait")
        assert after.code == {"done": 0, "failed": after.code or 1, "limit": 3}[after.end] or before.end
    again = decide(look, after, NOW, s)
    assert again.do == action.do, "killed after it was written, another act would come"


def every(memory, pairs):
    s, before = settings(max_hours=20.0), MEMORIES[memory]
    for there in (None, *STATES):
        for pair in pairs if there == "ACTIVE" else [()]:
            for step, first in ((0, False), (7, True)):
                look = seen(there, *pair, step=step, first=first)
                action = decide(look, before, NOW, s)
                sound(look, before, action, s)
        assert state.parsed(state.written(action.kept)) == action.kept


PAIRS = list(itertools.combinations_with_replacement(WORKERS, 2))


@pytest.mark.parametrize("memory", MEMORIES)
def test_no_act_is_ever_wrong(memory):
    """Every state of the machine, and a few pairs of the states of workers; others for each memory."""
    every(memory, PAIRS[list(MEMORIES).index(memory) % 5 :: 5])


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_no_act_is_ever_wrong_for_any_three_workers(memory):
    every(memory, itertools.combinations_with_replacement(WORKERS, 3))


def test_of_two_machines_one_is_deleted():
    both = Seen({"z1-a": Resource("ACCEPTED"), "z2-b": Resource("ACTIVE")})
    action = decide(both, kept(held=held(zone="z2-b")), NOW, settings())
    assert (action.do, action.zone) == ("delete", "z1-a")
    action = decide(both, kept(), NOW, settings())  # the one that is furthest is ours
    assert (action.do, action.zone, action.kept.held.zone) == ("delete", "z1-a", "z2-b")
    for end in ("done", "failed", "limit"):
        action = decide(both, kept(end=end), NOW, settings())
        assert (action.do, action.zone) == ("delete", "z2-b")


def test_who_can_save_gets_the_time_to():
    look, update = seen("ACTIVE", "running 2 old", "running 2 old"), kept(held=RAN, update=True)
    assert decide(look, update, NOW, settings()).seconds == deciding.SAVE
    assert decide(seen("ACTIVE", "running 2", "dead 2"), TRAINS, NOW, settings()).seconds == deciding.GROUP
    assert decide(seen("ACTIVE", "running 2"), replace(TRAINS, end="limit"), NOW, settings()).seconds == deciding.SAVE


def test_progress_forgives_the_machines_before():
    memory = replace(TRAINS, bad=2)
    assert decide(seen("ACTIVE", "running 2"), memory, NOW, settings()).kept.bad == 2
    assert decide(seen("ACTIVE", "running 2", step=1), memory, NOW, settings()).kept.bad == 0


def test_where_checkpoints_can_not_be_seen_an_attempt_that_lasts_is_progress():
    look, s = seen("ACTIVE", "ended 2 1", "ended 2 1", step=None), settings()
    for seconds, do in [(3601, "start"), (3599, "fetch")]:
        memory = kept(held=replace(RAN, started=NOW - seconds), attempt=2, fruitless=2)
        assert decide(look, memory, NOW, s).do == do
        assert decide(replace(look, step=0), memory, NOW, s).do == "fetch"


def test_a_refused_request_is_not_made_again_where_waiting_changes_nothing():
    gone = Seen({"z1-a": Resource("FAILED", (), "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.")})
    action = decide(gone, kept(held=held()), NOW, settings())
    assert action.do == "delete" and "Quota" in action.kept.refused["z1-a"] and action.kept.zone == "z2-b"
    action = decide(Seen({"z1-a": Resource("FAILED", (), "no more capacity")}), kept(held=held()), NOW, settings())
    assert not action.kept.refused and action.kept.zone == "z2-b"


@pytest.mark.parametrize("phase", ["waiting", "provisioning", "installing", "running", "preempted"])
@pytest.mark.parametrize("there", [None, *STATES])
def test_limits_hold_in_every_phase(phase, there):
    before = kept(phase=phase, held=held() if there else None, lives=(life(begun=NOW - 7200, ended=NOW),))
    look = seen(there, *(["running 1"] if there == "ACTIVE" else []))
    for s in (settings(max_hours=2.0), settings(max_cost=7.68)):
        action = decide(look, before, NOW, s)
        assert action.kept.end == "limit" and action.kept.code == 3 and "--max_" in action.kept.why
        wanted = {None: "prove", "ACTIVE": "stop", "DELETING": "wait"}
        assert action.do == wanted.get(there, "delete")
    assert not decide(look, before, NOW, settings(max_hours=2.01, max_cost=7.7)).kept.end


def test_what_it_costs_is_never_too_little():
    """Unseen, a machine counts from the last look that did not see it run, to the first that saw it end."""
    s, at = settings(), NOW
    memory = decide(seen(), kept(), at, s).kept
    assert memory.lives == (life(begun=None),)
    for there, begun in [("ACCEPTED", None), ("PROVISIONING", None), ("ACTIVE", NOW + 60), ("ACTIVE", NOW + 60)]:
        at += 30
        memory = decide(seen(there, "absent"), memory, at, s).kept
        assert memory.lives == (life(begun=begun),)
    memory = decide(seen("SUSPENDED"), memory, at + 7200, s).kept
    assert memory.lives == (
        life(begun=NOW + 60, ended=at + 7200, why="suspended, within 2.0 hours that nobody watched"),
    )
    slices = settings(slices=2)  # the other slice may still run
    memory = kept(held=RAN, lives=(life(),), looked=NOW)
    assert decide(seen("SUSPENDED"), memory, NOW + 30, slices).kept.lives == (life(),)


def test_a_clock_that_goes_back_makes_nothing_cheaper_and_waits_for_nothing():
    memory = kept(held=RAN, attempt=2, looked=NOW, lives=(life(),))
    action = decide(seen("ACTIVE", "running 2"), memory, NOW - 1e6, settings())
    assert action.kept.looked == NOW and action.kept.lives == memory.lives
    action = decide(seen("ACTIVE", "silent"), memory, NOW - 1e6, settings())
    assert action.kept.held.silent == NOW


def test_silence_and_idleness_count_only_while_someone_watched():
    memory = kept(held=replace(RAN, silent=NOW - 1e6, idle=NOW - 1e6), attempt=2)
    assert decide(seen("ACTIVE", "silent", "silent", first=True), memory, NOW, settings()).do == "wait"
    assert decide(seen("ACTIVE", "ended 2 1", "ended 2 1", first=True), memory, NOW, settings()).do == "start"


def test_a_worker_that_is_silent_is_left_alone_while_the_run_makes_progress():
    memory, s = kept(held=replace(RAN, silent=NOW - 601), attempt=2, step=3), settings()
    assert decide(seen("ACTIVE", "running 2", "silent", step=3), memory, NOW, s).do == "delete"
    action = decide(seen("ACTIVE", "running 2", "silent", step=4), memory, NOW, s)
    assert action.do == "wait" and action.kept.held.silent == NOW


def acted(do, memory, kind, times=1, s=None):
    for _ in range(times):
        action = Action(do, memory, memory.held.zone)
        memory = noting.failed(action, memory, CloudError(kind, f"{kind}!", "Do this."), NOW, s or settings())
    return memory


@pytest.mark.parametrize(
    "kind, times, zone, refused, end",
    [
        ("capacity", 1, "z2-b", False, ""), ("quota", 1, "z2-b", True, ""), ("permission", 1, "z2-b", True, ""),
        ("usage", 1, "z2-b", True, ""), ("missing", 1, "z2-b", True, ""), ("transient", 9, "z1-a", False, ""),
        ("unknown", 4, "z1-a", False, ""), ("unknown", 5, "z1-a", False, "failed"), ("exists", 4, "z1-a", False, ""),
        ("exists", 5, "z1-a", False, "failed"),
    ],
)  # fmt: skip
def test_a_create_that_fails(kind, times, zone, refused, end):
    """Only what says that there is nothing goes to the next zone: else there could be two machines."""
    memory = noting.asked(kept(), "z1-a", NOW, settings())
    memory = acted("create", memory, kind, times)
    assert (memory.zone, bool(memory.refused), memory.end) == (zone, refused, end)
    assert (memory.held is None) == (zone == "z2-b")
    assert bool(memory.lives) == (zone == "z1-a")
    if refused:
        assert "Do this." in memory.refused["z1-a"]


def test_zones_take_turns_and_pauses_grow():
    memory, s, turns, pauses = kept(), settings(), [], []
    for _ in range(8):
        action = decide(seen(), memory, NOW, s)
        while action.do == "wait":
            pauses.append(action.kept.pause - NOW)
            action = decide(seen(), replace(memory, pause=0.0), NOW, s)
        turns.append(action.zone)
        memory = acted("create", action.kept, "capacity")
    assert turns == ["z1-a", "z2-b"] * 4
    assert pauses == [30.0, 60.0, 120.0]
    assert decide(seen("ACTIVE", "absent"), memory, NOW, s).kept.rounds == 0


def test_since_when_a_run_waits_is_known_from_its_first_act():
    action = decide(seen(), kept(), NOW, settings())
    assert (action.kept.phase, action.kept.since) == ("waiting", NOW)
    assert decide(seen("WAITING_FOR_RESOURCES"), action.kept, NOW + 90, settings()).kept.since == NOW


def test_usage_errors_everywhere_are_bad_input():
    memory, s = kept(), settings()
    for _ in range(2):
        memory = acted("create", decide(seen(), memory, NOW, s).kept, "usage")
    action = decide(seen(), memory, NOW, s)
    assert (action.do, action.kept.end, action.kept.code) == ("prove", "failed", 2)


@pytest.mark.parametrize(
    "do, kind, end, deleting",
    [
        ("install", "worker", "failed", False), ("install", "permission", "failed", False),
        ("install", "transient", "", True), ("check", "worker", "", True),
        ("start", "worker", "", True), ("stop", "transient", "", True), ("delete", "unknown", "", False),
    ],
)  # fmt: skip
def test_an_act_that_fails_thrice(do, kind, end, deleting):
    memory = acted(do, kept(held=held()), kind, 2)
    assert not memory.end and not memory.held.deleting
    memory = acted(do, memory, kind)
    assert (memory.end, memory.held.deleting) == (end, deleting)
    if end:
        assert f"{kind}! Do this." in memory.why


def test_at_the_end_nothing_stops_the_deletion():
    memory = kept(held=RAN, attempt=2, end="limit")
    look = seen("ACTIVE", "running 2", "silent")
    done = []
    for _ in range(6):
        action = decide(look, memory, NOW, settings())
        done.append(action.do)
        memory = acted(action.do, action.kept, "transient")
    assert done == ["stop", "stop", "fetch", "fetch", "delete", "delete"]


def test_acts_that_worked_are_remembered():
    memory = kept(held=RAN, attempt=2, end="failed", why="it broke", lives=(life(),), tries=2)
    after = noting.did(Action("check", memory), memory, NOW, "")
    assert after.held.checked and after.tries == 0
    assert noting.did(Action("stop", memory), memory, NOW, "").held.stopped
    assert not noting.did(Action("stop", memory), replace(memory, end=""), NOW, "").held.stopped
    after = noting.did(Action("fetch", memory), memory, NOW, "worker 1: ValueError")
    assert after.held.fetched and after.why == "it broke\nworker 1: ValueError"
    after = noting.did(Action("delete", memory, "z1-a"), memory, NOW, "")
    assert after.held is None and after.lives == (life(ended=NOW, why="given up"),)
    after = noting.did(Action("delete", memory, "z2-b"), memory, NOW, "")
    assert after.held == memory.held and after.lives == memory.lives
    after = noting.did(Action("prove", memory), memory, NOW, "")
    assert after.phase == "failed" and after.held is None and after.lives[0].ended == NOW


def test_the_times_fit_each_other():
    """A training that is asked to save gets longer than one that can't; nothing is given up before it is idle."""
    assert deciding.GROUP < deciding.SAVE
    assert settings().idle_minutes * 60 > deciding.NOTICE
