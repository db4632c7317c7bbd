"""F19, F20, F21: data workers that fail, workers that are left alone, and records that are damaged.

What each fault does to a stream of batches is tested in tests/test_data_loading.py, and what it does to records in
tests/test_data_records.py and tests/test_data_tfds.py. Here a run goes through them by the user's command.
"""

import shutil
import time
from pathlib import Path

import harness
import pytest
import test_data_loading
import test_data_tfds

import train
from flaxmodels.runtime import exits

slow, nightly = pytest.mark.slow, pytest.mark.nightly
FAULTY = Path(__file__).with_name("faulty.py")
STEP = 25  # in the second epoch
SAID = {
    "raise": "failed: RuntimeError: a fault of its own",
    "allocate": "failed: MemoryError: Unable to allocate",
    "exit0": "ended with exit code 0, before its last batch",
    "exit1": "ended with exit code 1, before its last batch",
    "SIGKILL": "was killed by signal 9 (Killed). Did memory run out?",
    "SIGSTOP": "gave no batch in 5 s.",
    "hang": "gave no batch in 5 s.",
}


def start(workdir, *flags, **env):
    return harness.start(workdir, harness.T1, *flags, config=FAULTY, env=env)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run without a fault, whose batches threads made: who makes them must not matter."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with start(workdir, "--config.data.workers=0") as group:
        assert group.wait(300) == [0], str(group)
    return workdir


@nightly
@pytest.mark.parametrize("fault", SAID)
def test_f19_a_worker_that_fails_ends_the_run_which_goes_on_exactly(undisturbed, tmp_path, figures, fault):
    workdir, once = tmp_path / "run", tmp_path / "once"
    env = {"FAULT": fault, "FAULT_STEP": str(STEP), "FAULT_ONCE": str(once)}
    with start(workdir, **env) as group:
        assert harness.wait_for(once.exists, 300), str(group)
        begun = time.monotonic()
        assert group.wait(300) == [1], str(group)
        seconds = time.monotonic() - begun
        assert "error: Data worker " in group.output() and SAID[fault] in group.output(), str(group)
    assert 0 < harness.last_step(workdir) <= STEP
    with start(workdir, **env) as group:
        assert group.wait(300) == [0], str(group)
    assert harness.same(workdir, undisturbed) == ""
    figures("F19", fault=fault, injected=1, detected=1, exact=1, seconds=round(seconds, 1))


def workers(pid):
    """The processes that make batches for `pid`: those that its multiprocessing has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                found.add(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _orphaned(workdir):
    """Kill a run; seconds until its workers have ended. None has shared memory with a name, which would outlive all."""
    flags = ("--config.train.duration=6000", "--config.data.timeout=300.0")  # it does not end by itself meanwhile
    with start(workdir, *flags) as group:
        (main,) = group.processes
        assert harness.wait_for(lambda: harness.last_step(workdir) >= 3, 300), str(group)
        pids = workers(main.pid)
        assert len(pids) == 2 and not any(test_data_loading.shared(pid) for pid in (main.pid, *pids))
        group.kill(0)
        begun = time.monotonic()
        assert harness.wait_for(lambda: not any(map(test_data_loading.alive, pids)), 60), pids
        return time.monotonic() - begun


@slow
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=nightly)])
def test_f20_workers_end_with_the_main_process(tmp_path, figures, kills):
    """Not by its own doing: it is killed."""
    seconds = [_orphaned(tmp_path / str(number)) for number in range(kills)]
    figures("F20", injected=kills, processes_left=0, bytes_left=0, seconds=round(max(seconds), 2))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A data set of 90 records in three shards, as TFDS prepares it."""
    folder = tmp_path_factory.mktemp("sets")
    test_data_tfds.prepare(folder, "plain", test_data_tfds.plain_features, test_data_tfds.plain_example)
    return folder


RECORDS = """
def get_config():
    return dict(
        model=dict(name="mlp", hidden=(8,)),
        data=dict(name="tfds", dataset="plain", data_dir={folder!r}, batch_size=8, placement="disk"),
        optim=dict(name="adam", learning_rate=1e-3),
        train=dict(duration=22, log_every=1),
    )
"""


def _lose(file):
    file.unlink()


def _cut(file):
    file.write_bytes(file.read_bytes()[:70_000])


def _flip(file):
    test_data_tfds.flip_record(file, 7)


# How the second shard, records 30 to 59, is harmed; what is said of it; how many records that leaves out, at most.
HARMS = {
    "flip": (_flip, "record 7 (number 37 of all) can't be read", 2),
    "lose": (_lose, "can't be read: the file is missing", 60),
    "cut": (_cut, "can't be read: ", 60),
}


@slow
@pytest.mark.parametrize("harm", [pytest.param(name, marks=[] if name == "flip" else nightly) for name in HARMS])
def test_f21_damaged_records_are_named_or_left_out(records, tmp_path, capsys, figures, harm):
    shutil.copytree(records, tmp_path / "sets")
    (tmp_path / "config.py").write_text(RECORDS.format(folder=str(tmp_path / "sets")))
    harmed, said, left_out = HARMS[harm]
    file = tmp_path / "sets/plain/1.0.0/plain-train.array_record-00001-of-00003"
    harmed(file)

    def run(policy):
        argv = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / policy}"]
        words = [*argv, f"--config.data.on_corrupt={policy}"]
        code = exits.reported(lambda: train.main(words), debug=False)
        return code, "".join(capsys.readouterr())

    code, text = run("raise")
    assert code == exits.BAD_INPUT and str(file) in text and said in text and "on_corrupt" in text, text
    code, text = run("skip")
    counted = [line for line in text.splitlines() if "examples could not be read so far" in line]
    assert code == exits.DONE and counted and int(counted[-1].split()[1].replace(",", "")) <= left_out, text
    assert [row["step"] for row in harness.rows(tmp_path / "skip") if "train/loss" in row] == list(range(1, 23))
    figures("F21", harm=harm, injected=1, detected=1, skipped=left_out)
