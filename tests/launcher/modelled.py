"""A cloud in memory for `following.follow`: machines, workers and a training that take simulated time, and break.

What must never happen is checked where it would: a second machine of the name, a training started on a machine that is
not installed, a number of an attempt used twice.
"""

import dataclasses
import random
from pathlib import Path

from tpu import noting
from tpu.acts import Resource
from tpu.following import World
from tpu.meaning import CloudError
from tpu.noting import Seen
from tpu.remote import Worker
from tpu.settings import Settings
from tpu.shipping import Parcel
from tpu.state import Kept

HOSTS = 4
SECONDS = {"create": 5, "delete": 60, "install": 120, "check": 30, "start": 5, "stop": 20, "fetch": 10, "prove": 5}
COMES = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
PARCEL = Parcel(Path("parcel-c0de.tar"), "c0de", "1" * 40, "", (), "d" * 64)


def settings(**changes):
    given = dict(name="a", project="p", zones=("z1-a", "z2-b"), type="v5litepod-16", bucket="/bucket", prices=None)
    return Settings(**{**given, **changes})


def kept(**changes):
    return Kept(**{"project": "p", "workdir": "/bucket/a", "command": ("train",), "parcel": PARCEL, **changes})


class KilledError(BaseException):
    """The process that watches is gone; at whatever line it was."""


@dataclasses.dataclass
class Host:
    what: str = "absent"
    attempt: int = 0
    code: int | None = None
    sha: str = ""
    silent: float = 0.0  # until then


@dataclasses.dataclass
class Machine:
    born: float
    state: str = "ACCEPTED"
    hosts: list[Host] = dataclasses.field(default_factory=lambda: [Host() for _ in range(HOSTS)])


