"""A parent that starts the same command again after a fault, and the account of lost time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, goodput, progress, supervisor

# A "run" that does what a list of words says, one an attempt: "save 4", "exit 1", "kill 9", "sleep 60".
COMMAND = """
import os, signal, sys, time
from pathlib import Path
from flaxmodels.runtime import exits, supervisor
supervisor.PAUSE = 0.01

def main(argv):
    (workdir,) = [Path(word.partition("=")[2]) for word in argv if word.startswith("--workdir=")]
    workdir.mkdir(exist_ok=True)
    with (workdir / "log").open("a") as log:
        log.write(f"{os.getpid()} {os.getppid()} {sys.flags.optimize} {' '.join(sys.argv[1:])}\\n")
    attempt = len((workdir / "log").read_text().splitlines())
    for word in (workdir / "script").read_text().splitlines()[attempt - 1].split(";"):
        what, number = word.split()
        if what == "save":
            step = workdir / "checkpoints" / number
            step.mkdir(parents=True)
            (step / "MANIFEST.json").write_text("{}")
        elif what == "exit":
            return int(number)
        elif what == "kill":
            os.kill(os.getpid(), int(number))
        elif what == "listen":
            for caught in (signal.SIGTERM, signal.SIGINT):
                signal.signal(caught, lambda came, frame: sys.exit(128 + came))
            (workdir / "listens").touch()
            time.sleep(60)
        else:
            time.sleep(float(number))
    return 0

