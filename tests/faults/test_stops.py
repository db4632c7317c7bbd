"""Signals in every phase, to one process or to all; errors of a user's code; folders; locks; clocks that jump."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness
import pytest
from harness import ROOT, T1, T2x4
from test_preemption import Metadata

from flaxmodels.registry import UserError
from flaxmodels.runtime.lock import workdir_lock

DATA = ("data.name=faults.halting:tokens", "data.placement=disk", "data.timeout=300.0", "data.eval_batch_size=8")
OWN = tuple(f"--config.{key}" for key in (*DATA, "loss.name=faults.halting:loss"))
LIMIT = 30.0  # seconds from a signal to the end of the process; on a machine that is idle it takes one


def start(workdir, halt, topology=T1, *flags, **env):
    """A run that halts, and does not end before it has been `sent` something, however late that is."""
    env |= {"HALT": halt, "HALT_TILL": str(workdir.with_name(f"{workdir.name}.out") / "sent")}
    return harness.start(workdir, topology, *OWN, *flags, env=env)


def sent(group):
    """Let a run that `start` holds go on: its signal, or what stands for one, has been sent."""
    group.files[0].with_name("sent").touch()


def begun(group, text, number=0):
    """Wait till a process has said `text`."""
    assert harness.wait_for(lambda: text in group.output(number) or not group.running(), 300), str(group)
    assert text in group.output(number), str(group)


def stepped(group, workdir, step):
    """Wait till a step is in the log."""
    assert harness.wait_for(lambda: harness.last_step(workdir) >= step or not group.running(), 300), str(group)
    assert harness.last_step(workdir) >= step, str(group)


def ended(group, number=signal.SIGTERM, of=None):
    """Signal one process, or all; (seconds till all have ended, their exit codes)."""
    before = time.monotonic()
    group.kill(of, number)
    sent(group)
    codes = group.wait(300)
    return time.monotonic() - before, codes


def resumed(workdir, whole, topology=T1, *flags):
    """The same command, undisturbed, ends as `whole` did; the step that it went on from."""
    with harness.start(workdir, topology, *flags) as group:
        assert group.wait(300) == [0] * topology.processes, str(group)
        found = re.search(r"resumed at step (\d+)", group.output())
    assert harness.same(workdir, whole) == ""
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """topology, flags -> workdir of an uninterrupted run."""
    made = {}

    def run(topology=T1, *flags):
        if (topology, flags) not in made:
            workdir = made[topology, flags] = tmp_path_factory.mktemp("whole") / "run"
            with harness.start(workdir, topology, *flags) as group:
                assert group.wait(300) == [0] * topology.processes, str(group)
        return made[topology, flags]

    return run


@pytest.mark.slow
def test_f4_in_the_compiler_it_leaves_at_once(tmp_path, figures):
    """XLA is in C++ for minutes: no handler of Python's runs meanwhile."""
    with harness.start(tmp_path / "run", T1, *OWN, env={"HALT": "compile"}) as group:
        begun(group, "Constant folding")
        seconds, codes = ended(group)
        said = group.output()
    assert codes == [143] and seconds < LIMIT and "Traceback" not in said
    assert "SIGTERM: nothing had been computed yet; the same command starts again" in said
    figures("F4", injected=1, steps_lost=0, seconds_in_compile=seconds)


@pytest.mark.nightly
@pytest.mark.parametrize("phase", ["compile", "hang 1"])
def test_f4_before_its_first_step_a_resumed_run_leaves_at_once(tmp_path, whole, figures, phase):
    """In the compiler, and while the first batch is read: nothing was computed that is not on disk."""
    workdir = tmp_path / "run"
    with start(workdir, "training") as group:
        stepped(group, workdir, 5)
        ended(group)
    step = harness.on_disk(workdir)[-1]
    with harness.start(workdir, T1, *OWN, env={"HALT": phase}) as group:
        begun(group, "Constant folding" if phase == "compile" else "HALT hang")
        seconds, codes = ended(group)
        said = group.output()
    assert codes == [143] and seconds < LIMIT and "Traceback" not in said
    assert f"SIGTERM: nothing had been computed since step {step}, which is on disk" in said
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == step
    name = "compile" if phase == "compile" else "data_warm_up"
    figures("F4", injected=1, exact=1, steps_lost=0, **{f"seconds_in_{name}": seconds})


