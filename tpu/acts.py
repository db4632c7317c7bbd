"""What is done to machines and workers, so that doing it twice is as good as once.

Each act may be cut off at any line and done again. One command goes to all workers of a slice at the same time, and one
to each slice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tpu import gcloud, machines, remote
from tpu.gcloud import Cloud
from tpu.meaning import CloudError, Kind, error_of
from tpu.processes import Done
from tpu.remote import Worker
from tpu.settings import Settings, UserError
from tpu.shipping import Parcel

POLL = 10.0  # seconds between looks at what takes its time
SECONDS = {"look": 90.0, "ship": 900.0, "install": 1800.0, "check": 900.0, "start": 300.0, "delete": 1200.0}
# States of a TPU VM, https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State.
_COMING = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING")


@dataclasses.dataclass(frozen=True)
class Resource:
    """What there is of a machine in a zone.

    Attributes:
      state: of the queued resource; None: there is none. SUSPENDED too where it says ACTIVE and a TPU VM of it is not
        there any more, and PROVISIONING where one is not there yet.
      nodes: names of its TPU VMs that are there.
      why: what is said of a state that is not good.
      type: accelerator type; "" where it is not told.
      slices: how many; 0 where it is not told.
    """

    state: str | None = None
    nodes: tuple[str, ...] = ()
    why: str = ""
    type: str = ""
    slices: int = 0


def find(cloud: Cloud, s: Settings) -> list[tuple[str, Resource]]:
    """Where there is something of this name: (zone, what), in the order of the zones."""
    found = ((zone, resource(cloud, s, zone)) for zone in s.zones)
    return [(zone, one) for zone, one in found if one.state is not None]


def resource(cloud: Cloud, s: Settings, zone: str) -> Resource:
    """What there is of the machine in one zone."""
    try:
        told = cloud.json(gcloud.describe(s, zone))
    except CloudError as error:
        if error.kind == "missing":
            return Resource()
        raise
    if not told:
        return Resource()
    state, why = _state(told)
    specs = told.get("tpu", {}).get("nodeSpec", [])
    type = next((spec.get("node", {}).get("acceleratorType", "") for spec in specs), "")
    nodes = _nodes(cloud, s, zone) if state == "ACTIVE" else {}
    lost = {name: nodes.get(name, "gone") for name in gcloud.node_names(s) if nodes.get(name) != "READY"}
    if state == "ACTIVE" and lost:
        why = ", ".join(f"TPU VM {name} is {said}" for name, said in lost.items())
        state = "PROVISIONING" if all(said in _COMING for said in lost.values()) else "SUSPENDED"
    slices = sum(int(spec.get("multisliceParams", {}).get("nodeCount", 1)) for spec in specs)
    return Resource(state, tuple(nodes), why, type, slices)


def same(s: Settings, zone: str, found: Resource) -> None:
    """Refuse a machine of this name that is another than the one that is asked for."""
    asked, there = (s.type, s.slices), (found.type or s.type, found.slices or s.slices)
    if asked != there:
        what, other = (f"{type} ({slices} slice{'s' * (slices > 1)})" for type, slices in (asked, there))
        raise UserError(
            f"--name={s.name!r} is taken in {zone}: a {other}, not the {what} asked for. Choose another name, or "
            f"delete it: python tpu/launch.py down --name={s.name} --project={s.project} --zone={zone}"
        )


def create(cloud: Cloud, s: Settings, zone: str) -> None:
    """Ask for the machine. One that is there and alike is ours, also where the command said that it failed.

    Raises:
      CloudError: there is none after it.
      UserError: there is one of this name that is not alike.
    """
    try:
        cloud.run(gcloud.create(s, zone), limit=600)
    except CloudError as error:
        if error.kind in ("gone", "permission"):
            raise
        found = resource(cloud, s, zone)
        if found.state is None or found.state == "FAILED":
            hint = machines.offered(machines.of(s.type), zone) if error.kind in ("usage", "missing") else ""
            raise CloudError(error.kind, error.said, f"{error.remedy} {hint}".strip(), error.done) from error
        same(s, zone, found)
        if error.kind != "exists":
            cloud.say(f"# It is there all the same: {found.state}.")


def delete(cloud: Cloud, s: Settings, zone: str) -> None:
    """Delete all of this name in a zone, and wait till nothing is left of it.

    Raises:
      CloudError: something is left after 20 minutes.
    """
    last = ""
    for look in range(round(SECONDS["delete"] / POLL)):
        state, nodes = resource(cloud, s, zone).state, _nodes(cloud, s, zone)
        if state is None and not nodes:
            return
        if look:
            cloud.sleep(POLL)
        try:
            if state is None:
                for node in nodes:
                    cloud.run(gcloud.delete_node(s, zone, node), limit=SECONDS["delete"])
            elif state != "DELETING" or not look:
                cloud.run(gcloud.delete(s, zone), limit=SECONDS["delete"])
        except CloudError as error:
            if error.kind in ("gone", "permission"):
                raise
            last = error.said  # such as: not while it is being made
    said = f"{s.name} in {zone} is still there after {SECONDS['delete'] / 60:.0f} minutes. {last}".strip()
    raise CloudError("unknown", said, "Look at it in the console, and run `python tpu/launch.py down` again.")


def left(cloud: Cloud, s: Settings) -> list[str]:
    """All of this name that there is in all zones, one line each; empty: nothing runs, nothing costs."""
    found = []
    for zone in s.zones:
        for told in cloud.json(gcloud.list_queued(s, zone)) or []:
            if _name(told) == s.name:
                found.append(f"queued resource {s.name} in {zone}: {_state(told)[0]}")
        found += [f"TPU VM {name} in {zone}: {state}" for name, state in _nodes(cloud, s, zone).items()]
    return found


def workers(cloud: Cloud, s: Settings, zone: str) -> tuple[Worker, ...]:
    """What each worker says of itself; who does not answer in time is silent, and what ssh says of it is told once."""
    done = _all(cloud, s, zone, lambda slice: remote.state(s, slice=slice), SECONDS["look"], quiet=True)
    found = _parsed(s, done)
    if any(worker.what == "silent" for worker in found):
        for one in done:
            if one.code:
                cloud.once(f"# {error_of(gcloud.ssh(s, zone, ''), one)}")
    return found


def ship(cloud: Cloud, s: Settings, zone: str, parcel: Parcel) -> None:
    """Copy a parcel to all workers that have not installed it."""
    if all(worker.sha == parcel.sha for worker in workers(cloud, s, zone)):
        return
    commands = [
        gcloud.scp(s, zone, [parcel.file], remote.landing(s, parcel), node=node) for node in gcloud.node_names(s)
    ]
    for words, done in zip(commands, cloud.together(commands, limit=SECONDS["ship"]), strict=True):
        if done.code:
            raise error_of(words, done)


def install(cloud: Cloud, s: Settings, zone: str, parcel: Parcel) -> tuple[Worker, ...]:
    """Install a parcel that was shipped, on all workers at the same time.

    Raises:
      CloudError: of kind "worker", with what each says that could not.
    """
    return _must(cloud, s, zone, "install", lambda slice: remote.install(s, parcel, slice=slice))


def check(cloud: Cloud, s: Settings, zone: str) -> tuple[Worker, ...]:
    """See that all hosts and chips are there and the software works; CloudError, as `install` raises it."""
    return _must(cloud, s, zone, "check", lambda slice: remote.check(s, slice=slice))


def start(cloud: Cloud, s: Settings, zone: str, attempt: int) -> tuple[Worker, ...]:
    """Start the training on all workers, unless that attempt was; CloudError, as `install` raises it."""
    return _must(cloud, s, zone, "start", lambda slice: remote.start(s, attempt, slice=slice))


def stop(cloud: Cloud, s: Settings, zone: str, seconds: float) -> tuple[Worker, ...]:
    """End the training on all workers, saved; what they say then. Who does not answer is silent, and no error."""
    done = _all(cloud, s, zone, lambda slice: remote.stop(s, seconds, slice=slice), seconds + 120)
    return _parsed(s, done)


def _state(told: dict[str, Any]) -> tuple[str, str]:
    """(state, what is said of it) of a queued resource."""
    state = told.get("state", {})
    reasons = (data.get("error", {}).get("message", "") for data in state.values() if isinstance(data, dict))
    return state.get("state", "STATE_UNSPECIFIED"), " ".join(filter(None, reasons))


def _name(told: dict[str, Any]) -> str:
    """The last part of "projects/P/locations/Z/queuedResources/NAME"."""
    return str(told.get("name", "")).rpartition("/")[2]


def _nodes(cloud: Cloud, s: Settings, zone: str) -> dict[str, str]:
    """TPU VMs of this run in a zone: name -> state. One that another request holds is another's, whatever its name."""
    found = {}
    for told in cloud.json(gcloud.list_nodes(s, zone)) or []:
        holder = str(told.get("queuedResource", "")).rpartition("/")[2]
        if holder == s.name or (not holder and _name(told) in gcloud.node_names(s)):
            found[_name(told)] = str(told.get("state", "STATE_UNSPECIFIED"))
    return found


