"""What held a run up, in one sentence, with the key of the config that would change it."""

import math

import jax.numpy as jnp

from flaxmodels.data.feed import resident_limit
from flaxmodels.job import Job
from flaxmodels.runtime.windows import PARTS, Spent

# Share of the time from which on a loss is worth a sentence.
MATTERS = 0.1


def lines(job: Job, spent: Spent, first: float) -> list[str]:
    """Lines for the log at the end of a run: where its time went, and what held it up.

    Args:
      job: that was trained.
      spent: of the whole run.
      first: seconds until the first batch was there.
    """
    parts = sorted(PARTS, key=lambda part: -getattr(spent, part))
    shares = ", ".join(f"{part} {getattr(spent, part) / max(spent.total, 1e-9):.1%}" for part in parts)
    return [f"time: {shares}, of {spent.total:.1f} s; and {first:.2f} s for the first batch", sentence(job, spent)]


def sentence(job: Job, spent: Spent) -> str:
    """What held a run up most: what it lost to evaluations, to saves, or by letting the devices wait for data,
    transfers or the host; "compute-bound" where nothing of that took a tenth of its time.

    Args:
      job: that was trained.
      spent: of the whole run.
    """
    total = max(spent.total, 1e-9)
    idle = 0.0 if math.isnan(spent.idle) else spent.idle
    host = spent.dispatch + spent.host
    waits = {"data": spent.data, "transfer": spent.transfer, "host": host}
    # The devices may have something to do for a part of each wait: what they lack is shared out alike.
    share = idle * spent.training / total / max(sum(waits.values()), 1e-9)
    lost = {cause: seconds * share for cause, seconds in waits.items()}
    lost |= {"evaluation": spent.evaluation / total, "checkpoint": spent.checkpoint / total}
    cause = max(lost, key=lambda name: lost[name])
    waiting = f"the device waits {idle:.0%} of the time"
    if lost[cause] < MATTERS:
        return f"compute-bound: the device works {1 - idle:.0%} of the time; {_compute(job)}"
    return {
        "data": f"input-bound: {waiting}; try {_input(job)}",
        "transfer": f"transfer-bound: {waiting} while batches are sent to it; try {_transfer(job)}",
        "host": f"host-bound: {waiting} between dispatches; {_host(job)}",
        "evaluation": f"evaluations take {lost['evaluation']:.0%} of the time; try {_evaluation(job)}",
        "checkpoint": f"saves take {lost['checkpoint']:.0%} of the time; try {_checkpoint(job)}",
    }[cause]


def _input(job: Job) -> str:
    """What makes batches come faster, the surest first."""
    feed, loading = job.train, job.train.loading
    rows = feed.split.nbytes + job.test.split.nbytes
    if feed.resident:
        return "a larger train.steps_per_dispatch"
    if feed.functions or loading.workers:
        return f"data.workers={2 * loading.workers or 2}"
    if rows <= resident_limit(job.mesh):
        return "data.placement='device'"
    more = f"data.prefetch={2 * loading.ahead}"
    return (
        f"{more}, then data.threads={2 * loading.threads}" if feed.streams else more
    )  # rows in memory take one thread


def _transfer(job: Job) -> str:
    feed = job.train
    fits = not feed.functions and feed.split.nbytes + job.test.split.nbytes <= resident_limit(job.mesh)
    return "data.placement='device'" if fits else f"data.prefetch={2 * feed.loading.ahead}"


def _host(job: Job) -> str:
    """Several steps a dispatch."""
    but = " (not with convolutions, whose loops XLA makes slow on CPUs)" * (job.mesh.devices.flat[0].platform == "cpu")
    return f"try train.steps_per_dispatch={max(8 * job.cadence.steps_per_dispatch, 8)}{but}"


def _compute(job: Job) -> str:
    """What a faster step would need."""
    first = f"see on what with --profile={min(100, job.total_steps // 2)}:10"
    platform = job.mesh.devices.flat[0].platform
    if platform != "cpu" and jnp.dtype(job.policy.compute) == jnp.float32:
        return f"try precision.compute=bfloat16, and {first}"
    return first


def _evaluation(job: Job) -> str:
    every, size = job.cadence.eval_every, job.test.batch_size
    larger = f"data.eval_batch_size={4 * size}"
    return f"train.eval_every={4 * every}, or {larger}" if 0 < 4 * every < job.total_steps else larger


def _checkpoint(job: Job) -> str:
    """Fewer of those saves that come most often, by what is known before."""
    every, evaluations, options = job.checkpoint.get("every", 0), job.cadence.eval_every, job.checkpoint
    if every and (not evaluations or every <= evaluations):
        return f"checkpoint.every={4 * every}"
    if evaluations and options.get("keep_best", 1):  # each evaluation that is better than all before is saved
        rarer = f"train.eval_every={4 * evaluations}, or " if 4 * evaluations < job.total_steps else ""
        return f"{rarer}checkpoint.keep_best=0"
    return "a larger checkpoint.every_seconds"
