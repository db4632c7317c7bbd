"""`watch` in a cloud in memory: whatever happens there, it comes to an end, and nothing is left."""

import itertools
import random

import pytest
from modelled import KilledError, Modelled, kept, settings

from tpu import following, state
from tpu.cost import spent
from tpu.meaning import CloudError


@pytest.fixture(autouse=True)
def priced(monkeypatch):
    """Without a file to read each time."""
    monkeypatch.setattr("tpu.machines.price", lambda machine, capacity, prices: 0.24)


LIFE = [(15, "preempt"), (35, "dead"), (55, "suspend")]


def live(cloud, restarts=0, away=0.0):
    """Watch to the end; killed, it is started again from what was written, at most `away` seconds later."""
    remembered = kept()
    while True:
        try:
            remembered = following.follow(remembered, cloud.s, cloud.world(), 30.0)
        except KilledError:
            assert restarts, "killed more often than was asked for"
            restarts -= 1
            cloud.kill = None if not restarts else cloud.crossed + cloud.random.randrange(1, 60)
            cloud.pass_time(cloud.random.random() * away)
            remembered = state.parsed(state.written(cloud.written or kept()))  # what survives is the file
            continue
        assert not cloud.machines, "something is left"
        assert remembered.phase in state.ENDED
        assert all(life.ended is not None for life in remembered.lives)
        return remembered


def test_the_whole_life():
    """Two preemptions, one failed host, one capacity error, one command that half works: no manual step."""
    cloud = Modelled(settings(), LIFE, ["capacity", "transient but made"])
    end = live(cloud)
    assert (end.phase, end.code, end.step) == ("done", 0, 100)
    assert [one for one in cloud.done if one.split()[0] in ("create", "start", "stop", "delete")] == [
        "create z1-a", "create z2-b", "start z2-b", "delete z2-b",
        "create z2-b", "start z2-b", "stop z2-b", "start z2-b", "delete z2-b",
        "create z2-b", "start z2-b", "delete z2-b",
    ]  # fmt: skip
    assert cloud.done[-3:] == ["fetch z2-b", "delete z2-b", "prove"]
    assert [life.why for life in end.lives] == ["suspended", "suspended", "stopping"]


FAULTS = ("preempt", "suspend", "notice", "dead", "reboot", "wiped", "code 1", "code 75", "code 137", "codes 1")
FAULTS += ("codes 143", "code 143", "silent 60", "silent 400", "silent 5000", "hand", "code 2", "code 0")
ERRORS = ("", "", "capacity", "transient", "unknown", "transient but made", "unknown but made", "exists but made")
ERRORS += ("quota", "permission")


def walk(seed):
    chance = random.Random(seed)
    steps = sorted(chance.randrange(100) for _ in range(chance.randrange(7)))
    s = settings(
        zones=chance.choice([("z1-a",), ("z1-a", "z2-b"), ("z1-a", "z2-b", "z3-c")]),
        max_hours=chance.choice([None, None, 0.3, 1.0]),
        max_cost=chance.choice([None, None, 2.0]),
        zone_patience=chance.choice([1.0, 30.0]),
        idle_minutes=chance.choice([5.0, 30.0]),
    )
    return Modelled(
        s,
        [(step, chance.choice(FAULTS)) for step in steps],
        [chance.choice(ERRORS) for _ in range(chance.randrange(5))],
        breaks=chance.choice([0.0, 0.1, 0.5]),
        seed=seed,
        comes=chance.choice([10.0, 60.0, 2000.0]),
    )


def within_limits(cloud, end):
    """It costs no more than the limit, the time between two looks, and the time to save and delete."""
    most = (cloud.s.max_hours or 1e9) * 3600
    if cloud.s.max_cost is not None:
        most = min(most, cloud.s.max_cost / end.lives[0].usd_per_hour * 3600 if end.lives else most)
    failures = 60 - cloud.broken if cloud.breaks else 0
    assert cloud.costs <= most + 30 + 120 + 62 * failures
    hours, _ = spent(end.lives, cloud.now)
    assert hours * 3600 >= cloud.costs - 1, "it cost more than is said"


def walked(seed):
    cloud = walk(seed)
    end = live(cloud)
    within_limits(cloud, end)
    assert end.phase != "done" or (end.step, end.code) == (100, 0)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_it_ends_and_nothing_is_left(seed):
    walked(seed)


@pytest.mark.slow
def test_whatever_happens_it_ends_and_nothing_is_left_often():
    first = random.SystemRandom().randrange(10**6)
    print(f"seed {first}")
    for seed in range(first, first + 40):
        walked(seed)


@pytest.mark.nightly
def test_whatever_happens_it_ends_and_nothing_is_left_very_often():
    first = random.SystemRandom().randrange(10**6)
    print(f"seed {first}")
    for seed in range(first, first + 3000):
        walked(seed)
        killed_and_left_alone(seed)


def killed_and_left_alone(seed):
    """Faults, and kills, and hours and days between: what it costs meanwhile is counted, and all comes to an end."""
    cloud = walk(seed)
    cloud.kill = 1 + seed % 40
    end = live(cloud, restarts=seed % 6 + 1, away=10.0 ** (seed % 6))
    hours, _ = spent(end.lives, cloud.now)
    assert hours * 3600 >= cloud.costs - 1, "it cost more than is said"
    assert end.phase != "done" or (end.step, end.code) == (100, 0)


@pytest.mark.parametrize("seed", range(10, 16))
def test_killed_and_left_alone(seed):
    killed_and_left_alone(seed)


