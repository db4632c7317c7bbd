"""Signals: what a first and a second one do, where there is something to save and where there is not."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from flaxmodels import sharding
from flaxmodels.runtime import agreement, exits, signals
from flaxmodels.runtime.exits import SignalledError
from flaxmodels.runtime.signals import NOTICE, Stop

NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(signals, "SAME", 0.02)


def commanded(body):
    """Run `body(stop, errors)` as a command does, which ends the process by putting an error among `errors`."""
    errors = []

    def main():
        with Stop(errors.append) as stop:
            body(stop, errors)
        return exits.DONE

    assert exits.reported(main, debug=False) == exits.DONE
    assert not exits.commanding()
    return errors


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_asks_and_the_second_ends(quick, number):
    def body(stop, errors):
        assert not stop and stop.signal is None
        signal.raise_signal(number)
        assert stop and stop.signal == number
        wait_for(lambda: stop._came)
        time.sleep(2 * signals.SAME)
        assert not errors
        signal.raise_signal(number)
        wait_for(lambda: errors)

    (error,) = commanded(body)
    assert exits.code_of(error) == 128 + number and f"{number.name} once more" in str(error)


def test_a_signal_that_the_thread_hears_late_is_no_second_one(quick):
    """The main thread may hold the interpreter's lock meanwhile."""

    def body(stop, errors):
        stop._turn.acquire()  # the thread waits
        signal.raise_signal(signal.SIGTERM)
        time.sleep(3 * signals.SAME)
        stop._turn.release()
        wait_for(lambda: stop._came)

    assert commanded(body) == []


def test_the_signal_that_follows_a_notice_is_the_first(quick):
    def body(stop, errors):
        stop.ask(signal.SIGTERM, NOTICE)
        time.sleep(3 * signals.SAME)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop._came)
        assert not errors and stop.notice == NOTICE
        time.sleep(3 * signals.SAME)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: errors)

    (error,) = commanded(body)
    assert "SIGTERM once more" in str(error)


def test_one_signal_told_twice_is_one(monkeypatch):
    monkeypatch.setattr(signals, "SAME", 60.0)

    def body(stop, errors):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)

    assert commanded(body) == []


def test_the_first_ends_it_where_there_is_nothing_to_save():
    def body(stop, errors):
        stop.rest()
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: errors)

    (error,) = commanded(body)
    assert str(error) == "SIGTERM: nothing had been computed yet; the same command starts again"
    assert isinstance(error, SignalledError) and exits.code_of(error) == 143

    def resumed(stop, errors):
        stop.rest(12)
        stop.ask(signal.SIGTERM, NOTICE)

    (error,) = commanded(resumed)
    assert "preemption notice: nothing had been computed since step 12, which is on disk" in str(error)


def test_from_the_first_step_on_it_only_asks():
    def body(stop, errors):
        stop.rest(12)
        stop.working()
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop._came)

    assert commanded(body) == []


def test_what_a_signal_began_to_end_computes_no_more():
    """`working` does not return while another thread ends the process."""
    begun, go_on, worked = threading.Event(), threading.Event(), threading.Event()

    def end(error):
        begun.set()
        go_on.wait(20)

    def main():
        with Stop(end) as stop:
            stop.rest()
            threading.Thread(target=lambda: begun.wait(20) and (stop.working(), worked.set())).start()
            signal.raise_signal(signal.SIGTERM)
            assert begun.wait(20) and not worked.wait(0.05)
            go_on.set()
            assert worked.wait(20)
        return 0

    assert exits.reported(main, debug=False) == 0


