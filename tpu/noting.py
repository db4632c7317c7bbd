"""What `watch` remembers of a look at the cloud, of an act that was done, and of one that failed. Nothing here acts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tpu import cost, machines
from tpu.acts import Resource
from tpu.meaning import CloudError, error_of
from tpu.processes import Done
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.state import End, Held, Kept, Phase, closed, opened, over

Do = Literal["wait", "create", "delete", "install", "check", "start", "stop", "fetch", "prove"]
ABSENT = 3  # looks in a row that don't see a machine, before it is believed to be gone
BAD = 3  # machines in a row that are given up without progress of the run
TRIES = 3  # of an act whose failure may be the machine's fault or the code's
BLIND = 5  # of a create that fails for reasons that nobody knows
BACKOFF, PAUSE = 30.0, 600.0  # seconds before all zones are tried again: doubled each time, up to PAUSE
CODES: Mapping[End, int] = {"done": 0, "failed": 1, "limit": 3}  # of `watch`
BAD_INPUT = 2  # exit code, of the training too
# States of a machine: nothing costs yet; nothing costs any more; the best first, where there are several.
FREE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
OVER = ("SUSPENDED", "FAILED")
RANK = ("ACTIVE", "PROVISIONING", "CREATING", "WAITING_FOR_RESOURCES", "ACCEPTED")


@dataclass(frozen=True)
class Seen:
    """What a look at the cloud found.

    Attributes:
      found: zone -> what is there of this name.
      workers: of the machine that is held, where it is ACTIVE.
      step: the newest checkpoint; None where it is unknown.
      first: nobody watched before this look, so that others may have changed things on purpose.
    """

    found: Mapping[str, Resource]
    workers: tuple[Worker, ...] = ()
    step: int | None = None
    first: bool = False


@dataclass(frozen=True)
class Action:
    """What to do next.

    Attributes:
      do: which act.
      kept: what to write before it.
      zone: of the machine.
      seconds: that "stop" leaves the training to save.
    """

    do: Do
    kept: Kept
    zone: str = ""
    seconds: float = 0.0


def chosen(found: Mapping[str, Resource], kept: Kept) -> str:
    """The zone of the machine that is the run's: the one that is held, or else the one that is furthest; "": none."""
    if kept.held is not None or not found:
        return kept.held.zone if kept.held else ""
    order = {state: place for place, state in enumerate(RANK)}
    return min(found, key=lambda zone: (order.get(found[zone].state or "", len(RANK)), zone != kept.zone))


def noted(seen: Seen, kept: Kept, now: float, s: Settings) -> Kept:
    """After a look."""
    now, before = max(now, kept.looked), kept.looked  # a clock that goes back must not make anything cheaper
    newer = seen.step is not None and seen.step > kept.step
    kept = replace(kept, looked=now, step=max(kept.step, seen.step or 0), bad=0 if newer else kept.bad)
    kept = _met(_missed(kept, seen, now), seen, now)
    resource = seen.found.get(kept.held.zone) if kept.held else None
    if resource is None:
        return kept
    kept = _cost(kept, resource, before or now, now, s)
    if resource.state == "ACTIVE":
        kept = replace(_workers(kept, seen.workers, newer, now), rounds=0, pause=0.0)
    return kept


def _missed(kept: Kept, seen: Seen, now: float) -> Kept:
    """Where the machine that is held is not to be seen."""
    held = kept.held
    if held is None or held.zone in seen.found:
        return kept
    held = replace(held, absent=held.absent + 1)
    ours = held.deleting or bool(kept.end) or seen.first
    if not held.met or not (ours or held.absent >= ABSENT):
        return replace(kept, held=held)
    kept = closed(kept, now, "deleted" if held.deleting else "gone", held.zone)
    # Whoever deletes a machine that is watched wants it to be gone.
    return kept if ours else ending(kept, "failed", f"someone else deleted the machine in {held.zone}")


