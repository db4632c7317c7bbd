"""The checkpoints of a run as they lie on disk: which are committed, which to keep, and moves that no kill can cut.

A step is a folder named by its number. It is committed if it has a manifest; the disk is read each time, never a list
in memory. A step leaves by one rename: into `deleted/`, which is emptied then; `uncommitted/`, where a kill or a crash
came before its manifest; or `damaged/`, where nothing is ever deleted.

In a bucket nothing can be renamed. There a step is deleted with its manifest, which goes first; `deleted/` holds a mark
for each until the rest has gone. What is to stay is copied, its manifest last, before the manifest here goes.
"""

import contextlib
import dataclasses
import datetime
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from flaxmodels import manifest, storage
from flaxmodels.registry import UserError

TRASH, UNCOMMITTED, DAMAGED = "deleted", "uncommitted", "damaged"
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax still writes
EPOCH = datetime.datetime.fromtimestamp(0, datetime.UTC)


@dataclasses.dataclass(frozen=True)
class Step:
    """What decides whether a step is kept; Orbax's policies read it.

    Attributes:
      step: its number.
      metrics: {"watched": value}, or None where it was not evaluated.
      time: of training up to there, as a time after 1970: no clock of a wall, which may jump.
    """

    step: int
    metrics: dict[str, float] | None
    time: datetime.datetime


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps are kept: those that one of these asks for.

    Attributes:
      newest: how many of the newest.
      best: how many of those with the best watched metric.
      mode: "min" or "max": which value is best.
      every: for each multiple of so many steps the step nearest to it; 0 none.
      every_seconds: one for so many seconds of training; 0 none.
    """

    newest: int
    best: int
    mode: str
    every: int
    every_seconds: float

    def surplus(self, steps: Sequence[Step]) -> list[int]:
        """Those of `steps`, in order, that nothing asks to keep."""
        best = policies.BestN(get_metric_fn=_watched, reverse=self.mode == "min", n=self.best)
        asked: list[tuple[policies.PreservationPolicy, Sequence[Step]]] = [
            (policies.LatestN(self.newest), steps),
            (best, [step for step in steps if step.metrics]),  # among all it would keep others while they are few
        ]
        if self.every:
            asked.append((policies.EveryNStepsClosest(self.every), steps))
        if self.every_seconds:
            asked.append((policies.EveryNSeconds(math.ceil(self.every_seconds)), steps))
        kept = set()
        for policy, among in asked:
            keep = policy.should_preserve(among, context=policies.PreservationContext())
            kept |= {step.step for step, stays in zip(among, keep) if stays}
        return [step.step for step in steps if step.step not in kept]


def _watched(metrics: dict[str, float]) -> float:
    return metrics["watched"]


def committed(directory: Path) -> list[int]:
    """The steps that are committed, in order. Whether their files are whole, `manifest.verify` knows."""
    if storage.is_object(directory):  # one listing for all
        return _steps(file.parent.name for file in directory.glob(f"*/{manifest.NAME}"))
    return [step for step in _numbered(directory) if manifest.committed(directory / str(step))]


def facts(directory: Path, step: int) -> dict[str, Any]:
    """The facts of a committed step. Raises UserError: it is not there, or its manifest is damaged."""
    return manifest.read(directory / str(step))


def readable(directory: Path) -> list[Step]:
    """The committed steps whose manifests can be read."""
    found = []
    for step in committed(directory):
        try:
            said = facts(directory, step)
        except UserError:  # neither kept nor deleted here: whoever wants to restore it is told
            continue
        metrics = None if said.get("watched") is None else {"watched": float(said["watched"])}
        found.append(Step(step, metrics, EPOCH + datetime.timedelta(seconds=float(said.get("seconds", 0.0)))))
    return found


def move(folder: Path, into: Path) -> Path:
    """Move a folder into another one, by one rename where it can be; on storage when this returns. Raises OSError.

    Returns:
      Where it is now: a number is added to its name where that is taken.
    """
    into.mkdir(exist_ok=True)
    free, number = into / folder.name, 0
    while free.exists():
        number += 1
        free = into / f"{folder.name}.{number}"
    if storage.is_object(folder):
        storage.move(folder, free, last=manifest.NAME)
        return free
    folder.rename(free)
    manifest.sync(into)
    manifest.sync(folder.parent)
    return free


def delete(directory: Path, steps: Sequence[int]) -> None:
    """Delete steps, the newest first: killed at any moment, this leaves whole ones only. Raises OSError."""
    for step in sorted(steps, reverse=True):
        throw(directory / str(step), directory)
    empty(directory)


def throw(folder: Path, directory: Path) -> None:
    """Delete a folder at once; `empty` frees its space. Raises OSError.

    Args:
      folder: a step, or one that was moved aside.
      directory: of the steps.
    """
    if not storage.is_object(folder):
        move(folder, directory / TRASH)
    elif folder.parent == directory:
        (directory / TRASH / folder.name).write_bytes(b"")
        (folder / manifest.NAME).unlink(missing_ok=True)
    else:
        storage.remove(folder)


def empty(directory: Path) -> None:
    """Free the space of what was deleted."""
    if storage.is_object(directory):
        with contextlib.suppress(OSError):  # what is left goes with the next call
            for mark in [*(directory / TRASH).iterdir()]:
                folder = directory / mark.name
                if not manifest.committed(folder):  # else it was marked, and not deleted
                    storage.remove(folder)
                if manifest.committed(folder) or not folder.is_dir():
                    mark.unlink(missing_ok=True)
        return
    shutil.rmtree(directory / TRASH, ignore_errors=True)


def retire(directory: Path, retention: Retention) -> None:
    """After a commit: delete what is not kept any more, and what was cut off before it. Raises OSError."""
    steps = readable(directory)
    aside = directory / UNCOMMITTED
    if aside.is_dir() and steps:
        for folder in [*aside.iterdir()]:
            number = folder.name.partition(".")[0]
            if number.isdecimal() and int(number) <= steps[-1].step:  # else it is not ours
                throw(folder, directory)
        if not storage.is_object(aside) and not any(aside.iterdir()):
            aside.rmdir()
    delete(directory, retention.surplus(steps))


def sweep(directory: Path) -> None:
    """Free the space of saves that failed or were cut off, none being in flight."""
    if not storage.is_object(directory):  # there a save has the name of its step from the beginning
        for folder in directory.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(folder, ignore_errors=True)
    empty(directory)


def clear(directory: Path, step: int) -> None:
    """Free the space of the save of a step that failed; if it was committed all the same, that stays."""
    if (directory / str(step)).is_dir() and not manifest.committed(directory / str(step)):
        storage.remove(directory / str(step))
    sweep(directory)


def tidy(directory: Path) -> list[str]:
    """After a kill: free what was half written or half deleted, and move aside what was never committed.

    Returns:
      A line on each step that was moved.

    Raises:
      OSError: the directory can't be written.
      UserError: steps are of a version that wrote no manifest.
    """
    sweep(directory)
    if old := [step for step in _numbered(directory) if _is_old(directory / str(step))]:
        raise UserError(
            f"checkpoints {', '.join(map(str, old[:5]))} in {str(directory)!r} are of an earlier version, which wrote "
            "no manifest: go on with the version that wrote them, or choose another --workdir."
        )
    moved = [step for step in _numbered(directory) if not manifest.committed(directory / str(step))]
    return [
        f"checkpoint {step} was cut off before it was committed: moved to "
        f"{move(directory / str(step), directory / UNCOMMITTED).relative_to(directory)}"
        for step in moved
    ]


def _is_old(folder: Path) -> bool:
    """Whether a version from before the manifest finished this step: it kept JSON beside the arrays."""
    return not manifest.committed(folder) and (folder / "meta" / "metadata").exists()


def _numbered(directory: Path) -> list[int]:
    """The steps that have a folder."""
    if not directory.is_dir():
        return []
    return _steps(file.name for file in directory.iterdir() if storage.is_object(file) or file.is_dir())


def _steps(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and str(int(name)) == name)
