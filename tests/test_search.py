"""The search: which meshes there are, that only what was compiled is ranked, and how large a batch may be."""

import dataclasses
import math

import jax
import pytest
import small

from flaxmodels import sections, sharding
from flaxmodels.job import assemble
from flaxmodels.memory import Memory
from flaxmodels.perf import cells, levers, search
from flaxmodels.perf.cells import Cell, Target
from flaxmodels.perf.chips import CHIPS
from flaxmodels.perf.roofline import Roofline
from flaxmodels.registry import UserError

LIMIT = 1000


pytestmark = pytest.mark.usefixtures("looked_once")


def target(count=8):
    return Target(f"cpu:{count}", jax.devices()[:count], CHIPS["v5e"])


def made(config, devices, changes, peak, seconds, *, activations=0, limit=LIMIT):
    """A cell of a machine that exists on paper: (values, axes) -> bytes at a time, and seconds of a step."""
    config = cells.changed(config, changes)
    values = {key: value for key, value, _ in sections.resolved(config)}
    inner = [values[f"mesh.{axis}"] for axis in ("fsdp", "sequence", "tensor")]
    axes = dict(zip(("fsdp", "sequence", "tensor"), inner))
    axes["data"] = values["mesh.data"] or max(len(devices.devices) // math.prod(inner), 1)
    size = values["data.batch_size"]
    if size % (axes["data"] * axes["fsdp"] * values["train.microbatches"]):
        return Cell(devices.name, dict(changes), refusal="data.batch_size: does not divide")
    most, working = int(peak(values, axes)), int(activations and activations(values, axes))
    memory = Memory(most - working, 0, 0, 0, 0, working, 0, 0, most, limit)
    fits = most <= limit
    line = Roofline(seconds(values, axes), 0, 0, 0, "compute", 0, 0, None) if fits else None
    return Cell(
        devices.name, dict(changes), axes, size, memory, activations=working, fits=fits, over=max(most - limit, 0),
        roofline=line, flops=1.0,
    )  # fmt: skip


class Machine:
    """A measure that counts, and compiles nothing twice."""

    def __init__(self, peak, seconds=lambda values, axes: 1.0, **options):
        self.of, self.options, self.asked = (peak, seconds), options, []

    def __call__(self, config, devices, changes):
        assert changes not in self.asked, "compiled twice"
        self.asked.append(dict(changes))
        return made(config, devices, changes, *self.of, **self.options)


def meshes(config, devices):
    return [layout.axes for layout in levers.layouts(levers.look(config, devices), devices)]


def test_each_mesh_is_one_that_a_job_can_have():
    config = small.config("mlp", data=dict(batch_size=8192))
    seen = levers.look(config, target())
    found = levers.layouts(seen, target())
    assert found[0].axes == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}  # sends least: gradients once
    assert len(found) == len({str(layout.axes) for layout in found}) == 10  # (data, fsdp, tensor), each a power of two
    for layout in (found[0], found[4], found[-1]):
        job = assemble(cells.changed(config, levers.of_layout(seen, layout.axes)), target().devices)
        assert dict(job.mesh.shape) == layout.axes
    whole = {layout.axes["fsdp"]: layout.state for layout in found if layout.axes["tensor"] == 1}
    assert whole[1] > whole[2] > whole[4] > whole[8] > whole[1] / 8  # small parameters stay whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "wrong"),
    [
        (dict(data=dict(batch_size=4)), lambda axes: axes["data"] * axes["fsdp"] > 4),
        (dict(data=dict(batch_size=16), train=dict(microbatches=4)), lambda axes: axes["data"] * axes["fsdp"] > 4),
        (dict(data=dict(eval_batch_size=2)), lambda axes: axes["data"] * axes["fsdp"] > 2),
        (dict(mesh=dict(num_slices=2)), lambda axes: axes["data"] % 2),
        (dict(optim=dict(learning_rate=0.1)), lambda axes: axes["tensor"] > 1),
    ],
)
def test_a_mesh_that_sharding_refuses_is_no_candidate(sections, wrong):
    config = small.config("mlp", **sections)
    if "optim" in sections:  # nothing that tensor divides
        config["model"] = dict(name="mlp", hidden=(63,))
    found = meshes(config, target())
    assert found and not any(wrong(axes) for axes in found)
    for axes in ({"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}):
        if wrong({**axes, "sequence": 1, "tensor": 1}):
            with pytest.raises(UserError):
                assemble({**config, "mesh": {**config.get("mesh", {}), **axes}}, target().devices)


@pytest.mark.slow
def test_sequence_is_split_where_the_model_says_so_and_the_length_divides():
    found = meshes(small.config("transformer"), target(4))
    assert {axes["sequence"] for axes in found} == {1, 2, 4} and {axes["tensor"] for axes in found} == {1, 2}
    odd = meshes(small.config("transformer", data=dict(length=62)), target(4))
    assert {axes["sequence"] for axes in odd} == {1, 2}
    assert {axes["sequence"] for axes in meshes(small.config("cnn"), target(4))} == {1}


def test_the_changes_of_a_mesh_are_as_few_as_will_do():
    axes = {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert levers.of_layout(levers.look(small.config("mlp"), target()), axes) == {"mesh.fsdp": 4}
    given = levers.look(small.config("mlp", mesh=dict(fsdp=4)), target())
    assert levers.of_layout(given, axes) == {}
    assert levers.of_layout(given, {**axes, "data": 8, "fsdp": 1}) == {"mesh.fsdp": 1}
    alone = levers.look(small.config("mlp", mesh="auto"), target())
    assert levers.of_layout(alone, {**axes, "data": 8, "fsdp": 1}) == {"mesh.data": 8}  # else "auto" would choose


def test_the_search_finds_the_mesh_that_is_fastest_and_fits():
    """Two of all; the estimate would have it that data=8 is best."""

    def peak(values, axes):
        return 60_000 / axes["fsdp"] + values["data.batch_size"] * 10 / axes["data"] / axes["fsdp"]

    machine = Machine(peak, lambda values, axes: 1.0 + axes["fsdp"] / 8 + axes["tensor"], limit=20_000)
    told = []
    found = search.search(small.config("mlp"), target(), 12, measure=machine, told=told.append)
    assert len(found) == len(machine.asked) == len(told) == 12
    assert sorted(map(id, told)) == sorted(map(id, found)) and found == sorted(found, key=search.rank)
    own = [cell for cell in found if "data.batch_size" not in cell.changes]
    assert own[0].mesh == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1} and own[0].changes == {"mesh.fsdp": 4}
    assert found[0].fits and not found[-1].fits and found[-1].roofline is None
    assert machine.asked[0] == {} and all(cell.batch_size == 16 for cell in told[:6])


def test_what_is_expected_to_be_far_worse_is_not_compiled():
    """A step of a microsecond: to gather parameters would take a hundred times as long."""
    machine = Machine(lambda values, axes: 10, lambda values, axes: 1e-6 * values["data.batch_size"] / 16)
    search.search(small.config("mlp"), target(), 6, measure=machine)
    assert machine.asked[1:] and not any("mesh" in str(changes) for changes in machine.asked)


def test_the_search_goes_on_from_a_mesh_that_is_refused():
    config = small.config("mlp", mesh=dict(fsdp=16))
    machine = Machine(lambda values, axes: 10)

    def measure(config, devices, changes):
        cell = machine(config, devices, changes)
        return dataclasses.replace(cell, mesh={}, memory=None, fits=False, refusal="mesh") if not changes else cell

    found = search.search(config, target(), 4, measure=measure)
    assert found[0].fits and found[-1].refusal == "mesh" and found[-1].changes == {}


def test_a_config_that_is_refused_anywhere_is_one_cell():
    config = small.config("mlp", data=dict(name="nowhere"))
    (only,) = search.search(config, target(1), 4)
    assert "nowhere" in only.refusal and search.largest_batch(config, target(1)) == 0


def test_one_device_that_does_not_suffice_gets_microbatches_or_a_smaller_batch():
    """The middle of the search: no mesh to choose, and the config as it is does not fit."""

    def working(values, axes):
        return values["data.batch_size"] * 100 / values["train.microbatches"]

    machine = Machine(
        lambda *of: 100 + working(*of), lambda values, axes: values["data.batch_size"], activations=working
    )
    found = search.search(small.config("mlp"), target(1), 6, measure=machine)
    assert found[0].fits and found[0].changes == {"train.microbatches": 2}


def test_of_two_that_are_as_fast_fewer_changes_are_better():
    base = made(small.config("mlp"), target(1), {}, lambda *_: 10, lambda *_: 1.0)

    def other(seconds, **changes):
        return dataclasses.replace(base, changes=changes, roofline=dataclasses.replace(base.roofline, seconds=seconds))

    assert min((other(0.999, a=1), base), key=search.rank) is base
    fast = other(0.9, a=1, b=2)
    assert min((fast, base), key=search.rank) is fast
    wrong = dataclasses.replace(base, fits=False, over=5)
    refused = Cell("", {}, refusal="no")
    assert sorted((refused, wrong, base), key=search.rank) == [base, wrong, refused]


@pytest.mark.parametrize("size", [3, 96])
@pytest.mark.parametrize(
    "of",
    [
        lambda size: 100 + 3 * size,
        lambda size: 100 + 3.1 * size + 20 * math.sqrt(size),
        lambda size: min(100 + 9 * size, 950) + max(size - 200, 0),  # a compiler that makes do with less
        lambda size: 100 + size**2 / 1000,
        lambda size: 2000,
        lambda size: 100,
    ],
)
def test_the_largest_batch_that_fits(size, of):
    machine = Machine(lambda values, axes: of(values["data.batch_size"]))
    config = small.config("mlp", data=dict(batch_size=size))
    found = search.largest_batch(config, target(1), measure=machine)
    asked = [size, *(changes["data.batch_size"] for changes in machine.asked[1:])]
    most = next((n for n in range(size * search.FURTHEST, 0, -1) if of(n) <= LIMIT), 0)
    assert len(asked) <= 8 and (found in asked if found else most == 0)
    assert found == 0 or of(found) <= LIMIT
    if len(asked) < 8:  # it was done: what is next does not fit, or is out of reach
        assert found >= most * (1 - 2 * search.EXACT) - 1


def test_the_largest_batch_is_one_that_the_mesh_and_the_microbatches_divide():
    machine = Machine(lambda values, axes: 100 + values["data.batch_size"])
    config = small.config("mlp", data=dict(batch_size=48), mesh=dict(fsdp=4), train=dict(microbatches=3))
    found = search.largest_batch(config, target(), measure=machine)
    assert found % 24 == 0 and 850 <= found <= 900
    assert all(changes["mesh.fsdp"] == 4 and changes["mesh.data"] == 2 for changes in machine.asked[1:])


def test_mesh_axes_are_those_of_sharding():
    assert set(sharding.AXES) == {"data", "fsdp", "sequence", "tensor"}
