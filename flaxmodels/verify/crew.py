"""Processes that go through named phases together, each phase with a time limit: started, watched, ended.

A process writes what it does to a file of its own (`Reports`); whoever started it reads that (`Crew`). When time is
up, or one fails, all are killed, and the error says which of them was late, in which phase, and where it stood.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flaxmodels
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

PAUSE = 0.05
# Seconds that the others get to end by themselves after one has failed: their messages may say more than its own.
GRACE = 3.0
# Seconds for a process to say where it stands.
ANSWER = 2.0
# Lines of a process's output in a message.
TAIL = 12
# A process that stands in one of these files waits for another process.
WAITING = re.compile(r"/jax/|/jaxlib/|/orbax/|flaxmodels/runtime/(peers|roll_call|agreement)\.py")


class Reports:
    """What a process says of itself.

    Args:
      file: to append to; the one that its `Crew` reads.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1)
        # Asked by a signal, it writes where all of its threads stand, even while it waits in compiled code.
        self._stacks = file.with_suffix(".stacks").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        threading.Thread(target=_end_with, args=(os.getppid(),), name="orphan", daemon=True).start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Around a phase; what is put into the dict, ready for JSON, is what it has found."""
        self.say(name)
        found: dict[str, Any] = {}
        yield found
        self.say(name, found=found)

    def say(self, phase: str, **values: Any) -> None:
        """Write down at once where this process is, with values ready for JSON; a kill after it does not undo that.

        "at" is the monotonic clock, which all processes of a machine share.
        """
        self._file.write(json.dumps({"phase": phase, "at": round(time.monotonic(), 4), **values}) + "\n")


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@dataclasses.dataclass
class _Member:
    number: int
    process: subprocess.Popen[bytes]
    file: Path
    log: Path

    def reports(self) -> list[dict[str, Any]]:
        """All that it has written so far."""
        text = self.file.read_text() if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def found(self, phase: str) -> dict[str, Any] | None:
        """What it found in a phase; None where it has not finished that."""
        return next((line["found"] for line in self.reports() if line["phase"] == phase and "found" in line), None)

    def tail(self) -> str:
        """The end of its output."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if not line.startswith("[Gloo]")]
        return "\n".join(f"    {line}" for line in lines[-TAIL:])


