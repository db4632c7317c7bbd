"""What a resumed run finds: whose workdir it is, the newest state, and the few numbers that the log depends on."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxmodels import basis, guard, lora, registry, storage, warm
from flaxmodels.checkpoint import Checkpoints, versions
from flaxmodels.data import tokenizer
from flaxmodels.data.split import Tokenizer
from flaxmodels.job import Job
from flaxmodels.registry import UserError, storable
from flaxmodels.runtime import peers
from flaxmodels.state import TrainState

# Keys that a resumed run may change: they decide when and where things happen, not what is computed. What changes the
# data is not found by the keys of its section, but by its content (`same_data`).
FREE_KEYS = (
    "train.log_every", "train.eval_every", "train.patience", "train.steps_per_dispatch", "checkpoint.", "mesh.",
    "sharding.", "data.", "loss.chunks", "start.", "guard.max_bad_steps", "guard.capsules", "samples.",
)  # fmt: skip
# Fields of `Job.identity` that decide what an evaluation sees.
EVALUATED = ("source", "options", "content", "test examples", "transforms", "tokenizer", "labels")
# Fields that decide what a row of an embedding stands for.
VOCABULARY = ("tokenizer",)


@dataclasses.dataclass
class Memory:
    """What a resumed run must know beside its arrays, saved as JSON in each checkpoint.

    Attributes:
      pending: sums and counts of training metrics since the last line of the log, float64.
      evaluated: the last step that was evaluated.
      best: the best value of the watched metric.
      stale: evaluations since then.
      origin: "WORKDIR:STEP" of the checkpoint that the first state was started from; "" where it was new.
      base: of the base that came from there and that checkpoints leave out: see `basis.described`; {} of any other.
    """

    pending: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    evaluated: int = 0
    best: float | None = None
    stale: int = 0
    origin: str = ""
    base: dict[str, Any] = dataclasses.field(default_factory=dict)


def meta(job: Job, memory: Memory, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved as JSON with each checkpoint; "model" with the fields, too, that the config leaves to the data."""
    model = lora.bare(job.model)
    fields = [name for name in registry.parameters([type(model)]) if hasattr(model, name)]
    return {
        "memory": dataclasses.asdict(memory),
        "data": job.identity,
        "config": storable(resolved),
        "model": storable({"name": job.config["model"]["name"]} | {name: getattr(model, name) for name in fields}),
    }


def facts(job: Job, resolved: Mapping[str, Any], parent: int | str | None) -> dict[str, Any]:
    """What the manifest of a checkpoint says of where it came from, beside `meta`.

    Args:
      job: of the config.
      resolved: every key of the config.
      parent: the checkpoint before it: a step of the same workdir, "WORKDIR:STEP", or None for a new state. Where the
        workdir has a step, `Checkpoints.save` puts it there.
    """
    return {
        "time": time.time(),
        "parent": parent,
        "config sha256": _digest(storable(resolved)),
        "data sha256": _digest(job.identity),
        "tokenizer": job.identity["tokenizer"],
        "mesh": dict(job.mesh.shape),
        "processes": peers.count(),
        "platform": job.mesh.devices.flat[0].platform,
        "git": revision(),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Seconds. A repository on a network file system that does not answer shall not keep a run from starting.
GIT_LIMIT = 5.0


@functools.cache
def revision() -> dict[str, Any] | None:
    """The commit of the working directory, and whether a file that git knows differs from it; None outside of git."""
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"revision": commit, "dirty": None if changes is None else bool(changes)} if commit else None


