"""The mesh changes nothing: one device and eight, split any way, start from the same bits and train alike."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
import small

from flaxmodels import sharding, step
from flaxmodels.job import assemble
from flaxmodels.registry import UserError

MESHES = {
    "fsdp 8": dict(fsdp=8),
    "data 4 x fsdp 2, in 2 slices": dict(data=4, fsdp=2, num_slices=2),
    "fsdp 4 x tensor 2": dict(fsdp=4, tensor=2),
    "fsdp 2 x sequence 4": dict(fsdp=2, sequence=4),
}
MICROBATCHES = {"cnn": 4, "transformer": 1}
# Relative, of the loss and the norm of the gradient at each of 20 steps. Float32 adds up in another order, which gives
# up to 1e-6; a gradient that is wrong in one parameter, 1e-2.
TOLERANCE = 2e-5


@functools.cache
def trained(family):
    """(config, job on one device, metrics of its 20 steps)."""
    config = small.config(family, data=dict(batch_size=32), train=dict(microbatches=MICROBATCHES[family]))
    job = assemble(config, devices=jax.devices()[:1])
    _, packed, names = small.train(job)
    return config, job, small.means(packed, names)


def batches(job, steps=3):
    def at(feed, step):
        each = jax.tree.map(lambda x: x[step - feed["first"]], feed["each"])
        return job.train.batch(each, feed["every"])

    feeds = job.train.dispatches(job.seed, [(i, 1) for i in range(steps)], 1)
    return [small.bits(jax.jit(at)(feed, step)) for step, feed in enumerate(feeds)]


# "fsdp 4 x tensor 2" splits parameters as "fsdp 8" does, and more.
CELLS = [
    pytest.param(family, mesh, marks=[pytest.mark.nightly] * (mesh == "fsdp 8"))
    for family in MICROBATCHES
    for mesh in MESHES
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), CELLS)
def test_same_on_any_mesh(family, mesh):
    config, one, expected = trained(family)
    many = assemble({**config, "mesh": MESHES[mesh]})
    assert small.bits(many.fresh().params) == small.bits(one.fresh().params)
    assert batches(many) == batches(one)
    _, packed, names = small.train(many)
    found = small.means(packed, names)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=TOLERANCE, err_msg=name)
    assert expected["loss"][-1] < expected["loss"][0]


class Masked(nn.Module):
    """What is left of ones."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.mark.slow
def test_dropout_masks_are_the_same_on_any_mesh():
    def masks(**axes):
        mesh = sharding.make_mesh(**axes) if axes else sharding.make_mesh(devices=jax.devices()[:1])
        ones = jax.ShapeDtypeStruct((8, 16, 4), np.float32, sharding=sharding.batch_sharding(mesh))
        apply = step.make_apply(Masked())

        def program(x):
            return apply({}, {}, x, train=True, rngs=step.streams(0, 3))[0]

        lowered = step.compile_step(program, ones, mesh=mesh)
        return lowered.compile()(jax.device_put(np.ones(ones.shape, np.float32), ones.sharding))

    expected = np.asarray(masks())
    assert set(np.unique(expected)) == {0, 2}
    for axes in (dict(data=8), dict(fsdp=2, sequence=4), dict(sequence=2, tensor=4)):
        found = masks(**axes)
        assert axes == dict(data=8) or not found.sharding.is_fully_replicated
        np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.slow
def test_activations_are_split_along_their_length():
    """Sequence parallelism is more than parameters that lie elsewhere."""
    job = assemble(small.config("transformer", mesh=dict(fsdp=2, sequence=4)))
    marks = [line for line in job.lower_train()[0].as_text().splitlines() if "sharding_constraint" in line]
    assert sum('"sequence"' in line for line in marks) > len(marks) / 2


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=2, sequence=4), dict(sequence=8)])
def test_fsdp_and_sequence_shard_parameters_and_moments(axes):
    state = assemble(small.config("transformer", mesh=axes)).abstract
    for tree in (state.params, state.opt_state):
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
        assert held < sum(x.size for x in jax.tree.leaves(tree)) / 6  # small parameters stay whole


@pytest.mark.slow
def test_host_and_device_placement_give_the_same_batches():
    host = assemble(small.config("cnn", data=dict(placement="host")))
    device = assemble(small.config("cnn", data=dict(placement="device")))
    assert batches(host) == batches(device)
    a, b = small.train(host, 5), small.train(device, 5)
    np.testing.assert_allclose(b[1], a[1], rtol=1e-5)


@pytest.mark.slow
def test_steps_per_dispatch_change_no_bit():
    """One compiled loop serves all cuts, so where a dispatch ends changes nothing."""
    jobs = [assemble(small.config("mlp", train=dict(steps_per_dispatch=k)), devices=jax.devices()[:1]) for k in (7, 1)]
    several, single = (small.train(job) for job in jobs)
    assert small.bits(several[0].params) == small.bits(single[0].params)
    assert several[1].tobytes() == single[1].tobytes()


def test_what_xla_gets_wrong_is_refused():
    job = assemble(small.config("cnn", mesh=dict(sequence=2, tensor=2)))
    with pytest.raises(UserError, match="sequence=2 x tensor=2: the model has convolutions"):
        job.lower_train()