class Crew:
    """Processes, started together; a context manager that kills what is left of them.

    Args:
      commands: the words of each process's command; "{reports}" stands for the file of its `Reports`.
      folder: for what they write.
      environment: of all of them.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self._commands, self._folder, self._environment = commands, folder, dict(environment)
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        try:
            for number, words in enumerate(self._commands):
                file, log = (self._folder / f"{number}.{kind}" for kind in ("reports", "log"))
                command = [word.format(reports=file) if word == "{reports}" else word for word in words]
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=self._environment,
                        start_new_session=True,  # Ctrl-C is for who started them, and what they start ends with them
                    )
                self._members.append(_Member(number, process, file, log))
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def _kill(self) -> None:
        for member in self._members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(member.process.pid, signal.SIGKILL)
        for member in self._members:
            member.process.wait()

    @property
    def pids(self) -> list[int]:
        """Of all processes."""
        return [member.process.pid for member in self._members]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes of all processes; -9 where signal 9 ended one, None where it runs."""
        return [member.process.poll() for member in self._members]

    def reports(self, number: int = 0) -> list[dict[str, Any]]:
        """All that a process has said of itself so far."""
        return self._members[number].reports()

    def tail(self, number: int = 0) -> str:
        """The end of what a process has printed."""
        return self._members[number].tail()

    def signal(self, signum: int, numbers: Sequence[int]) -> None:
        """Send a signal to some of the processes, where they still run; not to what they started."""
        for number in numbers:
            if self._members[number].process.poll() is None:
                self._members[number].process.send_signal(signum)

    def wait(self, phase: str, limit: float) -> list[dict[str, Any]]:
        """Wait till all have finished a phase.

        Args:
          phase: its name.
          limit: seconds from now.

        Returns:
          What each found.

        Raises:
          FaultError: one has failed, or was late; the message names it.
        """
        deadline = time.monotonic() + limit
        while True:
            found = [member.found(phase) for member in self._members]
            done = [each for each in found if each is not None]
            if len(done) == len(found):
                return done
            for member, each in zip(self._members, found, strict=True):
                if each is None and member.process.poll() is not None and member.found(phase) is None:
                    raise FaultError(self._failed(phase))
            if time.monotonic() > deadline:
                raise FaultError(self._late(phase, limit))
            time.sleep(PAUSE)

    def end(self, limit: float) -> list[dict[str, Any]]:
        """Wait till all have left by themselves, with code 0; FaultError as `wait`. There is nothing to find."""
        deadline = time.monotonic() + limit
        while any(member.process.poll() is None for member in self._members):
            if time.monotonic() > deadline:
                raise FaultError(self._late("", limit))
            time.sleep(PAUSE)
        if any(member.process.poll() for member in self._members):
            raise FaultError(self._failed(""))
        return []

    def _failed(self, phase: str) -> str:
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(member.process.poll() is None for member in self._members):
            time.sleep(PAUSE)
        gone = [member for member in self._members if member.process.poll() and member.found(phase) is None]
        # An abort is how JAX ends a process when another has gone: that one is to blame.
        first = min(gone or self._members, key=lambda member: (member.process.poll() == -signal.SIGABRT, member.number))
        return f"{self._who(first)} left with code {first.process.poll()}:\n{first.tail()}"

    def _late(self, phase: str, limit: float) -> str:
        slow = [m for m in self._members if m.process.poll() is None and m.found(phase) is None]
        stands = {member.number: _where(member) for member in slow}
        late = [number for number, (waits, _) in stands.items() if not waits] or list(stands)
        lines = [f"{self._who(self._members[n])} is late, after {limit:g} s: {stands[n][1]}" for n in late]
        others = [str(number) for number in stands if number not in late]
        lines += [f"waiting for it: process {', '.join(others)}"] if others else []
        tails = [self._members[n].tail() for n in late[:1]]
        return "\n".join([*lines, *filter(None, tails)])

    def _who(self, member: _Member) -> str:
        last = next(reversed(member.reports()), None)
        standing = ", before its first phase"
        if last is not None:
            standing = f", {'after' if 'found' in last else 'in'} phase {last['phase']!r}"
        return f"process {member.number} of {len(self._members)} (pid {member.process.pid}{standing})"


def _where(member: _Member) -> tuple[bool, str]:
    """Whether a process waits for another one, and where it stands."""
    state = Path(f"/proc/{member.process.pid}/stat")
    if state.exists() and state.read_text().rpartition(")")[2].split()[0] in "Tt":
        return False, "it is stopped"
    stacks = member.file.with_suffix(".stacks")
    if not stacks.exists():
        return False, "it has not come to its own code"
    member.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + ANSWER
    while not (frames := _main_frames(stacks.read_text())) and time.monotonic() < deadline:
        time.sleep(PAUSE)
    if not frames:
        return False, "it does not answer"
    time.sleep(PAUSE)  # till the last of them are written
    frames = _main_frames(stacks.read_text())
    return bool(WAITING.search(frames[0])), f"it stands at {frames[0]}"


def _main_frames(dump: str) -> list[str]:
    """The frames of the main thread, which is the last of a dump of `faulthandler`, the innermost first."""
    _, found, main = dump.rpartition("most recent call first")
    return re.findall(r'File "(.+?", line \d+ in \S+)', main) if found else []


@contextlib.contextmanager
def folder_for(folder: Path | None, prefix: str) -> Iterator[Path]:
    """A folder for all that is written: the named one, new and kept; or a temporary one (UserError)."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
            yield Path(name)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"--keep={str(folder)!r} is not empty: choose a new folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def environment(devices: int | None) -> dict[str, str]:
    """Of processes that see so many simulated devices, or what the machine has; modules are found as from here."""
    paths = [str(Path(flaxmodels.__file__).parent.parent), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if devices is None:
        return there
    old = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{old} --xla_force_host_platform_device_count={devices}".strip()
    return there | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def addresses(hosts: int) -> list[list[str]]:
    """The flags by which so many processes of this machine find each other: of each its own."""
    if hosts == 1:
        return [["--distributed=off"]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [f"--coordinator_address=localhost:{port}", f"--num_processes={hosts}"]
    return [[*shared, f"--process_id={number}"] for number in range(hosts)]
