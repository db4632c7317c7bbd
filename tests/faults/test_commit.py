"""Rows F2, F3, F7, F10 to F13, F34, F35: a checkpoint is there whole or not at all, and what changed of it is seen.

This file is also the program that gets killed: `python test_commit.py ROLE FOLDER ...`. Importing JAX takes seconds, so
one process imports it and forks one that saves for each kill.
"""

import collections
import ctypes
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crashes
import numpy as np
import pytest
from absl import logging
from harness import ROOT, environment, seeds

from flaxmodels import disk, manifest
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.state import TrainState

HERE = Path(__file__)
STRACE = shutil.which("strace")


def state(step, count=1000):
    """A pure function of the step."""
    params = {name: np.random.default_rng([step, i]).random(count, np.float32) for i, name in enumerate("abc")}
    return TrainState(np.int32(step), params, {}, {"mu": np.full(16, step, np.float32)})


# The program that gets killed.


def saving(folder, say, steps, *, pause=0.0, **options):
    """Restore the newest step and hold it against what it was; then save, one step after the other.

    `say` is called with what was just done.
    """
    with_marks(say)
    checkpoints = Checkpoints(folder, **options)
    newest = checkpoints.good() or 0
    if newest:
        import jax

        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))
        found = checkpoints.restore(newest, abstract)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, state(newest))), f"step {newest} is not what it was"
    left = [file.name for file in folder.iterdir() if disk.TEMPORARY in file.name or file.name == disk.TRASH]
    assert not left, left
    say(f"start {newest}")
    for step in range(newest + 1, newest + 1 + steps):
        say(f"save {step}")
        try:
            checkpoints.save(state(step), step, {})
            checkpoints.wait()
            say(f"done {step}")
        except FaultError as error:
            say(f"failed {error}")
        time.sleep(pause)


def with_marks(say):
    """Say so when a deletion begins."""
    delete = disk.delete

    def marked(directory, steps):
        if steps:
            say(f"delete {max(steps)}")
        delete(directory, steps)

    disk.delete = marked


