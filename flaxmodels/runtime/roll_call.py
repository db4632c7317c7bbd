"""The roll call: the processes of a run meet, and those that wait learn who is missing.

JAX's own start does not say: it ends a process from within C++, with no error that Python could catch, when one is
missing, comes twice, or counts otherwise. So before it, at the very address it will use, process 0 listens, and the
others say who they are, a line of JSON each. Then all get the same answer, and the connections stay open for `pulse`.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

LONGEST = 4096  # bytes of a line
MOST = 12  # processes that a message lists
PAUSE = 0.2  # seconds between attempts
HELLO = {"process", "processes", "host", "pid"}


@dataclasses.dataclass(frozen=True)
class Tie:
    """What is left of the roll call between two processes.

    Attributes:
      connection: open; whoever has it closes it.
      who: the other one, "HOST, pid NUMBER".
    """

    connection: socket.socket
    who: str


def meet(address: tuple[str, int], processes: int, process: int, timeout: float) -> dict[int, Tie]:
    """Wait until all processes of the run have come.

    Args:
      address: (host, port) of process 0.
      processes: how many there are.
      process: which this one is.
      timeout: seconds.

    Returns:
      By number: in process 0, all others; in these, process 0.

    Raises:
      UserError: two processes have the same number, or another idea of how many there are; the port is taken.
      FaultError: not all came in time. The message says which are missing, and who is here.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        return _host(address, processes, timeout, deadline)
    return {0: _guest(address, processes, process, timeout, deadline)}


def _host(address: tuple[str, int], processes: int, timeout: float, deadline: float) -> dict[int, Tie]:
    """Process 0: listen until all are there, or one is wrong, or the time is over; and tell all."""
    here = {0: f"{socket.gethostname()}, pid {os.getpid()}"}
    with contextlib.ExitStack() as guests:
        with _listening(address) as listener:
            waiting, problem = _gather(listener, guests, here, processes, deadline)
        # No longer listening: JAX takes the port over.
        missing = [number for number in range(processes) if number not in here]
        said = {"error": problem} if problem else {"host": here[0]}
        if missing and not problem:
            absent = f"{len(missing)} of {processes} processes did not come within {timeout:g} s: {_listed(missing)}"
            present = "; ".join(f"{number} on {who}" for number, who in sorted(here.items())[:MOST])
            said = {"fault": f"{absent}. Here: {present}. Are they started, with the same --coordinator_address?"}
        for guest in waiting:
            with contextlib.suppress(OSError):
                guest.sendall(json.dumps(said).encode() + b"\n")
        _obey(said)
        return {number: Tie(guest.dup(), here[number]) for guest, number in waiting.items()}


def _gather(
    listener: socket.socket, guests: contextlib.ExitStack, here: dict[int, str], processes: int, deadline: float
) -> tuple[Mapping[socket.socket, int], str]:
    """Fill `here`, number -> who it is, until all are there; the connections that wait, and what is wrong, if it is."""
    waiting = dict[socket.socket, int]()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, listener)
        while len(here) < processes and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.data is listener:
                    guest = guests.enter_context(listener.accept()[0])
                    guest.settimeout(1)  # one that connects and says nothing holds up nobody
                    selector.register(guest, selectors.EVENT_READ, guest)
                    continue
                hello = _read(key.data)
                if hello is None or hello.keys() != HELLO:  # it left, or it is no process of ours
                    here.pop(waiting.pop(key.data, -1), None)
                    selector.unregister(key.data)
                    key.data.close()
                    continue
                waiting[key.data] = hello["process"]
                if problem := _wrong(hello, here, processes):
                    return waiting, problem
                here[hello["process"]] = f"{hello['host']}, pid {hello['pid']}"
    return waiting, ""


def _wrong(hello: dict[str, Any], here: dict[int, str], processes: int) -> str:
    number, who = hello["process"], f"{hello['host']}, pid {hello['pid']}"
    if hello["processes"] != processes:
        return (
            f"the process on {who} was started with --num_processes={hello['processes']}, process 0 with {processes}: "
            "all must say the same."
        )
    if number in here:
        return f"two processes have --process_id={number}: {here[number]}; and {who}. Each needs its own, from 0."
    return ""


def _guest(address: tuple[str, int], processes: int, process: int, timeout: float, deadline: float) -> Tie:
    """The others: find process 0, say who this is, wait for the answer, then for JAX's service to be there."""
    hello = {"process": process, "processes": processes, "host": socket.gethostname(), "pid": os.getpid()}
    where, reason = f"{address[0]}:{address[1]}", "no answer"
    tie: Tie | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 5)) as connection:
                if tie:
                    return tie
                connection.sendall(json.dumps(hello).encode() + b"\n")
                connection.settimeout(left + 5)  # process 0 may have begun to wait a little later
                said = _read(connection)
                if said is not None:
                    _obey(said)
                    tie = Tie(connection.dup(), said["host"])
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(PAUSE / 10 if tie else PAUSE)
    if tie:
        tie.connection.close()
    raise FaultError(
        f"process {process} of {processes} could not reach process 0 at {where} within {timeout:g} s: {reason}. "
        "Is process 0 started, is the address its own, and is the port open between the hosts?"
    )


def _obey(said: dict[str, Any]) -> None:
    if "error" in said:
        raise UserError(said["error"])
    if "fault" in said:
        raise FaultError(said["fault"])


@contextlib.contextmanager
def _listening(address: tuple[str, int]) -> Iterator[socket.socket]:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", address[1]), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"--coordinator_address={address[0]}:{address[1]}: process 0 can't listen on port {address[1]} of "
            f"{socket.gethostname()}: {error.strerror}. Does another program use it, or another process 0 of this run? "
            "Choose another port, the same for all."
        ) from error
    with listener:
        yield listener


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """The line that a process sends, or None where the connection ended or brought something else.

    What comes after it, of `pulse`, stays to be read.
    """
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < LONGEST:
            part = connection.recv(LONGEST - len(data), socket.MSG_PEEK)
            if not part:
                return None
            data += connection.recv(part.find(b"\n") + 1 or len(part))
        found = json.loads(data)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - MOST} more" if len(numbers) > MOST else ""
    return ", ".join(map(str, numbers[:MOST])) + more
