"""Two processes with four devices each are one process with eight: batches, losses, checkpoints, and how they end."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small
from conftest import ROOT
from faults.harness import free_port

from flaxmodels.checkpoint import Checkpoints
from flaxmodels.config import load_config
from flaxmodels.job import assemble

SCRIPT = """
import json, sys
import jax
rank, port, placement = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=60, heartbeat_timeout_seconds=30)
import small
from flaxmodels.job import assemble
job = assemble(small.config("mlp", data={"placement": placement, "eval_batch_size": 48}, mesh={"data": 4, "fsdp": 2}))
state, packed, names = small.train(job, 6)
found, count = small.evaluate(job, state)
if rank == 0:
    print(json.dumps({"packed": packed.tolist(), "count": count, "eval": found}))
"""

# A checkpoint onto other axes, and the batches of three steps, gathered: their digests.
GATHER = """
import hashlib, json, sys
from pathlib import Path
from flaxmodels import config
from flaxmodels.runtime import distributed
flags = config.parse(config.train_parser("gather"), sys.argv[1:])
with distributed.joined(flags.arguments) as first:
    import jax
    from jax.experimental import multihost_utils
    from flaxmodels.checkpoint import Checkpoints
    from flaxmodels.job import assemble
    job = assemble(flags.config)
    state = Checkpoints(flags.workdir / "checkpoints", read_only=True).restore(60, job.abstract)
    batches = [jax.jit(job.train.batch)(*job.train.train_at(job.seed, step)) for step in range(3)]
    digests = {}
    for name, tree in {"state": state, "batches": batches}.items():
        whole = multihost_utils.process_allgather(tree, tiled=True)
        digests[name] = [hashlib.sha256(x.tobytes()).hexdigest() for x in jax.tree.leaves(whole)]
    if first:
        print(json.dumps(digests))
"""

# The process whose number is the seed runs into an error while the other waits for it in a collective.
FAIL = """
import sys
from flaxmodels import config, loop
from flaxmodels.runtime import distributed, exits, peers
distributed.GRACE = 1.0
waits = peers.leave_with_error
peers.leave_with_error = lambda limit: waits(30 * limit)  # on a busy machine the other takes longer to notice
flags = config.parse(config.train_parser("fail"), sys.argv[1:])
after = loop.Run.after
def failing(self, state, step, packed):
    import jax
    if jax.process_index() == flags.config.seed and step >= 3:
        raise RuntimeError("out of luck")
    return after(self, state, step, packed)
loop.Run.after = failing
def main():
    with distributed.joined(flags.arguments):
        return loop.fit(flags.config, flags.workdir).exit_code
sys.exit(exits.reported(main, debug=False))
"""


@contextlib.contextmanager
def started(count, devices, *command, each=lambda rank: [], cache=""):
    """`command` in `count` processes of a run, each with so many devices; killed at the end if they still run."""
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    if cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    options = {"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    limits = [] if count == 1 else ["--init_timeout=60", "--heartbeat_timeout=20"]
    address = [] if count == 1 else [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
    own = [[] if count == 1 else [f"--process_id={rank}"] for rank in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command), *address, *own[rank], *limits, *map(str, each(rank))], **options
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes, timeout=300):
    """(exit codes, what each said, what each said on stderr)."""
    deadline = time.monotonic() + timeout
    said = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in said], [err for _, err in said]


@pytest.mark.slow
@pytest.mark.parametrize("placement", [pytest.param("host", marks=pytest.mark.nightly), "device"])
def test_two_processes_are_one(placement):
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "NPROC": "16",  # gloo deadlocks on few cores with a thread pool of their number
    }
    options = {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    port = free_port()
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(port), placement], **options) for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    found = json.loads(said[0][0].splitlines()[-1])  # gloo prints to stdout too
    data = {"placement": placement, "eval_batch_size": 48}
    job = assemble(small.config("mlp", data=data, mesh={"data": 4, "fsdp": 2}))
    state, packed, _ = small.train(job, 6)
    expected, count = small.evaluate(job, state)
    np.testing.assert_allclose(found["packed"], packed, rtol=1e-5, atol=1e-6)
    assert found["count"] == count == 256
    assert found["eval"] == pytest.approx(expected, rel=1e-5)
    assert jax.process_count() == 1


@pytest.fixture
def config_file(tmp_path):
    """A config of 60 steps whose parameters are sharded, and whose batches don't divide the evaluation split."""
    config = small.config(
        "mlp",
        data=dict(eval_batch_size=48),
        mesh=dict(data=4, fsdp=2),
        train=dict(duration=60, eval_every=20, steps_per_dispatch=2),
        checkpoint=dict(every=7),
    )
    file = tmp_path / "config.py"
    file.write_text(f"def get_config():\n    return {config!r}\n")
    return file


