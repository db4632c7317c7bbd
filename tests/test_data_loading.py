"""Batches made ahead of need: the same ones in the same order whoever makes them, and an end for every fault."""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels.data import loading, threads
from flaxmodels.data.loading import Loading, LoadingError, stream
from flaxmodels.data.threads import within
from flaxmodels.registry import UserError

ROOT = Path(__file__).parent.parent
PATIENT = 120  # seconds, where a slow machine must not fail


def rows(number):
    values = np.random.default_rng(number).random((6, 4))
    return {
        "index": np.arange(6, dtype=np.int32) + number,
        "rows": {
            "image": (values * 255).astype(np.uint8),
            "skip": values[:, 0] > 0.5,
            "across": np.asarray(values.T),  # not in C order
            "strided": values[:, 1],
            "half": values.astype(jnp.bfloat16),
            "none": np.zeros((0, 3), np.float32),
            "one": np.array(number),
            "text": np.array(["a", "bcd"]),
        },
    }


def shared(pid):
    """Shared memory with a name that a process has: it would outlive all processes. /dev/shm itself is everybody's."""
    process, opened = Path(f"/proc/{pid}"), []
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread closes files while these are listed
            opened.append(str(link.readlink()))
    return [line for line in [*(process / "maps").read_text().splitlines(), *opened] if "/dev/shm/" in line]


def told(number):
    """`rows` with the process that made them."""
    assert not shared(os.getpid())
    return {**rows(number), "pid": np.array(os.getpid())}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes() and x.flags.writeable


def left():
    """What must be the same before and after: processes, threads, open files, shared memory."""
    gc.collect()  # what is in a cycle with an error, or of other tests
    return (
        [process.pid for process in multiprocessing.active_children()],
        sorted(thread.name for thread in threading.enumerate()),
        len(list(Path("/proc/self/fd").iterdir())),
        shared(os.getpid()),
    )


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What other tests have left in memory, such as JAX's programs, is not looked through again each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_left():
    list(stream(rows, range(1), Loading()))  # imports, and pools that live as long as the process
    multiprocessing.resource_tracker.ensure_running()
    before = left()
    yield
    deadline = time.monotonic() + PATIENT
    while more(before) and time.monotonic() < deadline:  # what was told to end may take a moment
        time.sleep(0.02)
    assert not more(before)


def more(before):
    """What there is now that was not there before; what ended meanwhile was of other tests."""
    now = left()
    new = [sorted((Counter(now[i]) - Counter(before[i])).elements()) for i in (0, 1, 3)]
    return [*filter(None, new), *([f"{now[2]} open files, not {before[2]}"] if now[2] > before[2] else [])]


def alive(pid):
    """Whether the process runs, or is stopped: not whether somebody still has to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def script(tmp_path, text, *, background=False):
    """Run a user's script."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, str(path)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if background:
        return process
    with process:
        out, err = process.communicate(timeout=PATIENT)
    return process.returncode, out, err


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (3, 1), (8, 4)])
def test_threads_keep_the_order(nothing_left, threads, ahead):
    def late(number):
        time.sleep(0.002 * (number % 3))
        return rows(number)

    numbers = range(5, 65, 3)
    made = list(stream(late, numbers, Loading(threads=threads, ahead=ahead)))
    assert len(made) == len(numbers)
    for number, batch in zip(numbers, made, strict=True):
        same(batch, rows(number))


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_run_ahead_but_not_away(nothing_left, threads):
    begun = []

    def counted(number):
        begun.append(number)
        return {}

    made = stream(counted, range(2**31 - 1), Loading(threads=threads, ahead=2))
    next(made)
    deadline = time.monotonic() + PATIENT
    while len(begun) < threads + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(begun) == threads + 3  # one was taken; the others are ready, or being made
    made.close()


def fails(number, error):
    if number == 3:
        raise error
    return rows(number)


@pytest.mark.parametrize("error", [ValueError("row 7 is odd"), UserError("a.csv, line 7: no label")], ids=repr)
def test_an_error_comes_where_its_batch_would(nothing_left, error):
    made = stream(functools.partial(fails, error=error), range(9), Loading())
    for _ in range(3):
        next(made)
    with pytest.raises(type(error), match=str(error)):
        next(made)


@pytest.mark.parametrize("what", ["none", "stop"])
def test_no_batch_gets_lost(nothing_left, what):
    """Grain drops None, and takes StopIteration for the end of all."""

    def make(number):
        if number == 3:
            return None if what == "none" else next(iter([]))
        return {}

    made = stream(make, range(9), Loading(threads=2))
    with pytest.raises(TypeError, match="There is no batch 3"):
        list(made)