sys.exit(exits.reported(lambda: supervisor.run(main, sys.argv[1:]), debug=False))
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "run").mkdir()

    def start(*script, flag=("--max_restarts=9",)):
        (tmp_path / "run" / "script").write_text("\n".join(script))
        return subprocess.Popen(
            [sys.executable, "-O", "command.py", *flag, f"--workdir={tmp_path / 'run'}", "--max", "x y"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def ended(process):
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def log(tmp_path):
    return [line.split(" ", 3) for line in (tmp_path / "run" / "log").read_text().splitlines()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("flag", [("--max_restarts=9",), pytest.param(("--max_restarts", "9"), marks=pytest.mark.slow)])
def test_a_fault_starts_the_same_command_again(command, tmp_path, flag):
    code, err = ended(command("save 4;kill 9", "save 8;exit 1", "save 12;exit 75", "exit 0", flag=flag))
    assert code == 0
    lines = log(tmp_path)
    assert len(lines) == 4 and len({pid for pid, *_ in lines}) == 4 and len({parent for _, parent, *_ in lines}) == 1
    for _, _, optimize, words in lines:
        assert optimize == "1" and words == f"--workdir={tmp_path / 'run'} --max x y"
    said = err.splitlines()
    assert "killed by SIGKILL after" in said[0] and "newest step on disk is 4: restart 1 of 9 in 0.01 s" in said[0]
    assert "failed after" in said[1] and "is 8: restart 2 of 9 in" in said[1]
    assert "stuck after" in said[2] and len(said) == 3


@pytest.fixture
def scripted(monkeypatch, capsys, tmp_path):
    """Supervise without processes: scripted(most, (code, newest step), ...) -> (code, attempts, what it said)."""

    def run(most, *script):
        made = []

        def attempt(command, workdir, asked):
            made.append(command)
            return script[len(made) - 1][0], 1.0

        monkeypatch.setattr(supervisor, "PAUSE", 0.001)
        monkeypatch.setattr(supervisor, "_attempt", attempt)
        monkeypatch.setattr(supervisor, "newest", lambda workdir: script[len(made) - 1][1] if made else 0)
        return supervisor._supervise(["command"], tmp_path, most), len(made), capsys.readouterr().err.splitlines()

    return run


def test_it_gives_up_after_that_many(scripted):
    code, attempts, said = scripted(2, (-11, 1), (-11, 2), (-11, 3))
    assert (code, attempts) == (128 + signal.SIGSEGV, 3)
    assert "killed by SIGSEGV" in said[-1] and "gave up, --max_restarts=2. What was wrong stands above." in said[-1]


def test_it_gives_up_where_nothing_moves(scripted):
    code, attempts, said = scripted(9, (1, 1), (1, 2), *[(1, 2)] * 5)
    assert (code, attempts) == (1, 5)
    assert [line.rpartition(" in ")[2] for line in said[:-1]] == ["0.001 s", "0.001 s", "0.002 s", "0.004 s"]
    assert "the newest step on disk is 2: gave up, as before the last 3 restarts" in said[-1]
    assert scripted(9, *[(1, 0)] * 9)[:2] == (1, 4)
    assert scripted(9, *[(1, 0)] * 3, (1, 4), *[(1, 4)] * 2, (0, 8))[:2] == (0, 7)  # it did move, now and then


def test_what_is_no_fault_is_not_started_again(scripted):
    for code in (0, 2, 130, 143, 141, 3):
        assert scripted(9, (code, 0), (0, 0)) == (code, 1, [])
    assert scripted(9, (-15, 0), (0, 0)) == (143, 1, [])
    assert scripted(9, (-2, 0), (0, 0)) == (130, 1, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_signals_are_passed_on(command, tmp_path, number):
    process = command("listen 1", "exit 0")
    wait_for((tmp_path / "run" / "listens").exists)
    process.send_signal(number)
    assert ended(process) == (128 + number, "") and len(log(tmp_path)) == 1


@pytest.mark.slow
def test_a_signal_ends_the_wait_before_a_restart(command, tmp_path):
    file = tmp_path / "command.py"
    file.write_text(COMMAND.replace("PAUSE = 0.01", "PAUSE = 60.0"))
    process = command("exit 1", "exit 0")
    assert "restart 1 of 9 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "") and len(log(tmp_path)) == 1


@pytest.mark.slow
def test_no_child_outlives_it(command, tmp_path):
    process = command("sleep 60")
    wait_for(lambda: (tmp_path / "run" / "log").exists() and log(tmp_path))
    child = int(log(tmp_path)[0][0])
    process.kill()
    ended(process)

    def dead():
        try:
            return "State:\tZ" in Path(f"/proc/{child}/status").read_text()
        except OSError:
            return True

    wait_for(dead)


def test_without_the_flag_it_is_not_there():
    seen = []
    assert supervisor.run(lambda argv: seen.append(argv) or 7, ["--workdir=x", "--config.max_restarts=3"]) == 7
    assert supervisor.run(lambda argv: seen.append(argv) or 7, ["--max_restarts=0"]) == 7
    assert seen == [["--workdir=x", "--config.max_restarts=3"], ["--max_restarts=0"]]


@pytest.mark.parametrize("text", ["x", "-1", "1.5", ""])
def test_a_number_that_is_none(capsys, text):
    with pytest.raises(SystemExit) as error:
        supervisor.run(lambda argv: 0, [f"--max_restarts={text}"])
    assert error.value.code == 2 and "expected an integer, at least 0" in capsys.readouterr().err


def test_words_that_did_not_start_this_process():
    with pytest.raises(UserError, match="--max_restarts starts the command line of this process again"):
        supervisor.run(lambda argv: 0, ["--max_restarts=2", "--workdir=elsewhere"])


def test_where_a_run_writes():
    assert supervisor.default_workdir("configs/digits_mlp.py:small") == Path("runs/digits_mlp")


def test_the_newest_step_is_a_committed_one(tmp_path):
    assert supervisor.newest(tmp_path) == 0
    for name in ("4", "12", "16", "8.tmp", "deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("4", "12", "8.tmp", "deleted"):
        (tmp_path / "checkpoints" / name / "MANIFEST.json").touch()
    assert supervisor.newest(tmp_path) == 12


def attempt(began, first, last, ended, back=0, boot="b", time=0.0, **phases):
    phases = dict.fromkeys(progress.PHASES, 0.0) | phases
    return dict(
        host="h", pid=1, boot=boot, time=time, began=began, first=first, back=back, last=last, ended=ended,
        seconds=sum(phases.values()), phases=phases,
    )  # fmt: skip


def test_lost_time_by_cause():
    """A quarter of the steps of the first attempt is made again: of 80 s of training, and of 8 s of evaluation."""
    rows = [
        attempt(0.0, 0, 40, -9, start=10.0, training=80.0, evaluation=8.0, save=2.0),
        attempt(105.0, 30, 50, 75, start=5.0, compile=5.0, training=40.0, restore=1.0),
        attempt(163.0, 50, 100, None, start=10.0, training=100.0, end=3.0),
    ]
    assert goodput.account(rows) == [
        "goodput 74.6%: training 200.0 s and evaluation 6.0 s of 276.0 s, in 3 attempts",
        "lost: starting 25.0 s, redone steps 22.0 s, down 12.0 s, compiling 5.0 s, ending 3.0 s, saving 2.0 s, "
        "restoring 1.0 s; steps made again: 10",
        "attempts before this one: 1 killed by SIGKILL, 1 stuck",
    ]
    assert goodput.account(rows[:1]) == goodput.account([]) == []


def test_time_that_someone_wanted_is_not_lost():
    for ended, down in [(0, False), (2, False), (130, False), (143, True), (None, True), (1, True), (-6, True)]:
        rows = [attempt(0.0, 0, 4, ended, training=1.0), attempt(9.0, 4, 8, 1, training=1.0)]
        assert bool(goodput.account(rows)) == down  # without a fault there is nothing to tell
        lines = goodput.account([*rows, attempt(10.0, 8, 12, 0, training=1.0)])
        assert ("down 8.0 s" in lines[1]) == down and "steps made again: 0" in lines[1]
        assert lines[0].startswith("goodput 27.3%" if down else "goodput 100.0%")


def test_between_two_machines_the_clock_on_the_wall_counts_and_never_backwards():
    first = attempt(500.0, 0, 4, 1, training=2.0, time=1000.0)
    for boot, began, time_, down in [("b", 510.0, 5.0, 8.0), ("c", 3.0, 1010.0, 8.0), ("c", 3.0, 900.0, 0.0)]:
        assert goodput._between(first, attempt(began, 4, 8, 0, boot=boot, time=time_)) == down


def test_steps_made_again_more_than_once():
    """0 to 10, 8 to 9, one that never began to train, 8 to 20: 3 steps were made twice."""
    rows = [attempt(0.0, 0, 10, -9), attempt(0.0, 8, 9, -9), attempt(0.0, None, None, 1), attempt(0.0, 8, 20, 0)]
    assert "steps made again: 3" in goodput.account(rows)[1]
    assert "steps made again: 0" in goodput.account([attempt(0.0, 4, None, 1), attempt(0.0, 4, 8, 0)])[1]


def test_a_run_that_went_back_made_steps_again():
    """0 to 30, back to 20, on to 35: 45 steps were made. The next goes on from 32: 13 of them count for nothing."""
    rows = [attempt(0.0, 0, 35, -9, back=10, training=45.0), attempt(45.0, 32, 40, 0, training=8.0)]
    assert goodput.account(rows)[0].startswith("goodput 75.5%: training 40.0 s of 53.0 s")
    assert "redone steps 13.0 s; steps made again: 13" in goodput.account(rows)[1]


def test_the_line_of_an_attempt_is_kept_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "EVERY", 0.01)
    progress.reset()
    with goodput.recorded(tmp_path) as kept:
        assert goodput.read(tmp_path) == []  # a run that fails before it begins leaves nothing
        kept.start(8)
        with progress.phase("training"):
            progress.beat(11)
            wait_for(lambda: [row["last"] for row in goodput.read(tmp_path)] == [11])
            time.sleep(0.05)
            wait_for(lambda: goodput.read(tmp_path)[0]["phases"]["training"] >= 0.05)
            kept.start(9)
            wait_for(lambda: goodput.read(tmp_path)[0]["back"] == 2)
        (row,) = goodput.read(tmp_path)
        assert (row["first"], row["ended"], row["pid"]) == (8, None, os.getpid())
        assert kept.end(143) == [] == kept.end(0)
    assert [row["ended"] for row in goodput.read(tmp_path)] == [143]
    with pytest.raises(KeyError), goodput.recorded(tmp_path) as kept:
        kept.start(8)
        raise KeyError
    rows = goodput.read(tmp_path)
    assert [row["ended"] for row in rows] == [143, 1]
    assert all(abs(sum(row["phases"].values()) - row["seconds"]) < 0.01 for row in rows)  # of milliseconds each
    assert len(goodput.summary(tmp_path)) == 3 and not list(tmp_path.glob("*.tmp"))
    with goodput.recorded(None) as kept:
        kept.start(3)
        assert kept.end(0) == []


def test_how_an_attempt_ended_is_added_by_who_saw_it(tmp_path):
    rows = [attempt(0.0, 0, 4, None) | {"host": goodput.socket.gethostname(), "pid": pid} for pid in (5, 6)]
    (tmp_path / goodput.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half": ')
    goodput.close(tmp_path, 5, -9)
    goodput.close(tmp_path, 6, -9)
    goodput.close(tmp_path, 6, 1)
    assert [row["ended"] for row in goodput.read(tmp_path)] == [None, -9]
    goodput.close(tmp_path / "none", 6, 1)


def test_an_account_that_can_not_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    with goodput.recorded(tmp_path / "file") as kept:
        kept.start(0)
        assert kept.end(0) == []


def test_endings():
    said = [goodput.ending(code) for code in (0, 1, 2, 75, 130, 143, -9, -6, None, 77)]
    assert said == [
        "done", "failed", "bad input", "stuck", "stopped by SIGINT", "stopped by SIGTERM", "killed by SIGKILL",
        "killed by SIGABRT", "cut off", "ended with code 77",
    ]  # fmt: skip
    assert exits.STUCK == 75