def _all(
    cloud: Cloud, s: Settings, zone: str, text: Callable[[int], str], limit: float, *, quiet: bool = False
) -> list[Done]:
    """Say to the workers of each slice what `text` says of its number."""
    commands = [gcloud.ssh(s, zone, text(slice), node=node) for slice, node in enumerate(gcloud.node_names(s))]
    return cloud.together(commands, limit=limit, quiet=quiet)


def _parsed(s: Settings, done: Sequence[Done]) -> tuple[Worker, ...]:
    return remote.parse("\n".join(one.out for one in done), machines.of(s.type).hosts * s.slices)


def _must(cloud: Cloud, s: Settings, zone: str, verb: str, text: Callable[[int], str]) -> tuple[Worker, ...]:
    done = _all(cloud, s, zone, text, SECONDS[verb])
    found = _parsed(s, done)
    if any(one.code for one in done) or any(worker.what == "silent" for worker in found):
        raise _failed(f"`{verb}` on", s, done)
    return found


def _failed(doing: str, s: Settings, done: Sequence[Done]) -> CloudError:
    """What each worker says that is wrong, who did not answer, and else what gcloud said."""
    text = "\n".join(one.out for one in done)
    problems = remote.problems(text)
    said = [f"worker {number}: {problem}" for number, problem in sorted(problems.items())]
    heard = {number for number, _ in remote.lines(text)}
    silent = [str(number) for number in range(machines.of(s.type).hosts * s.slices) if number not in heard]
    if silent:
        said.append(f"no answer from worker {', '.join(silent)}")
    bad = next((one for one in done if one.code), None)
    remedy = f"Look there: python tpu/launch.py ssh --name={s.name} --worker={silent[0]}" if silent else ""
    if bad and (silent or not problems):
        error = error_of(gcloud.ssh(s, s.zones[0], ""), bad)
        said.append(error.said)
        remedy = error.remedy or remedy
    kind: Kind = "transient" if silent else "worker"
    return CloudError(kind, f"{doing} {s.name} failed: {'; '.join(said)}.", remedy, bad)
