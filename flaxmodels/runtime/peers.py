"""What processes of one run tell each other before and after training: facts that must agree, and errors.

Through the key-value store of JAX's coordination service, so no device is needed and every wait has a limit. While
one waits it sees the error of another, in place of a time limit; errors go through `pulse`, where one is open, which
also ends the process when another one dies. In a process that is alone all of this does nothing.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the only way to the key-value store: JAX has no public one

from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, pulse
from flaxmodels.runtime.exits import FaultError, SignalledError

# Seconds: as long as `watchdog` gives a phase. Reading data takes some processes longer than others, and so does
# compiling, where one finds the program in its cache. One that is dead, frozen or stuck is known before, by `pulse`.
LIMIT = 10800.0
PAUSE = 0.05
LAST = 5.0  # for the others, once one process ends at once
CAUSE = 2.0  # for the news of what made a collective fail, which may come later than its failure
MOST = 5  # differences in a message
WELL, CUT = "well", "cut"  # how a process leaves: together with the others, or at once

# group -> name -> value. A value that says nothing to a reader, such as a digest, lies in a group of `OPAQUE`.
Facts = Mapping[str, Mapping[str, Any]]
OPAQUE = ("file", "program")

T = TypeVar("T")
_RUN, _COUNT = 0, 0  # runs that this process has begun; questions since then
_reported: BaseException | None = None


def begin() -> None:
    """A new run begins in these processes, of which each calls this: what an earlier one left behind is not of it.

    Where a `pulse` is open there is no earlier one that failed: the processes ended with it.
    """
    global _RUN, _COUNT
    if pulse.current() is None:
        _RUN, _COUNT = _RUN + 1, 0


def me() -> int:
    """The number of this process in its run. Known before JAX has looked for devices, and if that fails."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes


def name() -> str:
    """This process, for messages."""
    return f"process {me()} ({socket.gethostname()})"


def told(value: Any, limit: float = LIMIT) -> Any:
    """The value, ready for JSON, that process 0 calls this with; all processes call it.

    Raises:
      UserError or FaultError: a process failed meanwhile, or did not answer within `limit` seconds.
    """
    if count() == 1:
        return value
    key = _unique("told")
    if me() == 0:
        _set(f"{key}/0", json.dumps(value))
    return json.loads(_wait(lambda: _all(key).get("0"), limit, lambda: "process 0"))


def compare(facts: Facts, limit: float = LIMIT) -> None:
    """Hold the facts of every process against those of process 0; all processes call it, and all get the same answer.

    Args:
      facts: of this process, ready for JSON.
      limit: seconds to wait for the others.

    Raises:
      UserError: they differ; the message names processes and facts.
      FaultError: a process failed meanwhile, or did not answer in time.
    """
    if count() == 1:
        return
    first = told({"host": socket.gethostname(), "facts": facts}, limit)
    differ = differences(json.loads(json.dumps(facts)), first["facts"])
    settle(f"{name()} differs from process 0 ({first['host']}): {differ}" if differ else "", limit)


def settle(problem: str, limit: float = LIMIT) -> None:
    """Go on if no process has a problem; else all raise it. All processes call it.

    Raises:
      UserError: the problems of all processes.
      FaultError: a process failed meanwhile, or did not answer in time.
    """
    problems = list(filter(None, gathered(problem, limit)))
    if problems:
        more = f"\n{len(problems) - MOST} more processes differ" if len(problems) > MOST else ""
        raise UserError("\n".join(problems[:MOST]) + more)


def gathered(text: str, limit: float = LIMIT) -> list[str]:
    """The texts that all processes call this with, in their order; all processes call it.

    Raises:
      UserError or FaultError: a process failed meanwhile, or did not answer within `limit` seconds.
    """
    if count() == 1:
        return [text]
    about = _unique("gathered")
    _set(f"{about}/{me()}", text)
    return [found for _, found in sorted(_everyone(about, limit).items(), key=lambda item: int(item[0]))]


def differences(facts: Facts, first: Facts) -> str:
    """How facts differ from those of process 0, in words; "" where they do not."""
    found = []
    for group in [*first, *(group for group in facts if group not in first)]:
        mine, theirs = facts.get(group, {}), first.get(group, {})
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            here, there = mine.get(key), theirs.get(key)
            if here != there:
                found.append(f"{group} {key} differs" if group in OPAQUE else f"{key}={here!r}, there {there!r}")
    return "; ".join(found[:MOST]) + (f"; and {len(found) - MOST} more" if len(found) > MOST else "")


def failed() -> UserError | FaultError | None:
    """The error that the first other process reported, as this one should raise it; None if none did."""
    beat = pulse.current()
    said = beat.failures if beat else {int(key): json.loads(text) for key, text in _all(f"failed/{_RUN}").items()}
    others = [number for number in said if number != me()]
    if not others:
        return None
    first = said[min(others)]
    error = exits.from_code(first["code"], first["text"])
    failed = "" if isinstance(error, SignalledError) else "failed: "
    return exits.from_code(first["code"], f"process {min(others)} ({first['host']}) {failed}{first['text']}")


