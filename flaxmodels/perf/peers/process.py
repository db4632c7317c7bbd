"""A peer's process, from the outside: started, asked, and stopped while others have their turn."""

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from flaxmodels.perf.peers.works import PEERS
from flaxmodels.runtime.exits import FaultError

# Seconds for loading, compiling and warming up on a busy machine; and beyond what was asked for, for a turn.
SET_UP, ANSWER = 900.0, 300.0
# Lines of its output that an error shows.
TAIL = 8
PACKAGE = Path(__file__).parents[2]


def missing(peer: str) -> list[str]:
    """The packages that a peer needs and that are not installed here."""
    return [name for name in PEERS[peer].needs if importlib.util.find_spec(name) is None]


class Process:
    """A peer that trains; a context manager that kills it. But for `ready` and `ask` it is stopped, and takes no time.

    Args:
      name: for messages.
      command: its words; it talks as `worker` does.
      folder: that it works in.
      environment: all of it.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._name, self._log = name, folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment,
                process_group=0,  # Ctrl-C is for who started it
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it is warm; what `worker` says of that.

        Raises:
          FaultError: it ended, or is not warm within the time limit.
        """
        return self._answer(SET_UP)

    def ask(self, seconds: float) -> dict[str, Any]:
        """Let it train, and measure it, for at least `seconds`; see `worker.chunk`.

        Raises:
          FaultError: it ended, or does not answer.
        """
        self._signal(signal.SIGCONT)
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(f"{seconds}\n".encode())
            pipe.flush()
        return self._answer(seconds + ANSWER)

    def _answer(self, limit: float) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        said = bool(select.select([pipe], [], [], limit)[0])
        line = pipe.readline() if said else b""
        if not line.endswith(b"\n"):
            how = "it ended" if said else f"it did not answer in {limit:.0f} s"
            tail = self._log.read_text(errors="replace").splitlines()[-TAIL:]
            self._signal(signal.SIGKILL)  # it would go on, on the cores of the others
            raise FaultError("\n".join([f"{self._name}: {how}. The end of its output:", *(f"    {x}" for x in tail)]))
        self._signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def command(work: str, peer: str, folder: Path, cores: Sequence[int]) -> list[str]:
    """Of a peer's process: see `worker`."""
    return [sys.executable, "-m", f"{__package__}.worker", work, peer, str(folder), ",".join(map(str, cores))]


def environment(peer: str, folder: Path, cores: Sequence[int]) -> dict[str, str]:
    """What a peer finds: the CPU, as many threads as cores, and nothing that was set for this process's own JAX."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_", "OMP_", "KMP_"))}
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": str(len(cores))} if cores else {}
    folders = {name: str(folder / name.lower()) for name in ("KERAS_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    return {**kept, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **threads, **folders, **PEERS[peer].environment}