def _met(kept: Kept, seen: Seen, now: float) -> Kept:
    """The machine that is seen; one that is not held is from now on."""
    held, zone = kept.held, chosen(seen.found, kept)
    if zone not in seen.found:
        return kept
    if held is None:
        kept, held = replace(kept, tries=0), Held(zone, now, deleting=seen.found[zone].state == "DELETING")
    if seen.first:  # while nobody watched, nobody could have done anything about it
        going = held.deleting or seen.found[zone].state == "DELETING"
        held = replace(held, idle=0.0, silent=0.0, split=0.0, deleting=going)
    return replace(kept, held=replace(held, met=True, absent=0))


def _cost(kept: Kept, resource: Resource, before: float, now: float, s: Settings) -> Kept:
    """When the machine began and ended to cost: at the latest look before, and the first one after, so never less."""
    assert kept.held is not None
    zone, state = kept.held.zone, resource.state
    life = next((one for one in kept.lives if one.ended is None and one.zone == zone), None)
    if state in OVER and s.slices == 1:  # of several slices the others may still run
        unseen = (now - before) / 3600
        return over(kept, now, zone, state.lower() + f", within {unseen:.1f} hours that nobody watched" * (unseen > 1))
    if state in FREE or state == "DELETING" or (state in OVER and life is None):
        return kept
    life = life or replace(_life(s, zone), begun=now)
    return opened(kept, life if life.begun is not None else replace(life, begun=before))


def _life(s: Settings, zone: str) -> cost.Life:
    """Of a machine that is asked for."""
    machine = machines.of(s.type)
    price = machines.price(machine, s.capacity, s.prices)
    chips = machine.chips * s.slices
    return cost.Life(zone, None, None, chips, None if price is None else price * chips)


def _workers(kept: Kept, workers: tuple[Worker, ...], newer: bool, now: float) -> Kept:
    """Since when is what."""
    held = kept.held
    assert held is not None
    running = [one for one in workers if one.what == "running"]
    silent = not workers or any(one.what == "silent" for one in workers)
    alike = all(one.what == "running" for one in workers)
    held = replace(
        held,
        idle=0.0 if running or silent else held.idle or now,
        silent=0.0 if not silent else now if newer else held.silent or now,
        split=0.0 if alike or silent or not running else held.split or now,
    )
    return replace(kept, held=held, attempt=max([kept.attempt, *(one.attempt for one in workers)]))


def asked(kept: Kept, zone: str, now: float, s: Settings, tries: int = 0) -> Kept:
    """Before a machine is asked for: whatever happens now, it is known that it may be there, and may cost."""
    return opened(replace(kept, held=Held(zone, now), zone=zone, tries=tries), _life(s, zone))


def did(action: Action, kept: Kept, now: float, said: str) -> Kept:
    """After an act.

    Args:
      action: it.
      kept: what was written before it.
      now: seconds since 1970.
      said: what it has to say; of "fetch" the first error of any worker.
    """
    kept = replace(kept, tries=0)
    if action.do == "delete":
        why = kept.phase if kept.phase in ("preempted", "stopping") else "given up"
        return closed(kept, max(now, kept.looked), why, action.zone)
    if action.do == "prove":
        return phase(closed(kept, max(now, kept.looked), "gone"), kept.end or "failed", kept.why, now)
    if action.do == "fetch" and said and kept.end == "failed":
        kept = replace(kept, why=f"{kept.why}\n{said}")
    return _flagged(kept, action.do)


def _flagged(kept: Kept, do: Do) -> Kept:
    if kept.held is None:
        return kept
    held = kept.held
    flags = {
        "install": replace(held, idle=0.0),  # that was no idle time
        "check": replace(held, checked=True, idle=0.0),
        "stop": replace(held, stopped=bool(kept.end)),
        "fetch": replace(held, fetched=True),
    }
    return replace(kept, held=flags.get(do, held))


