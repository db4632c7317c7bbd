"""What `watch` does next: a function of what is seen, what is remembered, and the time. Nothing here acts.

All that an act needs is written down before it, and each act may be done twice, so that a kill between any two lines
costs nothing but time. `noting` has what is remembered of looks and acts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tpu import noting
from tpu.acts import Resource
from tpu.noting import Action, Seen, ending, given_up, next_zone, phase
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.state import Held, Kept, Phase

# Seconds.
SILENT = 600.0  # that a worker may not answer, while the run makes no progress, before its machine is given up
COMING = 3600.0  # that a machine may take to come, once the resources for it were found
SPLIT = 600.0  # that some workers may have ended well while others still run
NOTICE = 300.0  # after a signal ended the training: it may come before the machine is taken back
SAVE = 600.0  # for the training to save and end when it is asked to
GROUP = 60.0  # likewise where a worker has failed, without which the others can't save
LASTING = 3600.0  # of an attempt that counts as progress where nobody here can see checkpoints
FRUITLESS = 3  # attempts in a row that bring no newer checkpoint; each has restarted by itself before
SIGNALLED = (130, 143)  # exit codes of a training that a signal ended: it has saved


def decide(seen: Seen, kept: Kept, now: float, s: Settings) -> Action:
    """The next act.

    Args:
      seen: now.
      kept: of the last act.
      now: seconds since 1970; a clock that goes back stands still till it is where it was.
      s: of the run.
    """
    kept = noting.noted(seen, kept, now, s)
    now = kept.looked
    if not kept.end and (limit := noting.limit(kept.lives, now, s)):
        kept = ending(kept, "limit", limit)
    return _take_down(seen, kept, now) if kept.end else _go_on(seen, kept, now, s)


def _go_on(seen: Seen, kept: Kept, now: float, s: Settings) -> Action:
    held = kept.held
    if held is None:
        return _ask(seen, kept, now, s)
    second = next((zone for zone, one in seen.found.items() if zone != held.zone and one.state != "DELETING"), None)
    if second:
        return Action("delete", phase(kept, kept.phase, f"a second machine of this name, in {second}", now), second)
    resource = seen.found.get(held.zone)
    if resource is None and held.met:
        return _wait(kept, kept.phase, f"no machine is to be seen in {held.zone}", now)
    if resource is None and seen.found:
        return _wait(kept, kept.phase, f"a machine of this name is being deleted in {next(iter(seen.found))}", now)
    if resource is None:  # the create may have failed, or have been killed
        return Action("create", noting.asked(kept, held.zone, now, s, tries=kept.tries), held.zone)
    if resource.state == "DELETING":
        who = "" if held.deleting else ", by someone else"
        return _wait(kept, kept.phase, f"the machine in {held.zone} is being deleted{who}", now)
    if held.deleting:
        return _delete(kept, kept.phase, kept.why, now)
    return _STATES.get(resource.state or "", _coming)(seen, kept, held, resource, now, s)


def _ask(seen: Seen, kept: Kept, now: float, s: Settings) -> Action:
    """For a machine, in the zone whose turn it is."""
    zones = [zone for zone in s.zones if zone not in kept.refused]
    if not zones:
        why = "; ".join(f"{zone}: {said}" for zone, said in kept.refused.items())
        usage = kept.code == noting.BAD_INPUT
        kept = ending(kept, "failed", f"no machine can be made. {why}")
        return _take_down(seen, replace(kept, code=noting.BAD_INPUT) if usage else kept, now)
    zone = kept.zone if kept.zone in zones else zones[0]
    if 0 < kept.pause - now <= noting.PAUSE:  # a clock that was wrong when it was written asks for no more
        return _wait(kept, "waiting", f"no room: after a pause {zone} is asked again", now)
    return Action("create", phase(noting.asked(kept, zone, now, s), "waiting", f"asking in {zone}", now), zone)


def _queued(seen: Seen, kept: Kept, held: Held, resource: Resource, now: float, s: Settings) -> Action:
    others = [zone for zone in s.zones if zone not in kept.refused and zone != held.zone]
    patience = s.zone_patience * 2.0**kept.rounds  # who always leaves the queue never gets to its head
    if others and now - held.asked > patience * 60:
        why = f"no room in {held.zone} for {patience:g} minutes"
        return _delete(next_zone(kept, held.zone, now, s), "waiting", why, now)
    return _wait(kept, "waiting", f"{resource.state} in {held.zone}", now)


def _coming(seen: Seen, kept: Kept, held: Held, resource: Resource, now: float, s: Settings) -> Action:
    """It is being made; or it is in a state that is not known here, and may leave it."""
    if kept.phase == "provisioning" and now - kept.since > COMING:
        return _delete_bad(seen, kept, f"{resource.state} for {COMING / 60:g} minutes", now, s)
    return _wait(kept, "provisioning", f"{resource.state} in {held.zone}", now)


def _taken(seen: Seen, kept: Kept, held: Held, resource: Resource, now: float, s: Settings) -> Action:
    why = f"the machine in {held.zone} was taken back" + f": {resource.why}" * bool(resource.why)
    if resource.state == "SUSPENDING":
        return _wait(kept, "preempted", why, now)
    return _delete(kept, "preempted", why, now)  # its name is not free before


def _refused(seen: Seen, kept: Kept, held: Held, resource: Resource, now: float, s: Settings) -> Action:
    why = f"the request in {held.zone} failed" + f": {resource.why}" * bool(resource.why)
    if noting.hopeless(resource.why):
        kept = replace(kept, refused={**kept.refused, held.zone: resource.why})
    return _delete(next_zone(kept, held.zone, now, s), "waiting", why, now)


def _active(seen: Seen, kept: Kept, held: Held, resource: Resource, now: float, s: Settings) -> Action:
    """The machine is there: what its workers need."""
    workers, sha = seen.workers, kept.parcel.sha if kept.parcel else ""
    running = [one for one in workers if one.what == "running"]
    rest = [one for one in workers if one.what not in ("running", "silent")]
    ours = [one for one in rest if one.attempt == kept.attempt > 0 and one.sha == sha and not kept.update]
    if wrong := [one.number for one in ours if one.what == "ended" and one.code == noting.BAD_INPUT]:
        why = f"worker {wrong[0]} ended with exit code 2: its input is wrong, which a restart does not change"
        return _take_down(seen, replace(ending(kept, "failed", why), code=noting.BAD_INPUT), now)
    if len(ours) == len(workers) > 0 and all(one.what == "ended" and one.code == 0 for one in ours):
        return _take_down(seen, ending(kept, "done", "every worker ended with exit code 0"), now)
    if held.silent:
        numbers = [one.number for one in workers if one.what == "silent"]
        who = f"no answer from {_names(numbers) if numbers and len(numbers) < len(workers) else 'any worker'}"
        if now - held.silent > SILENT:
            return _delete_bad(seen, kept, f"{who} for {SILENT / 60:g} minutes", now, s)
        return _wait(kept, "running" if running else "installing", who, now)
    if held.idle and now - held.idle > s.idle_minutes * 60:
        why = f"nothing has trained on the machine for {s.idle_minutes:g} minutes (--idle_minutes); {kept.why}"
        return _take_down(seen, ending(kept, "failed", why), now)
    if running:
        return _running(kept, held, running, rest, sha, now)
    signalled = not kept.update and all(one.code in SIGNALLED and one.attempt == kept.attempt for one in rest)
    if signalled and now - held.idle < min(NOTICE, s.idle_minutes * 30):
        return _wait(kept, "running", "a signal ended the training: the machine may be about to be taken back", now)
    if missing := [one.number for one in rest if one.sha != sha]:
        kept = phase(kept, "installing", f"installing on {_names(missing)}", now)
        return Action("install", kept, held.zone)
    if not held.checked:
        return Action("check", phase(kept, "installing", "checking that all hosts and chips are there", now), held.zone)
    return _start(seen, kept, held, rest, now)


def _running(kept: Kept, held: Held, running: list[Worker], rest: list[Worker], sha: str, now: float) -> Action:
    """Some workers train: whether they are the whole group, and what to do where they are not."""
    top = max(one.attempt for one in running)
    if kept.update and any(one.sha != sha for one in running):
        return Action("stop", phase(kept, "running", "stopping what runs, for the new code", now), held.zone, SAVE)
    alike = len({one.sha for one in running}) == 1
    if not rest and alike and all(one.attempt == top for one in running):
        return _wait(replace(kept, update=False), "running", f"attempt {top}", now)
    patient = now - held.split < SPLIT
    started = held.attempt == top and all(one.what != "absent" and one.attempt < top for one in rest)
    if rest and started and patient and all(one.sha == sha for one in (*running, *rest)):
        why = f"attempt {top} was not started on {_names([one.number for one in rest])}"
        return Action("start", phase(kept, "running", why, now), held.zone)
    calm = all(one.what == "ended" and one.attempt == top and one.code in (0, *SIGNALLED) for one in rest)
    if rest and calm and patient:
        return _wait(kept, "running", f"{_names([one.number for one in rest])} ended, the others have not yet", now)
    why = "; ".join(_told(one) for one in rest) or "the workers do not run the same"
    return Action("stop", phase(kept, "running", f"stopping the group: {why}", now), held.zone, GROUP)


def _start(seen: Seen, kept: Kept, held: Held, rest: list[Worker], now: float) -> Action:
    """All is there, and nothing runs: the next attempt, or again the one whose start came to nothing."""
    if held.attempt == kept.attempt > max(one.attempt for one in rest):
        return Action("start", phase(kept, "running", f"starting attempt {kept.attempt} again", now), held.zone)
    ended = [one for one in rest if one.attempt]  # an attempt on this machine; else another machine's was cut off
    lasted = now - held.started > LASTING if ended and seen.step is None else False
    fruitless = 0 if kept.step > kept.mark or lasted else kept.fruitless + bool(ended and not kept.update)
    if fruitless >= FRUITLESS:
        why = f"{FRUITLESS} attempts in a row brought no newer checkpoint than step {kept.step}"
        return _take_down(seen, ending(kept, "failed", f"{why}; {'; '.join(map(_told, ended))}"), now)
    attempt = kept.attempt + 1
    why = f"starting attempt {attempt}" + "".join(f"; {_told(one)}" for one in ended[:1])
    kept = replace(
        kept,
        attempt=attempt,
        mark=kept.step,
        fruitless=fruitless,
        update=False,
        held=replace(held, attempt=attempt, started=now),
    )
    return Action("start", phase(kept, "running", why, now), held.zone)


def _take_down(seen: Seen, kept: Kept, now: float) -> Action:
    """The run ends: the training saves, the logs are fetched, all machines are deleted, and nothing must be left."""
    kept = phase(kept, "stopping", kept.why, now)
    held = kept.held
    for zone, resource in sorted(seen.found.items(), key=lambda one: held is None or one[0] != held.zone):
        if resource.state == "DELETING":
            continue
        if held is not None and zone == held.zone and resource.state == "ACTIVE" and not held.deleting:
            if not held.stopped and any(one.what in ("running", "silent") for one in seen.workers):
                return Action("stop", kept, zone, SAVE)
            if not held.fetched and any(one.attempt or one.what == "silent" for one in seen.workers):
                return Action("fetch", kept, zone)
        if held is not None and zone == held.zone:
            kept = replace(kept, held=replace(held, deleting=True))
        return Action("delete", kept, zone)
    if seen.found:
        return Action("wait", kept)
    return Action("prove", kept)


def _wait(kept: Kept, to: Phase, why: str, now: float) -> Action:
    return Action("wait", phase(kept, to, why, now))


def _delete(kept: Kept, to: Phase, why: str, now: float) -> Action:
    assert kept.held is not None
    kept = replace(kept, held=replace(kept.held, deleting=True))
    return Action("delete", phase(kept, to, why, now), kept.held.zone if kept.held else "")


def _delete_bad(seen: Seen, kept: Kept, why: str, now: float, s: Settings) -> Action:
    kept = given_up(kept, why, now, s)
    return _take_down(seen, kept, now) if kept.end else _delete(kept, kept.phase, kept.why, now)


def _names(numbers: list[int]) -> str:
    return f"worker{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _told(worker: Worker) -> str:
    how = f"ended with exit code {worker.code}" if worker.what == "ended" else f"is {worker.what}"
    return f"worker {worker.number} {how}"


_STATES: Mapping[str, Callable[[Seen, Kept, Held, Resource, float, Settings], Action]] = {
    "ACCEPTED": _queued,
    "WAITING_FOR_RESOURCES": _queued,
    "CREATING": _coming,
    "PROVISIONING": _coming,
    "ACTIVE": _active,
    "SUSPENDING": _taken,
    "SUSPENDED": _taken,
    "FAILED": _refused,
}
