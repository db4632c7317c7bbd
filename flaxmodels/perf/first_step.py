"""The start of a command that trains, up to its first step, with times; `bench_startup` runs it as a process.

    python -m flaxmodels.perf.first_step SPAWNED FILE train --config=...

runs `flaxmodels train --config=...` as anyone would. When its first step has ended, FILE gets a line of JSON, and the
run is told to stop. SPAWNED is the monotonic clock when the process was asked for: it is the same one in all processes.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from flaxmodels.runtime import progress

# Seconds between two looks.
LOOK = 0.002


def watch(spawned: float, begun: float, file: Path) -> None:
    """Wait for the first step, write what was found, and stop the run.

    Args:
      spawned: when the process was asked for, on the monotonic clock.
      begun: when its first line ran.
      file: to write: {"seconds", "cpu_seconds", "phases": name -> seconds, which add up to the whole}.
    """
    while not hasattr(sys.modules.get("flaxmodels.loop"), "fit"):
        time.sleep(LOOK)
    imported = time.monotonic()
    while not progress.now().step:
        time.sleep(LOOK)
    ended, cpu, phases = time.monotonic(), time.process_time(), progress.totals()
    known = {"python": begun - spawned, "import": imported - begun, **phases}
    known["start"] += ended - spawned - sum(known.values())  # it began with the import of `progress`
    found = {"seconds": ended - spawned, "cpu_seconds": cpu, "phases": known}
    new = file.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.replace(file)
    os.kill(os.getpid(), signal.SIGTERM)


def main(spawned: str, file: str, *argv: str) -> None:
    """Run the command, watched."""
    times = (float(spawned), time.monotonic(), Path(file))
    threading.Thread(target=watch, args=times, daemon=True).start()
    sys.argv[1:] = argv
    runpy.run_module("flaxmodels", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
