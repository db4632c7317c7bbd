"""The hosts of machines are real processes of this computer.

Each process carries its machine and host in its environment, by which it is found again, whoever started it.
"""

import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINE, HOST = "FAKE_MACHINE", "FAKE_HOST"
WATCHER = "fake.hypervisor"


def processes(key, value):
    """Number -> command line of those that have this variable."""
    found, wanted = {}, f"{key}={value}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended, or is somebody else's
            continue
    return {number: line for number, line in found.items() if line}  # a zombie has none


def training(uid):
    """Whether the run is under way on a machine."""
    return any("--workdir=" in line for line in processes(MACHINE, uid).values())


def kill(uid, host="", notice=0.0):
    """End what runs on a machine, or on one host of it: SIGKILL, `notice` seconds after SIGTERM."""
    if notice:
        for number in _alive(uid, host):
            _signal(number, signal.SIGTERM)
        deadline = time.monotonic() + notice
        while time.monotonic() < deadline and _alive(uid, host):
            time.sleep(0.02)
    gone = 0
    while gone < 2:  # looks, since a process that becomes another program has no environment for a moment
        numbers = _alive(uid, host)
        for number in numbers:
            _signal(number, signal.SIGKILL)
        gone = 0 if numbers else gone + 1
        time.sleep(0.005)


def _alive(uid, host):
    key, value = (HOST, host) if host else (MACHINE, uid)
    return [number for number, line in processes(key, value).items() if WATCHER not in line]


def _signal(number, which):
    try:
        os.kill(number, which)
    except ProcessLookupError:
        return


def watched(resource):
    """Have the hypervisor look at a machine: something is to happen to it at a step of the run."""
    if not any(WATCHER in line for line in processes(MACHINE, resource["uid"]).values()):
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-S", "-m", WATCHER, resource["uid"]],
            {**os.environ, "PYTHONPATH": str(HERE.parent), MACHINE: resource["uid"]},
            file_actions=[(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)],
            setsid=True,
        )