@pytest.mark.parametrize("end", ["close", "error", "drop"])
def test_leaving_early_leaves_no_threads(nothing_left, end):
    def slow(number):
        time.sleep(0.05)
        return {}

    made = stream(slow, range(1000), Loading(threads=3))
    next(made)
    if end == "close":
        made.close()
    elif end == "error":
        with pytest.raises(ZeroDivisionError):
            made.throw(ZeroDivisionError)
    del made


def test_a_stuck_read_is_an_error(monkeypatch):
    freed, at, answered = threading.Event(), threading.Event(), []

    def stuck(number):
        if number == 3:
            at.set()
            freed.wait()
        return {}

    def patient(seconds, wait):
        """The time begins when batch 3 is read and those before it are there: a slow machine is no stuck read."""
        deadline = time.monotonic() + PATIENT
        while (found := wait(0.01)) is None and time.monotonic() < deadline:
            if at.is_set() and len(answered) >= 3:
                return within(seconds, wait)
        answered.append(found)
        return found

    monkeypatch.setattr(threads, "within", patient)
    before = left()
    made = stream(stuck, range(9), Loading(threads=2, timeout=1))
    with pytest.raises(LoadingError, match=r"Batch 3 was not made within 1 s.*data\.timeout"):
        list(made)
    freed.set()
    deadline = time.monotonic() + PATIENT
    while more(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not more(before)


def test_time_when_this_process_stood_still_does_not_count():
    """A wait of three seconds is three waits of one: a stop during one of them costs that one."""
    waits = []
    assert within(3, waits.append) is None
    assert waits == [1, 1, 1]
    assert within(0.5, lambda wait: wait) == 0.5
    assert within(60, lambda wait: () if wait == 1 else None) == ()


@pytest.mark.slow
def test_a_stuck_thread_does_not_keep_the_process(tmp_path):
    """Python waits for the threads of a pool before it exits."""
    code, _, err = script(
        tmp_path,
        """
        import time
        from flaxmodels.data.loading import Loading, stream
        list(stream(lambda number: time.sleep(1e6), range(9), Loading(timeout=1)))
        """,
    )
    assert code == 1 and "LoadingError: Batch 0 was not made within 1 s" in err


def test_what_worker_processes_can_not_be_sent_is_said():
    with pytest.raises(UserError, match=r"data\.workers=2.*can't be sent.*Use functions of a module"):
        next(stream(lambda number: rows(number), range(9), Loading(workers=2)))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "threads", "count"), [(1, 1, 12), (2, 4, 13), (3, 2, 2)])
def test_worker_processes_keep_the_order(nothing_left, workers, threads, count):
    numbers = range(4, 4 + 3 * count, 3)
    made = list(stream(told, numbers, Loading(workers=workers, threads=threads, ahead=3)))
    pids = {int(batch.pop("pid")) for batch in made}
    assert len(pids) == min(workers, count) and os.getpid() not in pids
    assert len(made) == count
    for number, batch in zip(numbers, made, strict=True):
        same(batch, rows(number))


def faulty(number, fault, folder):
    Path(folder, str(number)).touch()
    if number == 7:
        if fault == "user":
            raise UserError("a.csv, line 7: no label")
        if fault == "error":
            raise type("OwnError", (Exception,), {"lock": threading.Lock()})("of a kind that can't be pickled")
        if fault == "object":
            return {"x": object()}
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
            time.sleep(1e6)
        if fault.startswith("exit"):
            os._exit(int(fault[-1]))
        if fault == "hangs":
            while True:
                time.sleep(1e6)
    return told(number)


