"""A rehearsal passes with real processes; one that is late, stopped or dead is named, and nothing is left behind."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT

from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.verify import actor, rehearse
from flaxmodels.verify import crew as crews
from flaxmodels.verify.crew import Crew

PRELUDE = """
import faulthandler, json, os, signal, sys, time
file = open(sys.argv[1], "a", buffering=1)
stacks = open(sys.argv[1].replace(".reports", ".stacks"), "w")
faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
def say(**line):
    file.write(json.dumps(line) + "\\n")
say(phase="one"); say(phase="one", found={"number": int(sys.argv[2])}); say(phase="two")
"""
FINISHES = 'say(phase="two", found={})'


def crew(tmp_path, *endings):
    """Processes that finish phase "one", begin "two", and then each do something else."""
    commands = []
    for number, ending in enumerate(endings):
        script = tmp_path / str(number) / "jax" / "script.py" if "waits" in ending else tmp_path / f"{number}.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(PRELUDE + ending)
        commands.append([sys.executable, "-S", str(script), "{reports}", str(number)])
    return Crew(commands, tmp_path / "crew", dict(os.environ))


def until(condition):
    """Wait for it, however slow the machine is."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ready(started):
    """Wait till all processes stand where their endings put them: in phase "two", after it, or stopped."""
    for number, pid in enumerate(started.pids):
        ending = Path(started._commands[number][2]).read_text().removeprefix(PRELUDE)
        until(lambda number=number: any(line["phase"] == "two" for line in started.reports(number)))
        if ending == FINISHES:
            until(lambda number=number: "found" in started.reports(number)[-1])
        if "SIGSTOP" in ending:
            until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


@pytest.fixture
def patient(monkeypatch):
    """A process may take its time to say where it stands, and to end."""
    monkeypatch.setattr(crews, "ANSWER", 60.0)
    monkeypatch.setattr(crews, "GRACE", 60.0)