def report(error: BaseException) -> None:
    """Tell the others that this process ends with an error."""
    global _reported
    _reported = error
    text = str(error).strip() or type(error).__name__
    text = text if isinstance(error, UserError | FaultError) else f"{type(error).__name__}: {text}"
    said = {"host": socket.gethostname(), "text": text, "code": exits.code_of(error)}
    if (beat := pulse.current()) is not None:
        beat.report(said)
    else:
        _set(f"failed/{_RUN}/{me()}", json.dumps(said))


def reported() -> BaseException | None:
    """The error of this process that the others were told of."""
    return _reported


def cause(error: BaseException) -> BaseException:
    """What JAX raises here because another process has gone, such as a closed connection, is that one's error.

    Where that one died without a word, `pulse` ends this one meanwhile.
    """
    if isinstance(error, UserError | FaultError) or count() == 1:
        return error
    # It comes as an error of many types, and its news may take a moment longer.
    new = isinstance(error, Exception) and _reported is None and pulse.current() is not None
    deadline = time.monotonic() + (CAUSE if new else 0)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone, and the store with it
        while (found := failed()) is None and time.monotonic() < deadline:
            time.sleep(PAUSE)
        return found or error
    return error


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Report an error at once, before what is around gets to close: that may wait for the others."""
    try:
        yield
    except BaseException as error:
        if count() > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone, and the store with it
                if cause(error) is error and failed() is None:  # else this may well be a consequence of it
                    report(error)
        raise


def leave(limit: float) -> None:
    """Wait till all processes are about to leave.

    Raises:
      UserError or FaultError: another process failed, or did not come within `limit` seconds.
    """
    _set(f"left/{me()}", WELL)
    _everyone("left", limit)


def leave_with_error(limit: float) -> bool:
    """Whether all processes come to leave within `limit` seconds, none of them cut off."""
    _set(f"left/{me()}", WELL)
    deadline = time.monotonic() + limit
    while len(found := _all("left")) < count() and CUT not in found.values():
        if time.monotonic() > deadline or ((beat := pulse.current()) is not None and beat.deserted()):
            return False
        time.sleep(PAUSE)
    if CUT not in found.values():
        return True
    _see_off()
    return False


def cut() -> None:
    """Say that this process ends at once."""
    _set(f"left/{me()}", CUT)
    _see_off()


def _see_off() -> None:
    """In process 0, with which the store goes: wait till the others have left, else JAX aborts them before they print.

    Till they say that they leave, and then till they are gone; each for at most LAST seconds. They have seen the same
    error, but not at the same moment.
    """
    if me() == 0:
        deadline = time.monotonic() + LAST
        while len(_all("left")) < count() and time.monotonic() < deadline:
            time.sleep(PAUSE)
        # They print, and their connections close: on a busy machine that takes longer than a moment.
        beat = pulse.current() if len(_all("left")) == count() else None
        deadline = time.monotonic() + (20 * PAUSE if beat is None else LAST)
        while time.monotonic() < deadline and not (beat and beat.deserted()):
            time.sleep(PAUSE)


def _everyone(key: str, limit: float) -> dict[str, str]:
    """The values that all processes set under `key`, by number."""

    def all_there() -> dict[str, str] | None:
        found = _all(key)
        return found if len(found) == count() else None

    def missing() -> str:
        here = _all(key)
        absent = [str(number) for number in range(count()) if str(number) not in here]
        return f"process{'es' * (len(absent) > 1)} {', '.join(absent[:16])}"

    return _wait(all_there, limit, missing)


def _wait(get: Callable[[], T | None], limit: float, who: Callable[[], str]) -> T:
    deadline = time.monotonic() + limit
    while True:
        if (found := get()) is not None:
            return found
        if (error := failed()) is not None:
            raise error
        if time.monotonic() > deadline:
            raise FaultError(f"{who()} did not answer within {limit:g} s. What does it say on its own terminal?")
        time.sleep(PAUSE)


def _unique(about: str) -> str:
    """A key of its own for each comparison: all processes make them in one order."""
    global _COUNT
    _COUNT += 1
    return f"{_RUN}-{_COUNT}-{about}"


def _set(key: str, value: str) -> None:
    _store().key_value_set(f"flaxmodels/{key}", value, allow_overwrite=True)


def _all(key: str) -> dict[str, str]:
    """What was set below `key`."""
    folder = f"flaxmodels/{key}/"
    return {path.removeprefix(folder): value for path, value in _store().key_value_dir_get(folder)}


def _store() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise FaultError("jax.distributed was shut down while a run of several processes went on.")
    return client
