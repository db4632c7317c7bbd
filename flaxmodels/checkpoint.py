"""Orbax behind one small class: asynchronous saves, newest and best kept, restored onto any mesh.

A checkpoint is three items: `params`; `rest` (step, other collections, optimizer state); and `meta`, JSON: what a
resume needs beside arrays, the config, and versions. The step is the position in the data.
"""

import importlib.metadata
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flaxmodels.registry import Positive, Steps, UserError
from flaxmodels.state import TrainState

VERSIONED = ("flaxmodels-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; a package that is not installed as a distribution is left out."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Orbax renames a step into this folder, in place of deleting it; the folder is emptied at the next save.
TRASH = "deleted"


def _described(tree: Any) -> dict[str, str]:
    """Path -> "shape dtype" of each array of a tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): f"{tuple(x.shape)} {x.dtype}" for k, x in leaves}


def _changes(paths: list[str], saved: dict[str, str], wanted: dict[str, str], most: int = 3) -> str:
    """What is different about the arrays at `paths`, `most` of them, in a line."""
    more = f"; and {len(paths) - most} more" if len(paths) > most else ""
    return "; ".join(f"{path} was {saved[path]}, is {wanted[path]}" for path in paths[:most]) + more


def _watched(metrics: Any) -> float:
    return metrics["watched"]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: holds one folder a step; made if missing.
      best_mode: "min" or "max": which value of the watched metric is best.
      every: save every so many steps; 0 saves by time, by metric and at the end only.
      every_seconds: save when the last save is longer ago; 0 never saves by time.
      keep: newest checkpoints kept.
      keep_best: keep the one with the best metric too.
      read_only: only look: nothing is made, cleaned up or deleted.

    Raises:
      UserError: the directory can't be made.
    """

    def __init__(
        self,
        directory: Path,
        *,
        best_mode: str = "min",
        every: Steps = 0,
        every_seconds: float = 600.0,
        keep: Positive = 2,
        keep_best: bool = True,
        read_only: bool = False,
    ) -> None:
        self.every, self.every_seconds, self.keep_best = every, every_seconds, keep_best
        self._saved_at = time.monotonic()
        self._read_only = read_only
        self._trash = directory / TRASH
        watched: dict[str, Any] = {"best_fn": _watched, "best_mode": best_mode}  # without it Orbax writes no metrics
        best = policies.BestN(
            get_metric_fn=_watched,
            reverse=best_mode == "min",
            n=1 if keep_best else 0,
            keep_checkpoints_without_metrics=False,
        )
        options = (
            ocp.CheckpointManagerOptions(read_only=True, **watched)
            if read_only
            else ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                # Deleting in place is not atomic: killed half way, it leaves a step that is listed and broken.
                todelete_subdir=TRASH,
                cleanup_tmp_directories=True,
                **watched,
            )
        )
        try:
            if not read_only:
                directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        except OSError as error:
            raise UserError(f"{directory} can't be written: {error.strerror}. Choose another --workdir.") from error
        self.best_mode = best_mode

    def due(self, step: int) -> bool:
        """Whether a save is due after `step`, by steps."""
        return self.every > 0 and step % self.every == 0

    def late(self) -> bool:
        """Whether a save is due by time (monotonic: a clock that jumps changes nothing)."""
        return self.every_seconds > 0 and time.monotonic() - self._saved_at >= self.every_seconds

    def latest(self) -> int | None:
        """The newest step on disk."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps on disk."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the best metric on disk; None where none has one."""
        sign = 1 if self.best_mode == "min" else -1
        found = {step: self._manager.metrics(step) for step in self.steps()}
        scored = [(sign * metrics["watched"], step) for step, metrics in found.items() if metrics]
        return min(scored)[1] if scored else None

    def save(
        self, state: TrainState, step: int, meta: dict[str, Any], watched: float | None = None, *, replace: bool = False
    ) -> None:
        """Save `state`; returns when its arrays are copied, and writes on in the background.

        Args:
          state: after `step` updates.
          step: its number.
          meta: JSON data.
          watched: the watched metric of this state, where it was evaluated.
          replace: write the step again if it is on disk; else that does nothing, as a step has one state.

        Raises:
          Exception: an earlier save failed in the background.
        """
        if step in self._manager.all_steps():
            if not replace:
                return
            self._manager.delete(step)
        self.wait()  # for its deletions too: they rename into the folder that is emptied now
        self._empty_trash()
        rest = {"step": state.step, "extra": state.extra, "opt_state": state.opt_state}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave({**meta, "versions": versions()}),
            ),
            metrics=None if watched is None else {"watched": watched},
        )
        self._saved_at = time.monotonic()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data that a step on disk was saved with."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return dict(found["meta"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read a step onto the mesh of `abstract`, whatever mesh it was saved from.

        Args:
          step: one of the steps on disk.
          abstract: `jax.ShapeDtypeStruct` with shardings, the tree of `state.init`.

        Raises:
          UserError: the checkpoint does not hold such a state.
        """
        rest = {"step": abstract.step, "extra": abstract.extra, "opt_state": abstract.opt_state}
        folder = self._manager.directory / str(step)
        wanted = _described({"params": abstract.params, "rest": rest})
        try:
            # Before any array is read: Orbax would cast dtypes silently, and leave reads under way on another shape.
            reader = ocp.StandardCheckpointHandler()
            saved = _described({item: reader.metadata(folder / item).tree for item in ("params", "rest")})
            if changed := [path for path in wanted if path in saved and saved[path] != wanted[path]]:
                raise ValueError(_changes(changed, saved, wanted))
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    rest=ocp.args.StandardRestore(rest),
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} can't be restored into this model and optimizer: "
                f"{str(error).strip().splitlines()[0]}\n"
                "Go back to the config that it was trained with, or choose another --workdir."
            ) from error
        return TrainState(params=found["params"], **found["rest"])

    def check(self) -> None:
        """Raise the error of a save that failed in the background, if one did."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for the save in flight; raise its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in flight, and let go. Raises its error."""
        try:
            self.wait()
            self._empty_trash()
        finally:
            self._manager.close()

    def _empty_trash(self) -> None:
        if not self._read_only and jax.process_index() == 0:
            shutil.rmtree(self._trash, ignore_errors=True)
