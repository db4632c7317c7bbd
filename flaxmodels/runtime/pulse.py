"""A beat every second between process 0 and each other one: who is dead, frozen or stuck is known within seconds.

Over the connections of the roll call, which stay open, so that no port does and no stranger is heard. A process that
is killed closes its connection; one that is frozen, or whose host is gone, is silent; one that is alive and stuck
beats on, and says that nothing moves. Process 0 finds out and tells all; the others watch process 0. Then each ends
itself with the same message, before JAX's own heartbeat would abort it without one.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flaxmodels.runtime import exits, watchdog
from flaxmodels.runtime.roll_call import Tie
from flaxmodels.runtime.watchdog import Standing, Watch

TICK = 1.0  # seconds
LONGEST = 2**16  # bytes of a line
LAST = 3.0  # seconds for the others to read a verdict, before process 0 and JAX's service end
WORDS = 5.0  # seconds for the stacks of all threads: whoever reads stderr may have stopped to


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the run can't go on.

    Attributes:
      text: for the user.
      code: the exit code of all processes.
      dump: whether each is to say where its threads stand.
    """

    text: str
    code: int = exits.FAULT
    dump: bool = False


class _Link:
    """The connection to one process: what came, what is to go, for how long it was silent, whether it said goodbye."""

    def __init__(self, tie: Tie) -> None:
        self.connection, self.who = tie.connection, tie.who
        self.connection.setblocking(False)
        self.come, self.go = b"", b""
        self.silent, self.left, self.open = 0.0, False, True
        self.standing: Standing | None = None
        self._turn = threading.Lock()

    def say(self, line: Mapping[str, Any] | None) -> None:
        """Send a line, or None for what is left of earlier ones, as far as that goes without waiting; any thread."""
        with self._turn:
            # Who does not read, such as a frozen process, gets no more beats.
            self.go += json.dumps(line).encode() + b"\n" if line and len(self.go) < LONGEST else b""
            with contextlib.suppress(OSError):
                self.go = self.go[self.connection.send(self.go) :] if self.go else b""

    def hear(self) -> list[dict[str, Any]]:
        """The lines that have come; closes at the end of the connection."""
        try:
            part = self.connection.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            part = b""
        self.silent, self.open = 0.0, bool(part)
        *lines, self.come = (self.come + part).split(b"\n")
        self.come = self.come[:LONGEST]
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]


