"""The verb `status`: where a run is, what is there of it, how far it is, and what it has cost."""

import argparse
import time
from collections.abc import Iterator

from tpu import acts, cost, noting, state, steps
from tpu.acts import Resource
from tpu.bill import everywhere
from tpu.gcloud import Cloud
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.state import Kept


def status(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Look, and change nothing."""
    s = everywhere(s)
    kept = state.load(s.folder)
    found = dict(acts.find(cloud, s))
    zone = noting.chosen(found, kept)
    active = zone in found and found[zone].state == "ACTIVE"
    workers = acts.workers(cloud, s, zone) if active else ()
    step = steps.newest(cloud, s) if s.bucket else None
    left = acts.left(cloud, s)
    for key, text in table(s, kept, found, workers, step, left, state.owner(s.folder), time.time()):
        cloud.say(f"{key:<10}{text}")
    return 0


def table(
    s: Settings,
    kept: Kept,
    found: dict[str, Resource],
    workers: tuple[Worker, ...],
    step: int | None,
    left: list[str],
    owner: str,
    now: float,
) -> Iterator[tuple[str, str]]:
    """(what, text) of each line.

    Args:
      s: of the run.
      kept: what is remembered of it.
      found: zone -> what is there.
      workers: of the machine, where they could be asked.
      step: the newest checkpoint, where it is known.
      left: everything of this name, a line each.
      owner: the command that sees to the run, or "".
      now: seconds since 1970.
    """
    yield "run", f"{s.name}: {' '.join(kept.command or s.command)}"
    if kept.parcel is not None:
        count = len(kept.parcel.files)
        changes = f" and a patch to {count} file{'s' * (count > 1)}" * bool(count)
        yield "code", f"{kept.parcel.sha}: revision {kept.parcel.revision[:12]}{changes}"
    if kept.since:
        yield "phase", f"{kept.phase} for {_long(now - kept.since)}: {kept.why}"
    for zone, one in found.items():
        yield "machine", f"{one.state} in {zone}" + f": {one.why}" * bool(one.why)
    for worker in workers:
        yield f"worker {worker.number}", _told(worker)
    yield "step", f"{step}, the newest checkpoint in {s.workdir}" if step is not None else f"{kept.step} when last seen"
    hours, usd = cost.spent(kept.lives, now)
    yield "hours", f"{hours:.2f}{_of(s.max_hours)} on {len(kept.lives)} machine{'s' * (len(kept.lives) != 1)}"
    yield "USD", f"{usd:.2f}{_of(s.max_cost)}" if _priced(kept) else "no price is known"
    if owner:
        yield "watch", owner
    elif left:
        yield "watch", "nobody does: what is there costs till `watch` or `down`"
    for line in left or ["nothing"]:
        yield "there", line


def _told(worker: Worker) -> str:
    attempt = f" attempt {worker.attempt}" * bool(worker.attempt)
    code = "" if worker.code is None else f" with exit code {worker.code}"
    return f"{worker.what}{attempt}{code}" + f", code {worker.sha}" * bool(worker.sha)


def _of(most: float | None) -> str:
    return "" if most is None else f" of {most:g}"


def _priced(kept: Kept) -> bool:
    return all(life.usd_per_hour is not None for life in kept.lives)


def _long(seconds: float) -> str:
    hours, rest = divmod(max(0, int(seconds)), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