@pytest.mark.nightly
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_f4_in_training_the_step_is_finished_and_saved(tmp_path, whole, figures, number, code):
    workdir = tmp_path / "run"
    with start(workdir, "training") as group:
        stepped(group, workdir, 5)
        seconds, codes = ended(group, number)
        said = group.output()
    assert codes == [code] and seconds < LIMIT and "Traceback" not in said
    saved = int(re.search(rf"{number.name}: saved step (\d+) of 60; the same command goes on from there", said)[1])
    assert saved == harness.last_step(workdir) == harness.on_disk(workdir)[-1] >= 5
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == saved
    figures("F4", injected=1, exact=1, steps_lost=0, seconds_in_training=seconds)


@pytest.mark.nightly
def test_f4_in_an_evaluation_it_leaves_between_two_batches(tmp_path, whole, figures):
    workdir = tmp_path / "run"
    with start(workdir, "evaluation") as group:
        begun(group, "HALT evaluation")
        seconds, codes = ended(group)
        said = group.output()
    assert codes == [143] and seconds < LIMIT and "Traceback" not in said
    assert "SIGTERM: saved step 9 of 60" in said and harness.on_disk(workdir)[-1] == 9
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == 9
    figures("F4", injected=1, exact=1, steps_lost=0, seconds_in_evaluation=seconds)


@pytest.mark.nightly
def test_f4_in_a_save_it_is_finished(tmp_path, whole, figures):
    workdir = tmp_path / "run"
    with start(workdir, "training") as group:
        folder = workdir / "checkpoints"
        assert harness.wait_for(
            lambda: list(folder.glob("8*tmp*")) or list(folder.glob("[1-5][0-9]*tmp*")), timeout=300, pause=0.001
        )
        seconds, codes = ended(group)
        said = group.output()
    assert codes == [143] and seconds < LIMIT and "Traceback" not in said
    saved = int(re.search(r"SIGTERM: saved step (\d+) of 60", said)[1])
    assert saved == harness.last_step(workdir) == harness.on_disk(workdir)[-1] and not list(folder.glob("*tmp*"))
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == saved
    figures("F4", injected=1, exact=1, steps_lost=0, seconds_in_save=seconds)


@pytest.mark.nightly
def test_f4_the_second_signal_ends_it_at_once(tmp_path, whole, figures):
    """The first one waits for a batch that does not come."""
    workdir = tmp_path / "run"
    with harness.start(workdir, T1, *OWN, env={"HALT": "hang 11"}) as group:
        begun(group, "HALT hang")
        stepped(group, workdir, 8)
        group.kill(signum=signal.SIGTERM)
        time.sleep(2)
        assert group.codes() == [None]
        seconds, codes = ended(group)
        said = group.output()
    assert codes == [143] and seconds < LIMIT and "SIGTERM once more: left at once, without a save" in said
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == 8
    figures("F4", injected=1, exact=1, seconds_of_a_second_signal=seconds)


@pytest.mark.nightly
def test_f4_a_preemption_notice_is_a_signal(tmp_path, whole, figures):
    workdir = tmp_path / "run"
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with start(workdir, "training", GCE_METADATA_HOST=f"127.0.0.1:{server.server_port}") as group:
            stepped(group, workdir, 5)
            before = time.monotonic()
            server.set("preempted", "TRUE")
            harness.wait_for(group.ended, 10)  # where it stands at the batch that is held, it has heard of it by then
            sent(group)
            codes, seconds = group.wait(300), time.monotonic() - before
            said = group.output()
        server.shutdown()
    assert codes == [143] and seconds < LIMIT and "Traceback" not in said
    saved = int(re.search(r"preemption notice: saved step (\d+) of 60; the same command goes on", said)[1])
    assert resumed(workdir, whole(T1, *OWN), T1, *OWN) == saved
    figures("F4", injected=1, exact=1, steps_lost=0, seconds_after_a_notice=seconds)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [0, 1])
def test_f5_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, whole, figures, number):
    workdir = tmp_path / "run"
    with start(workdir, "training", T2x4) as group:
        stepped(group, workdir, 5)
        seconds, codes = ended(group, of=number)
        said = str(group)
    assert codes == [143, 143] and seconds < LIMIT and "Traceback" not in said
    saved = int(re.search(r"SIGTERM: saved step (\d+) of 60", said)[1])
    assert saved == harness.last_step(workdir) == harness.on_disk(workdir)[-1]
    assert resumed(workdir, whole(T2x4, *OWN), T2x4, *OWN) == saved
    figures("F5", injected=1, exact=1, steps_that_differ=0, seconds=seconds)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [0, 1])
