"""One save at a time, written by Orbax in the background, committed by its manifest, and watched while it lasts.

Orbax by itself tells of a save that failed at the next one, which is lost too, and leaves its bytes; its only time
limit goes by the clock on the wall, which may jump. Here `look` tells at once, frees what is left, and has a limit
that counts seconds.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity
from orbax.checkpoint.path import step as naming

from flaxmodels import disk, manifest, mirror, storage
from flaxmodels.runtime import exits, lease, peers
from flaxmodels.runtime.exits import FaultError

# Seconds.
NEVER = 100 * 365 * 86400  # the limit that Orbax gets
PAUSE = 0.002
AFTER = 60.0  # a save that failed, for which what it left is looked for


def _committing(directory: Path, commit: Callable[[Path], None]) -> type[atomicity.TemporaryPathBase]:
    """How Orbax shall finish what it writes: as ever, and then a whole step is committed, by its own thread.

    Its callback after finalization comes too early: two more files of the step are written after it.
    """
    # In a bucket nothing can be renamed: a step has its name from the beginning, and its manifest makes it one.
    objects = storage.is_object(directory)
    base: Any = atomicity.CommitFileTemporaryPath if objects else atomicity.AtomicRenameTemporaryPath

    class Committing(base):
        async def finalize(self) -> None:
            await super().finalize()
            final = storage.place(self.get_final())
            if final.parent == directory:  # the items of a step pass here too
                commit(final)

    return Committing


class _Found(naming.NameFormat):
    """How Orbax shall name and find the steps in a bucket: its own way asks for a right on the bucket itself."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[naming.Metadata]:
        directory = storage.place(base_path)
        for step in disk.committed(directory):
            yield naming.Metadata(step=step, path=storage.for_orbax(directory / str(step)))

    def find_step(self, base_path: Any, step: int) -> naming.Metadata:
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no step {step} in {base_path}")


