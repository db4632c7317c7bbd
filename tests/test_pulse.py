"""Who dies, freezes or is stuck is known to all others, and nothing else ends a process."""

import contextlib
import json
import math
import os
import select
import signal
import socket
import threading
import time
import warnings

import pytest

from flaxmodels.runtime import exits, peers, progress, pulse
from flaxmodels.runtime.pulse import Pulse
from flaxmodels.runtime.roll_call import Tie
from flaxmodels.runtime.watchdog import Standing


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Run:
    """Pulses of processes 0, 1, ... in this one, which end by saying so in `ended`: (their words, exit code).

    Each calls `before(pulse)` before every tick, in its own thread, and `after()` at its end.
    """

    def __init__(self, monkeypatch):
        self.ended, self.pulses, self.sockets = {}, [], []
        self.before, self.after = lambda beat: None, lambda: None
        self.rounds, self._barrier = 0, None
        monkeypatch.setattr(pulse, "TICK", 0.02)
        monkeypatch.setattr(pulse, "LAST", 0.5)
        monkeypatch.setattr(pulse, "WORDS", 60.0)
        monkeypatch.setattr(exits, "leave", self._leave)
        tick = Pulse._beat
        monkeypatch.setattr(Pulse, "_beat", lambda beat, elapsed: (self.before(beat), tick(beat, elapsed)))

    def _leave(self, error):
        mine = []
        until(lambda: mine.extend(beat for beat in self.pulses if beat._thread is threading.current_thread()) or mine)
        self.ended[mine[0].process] = (mine[0].verdict.text, error.code)
        self.after()

    def in_step(self, count, move=lambda: None):
        """So many pulses tick when all do, after a `move()`: one whose thread gets no time is neither silent nor late.

        What each said at a tick is heard before the tick after the next one.
        """

        def together():
            self.rounds += 1
            move()

        def wait(beat):
            with contextlib.suppress(threading.BrokenBarrierError):
                self._barrier.wait()

        self._barrier, self.before = threading.Barrier(count, together), wait

    def each_alone(self):
        """After `in_step`: they wait no longer for each other, nor count silence."""
        for beat in self.pulses:
            beat.heartbeat = 100.0
        self._barrier.abort()

    def start(self, count, *, heartbeat=100.0, stuck_after=None, without=(), folder=None):
        """Process 0 and others; those of `without` are sockets that the test speaks through: their list."""
        ties, others, silent = {}, {}, {}
        for number in range(1, count):
            here, there = socket.socketpair()
            self.sockets += [here, there]
            ties[number] = Tie(here, f"node{number}, pid 7")
            if number in without:
                silent[number] = there
            else:
                others[number] = Tie(there, "node0, pid 7")
        self.pulses.append(Pulse(ties, 0, heartbeat, stuck_after, folder))
        self.pulses += [Pulse({0: tie}, number, heartbeat, stuck_after, folder) for number, tie in others.items()]
        return silent

    def wait(self, *numbers):
        """The verdicts of these processes, when all have one."""
        until(lambda: set(numbers) <= set(self.ended))
        assert set(self.ended) == set(numbers)
        return [self.ended[number] for number in numbers]

    def close(self):
        if self._barrier:
            self._barrier.abort()
        for beat in self.pulses:
            beat.close()
        for end in self.sockets:
            end.close()


@pytest.fixture
def run(monkeypatch):
    progress.reset()
    run = Run(monkeypatch)
    yield run
    run.close()
    progress.reset()


def say(connection, **line):
    connection.sendall(json.dumps(line).encode() + b"\n")


def standing(phase="training", step=40, **values):
    values = {"beats": 10, "stalled": 0.0, "limit": 45.0, "waits": False, "where": "feed.py:7 in read"} | values
    return {"phase": phase, "step": step, **values}


def test_processes_that_get_on_go_on_and_leave_well(run):
    run.in_step(3)
    run.start(3, heartbeat=0.5)
    until(lambda: run.rounds > 40 or run.ended)  # of 0.02 s at least
    assert run.ended == {}
    run.each_alone()
    for beat in run.pulses:  # one after the other
        beat.close()
        time.sleep(0.05)
    assert run.ended == {}


def test_a_process_that_dies_ends_all_others(run):
    silent = run.start(4, without=[2])
    say(silent[2], beat=standing())
    silent[2].close()
    for text, code in run.wait(0, 1, 3):
        assert text.startswith("process 2 (node2, pid 7) died in phase 'training' at step 40: its connection closed")
        assert code == exits.FAULT