def test_f5_before_the_first_step_a_signal_to_one_process_ends_all(tmp_path, figures, number):
    with harness.start(tmp_path / "run", T2x4, *OWN, env={"HALT": "compile"}) as group:
        for rank in (0, 1):
            begun(group, "Constant folding", rank)
        seconds, codes = ended(group, of=number)
        said = [group.output(rank) for rank in (0, 1)]
    assert codes == [143, 143] and seconds < LIMIT, said
    assert "SIGTERM: nothing had been computed yet" in said[number]
    assert f"process {number} (" in said[1 - number] and "SIGTERM: nothing had been computed yet" in said[1 - number]
    figures("F5", injected=1, seconds_in_compile=seconds)


@pytest.mark.nightly
@pytest.mark.parametrize("halt", ["raise 22", "callback 22"])
def test_f6_an_error_of_a_users_code_keeps_the_last_good_state(tmp_path, whole, figures, halt):
    """In what reads data, and in a function that the compiled step calls."""
    workdir = tmp_path / "run"
    with harness.start(workdir, T1, *OWN, env={"HALT": halt}) as group:
        assert group.wait(300) == [1], str(group)
        said = group.output().rstrip()
    # What stands last is the user's own error; Grain and JAX may add a note to it.
    last = said.rpartition("HookError: ")[2]
    assert "Traceback" in said and re.match(r"(batch|step) 22 is not to my liking", last) and "  File " not in last, (
        said
    )
    step = harness.on_disk(workdir)[-1]
    assert step >= 16 and resumed(workdir, whole(T1, *OWN), T1, *OWN) == step
    figures("F6", injected=1, exact=1)


@pytest.fixture
def read_only(tmp_path):
    """A folder that can't be written, by root neither."""
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("it takes root to mount")
    try:
        (tmp_path / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["run", "new/deep"])
def test_f9_a_folder_is_tried_before_it_is_used(read_only, name):
    said = f"--workdir='{read_only / name}' can't be written: Read-only file system. Choose another."
    with pytest.raises(UserError, match=said), workdir_lock(read_only / name):
        pass


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["run", "new/deep"])
def test_f9_a_folder_that_can_not_be_written_is_named_before_the_first_step(read_only, name, figures):
    workdir, begun = read_only / name, time.monotonic()
    command = [sys.executable, "train.py", f"--config={harness.TINY}", f"--workdir={workdir}"]
    done = subprocess.run(
        command, cwd=ROOT, env=harness.environment(), capture_output=True, text=True, timeout=120
    )  # fmt: skip
    seconds = time.monotonic() - begun
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    said = f"error: --workdir={str(workdir)!r} can't be written: Read-only file system. Choose another."
    assert done.stderr.strip().splitlines()[-1] == said and seconds < 60
    figures("F9", injected=1, detected=1, seconds=seconds)


HOLD = """
import sys, time, types
from pathlib import Path
from flaxmodels.runtime import exits, lock
from flaxmodels.runtime.lock import workdir_lock
def sleep(seconds):
    raise RuntimeError("it waits")
if sys.argv[2] == "second":
    lock.time = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
def main():
    with workdir_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
sys.exit(exits.reported(main, debug=False))
"""


@pytest.mark.parametrize("trials", [1, pytest.param(50, marks=pytest.mark.nightly)])
def test_f32_a_second_run_is_refused_and_a_dead_owners_lock_taken_over(tmp_path, figures, trials):
    def start(which):
        return subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), which],
            env=harness.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    passed, slowest, running = 0, 0.0, []
    try:
        for _ in range(trials):
            owner = start("owner")
            running.append(owner)
            assert owner.stdout.readline() == "held\n"  # the owner before was killed: it took over
            began, second = time.monotonic(), start("second")  # which waits for nothing: it would fail
            running.append(second)
            _, said = second.communicate(timeout=300)
            slowest = max(slowest, time.monotonic() - began)
            assert second.returncode == 2 and f"pid {owner.pid} on {socket.gethostname()}, since 2" in said, said
            owner.kill()
            owner.communicate()
            passed += 1
    finally:
        for process in running:
            process.kill()
            process.wait()
    figures("F32", injected=trials, detected=passed, seconds_to_refuse=slowest)


@pytest.mark.nightly
def test_f32_two_runs_of_one_workdir(tmp_path, whole, figures):
    """The one that is refused does no harm to the other."""
    workdir = tmp_path / "run"
    with start(workdir, "training") as group:
        stepped(group, workdir, 2)
        with harness.start(workdir, T1, *OWN) as second:
            assert second.wait(300) == [2] and "belongs to another running process" in second.output()
        sent(group)
        assert group.wait(300) == [0]
    assert harness.same(workdir, whole(T1, *OWN)) == ""
    figures("F32", injected=1, detected=1)


