"""The verb `down`: what costs is deleted, and seen to be gone."""

import argparse
import contextlib
import dataclasses
import time

from tpu import acts, bill, machines, noting, state
from tpu.gcloud import Cloud, CloudError
from tpu.settings import Settings
from tpu.state import Kept, StateError

SAVE = 600.0  # seconds for the training to save and end, before its machine goes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument("--now", action="store_true", help="without letting the training save")


def down(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Delete all of this name in all zones, after the training has saved, and prove that nothing is left."""
    try:
        s, damaged = bill.everywhere(s), False
    except StateError as error:  # what costs is deleted all the same
        damaged = True
        cloud.say(f"# {error} Only the zones of --zone are looked at.")
    with contextlib.nullcontext() if cloud.dry_run else state.held(s.folder, "down"):
        errors = []
        for zone in s.zones:
            try:
                _delete(s, cloud, zone, flags.now)
            except CloudError as error:  # the machine of another zone is deleted all the same
                errors.append(error)
                cloud.say(f"# {zone}: {error}")
        if errors:
            raise errors[0]
        left = acts.left(cloud, s)
        kept = Kept() if damaged else state.load(s.folder)
        if not left and kept.lives and not cloud.dry_run:
            kept = state.closed(kept, now := time.time(), "deleted")
            ended = kept.phase in state.ENDED
            state.save(s.folder, kept if ended else noting.phase(kept, "waiting", "deleted by `down`", now))
    if left:
        raise CloudError("unknown", f"still there: {'; '.join(left)}.", "Run `python tpu/launch.py down` again.")
    cloud.say(f"# Nothing of {s.name} is left in {', '.join(s.zones)}.")
    return 0


def _delete(s: Settings, cloud: Cloud, zone: str, now: bool) -> None:
    """What there is in a zone."""
    found = acts.resource(cloud, s, zone)
    there = dataclasses.replace(s, type=s.type or found.type, slices=found.slices or s.slices)
    if found.state == "ACTIVE" and there.type in machines.TYPES and not now:
        cloud.say(f"# A training that runs saves and ends: at most {SAVE / 60:.0f} minutes; --now skips that.")
        acts.stop(cloud, there, zone, SAVE)
    acts.delete(cloud, s, zone)
