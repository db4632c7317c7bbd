"""The verb `watch`: the whole life of a run, from no machine to no machine, and again after each preemption and fault.

look -> decide -> write down -> act, and again. Whoever kills it may start it again at any time.
"""

import argparse
import contextlib
import dataclasses
import shlex
import time
from pathlib import Path

from tpu import acts, cost, logs, machines, noting, shipping, state, steps
from tpu.following import EVERY, LONGEST, World, follow
from tpu.gcloud import Cloud
from tpu.meaning import CloudError
from tpu.noting import Action, Seen
from tpu.settings import Settings, UserError
from tpu.state import Kept

REPOSITORY = Path(__file__).resolve().parent.parent
INTERRUPTED = 130
SHOWN = 30  # lines of what workers printed before they failed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument(
        "--every", type=_seconds, default=EVERY, metavar="S", help="seconds between looks (default: 30)"
    )
    parser.add_argument("--update", action="store_true", help="ship the code and the command as they are now")
    parser.add_argument("--again", action="store_true", help="go on with a run that has ended")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, above 0, at most {LONGEST:g}")
    return seconds


def watch(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """See a run through.

    Args:
      s: of the run.
      cloud: runs the commands.
      flags: `every` (seconds between looks), `update` (the code as it is now), `again` (after a run that has ended).

    Returns:
      0: done; 1: failed; 2: the training says that its input is wrong; 3: a limit was reached; 130: Ctrl-C.
    """
    with contextlib.nullcontext() if cloud.dry_run else state.held(s.folder, "watch"):
        kept = _begin(Kept() if cloud.dry_run else state.load(s.folder), s, cloud, flags)
        s = dataclasses.replace(s, command=kept.command)
        if kept.phase in state.ENDED:
            return _ended_before(kept, s, cloud)
        world = World(
            look=lambda kept, first: look(cloud, s, kept, first),
            act=lambda action: _told(cloud, s, action),
            write=(lambda kept: None) if cloud.dry_run else (lambda kept: state.save(s.folder, kept)),
            say=cloud.say,
            clock=time.time,
            sleep=cloud.sleep,
        )
        world.write(kept)
        try:
            kept = follow(kept, s, world, flags.every)
        except KeyboardInterrupt:
            cloud.say(f"# stopped watching; the machine and the training are left as they are. {_on(s)}")
            return INTERRUPTED
        for line in (
            summary(kept, s, time.time()) if not cloud.dry_run else ["# that is the good case; nothing was run"]
        ):
            cloud.say(line)
        return kept.code


def look(cloud: Cloud, s: Settings, kept: Kept, first: bool) -> Seen:
    """What is there: in all zones only where it is not known where, since one may not answer while a machine costs."""
    if first or kept.held is None or not kept.held.met:
        found = dict(acts.find(cloud, s))
        for zone, one in found.items():
            acts.same(s, zone, one)
    else:
        one = acts.resource(cloud, s, kept.held.zone)
        found = {kept.held.zone: one} if one.state is not None else {}
    zone = noting.chosen(found, kept)
    if zone not in found or found[zone].state != "ACTIVE":
        return Seen(found, first=first)
    workers = acts.workers(cloud, s, zone)
    return Seen(found, workers, steps.newest(cloud, s), first)


def act(cloud: Cloud, s: Settings, action: Action) -> str:
    """Do what was decided.

    Returns:
      Of "fetch" the first error of any worker; else "".

    Raises:
      CloudError: it failed.
    """
    kept, zone = action.kept, action.zone
    if action.do == "create":
        acts.create(cloud, s, zone)
    elif action.do == "delete":
        acts.delete(cloud, s, zone)
    elif action.do == "install" and kept.parcel is not None:
        acts.ship(cloud, s, zone, kept.parcel)
        if wrong := [one for one in acts.install(cloud, s, zone, kept.parcel) if one.sha != kept.parcel.sha]:
            raise CloudError("worker", f"worker {wrong[0].number} says that {wrong[0].sha or 'nothing'} is installed.")
    elif action.do == "check":
        acts.check(cloud, s, zone)
    elif action.do == "start":
        acts.start(cloud, s, zone, kept.attempt)
    elif action.do == "stop":
        acts.stop(cloud, s, zone, action.seconds)
    elif action.do == "fetch":
        return logs.first_error(logs.fetch(cloud, s, zone)) or ""
    elif action.do == "prove":
        _prove(cloud, s)
    return ""


def _told(cloud: Cloud, s: Settings, action: Action) -> str:
    """`act`; what workers printed before they failed is shown, since their machine may not be there to be asked."""
    try:
        return act(cloud, s, action)
    except CloudError as error:
        if action.do in ("install", "check", "start") and error.done is not None:
            for line in error.done.out.splitlines()[-SHOWN:]:
                cloud.say(f"#   {line}")
        raise


def _prove(cloud: Cloud, s: Settings) -> None:
    """Nothing of this name is in any zone; TPU VMs that no request holds are deleted."""
    if acts.left(cloud, s):
        for zone in s.zones:
            acts.delete(cloud, s, zone)
    if left := acts.left(cloud, s):
        raise CloudError("unknown", f"still there: {'; '.join(left)}.", _down(s))


def summary(kept: Kept, s: Settings, now: float) -> list[str]:
    """What to say of a run that has ended."""
    hours, usd = cost.spent(kept.lives, now)
    priced = all(life.usd_per_hour is not None for life in kept.lives)
    paid = f"{usd:.2f} USD" if priced else "of no known price"
    machines_of = f"{len(kept.lives)} machine{'s' * (len(kept.lives) != 1)}"
    return [
        f"# {kept.phase}: {kept.why}",
        f"# nothing of the name {s.name} is left in {', '.join(s.zones)}",
        f"# {machines_of}, {hours:.2f} hours, {paid}; newest checkpoint: step {kept.step}, in {s.workdir}",
    ]


def _begin(kept: Kept, s: Settings, cloud: Cloud, flags: argparse.Namespace) -> Kept:
    """What is remembered, made ready for this command: its code packed, and in accord with the settings."""
    _agree(kept, s)
    raised = kept.phase == "limit" and not noting.limit(kept.lives, time.time(), s)
    packed = _packed(kept, s, cloud, flags)
    changed = kept.parcel is not None and (packed.sha, s.command) != (kept.parcel.sha, kept.command)
    if kept.phase in state.ENDED:
        if not (flags.again or raised or (flags.update and changed)):
            return kept
        kept = state.afresh(kept)
    if s.max_cost is not None and machines.price(machines.of(s.type), s.capacity, s.prices) is None:
        raise UserError(f"--max_cost={s.max_cost:g}: no price of {s.type} is known. Give one with --prices=FILE.")
    if s.max_cost is None and s.max_hours is None:
        cloud.say("# no limit: neither --max_hours nor --max_cost is set")
    if kept.parcel is None:
        kept = dataclasses.replace(kept, attempt=max(kept.attempt, logs.newest(cloud, s)))
    elif changed and not flags.update:
        cloud.say(f"# the code or the command has changed; the run goes on with parcel {kept.parcel.sha} and")
        cloud.say(f"# {shlex.join(kept.command)}, as it began. --update ships what is here now.")
    if kept.parcel is None or flags.update:
        shipping.refuse_missing(REPOSITORY, s.command)
        kept = dataclasses.replace(kept, parcel=packed, command=s.command, update=changed or kept.update)
    elif not kept.parcel.file.is_file():
        raise UserError(
            f"{str(kept.parcel.file)!r}, the code of this run, is not there any more. --update ships the code as it is "
            f"now. {_down(s)}"
        )
    # Who starts it again may have got what a zone refused.
    return dataclasses.replace(
        kept, project=s.project, workdir=s.workdir, refused={}, code=0 if not kept.end else kept.code
    )


def _packed(kept: Kept, s: Settings, cloud: Cloud, flags: argparse.Namespace) -> shipping.Parcel:
    """The code as it is here now; a run that goes on does not need it, and so not that it can be packed."""
    try:
        return shipping.pack(REPOSITORY, s.folder, dry_run=cloud.dry_run)
    except UserError as error:
        if kept.parcel is None or flags.update:
            raise
        cloud.say(f"# the code as it is here now can't be shipped: {error}")
        return kept.parcel


def _agree(kept: Kept, s: Settings) -> None:
    """Refuse settings under which a machine that is there, or the run's checkpoints, would be forgotten."""
    zones = {life.zone for life in kept.lives if life.ended is None} | ({kept.held.zone} if kept.held else set())
    if zones and kept.project != s.project:
        raise UserError(
            f"--project={s.project!r}: the machine of this run is in {kept.project!r}. Say --project={kept.project}, "
            "or choose another --name."
        )
    if lost := sorted(zones - set(s.zones)):
        raise UserError(
            f"--zone={','.join(s.zones)!r}: a machine of this run may be in {lost[0]}. Say "
            f"--zone={','.join((lost[0], *s.zones))}."
        )
    if kept.workdir and kept.workdir != s.workdir and kept.phase not in state.ENDED:
        raise UserError(
            f"this run saves in {kept.workdir!r}, not in {s.workdir!r}. Choose another --name, or the same --bucket."
        )


def _ended_before(kept: Kept, s: Settings, cloud: Cloud) -> int:
    """Say how the run ended; nothing is begun, so that whoever starts `watch` again and again pays nothing more."""
    if left := acts.left(cloud, s):
        raise CloudError(
            "exists", f"this run has ended ({kept.phase}), and yet there is {'; '.join(left)}.",
            f"{_down(s)} --again goes on with it.",
        )  # fmt: skip
    for line in summary(kept, s, time.time()):
        cloud.say(line)
    on = {"limit": "A higher limit", "done": "--again"}.get(
        kept.phase, "--again, or --update with the code as it is now,"
    )
    cloud.say(f"# it ended before this command. {on} goes on.")
    return kept.code


def _on(s: Settings) -> str:
    return f"The same command goes on; `python tpu/launch.py down --name={s.name}` deletes the machine."


def _down(s: Settings) -> str:
    return f"`python tpu/launch.py down --name={s.name}` deletes what is there."