# A clock on the wall that jumps every half second: to yesterday, tomorrow, 1970, and around the end of summer time.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static long offset(long now) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  struct timespec at;
  real(CLOCK_MONOTONIC, &at);
  switch ((at.tv_sec * 2 + at.tv_nsec / 500000000) % 5) {
    case 0: return -86400;
    case 1: return 86400;
    case 2: return -now + 5;
    case 3: return 1761439795 - now;  /* 2025-10-26 00:49:55 UTC */
    default: return 0;
  }
}

int clock_gettime(clockid_t clock, struct timespec *at) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, at);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += offset(at->tv_sec);
  return failed;
}

int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping(tmp_path_factory):
    """The environment of a process whose clock jumps."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    library = folder / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"], check=True)
    env = {"LD_PRELOAD": str(library), "TZ": "Europe/Berlin"}
    code = "import time; seen = {time.time() // 86400 for _ in range(60) if not time.sleep(0.05)}; print(len(seen))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert int(done.stdout) >= 4, done.stderr  # it does jump
    return env


@pytest.mark.nightly
def test_f33_a_clock_that_jumps_changes_no_save_by_steps(tmp_path, whole, jumping, figures):
    flags = (*OWN, "--config.checkpoint.keep=100")
    workdir = tmp_path / "run"
    with harness.start(workdir, T1, *flags, env={"HALT": "training", **jumping}) as group:
        assert group.wait(300) == [0], str(group)
    expected = harness.on_disk(whole(T1, *flags))
    assert harness.on_disk(workdir) == expected and harness.same(workdir, whole(T1, *flags)) == ""
    figures("F33", injected=1, exact=1, saves=len(expected), saves_expected=len(expected))


@pytest.mark.nightly
def test_f33_nor_one_by_time_nor_a_time_limit(tmp_path, jumping, figures):
    """A save each second, of a run of six and more; a limit of 100 s for data; a watchdog.

    In one process: JAX's own service, between several, takes a jump that is longer than --heartbeat_timeout for death.
    """
    keys = ("checkpoint.every=0", "checkpoint.every_seconds=1.0", "checkpoint.keep=100", "checkpoint.keep_best=0")
    flags = (*OWN, *(f"--config.{key}" for key in keys), "--config.data.timeout=100.0")
    workdir = tmp_path / "run"
    with harness.start(workdir, T1, *flags, env={"HALT": "training", **jumping}) as group:
        started = begun = time.monotonic()
        while not harness.last_step(workdir) and group.running():  # the last moment at which there was no step
            begun = time.monotonic()
            assert begun < started + 300, str(group)
            time.sleep(0.005)
        assert group.wait(300) == [0], str(group)
    seconds, saves = time.monotonic() - begun, len(harness.on_disk(workdir))
    assert 2 <= saves <= seconds + 2, (saves, seconds)  # one by time at the least, and the last
    assert "Traceback" not in str(group)
    figures("F33", injected=1, saves_by_time=saves, seconds_of_run=seconds)


def child(pid):
    """The first child of a process, by its number; None where there is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.parametrize(
    "topology",
    [pytest.param(T1, marks=pytest.mark.nightly, id="T1"), pytest.param(T2x4, marks=pytest.mark.nightly, id="T2x4")],
)
def test_f14_a_supervisor_starts_the_group_again(tmp_path, whole, figures, topology):
    """kill -9 of the last child of the group; all restart, and end exactly as without."""
    workdir = tmp_path / "run"
    with start(workdir, "training", topology, "--max_restarts=3") as group:
        stepped(group, workdir, 10)
        victim, killed = child(group.processes[-1].pid), time.monotonic()
        os.kill(victim, signal.SIGKILL)
        sent(group)
        assert harness.wait_for(lambda: "resumed at step" in group.output(), 300), str(group)
        restart = time.monotonic() - killed
        assert group.wait(300) == [0] * topology.processes, str(group)
        said = [group.output(rank) for rank in range(topology.processes)]
    assert re.search("supervisor: killed by SIGKILL after .* restart 1 of 3 in 1 s", said[-1]), said[-1]
    assert re.search(r"goodput [\d.]+%: training .* in 2 attempts\nlost: .*down", said[0]), said[0]
    assert harness.same(workdir, whole(topology, *OWN)) == ""
    figures("F14", injected=1, exact=1, restart_seconds=restart)