def _git(*words: str) -> str | None:
    """What git says; None where there is no git, no repository or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *words],  # of a repository it could run anything
            capture_output=True, text=True, timeout=GIT_LIMIT, check=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # to look changes nothing
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def start(
    job: Job, checkpoints: Checkpoints, *, allow_data_change: bool = False
) -> tuple[TrainState, Memory, tuple[str, ...]]:
    """The newest good checkpoint; where there is none, the state that the section `start` asks for, or a fresh one.

    Returns:
      (state, memory, lines for the log: what is not as it was when the checkpoint was saved).

    Raises:
      UserError: the newest step is beyond the end of the run, does not fit the model, or was trained on other data or
        another vocabulary; or what the section `start` asks for is not there.
    """
    newest = checkpoints.good()
    peers.compare({"checkpoint": {"newest step on disk": newest}})
    if newest is None:
        return _begin(job, allow_data_change=allow_data_change)
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
    notes = [f"going on with other data: {changes}"] * bool(changes) + version_changes(found)
    return basis.restored(checkpoints, newest, job.abstract, job.origin), memory, tuple(notes)


def _begin(job: Job, *, allow_data_change: bool) -> tuple[TrainState, Memory, tuple[str, ...]]:
    """The state of a run that has no checkpoint of its own."""
    if job.origin.workdir is None:
        return jax.block_until_ready(job.fresh()), Memory(), ()  # where it does not fit, that is said here
    entry = warm.find(job.origin)
    # Other data are what a new run is for; but what was learnt of one vocabulary says nothing of another.
    changes = data_changes(job, entry.meta, VOCABULARY)
    if changes and not allow_data_change:
        raise UserError(
            f"start.workdir: {entry} was trained with another vocabulary: {changes}. "
            "Use its tokenizer, or start from it all the same with --allow_data_change."
        )
    begun = warm.begin(job.origin, entry, job.fresh, job.abstract, guard.init_of(job.tx, job.guard).init)
    notes = [f"going on with another vocabulary: {changes}"] * bool(changes) + version_changes(entry.meta)
    base = basis.described(job.origin, begun.state.extra)
    return begun.state, Memory(origin=begun.origin, base=base), (*begun.notes, *notes)


def version_changes(found: Mapping[str, Any]) -> list[str]:
    """A line for the log where versions of libraries are not those of a checkpoint: its numbers may differ a little.

    Args:
      found: the meta of the checkpoint.
    """
    old, now = found.get("versions", {}), versions()
    # A directory of Hugging Face says nothing of what made it.
    differ = [name for name in {**old, **now} if old and old.get(name) != now.get(name)]
    said = "; ".join(f"{name} was {old.get(name, 'not there')}, is {now.get(name, 'not there')}" for name in differ)
    return [f"warning: other versions than those that the checkpoint was saved with: {said}"] if differ else []


def data_changes(job: Job, found: Mapping[str, Any], fields: Sequence[str] = ()) -> str:
    """How the data of a job differ from those of a checkpoint, in words; "" where they are the same.

    Args:
      job: of the config.
      found: the meta of the checkpoint.
      fields: of `Job.identity` to compare; () compares all that the checkpoint knows of.
    """
    old, now = found.get("data", {}), job.identity
    # What older versions did not write down is not a change; but nothing at all would be.
    differ = [name for name in fields or now if old.get(name) != now[name] and (name in old or not old)]
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
    steps = workdir / "checkpoints"
    if allowed or not file.exists() or not (steps.is_dir() and any(f.name.isdecimal() for f in steps.iterdir())):
        return
    try:
        old = dict(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({type(error).__name__}: {error}), so no one can tell whether the config is the "
            "same. Bring it back, or resume all the same with --allow_config_change, which writes it anew."
        ) from error
    now = {key: storable(value) for key, value, _ in rows}
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
    """Write the config beside the checkpoints, with versions; whole or not at all, and not where it stands there."""
    _write(workdir / "config.json", json.dumps({"config": storable(resolved), "versions": versions()}, indent=1) + "\n")


def write_tokenizer(workdir: Path, made: Tokenizer | None) -> None:
    """Write the tokenizer there, too, so that who generates needs no data; not one that is of a user's own making."""
    if isinstance(made, tokenizer.OURS):
        _write(workdir / tokenizer.FILE, tokenizer.dump(made))


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_bytes() != text.encode():
        storage.write(file, text.encode())
