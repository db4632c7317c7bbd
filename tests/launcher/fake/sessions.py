"""Sessions on hosts: what `ssh` and `scp` do there, with the environment that a shell finds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fake import lifecycle, sayings, store
from fake.hosts import HERE, HOST, MACHINE


def home(resource, node, worker):
    """Home of the user on a host; a new machine has new ones."""
    folder = store.folder() / "hosts" / resource["uid"] / f"{node}-{worker}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(resource, node, worker):
    """What a shell on a host sees: nothing of the laptop, but for what the plan gives each host."""
    each, chips = lifecycle.shape(resource["type"])
    slices = len(resource["nodes"])
    told = {"MEGASCALE_SLICE_ID": str(node), "MEGASCALE_NUM_SLICES": str(slices)} if slices > 1 else {}
    return {
        "PATH": f"{HERE / 'host'}:{HERE / 'bin'}:/usr/local/bin:/usr/bin:/bin",  # the second has its `gcloud`
        "HOME": str(home(resource, node, worker)),
        "USER": "somebody",
        "LANG": "C.UTF-8",
        "FAKE_CLOUD": str(store.folder()),
        "FAKE_PYTHON": os.environ.get("FAKE_PYTHON", sys.executable),
        MACHINE: resource["uid"],
        HOST: f"{resource['uid']}/{node}/{worker}",
        # What a TPU VM's metadata say, as variables.
        "TPU_WORKER_ID": str(worker),
        "TPU_SKIP_MDS_QUERY": "1",
        **told,
        # The chips are simulated, and nobody tells JAX of its peers.
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={chips}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{resource['port']}",
        "JAX_NUM_PROCESSES": str(each * slices),
        "JAX_PROCESS_ID": str(each * node + worker),
        **store.plan().get("host", {}),
    }


def ssh(resource, node, workers, command, silent):
    """Run a command on hosts, all at once, their output mixed as it comes; the exit code of gcloud."""
    running = {}
    for worker in workers:
        _say(sayings.ATTEMPT.format(verb="SSH", worker=worker))
        if worker not in silent:
            running[worker] = subprocess.Popen(
                ["bash", "-c", command],
                cwd=home(resource, node, worker),
                env=environment(resource, node, worker),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # as sshd: it lives on when this end of the line is dead
            )
    for worker in silent & set(workers):
        _say(sayings.SILENT.format(address=lifecycle.address(worker), verb="SSH"))
    return _codes(workers, {worker: process.wait() for worker, process in running.items()})


def scp(resource, node, workers, sources, to, silent):
    """Copy files to the homes of hosts; the exit code of gcloud."""
    codes = {}
    for worker in workers:
        _say(sayings.ATTEMPT.format(verb="SCP", worker=worker))
        if worker in silent:
            _say(sayings.SILENT.format(address=lifecycle.address(worker), verb="SCP"))
            continue
        place = home(resource, node, worker) / to.removeprefix("~/")
        folder = place if to.endswith(("/", "~")) or not to or place.is_dir() else place.parent
        codes[worker] = 0
        for source in map(Path, sources):
            if not source.is_file():
                _say(f"scp: stat local {str(source)!r}: No such file or directory")
                codes[worker] = 1
            elif not folder.is_dir():
                _say(f'scp: dest open "{to}": No such file or directory')
                codes[worker] = 1
            else:
                shutil.copy(source, folder / source.name if folder == place else place)
    return _codes(workers, codes)


def _codes(workers, codes):
    """The first code that is not 0, in the order of the workers; 255 for one that ssh did not reach."""
    found = {worker: codes.get(worker, 255) for worker in workers}
    found = {worker: code if code >= 0 else 128 - code for worker, code in found.items()}
    for worker, code in found.items():
        if code and len(workers) > 1 and worker in codes:
            _say(sayings.WORKER_FAILED.format(worker=worker, code=code))
    return next((code for code in found.values() if code), 0)


def _say(text):
    print(text, file=sys.stderr, flush=True)
