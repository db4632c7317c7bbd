"""What the fault suite is made of: a tiny run in processes of its own, on one of three topologies, and what it left.

    with harness.start(workdir, harness.T1) as group:
        assert harness.wait_for(lambda: harness.last_step(workdir) >= 10)
        group.kill(0)
        group.wait()
    with harness.start(workdir, harness.T1) as group:  # the same command again
        assert group.wait() == [0]
    assert harness.same(workdir, whole) == ""

"Exact" (`same`): each line of the log has the bits of an uninterrupted run's, each step is there once, and so is the
last state, byte for byte.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests/faults/tiny.py"
STEPS = 60  # of tiny.py
PROGRAMS = "FAULTS_PROGRAMS"  # names the folder of compiled programs that all processes share
FIGURES = "FAULTS_OUT"  # names the file that figures are added to
PORTS, PARTS = range(10_000, 20_000), 16  # below those that the kernel deals out; a part for each worker of pytest
_drawn: set[int] = set()


@dataclasses.dataclass(frozen=True)
class Topology:
    """Processes of a run, and the simulated devices of each."""

    name: str
    processes: int
    devices: int


T1, T8, T2x4 = Topology("T1", 1, 1), Topology("T8", 1, 8), Topology("T2x4", 2, 4)
TOPOLOGIES = (T1, T8, T2x4)


class Group:
    """The processes of one start; a context manager that kills what is left of them, with all that they started.

    Attributes:
      processes: of the run, in their order.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.0.txt")))
        self.files = [folder / f"{number:03}.{rank}.txt" for rank in range(len(commands))]
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, file in zip(commands, self.files):
                with file.open("wb") as out:
                    self.processes.append(
                        subprocess.Popen(
                            command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                            start_new_session=True,
                        )
                    )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all that is left."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # the group is there as long as one of its processes is
            except (ProcessLookupError, PermissionError):
                continue
        for process in self.processes:
            process.wait()

    def running(self) -> bool:
        """Whether one has not ended yet."""
        return any(process.poll() is None for process in self.processes)

    def ended(self) -> bool:
        """Whether all have."""
        return not self.running()

    def codes(self) -> list[int | None]:
        """Exit codes; -9 where a process was killed by signal 9, None where it runs."""
        return [process.poll() for process in self.processes]

    def wait(self, timeout: float = 300.0) -> list[int | None]:
        """Exit codes, when all have ended; TimeoutError with what they said, where they take longer."""
        if not wait_for(self.ended, timeout):
            raise TimeoutError(f"{self.codes()} after {timeout:g} s\n{self}")
        return self.codes()

    def kill(self, number: int | None = None, signum: int = signal.SIGKILL) -> None:
        """Send a signal to one process, or to each; not to what they started."""
        for process in self.processes if number is None else [self.processes[number]]:
            if process.poll() is None:
                process.send_signal(signum)

    def output(self, number: int = 0) -> str:
        """All that a process has printed since this start, stderr too."""
        return self.files[number].read_text(errors="replace")

    def __str__(self) -> str:
        return "\n".join(
            f"--- process {number}, code {process.poll()}\n{self.output(number)[-4000:]}"
            for number, process in enumerate(self.processes)
        )


def start(
    workdir: Path,
    topology: Topology = T1,
    *flags: object,
    config: Path | str = TINY,
    program: Sequence[object] = ("train.py",),
    each: Callable[[int], Sequence[object]] = lambda rank: (),
    env: Mapping[str, str] | None = None,
    processes: int | None = None,
    limits: Sequence[str] = ("--init_timeout=60", "--heartbeat_timeout=20"),
) -> Group:
    """Start `program` on a config; the same call again is the same command again (the port aside).

    Args:
      workdir: of the run. What the processes print goes to files in the folder WORKDIR.out beside it.
      topology: processes and devices.
      flags: of all, such as "--config.train.duration=20".
      config: tiny.py, or another.
      program: words after `python`, before "--config".
      each: number of a process -> flags of its own.
      env: set beside what there is.
      processes: how many of the run to start, the first ones; None starts all.
      limits: where the run has several processes.
    """
    words = [sys.executable, *map(str, program), f"--config={config}", f"--workdir={workdir}", *map(str, flags)]
    commands = [[*words, *map(str, each(rank))] for rank in range(topology.processes)]
    if topology.processes > 1:
        where = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={topology.processes}", *limits]
        commands = [[*command, *where, f"--process_id={rank}"] for rank, command in enumerate(commands)]
    return Group(commands[:processes], workdir.with_name(f"{workdir.name}.out"), environment(topology, env))