def test_process_0_dies(run):
    here, there = socket.socketpair()
    run.sockets += [here, there]
    run.pulses = [Pulse({0: Tie(here, "node0, pid 7")}, 2, 100.0, None, None)]
    there.close()
    assert run.wait(2)[0][0].startswith("process 0 (node0, pid 7) died: ")


@pytest.mark.parametrize("number", [0, 1])
def test_a_frozen_process_is_named(run, number):
    spoken, there = [], []

    def speak(beat):
        if beat.process == (0 if number else 2) and len(spoken) < 25:  # of 0.02 s at least
            if there:  # the pulses begin before it is known
                say(*there, beat=standing())
                spoken.append(True)
        elif number and beat.process == 2:
            beat.heartbeat = 100.0  # process 0 finds out, and tells it

    run.before = speak
    if number:
        there += run.start(3, heartbeat=0.3, without=[1]).values()
        waited = (0, 2)
    else:
        here, other = socket.socketpair()
        run.sockets += [here, other]
        there.append(other)
        run.pulses, waited = [Pulse({0: Tie(here, "node0, pid 7")}, 2, 0.3, None, None)], (2,)
    found = run.wait(*waited)
    assert len(spoken) == 25  # while it spoke, it was not silent
    for text, code in found:
        assert text.startswith(
            f"process {number} (node{number}, pid 7) has been silent for 0 s (--heartbeat_timeout=0.3)"
        )
        assert ", last heard in phase 'training' at step 40: " in text and code == exits.FAULT
    told = b"".join(iter(lambda: there[0].recv(2**16), b""))  # should it wake up, it learns why the others are gone
    assert b'"verdict": {"text": "process %d (' % number in told


def test_the_laggard_is_named_in_all(run, tmp_path, capfd):
    silent = run.start(3, without=[1])
    say(silent[1], beat=standing("data", 40, stalled=46.0))
    with progress.phase("training"):
        progress.beat(41)
        for text, code in run.wait(0, 2):
            assert text.startswith(
                "process 1 (node1, pid 7) is stuck in phase 'data' at step 40: nothing has moved there"
            )
            assert (
                "It stands at feed.py:7 in read. The others wait for it: process 0 in phase 'training' at step 41"
                in text
            )
            assert code == exits.STUCK
    assert capfd.readouterr().err.count("in test_the_laggard_is_named_in_all") == 2  # of this thread, from each process


def test_a_process_that_has_left_hides_no_laggard(run):
    silent = run.start(3, without=[1, 2])
    say(silent[1], beat=standing(step=39))
    say(silent[1], leaves=True)
    say(silent[2], beat=standing(step=40, stalled=46.0))
    with progress.phase("end"):
        progress.beat(41)
        assert run.wait(0)[0][0].startswith("process 2 (node2, pid 7) is stuck in phase 'training' at step 40")


def test_a_process_alone_that_is_stuck(run, tmp_path, capfd):
    run.start(1, stuck_after=0.2, folder=tmp_path)
    with progress.phase("training"):
        progress.beat(41)
        ((text, code),) = run.wait(0)
    assert text.startswith("this process is stuck in phase 'training' at step 41") and code == exits.STUCK
    assert "in test_a_process_alone_that_is_stuck" in (tmp_path / "stacks.0.txt").read_text()
    assert f"Where its threads stand: {tmp_path / 'stacks.0.txt'}." in capfd.readouterr().err


def test_who_moves_is_not_stuck(run):
    run.in_step(2, move=lambda: progress.beat(run.rounds))
    run.start(2, stuck_after=0.3)
    with progress.phase("training"):
        until(lambda: run.rounds > 40 or run.ended)  # of 0.02 s at least
        assert run.ended == {}


def test_it_works_while_the_main_thread_is_in_compiled_code(run):
    asleep = threading.Lock()
    asleep.acquire()
    run.after = asleep.release
    run.start(1, stuck_after=0.2)
    with progress.phase("training"):
        progress.beat(1)
        assert asleep.acquire(timeout=60)  # one call all the time
    assert run.ended[0][1] == exits.STUCK


def test_a_process_that_was_stopped_is_not_stuck(run, monkeypatch):
    """Nor are the others silent: it did not listen."""
    run.start(2, heartbeat=60.0, stuck_after=60.0)
    with progress.phase("training"):
        progress.beat(1)
        time.sleep(0.1)
        jump, clock = [0.0], time.monotonic
        monkeypatch.setattr(pulse.time, "monotonic", lambda: clock() + jump[0])
        for _ in range(20):
            jump[0] += 3600
            time.sleep(0.05)
    assert run.ended == {}


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x00\xff" * 1000 + b"\n",
        b"[1]\n3\nnull\n",
        b'{"beat": {"phase": "training"}}\n',
        b'{"beat": 3, "failed": [], "verdict": "no"}\n',
        b'{"failed": {"x": 3}}\n',
        b'{"verdict": {"texts": 3}}\n',
        b"[" * 100000 + b"\n",
    ],
)
def test_what_is_no_line_of_ours_changes_nothing(run, noise):
    silent = run.start(2, without=[1])
    silent[1].sendall(noise)
    say(silent[1], beat=standing())  # is heard after the noise
    until(lambda: run.pulses[0]._links[1].standing == Standing(**standing()))
    assert run.ended == {} and run.pulses[0].verdict is None and run.pulses[0]._thread.is_alive()


