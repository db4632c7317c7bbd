"""Rows F14 to F18: a process of several dies, freezes, is stuck, does not come, or is another run's."""

import os
import re
import shutil
import signal
import sys
import time

import harness
import pytest
from harness import ROOT, T1, TINY, T2x4

from flaxmodels.runtime import exits

LONG = "--config.train.duration=6000"
HEARTBEAT = 6
# Seconds for a process to print and leave once it knows, on a machine that does other things as well.
LEAVING = 60


def training(group, workdir, step=10):
    """Wait till the run is at a step."""
    assert harness.wait_for(lambda: harness.last_step(workdir) >= step or not group.running(), 180), str(group)
    assert group.running(), str(group)


def seconds_to_end(group, numbers, limit):
    """Till all of these processes have ended."""
    begun = time.monotonic()
    assert harness.wait_for(lambda: all(group.codes()[n] is not None for n in numbers), limit), str(group)
    return time.monotonic() - begun


def error(group, number):
    """The one line in which a process says why it ended."""
    (line,) = [line for line in group.output(number).splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("victim", "count"),
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(0, 1, marks=pytest.mark.nightly),
        pytest.param(1, 10, marks=pytest.mark.nightly),
        pytest.param(0, 10, marks=pytest.mark.nightly),
    ],
)
def test_f14_a_process_is_killed(tmp_path, figures, victim, count):
    for number in range(count):
        workdir = tmp_path / str(number)
        with harness.start(workdir, T2x4, LONG) as group:
            training(group, workdir)
            group.kill(victim)
            took = seconds_to_end(group, [0, 1], 5 + LEAVING)
            # JAX's service goes with process 0: on a busy machine its abort may come before our message.
            aborted = group.codes()[1 - victim] == -signal.SIGABRT
            assert (aborted and victim == 0) or group.codes()[1 - victim] == exits.FAULT, str(group)
            if not aborted:
                assert f"process {victim} (" in error(group, 1 - victim) and ") died" in error(group, 1 - victim)
        figures("F14", victim=victim, seconds=took, named=not aborted)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_f14_the_same_command_goes_on_exactly(tmp_path, figures, victim):
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    with harness.start(whole, T2x4) as group:
        assert group.wait(300) == [0, 0], str(group)
    with harness.start(workdir, T2x4, program=("tests/faults/held.py", 33, tmp_path / "never")) as group:
        training(group, workdir, 30)
        group.kill(victim)
        group.wait(300)
    begun = time.monotonic()
    with harness.start(workdir, T2x4) as group:
        assert group.wait(300) == [0, 0], str(group)
    differs = harness.same(workdir, whole)
    figures("F14", victim=victim, restarted=time.monotonic() - begun, exact=not differs)
    assert differs == ""


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [1, 0])
def test_f15_a_process_is_stopped(tmp_path, figures, victim):
    workdir, other = tmp_path / "run", 1 - victim
    limits = ("--init_timeout=60", f"--heartbeat_timeout={HEARTBEAT}")
    with harness.start(workdir, T2x4, LONG, limits=limits) as group:
        training(group, workdir)
        group.kill(victim, signal.SIGSTOP)
        took = seconds_to_end(group, [other], HEARTBEAT + 5 + LEAVING)
        assert group.codes()[other] == exits.FAULT, str(group)
        assert f"process {victim} (" in error(group, other) and "has been silent for" in error(group, other)
        figures("F15", victim=victim, heartbeat=HEARTBEAT, seconds=took)
        group.kill(victim, signal.SIGCONT)  # it learns why it is alone
        seconds_to_end(group, [victim], LEAVING)
        assert group.codes()[victim] == exits.FAULT, str(group)
        assert f"process {victim} (" in error(group, victim)


@pytest.mark.nightly
@pytest.mark.parametrize("topology", [T1, T2x4], ids=lambda topology: topology.name)
def test_f15_a_run_that_is_stopped_goes_on(tmp_path, topology):
    """As a debugger does, or a laptop that sleeps."""
    workdir = tmp_path / "run"
    limits = ("--init_timeout=60", f"--heartbeat_timeout={HEARTBEAT}")
    with harness.start(workdir, topology, LONG, f"--stuck_after={HEARTBEAT}", limits=limits) as group:
        training(group, workdir)
        group.kill(None, signal.SIGSTOP)
        time.sleep(3 * HEARTBEAT)
        step = harness.last_step(workdir)
        group.kill(None, signal.SIGCONT)
        training(group, workdir, step + 20)


