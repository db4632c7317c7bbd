"""What a resumed run finds: whose workdir it is, the newest state, and the few numbers that the log depends on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.checkpoint import Checkpoints, versions
from flaxmodels.job import Job
from flaxmodels.registry import UserError, storable
from flaxmodels.runtime import peers
from flaxmodels.state import TrainState

# Keys that a resumed run may change: they decide when and where things happen, not what is computed. What changes the
# data is not found by the keys of its section, but by its content (`same_data`).
FREE_KEYS = (
    "train.log_every", "train.eval_every", "train.patience", "train.steps_per_dispatch", "checkpoint.", "mesh.",
    "sharding.", "data.", "loss.chunks",
)  # fmt: skip
# Fields of `Job.identity` that decide what an evaluation sees.
EVALUATED = ("source", "options", "content", "test examples", "transforms", "tokenizer")


@dataclasses.dataclass
class Memory:
    """What a resumed run must know beside its arrays, saved as JSON in each checkpoint.

    Attributes:
      pending: sums and counts of training metrics since the last line of the log, float64.
      evaluated: the last step that was evaluated.
      best: the best value of the watched metric.
      stale: evaluations since then.
    """

    pending: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    evaluated: int = 0
    best: float | None = None
    stale: int = 0


def meta(job: Job, memory: Memory, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved as JSON with each checkpoint."""
    return {
        "memory": dataclasses.asdict(memory),
        "data": job.identity,
        "config": storable(resolved),
    }


def start(job: Job, checkpoints: Checkpoints, *, allow_data_change: bool = False) -> tuple[TrainState, Memory, str]:
    """The newest checkpoint, or a fresh state; and how its data differ from the job's, where that is allowed.

    Raises:
      UserError: the newest step is beyond the end of the run, does not fit the model, or was trained on other data.
    """
    newest = checkpoints.latest()
    peers.compare({"checkpoint": {"newest step on disk": newest}})
    if newest is None:
        return job.fresh(), Memory(), ""
    if newest > job.total_steps:
        raise UserError(
            f"train.duration is {job.total_steps} steps, but the workdir is at step {newest} already: "
            "choose a longer duration, or another --workdir."
        )
    found = checkpoints.meta(newest)  # before the arrays: another vocabulary makes them of another shape
    changes = data_changes(job, found)
    if changes and not allow_data_change:
        raise UserError(
            f"data {job.source.name!r} is not what the workdir was trained on: {changes}. "
            "Restore the data, choose another --workdir, or go on with these from here with --allow_data_change."
        )
    known = {field.name for field in dataclasses.fields(Memory)}
    memory = Memory(**{key: value for key, value in found["memory"].items() if key in known})
    if data_changes(job, found, EVALUATED):  # what was best was so on other data
        memory = dataclasses.replace(memory, best=None, stale=0)
    return checkpoints.restore(newest, job.abstract), memory, changes


def data_changes(job: Job, found: Mapping[str, Any], fields: Sequence[str] = ()) -> str:
    """How the data of a job differ from those of a checkpoint, in words; "" where they are the same.

    Args:
      job: of the config.
      found: the meta of the checkpoint.
      fields: of `Job.identity` to compare; () compares all.
    """
    old, now = found.get("data", {}), job.identity
    differ = [name for name in fields or now if old.get(name) != now[name]]
    return "; ".join(f"{name} was {old.get(name)!r}, is {now[name]!r}" for name in differ)


def same_config(workdir: Path, rows: list[tuple[str, Any, str]], allowed: bool) -> None:
    """Refuse a workdir of another config, unless that one never came to save a step.

    Args:
      workdir: of the run.
      rows: of `sections.resolved`.
      allowed: do not refuse.

    Raises:
      UserError: it lists the keys that differ.
    """
    file = workdir / "config.json"
    if allowed or not file.exists() or not any(f.name.isdecimal() for f in (workdir / "checkpoints").glob("*")):
        return
    old, now = json.loads(file.read_text())["config"], {key: storable(value) for key, value, _ in rows}
    # A default that did not exist when the run began is not a change.
    keys = {*old, *(key for key, _, origin in rows if origin != "default")}
    differ = [k for k in sorted(keys) if not k.startswith(FREE_KEYS) and old.get(k) != now.get(k)]
    if differ:
        changes = "; ".join(f"{k} was {old.get(k)!r}, is {now.get(k)!r}" for k in differ[:5])
        raise UserError(
            f"--workdir={str(workdir)!r} belongs to another config: {changes}. "
            "Choose another --workdir, or resume all the same with --allow_config_change."
        )


def write_config(workdir: Path, resolved: Mapping[str, Any]) -> None:
    """Write the config beside the checkpoints, with versions; whole or not at all."""
    new = workdir / "config.tmp"
    new.write_text(json.dumps({"config": storable(resolved), "versions": versions()}, indent=1) + "\n")
    new.replace(workdir / "config.json")