@pytest.mark.parametrize("lost", [True, False])
def test_elsewhere_than_in_a_command_the_process_is_not_ours_to_end(quick, lost):
    """In a notebook: Ctrl-C interrupts what runs, as without us."""
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        with Stop(heard.append) as stop:
            if lost:
                stop.rest()
            else:
                signal.raise_signal(signal.SIGINT)
                assert stop and not heard
                time.sleep(2 * signals.SAME)
            signal.raise_signal(signal.SIGINT)
            assert heard == [True]
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_was_there_before_comes_back():
    before = [signal.getsignal(number) for number in NUMBERS]
    commanded(lambda stop, errors: None)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_a_notice_is_told_to_all_processes():
    for make in (agreement.Alone, agreement.Together):
        stop = Stop()
        words = (stop, lambda: False, sharding.make_mesh()) if make is agreement.Together else (stop, lambda: False)
        decision = make(*words)
        assert not decision.stop() and decision.why == ""
        stop.ask(signal.SIGTERM, NOTICE)
        assert [decision.stop(), decision.stop()][-1]
        assert (decision.signal, decision.why) == (signal.SIGTERM, NOTICE)


def test_together_rests_and_works_as_alone():
    for make in (agreement.Alone, lambda *given: agreement.Together(*given, sharding.make_mesh())):
        errors = []
        stop = Stop(errors.append)
        stop._ours = True
        decision = make(stop, lambda: False)
        decision.rest(3)
        decision.working()
        stop.ask(signal.SIGTERM)
        assert errors == []
        decision.rest(4)
        stop._came = 0.0
        stop.ask(signal.SIGTERM)
        assert ["step 4" in str(error) for error in errors] == [True]


START = """
import ctypes, os, signal, sys, time
from flaxmodels.runtime import exits
from flaxmodels.runtime.signals import Stop
def main():
    with Stop() as stop:
        {body}
    return 0
sys.exit(exits.reported(main, debug=False))
"""


def process(body):
    code = START.format(body=body.replace("\n", "\n        "))
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_f4_a_main_thread_that_never_comes_back_is_no_obstacle():
    """As in XLA's compiler: a C function that no signal interrupts."""
    mutex = "ctypes.CDLL(None).pthread_mutex_lock(mutex)"
    with process(f"stop.rest(7)\nmutex = (ctypes.c_char * 128)()\n{mutex}\nprint('in', flush=True)\n{mutex}") as child:
        try:
            assert child.stdout.readline() == "in\n"
            child.send_signal(signal.SIGTERM)
            _, err = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 143 and "since step 7, which is on disk" in err


def test_what_other_code_forks_is_signalled_for_itself():
    body = "\n".join([
        "read, write = os.pipe()",
        "child = os.fork()",
        "if not child: os.write(write, b'x'), time.sleep(60)",
        "os.read(read, 1)",  # it is there, and is no longer as it was forked
        "os.kill(child, signal.SIGTERM)",
        "print(os.waitpid(child, 0)[1], bool(stop))",
    ])  # fmt: skip
    with process(body) as child:
        try:
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert out == "15 False\n", err


def test_an_error_of_another_process_is_of_the_same_kind():
    for code, kind in [(2, exits.UserError), (143, SignalledError), (130, SignalledError), (1, exits.FaultError)]:
        error = exits.from_code(code, "text")
        assert type(error) is kind and str(error) == "text" and exits.code_of(error) == code
    assert type(exits.from_code(exits.STUCK, "text")) is exits.FaultError


def test_a_process_that_nobody_reads_leaves_all_the_same():
    """Its terminal stands still: what it still wants to say would wait for ever."""
    body = "\n".join([
        "import threading",
        "exits.LAST_WORDS = 0.1",
        "threading.Timer(0.1, lambda: exits.leave(exits.FaultError('x' * 10**6))).start()",
        "time.sleep(60)",
    ])  # fmt: skip
    with process(body) as child:
        try:
            assert child.wait(timeout=20) == 1
        finally:
            child.kill()


@pytest.mark.parametrize("error", ["FaultError('lost')", "ValueError('lost')"])
def test_a_thread_that_never_ends_keeps_no_command(error):
    """Such as one that writes to storage that has gone: Python would wait for it."""
    hangs = "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nexits.abandon()"
    with process(f"{hangs}\nraise {error.replace('Fault', 'exits.Fault')}") as child:
        try:
            _, err = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 1 and "lost" in err


def test_importing_it_loads_no_jax():
    code = (
        "import flaxmodels.runtime.supervisor, sys; sys.exit(bool({'jax', 'numpy', 'ml_collections'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), timeout=60).returncode == 0
