"""Stands for a training where only its outside matters: it saves, resumes, ends with the right codes, and needs no JAX.

Its state is a chain of hashes, so that a step left out or made twice shows at the end, in final.json.

    python train.py --workdir=DIR [--steps=40] [--pause=0.05] [--fails=CODE]    other flags are passed over
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

EVERY = 4
STOPPED = []


def main():
    """Train to the end, or till SIGTERM; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--fails", type=int, default=0)
    flags, _ = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda number, frame: STOPPED.append(number))
    if flags.fails:
        print("error: this is wrong on purpose", file=sys.stderr)
        return flags.fails
    first = os.environ["JAX_PROCESS_ID"] == "0"
    return lead(flags) if first else follow(flags)


def lead(flags):
    """The process that writes."""
    steps = flags.workdir / "checkpoints"
    found = [int(file.parent.name) for file in steps.glob("*/MANIFEST.json")]
    step = max(found, default=0)
    value = json.loads((steps / str(step) / "MANIFEST.json").read_text())["value"] if step else ""
    print(f"from step {step}", flush=True)
    while step < flags.steps and not STOPPED:
        time.sleep(flags.pause)
        step += 1
        value = hashlib.sha256(f"{value}{step}".encode()).hexdigest()
        print(f"step {step}", flush=True)
        if step % EVERY == 0 or step == flags.steps:
            save(steps, step, value)
    save(steps, step, value)
    if STOPPED:
        return 128 + STOPPED[0]
    write(flags.workdir / "final.json", {"step": step, "value": value})
    return 0


def save(steps, step, value):
    """Commit a step."""
    if step:
        (steps / str(step)).mkdir(parents=True, exist_ok=True)
        write(steps / str(step) / "MANIFEST.json", {"value": value})


def write(file, content):
    """At once, or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(file)


def follow(flags):
    """All other processes: they end when the first has."""
    while not (flags.workdir / "final.json").exists() and not STOPPED:
        time.sleep(0.02)
    return 128 + STOPPED[0] if STOPPED else 0


sys.exit(main())
