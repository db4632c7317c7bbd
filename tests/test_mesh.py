"""The mesh changes nothing: one device and eight, split any way, start from the same bits and train alike."""

import jax
import numpy as np
import pytest
import small

from flaxmodels.job import assemble

MESHES = {
    "data 8": dict(data=8),
    "fsdp 8": dict(fsdp=8),
    "data 4 x fsdp 2": dict(data=4, fsdp=2),
    "data 4 x tensor 2": dict(data=4, tensor=2),
}


@pytest.fixture(scope="module", params=["mlp", "cnn", "transformer"])
def single(request):
    job = assemble(small.config(request.param), devices=jax.devices()[:1])
    return request.param, job, *small.train(job)


def batches(job, steps=3):
    def at(feed, step):
        each = jax.tree.map(lambda x: x[step - feed["first"]], feed["each"])
        return job.train.batch(each, feed["every"])

    feeds = job.train.dispatches(job.seed, [(i, 1) for i in range(steps)], 1)
    return [small.bits(jax.jit(at)(feed, step)) for step, feed in enumerate(feeds)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_same_on_any_mesh(single, mesh):
    family, one, _, packed, names = single
    many = assemble(small.config(family, mesh=MESHES[mesh]))
    assert small.bits(many.fresh().params) == small.bits(one.fresh().params)
    assert batches(many) == batches(one)
    _, other, _ = small.train(many)
    a, b = small.means(packed, names), small.means(other, names)
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
    np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    assert a["loss"][-1] < a["loss"][0]


def test_fsdp_shards_parameters_and_moments():
    job = assemble(small.config("transformer", mesh=dict(fsdp=8)))
    state = job.fresh()
    for tree in (state.params, state.opt_state):
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        assert held < whole / 6  # small parameters stay whole


@pytest.mark.slow
def test_host_and_device_placement_give_the_same_batches():
    host = assemble(small.config("cnn", data=dict(placement="host")))
    device = assemble(small.config("cnn", data=dict(placement="device")))
    assert batches(host) == batches(device)
    a, b = small.train(host, 5), small.train(device, 5)
    np.testing.assert_allclose(b[1], a[1], rtol=1e-5)


def test_steps_per_dispatch_change_no_bit():
    """One compiled loop serves all cuts, so where a dispatch ends changes nothing."""
    jobs = [assemble(small.config("mlp", train=dict(steps_per_dispatch=k)), devices=jax.devices()[:1]) for k in (7, 1)]
    several, single = (small.train(job) for job in jobs)
    assert small.bits(several[0].params) == small.bits(single[0].params)
    assert several[1].tobytes() == single[1].tobytes()
