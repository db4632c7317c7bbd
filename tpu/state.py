"""What a run remembers of itself on this machine, so that whoever starts `watch` again goes on where it ended.

One JSON file a run, replaced as a whole: a kill at any moment leaves the old one or the new one.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from tpu import typed
from tpu.cost import Life
from tpu.settings import UserError
from tpu.shipping import Parcel

FILE, LOCK = "state.json", "watch.lock"
FORMAT = 1  # of the file; another number is another meaning
End = Literal["", "done", "failed", "limit"]
Phase = Literal["waiting", "provisioning", "installing", "running", "preempted", "stopping", "done", "failed", "limit"]
ENDED = ("done", "failed", "limit")  # phases after which nothing is left


class StateError(Exception):
    """The state file can't be read, or is not one: nobody's input, so the command leaves with exit code 1."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A machine that was asked for and has not been seen to be gone. Times are seconds since 1970.

    Attributes:
      zone: where.
      asked: when it was asked for, or first seen.
      met: whether it was seen since.
      absent: looks in a row that did not see it.
      deleting: whether it is we who delete it.
      checked: whether all its hosts and chips were found to be there.
      attempt: the newest that was to be started on it; 0: none was.
      started: when that was.
      idle: since when nothing trains on it; 0: something does.
      silent: since when a worker does not answer, while the run makes no progress; 0: all answer.
      split: since when some workers have ended and others run; 0: they are alike.
      stopped: whether the training was stopped, because the run is at its end.
      fetched: whether the logs were fetched since.
    """

    zone: str
    asked: float
    met: bool = False
    absent: int = 0
    deleting: bool = False
    checked: bool = False
    attempt: int = 0
    started: float = 0.0
    idle: float = 0.0
    silent: float = 0.0
    split: float = 0.0
    stopped: bool = False
    fetched: bool = False


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is written. A default is what holds before anything happened.

    Attributes:
      project: of the machine.
      workdir: where the training saves.
      command: of the training, without where it saves.
      phase: what the run is doing.
      since: when the phase began.
      looked: when the cloud last answered.
      held: the machine; None: there is none.
      zone: whose turn it is to be asked for a machine; "": the first.
      rounds: how often all zones in a row had no room.
      pause: no create before this time.
      refused: zone -> why no machine will ever be made there.
      bad: machines in a row that were given up, without progress of the run.
      tries: failures in a row of the same act.
      attempt: the newest that was started; each has a number of its own, on whichever machine.
      step: the newest checkpoint that was seen.
      mark: `step` when the newest attempt was started.
      fruitless: attempts in a row that brought no newer checkpoint.
      parcel: the code of this run.
      update: whether what runs is to be replaced by `parcel`.
      end: how the run ends, once that is known; all that follows is taking down.
      code: the exit code of `watch`.
      why: of the end, or of the phase, as the user reads it.
      lives: all machines so far, for what they cost.
    """

    project: str = ""
    workdir: str = ""
    command: tuple[str, ...] = ()
    phase: Phase = "waiting"
    since: float = 0.0
    looked: float = 0.0
    held: Held | None = None
    zone: str = ""
    rounds: int = 0
    pause: float = 0.0
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bad: int = 0
    tries: int = 0
    attempt: int = 0
    step: int = 0
    mark: int = 0
    fruitless: int = 0
    parcel: Parcel | None = None
    update: bool = False
    end: End = ""
    code: int = 0
    why: str = ""
    lives: tuple[Life, ...] = ()


def load(folder: Path) -> Kept:
    """What is remembered in a run's folder; `Kept()` where nothing is.

    Raises:
      StateError: the file is damaged, or of another version.
    """
    file = folder / FILE
    try:
        text = file.read_text()
    except FileNotFoundError:
        return Kept()
    except (OSError, ValueError) as error:
        raise StateError(f"{file} can't be read: {error}.") from error
    try:
        return parsed(text)
    except ValueError as error:
        raise StateError(
            f"{file} is damaged: {error}. Move it away: the next `watch` finds a machine of this name by itself and "
            "resumes from the bucket, but what the run has cost is forgotten, also by --max_hours and --max_cost."
        ) from error


def written(kept: Kept) -> str:
    """The content of the file."""
    return json.dumps({"format": FORMAT, "kept": dataclasses.asdict(kept)}, default=str) + "\n"


def parsed(text: str) -> Kept:
    """What `written` made a text of.

    Raises:
      ValueError: it is something else, as the message says.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or set(content) != {"format", "kept"}:
        raise ValueError("it has no format number")
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
    return typing.cast(Kept, typed.read(Kept, content["kept"], "kept"))


def save(folder: Path, kept: Kept) -> None:
    """Write it, whole and durable, before this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    new = file.with_name(f"{FILE}.{os.getpid()}")
    try:
        with new.open("w") as out:
            out.write(written(kept))
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise StateError(
            f"{file} can't be written: {error.strerror}. The machine, if there is one, is left."
        ) from error


def opened(kept: Kept, life: Life) -> Kept:
    """With a machine that is asked for; one that is open in the same zone is the same machine."""
    others = tuple(one for one in kept.lives if one.ended is not None or one.zone != life.zone)
    return dataclasses.replace(kept, lives=(*others, life))


def over(kept: Kept, now: float, zone: str, why: str) -> Kept:
    """With no machine that costs in a zone; one that never began to is forgotten."""
    lives = list[Life]()
    for life in kept.lives:
        if life.ended is not None or life.zone != zone:
            lives.append(life)
        elif life.begun is not None:
            lives.append(dataclasses.replace(life, ended=max(now, life.begun), why=why))
    return dataclasses.replace(kept, lives=tuple(lives))


def afresh(kept: Kept) -> Kept:
    """As before anything happened, but for what the run has cost, its code, and how far it is."""
    return Kept(
        project=kept.project,
        workdir=kept.workdir,
        command=kept.command,
        looked=kept.looked,
        attempt=kept.attempt,
        step=kept.step,
        mark=kept.step,
        parcel=kept.parcel,
        lives=kept.lives,
    )


def closed(kept: Kept, now: float, why: str, zone: str | None = None) -> Kept:
    """After machines are gone: the one in a zone, or all."""
    for life in kept.lives:
        if zone in (None, life.zone):
            kept = over(kept, now, life.zone, why)
    gone = kept.held is None or zone in (None, kept.held.zone)
    return dataclasses.replace(kept, held=None if gone else kept.held)


@contextlib.contextmanager
def held(folder: Path, verb: str) -> Iterator[None]:
    """One command at a time that changes a run. The lock is the kernel's: it goes when its process goes.

    Raises:
      UserError: another has it; the message names it. Or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"--state={str(folder.parent)!r} can't be written: {error.strerror}. Expected a folder of yours, "
            "where each run has one."
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--name={folder.name!r} belongs to another command: {_owner(folder)}. Stop that one first (Ctrl-C "
                "leaves the machine and the training as they are), wait for it, or choose another --name."
            ) from error
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"{verb}, pid {os.getpid()} on {socket.gethostname()}, since {now}")
        file.flush()
        yield


def owner(folder: Path) -> str:
    """Which command holds a run; "" where none does."""
    try:
        file = (folder / LOCK).open()
    except FileNotFoundError:
        return ""
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _owner(folder)
    return ""


def _owner(folder: Path) -> str:
    """As it wrote itself; it may not have done so yet."""
    return (folder / LOCK).read_text() or "it has just started"
