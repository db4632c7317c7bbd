"""An autopsy capsule: a bad step as it was, in a folder that is all `flaxmodels replay` needs beside the data.

WORKDIR/capsules/STEP holds the state before the step, in the layout of a checkpoint, and a manifest whose facts are the
numbers of the batch, its config, the data, the mesh, and the losses before it. It is committed as checkpoints are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flaxmodels import checkpoint, fitting, guard, manifest, storage, stored
from flaxmodels.job import Job
from flaxmodels.registry import UserError, storable
from flaxmodels.runtime import peers
from flaxmodels.runtime.exits import FaultError
from flaxmodels.saving import cause
from flaxmodels.state import TrainState
from flaxmodels.watch import Trip, Watch

FOLDER = "capsules"
# What a step can be accused of; an update that overflows is found in the state, when it is to be saved.
WHY = {guard.NOT_FINITE: "not finite", guard.SPIKE: "spike"}


def steps(workdir: Path) -> list[int]:
    """Steps of the capsules of a workdir, the same in all processes."""
    folder = workdir / FOLDER
    there = folder.iterdir() if folder.is_dir() else ()
    found = [int(f.name) for f in there if f.name.isdecimal() and manifest.committed(f)]
    told: list[int] = peers.told(sorted(found))
    return told


def facts(job: Job, trip: Trip, watch: Watch) -> dict[str, Any]:
    """What a capsule says beside arrays, ready for JSON; floats as `float.hex` writes them, which NaN survives.

    Args:
      job: of the run.
      trip: what happened.
      watch: that saw it.
    """
    return {
        "step": trip.step,
        "why": WHY[trip.code],
        "loss": trip.loss.hex(),
        "grad_norm": trip.grad_norm.hex(),
        "examples": job.train.indices(job.seed, trip.step)[0].tolist(),
        "history": [[step, loss.hex(), norm.hex()] for step, loss, norm in watch.history],
        "config": storable(job.config),
        "data": job.identity,
        **topology(job),
        "versions": checkpoint.versions(),
    }


def topology(job: Job) -> dict[str, Any]:
    """What bits depend on beside the program: the devices, and how a job lies on them."""
    first = job.mesh.devices.flat[0]
    return {
        "mesh": {name: size for name, size in job.mesh.shape.items() if size > 1},
        "devices": job.mesh.size,
        "kind": first.device_kind,
        "processes": jax.process_count(),
    }


def write(workdir: Path, state: TrainState, facts: Mapping[str, Any]) -> Path:
    """Write a capsule; all processes of a run do, and wait.

    Args:
      workdir: of the run.
      state: before the bad step.
      facts: from `facts`.

    Returns:
      Its folder.

    Raises:
      FaultError: the storage failed.
    """
    folder = (workdir / FOLDER / str(facts["step"])).absolute()
    rest = {"step": state.step, "extra": state.extra, "opt_state": state.opt_state}
    if storage.is_object(folder) and jax.process_index() == 0:
        storage.remove(folder)  # Orbax would ask for a right on the bucket that this needs nowhere else
    try:
        with ocp.StandardCheckpointer() as writer:
            for item, tree in (("params", state.params), ("rest", rest)):
                writer.save(storage.for_orbax(folder / item), tree, force=True)  # what a killed run left of it goes
                writer.wait_until_finished()
        if jax.process_index() == 0:
            manifest.write(folder, facts)
    except (OSError, ValueError) as error:  # the latter of TensorStore
        raise FaultError(
            f"the capsule {str(folder)!r} was not written: {cause(error)}. Set this right, and the same command goes "
            "on from the last checkpoint; guard.capsules=0 writes none."
        ) from error
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The facts of a capsule whose files are as they were written.

    Raises:
      UserError: it is none, or damaged; names the files.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no capsule: there is no such folder. Runs write them to WORKDIR/{FOLDER}.")
    found = manifest.read(folder)
    if "examples" not in found:
        raise UserError(f"{str(folder)!r} is no capsule: its manifest says nothing of a batch.")
    if problems := manifest.verify(folder):
        raise UserError(f"capsule {str(folder)!r} is damaged: {'; '.join(problems[:5])}.")
    return found


def restore(folder: Path, abstract: TrainState) -> TrainState:
    """The state of a capsule onto the mesh of `abstract`.

    Raises:
      UserError: it holds another state.
    """
    rest = {"step": abstract.step, "extra": abstract.extra, "opt_state": abstract.opt_state}
    wanted = fitting.leaves({"params": abstract.params, **rest})
    if lines := fitting.differences(stored.tree(folder), wanted):
        raise UserError(
            fitting.refusal(
                f"capsule {str(folder)!r} holds another state",
                lines,
                "Use the code and the config that it was written with.",
            )
        )
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(storage.for_orbax(folder / "params"), abstract.params)
        found = reader.restore(storage.for_orbax(folder / "rest"), rest)
    return TrainState(params=params, **found)