def gone(pids):
    """Whether no such process is left."""
    deadline = time.monotonic() + 60
    while (left := any(Path(f"/proc/{pid}").exists() for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def test_what_each_found_comes_in_order(tmp_path):
    with crew(tmp_path, FINISHES, FINISHES, FINISHES) as started:
        assert [found["number"] for found in started.wait("one", 60)] == [0, 1, 2]
        assert started.wait("two", 60) == [{}, {}, {}]
        started.end(60)


@pytest.mark.usefixtures("patient")
def test_the_late_one_is_named_and_all_are_killed(tmp_path):
    with crew(tmp_path, "time.sleep(600)  # waits", "print('my words')\ntime.sleep(600)", FINISHES) as started:
        ready(started)
        with pytest.raises(FaultError) as error:
            started.wait("two", 0.5)
        pids = started.pids
    first, second, *_ = str(error.value).splitlines()
    assert first.startswith(f"process 1 of 3 (pid {pids[1]}, in phase 'two') is late, after 0.5 s: it stands at")
    assert "1.py" in first and second == "waiting for it: process 0"
    assert gone(pids)


@pytest.mark.usefixtures("patient")
def test_where_all_wait_all_are_named(tmp_path):
    with crew(tmp_path, "time.sleep(600)  # waits", "time.sleep(600)  # waits") as started:
        ready(started)
        with pytest.raises(FaultError, match=r"(?s)process 0 of 2 .* is late.*process 1 of 2 .* is late"):
            started.wait("two", 0.2)


@pytest.mark.usefixtures("patient")
def test_a_stopped_one_is_named(tmp_path):
    with crew(tmp_path, "time.sleep(600)  # waits", "os.kill(os.getpid(), signal.SIGSTOP)") as started:
        ready(started)
        with pytest.raises(FaultError, match=r"process 1 of 2 .*: it is stopped\nwaiting for it: process 0"):
            started.wait("two", 0.5)
        pids = started.pids
    assert gone(pids)


@pytest.mark.usefixtures("patient")
def test_a_failed_one_is_named_with_its_last_words(tmp_path):
    words = r"(?s)process 1 of 2 .*in phase 'two'\) left with code 3:\n    last words"
    endings = "time.sleep(0.3); os.abort()", "print('last words'); sys.exit(3)"
    with crew(tmp_path, *endings) as started, pytest.raises(FaultError, match=words):
        started.wait("two", 60)


def test_an_end_with_an_error_is_an_error(tmp_path):
    words = r"process 1 of 2 .*after phase 'two'.* left with code 5"
    with crew(tmp_path, FINISHES, FINISHES + "; sys.exit(5)") as started, pytest.raises(FaultError, match=words):
        started.end(60)
    with crew(tmp_path / "again", FINISHES, FINISHES + "\ntime.sleep(600)") as started:
        started.wait("two", 60)
        with pytest.raises(FaultError, match=r"process 1 of 2 .*after phase 'two'.* is late"):
            started.end(0.5)


@pytest.mark.slow
def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    child = f"""
        import sys, time
        from pathlib import Path
        from flaxmodels.verify.crew import Reports
        with Reports(Path({str(tmp_path / "child.reports")!r})).phase("one"):
            time.sleep(600)
    """
    parent = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    command = [sys.executable, "-S", "-c", parent, sys.executable, "-c", textwrap.dedent(child)]
    started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        file = tmp_path / "child.reports"
        while not (file.exists() and '"one"' in file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True)
        pids = [int(pid) for pid in found.stdout.split()]
        started.kill()
        started.wait()
        assert len(pids) == 1 and gone(pids)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def rows(*places, bits="a"):
    return [{str(place): bits for place in places}]


def batch(*found):
    return [{"rows": each, "batch_size": 4} for each in found]


JUDGES = rehearse._judges(steps=4, tolerance=1e-5)
LOSSES = {"1": 4.0, "2": 3.0, "3": 2.0, "4": 1.0}
TRAINED = {"step": 4, "params": {"w": "bits"}, "losses": LOSSES}
EVALUATED = {"metrics": {"loss": 2.0}, "count": 10.0, "size": 10, "batch": 4}
WELL = [
    ("start", [{"devices": [4, 2]}] * 2, {}),
    ("batches", batch(rows(0, 1), rows(2, 3)), {}),
    ("batches", batch(rows(0, 1, 2, 3), rows(0, 1, 2, 3)), {}),
    ("batches", batch(rows(0, 1, 2, 3)), {"batches": batch(rows(0, 1), rows(2, 3))}),
    ("train", [TRAINED, TRAINED], {}),
    ("checkpoint", [{"steps": [2, 4], "writers": 2}] * 2, {}),
    ("evaluation", [EVALUATED] * 2, {}),
    ("evaluation", [EVALUATED | {"batch": 3, "metrics": {"loss": 2.000001}}], {"evaluation": [EVALUATED]}),
    ("restore", [{"params": {"w": "bits"}}] * 2, {"train": [TRAINED]}),
    ("resume", [{"step": 4, "losses": LOSSES | {"4": 1.000001}}], {"train": [TRAINED]}),
]
BAD = [
    ("start", [{"devices": [2, 2]}] * 2, {}),  # each for itself
    ("batches", batch(rows(0, 1), rows(2)), {}),  # a row that nobody has
    ("batches", batch(rows(0, 1, 2), rows(2, 3, bits="b")), {}),  # two have it, with other bits
    ("batches", batch(rows(0, 1, 2, 3, bits="b")), {"batches": batch(rows(0, 1), rows(2, 3))}),
    ("train", [TRAINED, TRAINED | {"params": {"w": "other"}}], {}),
    ("train", [TRAINED, TRAINED | {"step": 3}], {}),
    ("train", [TRAINED | {"losses": LOSSES | {"3": math.nan}}], {}),
    ("train", [TRAINED | {"losses": {"4": 1.0}}], {}),
    ("checkpoint", [{"steps": [2, 4], "writers": 2}, {"steps": [2], "writers": 2}], {}),
    ("evaluation", [EVALUATED, EVALUATED | {"count": 9.0}], {}),
    ("evaluation", [EVALUATED | {"count": 12.0}], {"evaluation": [EVALUATED]}),
    ("evaluation", [EVALUATED | {"metrics": {"loss": 2.1}}], {"evaluation": [EVALUATED]}),
    ("restore", [{"params": {"w": "bits"}}, {"params": {"w": "other"}}], {"train": [TRAINED]}),
    ("resume", [{"step": 4, "losses": LOSSES | {"3": 2.1}}], {"train": [TRAINED]}),
    ("resume", [{"step": 4, "losses": {"1": 4.0, "2": 3.0, "3": 2.0}}], {"train": [TRAINED]}),
    ("resume", [{"step": 4, "losses": LOSSES | {"4": math.nan}}], {"train": [TRAINED]}),
]


@pytest.mark.parametrize(("phase", "found", "before"), WELL)
def test_what_is_well_passes(phase, found, before):
    passed, said = JUDGES[phase](found, before)
    assert passed and said


@pytest.mark.parametrize(("phase", "found", "before"), BAD)
def test_what_is_wrong_does_not(phase, found, before):
    assert not JUDGES[phase](found, before)[0]


def test_a_loss_that_is_no_number_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "train/loss": "NaN"}\n')
    found = actor.losses(tmp_path)
    assert found[1] == 2 and math.isnan(found[2])
    trained = TRAINED | {"losses": {"1": 2.0, "2": 2.0, "3": 2.0, "4": found[2]}}
    assert JUDGES["train"]([trained] * 2, {}) == (False, "4 steps, loss 2.0000 to nan")


def test_the_last_evaluation_batch_is_padded_where_it_can_be():
    for examples, size, devices in [(364, 64, 8), (256, 64, 8), (256, 16, 4), (100, 10, 2), (97, 8, 8), (8, 512, 8)]:
        found = actor.uneven(examples, size, devices)
        assert examples % found and (found == size or found % devices == 0)
    assert actor.uneven(64, 4, 4) == 4  # nothing else that four devices divide


def test_a_shortened_config_keeps_what_is_trained():
    written = {"model": {"name": "mlp", "dtype": "bfloat16"}, "optim": {"name": "adam", "warmup": 500}, "seed": 3}
    written |= {
        "data": {"name": "digits", "batch_size": 64, "workers": 2},
        "train": {"duration": "9 epochs", "mode": "max"},
    }
    found = actor.shortened(written, 6)
    assert found["train"] == {"duration": 6, "mode": "max", "log_every": 1, "eval_every": 0, "patience": 0}
    assert found["optim"] == {"name": "adam", "warmup": 0} and found["seed"] == 3
    assert found["model"]["dtype"] == "float32" and found["checkpoint"]["every"] == 3
    assert written["optim"]["warmup"] == 500 and "workers" in written["data"]


@pytest.mark.parametrize(
    "wrong", [dict(hosts=1), dict(devices_per_host=0), dict(steps=5), dict(steps=0), dict(limit=-1)]
)
def test_numbers_that_can_not_be(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        rehearse.run([], **wrong, show=lambda _: None)


CONFIG = """
def get_config():
    return dict(
        model=dict(name={model!r}),
        data=dict(name="synthetic_images", examples=128, test_examples=40, batch_size=16),
        optim=dict(name="adam", learning_rate=1e-2, warmup=500),
        mesh=dict(data=2, fsdp=2),
        train=dict(duration="9 epochs"),
    )
"""
SLEEPER = """
import time
import flax.linen as nn
import jax

class Sleeper(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        while jax.process_index() == 1:
            time.sleep(1)
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))
"""


@pytest.mark.slow
def test_two_hosts_pass(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(model="mlp"))
    lines = rehearse.run(
        [f"--config={tmp_path / 'config.py'}", "--config.model.hidden=(64,)"],
        hosts=2, devices_per_host=2, steps=4, limit=120, folder=tmp_path / "kept",
    )  # fmt: skip
    assert all(line.passed for line in lines), [str(line) for line in lines]
    phases = [(line.scene, line.phase) for line in lines]
    assert phases[:2] == [("2 x 2", "start"), ("2 x 2", "batches")] and phases[-1] == ("1 x 1", "leave")
    assert {scene for scene, _ in phases} == {"2 x 2", "1 x 4", "1 x 1"}
    said = {line.phase: line.said for line in lines if line.scene == "2 x 2"}
    assert said["batches"] == "8 of 16 rows on a host" and said["evaluation"].endswith("40 targets counted")
    assert (tmp_path / "kept" / "workdir" / "checkpoints" / "4").is_dir()


@pytest.mark.nightly
def test_a_process_that_sleeps_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "config.py").write_text(CONFIG.format(model="sleeper:Sleeper"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []
    monkeypatch.setattr(Crew, "__exit__", lambda crew, *error: (started.extend(crew.pids), crew._kill())[1])
    lines = rehearse.run(
        [f"--config={tmp_path / 'config.py'}"], hosts=2, devices_per_host=2, limit=12, show=lambda _: None
    )
    assert [line.passed for line in lines] == [True, False], [str(line) for line in lines]
    said = lines[-1].said.splitlines()
    assert said[0].startswith("process 1 of 2") and "sleeper.py" in said[0]
    assert not [line for line in said if line.startswith("process 0 of 2")]
    assert len(started) == 2 and gone(started)