class Pulse:
    """The thread that beats, listens and watches, from when it is made until `close`; it may end the process.

    Args:
      ties: of `roll_call.meet`: process 0 has one to each other process, these have one to it. {} where it is alone.
      process: the number of this one.
      heartbeat: seconds of silence after which a process counts as dead.
      stuck_after: of `Watch`.
      folder: for the stacks of a process that is stuck; or None.
    """

    def __init__(
        self, ties: Mapping[int, Tie], process: int, heartbeat: float, stuck_after: float | None, folder: Path | None
    ) -> None:
        self.process, self.heartbeat, self.folder = process, heartbeat, folder
        self.failures: dict[int, dict[str, Any]] = {}
        self.reported = False
        self.verdict: Verdict | None = None
        self._links = {number: _Link(tie) for number, tie in ties.items()}
        self._watch = Watch(stuck_after)
        self._tick = min(TICK, heartbeat / 5)
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def report(self, failure: dict[str, Any]) -> None:
        """Tell the others of an error of this process, with which it ends; any thread."""
        self.reported = True
        self._spread({"failed": {str(self.process): failure}})

    def hosts(self) -> dict[int, str]:
        """The hosts of the processes that this one is tied to: in process 0, of all others."""
        return {number: link.who.partition(",")[0] for number, link in self._links.items()}

    def deserted(self) -> bool:
        """Whether all others have gone."""
        return bool(self._links) and not any(link.open for link in self._links.values())

    def close(self) -> None:
        """Leave well: the others know that this one goes."""
        self._spread({"leaves": True})
        self._waker.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def forget(self) -> None:
        """In a forked child, which has copies of all connections and no thread: close them, without a word."""
        for link in self._links.values():
            link.connection.close()

    def _spread(self, line: Mapping[str, Any], but: int = -1) -> None:
        for number, link in self._links.items():
            if link.open and number != but:
                link.say(line)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._woken:
            selector.register(self._woken, selectors.EVENT_READ)
            for number, link in self._links.items():
                selector.register(link.connection, selectors.EVENT_READ, number)
            last = time.monotonic()
            while self.verdict is None:
                for key, _ in selector.select(max(last + self._tick - time.monotonic(), 0)):
                    if key.data is None:
                        break  # closed: what else came is of no interest
                    self._hear(key.data)
                    if not self._links[key.data].open:
                        selector.unregister(key.fileobj)
                else:
                    if (now := time.monotonic()) >= last + self._tick:
                        self._beat(min(now - last, 2 * self._tick))
                        last = now
                    continue
                break
            else:
                self._end(self.verdict)
        for link in self._links.values():
            link.connection.close()

    def _hear(self, number: int) -> None:
        """Take in what a process says."""
        link = self._links[number]
        for line in link.hear():
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                if "beat" in line:
                    link.standing = Standing(**line["beat"])
                if "failed" in line:
                    self.failures |= {int(key): dict(said) for key, said in line["failed"].items()}
                    if number == 0 or str(number) in line["failed"]:
                        link.left = True
                    if self.process == 0:
                        self._spread(line, but=number)
                if "verdict" in line:
                    self.verdict = self.verdict or Verdict(**line["verdict"])
            link.left |= "leaves" in line
        # Once one has failed, others go because of that.
        if not (link.open or link.left or self.failures or self.reported):
            self.verdict = self.verdict or Verdict(
                f"{self._name(number)} died{_last(link)}: its connection closed without a word. So does `kill -9`, "
                "or a host that runs out of memory (`dmesg` there tells). The same command goes on from the last save."
            )

    def _beat(self, elapsed: float) -> None:
        """What is due at a tick: say how this process gets on, and look after the others."""
        mine = self._watch.tick(elapsed)
        self._spread({"beat": dataclasses.asdict(mine)})
        there = {number: link for number, link in self._links.items() if link.open and not link.left}
        for number, link in there.items():
            link.silent += elapsed
            if link.silent > self.heartbeat:
                self.verdict = Verdict(
                    f"{self._name(number)} has been silent for {link.silent:.0f} s (--heartbeat_timeout="
                    f"{self.heartbeat:g}), last heard{_last(link)}: its host is down or cut off, or it was stopped."
                )
                return
        if self.process == 0 and not self.failures and not self.reported:
            standings = {0: mine} | {n: link.standing for n, link in there.items() if link.standing is not None}
            if (last := watchdog.laggard(standings)) is not None:
                who = self._name(last) if self._links else ""
                self.verdict = Verdict(watchdog.explain(last, standings, who), exits.STUCK, dump=True)

    def _name(self, number: int) -> str:
        who = self._links[number].who if number in self._links else socket.gethostname()
        return f"process {number} ({who})"

    def _end(self, verdict: Verdict) -> None:
        """Tell the others, say why, and end this process."""
        self._spread({"verdict": dataclasses.asdict(verdict)})

        def say() -> None:
            file = watchdog.dump(self.process, self.folder) if verdict.dump else ""
            kept = f" Where its threads stand: {file}." if file else ""
            print(f"error: {verdict.text}{kept}", file=sys.stderr, flush=True)

        words = threading.Thread(target=say, daemon=True)
        words.start()
        words.join(WORDS)
        if self.process == 0:
            self._see_off()
        exits.leave(SystemExit(verdict.code))

    def _see_off(self) -> None:
        """Wait till the others have left: JAX aborts those that are there when its service, in process 0, ends."""
        deadline = time.monotonic() + LAST
        while time.monotonic() < deadline:
            waited = [link for link in self._links.values() if link.open and link.silent <= self.heartbeat]
            if not waited:
                return
            for link in waited:
                link.say(None)
                link.hear()
            time.sleep(0.01)


def _last(link: _Link) -> str:
    """Where a process said last that it was: " in phase ... at step ..."."""
    return f" in {link.standing.at}" if link.standing and link.standing.phase else ""


_current: Pulse | None = None


def current() -> Pulse | None:
    """The pulse of this process, where one is open: what it was told is the way to the others."""
    return _current


@contextlib.contextmanager
def opened(
    ties: Mapping[int, Tie], process: int, heartbeat: float, stuck_after: float | None, folder: Path | None
) -> Iterator[Pulse]:
    """A `Pulse`, with its arguments, that is `current` while it is open."""
    global _current
    _current = pulse = Pulse(ties, process, heartbeat, stuck_after, folder)
    try:
        yield pulse
    finally:
        pulse.close()
        _current = None


def _forked() -> None:
    """In a child that other code forked: a connection that it kept open would hide the death of this process."""
    global _current
    if _current is not None:
        _current.forget()
        _current = None


os.register_at_fork(after_in_child=_forked)
