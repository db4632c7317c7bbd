"""How long nothing has moved, how long it may, and which process holds up a run."""

import contextlib
import math
import queue
import sys
import threading
import time

import pytest

from flaxmodels.runtime import progress, watchdog
from flaxmodels.runtime.watchdog import LEAST, LIMITS, SLOWER, Standing, Watch


@pytest.fixture(autouse=True)
def new_run():
    progress.reset()
    yield
    progress.reset()


def ticks(watch, count):
    """The standing after so many seconds."""
    return [watch.tick(1.0) for _ in range(count)][-1]


def test_outside_of_all_phases_there_is_no_limit():
    assert ticks(Watch(), 10).limit == math.inf


@pytest.mark.parametrize("name", progress.PHASES)
def test_every_phase_has_a_limit(name):
    with progress.phase(name):
        watch = Watch()
        assert ticks(watch, 6).stalled == 5 and ticks(watch, 1).limit == LIMITS[name]
        progress.beat()
        assert watch.tick(1.0).stalled == 0


def test_training_is_measured_by_its_slowest_step():
    watch = Watch()
    with progress.phase("training"):
        assert ticks(watch, 31).limit == LIMITS["training"]
        progress.beat(1)
        assert ticks(watch, 3).limit == LIMITS["training"]  # the first dispatch is no measure
        progress.beat(2)
        assert ticks(watch, 6).limit == LEAST > SLOWER * 2
        progress.beat(3)
        assert watch.tick(1.0).limit == SLOWER * 5
        with progress.phase("save"):
            assert ticks(watch, 100).limit == LIMITS["save"]
        assert watch.tick(1.0).limit == SLOWER * 5
        with progress.phase("data"):  # once more the first batch of a stretch, of workers that have just been started
            assert watch.tick(1.0).limit == LIMITS["data"]


@pytest.mark.parametrize("seconds", [10, 60, 1000])
def test_steps_that_take_long_are_not_stuck(seconds):
    watch = Watch()
    with progress.phase("training"):
        for step in range(1, 5):
            found = ticks(watch, seconds)
            assert found.stalled <= found.limit
            progress.beat(step)
        assert ticks(watch, 1).limit == max(LEAST, SLOWER * (seconds - 1))


def test_a_longer_limit_of_data_holds_for_training_too():
    watch = Watch()
    with progress.phase("training"):
        progress.allow(3 * LEAST)
        for step in range(1, 4):
            ticks(watch, 1)
            progress.beat(step)
        assert ticks(watch, 1).limit == 3 * LEAST


def test_data_before_the_first_step_take_their_time():
    with progress.phase("data"):
        assert ticks(Watch(), 3).limit == LIMITS["data"]


def test_evaluation_is_measured_with_its_first_batch():
    """Each evaluation starts to read its data anew."""
    watch = Watch()
    with progress.phase("evaluation"):
        assert ticks(watch, 11).limit == LIMITS["evaluation"]
        progress.beat()
        assert watch.tick(1.0).limit == SLOWER * 10


@pytest.mark.parametrize(("asked", "expected"), [(3.0, 3.0), (500.0, 500.0), (math.inf, math.inf)])
def test_what_the_user_asks_for(asked, expected):
    watch = Watch(asked)
    with progress.phase("compile"):
        assert watch.tick(1.0).limit == (math.inf if asked == math.inf else LIMITS["compile"])
    with progress.phase("evaluation"):
        assert watch.tick(1.0).limit == expected
    with progress.phase("training"):
        assert watch.tick(1.0).limit == (math.inf if asked == math.inf else LIMITS["training"])
        progress.beat(1)
        assert watch.tick(1.0).limit == expected


@pytest.mark.parametrize("name", progress.PHASES)
def test_asking_for_more_gives_every_phase_more(name):
    """As the message says."""
    with progress.phase(name):
        assert Watch(1e6).tick(1.0).limit == 1e6