def forked(work, *, traced=False):
    """Process number of a child that does `work(say)`, and the end of the pipe on which it says things."""
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, os.fdopen(ours)
    code = 1
    try:
        if traced:
            wait_for_tracer()
        work(lambda text: os.write(theirs, f"{text}\n".encode()))
        code = 0
    except BaseException as error:
        os.write(theirs, f"error {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def wait_for_tracer():
    """Any process may trace this one; one does when this returns."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0, 0)  # PR_SET_PTRACER
    deadline = time.monotonic() + 60
    while "TracerPid:\t0" in Path("/proc/self/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def watched(work, tracer, out):
    """How a child that does `work(say)` ended, and what it said; with strace on it, where `tracer` are its words."""
    pid, pipe = forked(work, traced=bool(tracer))
    with pipe:
        process = subprocess.Popen([*tracer, "-o", out, "-p", str(pid)]) if tracer else None
        said = pipe.read()
    if process is not None:
        process.wait(60)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def kills(folder, count, first_seed, what, latest):
    """Fork, kill at U(0, `latest`) seconds after a random "`what` ...", look at the disk; `count` times."""
    rng = random.Random(int(first_seed))
    found = collections.Counter(kills=0, broken=0, lost=0, inside=0)
    committed = 0
    for _ in range(int(count)):
        keep = 1 if what == "delete" else 2
        pid, pipe = forked(lambda say, keep=keep: saving(Path(folder), say, 1000, keep=keep))
        wanted, lines = rng.randrange(1, 4), []
        with pipe as marks:
            for line in marks:
                lines.append(line.split(maxsplit=1))
                wanted -= lines[-1][0] == what
                if wanted == 0:
                    break
            time.sleep(rng.uniform(0, float(latest)))
            os.kill(pid, signal.SIGKILL)
            lines += [line.split(maxsplit=1) for line in marks]
        os.waitpid(pid, 0)
        found["errors"] += sum(word == "error" for word, _ in lines)
        committed = max([committed, *(int(step) for word, step in lines if word == "done")])
        listed = disk.committed(Path(folder))
        found["kills"] += 1
        found["broken"] += sum(bool(manifest.verify(Path(folder, str(step)))) for step in listed)
        found["lost"] += max(listed, default=0) < committed
        found["inside"] += bool(list(Path(folder).glob(f"*{disk.TEMPORARY}"))) or Path(folder, disk.TRASH).exists()
    saving(Path(folder), lambda _: None, 1)
    found["orphans"] = sum(not file.name.isdecimal() for file in Path(folder).iterdir())
    return dict(found)


def cases(folder, steps, *words):
    """A child for each name, in a folder of its own; how it ended and what it said. Words: names, "--", of strace."""
    cut, ended = words.index("--"), {}
    for name in words[:cut]:
        inner = Path(folder, name)
        ended[name] = watched(
            lambda say, inner=inner: saving(inner, say, int(steps), keep=1), words[cut + 1 :], f"{inner}.txt"
        )
    return ended


def training(folder, busy, steps, seconds, every, *tracer):
    """A loop of steps of so many seconds, a save every so many; how long they took, and what was skipped.

    In a child that is left alone, "fast", and in one with strace on it, "slow", each in a folder of its own.
    """
    found = {}
    for name, words in {"fast": (), "slow": tracer}.items():
        code, said = watched(
            lambda say, name=name: say(
                json.dumps(_trained(Path(folder, name), busy, int(steps), float(seconds), int(every)))
            ),
            words,
            "/dev/null",
        )
        assert code == 0, said
        found[name] = json.loads(said)
    return found


def _trained(folder, busy, steps, seconds, every):
    checkpoints = Checkpoints(folder, every=every, busy=busy, every_seconds=0.0, keep=1)
    big, times, notes, most = state(0, 500_000), [], [], 0  # 6 MB
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        time.sleep(seconds)
        checkpoints.check()
        if checkpoints.due(step):
            checkpoints.save(big.replace(step=np.int32(step)), step, {})
        times.append(time.perf_counter() - begun)
        notes += checkpoints.notes()
        most = max(most, sum(disk.TEMPORARY in file.name for file in folder.iterdir()))
    checkpoints.save(big.replace(step=np.int32(steps)), steps, {})
    checkpoints.close()
    skipped = sum("was not saved" in note for note in notes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    p50, p99 = np.percentile(times[1:], [50, 99])
    return {
        "p50": p50,
        "p99": p99,
        "skipped": skipped,
        "at once": most,
        "peak MB": peak,
        "last": disk.committed(folder),
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)
    roles = {"kills": kills, "cases": cases, "training": training}
    print(json.dumps(roles[sys.argv[1]](*sys.argv[2:])))


def program(*words, timeout=300.0):
    """What this file prints as a program of its own."""
    command = [sys.executable, HERE, *map(str, words)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


quick_and_nightly = pytest.mark.parametrize(
    "count", [pytest.param(4, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.nightly)]
)


def drawn(count, least):
    """The seed of a test: a new one for the nightly tests, which draw many; always the same for those of every day."""
    return seeds(1, given=1 if count == least else None)


traced = pytest.mark.skipif(STRACE is None, reason="strace is not installed")


@quick_and_nightly
def test_f2_killed_in_a_save(tmp_path, figures, count):
    (seed,) = drawn(count, 4)
    found = program("kills", tmp_path / "c", count, seed, "save", 0.3, timeout=300 + 4 * count)
    figures("F2", **found)
    assert found | {"inside": 0} == {
        "kills": count, "broken": 0, "lost": 0, "inside": 0, "errors": 0, "orphans": 0
    }  # fmt: skip


@quick_and_nightly
def test_f3_killed_in_a_deletion(tmp_path, figures, count):
    (seed,) = drawn(count, 4)
    found = program("kills", tmp_path / "c", count, seed, "delete", 0.004, timeout=300 + 4 * count)
    figures("F3", **found)
    assert found | {"inside": 0} == {
        "kills": count, "broken": 0, "lost": 0, "inside": 0, "errors": 0, "orphans": 0
    }  # fmt: skip


def strace(calls, inject, paths=()):
    """The words of a command under which `inject` happens to these system calls, on these paths."""
    only = [word for path in paths for word in ("-P", path)]
    return (STRACE, "-f", "-qq", "-e", f"trace={calls}", *only, "-e", f"inject={calls}:{inject}")


# Case -> the rename at which it is killed: of an item, of the step, of its manifest; of the old step.
RENAMES = {
    "item": "3.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp",
    "step": "3.orbax-checkpoint-tmp",
    "manifest": "3/MANIFEST.json.tmp",
    "old": "2",
}


@traced
@pytest.mark.slow
def test_f2_killed_at_each_rename(tmp_path, figures):
    paths = [tmp_path / case / path for case, path in RENAMES.items()]
    tracer = strace("rename,renameat,renameat2", "signal=SIGKILL", paths)
    ended = program("cases", tmp_path, 3, *RENAMES, "--", *tracer)
    for case, (code, said) in ended.items():
        assert code == -signal.SIGKILL and "done 2" in said and "done 3" not in said, (case, code, said)
        committed = disk.committed(tmp_path / case)
        assert committed == ([2, 3] if case == "old" else [2]), (case, committed)
        assert not any(manifest.verify(tmp_path / case / str(step)) for step in committed)
        again = []
        saving(tmp_path / case, again.append, 1, keep=1)
        assert again[0] == f"start {committed[-1]}"
        assert [file.name for file in (tmp_path / case).iterdir()] == [str(committed[-1] + 1)]
    figures("F2", kills=len(ended), inside=len(ended), broken=0, lost=0, orphans=0, errors=0)


UNSYNCED = {
    "data": "3/params/manifest.ocdbt",
    "metadata": "3/params/_METADATA",
    "folder": "3/rest",
    "own": "3/MANIFEST.json.tmp",
}


@traced
@pytest.mark.nightly
def test_f2_storage_that_fails_to_sync_commits_nothing(tmp_path, figures):
    tracer = strace("fsync", "error=EIO", [tmp_path / case / path for case, path in UNSYNCED.items()])
    for case, (code, said) in program("cases", tmp_path, 4, *UNSYNCED, "--", *tracer).items():
        assert code == 0 and "failed the save of step 3 to" in said, said
        assert "Input/output error; step 2 is there and whole" in said and "done 4" in said, said
        assert [file.name for file in (tmp_path / case).iterdir()] == ["4"]
        assert manifest.verify(tmp_path / case / "4") == []
    figures("F2", errors_injected=len(UNSYNCED), committed_in_spite=0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# Orbax closes the event loop of a write that failed; another write that fails after it finds none to say so to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("failed", ["stop", "go on"])
def test_f7_the_disk_is_full(small_disk, figures, failed):
    folder = small_disk / "c"
    large = state(0, 300_000)  # 3.6 MB
    checkpoints = Checkpoints(folder, keep=2, failed=failed)
    for step in (1, 2):
        checkpoints.save(large.replace(step=np.int32(step)), step, {})
    checkpoints.wait()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free - 2_000_000))
    free = shutil.disk_usage(folder).free
    told, late, delay = "", 0, 0
    checkpoints.save(large.replace(step=np.int32(3)), 3, {})
    for _ in range(2000):  # "steps"
        time.sleep(0.005)
        over = not checkpoints._saving.manager.is_saving_in_progress()
        try:
            checkpoints.check()
        except FaultError as error:
            told = str(error)
        told = told or " ".join(checkpoints.notes())
        late += over and not told
        if told:
            break
    assert f"step 3 to {str(folder)!r} failed: No space left on device" in told and late == 0, told
    assert ("; step 2 is there and whole" in told) and ("going on" in told) == (failed == "go on")
    leaked, left = 1, {"3"}
    while leaked > 0 or left != {"1", "2"}:  # what was still being written may have come after it
        time.sleep(0.005)
        checkpoints.check()
        leaked, delay = free - shutil.disk_usage(folder).free, delay + 1
        left = {file.name for file in folder.iterdir()}
        assert delay < 2000, left
    assert checkpoints.steps() == [1, 2] and checkpoints.good() == 2
    ballast.unlink()
    checkpoints.save(large.replace(step=np.int32(4)), 4, {})
    checkpoints.close()
    assert checkpoints.steps() == [2, 4] and checkpoints.good() == 4 and not checkpoints.notes()
    figures("F7", injected=1, delay_steps=1 + late, bytes_leaked=max(leaked, 0), later_saves=1)


# Kinds of files of a step: kind -> pattern of the names.
KINDS = {
    "arrays of a process": r"(params|rest)/ocdbt\.process_0/d/.*",
    "arrays": r"(params|rest)/d/.*",
    "index of a process": r"(params|rest)/ocdbt\.process_0/manifest\.ocdbt",
    "index": r"(params|rest)/manifest\.ocdbt",
    "tree": r"(params|rest)/_METADATA",
    "shardings": r"(params|rest)/_sharding",
    "array metadata": r"(params|rest)/array_metadatas/process_0",
    "step metadata": r"_CHECKPOINT_METADATA",
    "Orbax's commit": r"((params|rest)/)?commit_success\.txt",
    "manifest": r"MANIFEST\.json",
}


def kinds(folder):
    """The files of a step, by kind."""
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    found = {kind: [name for name in names if re.fullmatch(pattern, name)] for kind, pattern in KINDS.items()}
    assert sorted(itertools.chain(*found.values())) == names and all(found.values()), found
    return found


def truncated(content, rng):
    return content[: rng.randrange(len(content))]


def flipped(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def zeroed(content, rng):
    """A page of 4 KB, or what there is of it."""
    begin = rng.randrange(0, len(content), 4096)
    return content[:begin] + bytes(len(content[begin : begin + 4096])) + content[begin + 4096 :]


def missing(content, rng):
    return None


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Two steps of arrays on devices, so that all kinds of files are there."""
    import jax

    folder = tmp_path_factory.mktemp("two") / "c"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(jax.tree.map(jax.device_put, state(step)), step, {})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("count", [1, pytest.param(30, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("row", "damage"),
    [("F10", truncated), ("F11", flipped), ("F11", zeroed), ("F12", missing)],
    ids=lambda x: str(x)[:12],
)
def test_f10_f11_f12_damage_is_named(two_steps, figures, row, damage, count):
    (seed,) = drawn(count, 1)
    rng, injected, detected = random.Random(seed), collections.Counter(), collections.Counter()
    for kind, names in kinds(two_steps / "2").items():
        for _ in range(count if damage is not missing else 1):
            for name in names if count > 1 else rng.sample(names, 1):
                file = two_steps / "2" / name
                whole = file.read_bytes()
                broken = damage(whole, rng)
                if broken == whole:
                    continue
                file.unlink() if broken is None else file.write_bytes(broken)
                injected[kind] += 1
                detected[kind] += refused(two_steps, name)
                file.write_bytes(whole)
    figures(row, kind=damage.__name__, injected=injected.total(), detected=detected.total())
    assert injected == detected and set(injected) == set(KINDS)
    assert Checkpoints(two_steps, read_only=True).good() == 2


def refused(folder, name):
    """Whether step 2 is refused with the name of the file; or was never committed, if that is its manifest."""
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        found = checkpoints.good()
    except UserError as error:
        return "checkpoint 2" in str(error) and name in str(error)
    finally:
        checkpoints.close()
    return name == manifest.NAME and found == 1 and checkpoints.steps() == [1]


@pytest.mark.parametrize("item", ["params", "rest", "params/d", "rest/ocdbt.process_0"])
def test_f12_a_whole_folder_is_missing(two_steps, figures, item):
    aside = two_steps.parent / "aside"
    (two_steps / "2" / item).rename(aside)
    try:
        assert refused(two_steps, f"{item}/")
    finally:
        aside.rename(two_steps / "2" / item)
    figures("F12", kind="folder", injected=1, detected=1)


@traced
@pytest.mark.parametrize(
    "count", [pytest.param(0, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.nightly)]
)
def test_f13_the_machine_crashes_before_all_is_on_storage(tmp_path, figures, count):
    (seed,) = drawn(count, 0)
    rng, folder = random.Random(seed), tmp_path / "run"
    (ended,) = program("cases", tmp_path, 3, "run", "--", STRACE, *crashes.RECORD).values()
    assert ended[0] == 0 and "done 3" in ended[1], ended
    calls, tree = crashes.record((tmp_path / "run.txt").read_text(errors="replace"), folder)
    there = {f.relative_to(folder).as_posix(): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}
    assert tree == there  # the record is complete
    seen, bad, enumerated = set(), [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as memory:
        for made, left in crashes.states(calls, count, rng):
            enumerated += 1
            promised = 3 if made == len(calls) else promise(calls[:made])
            key = (promised, hashlib.sha256(repr(sorted(left.items())).encode()).digest())
            if key in seen or seen.add(key):
                continue
            crashes.write(left, Path(memory, "c"))
            disk.tidy(Path(memory, "c"))
            listed = disk.committed(Path(memory, "c"))
            problems = [problem for step in listed for problem in manifest.verify(Path(memory, "c", str(step)))]
            if problems or max(listed, default=0) < promised:
                bad.append((made, promised, listed, problems))
            shutil.rmtree(Path(memory, "c"))
    figures("F13", states=enumerated, different=len(seen), bad=len(bad))
    assert enumerated > 300 and not bad, bad[:3]


def promise(calls):
    """The newest step that is promised when a run has made these calls: each is waited for before the next begins."""
    begun = [call.new[1] for call in calls if call.kind == "name" and call.new[0] == crashes.ROOT]
    steps = [int(name.partition(".")[0]) for name in begun if disk.TEMPORARY in name]
    return max(steps, default=1) - 1


@traced
@pytest.mark.parametrize(
    "busy", [pytest.param("wait", marks=pytest.mark.nightly), pytest.param("skip", marks=pytest.mark.slow)]
)
def test_f34_f35_slow_storage(tmp_path, figures, busy):
    """Each sync takes a tenth of a second, so a save takes over two; a step 10 ms, and a save is due every 20th."""
    slow = (STRACE, "-f", "-qq", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_enter=100000")
    words = {"wait": (60, 0.01, 20), "skip": (100, 0.01, 1)}[busy]
    found = program("training", tmp_path, busy, *words, *slow)
    figures("F34" if busy == "wait" else "F35", busy=busy, **found["slow"], p99_fast=found["fast"]["p99"])
    steps = words[0]
    assert found["slow"]["last"] == [steps] and found["slow"]["at once"] == 1
    assert manifest.verify(tmp_path / "slow" / str(steps)) == []
    if busy == "skip":
        # No step waits for the storage: one that did would take as long as a save.
        assert found["slow"]["skipped"] > 50 and found["slow"]["p99"] < 1.5
        assert found["slow"]["peak MB"] < found["fast"]["peak MB"] + 50
    else:
        assert found["slow"]["skipped"] == 0
