"""Meshes, specs and rules, on 8 simulated devices."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flaxmodels import optim, sharding, state
from flaxmodels.models import build
from flaxmodels.registry import UserError
from flaxmodels.sharding import make_mesh, spec_of


@pytest.mark.parametrize(
    ("axes", "shape", "text"),
    [
        ({}, (8, 1, 1), "8 x cpu: data=8"),
        ({"fsdp": 4}, (2, 4, 1), "8 x cpu: data=2, fsdp=4"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2), "8 x cpu: data=2, fsdp=2, tensor=2"),
        ({"tensor": 8}, (1, 1, 8), "8 x cpu: tensor=8"),
        ({"data": 8, "platform": "cpu"}, (8, 1, 1), "8 x cpu: data=8"),
    ],
)
def test_a_mesh_takes_all_devices(axes, shape, text):
    mesh = make_mesh(**axes)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    assert sharding.describe(mesh) == text


def test_a_mesh_of_one_device():
    mesh = make_mesh(devices=jax.devices()[3:4])
    assert mesh.devices.shape == (1, 1, 1) and sharding.describe(mesh) == "1 x cpu: one device"


@pytest.mark.parametrize(
    ("axes", "product"), [({"fsdp": 3}, 6), ({"data": 4}, 4), ({"tensor": 16}, 16), ({"data": 8, "fsdp": 2}, 16)]
)
def test_axes_that_do_not_multiply_to_the_devices(axes, product):
    with pytest.raises(UserError, match=rf"is {product} devices, but there are 8. Leave mesh.data out.*to divide 8"):
        make_mesh(**axes)


def test_a_platform_that_is_not_there():
    with pytest.raises(
        UserError, match=r"mesh.platform='tpu'.*: there is no such device \(.*\)\.\n.*or leave both out"
    ):
        make_mesh(platform="tpu")


# spec_of

FSDP = make_mesh(fsdp=4)
TENSOR = make_mesh(data=1, fsdp=2, tensor=4)
DATA = make_mesh()


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
        ((("up", ("model",)),), r"'up' names axis 'model'. There are: data, fsdp, tensor"),
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


def test_a_batch_is_split_over_data_and_fsdp_and_not_over_tensor():
    for mesh, parts in ((FSDP, 8), (DATA, 8), (TENSOR, 2)):
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
    places = {optim.path_of(keys): x for keys, x in jax.tree.leaves_with_path(found.params)}
    assert len({x.sharding.spec for x in places.values()}) > 4
    checked = 0
    for keys, x in jax.tree.leaves_with_path(found.opt_state):
        own = next((p for path, p in places.items() if optim.path_of(keys).endswith("/" + path)), None)
        if own is not None and x.shape == own.shape:
            assert x.sharding == own.sharding, optim.path_of(keys)
            checked += 1
    assert checked >= len(places) - 1


def test_a_users_rule_that_matches_nothing_is_an_error():
    shapes = {"params": {"up": {"kernel": np.zeros((8, 8))}}}
    with pytest.raises(UserError, match=r"'up/kernal' is found at the end of no .*There are: params/up/kernel"):
        sharding.shard_tree(shapes, FSDP, (("up/kernal", ("fsdp", None)),))


def test_every_large_parameter_of_a_transformer_is_split():
    for mesh in (FSDP, TENSOR):
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
    assert line.startswith("my/odd (1023, 513) is replicated: 2.0 MiB on every device.") and '("my/odd", spec)' in line
    assert sharding.replicated_report(tree, limit=2**22) == []
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(DATA)), shapes)
    assert sharding.replicated_report(data) == []  # a mesh that only splits data does not split parameters


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "muon"])
def test_a_users_rule_holds_for_the_parameter_its_moments_and_its_average(optimizer):
    """Its path is that of the parameter; a moment of another shape (Adafactor's) falls back."""
    model = build("mlp", classes=8, hidden=(256,))
    tx, _ = optim.make(optimizer, learning_rate=0.1, total_steps=10, average=0.9)
    mesh = make_mesh(data=2, fsdp=4)
    rules = (("hidden_0/kernel", ("fsdp", None)),)
    _, abstract = state.init(model, tx, np.zeros((1, 128), np.float32), 0, mesh, rules)
    same = {"params": abstract.params, "average": optim.parameters_average(abstract.opt_state, None)}
    for tree in same.values():
        assert tree["hidden_0"]["kernel"].sharding.spec == P("fsdp", None)
    for keys, x in jax.tree.leaves_with_path(abstract.opt_state):
        if "hidden_0/kernel" in jax.tree_util.keystr(keys, simple=True, separator="/") and x.shape == (128, 256):
            assert x.sharding.spec == P("fsdp", None)
