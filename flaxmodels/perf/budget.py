"""The budget of a config: what its compiled step takes on some devices, kept in a file under version control.

Read `measure`. What a later step takes is held against it by `over_budget.compare`.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxmodels import loop, meshes, registry, sections
from flaxmodels.job import Job, assemble
from flaxmodels.paths import path_of
from flaxmodels.perf import cache, collectives, compiled, count
from flaxmodels.registry import UserError
from flaxmodels.runtime import compile_cache, compiles

# Packages whose versions decide on what is compiled.
COMPILER = ("jax", "jaxlib", "flax", "optax")
OF_PLATFORM = {"cpu": (), "tpu": ("libtpu",)}
OF_GPU = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Not of these flags: how many devices are simulated is no matter of the compiler.
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")
# Parameters that are listed one by one; of more, layers are taken together.
LISTED = 64
FORWARD, BACKWARD = "forward", "backward"


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one step that are alike.

    Attributes:
      kind: see `collectives.Collective`.
      axes: of the mesh that they run along; () where the program does not tell.
      part: "forward" or "backward" pass; "" where it is neither, or the program does not tell.
      bytes: of one device, each time, as `collectives.Collective.bytes` counts them.
      count: runs in a step.
      of: the first one's place in the model, such as "blocks/mlp/up"; "" where the program does not tell.
    """

    kind: str
    axes: tuple[str, ...]
    part: str
    bytes: int
    count: int
    of: str = ""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a step takes on some devices.

    Attributes:
      devices: the mesh, in words.
      compiler: versions and flags; of what is compiled for a CPU, its instructions too.
      flops: of one step, over all devices: matrix products and convolutions, by dtype; those of remat too.
      bytes: to and from memory in one step, over all devices, by `count`'s model.
      memory: bytes of one device by class, as `memory.Memory` has them.
      collectives: of one step; None where the program can't be read.
      splits: parameter -> the axes that its dimensions are split over. Where more than `LISTED` are split, numbers in
        paths are "*".
      compiles: programs that a short run compiles; None where it can't run, for want of the devices.
      seal: SHA-256 of all of this and the program as it was lowered.
    """

    devices: str
    compiler: dict[str, str]
    flops: dict[str, float]
    bytes: float
    memory: dict[str, int]
    collectives: tuple[Sent, ...] | None
    splits: dict[str, str]
    compiles: int | None
    seal: str = ""

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; `of_json` reads it."""
        return dataclasses.asdict(self)


def of_json(found: Mapping[str, Any]) -> Budget:
    """What `Budget.to_json` wrote, read back from JSON.

    Raises:
      TypeError: it is not that.
      KeyError: something is missing.
    """
    sent = found["collectives"]
    rows = None if sent is None else tuple(Sent(**{**row, "axes": tuple(row["axes"])}) for row in sent)
    return Budget(**{**found, "collectives": rows})


def measure(
    config: Mapping[str, Any], devices: Sequence[jax.Device], kept: Budget | None = None
) -> tuple[Budget, bool]:
    """What the step of a config takes on some devices.

    Args:
      config: of a run.
      devices: of one kind; they need not be there. On CPUs that are, a run of a few steps counts what it compiles.
      kept: an earlier budget. Where the program and its compiler are those of then, so are the figures, and nothing is
        compiled. (A run is made all the same: the loop around the program may have changed.)

    Returns:
      (what it takes, whether it was compiled).

    Raises:
      UserError: the config is wrong, or does not fit on these devices.
    """
    job = assemble(config, devices)
    lowered, _ = job.lower_train()
    text, compiler = lowered.as_text(), _compiler(devices)
    ran = _run(config, devices) if job.mesh.devices.flat[0].client.local_devices() else None
    if kept is not None and kept.compiler == compiler and kept.seal == _seal(kept, text):
        return dataclasses.replace(kept, compiles=ran), False
    program, _ = compiled.compile_program(lowered, job.mesh)
    report, step = compiled.report(program, job), count.of_job(job)
    found = Budget(
        devices=meshes.describe(job.mesh, job.config["mesh"].get("num_slices")),
        compiler=compiler,
        flops={dtype: round(number) for dtype, number in sorted(step.hardware.flops.items())},
        bytes=round(step.hardware.bytes),
        memory={k: v for k, v in dataclasses.asdict(report.memory).items() if k != "limit"},
        collectives=_sent(program, job),
        splits=_splits(job),
        compiles=ran,
    )
    return dataclasses.replace(found, seal=_seal(found, text)), True


def _seal(found: Budget, text: str) -> str:
    """Of a program, its figures, and how they are found: where one was changed, by hand too, it is measured again."""
    figures = json.dumps(dataclasses.replace(found, seal="", compiles=None).to_json(), sort_keys=True)
    ours = cache.sources(*cache.READERS, *(f"perf/{name}.py" for name in ("budget", "count", "jaxprs", "traffic")))
    return hashlib.sha256(f"{text}\0{figures}\0{ours}".encode()).hexdigest()


