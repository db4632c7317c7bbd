"""The checkpoints of any workdir, looked at without a config, a model or a device; and which of them to throw away.

Everything here is read from the disk at each call, so that a run that goes on meanwhile changes nothing but the answer.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxmodels import disk, manifest, registry, storage
from flaxmodels.registry import UserError
from flaxmodels.runtime.lease import answered

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One step on disk.

    Attributes:
      step: its number.
      folder: that holds it.
      committed: whether its commit came to an end.
      saved: when, seconds since 1970.
      nbytes: of all its files.
      facts: of its manifest: what it came from, and what a resume needs; {} where there is none, or it is damaged.
    """

    step: int
    folder: Path
    committed: bool
    saved: float
    nbytes: int
    facts: dict[str, Any]

    @property
    def metric(self) -> float | None:
        """The watched metric; None where it was not evaluated."""
        return self.facts.get("watched")

    @property
    def meta(self) -> dict[str, Any]:
        """What a resume needs beside arrays: the config, and what the data were."""
        return dict(self.facts.get("meta", {}))

    @property
    def sign(self) -> int:
        """1 where less of the metric is better, else -1."""
        return -1 if self.meta.get("config", {}).get("train.mode") == "max" else 1

    def __str__(self) -> str:
        return f"step {self.step} of {str(self.workdir)!r}"

    @property
    def workdir(self) -> Path:
        """The run that it belongs to."""
        return self.folder.parent.parent


def entries(workdir: Path, flag: str = "--workdir") -> list[Entry]:
    """The steps of a workdir, in their order, committed or not.

    Args:
      workdir: of a run.
      flag: what named it, for the message.

    Raises:
      UserError: it is no workdir.
      FaultError: its bucket does not answer.
    """
    with answered(workdir):
        return _entries(workdir, flag)


def _entries(workdir: Path, flag: str) -> list[Entry]:
    folder = workdir / CHECKPOINTS
    if not folder.is_dir():
        what = "is not there" if not workdir.exists() else "has no checkpoints"
        raise UserError(f"{flag}={str(workdir)!r} {what}: expected the workdir of a run.{_near(workdir)}")
    numbered = (child for child in folder.iterdir() if child.name.isdecimal())
    found = (_entry(child) for child in numbered if storage.is_object(child) or child.is_dir())
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.step)


def _near(workdir: Path) -> str:
    """The workdirs in or beside a folder, for a message."""
    if storage.is_object(workdir):  # whose bucket may hold anything
        return ""
    for folder in (workdir, workdir.parent):
        if known := [str(child.parent) for child in folder.glob(f"*/{CHECKPOINTS}") if child.is_dir()]:
            return f" {registry.suggest(workdir, known)}"
    return ""


def _entry(folder: Path) -> Entry | None:
    """None where the folder went away while we looked."""
    try:
        committed = manifest.committed(folder)
        size = _size(folder)
        saved = storage.changed(folder / manifest.NAME if committed else folder)
    except FileNotFoundError:
        return None
    facts: dict[str, Any] = {}
    if committed:
        with contextlib.suppress(UserError):  # damaged: `problems` says how
            facts = manifest.read(folder)
    return Entry(int(folder.name), folder, committed, facts.get("time", saved), size, facts)


def _size(folder: Path) -> int:
    return sum(storage.sizes(folder).values())


def best(found: Sequence[Entry]) -> Entry | None:
    """The committed step with the best metric; None where none has one."""
    scored = [
        (entry.sign * entry.metric, entry.step, entry)
        for entry in found
        if entry.committed and entry.metric is not None
    ]
    return min(scored)[2] if scored else None


def find(workdir: Path, which: str | int, flag: str = "--workdir") -> Entry:
    """One committed step.

    Args:
      workdir: of a run.
      which: "best" (by its metric; the latest where none has one), "latest", or a number.
      flag: what named the workdir, for the message.

    Raises:
      UserError: it is no workdir, or has no such step; the message names the nearest.
    """
    found = [entry for entry in entries(workdir, flag) if entry.committed]
    if not found:
        raise UserError(f"{flag}={str(workdir)!r} has no step that was saved to its end.")
    named = {"latest": found[-1], "best": best(found) or found[-1], **{str(entry.step): entry for entry in found}}
    text = str(which).strip()
    text = str(int(text)) if text.isdecimal() else text
    if text in named:
        return named[text]
    if text.isdecimal():
        near = min(found, key=lambda entry: abs(entry.step - int(text))).step
        raise UserError(f"step {text} is not in {str(workdir)!r}: the nearest is {near}. {_steps(found)}")
    raise UserError(f"{which!r} is no step of {str(workdir)!r}. {registry.suggest(text, named)}")


