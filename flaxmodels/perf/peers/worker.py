"""The process of one peer: `python -m flaxmodels.perf.peers.worker WORK PEER FOLDER CORES`.

It pins itself to its cores before any library is loaded, then trains for ever. Another thread answers on standard
input: a line with seconds is answered with a line of JSON, how many steps ended in at least that time, and what they
took. The first line that it writes says that the warm-up is over. When its input ends, so does the process.

What is measured begins and ends where a step has just ended, so it holds whole steps, with as many under way at its
end as at its beginning.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from flaxmodels.perf.peers.trainer import Trainer
from flaxmodels.perf.peers.works import PEERS, WORKS
from flaxmodels.runtime import supervisor

# Seconds between two looks at how many steps have ended.
LOOK = 5e-4


def main(work: str, peer: str, folder: str, cores: str) -> None:
    """Train, and answer.

    Args:
      work: a key of `WORKS`.
      peer: a key of `PEERS`.
      folder: with the data, "inputs.npy" and "targets.npy"; also to write to.
      cores: numbers of those to run on, "0,1"; "" for no pinning.
    """
    if sys.platform == "linux":  # a process that is stopped does not see that its input has ended
        ctypes.CDLL(None).prctl(supervisor.PR_SET_PDEATHSIG, signal.SIGKILL)
    numbers = [int(core) for core in cores.split(",") if core]
    if numbers:
        os.sched_setaffinity(0, numbers)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    begun = time.perf_counter()
    one = PEERS[peer]
    module = importlib.import_module(f"flaxmodels.perf.peers.{one.module}")
    trainer = module.start(WORKS[work], Path(folder), len(numbers) or os.cpu_count() or 1, **one.options)
    unit = WORKS[work].steps
    threading.Thread(target=_answer, args=(trainer, unit, begun, answers), daemon=True).start()
    trainer.run()


def _answer(trainer: Trainer, unit: int, begun: float, answers: IO[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        while (loss := trainer.loss()) is None:
            time.sleep(0.02)
        warm: dict[str, Any] = {"loss": loss, "seconds": time.perf_counter() - begun}
        warm |= {"parameters": trainer.parameters, "versions": trainer.versions}
        print(json.dumps(warm), file=answers)
        for line in sys.stdin:
            print(json.dumps(chunk(trainer, float(line), unit)), file=answers)
    os._exit(0)


def chunk(trainer: Trainer, seconds: float, unit: int = 1) -> dict[str, Any]:
    """Measure for at least `seconds`, whole units of steps.

    Returns:
      "steps"; what they took in seconds, "wall" and "cpu", of all threads; "own", processor seconds of the whole call,
      waiting for the first unit to end included; and "compiles", where somebody counts them.
    """
    begun = time.process_time()
    before = 0 if trainer.compiles is None else trainer.compiles()
    first, wall, cpu = _edge(trainer, unit)
    time.sleep(max(0.0, seconds - (time.perf_counter() - wall)))
    last, wall_after, cpu_after = _edge(trainer, unit)
    found: dict[str, Any] = {"steps": last - first, "wall": wall_after - wall, "cpu": cpu_after - cpu}
    found["own"] = cpu_after - begun
    return found if trainer.compiles is None else found | {"compiles": trainer.compiles() - before}


def _edge(trainer: Trainer, unit: int) -> tuple[int, float, float]:
    """Wait until a unit has just ended: (steps, wall clock, processor time of all threads)."""
    done = trainer.steps() // unit
    while (steps := trainer.steps()) // unit == done:
        time.sleep(LOOK)
    return steps, time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main(*sys.argv[1:])