class Modelled:
    """The cloud, the bucket, the clock and the state file.

    Args:
      s: of the run.
      events: (step, what) in order: when training reaches the step, this happens: "preempt", "suspend" (slowly),
        "dead", "code N" of one host, "codes N" of all, "silent SECONDS", "hand" (someone deletes it), "notice" (saved,
        then taken), "reboot" (all dead), "wiped" (a host is new).
      creates: what each create says in turn: "" or a kind of CloudError, with "but made" where it made one even so.
      goal: the step at which the training ends.
      breaks: chance that an act or a look fails in passing.
      kill: at this crossing the process is gone.
      seed: of chance.
    """

    def __init__(self, s, events=(), creates=(), goal=100, breaks=0.0, kill=None, seed=0, comes=60.0, saves=True):
        self.s, self.events, self.creates, self.goal = s, list(events), list(creates), goal
        self.breaks, self.kill, self.random, self.comes, self.saves = breaks, kill, random.Random(seed), comes, saves
        self.now, self.step, self.saved = 1.7e9, 0.0, 0
        self.machines: dict[str, Machine] = {}
        self.crossed, self.said, self.done, self.written = 0, [], [], None
        self.costs, self.started, self.fresh = 0.0, set[int](), 0
        self.broken = 60 if breaks else 0  # so often things fail in passing; then no more

    def world(self):
        return World(self.look, self.act, self.write, self.say, lambda: self.now, self.sleep)

    # What follow calls. Each may be the last thing that the process did.
    def cross(self):
        self.crossed += 1
        assert self.crossed < 50_000, "there is no end to it"
        if self.kill is not None and self.crossed == self.kill:
            raise KilledError

    def look(self, kept, first):
        self.cross()
        self.passing("look")
        self.pass_time(1)
        found = {zone: Resource(one.state) for zone, one in self.machines.items()}
        if not (first or kept.held is None or kept.end or not kept.held.met):
            found = {zone: one for zone, one in found.items() if zone == kept.held.zone}
        zone = noting.chosen(found, kept)
        if zone not in found or found[zone].state != "ACTIVE":
            return Seen(found, first=first)
        return Seen(found, self.workers(zone), self.saved, first)

    def workers(self, zone):
        hosts = enumerate(self.machines[zone].hosts)
        return tuple(
            Worker(number, "silent")
            if one.silent > self.now
            else Worker(number, one.what, one.attempt, one.code, one.sha)
            for number, one in hosts
        )

    def write(self, kept):
        self.cross()
        self.written = kept
        self.cross()

    def say(self, line):
        self.cross()
        self.said.append(line)

    def sleep(self, seconds):
        self.cross()
        assert seconds >= 0
        self.pass_time(seconds)

    def act(self, action):
        self.cross()
        assert action.kept == self.written, "acted before it was written down"
        self.done.append(f"{action.do} {action.zone}".strip())
        half = self.random.random() < 0.5  # what fails in passing may have worked
        if not half:
            self.passing(action.do)
        said = getattr(self, action.do)(action)
        self.pass_time(SECONDS[action.do])
        if half:
            self.passing(action.do)
        self.cross()
        return said

    def passing(self, what):
        if self.broken and self.random.random() < self.breaks:
            self.broken -= 1
            raise CloudError(
                "transient" if what == "look" else self.random.choice(["transient", "unknown"]), f"{what}: 503"
            )

    # The acts.
    def create(self, action):
        answer = self.creates.pop(0) if self.creates else ""
        if action.zone in self.machines:
            return ""  # it is ours
        others = [zone for zone, one in self.machines.items() if one.state != "DELETING"]
        assert not others, f"a second machine in {action.zone} beside {others}"
        kind, _, made = answer.partition(" ")
        if not kind or made:
            self.machines[action.zone] = Machine(self.now)
        if kind:
            raise CloudError(kind, f"{kind} in {action.zone}")
        return ""

    def delete(self, action):
        self.machines.pop(action.zone, None)
        return ""

    def up(self, action):
        machine = self.machines.get(action.zone)
        if machine is None or machine.state != "ACTIVE" or any(one.silent > self.now for one in machine.hosts):
            raise CloudError("transient", "no answer")
        return machine

    def install(self, action):
        for one in self.up(action).hosts:
            one.what, one.sha = "installed" if one.what == "absent" else one.what, action.kept.parcel.sha
        return ""

    def check(self, action):
        assert all(one.sha == action.kept.parcel.sha for one in self.up(action).hosts)
        return ""

    def start(self, action):
        attempt = action.kept.attempt
        for one in self.up(action).hosts:
            assert one.sha == action.kept.parcel.sha, "started where nothing is installed"
            assert one.what in ("installed", "ended", "dead", "running")
            if attempt > one.attempt and one.what != "running":
                one.what, one.attempt, one.code = "running", attempt, None
        if attempt not in self.started:
            self.started.add(attempt)
            self.step = self.saved  # it resumes
        return ""

    def stop(self, action):
        machine = self.machines.get(action.zone)
        if machine is None:
            raise CloudError("unknown", "gone")
        if self.whole(machine) and self.saves:
            self.saved = int(self.step)
        for one in machine.hosts:
            if one.what == "running":
                one.what, one.code = "ended", 143
        return ""

    def fetch(self, action):
        return "worker 1: ValueError: what was wrong"

    def prove(self, action):
        if self.machines:
            raise CloudError("unknown", f"still there: {list(self.machines)}")
        return ""

    # What the cloud does by itself.
    def whole(self, machine):
        running = [one for one in machine.hosts if one.what == "running"]
        return len(running) == HOSTS and len({one.attempt for one in running}) == 1

    def pass_time(self, seconds):
        until = self.now + seconds
        while self.now < until:
            trains = any(machine.state == "ACTIVE" for machine in self.machines.values())
            part = min(5.0 if trains else 60.0, until - self.now)
            self.now += part
            for zone, machine in list(self.machines.items()):
                self.live(zone, machine, part)

    def live(self, zone, machine, part):
        if machine.state in COMES[:-1]:
            machine.state = COMES[min(3, int((self.now - machine.born) / self.comes))]
            return
        if machine.state == "SUSPENDING":
            machine.state = "SUSPENDED"
        if machine.state != "ACTIVE":
            return
        self.costs += part
        if not self.whole(machine):
            return
        self.step += part / 10
        self.saved = max(self.saved, int(self.step) // 10 * 10)
        if self.events and self.step >= self.events[0][0]:
            self.happen(zone, machine, self.events.pop(0)[1].split())
        elif self.step >= self.goal:
            self.saved = self.goal
            self.end(machine.hosts, 0)

    def end(self, hosts, code):
        for one in hosts:
            if one.what == "running":
                one.what, one.code = "ended", code

    def happen(self, zone, machine, words):
        what, host = words[0], machine.hosts[self.random.randrange(HOSTS)]
        if what == "preempt":
            machine.state = "SUSPENDED"
        elif what == "suspend":
            machine.state = "SUSPENDING"
        elif what == "notice":
            self.saved = int(self.step)
            self.end(machine.hosts, 143)
            machine.state = "SUSPENDING"
        elif what == "dead":
            host.what = "dead"
        elif what == "reboot":
            for one in machine.hosts:
                one.what = "dead"
        elif what == "code":
            self.end([host], int(words[1]))
        elif what == "codes":
            self.end(machine.hosts, int(words[1]))
        elif what == "silent":
            host.silent = self.now + float(words[1])
        elif what == "wiped":  # a disk that is new: nothing is installed there
            machine.hosts[machine.hosts.index(host)] = Host()
        elif what == "hand":
            del self.machines[zone]
        else:
            raise AssertionError(what)