def _compiler(devices: Sequence[jax.Device]) -> dict[str, str]:
    """Versions and flags that a program follows from."""
    names = (*COMPILER, *OF_PLATFORM.get(devices[0].platform, OF_GPU))
    there = {name: version for name in names if (version := _version(name))}
    flags = {name: _DEVICES.sub("", os.environ.get(name, "")).strip() for name in FLAGS}
    found = {**there, **{name: value for name, value in flags.items() if value}}
    return found | ({"instructions": compile_cache.instructions()} if devices[0].platform == "cpu" else {})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sent(program: jax.stages.Compiled, job: Job) -> tuple[Sent, ...] | None:
    try:
        found, _ = collectives.collectives(program.as_text() or "")
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, KeyError, IndexError):
        return None
    total: dict[tuple[str, tuple[str, ...], str, int], tuple[int, str]] = {}
    for one in found:
        axes, _ = compiled.along(one.groups, job.mesh)
        if one.groups and not axes:  # each device by itself: nothing is sent
            continue
        key = (one.kind, axes, part_of(one.op), one.bytes)
        number, of = total.get(key, (0, place_of(one.op)))
        total[key] = (number + one.count, of)
    rows = [Sent(*key, *value) for key, value in total.items()]
    return tuple(sorted(rows, key=lambda row: (-row.bytes * row.count, dataclasses.astuple(row))))


def part_of(op: str) -> str:
    """The pass that an operation is of, by the transformations that its name passed through."""
    return BACKWARD if "transpose(" in op else FORWARD if "jvp(" in op else ""


def place_of(op: str) -> str:
    """Where in the model an operation is: "blocks/mlp/up" of "jit(step)/jvp(Net)/while/body/blocks/mlp/up/dot"."""
    first, *_ = re.split(r"\(?(?<=[/(])\w+[\w/]*:", op, maxsplit=1)  # several operations in one: (a:b:c)
    parts = [part for part in first.split("/") if part and not re.search(r"[()]", part)]
    names = [part for part in parts if part not in ("while", "body", "cond", "closed_call", "checkpoint", "remat")]
    return "/".join(names if first != op else names[:-1])


def _splits(job: Job) -> dict[str, str]:
    found = dict[str, str]()
    for keys, x in jax.tree.leaves_with_path(job.abstract.params):
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in x.sharding.spec]
        axes = [[axis for axis in entry if axis and job.mesh.shape[axis] > 1] for entry in entries]
        if any(axes):
            found[path_of(keys)] = ", ".join("+".join(entry) or "-" for entry in axes)
    if len(found) <= LISTED:
        return found
    alike: dict[str, set[str]] = {}
    for path, text in found.items():
        alike.setdefault(re.sub(r"\d+", "*", path), set()).add(text)
    return {path: " or ".join(sorted(texts)) for path, texts in alike.items()}


def _run(config: Mapping[str, Any], devices: Sequence[jax.Device]) -> int:
    """Programs that a run of two dispatches compiles, one of them of a single step, with an evaluation at the end."""
    plain = registry.plain(config)
    train = {key: value for key, value in plain.get("train", {}).items() if key not in ("eval_every", "patience")}
    options = plain.get("optim", {})
    asked = registry.parameters(sections.SECTIONS["optim"].functions(options))
    lasting = {key for key in options if "duration" in getattr(asked[key].annotation, "__metadata__", ())}
    short = {
        **plain,
        "train": {**train, "duration": train.get("steps_per_dispatch", 1) + 1, "log_every": 1},
        "optim": {**options, **dict.fromkeys(lasting, 1)},  # such as a warm-up, which would be longer than the run
    }
    jax.clear_caches()  # what this process has compiled before would not be counted
    with tempfile.TemporaryDirectory(prefix="flaxmodels_budget_") as workdir, compiles.heard() as found:
        loop.fit(short, workdir, devices=devices, stream=io.StringIO())
    return len(found)


# Files


@dataclasses.dataclass(frozen=True)
class File:
    """A file of budgets.

    Attributes:
      config: the config file, as it was given.
      overrides: what of it was set on the command line: key -> text.
      budgets: by the name of the devices.
    """

    config: str
    overrides: dict[str, str]
    budgets: dict[str, Budget]


def read(path: Path) -> File:
    """Raises UserError: there is no such file, or it is none of `write`."""
    try:
        found = json.loads(path.read_text())
        budgets = {name: of_json(one) for name, one in found["budgets"].items()}
        return File(found["config"], dict(found["overrides"]), budgets)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. `flaxmodels budget write --config=FILE` writes one.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no file of budgets ({type(error).__name__}: {error}): take it from version control, or remove "
            "it and write it again with `flaxmodels budget write --config=FILE`."
        ) from error


def write(path: Path, file: File) -> None:
    """Write a file of budgets, the same for the same figures."""
    budgets = {name: file.budgets[name].to_json() for name in sorted(file.budgets)}
    found = {"config": file.config, "overrides": file.overrides, "budgets": budgets}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    rows = re.sub(r'\{\s+"kind"[^{}]*\}', lambda row: " ".join(row[0].split()), text)  # a line each, for diffs
    path.write_text(rows + "\n")