def environment(topology: Topology = T1, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process that sees the devices of a topology and shares the compiled programs of this session."""
    programs = os.environ.setdefault(PROGRAMS, str(Path(tempfile.gettempdir(), f"faults_{os.getuid()}", "programs")))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        **(env or {}),
    }


def free_port() -> int:
    """A port of this machine that nothing listens on, and that nobody draws before a run listens on it."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % PARTS
    if 2 * len(_drawn) > len(PORTS[worker::PARTS]):
        _drawn.clear()  # the first of them are long free again
    while True:
        port = random.SystemRandom().choice(PORTS[worker::PARTS])
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            if port not in _drawn:
                _drawn.add(port)
                return port


def wait_for(condition: Callable[[], Any], timeout: float = 300.0, pause: float = 0.005) -> bool:
    """Whether `condition()` came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, without what the clock decides ("perf/")."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]


def last_step(workdir: Path) -> int:
    """The last step in the log; 0 where there is none."""
    found = rows(workdir)
    return int(found[-1]["step"]) if found else 0


def on_disk(workdir: Path) -> list[int]:
    """The checkpoints that are committed."""
    files = (workdir / "checkpoints").glob("*/MANIFEST.json")
    return sorted(int(file.parent.name) for file in files if file.parent.name.isdecimal())


def state(workdir: Path, step: int | None = None) -> dict[str, str]:
    """Path -> SHA-256 of shape, dtype and bytes of each array of a checkpoint, the last one where no step is named.

    It is read by Orbax itself, without the code that is tested, onto the host.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    number, found = on_disk(workdir)[-1] if step is None else step, {}
    for item in ("params", "rest"):
        folder = workdir / "checkpoints" / str(number) / item
        reader = ocp.PyTreeCheckpointHandler()
        kept = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree)
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kept))
        for keys, x in jax.tree.leaves_with_path(tree):
            path = "/".join((item, jax.tree_util.keystr(keys, simple=True, separator="/")))
            array = np.asarray(x)
            found[path] = hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + array.tobytes()).hexdigest()
    return found


def same(one: Path, other: Path, steps: int | None = STEPS) -> str:
    """ "" where two runs are exactly the same; else the first thing in which they differ.

    Args:
      one: workdir of a run that has ended.
      other: of another.
      steps: that each must have logged, once; None: those that the two logged, each once.
    """
    logs = rows(one), rows(other)
    for name, log in zip((one, other), logs):
        trained = [row["step"] for row in log if "train/loss" in row]
        missing, again = _missing(trained, steps or 0)
        if missing or again or (steps and trained[-1] != steps):
            return f"{name.name}: steps missing in the log: {missing}, more than once or out of order: {again}"
    for a, b in zip(*logs):
        if a != b:
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            return f"the line of step {a['step']} differs in {', '.join(keys)}: {a} and {b}"
    if len(logs[0]) != len(logs[1]):
        return f"{len(logs[0])} lines in the log, and {len(logs[1])}"
    if on_disk(one)[-1:] != on_disk(other)[-1:]:
        return f"the last steps on disk are {on_disk(one)[-1:]} and {on_disk(other)[-1:]}"
    states = state(one), state(other)
    return next(
        (f"{path} of the last state differs" for path in {**states[0], **states[1]}
         if states[0].get(path) != states[1].get(path)), "",
    )  # fmt: skip


def _missing(found: Sequence[int], steps: int) -> tuple[list[int], list[int]]:
    again = [b for a, b in itertools.pairwise(found) if b <= a]
    return sorted(set(range(1, steps + 1)) - set(found))[:5], again[:5]


def mounts() -> str:
    """Why no file system can be mounted here, for a test to be skipped with; "" where one can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tmpfs(Path(folder), "64k"):
                return ""
        except (OSError, subprocess.CalledProcessError):
            return "mounting a tmpfs needs root"


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes ("256k", "8m") at `folder`; gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Leave no byte free on the file system of a folder; the file to delete when there is to be room again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def record(row: str, test: str, values: Mapping[str, Any]) -> None:
    """Add figures of a row to the file that `run.py` reads, where there is one: a line of JSON."""
    if file := os.environ.get(FIGURES):
        line = json.dumps({"row": row, "test": test, **values}) + "\n"
        with Path(file).open("a") as out:  # one write: tests of two workers do not mix
            out.write(line)


def seeds(count: int, given: int | None = None) -> Iterator[int]:
    """`count` seeds, printed, so that what a test drew can be drawn again."""
    first = int.from_bytes(os.urandom(4), "big") if given is None else given
    print(f"seed {first}")
    yield from range(first, first + count)
