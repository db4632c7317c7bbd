"""What held a run up: the sentence at its end names the largest loss, and a key that there is."""

import dataclasses
import inspect
import re

import jax
import pytest
import small

from flaxmodels import bottleneck, job, sections
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.runtime.windows import Spent


def assembled(**options):
    config = small.config("mlp", train=dict(duration=1000, eval_every=100), checkpoint=dict(every=50))
    for name, values in options.items():
        config[name] = {**config.get(name, {}), **values}
    return job.assemble(config, jax.devices()[:1])


@pytest.fixture(scope="module")
def host():
    """A job whose rows are gathered by the host."""
    return assembled(data=dict(placement="host"))


@pytest.mark.parametrize(
    ("spent", "said"),
    [
        (Spent(data=40, device=60, busy=62), "input-bound: the device waits 38% of the time; try "
         "data.placement='device'"),
        (Spent(transfer=40, device=60, busy=62), "transfer-bound: the device waits 38% of the time while batches are "
         "sent to it; try data.placement='device'"),
        (Spent(dispatch=20, host=30, device=50, busy=70), "host-bound: the device waits 30% of the time between "
         "dispatches; try train.steps_per_dispatch=8 (not with convolutions, whose loops XLA makes slow on CPUs)"),
        (Spent(device=50, busy=49, evaluation=50), "evaluations take 50% of the time; try train.eval_every=400, or "
         "data.eval_batch_size=64"),
        (Spent(device=50, busy=49, checkpoint=50), "saves take 50% of the time; try checkpoint.every=200"),
        (Spent(device=96, data=4, busy=97), "compute-bound: the device works 97% of the time; see on what with "
         "--profile=100:10"),
        (Spent(data=60, device=40, busy=99), "compute-bound: the device works 99% of the time; see on what with "
         "--profile=100:10"),  # it waits for data while the device works
        (Spent(device=1), "compute-bound: the device works 100% of the time; see on what with --profile=100:10"),
    ],
)  # fmt: skip
def test_the_largest_loss_is_named(host, spent, said):
    assert bottleneck.sentence(host, spent) == said


def test_every_key_that_it_tries_exists(host):
    known = {f"{section}.{key}" for section, taker in TAKERS.items() for key in inspect.signature(taker).parameters}
    device = assembled(checkpoint=dict(every=0))
    kinds = [Spent(device=1, busy=1), *(Spent(**{part: 99, "device": 1}, busy=1) for part in LOSSES)]
    for built in (host, device, dataclasses.replace(device, checkpoint={"keep_best": 0})):
        for spent in kinds:
            tried = re.findall(r"[a-z]+\.[a-z_]+", bottleneck.sentence(built, spent))
            assert set(tried) <= known, tried


LOSSES = ("data", "transfer", "host", "evaluation", "checkpoint")
TAKERS = {"train": sections.Cadence, "data": sections.batching, "checkpoint": Checkpoints}


def test_what_reads_too_slowly_gets_more_workers():
    augmented = assembled(data=dict(host_augment=({"name": "flip"},)))
    slow = Spent(data=99, device=1, busy=1)
    assert bottleneck.sentence(augmented, slow).endswith("try data.workers=2")


def test_lines_hold_all_parts(host):
    parts, said = bottleneck.lines(host, Spent(data=1, device=3, busy=3), 0.25)
    assert parts.startswith("time: device 75.0%, data 25.0%, ") and parts.endswith(
        "of 4.0 s; and 0.25 s for the first batch"
    )
    assert said.startswith("input-bound: the device waits 25%")