class Saving:
    """The saves of one run, and the one in flight.

    Args:
      directory: of the steps; absolute.
      retention: which steps are kept when one is committed.
      deadline_seconds: a save that takes longer has failed.

    Attributes:
      manager: of Orbax.
      step: of the save in flight; None where there is none.
      overdue: the save in flight has passed its deadline; it may still end.
      notes: lines for the log, which the owner takes.
    """

    def __init__(self, directory: Path, retention: disk.Retention, deadline_seconds: float) -> None:
        self.directory, self.retention, self.deadline_seconds = directory, retention, deadline_seconds
        self.step: int | None = None
        self.overdue = False
        self.notes: list[str] = []
        self._facts: Mapping[str, Any] = {}
        self._begun = self._unclean = 0.0
        self._failed: set[int] = set()  # steps whose saves did
        options = ocp.CheckpointManagerOptions(
            # What is kept is decided when a step is committed, by what is on disk then.
            preservation_policy=policies.LatestN(None),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            temporary_path_class=_committing(directory, self._commit),
            # Made beside the rest, folders are waited for by several threads, by the clock on the wall.
            async_options=ocp.AsyncOptions(timeout_secs=NEVER, create_directories_asynchronously=False),
            lightweight_initialize=True,
            step_name_format=_Found() if storage.is_object(directory) else None,
        )
        self.manager = ocp.CheckpointManager(storage.for_orbax(directory), options=options)

    def begin(self, step: int, items: ocp.args.Composite, facts: Mapping[str, Any]) -> FaultError | None:
        """Start a save, nothing being in flight; returns when its arrays are copied. How it failed, if it did at once.

        Args:
          step: not on disk.
          items: to save.
          facts: for the manifest.
        """
        self.step, self._facts, self._begun, self.overdue = step, facts, time.monotonic(), False
        self._sweep()
        self._failed.discard(step)
        try:
            self.manager.save(step, args=items, force=True)
        except Exception as error:
            if not isinstance(error, OSError) and not storage.is_object(self.directory):
                raise  # of a bucket, Orbax's clients have errors of their own kinds
            return self._lost(error)
        return None

    def _commit(self, folder: Path) -> None:
        """In Orbax's thread of process 0, when all is written and before anything is deleted."""
        if folder.name != str(self.step):  # one part of it failed, and the others went on
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        workdir = self.directory.parent
        mirror.flush(workdir)
        manifest.write(folder, self._facts, before=lambda: lease.confirm(workdir))
        try:
            disk.retire(self.directory, self.retention)
        except OSError as error:
            self.notes.append(f"warning: old checkpoints could not be deleted: {error.strerror}")

    def look(self) -> FaultError | None:
        """How the save in flight failed, or that its deadline has passed, once; None while all is well. Cheap."""
        if self.step is None:
            if time.monotonic() < self._unclean:
                self._sweep()
            return None
        if self.manager.is_saving_in_progress():
            if self.overdue or time.monotonic() - self._begun <= self.deadline_seconds:
                return None
            self.overdue = True
            return self.slow()
        try:
            self.manager.wait_until_finished()
        except Exception as error:  # of Orbax, TensorStore or the system: each has its own kinds
            return self._lost(error)
        self.step = None
        return None

    def wait(self) -> FaultError | None:
        """Till nothing is in flight, or what is is overdue; how it failed."""
        while True:
            error = self.look()
            if error is not None or self.step is None or self.overdue:
                return error
            time.sleep(PAUSE)

    def close(self) -> None:
        """Let go of Orbax, if nothing is in flight: else it, and Python at its end, might wait for ever."""
        if self.step is None:
            self._sweep()
            try:
                self.manager.close()
            except Exception:  # of several parts of a save that fail Orbax raises one at a time, and here what is left
                if not self._failed:
                    raise
        else:
            exits.abandon()

    def slow(self) -> FaultError:
        """That the save in flight is overdue."""
        return FaultError(
            f"{self} has not ended after {self.deadline_seconds:g} s. Is the storage there? If it is only slow, raise "
            "checkpoint.deadline_seconds."
        )

    def __str__(self) -> str:
        return f"the save of step {self.step} to {str(self.directory)!r}"

    def _lost(self, error: Exception) -> FaultError:
        """The save in flight failed: free what it has left."""
        assert self.step is not None
        try:
            if peers.me() == 0:
                disk.clear(self.directory, self.step)
            steps = disk.committed(self.directory)
            whole = f"step {steps[-1]} is there and whole" if steps else "no step was saved before it"
        except OSError:  # a bucket that does not answer
            whole = "what was saved before it is untouched"
        lost = FaultError(
            f"{self} failed: {cause(error)}; {whole}. Set this right, and the same command goes on from there."
        )
        lost.__cause__ = error
        self._failed.add(self.step)
        self.step, self._unclean = None, time.monotonic() + AFTER
        exits.abandon()  # threads of it may wait for each other for ever
        return lost

    def _sweep(self) -> None:
        """Of several items that are written at once one fails; what others still wrote then is freed, too."""
        if peers.me() != 0:
            return
        with contextlib.suppress(OSError):  # of a bucket: the next call may find it again
            disk.sweep(self.directory)
            for step in self._failed if storage.is_object(self.directory) else ():  # they have their steps' own names
                disk.clear(self.directory, step)


def cause(error: BaseException) -> str:
    """Why a save failed, in a few words: what the system said where it did, such as "No space left on device"."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    for found in reversed(chain):
        if isinstance(found, OSError) and str(found.filename).startswith(storage.SCHEME):
            return str(found.strerror)  # of a bucket: what to do about it, where that is known
        said = re.search(r"os_error_code='(\d+)'", str(found))  # of TensorStore
        number = found.errno if isinstance(found, OSError) else int(said[1]) if said else None
        if number is not None and number in errno.errorcode:
            return os.strerror(number)
    return (str(chain[0]).strip() or type(chain[0]).__name__).splitlines()[0]
