"""The verb `run`: the code of this repository on the machine, in training, and what it prints on this terminal."""

import argparse
import contextlib
import dataclasses
import time
from pathlib import Path

from tpu import acts, logs, machines, noting, remote, shipping, ssh, state
from tpu.gcloud import Cloud
from tpu.meaning import CloudError
from tpu.remote import Worker
from tpu.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS = 120.0  # for a training to save and end
SHOWN = 100  # lines of what was printed before
FAULT, BAD_INPUT = 1, 2


def run(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Start the training, unless it runs, and show its output; Ctrl-C leaves it alone.

    Returns:
      0 where the training goes on or is done; 2 where it ended for bad input; else 1.
    """
    zone = ssh.place(cloud, s)
    with contextlib.nullcontext() if cloud.dry_run else state.held(s.folder, "run"):
        begin(s, cloud, zone)
    try:
        text = logs.follow(cloud, s, zone, SHOWN)
    except KeyboardInterrupt:
        cloud.say(
            "\nThe training goes on, and the machine costs. `run` again or `logs --follow` shows it, `watch` takes "
            "care of it to the end, `down` saves and deletes."
        )
        return 0
    return 0 if cloud.dry_run else _ended(s, cloud, zone, text)


def begin(s: Settings, cloud: Cloud, zone: str) -> None:
    """Ship, install, check and start, where no attempt runs; one that is not on all workers becomes so.

    Raises:
      CloudError: one of these failed, or a worker does not answer.
    """
    found = acts.workers(cloud, s, zone)
    silent = [str(worker.number) for worker in found if worker.what == "silent"]
    if silent:
        raise CloudError("transient", f"no answer from worker {', '.join(silent)}.", "A new machine may need a minute.")
    running = {worker.attempt for worker in found if worker.what == "running"}
    if running and _whole(found, max(running)):
        _tell(s, cloud, found)
        return
    if running and all(worker.attempt < max(running) for worker in found if worker.what != "running"):
        cloud.say(f"# attempt {max(running)} was not started everywhere")
        acts.start(cloud, s, zone, max(running))
        return
    if running:
        cloud.say(f"# attempt {max(running)} does not run on all workers any more: it is stopped, and the next started")
        acts.stop(cloud, s, zone, SECONDS)
    kept = state.load(s.folder)
    shipping.refuse_missing(REPOSITORY, s.command)
    parcel = shipping.pack(REPOSITORY, s.folder, dry_run=cloud.dry_run)
    acts.ship(cloud, s, zone, parcel)
    acts.install(cloud, s, zone, parcel)
    acts.check(cloud, s, zone)
    attempt = max(kept.attempt, logs.newest(cloud, s), *(worker.attempt for worker in found)) + 1
    if not cloud.dry_run:
        kept = dataclasses.replace(kept, parcel=parcel, command=s.command, attempt=attempt)
        state.save(s.folder, noting.phase(kept, "running", f"attempt {attempt}", time.time()))
    acts.start(cloud, s, zone, attempt)


def _tell(s: Settings, cloud: Cloud, found: tuple[Worker, ...]) -> None:
    """Say what runs, and that it is not the code that is here now, where that is so."""
    parcel, runs = shipping.pack(REPOSITORY, s.folder, dry_run=True), found[0]
    changed = f", with parcel {runs.sha}; the code here is {parcel.sha} now: `watch --update` would bring it"
    cloud.say(f"# attempt {runs.attempt} runs{changed * (parcel.sha != runs.sha)}")


def _whole(found: tuple[Worker, ...], attempt: int) -> bool:
    return all(worker.what == "running" and worker.attempt == attempt for worker in found)


def _ended(s: Settings, cloud: Cloud, zone: str, text: str) -> int:
    """Say how the attempt ended; the exit code."""
    found = remote.parse(text, machines.of(s.type).hosts * s.slices)
    lost = [str(worker.number) for worker in found if worker.code is None]
    if lost:
        raise CloudError(
            "transient", f"the connection to worker {', '.join(lost)} was lost.", "The training may go on: `status`."
        )
    codes = {worker.code for worker in found}
    if codes == {0}:
        cloud.say("The training is done, and the machine costs till `python tpu/launch.py down`.")
        return 0
    error = logs.first_error(logs.fetch(cloud, s, zone))
    cloud.say(f"The training ended with exit code {', '.join(map(str, sorted(filter(None, codes))))}.")
    cloud.say(f"first error, of {error}" if error else "No worker speaks of an error.")
    return BAD_INPUT if BAD_INPUT in codes else FAULT