def killed(at, restarts=1):
    """The life of the issue, with a watch that is killed and started again."""
    cloud = Modelled(settings(), LIFE, ["capacity", "transient but made"], kill=at, seed=at)
    end = live(cloud, restarts=restarts)
    assert (end.phase, end.code, end.step) == ("done", 0, 100), f"killed at {at}"
    assert end.attempt == len(cloud.started) or restarts, "an attempt was started in vain"
    hours, _ = spent(end.lives, cloud.now)
    assert cloud.costs <= hours * 3600 + 1
    return cloud.crossed


def crossings():
    return killed(None)


@pytest.mark.parametrize("at", [1, 2, 3, 7, 19, 40, 61, 93])
def test_killed_anywhere_it_comes_to_the_same_end(at):
    killed(at)


@pytest.mark.slow
def test_killed_everywhere_it_comes_to_the_same_end():
    for at in range(1, crossings(), 3):
        killed(at)


@pytest.mark.nightly
def test_killed_again_and_again_it_comes_to_the_same_end():
    for at in range(1, crossings()):
        for restarts in (1, 10):
            killed(at, restarts)


def test_a_run_over_a_limit_is_saved_and_deleted():
    for s in (settings(max_hours=0.2), settings(max_cost=1.0)):
        cloud = Modelled(s, goal=10**6)
        end = live(cloud)
        within_limits(cloud, end)
        assert (end.phase, end.code) == ("limit", 3) and "--max_" in end.why
        assert [one.split()[0] for one in cloud.done[-4:]] == ["stop", "fetch", "delete", "prove"]
        assert cloud.saved == int(cloud.step) > 0


def test_bad_input_ends_at_once_and_shows_the_first_error():
    cloud = Modelled(settings(), [(5, "code 2")])
    end = live(cloud)
    assert (end.phase, end.code) == ("failed", 2)
    assert "exit code 2" in end.why and "ValueError: what was wrong" in end.why
    assert len(cloud.started) == 1


def test_what_never_makes_progress_is_given_up():
    for step, attempts in ((1, 3), (15, 4)):  # the first of the latter brought a checkpoint
        cloud = Modelled(settings(), [(step, "codes 1")] * 9)
        end = live(cloud)
        assert (end.phase, end.code, len(cloud.started)) == ("failed", 1, attempts)
        assert "brought no newer checkpoint" in end.why


def test_machines_that_never_answer_are_given_up():
    cloud = Modelled(settings(idle_minutes=100))
    comes = cloud.live

    def live_silently(zone, machine, part):
        comes(zone, machine, part)
        machine.hosts[2].silent = cloud.now + 60

    cloud.live = live_silently
    end = live(cloud)
    assert end.phase == "failed" and "3 machines in a row" in end.why and "worker 2" in end.why
    assert [one for one in cloud.done if one.startswith("create")] == ["create z1-a", "create z2-b", "create z1-a"]


def test_a_machine_that_someone_deletes_is_not_made_again():
    cloud = Modelled(settings(), [(20, "hand")])
    end = live(cloud)
    assert (end.phase, end.code) == ("failed", 1) and "someone else deleted" in end.why
    assert [one for one in cloud.done if one.startswith("create")] == ["create z1-a"]


def test_errors_in_passing_cost_nothing_but_time():
    cloud = Modelled(settings(), LIFE, breaks=0.4, seed=3)
    assert live(cloud).phase == "done"
    assert any("503" in line for line in cloud.said)


def test_quota_everywhere_is_said_with_the_remedy():
    cloud = Modelled(settings(), creates=["quota", "quota"])
    end = live(cloud)
    assert (end.phase, end.code) == ("failed", 1)
    assert "quota in z1-a" in end.why and "quota in z2-b" in end.why
    assert cloud.done == ["create z1-a", "create z2-b", "prove"]


def test_lack_of_capacity_is_waited_for():
    cloud = Modelled(settings(), creates=["capacity"] * 9)
    assert live(cloud).phase == "done"
    assert [one for one in cloud.done if one.startswith("create")] == ["create z1-a", "create z2-b"] * 5
    assert any("after a pause" in line for line in cloud.said)


def failing(cloud, kind, looks):
    """Looks fail: from one on, so often."""
    look, count = cloud.look, itertools.count()

    def failing_look(kept, first):
        if next(count) in looks:
            raise CloudError(kind, "no")
        return look(kept, first)

    cloud.look = failing_look
    return cloud


@pytest.mark.parametrize("kind, begin", [("gone", 0), ("gone", 5), ("permission", 0)])
def test_what_this_machine_can_never_do_is_said_at_once(kind, begin):
    cloud = failing(Modelled(settings()), kind, range(begin, 99))
    with pytest.raises(CloudError, match="no"):
        following.follow(kept(), cloud.s, cloud.world())
    assert (cloud.written is None) == (begin == 0)


@pytest.mark.parametrize("kind", ["transient", "permission", "unknown"])
def test_a_cloud_that_does_not_answer_is_asked_more_often_while_a_machine_may_cost(kind):
    longest = {}
    for begin in (1, 20):  # before there is a machine, and while one trains
        cloud, slept = failing(Modelled(settings(), creates=["capacity"] * 2), kind, range(begin, begin + 9)), []
        sleep = cloud.sleep
        cloud.sleep = lambda seconds, slept=slept, sleep=sleep: slept.append(seconds) or sleep(seconds)
        assert live(cloud).phase == "done"
        longest[begin] = max(slept)
    assert longest == {1: following.LONGEST, 20: following.COSTLY}


def test_an_act_that_changes_nothing_is_not_repeated_without_a_pause():
    cloud = Modelled(settings())
    start = cloud.start

    def start_but_one(action):
        start(action)
        cloud.machines[action.zone].hosts[3].what = "installed"
        cloud.machines[action.zone].hosts[3].attempt = 0

    cloud.start = start_but_one
    assert live(cloud).phase == "failed"
    assert len(cloud.done) < 90