FAULTS = {
    "user": (UserError, r"^a\.csv, line 7: no label$"),
    "error": (LoadingError, r"Data worker 1 of 2 \(pid \d+\) failed: OwnError: of a kind that can't be pickled"),
    "object": (LoadingError, "failed: TypeError: Worker processes can send .* no object"),
    "SIGKILL": (LoadingError, r"1 of 2 \(pid \d+\) was killed by signal 9 \(Killed\). Did memory run out"),
    "SIGSTOP": (LoadingError, r"1 of 2 \(pid \d+\) gave no batch in 3 s.*raise data\.timeout"),
    "exit0": (LoadingError, r"1 of 2 \(pid \d+\) ended with exit code 0, before its last batch"),
    "exit1": (LoadingError, r"1 of 2 \(pid \d+\) ended with exit code 1, before its last batch"),
    "hangs": (LoadingError, r"1 of 2 \(pid \d+\) gave no batch in 3 s.*raise data\.timeout"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_worker_is_an_error(nothing_left, tmp_path, fault):
    made = stream(
        functools.partial(faulty, fault=fault, folder=str(tmp_path)),
        range(20),
        Loading(workers=2, threads=1, ahead=1, timeout=3),
    )
    taken, pids = [], set()
    kind, text = FAULTS[fault]
    with pytest.raises(kind, match=text) as caught:
        for batch in made:
            pids.add(int(batch.pop("pid")))
            taken.append(batch)
    assert len(pids) == 2 and not any(map(alive, pids))
    for number, batch in enumerate(taken):
        same(batch, rows(number))
    if kind is UserError or "failed" in text:
        assert len(taken) == 7  # what comes before it is not lost
    if fault == "error":
        assert "in faulty" in caught.value.__notes__[0]
    # Of each worker: those taken, and at most one that waits, one that is ready for that, and one in the making.
    assert max(int(path.name) for path in tmp_path.iterdir()) <= 7 + 2 * 3


class Late:
    """What takes its time to arrive in another process, as imports do."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, number):
        return rows(number)

    def __setstate__(self, state):
        time.sleep(state["seconds"])


@pytest.mark.slow
def test_a_slow_start_is_not_taken_for_a_fault(nothing_left):
    made = list(stream(Late(2.5), range(2), Loading(workers=1, timeout=2)))
    same(made[1], rows(1))


@pytest.mark.slow
def test_a_start_that_hangs_is_an_error(nothing_left, monkeypatch):
    monkeypatch.setattr(loading, "START", 0.5)
    with pytest.raises(LoadingError, match=r"Data worker 0 of 1 \(pid \d+\) gave no sign of life in 1 s"):
        next(stream(Late(1e6), range(2), Loading(workers=1, timeout=1)))


@pytest.mark.slow
def test_leaving_early_leaves_no_workers_and_signals_are_for_main(nothing_left, tmp_path):
    """Ctrl-C reaches all processes of a terminal, and a scheduler may send SIGTERM to all: main decides what then."""
    make = functools.partial(faulty, fault="hangs", folder=str(tmp_path))
    made = stream(make, range(2, 10**9, 2), Loading(workers=2, threads=1))
    pids = [int(next(made)["pid"]) for _ in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    for number in range(6, 40, 2):
        assert next(made)["index"][0] == number
    assert all(map(alive, pids))
    os.kill(pids[0], signal.SIGSTOP)
    made.close()
    assert not any(map(alive, pids))


MAIN = """
import contextlib, sys, threading, time
import test_data_loading as tests
from flaxmodels.data.loading import Loading, stream

def busy(number):
    if number == 5:
        while True:
            sum(range(1000))
    return tests.told(number)

def main():
    made = stream(busy, range(10**9), Loading(workers=2, threads=1))
    for _ in range(3):
        print(int(next(made)["pid"]), flush=True)
    return made
"""


@pytest.mark.slow
def test_a_killed_main_process_leaves_nothing(tmp_path):
    with script(tmp_path, MAIN + 'if __name__ == "__main__": made = main(); time.sleep(1e6)', background=True) as main:
        try:
            pids = {int(main.stdout.readline()) for _ in range(3)}
            assert len(pids) == 2 and all(map(alive, pids))
            assert not any(map(shared, [main.pid, *pids]))
            for pid in pids:
                blocked = int(Path(f"/proc/{pid}/status").read_text().partition("SigBlk:")[2].split()[0], 16)
                assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))
            os.kill(min(pids), signal.SIGSTOP)
        finally:
            main.kill()
        deadline = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))


LEFT_OPEN = {
    "where it can be closed": "made = main()",
    "in a daemon thread that waits for a batch": """
    def wait():
        with contextlib.suppress(Exception):  # its workers are killed first
            list(made)

    made = main()
    threading.Thread(target=wait, daemon=True).start()
    while not (made.gi_running and time.sleep(0.5) is None and made.gi_running):
        pass""",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", LEFT_OPEN)
def test_a_stream_left_open_does_not_keep_the_process(tmp_path, where):
    code, out, err = script(tmp_path, MAIN + f'if __name__ == "__main__":\n    {LEFT_OPEN[where]}')
    assert (code, err) == (0, "")
    assert not any(map(alive, map(int, out.split())))


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(tmp_path):
    code, _, err = script(tmp_path, MAIN + "main()")
    assert code == 1
    assert 'must stand below `if __name__ == "__main__":`' in err.splitlines()[-1]