def logged(workdir):
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.mark.slow
def test_a_run_moves_between_processes(tmp_path, config_file):
    """Stopped by a signal to one of two processes, resumed in one; then restored in two, on other axes."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    command = ["train.py", f"--config={config_file}"]
    with started(1, 8, *command, f"--workdir={whole}", cache=tmp_path / "cache") as processes:
        assert ended(processes)[0] == [0]
    sent = tmp_path / "sent"
    held = ["tests/faults/held.py", 12, sent, *command[1:]]  # it can't end before the signal
    with started(2, 4, *held, f"--workdir={moved}") as processes:
        deadline = time.monotonic() + 300
        while len(logged(moved)) < 4 and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.002)
        processes[1].send_signal(signal.SIGTERM)
        sent.touch()
        codes, outs, errors = ended(processes)
    assert codes == [143, 143], errors
    stopped = int(re.search(r"SIGTERM: saved step (\d+) of 60;", outs[0])[1])
    assert 4 <= stopped < 60 and "saved step" not in outs[1]
    assert Checkpoints(moved / "checkpoints", read_only=True).latest() == stopped
    with started(1, 8, *command, f"--workdir={moved}", cache=tmp_path / "cache") as processes:
        codes, outs, errors = ended(processes)
    assert codes == [0] and f"resumed at step {stopped}" in outs[0], errors
    rows, expected = logged(moved), logged(whole)
    assert [row.keys() for row in rows] == [row.keys() for row in expected] and len(rows) == 63
    for row, other in zip(rows, expected):
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-6 if name.endswith("loss") else 1e-5), (name, row["step"])

    gather = tmp_path / "gather.py"
    gather.write_text(GATHER)
    axes = ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=4"]
    with started(2, 4, gather, f"--config={config_file}", f"--workdir={moved}", *axes) as processes:
        codes, outs, errors = ended(processes)
    assert codes == [0, 0], errors
    found, config = json.loads(re.search(r"\{.*\}", outs[0])[0]), dict(load_config(config_file))  # gloo prints too
    for mesh, devices in [(dict(data=1), 1), (dict(tensor=2, fsdp=2), 4), (config["mesh"], 8)]:
        job = assemble({**config, "mesh": mesh}, jax.devices()[:devices])
        state = Checkpoints(moved / "checkpoints", read_only=True).restore(60, job.abstract)
        assert digests(state) == found["state"]
    batches = [jax.jit(job.train.batch)(*job.train.train_at(job.seed, step)) for step in range(3)]
    assert digests(batches) == found["batches"]


def digests(tree):
    return [hashlib.sha256(data).hexdigest() for data in small.bits(tree)]


@pytest.mark.slow
def test_processes_that_differ_or_fail_end_together(tmp_path, config_file):
    own = [f"--config={config_file}", "--config.mesh.data=2", "--config.mesh.fsdp=1"]
    command = ["train.py", *own]

    def each(rank):
        return [f"--workdir={tmp_path / 'differ'}", *["--config.optim.learning_rate=0.1"] * rank]

    with started(2, 1, *command, each=each) as processes:
        missing = [*command, f"--workdir={tmp_path / 'missing'}"]
        with started(2, 1, *missing, each=lambda _: ["--init_timeout=3"]) as (here, absent):
            absent.kill()
            codes, _, errors = ended([here])
        assert codes == [1] and "1 of 2 processes did not come within 3 s: 1. Here: 0 on " in errors[0]
        codes, _, errors = ended(processes)
    assert codes == [2, 2]
    for error in errors:
        assert "error: process 1 (" in error and "optim.learning_rate=0.1, there 0.003" in error

    fail = tmp_path / "fail.py"
    fail.write_text(FAIL)
    words = [[f"--workdir={tmp_path / f'fail{failing}'}", f"--config.seed={failing}"] for failing in (0, 1)]
    with started(2, 1, fail, *own, *words[0]) as first, started(2, 1, fail, *own, *words[1]) as second:
        runs = [ended(first), ended(second)]
    for failing, (codes, _, errors) in enumerate(runs):
        assert codes == [1, 1], errors
        assert "RuntimeError: out of luck" in errors[failing]
        said = rf"error: process {failing} \(.+\) failed: RuntimeError: out of luck"
        assert re.search(said, errors[1 - failing])