def _steps(found: Sequence[Entry]) -> str:
    return registry.suggest("", [str(entry.step) for entry in found])


def problems(entry: Entry, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a step, in words, each naming the file; [] where it is whole.

    Args:
      entry: a step. All of it is read.
      part: read this share of it only: several processes split the work.
      parts: how many shares there are.

    Raises:
      FaultError: its bucket does not answer.
    """
    with answered(entry.workdir):
        return manifest.verify(entry.folder, part, parts)


def check(entry: Entry) -> None:
    """Raise UserError where a step is damaged."""
    if found := problems(entry):
        raise UserError(f"{entry} is damaged: {'; '.join(found[:3])}. Choose another step.")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What becomes of one step when a workdir is pruned.

    Attributes:
      entry: the step.
      keep: whether it stays.
      why: in words.
    """

    entry: Entry
    keep: bool
    why: str


def plan_prune(
    found: Sequence[Entry], *, keep: int = 1, keep_best: int = 0, keep_every: int = 0, damaged: bool = False
) -> list[Verdict]:
    """Which steps stay, by the rules of a run's own retention. Reads all files of the steps that it would keep.

    A damaged step counts for none of these rules: another stays in its place, and it goes only where `damaged` says so.
    The newest whole step stays in any case, so that a run can go on.

    Args:
      found: all steps of a workdir.
      keep: newest whole steps that stay, at least 1.
      keep_best: whole steps with the best metric that stay.
      keep_every: for each multiple of so many steps the step nearest to it stays; 0: none does for that.
      damaged: steps that are damaged, or were never committed, go.
    """
    rules = {"newest": (max(keep, 1), 0, 0), "best": (0, keep_best, 0), f"every {keep_every} steps": (0, 0, keep_every)}
    broken = {entry.step: "was never committed" for entry in found if not entry.committed}
    unread = {entry.step: entry for entry in found if entry.committed}
    kept: dict[int, list[str]] = {}
    while True:
        whole = [entry for entry in found if entry.step not in broken]
        kept = {entry.step: [] for entry in whole}
        for name, asked in rules.items():
            for step in kept.keys() - _surplus(whole, *asked):
                kept[step].append(name)
        looked = [entry for step, entry in unread.items() if damaged or kept.get(step)]
        unread = {step: entry for step, entry in unread.items() if entry not in looked}
        new = {entry.step: f"damaged: {said[0]}" for entry in looked if (said := problems(entry))}
        if not new:
            break
        broken |= new
    return [
        Verdict(entry, not damaged, broken[entry.step])
        if entry.step in broken
        else Verdict(entry, bool(kept[entry.step]), ", ".join(kept[entry.step]))
        for entry in found
    ]


def _surplus(found: Sequence[Entry], newest: int, best: int, every: int) -> set[int]:
    """The steps that one rule does not keep."""
    if not newest and not best and not every:
        return {entry.step for entry in found}
    mode = "max" if found and found[-1].sign < 0 else "min"
    metrics = [None if entry.metric is None else {"watched": entry.metric} for entry in found]
    steps = [disk.Step(entry.step, scores, disk.EPOCH) for entry, scores in zip(found, metrics)]
    return set(disk.Retention(newest, best, mode, every, 0.0).surplus(steps))


def aside(workdir: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the steps that a run moved aside: damaged ones, and those that never were committed."""
    folder = workdir / CHECKPOINTS
    kinds = [folder / kind for kind in (disk.DAMAGED, disk.UNCOMMITTED)]
    found = [step for kind in kinds if kind.is_dir() for step in sorted(kind.iterdir())]
    return [(step.relative_to(folder).as_posix(), _size(step)) for step in found]


def throw_away(workdir: Path, steps: Sequence[Entry], others: Sequence[tuple[str, int]] = ()) -> None:
    """Delete steps, each first by one rename, so that none is ever listed and half there.

    Args:
      workdir: whose lock the caller holds.
      steps: of it.
      others: of `aside`.

    Raises:
      UserError: a folder can't be renamed.
    """
    folder = workdir / CHECKPOINTS
    try:
        for name, _ in others:
            disk.throw(folder / name, folder)
        disk.delete(folder, [entry.step for entry in steps])
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be written: {error.strerror}.") from error