def at(step, stalled=0.0, limit=45.0, *, waits=False, beats=10, phase="training"):
    return Standing(phase, step, beats, stalled, limit, waits, "feed.py:7 in read")


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        ({0: at(40)}, None),
        ({0: at(40, 46)}, 0),
        ({0: at(41, 46, waits=True), 1: at(40, 46)}, 1),
        ({0: at(40, 46), 1: at(40, 46, waits=True)}, 0),  # at one step, who does not wait
        ({0: at(40, 46, waits=True), 1: at(40, 46, waits=True, beats=9)}, 1),  # all wait: who has come least far
        ({0: at(40, 46, waits=True), 1: at(40, 46, 3600, phase="save")}, None),  # it is given its own time
        ({0: at(40, 46, waits=True), 1: at(40, 1)}, None),  # it moves
        ({0: at(1, 46, waits=True), 1: at(None, 46, 3600, phase="compile")}, None),
        ({0: at(40, 46, waits=True), 1: at(40, 46), 2: at(40, 46, waits=True)}, 1),
        ({0: at(40, 1e9, math.inf, phase="")}, None),
    ],
)
def test_the_laggard(standings, expected):
    assert watchdog.laggard(standings) == expected


def test_what_is_said_of_it():
    said = watchdog.explain(1, {0: at(41, 46, waits=True), 1: at(40, 46.4)}, "process 1 (node7, pid 3)")
    assert said == (
        "process 1 (node7, pid 3) is stuck in phase 'training' at step 40: nothing has moved there for 46 s, and 45 s "
        "is the limit. It stands at feed.py:7 in read. The others wait for it: process 0 in phase 'training' at step "
        "41. Where that is as it should be, --stuck_after=SECONDS gives it more time."
    )
    alone = watchdog.explain(0, {0: at(40, 46)}, "")
    assert alone.startswith("this process is stuck in phase 'training' at step 40") and "others" not in alone
    many = watchdog.explain(1, {n: at(40, 46, waits=True) for n in range(20)}, "process 1")
    assert "No process gets on; this one has come least far: process 0 in" in many and many.count(" in phase ") == 9
    assert "and 11 more" in many


@contextlib.contextmanager
def seen_from_a_thread(function, answer):
    """What `stands` says while the main thread is in a function of that name; then answers."""
    found = []

    def there():
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None and frame.f_code.co_name != function:
            frame = frame.f_back
        return frame is not None

    def look():
        deadline = time.monotonic() + 60
        while not there() and time.monotonic() < deadline:
            time.sleep(0.001)
        found.append(watchdog.stands())
        answer()

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    thread.join()


def test_where_the_main_thread_stands():
    answered = threading.Event()

    def linger():
        answered.wait(60)  # of threading.py: what matters is who called it

    with seen_from_a_thread("linger", answered.set) as found:
        linger()
    (waits, where) = found[0]
    assert not waits and where.startswith("tests/test_watchdog.py:") and "in linger" in where


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/lib/python3.11/site-packages/jax/_src/array.py", True),
        ("/lib/python3.11/site-packages/orbax/checkpoint/multihost.py", True),
        ("/somewhere/flaxmodels/runtime/peers.py", True),
        ("/somewhere/flaxmodels/runtime/peers.py.py", False),
        ("/somewhere/flaxmodels/data/feed.py", False),
    ],
)
def test_who_waits_for_others_is_known_by_the_file(file, expected):
    def linger(event):
        event.wait(60)

    linger.__code__ = linger.__code__.replace(co_filename=file)
    answered = threading.Event()
    with seen_from_a_thread("linger", answered.set) as found:
        linger(answered)
    assert found[0][0] == expected and found[0][1].startswith("/".join(file.split("/")[-2:]))


def test_who_waits_for_its_data_does_not_wait_for_devices():
    data = queue.Queue()
    with seen_from_a_thread("get", lambda: data.put("a batch")) as found:
        data.get(timeout=60)
    assert not found[0][0] and "test_watchdog" in found[0][1]


def test_stacks_of_all_threads(tmp_path, capfd):
    inside, release = threading.Event(), threading.Event()

    def elsewhere():
        inside.set()
        release.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert inside.wait(60)
    assert watchdog.dump(3, tmp_path) == str(tmp_path / "stacks.3.txt")
    assert watchdog.dump(3, tmp_path / "absent") == "" == watchdog.dump(3, None)
    release.set()
    thread.join()
    for text in ((tmp_path / "stacks.3.txt").read_text(), capfd.readouterr().err):
        assert "in elsewhere" in text and "in test_stacks_of_all_threads" in text
