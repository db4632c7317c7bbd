"""What each process of a run prints is kept: whole lines, bounded, over restarts, and never at the cost of training."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from flaxmodels.runtime import host_log, watchdog
from flaxmodels.runtime.host_log import Copied, HostLog

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "


def lines(file):
    """Of a log, without their times; every one has one."""
    found = file.read_text().splitlines()
    assert all(re.match(TIME, line) for line in found), found
    return [line[25:] for line in found]


def test_whole_lines_with_times(tmp_path):
    log, stream = HostLog(host_log.path(tmp_path, 3)), io.StringIO()
    copy = Copied(stream, log)
    assert copy.write("one\ntw") == 6 and lines(log.file) == ["one"]
    copy.writelines(["o\n", "\n", "three"])
    assert lines(log.file) == ["one", "two", ""]
    copy.rest(), copy.rest()
    assert lines(log.file) == ["one", "two", "", "three"] and stream.getvalue() == "one\ntwo\n\nthree"
    assert log.file == tmp_path / "logs/host-0003.log"
    log.close()
    copy.write("again \ud800\n")  # opens it again; what is no text is written so that it can be seen
    assert lines(log.file)[4:] == [r"again \ud800"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("\x1b[1mbold\x1b[0m", "bold"),
        ("step 1\rstep 2\r\x1b[2Kstep 3", "step 3"),
        ("from Windows\r", "from Windows"),
        ("\x1b[?25h\x1b]0;title\x07done", "done"),
    ],
)
def test_what_a_terminal_would_show(said, kept):
    assert host_log.plain(said) == kept


def test_a_line_without_an_end_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(host_log, "LONGEST", 10)
    log = HostLog(tmp_path / "log")
    copy = Copied(io.StringIO(), log)
    copy.write("x" * 25)
    assert lines(log.file) == ["x" * 10] * 2
    copy.rest()
    assert lines(log.file)[2] == "x" * 5


def test_its_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(host_log, "MOST", 1000)
    log = HostLog(host_log.path(tmp_path, 0))
    for number in range(100):
        log.write([f"line {number}"])
        sizes = [file.stat().st_size for file in log.file.parent.iterdir()]
        assert len(sizes) <= 2 and sum(sizes) < 2200
    assert log.old.name == "host-0000.old.log"
    kept = lines(log.old) + lines(log.file)
    assert kept == [f"line {number}" for number in range(100 - len(kept), 100)] and len(kept) > 25


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(host_log, "PAUSE", 0.0)
    log, stream = HostLog(Path("/dev/full")), io.StringIO()
    copy = Copied(stream, log)
    copy.write("lost\n")
    assert stream.getvalue() == "lost\n" and log.lost == 30
    monkeypatch.setattr(host_log, "PAUSE", 1000.0)
    copy.write("lost\n")
    log.file = tmp_path / "log"
    copy.write("not tried so soon\n")
    assert not log.file.exists() and log.lost > 60
    log._next = 0.0
    copy.write("there\n")
    first, second = log.file.read_text().splitlines()
    assert re.fullmatch(r"\.\.\. \d+ bytes are missing here: there was no room for them", first)
    assert second.endswith("Z there") and log.lost == 0
    log = HostLog(tmp_path / "log/no folder")
    log.write(["there is a file where the folder should be"])
    assert log.lost > 0


def test_from_many_threads(tmp_path):
    log = HostLog(tmp_path / "log")
    copy = Copied(io.StringIO(), log)
    threads = [threading.Thread(target=lambda: [copy.write("a line\n") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines(log.file) == ["a line"] * 200


def test_where_all_threads_stand_is_in_it(tmp_path, monkeypatch):
    log = HostLog(tmp_path / "log")
    monkeypatch.setattr(host_log, "_current", log)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    watchdog.dump(0, None)
    text = log.file.read_text()
    assert "where all threads stand:" in text and "test_where_all_threads_stand_is_in_it" in text


SCRIPT = """
import os, pathlib, sys, threading, warnings
from flaxmodels.runtime import exits, host_log
how = sys.argv[1]
host_log.keep(pathlib.Path(sys.argv[2]), 1, 4)
print("on stdout")
if how == "error":
    warnings.warn("a warning")
    def fail():
        raise ValueError("in a thread")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    if not (child := os.fork()):
        print("in a child", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    raise KeyError("uncaught")
print("half a line", end="")
exits.leave(exits.FaultError("left at once"))
"""


def test_last_words_of_any_kind(tmp_path):
    for how, code in (("error", 1), ("leave", 1)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, how, str(tmp_path)], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code and "on stdout" in done.stdout, done.stderr
    said = lines(host_log.path(tmp_path, 1))
    second = next(number for number, line in enumerate(said) if number and line.startswith("=== process"))
    first, last = said[:second], said[second:]
    assert re.fullmatch(r"=== process 1 of 4, .*, pid \d+: -c error .*", first[0])
    for part in ("on stdout", "in a child", "ValueError: in a thread", "KeyError: 'uncaught'"):
        assert part in first, first
    assert any("UserWarning: a warning" in line for line in first) and first[-1] == "=== ends"
    assert last[1:] == ["on stdout", "error: left at once", "half a line", "=== ends"]


RUN = """
import argparse, pathlib, sys
from flaxmodels.registry import UserError
from flaxmodels.runtime import distributed, exits, peers, place
parser = argparse.ArgumentParser()
place.add_flags(parser)
parser.add_argument("--debug", action="store_true")
workdir, *words = sys.argv[1:]
flags = parser.parse_args(words)
def main():
    with distributed.joined(flags, pathlib.Path(workdir)):
        print("together")
        if flags.process_id == 1:
            raise exits.FaultError("broke here")
        peers.settle("")
sys.exit(exits.reported(main, debug=False))
"""


@pytest.mark.slow
def test_each_process_of_a_run_keeps_its_own(tmp_path):
    from faults.harness import T2x4, environment, free_port, wait_for

    address = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2", "--init_timeout=60"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), *address, f"--process_id={rank}"], env=environment(T2x4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert wait_for(lambda: all(process.poll() is not None for process in running), 100)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [1, 1]
    first, second = (lines(host_log.path(tmp_path, rank)) for rank in range(2))
    assert "together" in first and any("process 1" in line and "broke here" in line for line in first), first
    assert "together" in second and "error: broke here" in second and second[-1] == "=== ends", second
