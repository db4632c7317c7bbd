"""Meshes, specs and rules, on 8 simulated devices."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flaxmodels import meshes, optim, sharding, state, step
from flaxmodels.models import build
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.sharding import make_mesh, spec_of


@pytest.mark.parametrize(
    ("axes", "shape", "text"),
    [
        ({}, (8, 1, 1, 1), "8 x cpu: data=8"),
        ({"fsdp": 4}, (2, 4, 1, 1), "8 x cpu: data=2, fsdp=4"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2), "8 x cpu: data=2, fsdp=2, tensor=2"),
        ({"tensor": 8}, (1, 1, 1, 8), "8 x cpu: tensor=8"),
        ({"data": 8, "platform": "cpu"}, (8, 1, 1, 1), "8 x cpu: data=8"),
        ({"sequence": 2, "tensor": 2}, (2, 1, 2, 2), "8 x cpu: data=2, sequence=2, tensor=2"),
        ({"num_slices": 1}, (8, 1, 1, 1), "8 x cpu: data=8"),
    ],
)
def test_a_mesh_takes_all_devices(axes, shape, text):
    mesh = make_mesh(**axes)
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor") and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    assert sharding.describe(mesh) == text


def test_a_mesh_of_one_device():
    mesh = make_mesh(devices=jax.devices()[3:4])
    assert mesh.devices.shape == (1, 1, 1, 1) and sharding.describe(mesh) == "1 x cpu: one device"


@pytest.mark.parametrize(
    ("axes", "product"),
    [({"fsdp": 3}, 6), ({"data": 4}, 4), ({"tensor": 16}, 16), ({"data": 8, "fsdp": 2}, 16), ({"sequence": 5}, 5)],
)
def test_axes_that_do_not_multiply_to_the_devices(axes, product):
    with pytest.raises(UserError, match=rf"is {product} devices, but there are 8. Leave mesh.data out.*to divide 8"):
        make_mesh(**axes)


def test_a_platform_that_is_not_there():
    with pytest.raises(
        UserError, match=r"mesh.platform='tpu'.*: there is no such device \(.*\)\.\n.*or leave both out"
    ):
        make_mesh(platform="tpu")


# slices


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "fake"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 4, self.id // 4, 0)


def two_slices(platform="tpu"):
    """Eight devices of a 4 x 2 torus each; the second slice is found first."""
    return [Device(i, k, platform) for k in (1, 0) for i in range(8)]


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "sequence": 2}, {"fsdp": 2}])
def test_only_data_crosses_slices(axes):
    mesh = make_mesh(**axes, devices=two_slices())
    assert mesh.shape["data"] * np.prod([n for name, n in axes.items()], dtype=int) == 16
    first, second = np.split(mesh.devices, 2)
    assert {d.slice_index for d in first.flat} == {0} and {d.slice_index for d in second.flat} == {1}
    assert {d.id for d in first.flat} == set(range(8)) == {d.id for d in second.flat}
    assert sharding.describe(mesh).startswith("16 x fake in 2 slices: data=")


def test_neighbours_in_a_torus_are_neighbours_along_the_inner_axes():
    mesh = make_mesh(tensor=4, devices=two_slices())
    for row in mesh.devices.reshape(-1, 4):
        assert len({d.coords[1] for d in row}) == 1 or {d.coords[1] for d in row} == {0, 1}
    split = make_mesh(fsdp=2, tensor=2, devices=two_slices())  # an axis of the torus becomes two
    assert split.devices.shape == (4, 2, 1, 2)


def test_a_part_of_a_torus_can_be_used():
    mesh = make_mesh(devices=two_slices()[:3])
    assert mesh.devices.shape == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": 16}, r"data=1 is not a multiple of the 2 slices.*Choose fsdp x sequence x tensor to divide 8"),
        ({"num_slices": 4}, r"mesh.num_slices=4, but the number of slices that these 16 devices form is 2: leave it"),
        ({"num_slices": 1}, r"mesh.num_slices=1, but .* is 2: leave it out"),
        ({"devices": two_slices()[:-1]}, r"the slices have 7, 8 devices: expected as many in each"),
    ],
)
def test_slices_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**{"devices": two_slices(), **options})


def test_simulated_devices_are_cut_into_slices():
    mesh = make_mesh(fsdp=2, num_slices=2)
    assert mesh.devices.shape == (4, 2, 1, 1) and sharding.describe(mesh, 2) == "8 x cpu in 2 slices: data=4, fsdp=2"
    assert [[d.id for d in group] for group in meshes.slices(jax.devices(), 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match=r"data=1 is not a multiple of the 2 slices.* divide 4, the devices of a slice"):
        make_mesh(fsdp=8, num_slices=2)
    with pytest.raises(UserError, match=r"mesh.num_slices=3 does not divide the 8 devices: use one of 1, 2, 4, 8"):
        make_mesh(num_slices=3)


def test_hosts_of_gpus_are_slices_where_asked():
    gpus = two_slices("gpu")
    assert len(meshes.slices(gpus)) == 1  # FSDP may cross them
    assert {d.slice_index for d in meshes.slices(gpus, 2)[0]} == {0}
    assert len(meshes.slices(gpus, 4)) == 4


def test_devices_can_be_simulated_until_jax_starts():
    assert meshes.simulated(3) == jax.devices()[:3]
    with pytest.raises(UserError, match=r"9 simulated devices: JAX has started with 8"):
        meshes.simulated(9)


# automatic

GIB = 2**30


def chosen(count, state_bytes, *batches, memory=16 * GIB, slices=1, **options):
    devices = [Device(i, i * slices // count) for i in range(count)]
    axes, why = sharding.automatic(
        devices, state_bytes=state_bytes, gradient_bytes=state_bytes // 3, batch_sizes=batches, memory=memory, **options
    )
    assert axes["data"] * axes["fsdp"] * axes["tensor"] == count  # none is idle
    assert axes["data"] % slices == 0 and axes["num_slices"] == slices
    return (axes["data"], axes["fsdp"], axes["tensor"]), why


@pytest.mark.parametrize("batch", [12, 128, 512])
@pytest.mark.parametrize("count", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("state", [2**20, 2 * GIB, 96 * GIB])
def test_every_device_works_and_batches_divide_where_they_can(count, state, batch):
    for memory in (16 * GIB, 80 * GIB, None):
        (data, fsdp, tensor), _ = chosen(count, state, batch, memory=memory)
        assert batch % (data * fsdp) == 0 or (data * fsdp == count and batch == 12)
        small_enough = state * 4 // 3 <= meshes.STATE_SHARE * (memory or 1e30)
        assert fsdp == 1 if small_enough or count == 1 else fsdp > 1
        assert tensor == 1 or batch % count


@pytest.mark.parametrize(
    ("arguments", "axes", "why"),
    [
        ((8, 2**20, 64), (8, 1, 1), "state and gradients, 1.3 MiB, are within 25% of a device's 16.0 GiB"),
        ((8, 3 * GIB, 64), (8, 1, 1), "4.0 GiB, are within"),
        ((8, 3 * GIB + 8, 64), (4, 2, 1), "4.0 GiB, are over 25% .*; sharded they are 2.0 GiB a device$"),
        ((16, 96 * GIB, 128), (1, 16, 1), "128.0 GiB, are over .*; sharded they are 8.0 GiB a device, which is still"),
        ((64, 96 * GIB, 128), (2, 32, 1), "sharded they are 4.0 GiB a device$"),
        ((8, 2**20, 12), (4, 1, 2), "within .*; batches of 12 divide over 4 devices, not over 8, so tensor has 2"),
        ((8, 2**20, 128, 12), (4, 1, 2), "batches of 12 and 128 divide over 4 devices"),
        ((16, 96 * GIB, 12), (1, 4, 4), "sharded they are 8.0 GiB a device"),
        ((64, 2**20, 12), (64, 1, 1), "within"),  # 16 devices for a matrix are too many
        ((8, 2**20, 7), (8, 1, 1), "within"),  # all devices for a matrix, and none for data, are too
        ((1, 96 * GIB, 7), (1, 1, 1), "there is no other"),
    ],
)
def test_a_mesh_is_chosen_for_a_reason(arguments, axes, why):
    found, said = chosen(*arguments)
    assert found == axes
    assert re.search(why, said), said


def test_a_cpu_is_data_parallel():
    for batch in (12, 16):  # one that does not divide is for `check_batch` to refuse
        found, why = chosen(8, 96 * GIB, batch, memory=None)
        assert found == (8, 1, 1) and "share one memory" in why


def test_fsdp_stays_within_a_slice():
    assert chosen(32, 96 * GIB, 128, slices=2)[0] == (2, 16, 1)
    assert "still more" in chosen(32, 96 * GIB, 128, slices=2)[1]
    assert chosen(32, 12 * GIB, 128, slices=2)[0] == (8, 4, 1)
    assert chosen(32, 2**20, 12, slices=2)[0] == (4, 1, 8)


def test_tensor_is_chosen_only_for_a_model_that_it_splits():
    assert chosen(8, 2**20, 12, tensor_sizes=(6, 256))[0] == (4, 1, 2)
    for sizes in ((), [], (3, 256)):
        assert chosen(8, 2**20, 12, tensor_sizes=sizes)[0] == (8, 1, 1)


def test_what_tensor_splits():
    attention = {"query": {"kernel": np.zeros((2, 48, 6, 8))}, "key": {"kernel": np.zeros((2, 48, 3, 8))}}
    tree = {"embed": {"embedding": np.zeros((999, 48))}, "blocks": {"attention": attention}}
    assert sharding.tensor_sizes(tree) == (3, 6)  # not the vocabulary, which may stay whole
    assert sharding.tensor_sizes({**tree, "conv": {"kernel": np.zeros((3, 3, 64, 64))}}) == ()  # most is not split


# spec_of

FSDP = make_mesh(fsdp=4)
TENSOR = make_mesh(data=1, fsdp=2, tensor=4)
DATA = make_mesh()
SEQUENCE = make_mesh(fsdp=2, sequence=4)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), P(None, "fsdp")),  # the largest
        ((128, 64), P("fsdp", None)),
        ((64, 64), P(None, "fsdp")),  # of equal ones the last
        ((130, 64), P(None, "fsdp")),  # the largest that divides
        ((3, 3, 64, 32), P(None, None, "fsdp", None)),
        ((129, 65), P(None, None)),  # nothing divides
        ((4096,), P("fsdp")),
        ((16, 32), P(None, None)),  # under MIN_SHARDED elements
        ((32, 32), P(None, "fsdp")),  # as many as MIN_SHARDED
        ((), P()),
    ],
)
def test_what_no_rule_names_is_split_over_fsdp_by_its_shape(shape, spec):
    assert spec_of("params/my/own/weight", shape, FSDP) == spec
    assert all(entry is None for entry in spec_of("params/my/own/weight", shape, DATA))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), P(None, ("fsdp", "sequence"))),
        ((64, 132), P(("fsdp", "sequence"), None)),  # the largest that both divide
        ((66, 132), P(None, "fsdp")),  # both divide none
        ((65, 33), P(None, None)),
        ((16, 32), P(None, None)),
    ],
)
def test_devices_along_a_sequence_share_parameters_too(shape, spec):
    assert spec_of("params/my/own/weight", shape, SEQUENCE) == spec
    alone = make_mesh(sequence=8)
    expected = [("sequence" if shape[i] % 8 == 0 and entry else None) for i, entry in enumerate(spec)]
    assert spec_of("params/my/own/weight", shape, alone) == P(*expected)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/blocks/attention/query/kernel", (6, 64, 8, 16), P(None, "fsdp", "tensor", None)),
        ("params/attention/query/kernel", (64, 8, 16), P("fsdp", "tensor", None)),
        ("params/blocks/attention/out/kernel", (6, 8, 16, 64), P(None, "tensor", None, "fsdp")),
        ("params/blocks/mlp/up/kernel", (6, 64, 256), P(None, "fsdp", "tensor")),
        ("params/blocks/mlp/gate/kernel", (6, 64, 256), P(None, "fsdp", "tensor")),
        ("params/blocks/mlp/down/kernel", (6, 256, 64), P(None, "tensor", "fsdp")),
        ("params/embed/embedding", (1000, 64), P("tensor", "fsdp")),
        ("params/head/kernel", (64, 1000), P("fsdp", "tensor")),
        ("params/hidden_0/kernel", (64, 64), P("fsdp", "tensor")),
        ("params/dense/kernel", (64, 64), P("fsdp", "tensor")),
        # An axis that does not divide is left out, and the fallback takes its place.
        ("params/blocks/attention/key/kernel", (6, 64, 2, 16), P(None, "fsdp", None, None)),
        ("params/head/kernel", (64, 1001), P("fsdp", None)),
        ("params/embed/embedding", (1001, 64), P(None, "fsdp")),
        # The name must be at the end, and the array have the dimensions.
        ("params/mlp/up/kernel/extra", (64, 256), P(None, "fsdp")),
        ("params/mlp/up/bias", (2048,), P("fsdp")),
        ("params/attention/query/kernel", (64, 64), P(None, "fsdp")),
        # Optimizer state ends in its parameter's path.
        ("opt_state/0/mu/blocks/mlp/up/kernel", (6, 64, 256), P(None, "fsdp", "tensor")),
        ("opt_state/inner_states/train/inner_state/1/nu/head/kernel", (64, 1000), P("fsdp", "tensor")),
        # What Adafactor keeps of a matrix is no matrix.
        ("opt_state/0/v_row/mlp/up/kernel", (1,), P(None)),
    ],
)
def test_built_in_rules(path, shape, spec):
    assert spec_of(path, shape, TENSOR) == spec


def test_a_users_rule_is_tried_first_and_taken_as_it_is():
    rules = ((r"my/weight", ("fsdp", None)), (r"mlp/up/kernel", (None, None)), (r"w", ("tensor",)))
    assert spec_of("params/my/weight", (64, 2048), FSDP, rules) == P("fsdp", None)  # not the largest dimension
    assert spec_of("params/my/weight", (5, 64, 2048), FSDP, rules) == P(None, "fsdp", None)  # specs name the last ones
    assert spec_of("params/mlp/up/kernel", (64, 256), TENSOR, rules) == P(None, None)  # no fallback either
    assert spec_of("params/other", (64, 256), FSDP, rules) == P(None, "fsdp")
    assert spec_of("a/w", (64, 256), TENSOR, ((r"w", (("fsdp", "tensor"), None)),)) == P(("fsdp", "tensor"), None)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((6, 8), ("fsdp", None), r"dimension 0 of 'params/w' is 6, which 'fsdp'=4 does not divide"),
        (
            (8, 6),
            (None, ("data", "fsdp")),
            r"dimension 1 of 'params/w' is 6, which \('data', 'fsdp'\)=8 does not divide",
        ),
        ((8,), (None, "fsdp"), r"'params/w' has shape \(8,\), fewer dimensions than its spec \(None, 'fsdp'\)"),
    ],
)
def test_a_users_rule_must_fit(shape, spec, message):
    with pytest.raises(UserError, match=message):
        spec_of("params/w", shape, FSDP, (("w", spec),))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("up/kernel",), r"'up/kernel' is no rule: expected \(regex, spec\), such as"),
        ((("up/kernel", "fsdp"),), r"is no rule"),
        ((("up", ("fsdp",), 3),), r"is no rule"),
        (((("fsdp",), "up"),), r"is no rule"),
        ((("(", ("fsdp",)),), r"'\(' is not a regular expression"),
        ((("up", ("model",)),), r"'up' names axis 'model'. There are: data, fsdp, sequence, tensor"),
        ((("up", (None, ("data", "fspd"))),), r"names axis 'fspd'. Did you mean 'fsdp'"),
    ],
)
def test_rules_of_a_config_are_checked(rules, message):
    with pytest.raises(UserError, match=message):
        sharding.check_rules(rules)


def test_good_rules_are_returned():
    rules = (("up/kernel", ("fsdp", None)), ("x", ()), ("y", (None, ("data", "fsdp"))))
    assert sharding.check_rules(rules) == rules


# batches


@pytest.mark.parametrize(
    ("size", "advice"), [(9, "use 8 or 16"), (3, r"use 8\."), (63, "use 56 or 64"), (65, "use 64 or 72")]
)
def test_a_batch_that_does_not_divide_is_told_the_nearest_sizes(size, advice):
    with pytest.raises(
        UserError,
        match=rf"data.batch_size={size} does not divide over the 8 devices of 8 x cpu: data=2, fsdp=4: {advice}",
    ):
        sharding.check_batch(FSDP, size)


def test_a_batch_is_split_over_data_and_fsdp_only():
    for mesh, parts in ((FSDP, 8), (DATA, 8), (TENSOR, 2), (SEQUENCE, 2)):
        sharding.check_batch(mesh, parts)
        placed = jax.device_put(np.arange(parts * 3).reshape(parts, 3), sharding.batch_sharding(mesh))
        assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
    placed = jax.device_put(np.zeros((5, 16, 3)), sharding.batch_sharding(FSDP, lead=1))
    assert placed.addressable_shards[0].data.shape == (5, 2, 3)
    with pytest.raises(UserError, match=r"^data.eval_batch_size=3 "):
        sharding.check_batch(TENSOR, 3, "data.eval_batch_size")


# whole states


def abstract(mesh, name="adamw", frozen=None, **options):
    model = build("transformer", vocab_size=256, layers=2, width=32, heads=4, max_length=16)
    rules = ((frozen, {"freeze": True}),) if frozen else ()
    tx, _ = optim.make(name, learning_rate=0.1, total_steps=10, rules=rules, **options)
    return state.init(model, tx, jax.ShapeDtypeStruct((8, 16), np.int32), 0, mesh)[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"average": 0.9}),
        ("muon", {}),
        ("adamw", {"frozen": "embed"}),
        ("adafactor", {}),
    ],
)
def test_optimizer_state_lies_as_its_parameters_do(name, options):
    found = abstract(TENSOR, name, **options)
    places = {path_of(keys): x for keys, x in jax.tree.leaves_with_path(found.params)}
    assert len({x.sharding.spec for x in places.values()}) > 4
    checked = 0
    for keys, x in jax.tree.leaves_with_path(found.opt_state):
        own = next((p for path, p in places.items() if path_of(keys).endswith("/" + path)), None)
        if own is not None and x.shape == own.shape:
            assert x.sharding == own.sharding, path_of(keys)
            checked += 1
    assert checked >= len(places) - 1


def test_a_users_rule_that_matches_nothing_is_an_error():
    shapes = {"params": {"up": {"kernel": np.zeros((8, 8))}}}
    with pytest.raises(UserError, match=r"'up/kernal' is found at the end of no .*There are: params/up/kernel"):
        sharding.shard_tree(shapes, FSDP, (("up/kernal", ("fsdp", None)),))


def test_every_large_parameter_of_a_transformer_is_split():
    for mesh in (FSDP, TENSOR, SEQUENCE):
        large = [x for x in jax.tree.leaves(abstract(mesh).params) if np.prod(x.shape) >= sharding.MIN_SHARDED]
        assert large and not any(x.sharding.is_fully_replicated for x in large)
        assert sharding.replicated_report(abstract(mesh).params, limit=4 * sharding.MIN_SHARDED) == []


def test_a_state_is_born_as_its_rules_say():
    model = nn.Dense(64)
    tx, _ = optim.make("adamw", learning_rate=0.1, total_steps=10)
    make, shapes = state.init(model, tx, np.zeros((8, 32), np.float32), 0, FSDP, (("kernel", ("fsdp", None)),))
    made = make()
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim) or pytest.fail(str(s)), made, shapes)
    assert made.params["kernel"].addressable_shards[0].data.shape == (8, 64)
    whole = jax.jit(lambda: state.create(model, tx, np.zeros((1, 32), np.float32), 0))()
    jax.tree.map(np.testing.assert_array_equal, made, whole)  # the parameters do not depend on the mesh


def test_what_stays_whole_and_is_large_is_reported_with_the_rule_to_add():
    shapes = {"my": {"odd": np.zeros((1023, 513), np.float32)}, "even": np.zeros((1024, 512), np.float32)}
    places = sharding.shard_tree(shapes, FSDP)
    tree = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    (line,) = sharding.replicated_report(tree)
    assert line == (
        "my/odd (1023, 513) is replicated: 2.0 MiB on every device. No dimension divides by fsdp=4: pad dimension 0 to "
        '1024, or add ("my/odd", spec) to sharding.rules.'
    )
    assert sharding.replicated_report(tree, rules=(("odd", (None, None)),)) == []  # whole on purpose
    assert sharding.replicated_report(tree, limit=2**22) == []
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(DATA)), shapes)
    assert sharding.replicated_report(data) == []  # a mesh that only splits data does not split parameters
    split = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(TENSOR)), shapes)
    assert "divides by fsdp=2 x tensor=4: pad dimension 0 to 1024" in sharding.replicated_report(split)[1]
    alone = sharding.replicated(make_mesh(tensor=8))
    split = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), shapes)
    assert "No rule splits it over tensor=8: use mesh.fsdp, or add" in sharding.replicated_report(split)[0]


def reported(mesh=TENSOR, rules=(), limit=0, *, vocab=512, kv_heads=4, mlp=160):
    block = {"attention": {"key": {"kernel": (2, 48, kv_heads, 12)}}, "mlp": {"up": {"kernel": (2, 48, mlp)}}}
    shapes = {"embed": {"embedding": (vocab, 48)}, "blocks": block, "head": {"kernel": (48, vocab)}}
    params = jax.tree.map(lambda x: np.zeros(x, np.int8), shapes, is_leaf=lambda x: isinstance(x, tuple))
    places = sharding.shard_tree(params, mesh, rules)
    tree = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)
    return sharding.padding_report(tree, limit, rules, fields=("vocab_size", "heads", "kv_heads"))


def test_what_tensor_does_not_divide_is_reported_with_the_padding():
    assert reported() == []
    assert reported(vocab=50257) == [
        "model.vocab_size, 50257, does not divide over tensor=4, where each device has all of embed/embedding, "
        "head/kernel, and all its work. Use 50304."
    ]
    (line,) = reported(kv_heads=2)
    assert line.startswith("model.kv_heads, 2, does not") and line.endswith("Use a multiple of 4, or mesh.tensor=2.")
    (line,) = reported(mlp=162)  # the model has no such field
    assert line.startswith("a dimension of blocks/mlp/up/kernel, 162, ") and line.endswith("Use 164, or mesh.tensor=2.")
    assert reported(vocab=50257, limit=2**30) == [] == reported(vocab=50257, mesh=FSDP)
    assert reported(vocab=50257, rules=(("embed/embedding|head/kernel", (None, None)),)) == []


@pytest.mark.slow
def test_meshes_on_which_xla_gets_convolutions_wrong_are_refused():
    """If this fails at its end, XLA has been mended, and `check_program` may go."""
    mesh = make_mesh(fsdp=2, sequence=2, tensor=2)

    def gradient(x, kernel):
        return jax.grad(
            lambda kernel: (nn.Conv(4, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x) ** 2).sum()
        )(kernel)

    split = jax.sharding.NamedSharding(mesh, P("fsdp", "sequence"))
    x, kernel = np.ones((2, 4, 4, 3), np.float32), np.ones((3, 3, 3, 4), np.float32)
    arguments = jax.device_put(x, split), jax.device_put(kernel, sharding.replicated(mesh))
    lowered = step.compile_step(gradient, *arguments, mesh=mesh)
    with pytest.raises(UserError, match=r"sequence=2 x tensor=2: the model has convolutions, and XLA gets"):
        sharding.check_program(mesh, lowered)
    for axes in (dict(sequence=2), dict(tensor=2), dict(fsdp=2, sequence=4)):
        sharding.check_program(make_mesh(**axes), lowered)
    sharding.check_program(mesh, step.compile_step(jnp.sum, arguments[0], mesh=mesh))
    assert not np.allclose(lowered.compile()(*arguments), gradient(x, kernel))


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "muon"])
def test_a_users_rule_holds_for_the_parameter_its_moments_and_its_average(optimizer):
    """Its path is that of the parameter; a moment of another shape (Adafactor's) falls back."""
    model = build("mlp", classes=8, hidden=(256,))
    tx, _ = optim.make(optimizer, learning_rate=0.1, total_steps=10, average=0.9)
    mesh = make_mesh(data=2, fsdp=4)
    rules = (("hidden_0/kernel", ("fsdp", None)),)
    _, abstract = state.init(model, tx, np.zeros((1, 128), np.float32), 0, mesh, rules)
    same = {"params": abstract.params, "average": optim.parameters_average(abstract.opt_state, abstract.params)}
    for tree in same.values():
        assert tree["hidden_0"]["kernel"].sharding.spec == P("fsdp", None)
    for keys, x in jax.tree.leaves_with_path(abstract.opt_state):
        if "hidden_0/kernel" in jax.tree_util.keystr(keys, simple=True, separator="/") and x.shape == (128, 256):
            assert x.sharding.spec == P("fsdp", None)
