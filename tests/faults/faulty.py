"""A run whose batches two worker processes make, one of which fails once, where and how the environment says.

FAULT: "raise", "exit0", "exit1", "SIGKILL", "SIGSTOP", "hang", "allocate" (more than there can be) or "eat" (all that
there is); FAULT_STEP: the step whose rows are made then; FAULT_ONCE: a file that does not exist until it has happened.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np


def example(example, rng):
    """An augmentation; its generator was made from (seed, step, example)."""
    fault, once = os.environ.get("FAULT"), Path(os.environ.get("FAULT_ONCE", os.devnull))
    step = int(rng.bit_generator.state["state"]["key"][1]) >> 32
    if fault and step == int(os.environ["FAULT_STEP"]) and not once.exists():
        once.touch()
        _fail(fault)
    image = example["image"]
    return {**example, "image": np.where(rng.random(image.shape) < 0.1, 0, image).astype(image.dtype)}


def _fail(fault):
    if fault == "raise":
        raise RuntimeError("a fault of its own")
    if fault.startswith("exit"):
        os._exit(int(fault[-1]))
    if fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
    if fault == "allocate":
        np.zeros(2**50)
    eaten = []
    while True:
        if fault == "eat":
            eaten.append(np.ones(2**23))
        else:
            time.sleep(1e6)


def get_config():
    return dict(
        model=dict(name="mlp", hidden=(16,), dropout=0.1),
        data=dict(
            name="synthetic_images", examples=320, test_examples=32, batch_size=16, workers=2, threads=1, timeout=5.0,
            host_augment=(dict(name="faults.faulty:example"),),
        ),
        optim=dict(name="adam", learning_rate=3e-3),
        train=dict(duration="3 epochs", log_every=1, eval_every=9),
        checkpoint=dict(every=4, every_seconds=0.0),
    )  # fmt: skip
