"""F31 and F37: no memory left, on a device or on the host; and compiled programs that are not what was written."""

import contextlib
import random
import uuid
import zlib
from pathlib import Path

import harness
import pytest

from flaxmodels.runtime import compile_cache

slow, nightly = pytest.mark.slow, pytest.mark.nightly
FAULTY = Path(__file__).with_name("faulty.py")

# What takes too much, and what must be named with its bytes: a model, found when its state is made; the activations of
# a step, attention of 2^18 x 2^18 here, found when it runs.
LARGE = """
def get_config():
    return dict(
        model=dict(name="mlp", hidden=(2**22, 2**22)),
        data=dict(name="synthetic_images", examples=16, test_examples=8, batch_size=8),
        optim=dict(name="adam", learning_rate=1e-3),
        train=dict(duration=2, log_every=1),
    )
"""
LONG = [
    f"--config.{key}" for key in ("data.length=262144", "data.examples=16", "data.test_examples=16", "train.duration=2")
]
TOO_MUCH = {
    "parameters": ([], ("parameters 64.", "optimizer state 128.", "mesh.fsdp")),
    "activations": (LONG, ("other temporaries 32.", "batch 512.0 KiB", "train.microbatches=N")),
}


@pytest.mark.parametrize("what", [pytest.param("parameters", marks=slow), pytest.param("activations", marks=nightly)])
def test_f31_a_device_without_memory_says_what_takes_it(tmp_path, figures, what):
    flags, said = TOO_MUCH[what]
    (tmp_path / "config.py").write_text(LARGE)
    config = harness.TINY if flags else tmp_path / "config.py"
    with harness.start(tmp_path / "run", harness.T1, *flags, config=config) as group:
        assert group.wait(300) == [1], str(group)
        lines = group.output().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first].startswith("error: out of memory on 1 x cpu") and "TiB more could be had" in lines[first]
    told = "\n".join(lines[first:])
    assert all(part in told for part in said) and "Traceback" not in told and len(lines) == first + 4, told
    figures("F31", what=what, injected=1, detected=1)


@contextlib.contextmanager
def control_group(limit):
    """A control group that allows `limit` bytes: the file that takes the numbers of its processes."""
    name = f"faults_{uuid.uuid4().hex[:8]}"
    new, old = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    two = (new / "cgroup.controllers").exists()
    folder, file = (new / name, "memory.max") if two else (old / name, "memory.limit_in_bytes")
    try:
        folder.mkdir()
        (folder / file).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield folder / "cgroup.procs"
    finally:
        harness.wait_for(lambda: not (folder / "cgroup.procs").read_text(), 10)
        folder.rmdir()


# Enters a control group, then trains.
ENTERS = """
import os, pathlib, runpy, sys
pathlib.Path(os.environ["GROUP"]).write_text(str(os.getpid()))
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@nightly
def test_f31_a_run_that_the_kernel_kills_for_its_memory_goes_on_exactly(tmp_path, figures):
    flags = ["--config.data.workers=0", "--config.data.timeout=60.0"]
    with harness.start(tmp_path / "undisturbed", harness.T1, *flags, config=FAULTY) as group:
        assert group.wait(300) == [0], str(group)
    with control_group(2 * 2**30) as processes:
        env = {"FAULT": "eat", "FAULT_STEP": "25", "FAULT_ONCE": str(tmp_path / "once"), "GROUP": str(processes)}
        again = dict(config=FAULTY, program=("-c", ENTERS), env=env)
        with harness.start(tmp_path / "run", harness.T1, *flags, **again) as group:
            assert group.wait(300) == [-9], str(group)
        assert 0 < harness.last_step(tmp_path / "run") <= 25
        with harness.start(tmp_path / "run", harness.T1, *flags, **again) as group:
            assert group.wait(300) == [0], str(group)
    assert harness.same(tmp_path / "run", tmp_path / "undisturbed") == ""
    figures("F31", what="host", injected=1, detected=1, exact=1)


# Compiled programs


def _flip(data, draw):
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def _of_another_version(data, draw):
    """What unpacks, and is not understood, or is only just."""
    inside = bytearray(zlib.decompress(data))
    for _ in range(3):
        inside[draw.randrange(4, len(inside))] ^= 1 << draw.randrange(8)
    return zlib.compress(bytes(inside))


HARMS = {
    "flip": _flip,
    "cut": lambda data, draw: data[: draw.randrange(len(data))],
    "empty": lambda data, draw: b"",
    "other version": _of_another_version,
    "garbage": lambda data, draw: zlib.compress(draw.randbytes(1000)),
}


def harm(programs, draw):
    """Harm every compiled program: two of each three in some way of its own, the third by the one before it."""
    files = sorted(programs.glob("*-cache"))
    held = [file.read_bytes() for file in files]
    for number, (file, data) in enumerate(zip(files, held)):
        other = held[number - 1] if number % 3 == 2 else HARMS[draw.choice(list(HARMS))](data, draw)
        file.write_bytes(other)
    return len(files)


STEPS = 12
SHORT = [f"--config.train.duration={STEPS}", "--config.train.eval_every=0"]


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=nightly), pytest.param(12, marks=nightly)])
def test_f37_harmed_programs_are_compiled_again(tmp_path, figures, rounds):
    """Bare JAX warns of a flipped bit at each start for ever, and runs another program without a word."""
    programs, harmed = tmp_path / "programs", 0
    env = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.01"}

    def run(name):
        with harness.start(tmp_path / name, harness.T1, *SHORT, env=env) as group:
            assert group.wait(300) == [0], str(group)
            assert "Error reading persistent" not in group.output(), str(group)
            return group.output().count("and compiled again")

    assert run("first") == 0
    for seed in harness.seeds(rounds):
        count = harm(programs, random.Random(seed))
        assert count >= 3
        assert run(str(seed)) == count
        assert harness.same(tmp_path / str(seed), tmp_path / "first", STEPS) == ""
        assert compile_cache.check(programs) == []  # and JAX has written them anew
        harmed += count
    figures("F37", injected=harmed, detected=harmed, crashes=0)
