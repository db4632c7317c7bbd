"""One process of a rehearsal; `rehearse` starts several, with the flags of this module beside those of training.

Of the user's config it changes only how long the run is, when it saves and logs, and the size of evaluation batches;
all else is what `fit` and the processes of a real run do.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmodels import basis, config, evaluating, loop, registry, sharding, step
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.job import assemble
from flaxmodels.runtime import distributed, exits
from flaxmodels.verify import tracing
from flaxmodels.verify.crew import Reports

# What a process goes through, in this order; `rehearse` says which of it.
PHASES = ("start", "batches", "train", "checkpoint", "evaluation", "restore", "resume")


def parser() -> argparse.ArgumentParser:
    """The flags of a process: those of training, and what it is to do."""
    flags = config.train_parser("rehearse")
    flags.add_argument("--reports", type=Path, required=True)
    flags.add_argument("--phases", required=True)
    flags.add_argument("--steps", type=int, required=True)
    flags.add_argument("--copy", type=Path, required=True, help="of the workdir, to resume in")
    return flags


def main(argv: Sequence[str]) -> int:
    """Go through the phases that are asked for."""
    flags = config.parse(parser(), argv)
    asked, reports = flags.arguments, Reports(flags.arguments.reports)
    with contextlib.ExitStack() as stack:
        with reports.phase("start") as found:
            stack.enter_context(distributed.joined(asked))
            found["devices"] = jax.device_count(), jax.local_device_count()
        part = Part(registry.plain(flags.config), flags.workdir, asked.copy, asked.steps)
        acts: Mapping[str, Callable[[], dict[str, Any]]] = {
            name: getattr(part, name) for name in PHASES if name != "start"
        }
        for name in asked.phases.split(","):
            with reports.phase(name) as found:
                found |= acts[name]()
    return exits.DONE


class Part:
    """The phases of a process. Each returns what it found, ready for JSON.

    Args:
      written: the user's config.
      workdir: that is trained in.
      copy: to resume in.
      steps: of the whole run; it saves in the middle and at the end.
    """

    def __init__(self, written: Mapping[str, Any], workdir: Path, copy: Path, steps: int) -> None:
        self.workdir, self.copy, self.steps = workdir, copy, steps
        config, count = shortened(written, steps), jax.device_count()
        if count == 1:
            config.pop("mesh", None)
        job = assemble(config)
        # Its last batch must be padded, or nothing would show that the padding does not count; on one device there is
        # another number of padded rows than on all.
        asked = max(job.test.batch_size - (count == 1), 1)
        size = uneven(job.test.split.size, asked, count)
        config["data"]["eval_batch_size"] = size
        self.config, self.job = config, assemble(config)

    def batches(self) -> dict[str, Any]:
        """Digests of the rows of each batch that are on this process's devices, by their place in the global batch."""
        job, steps = self.job, []
        where = sharding.batch_sharding(job.mesh)
        program = step.compile_step(
            job.train.batch, *job.train.abstract(), mesh=job.mesh, out_shardings=where
        ).compile()
        for number in range(self.steps):
            rows: dict[int, list[str]] = {}
            for array in jax.tree.leaves(program(*job.train.train_at(job.seed, number))):
                held = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
                for start, values in held.items():
                    for place, row in enumerate(values, start):
                        rows.setdefault(place, []).append(tracing.digests(row)[""])
            steps.append({place: "".join(digests) for place, digests in rows.items()})
        return {"rows": steps, "batch_size": job.train.batch_size}

    def train(self) -> dict[str, Any]:
        """The whole run, in the shared workdir."""
        outcome = loop.fit(self.config, self.workdir)
        return {"step": outcome.step, "params": self._digests(outcome.state.params), "losses": losses(self.workdir)}

    def checkpoint(self) -> dict[str, Any]:
        """The steps on disk, and how many processes wrote the last one."""
        steps = sorted(int(file.name) for file in (self.workdir / "checkpoints").iterdir() if file.name.isdecimal())
        last = self.workdir / "checkpoints" / str(self.steps)
        return {"steps": steps, "writers": len({file.name for file in last.glob("*/ocdbt.process_*")})}

    def evaluation(self) -> dict[str, Any]:
        """The last checkpoint, on the whole evaluation split."""
        _, found, count = evaluating.evaluate_checkpoint(self.job, self.workdir, str(self.steps))
        return {"metrics": found, "count": count, "size": self.job.test.split.size, "batch": self.job.test.batch_size}

    def restore(self) -> dict[str, Any]:
        """The parameters of the last checkpoint, on this mesh."""
        with contextlib.closing(Checkpoints(self.workdir / "checkpoints", read_only=True)) as checkpoints:
            state = basis.restored(checkpoints, self.steps, self.job.abstract, self.job.origin)
            return {"params": self._digests(state.params)}

    def resume(self) -> dict[str, Any]:
        """The second half of the run again, from the checkpoint in its middle, in a copy of the workdir."""
        outcome = loop.fit(self.config, self.copy)
        return {"step": outcome.step, "losses": losses(self.copy)}

    def _digests(self, params: Any) -> dict[str, str]:
        """Of whole parameters, wherever they lie."""
        where = sharding.replicated(self.job.mesh)
        whole = step.compile_step(lambda x: x, self.job.abstract.params, mesh=self.job.mesh, out_shardings=where)
        return tracing.digests(whole.compile()(params))


def shortened(written: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The config of a run of `steps` steps, which logs each of them and saves in the middle and at the end."""
    config = tracing.in_float32(written)
    train = {"duration": steps, "log_every": 1, "eval_every": 0, "patience": 0}
    config["train"] = {**config.get("train", {}), **train}
    config["checkpoint"] = {"every": steps // 2, "every_seconds": 0.0, "keep": 4, "keep_best": 0}
    if "warmup" in config.get("optim", {}):
        config["optim"]["warmup"] = 0  # it would be longer than the run
    config["data"].pop("workers", None)
    return config


def uneven(examples: int, batch_size: int, devices: int) -> int:
    """An evaluation batch size that devices divide, near the config's, whose last batch is not full if one can be."""
    sizes = [batch_size, *range(batch_size // devices * devices, 0, -devices), devices]
    return next((size for size in sizes if examples % size), sizes[0])


def losses(workdir: Path) -> dict[int, float]:
    """Step -> training loss, from the log of a workdir."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: float(line["train/loss"]) for line in lines if "train/loss" in line}  # "NaN" is text there


if __name__ == "__main__":
    sys.exit(exits.reported(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