@pytest.mark.parametrize(
    ("where", "process", "topology", "after"),
    [
        pytest.param("data", 1, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("data", 0, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("step", 1, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("step", 0, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("lock", 1, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("lock", 0, T1, 5, marks=pytest.mark.nightly),
        pytest.param("evaluation", 1, T2x4, 5, marks=pytest.mark.nightly),
        pytest.param("data", 1, T2x4, None, marks=pytest.mark.nightly),
        pytest.param("data", 0, T1, None, marks=pytest.mark.nightly),
    ],
)
def test_f16_a_process_is_stuck(tmp_path, figures, where, process, topology, after):
    workdir, limit = tmp_path / "run", [] if after is None else [f"--stuck_after={after}"]
    program = ("tests/faults/stuck.py", process, where)
    with harness.start(workdir, topology, LONG, "--config.data.placement=host", *limit, program=program) as group:
        assert harness.wait_for(lambda: "stuck: " in group.output(process), 180), str(group)
        took = seconds_to_end(group, range(topology.processes), 60)
        assert set(group.codes()) == {exits.STUCK}, str(group)
        for number in range(topology.processes):
            who = f"process {process} (" if topology.processes > 1 else "this process "
            assert error(group, number).startswith(who) and "is stuck in phase" in error(group, number)
            stacks = (workdir / f"stacks.{number}.txt").read_text()
            for text in (stacks, group.output(number)):  # of all threads
                assert len(re.findall("(?m)^(Current thread|Thread) 0x", text)) >= 3
                assert bool(re.search(r'stuck\.py", line \d+ in stop', text)) == (number == process)
    figures("F16", where=where, process=process, limit=after, seconds=took)


def started(tmp_path, *each, env=None):
    """Processes on tiny.py, each with flags of its own and, in `env`, an environment."""
    words = [sys.executable, "-P", "train.py", f"--config={TINY}", f"--workdir={tmp_path / 'run'}"]
    base = harness.environment(T2x4, env)
    return harness.Group([[*words, *map(str, flags)] for flags in each], tmp_path / "run.out", base)


def place(process, port, count=2, limit=2.0):
    return (
        f"--coordinator_address=localhost:{port}",
        f"--num_processes={count}",
        f"--process_id={process}",
        f"--init_timeout={limit}",
    )


@pytest.mark.slow
def test_f17_the_others_do_not_come(tmp_path, figures):
    """The wrong port: process 0 waits for another that waits for process 0 elsewhere."""
    ports = harness.free_port(), harness.free_port()
    with started(tmp_path, place(0, ports[0]), place(1, ports[1])) as group:
        begun = time.monotonic()
        assert group.wait(300) == [exits.FAULT] * 2, str(group)
        took = time.monotonic() - begun
    assert error(group, 0).startswith("1 of 2 processes did not come within 2 s: 1. Here: 0 on ")
    assert error(group, 1).startswith(f"process 1 of 2 could not reach process 0 at localhost:{ports[1]} within 2 s: ")
    figures("F17", case="wrong port, or none comes", init_timeout=2.0, seconds=took)


@pytest.mark.nightly
def test_f17_another_count(tmp_path, figures):
    port = harness.free_port()
    with started(tmp_path, place(0, port, 2, 60.0), place(1, port, 3, 60.0)) as group:
        assert group.wait(300) == [exits.BAD_INPUT] * 2, str(group)
    assert error(group, 0) == error(group, 1)
    assert "was started with --num_processes=3, process 0 with 2" in error(group, 0)
    figures("F17", case="wrong count")


@pytest.mark.nightly
def test_f17_process_0_dies_before_all_have_come(tmp_path, figures):
    port = harness.free_port()
    each = (place(0, port, 3, 60.0), place(1, port, 3, 15.0))
    with started(tmp_path, *each) as group:
        time.sleep(8)  # both wait for process 2
        group.kill(0)
        assert group.wait(300) == [-signal.SIGKILL, exits.FAULT], str(group)
    assert "process 1 of 3 could not reach process 0" in error(group, 1)
    figures("F17", case="process 0 dies before all have come")


@pytest.mark.slow
def test_f18_another_config(tmp_path, figures):
    workdir = tmp_path / "run"
    other = ["--config.optim.learning_rate=0.001"]
    with harness.start(workdir, T2x4, each=lambda rank: other if rank else ()) as group:
        begun = time.monotonic()
        assert group.wait(300) == [exits.BAD_INPUT] * 2, str(group)
    for number in (0, 1):
        assert error(group, number).startswith("process 1 (")
        assert "optim.learning_rate=0.001, there 0.003" in error(group, number)
    assert harness.last_step(workdir) == 0
    figures("F18", case="config", seconds=time.monotonic() - begun)


@pytest.mark.nightly
def test_f18_other_code(tmp_path, figures):
    shutil.copytree(ROOT / "flaxmodels", tmp_path / "code" / "flaxmodels")
    with (tmp_path / "code/flaxmodels/losses.py").open("a") as file:
        file.write("# a comment\n")
    port, workdir = harness.free_port(), tmp_path / "run"
    environments = [harness.environment(T2x4)] * 2
    environments[1] = environments[1] | {
        "PYTHONPATH": f"{tmp_path / 'code'}{os.pathsep}{environments[1]['PYTHONPATH']}"
    }
    words = [sys.executable, "-P", "train.py", f"--config={TINY}", f"--workdir={workdir}"]
    groups = [
        harness.Group([[*words, *place(rank, port, 2, 60.0)]], tmp_path / f"out{rank}", environments[rank])
        for rank in (0, 1)
    ]
    with groups[0], groups[1]:
        codes = [group.wait(300) for group in groups]
    assert codes == [[exits.BAD_INPUT]] * 2, f"{groups[0]}{groups[1]}"
    for group in groups:
        assert "file flaxmodels/losses.py differs" in error(group, 0)
    figures("F18", case="code")
