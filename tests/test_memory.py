"""Where memory does not suffice: what takes it, and what would take less, in place of XLA's number."""

import re
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec

from flaxmodels import activations, memory
from flaxmodels.job import assemble
from flaxmodels.memory import DoesNotFitError, OutOfMemoryError
from flaxmodels.runtime import exits

MUCH = 2**46  # numbers of 4 bytes: more than any address space


@pytest.fixture(scope="module")
def job():
    return assemble(small.config("mlp", mesh=dict(fsdp=8)))


def test_an_allocation_that_fails_on_a_device_is_explained(job):
    with pytest.raises(OutOfMemoryError) as caught, memory.explained(job):
        jax.block_until_ready(jnp.zeros((MUCH,)))
    first, sizes, largest, advice = str(caught.value).splitlines()
    assert first == "out of memory on 8 x cpu: fsdp=8: no 256.0 TiB more could be had."
    held = memory.on_a_device(job.abstract.params)
    assert f"parameters {memory.human_bytes(held)}, optimizer state " in sizes and ", batch " in sizes
    assert "temporaries" not in sizes  # the step was never compiled
    assert largest.startswith(
        "Its largest activations, kept for the backward pass, over all devices: 2 x float32[16,64] "
    )
    assert caught.value.room > memory.on_a_device(job.abstract)
    for key in ("data.batch_size", "train.microbatches=N", "model.remat", "loss.chunks", "mesh.fsdp"):
        assert key in advice
    assert exits.code_of(caught.value) == exits.FAULT and "RESOURCE_EXHAUSTED" in str(caught.value.__cause__)


def test_a_program_that_fails_as_it_runs_is_explained_with_its_temporaries(job):
    """The error comes when its result is waited for, as in the loop; not when it is called."""
    large = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)).lower(jnp.ones(2**21)).compile()
    step = jax.jit(lambda x: jnp.sort(x @ x, axis=0).sum()).lower(jnp.ones((512, 512))).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    with pytest.raises(OutOfMemoryError) as caught, memory.explained(job) as programs:
        programs.append(step)
        jax.block_until_ready(large(jnp.ones(2**21)))
    assert "no 16.0 TiB more" in str(caught.value)
    assert temporary and f"activations and other temporaries {memory.human_bytes(temporary)}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "array", "count"),
    [
        (small.config("mlp", train=dict(microbatches=2)), "float32[8,64] of MLP", 2),
        pytest.param(
            small.config("cnn"), "float32[16,8,8,8] of CNN/CNN._convolution/norm_0", 2, marks=pytest.mark.slow
        ),
        pytest.param(  # of both layers, which are scanned
            small.config("transformer"), "float32[2,16,64,128] of blocks/mlp", 6, marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_kept_for_the_backward_pass(config, array, count):
    found = activations.kept(assemble(config))
    shape = array.partition("[")[2].partition("]")[0].split(",")
    assert found[0] == (array, 4 * np.prod([int(size) for size in shape]), count)
    assert found == sorted(found, key=lambda row: (-row[1] * row[2], row[0]))


@pytest.mark.slow
def test_remat_keeps_the_inputs_of_blocks_and_no_more():
    """A block's own activations are computed again; without, they are most of all."""
    config = small.config("transformer")
    total = {}
    for remat in ("none", "dots", "nothing"):
        found = activations.kept(assemble({**config, "model": {**config["model"], "remat": remat}}))
        total[remat] = sum(size * count for name, size, count in found if "[2,16,64," in name)  # of each layer
    assert total["none"] > 2 * total["dots"] > 2 * total["nothing"] == 2 * (2 * 16 * 64 * 32 * 4)


def test_the_room_of_a_host_is_what_it_may_still_have(job, monkeypatch):
    """The least of the machine's free memory and the process's own limit; what arrays hold already comes on top."""
    free = memory._free()
    assert 0 < free <= 1024 * int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (pages + 2**20, pages + 2**20))
    assert memory._free() < 2**21 < free
    monkeypatch.setattr(memory, "_free", lambda: 8_000_000)
    before = memory._room(job.mesh)
    held = jax.device_put(np.zeros(8000, np.float32), NamedSharding(job.mesh, PartitionSpec("fsdp")))
    assert memory._room(job.mesh) - before == held.nbytes // 8
    assert before >= memory.SAFE * 1_000_000  # of eight devices that share it


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM Debugging.", "4.4 GiB"),
        ("Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0", "176.0 MiB"),
        ("Error allocating device buffer: Attempting to allocate 15.65G. That was not possible.", "15.6 GiB"),
        ("Error loading program: Attempting to allocate 15.65 G. There are 11.08G free.; (0x0x0_HBM0)", "15.6 GiB"),
        ("Out of memory allocating 512 bytes.", "512 B"),
        ("somehow", None),
    ],
)
def test_what_gpus_and_tpus_say(job, said, size):
    with pytest.raises(OutOfMemoryError) as caught, memory.explained(job):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    first = str(caught.value).splitlines()[0]
    assert f"no {size} more could be had" in first if size else "RESOURCE_EXHAUSTED: somehow" in first


def test_a_program_that_a_compiler_refuses_is_bad_input(job):
    """The same config can never fit: no supervisor should start it again."""
    with (
        pytest.raises(DoesNotFitError, match=r"it needs 20.5 GiB on each, which has 15.8 GiB") as caught,
        memory.explained(job),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU ... hbm. Used 20.50G of 15.75G hbm. Exceeded")
    assert "Its largest activations" in str(caught.value) and "parameters " in str(caught.value)
    assert exits.code_of(caught.value) == exits.BAD_INPUT and "train.microbatches" in str(caught.value)


def test_a_compiler_may_count_temporaries_alone(job):
    said = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (16.33G) exceeds available HBM (15.75G)."
    error = memory.too_large(said, job.mesh)
    assert "it needs 16.3 GiB on each for temporaries alone, which has 15.8 GiB" in str(error)
    assert error.needed == int(16.33 * 2**30) and memory.ADVICE in str(error)


def test_memory_of_the_host_is_explained(job):
    with (
        pytest.raises(
            OutOfMemoryError, match=r"this host has no memory left: Unable to allocate 8.00 PiB.*\n.*data\.workers"
        ),
        memory.explained(job),
    ):
        np.zeros(2**50)
    with (
        pytest.raises(OutOfMemoryError, match=r"this host has no memory left: an allocation failed."),
        memory.explained(job),
    ):
        raise MemoryError


def test_other_errors_pass(job):
    for error in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, memory.explained(job):
            raise error
        assert caught.value is error
    with memory.explained(job) as programs:
        assert programs == []
