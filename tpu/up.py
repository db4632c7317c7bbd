"""The verb `up`: ask for the machine, zone after zone, and wait till it is there.

It decides as `watch` does, and so leaves a state file that `watch` goes on from.
"""

import argparse
import contextlib
import dataclasses
import time

from tpu import acts, deciding, keys, machines, noting, state
from tpu.gcloud import Cloud, CloudError
from tpu.noting import Action, Seen
from tpu.settings import Settings, UserError
from tpu.state import Kept

EVERY = 10.0  # seconds between looks
TELLS = 60.0  # seconds after which a wait without news is told of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument("--every", default=str(EVERY), metavar="SECONDS", help="between looks (default: 10)")


def up(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Return when the machine is there; one that is there already is taken as it is."""
    every = keys.number("every", flags.every)
    for zone in s.zones:
        if hint := machines.offered(machines.of(s.type), zone):
            cloud.say(f"# {hint}")
    with contextlib.nullcontext() if cloud.dry_run else state.held(s.folder, "up"):
        kept = Kept() if cloud.dry_run else state.load(s.folder)
        kept = dataclasses.replace(state.afresh(kept) if kept.end else kept, project=s.project)
        started, told, first = time.monotonic(), ("", 0.0), True
        while True:
            try:
                found = dict(acts.find(cloud, s))
            except CloudError as error:
                if first or error.kind not in ("transient", "unknown"):
                    raise
                cloud.say(f"# {error}")
                cloud.sleep(every)
                continue
            for zone, resource in found.items():
                acts.same(s, zone, resource)
            seen, now = Seen(found, first=first), time.time()
            noted = noting.noted(seen, kept, now, s)
            zone = noted.held.zone if noted.held else ""
            if zone in found and found[zone].state == "ACTIVE":
                if noted.phase in ("waiting", "provisioning", "preempted"):
                    noted = noting.phase(noted, "waiting", f"{zone} is ready for `run` or `watch`", now)
                _save(cloud, s, noted)
                return _ready(cloud, s, zone)
            action = deciding.decide(seen, kept, now, s)
            if action.kept.end:
                said = f"no machine {s.name!r}: {action.kept.why}"
                raise UserError(said) if action.kept.code == noting.BAD_INPUT else CloudError("unknown", said)
            waited = time.monotonic() - started
            if action.kept.why != told[0] or waited - told[1] >= TELLS:
                told = (action.kept.why, waited)
                cloud.say(f"# {action.kept.phase}: {action.kept.why}; {waited:.0f} s")
            first = False
            _save(cloud, s, action.kept)
            kept = _act(cloud, s, action, every)
            _save(cloud, s, kept)
            if action.do == "wait":
                cloud.sleep(every)


def _act(cloud: Cloud, s: Settings, action: Action, every: float) -> Kept:
    """Do it; what is to be remembered after it. What failed is not done again at once."""
    try:
        if action.do == "create":
            acts.create(cloud, s, action.zone)
        elif action.do == "delete":
            acts.delete(cloud, s, action.zone)
    except CloudError as error:
        if error.kind == "gone":
            raise
        cloud.say(f"# {error}")
        cloud.sleep(every)
        return noting.failed(action, action.kept, error, time.time(), s)
    return noting.did(action, action.kept, time.time(), "")


def _save(cloud: Cloud, s: Settings, kept: Kept) -> None:
    if not cloud.dry_run:
        state.save(s.folder, kept)


def _ready(cloud: Cloud, s: Settings, zone: str) -> int:
    machine = machines.of(s.type)
    price = machines.price(machine, s.capacity, s.prices)
    usd = "?" if price is None else f"{price * machine.chips * s.slices:.2f}"
    slices = f"{s.slices} slices, each of " if s.slices > 1 else ""
    cloud.say(
        f"# {s.name} is ready in {zone}: {slices}{machine.hosts} hosts with {machine.chips} chips of {machine.chip}. "
        f"It costs {usd} USD an hour ({s.capacity}) till `python tpu/launch.py down`."
    )
    return 0
