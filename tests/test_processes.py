"""Two processes with four devices each see the same batches as one process with eight, and train alike."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
from conftest import ROOT

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


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["host", "device"])
def test_two_processes_are_one(placement):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "NPROC": "16",  # gloo deadlocks on few cores with a thread pool of their number
    }
    options = {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(port), placement], **options) for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
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