def failed(action: Action, kept: Kept, error: CloudError, now: float, s: Settings) -> Kept:
    """After an act that failed; what it had begun, the next look shows."""
    now = max(now, kept.looked)
    kept = replace(kept, tries=kept.tries + 1)
    if action.do == "create":
        return _not_created(kept, action.zone, error, now, s)
    if action.do in ("stop", "fetch") and kept.end and kept.tries >= TRIES - 1:
        return _flagged(replace(kept, tries=0), action.do)
    if kept.tries < TRIES or kept.end or kept.held is None:
        return kept
    if action.do == "install" and error.kind in ("worker", "permission"):  # the code's fault, or this machine's
        return ending(kept, "failed", f"the code can't be installed. {error}")
    if action.do in ("install", "check", "start", "stop"):
        return given_up(kept, f"{action.do}: {error}", now, s)
    return kept


def _not_created(kept: Kept, zone: str, error: CloudError, now: float, s: Settings) -> Kept:
    """A create may fail and yet have made something: only what says that there is nothing ends the attempt."""
    if error.kind in ("capacity", "quota", "permission", "missing", "usage"):
        kept = closed(kept, now, error.kind, zone)
        if error.kind != "capacity":
            code = BAD_INPUT if error.kind == "usage" else 1
            kept = replace(kept, refused={**kept.refused, zone: str(error)}, code=code)
        return next_zone(replace(kept, tries=0), zone, now, s)
    if error.kind == "transient":  # the cloud will come back
        return replace(kept, tries=min(kept.tries, BLIND - 1))
    if kept.tries >= BLIND:
        return ending(kept, "failed", f"no machine can be made in {zone}: {error}")
    return kept


def next_zone(kept: Kept, zone: str, now: float, s: Settings) -> Kept:
    """The one after `zone`; after the last, first a pause."""
    zones = [one for one in s.zones if one not in kept.refused or one == zone]
    place = zones.index(zone) + 1 if zone in zones else 0
    if left := [one for one in zones[place:] if one not in kept.refused]:
        return replace(kept, zone=left[0])
    pause = min(BACKOFF * 2.0**kept.rounds, PAUSE)
    return replace(kept, zone="", rounds=min(kept.rounds + 1, 10), pause=now + pause)


def given_up(kept: Kept, why: str, now: float, s: Settings) -> Kept:
    """With a machine that is to be deleted, since it is of no use."""
    held = kept.held
    assert held is not None
    kept = replace(kept, bad=kept.bad + 1, tries=0)
    if kept.bad >= BAD:
        return ending(kept, "failed", f"{BAD} machines in a row were of no use; the last: {why}")
    kept = replace(next_zone(kept, held.zone, now, s), held=replace(held, deleting=True))
    return phase(kept, "waiting", f"given up: {why}", now)


def ending(kept: Kept, end: End, why: str) -> Kept:
    """With an end that is known; what follows is taking down."""
    return replace(kept, end=end, code=CODES[end], why=why, tries=0)


def phase(kept: Kept, to: Phase, why: str, now: float) -> Kept:
    """In a phase, and why."""
    return replace(kept, phase=to, why=why, since=kept.since if kept.since and kept.phase == to else now)


def limit(lives: tuple[cost.Life, ...], now: float, s: Settings) -> str:
    """Which limit is reached, in words; "": none."""
    hours, usd = cost.spent(lives, now)
    if s.max_hours is not None and hours >= s.max_hours:
        return f"--max_hours={s.max_hours:g}: {hours:.2f} hours of machines"
    if s.max_cost is not None and usd >= s.max_cost:
        return f"--max_cost={s.max_cost:g}: {usd:.2f} USD"
    return ""


def hopeless(said: str) -> bool:
    """Whether a request failed for what no waiting changes."""
    return error_of((), Done(1, "", said)).kind in ("quota", "permission", "usage")
