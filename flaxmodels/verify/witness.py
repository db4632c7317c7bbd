"""One process of `verify resume`: it trains as `flaxmodels train` does, and writes down every batch it is given.

It changes nothing of the run. What it writes is in its `Reports` before the step is computed, so that a kill does not
take it along: which steps were made, also those that are made again after a kill, and of what.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmodels import config, loop
from flaxmodels.data.feed import Feed
from flaxmodels.job import Job, assemble
from flaxmodels.runtime import distributed, exits
from flaxmodels.verify import tracing
from flaxmodels.verify.crew import Reports


class Witness(Feed):
    """The training feed of a job, and a report of each batch that it gives.

    Args:
      job: whose feed it stands for.
      reports: gets "step N" and the digest of this process's part of its batch.
    """

    def __init__(self, job: Job, reports: Reports) -> None:
        vars(self).update(vars(job.train))
        self._reports, self._program = reports, tracing.batches(job, job.cadence.steps_per_dispatch)

    def dispatches(self, seed: int, stretches: Iterable[tuple[int, int]], most: int) -> Generator[Any]:
        """As `Feed.dispatches`."""
        plan = list(stretches)
        with contextlib.closing(super().dispatches(seed, plan, most)) as feeds:
            for (first, count), feed in zip(plan, feeds, strict=False):
                for number in range(first, first + count):
                    found = digests(self._program(self._number(number), feed))
                    text = " ".join(f"{path} {digest}" for path, (digest, _) in sorted(found.items()))
                    self._reports.say(f"step {number + 1}", batch=hashlib.sha256(text.encode()).hexdigest())
                yield feed


def digests(tree: Any) -> dict[str, tuple[str, float]]:
    """Path -> SHA-256 of shape, dtype and bits, and norm, of what this process's devices hold of each array."""
    found = {}
    for path, x in tracing.leaves(tree).items():
        parts = {str(shard.index): np.asarray(shard.data) for shard in x.addressable_shards}  # replicas once
        digest = hashlib.sha256(f"{x.shape} {x.dtype}".encode())
        squares = 0.0
        for index, part in sorted(parts.items()):
            digest.update(f" {index} ".encode() + part.tobytes())
            squares += float(np.square(part.astype(np.float64)).sum())
        found[path] = digest.hexdigest(), squares**0.5
    return found


def main(argv: Sequence[str]) -> int:
    """Train; returns the exit code of training."""
    parser = config.train_parser("verify resume")
    parser.add_argument("--reports", type=Path, required=True)
    flags = config.parse(parser, argv)
    reports = Reports(flags.arguments.reports)

    loop.assemble = _watched(reports)
    with distributed.joined(flags.arguments), reports.phase("train") as found:
        outcome = loop.fit(flags.config, flags.workdir)
        found["finished"] = outcome.finished
        if outcome.finished:
            found["state"] = digests(outcome.state)
    return outcome.exit_code


def _watched(reports: Reports) -> Any:
    """`assemble`, whose job tells what it is fed."""

    def assembled(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Job:
        job = assemble(config, devices)
        device = job.mesh.devices.flat[0]
        reports.say("assembled", platform=device.platform, flags=os.environ.get("XLA_FLAGS", ""))
        return dataclasses.replace(job, train=Witness(job, reports))

    return assembled


if __name__ == "__main__":
    sys.exit(exits.reported(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