def test_a_line_without_end_takes_no_memory(run):
    silent = run.start(2, without=[1])
    link = run.pulses[0]._links[1]
    for _ in range(40):
        silent[1].sendall(b"x" * 2**15)
    until(lambda: not select.select([link.connection], [], [], 0)[0])  # all of it has been read
    until(lambda: len(link.come) <= pulse.LONGEST)
    assert link.come and run.ended == {}


def test_who_does_not_read_holds_nobody_up(run):
    silent = run.start(3, without=[1])
    link = run.pulses[0]._links[1]
    with contextlib.suppress(BlockingIOError):
        while True:
            link.connection.send(b"x" * 2**16)
    for _ in range(3000):
        link.say({"beat": "x" * 100})
    time.sleep(0.1)
    assert 0 < len(link.go) < 2 * pulse.LONGEST and run.ended == {}
    silent[1].close()
    run.wait(0, 2)


def test_an_error_of_one_is_known_to_all(run, monkeypatch):
    silent = run.start(3, without=[1])
    failure = {"host": "node1", "text": "no such file", "code": 2}
    say(silent[1], failed={"1": failure})
    until(lambda: all(beat.failures for beat in run.pulses))
    silent[1].close()  # it has said why
    until(lambda: not run.pulses[0]._links[1].open)
    time.sleep(0.1)
    assert [beat.failures for beat in run.pulses] == [{1: failure}] * 2 and run.ended == {}
    monkeypatch.setattr(pulse, "_current", run.pulses[1])
    monkeypatch.setattr(peers, "me", lambda: 2)
    error = peers.failed()
    assert isinstance(error, exits.UserError) and str(error) == "process 1 (node1) failed: no such file"


def test_others_that_leave_because_of_an_error_here_did_not_die(run):
    silent = run.start(3, without=[1, 2])
    run.pulses[0].report({"host": "node0", "text": "mine", "code": 1})
    silent[1].close()
    until(lambda: not run.pulses[0]._links[1].open)
    assert not run.pulses[0].deserted()
    silent[2].close()
    until(run.pulses[0].deserted)
    time.sleep(0.1)
    assert run.ended == {}


def test_errors_go_through_the_pulse(run, monkeypatch):
    run.start(3)
    monkeypatch.setattr(pulse, "_current", run.pulses[2])
    monkeypatch.setattr(peers, "me", lambda: 2)
    monkeypatch.setattr(peers, "_store", lambda: pytest.fail("asked the store"))
    monkeypatch.setattr(peers, "_reported", None)
    peers.report(ValueError("mine"))
    assert peers.failed() is None
    monkeypatch.setattr(pulse, "_current", run.pulses[1])
    monkeypatch.setattr(peers, "me", lambda: 1)
    monkeypatch.setattr(peers, "count", lambda: 3)
    monkeypatch.setattr(peers, "_reported", None)
    monkeypatch.setattr(peers, "CAUSE", 60.0)
    found = peers.cause(ValueError("UNKNOWN: Gloo AllGather failed"))  # waits for the news
    assert isinstance(found, exits.FaultError) and str(found).endswith("failed: ValueError: mine")


def test_a_forked_child_keeps_no_connection(run):
    """Else the death of its parent would not close it."""
    here, there = socket.socketpair()
    with pulse.opened({1: Tie(here, "node1")}, 0, 100.0, None, None) as beat:
        read, write = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # of threads, which it does not use
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.write(
                    write, b"closed" if beat._links[1].connection.fileno() < 0 and pulse.current() is None else b"-"
                )
                signal.pause()
            os._exit(0)
        try:
            assert os.read(read, 6) == b"closed"
            assert pulse.current() is beat
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            os.close(write)
    assert pulse.current() is None
    there.close()


def test_limits_of_no_end_travel(run):
    silent = run.start(2, without=[1])
    say(silent[1], beat=standing("", None, stalled=1e6, limit=math.inf))
    until(lambda: run.pulses[0]._links[1].standing)
    time.sleep(0.1)
    assert run.ended == {} and run.pulses[0]._links[1].standing.limit == math.inf
