"""How long a command takes until its first step: each start is a process of its own, as anyone would start it.

In each round one starts with an empty cache of compiled programs, and one with what that one left. Read `bench`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels import registry
from flaxmodels.perf import timing
from flaxmodels.runtime.exits import FaultError

# Seconds that one start may take, with all that it compiles.
LIMIT = 600.0
# What is imported alone, by the name of the row.
IMPORTS = {"python": "pass", "import flaxmodels": "import flaxmodels", "import jax": "import jax"}
COLD, WARM = "first step, cache empty", "first step, cache full"


def bench(
    path: str, config: Mapping[str, Any], overridden: Sequence[str] = (), rounds: int = 3
) -> list[dict[str, Any]]:
    """Start `flaxmodels train` with a config, several times, in workdirs that go afterwards.

    Args:
      path: of the config file, as `--config` has it.
      config: what it says, overrides applied.
      overridden: dotted keys that differ from what the file says.
      rounds: starts with an empty cache, each with one after it that finds it full.

    Returns:
      A row for each, ready for JSON: "name" (of `IMPORTS`, `COLD` or `WARM`), "seconds" (from the moment a process is
      asked for, median of the rounds), "slowest", "spread" (`timing.spread`), "cpu_seconds", "rounds", and "phases":
      name -> seconds (medians), for the last two.

    Raises:
      FaultError: a run ended before its first step; with what it said.
    """
    words = [f"--config={path}", *(f"--config.{key}={_value(config, key)!r}" for key in overridden)]
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name, statement in IMPORTS.items():
            found.setdefault(name, []).append(_timed([sys.executable, "-c", statement]))
        with tempfile.TemporaryDirectory(prefix="flaxmodels_startup_", ignore_cleanup_errors=True) as folder:
            for name in (COLD, WARM):
                found.setdefault(name, []).append(_started(words, Path(folder), name))
    return [_row(name, runs) for name, runs in found.items()]


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return registry.plain(value) if isinstance(value, Mapping) else value


def _timed(command: Sequence[str]) -> dict[str, Any]:
    begun, before = time.monotonic(), os.times()
    subprocess.run(command, check=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    seconds, after = time.monotonic() - begun, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "phases": {}}


def _started(words: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """One start. All caches are in `folder`, where they are chosen as ever; and its workdir is, too."""
    file = folder / f"{name}.json"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    module = [sys.executable, "-m", "flaxmodels.perf.first_step", str(time.monotonic()), str(file)]
    command = [*module, "train", *words, f"--workdir={folder / name}"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as error:
            raise FaultError(f"{' '.join(command[3:])}: no first step after {LIMIT:g} s") from error
        finally:
            process.kill()
    if not file.exists():
        last = "\n".join(said.splitlines()[-10:])
        raise FaultError(f"{' '.join(command[5:])} ended with code {process.returncode} before its first step:\n{last}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "name": name,
        "seconds": round(statistics.median(seconds), 3),
        "slowest": round(max(seconds), 3),
        "spread": timing.spread(seconds),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 3),
        "rounds": len(runs),
        "phases": {
            phase: round(statistics.median(run["phases"][phase] for run in runs), 3) for phase in runs[0]["phases"]
        },
    }
