"""Rows F1, F8 and F36: killed at any moment, without a disk for its log, and between a commit and what follows it."""

import contextlib
import signal

import harness
import pytest
from harness import T1, T8, T2x4

from flaxmodels import config, sections
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.verify import resume

slow, nightly = pytest.mark.slow, pytest.mark.nightly


# 30 steps an epoch, three in a dispatch, and a last batch that is not full.
DIGITS = (
    "--config.model.dropout=0.2",
    "--config.data.batch_size=48",
    "--config.optim.average=0.9",
    "--config.train.steps_per_dispatch=3",
)


def killed(folder, topology, kills, figures, arguments=(f"--config={harness.TINY}",), steps=harness.STEPS):
    """`verify resume`, and what it says looked at in another way too."""
    flags = config.parse(config.train_parser("test"), arguments)
    given = {key: value for key, value, _ in sections.resolved(flags.config)}
    hosts, devices = topology.processes, topology.processes * topology.devices
    found = resume.run(arguments, given, kills=kills, steps=steps, hosts=hosts, devices=devices, folder=folder)
    exact = found.kills * found.passed
    figures("F1", topology=topology.name, injected=found.kills, exact=exact, steps_again=found.again)
    assert found.passed, found.said
    for run in folder.glob("killed_*"):
        assert harness.same(run, folder / "left_alone", steps) == ""
    assert found.kills == kills


@pytest.mark.parametrize(
    ("topology", "kills"),
    [
        pytest.param(T1, 2, marks=slow),
        pytest.param(T2x4, 1, marks=nightly),
        pytest.param(T1, 40, marks=nightly),
        pytest.param(T8, 40, marks=nightly),
        pytest.param(T2x4, 40, marks=nightly),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_f1_killed_at_random_moments(tmp_path, topology, kills, figures):
    killed(tmp_path / "run", topology, kills, figures)


@nightly
def test_f1_killed_between_dispatches_of_several_steps(tmp_path, figures):
    killed(tmp_path / "run", T1, 20, figures, ("--config=configs/digits_mlp.py", *DIGITS), steps=90)


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_f4_a_signal_saves_and_leaves(tmp_path, number, code, figures):
    workdir, flags = tmp_path / "run", (*DIGITS, "--config.train.duration=100000", "--config.train.log_every=1")
    with harness.start(workdir, T1, *flags, config="configs/digits_mlp.py") as group:
        assert harness.wait_for(lambda: harness.last_step(workdir) >= 5), group
        group.kill(signum=number)
        assert group.wait() == [code], group
        said = group.output()
    assert f"{number.name}: saved step" in said and "Traceback" not in said
    saved = harness.on_disk(workdir)[-1]
    lost = harness.last_step(workdir) - saved
    figures("F4", injected=1, detected=1, steps_lost=lost)
    assert lost == 0 and f"saved step {saved} of 100000;" in said and saved >= 5


@pytest.fixture
def small_disk(tmp_path):
    """A workdir on a small disk of its own; its checkpoints are on another."""
    if reason := harness.mounts():
        pytest.skip(reason)
    (tmp_path / "elsewhere").mkdir()
    with harness.tmpfs(tmp_path / "run", "4m") as workdir:
        (workdir / "checkpoints").symlink_to(tmp_path / "elsewhere")
        yield workdir


@pytest.mark.parametrize("room", [pytest.param(True, marks=nightly), pytest.param(False, marks=nightly)])
def test_f8_a_full_disk_for_the_log_only(small_disk, tmp_path, room, whole, figures):
    workdir, full = small_disk, tmp_path / "full"
    with harness.start(workdir, program=("tests/faults/held.py", 8, full)) as group:
        assert harness.wait_for(lambda: harness.last_step(workdir) >= 5), group
        ballast = harness.fill(workdir)
        full.touch()
        assert harness.wait_for(lambda: "metrics.jsonl: No space left" in group.output()), group
        stood = harness.last_step(workdir)
        assert harness.wait_for(lambda: harness.on_disk(workdir)[-1] >= stood + 4), group  # it goes on
        assert harness.last_step(workdir) == stood
        if room:
            ballast.unlink()
        assert group.wait() == [0]
        said = group.output()
    warnings = [line for line in said.splitlines() if line.startswith("warning: ") and "No space left" in line]
    logs = [line for line in warnings if "metrics.jsonl" in line]
    lost = 0 if room else harness.STEPS - harness.last_step(workdir)
    exact = harness.same(workdir, whole()) == "" if room else harness.state(workdir) == harness.state(whole())
    figures("F8", injected=1, detected=int(len(logs) == 1), exact=int(exact), log_lines_lost_for_good=lost)
    assert len(logs) == 1 and len(warnings) <= 3, said  # one a file: the log, TensorBoard's, and curves.png
    assert exact, harness.same(workdir, whole())
    if not room:
        assert "there never was room for the last" in said


# The process kills itself at a place in the code: "commit 36" when step 36 is on disk and nothing has followed it,
# "line 45" when the evaluation of step 45 has been logged, "curves 60" when the last picture is written and not named.
DIES = """
import os, signal, sys
import train
from flaxmodels import curves, loop, writers
from flaxmodels.checkpoint import Checkpoints
place, step = os.environ["DIES"].split()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def save(self, state, number, *arguments, **options):
    saved(self, state, number, *arguments, **options)
    if place == "commit" and number == int(step):
        self.wait()
        die()

def write(self, number, values):
    if place == "before" and number == int(step) and "eval/loss" in values: die()
    wrote(self, number, values)
    if place == "line" and number == int(step) and "eval/loss" in values: die()

def replace(self, target):
    if place == "curves" and self.name == ".curves.png.tmp": die()
    return replaced(self, target)

saved, Checkpoints.save = Checkpoints.save, save
wrote, writers.Writers.write = writers.Writers.write, write
replaced, curves.Path.replace = curves.Path.replace, replace
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("topology", "moment"),
    [
        pytest.param(T1, "commit 36", marks=nightly),
        pytest.param(T1, "commit 60", marks=nightly),
        *(
            pytest.param(T1, moment, marks=nightly)
            for moment in ("commit 9", "before 27", "line 27", "before 36", "line 36", "line 60", "curves 60")
        ),
        *(pytest.param(T2x4, moment, marks=nightly) for moment in ("commit 36", "line 36", "commit 60", "curves 60")),
    ],
    ids=lambda value: getattr(value, "name", str(value).replace(" ", "_")),
)
def test_f36_killed_between_a_commit_and_what_follows(tmp_path, topology, moment, whole, figures):
    script, workdir = tmp_path / "dies.py", tmp_path / "run"
    script.write_text(DIES)
    with harness.start(workdir, topology, program=[script], env={"DIES": moment}) as group:
        assert -9 in group.wait() and 0 not in group.codes(), group
    with harness.start(workdir, topology) as group:
        assert set(group.wait()) == {0}, group
        said = group.output()
    other = whole(topology)
    found = harness.same(workdir, other)
    items = {
        "steps": harness.on_disk(workdir) == harness.on_disk(other),
        "best": best(workdir) == best(other),
        "picture": (workdir / "curves.png").exists() and not list(workdir.glob(".*.tmp")),
        "end": said.count("finished: all steps made") == 1,
    }
    figures("F36", injected=1, missing=sum(not there for there in items.values()), exact=int(found == ""))
    assert found == "" and all(items.values()), (found, items)


def best(workdir):
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        return checkpoints.best()
