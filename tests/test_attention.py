"""Kernels of attention: each is the plain one, on any mesh; and the one that is picked is one that runs."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flaxmodels import attention, ring, sharding
from flaxmodels.attention import Case, pick

INTERPRETED = functools.partial(attention.splash, interpret=True)


def plain(q, k, v, segments=None):
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="xla")


def arrays(shape, kv_heads, dtype="float32", packed=False):
    """Queries, keys, values, segments, and what the result is weighed by."""
    rng = np.random.default_rng(0)
    B, T, N, H = shape
    q, k, v, w = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, kv_heads, kv_heads, N))
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)))) if packed else None
    return q, k, v, segments, w


def compare(kernel, inputs, mesh=None):
    """Result and gradients of `kernel` on a mesh against those of the plain one, of any scale."""
    *_, segments, weigh = inputs

    def run(f):
        def weighed(q, k, v):
            out = f(q, k, v, segments=segments)
            return jnp.sum(out.astype(jnp.float32) * weigh.astype(jnp.float32)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*inputs[:3])
        return [np.asarray(x.astype(jnp.float32)) for x in (out, *gradients)]

    expected = run(plain)
    if mesh is None:
        found = run(kernel)
    else:
        with jax.set_mesh(mesh):
            found = run(kernel)
    tolerance = 2e-6 if inputs[0].dtype == jnp.float32 else 2e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def make_mesh(**axes):
    return sharding.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of keys on each device, as a long row has."""
    monkeypatch.setattr(ring, "BLOCK", 2)


@pytest.mark.parametrize(
    ("axes", "kv_heads", "dtype", "packed"),
    [
        (None, 2, "float32", True),
        ({"data": 2, "sequence": 2, "tensor": 2}, 1, "float32", True),  # two devices share a head of keys
        pytest.param({"data": 1, "fsdp": 2, "sequence": 4}, 4, "float32", False, marks=pytest.mark.slow),
        pytest.param({"data": 1, "sequence": 8}, 2, "bfloat16", True, marks=pytest.mark.slow),
        pytest.param({"data": 2, "sequence": 1, "tensor": 2}, 2, "float32", False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_ring_computes_plain_attention(axes, kv_heads, dtype, packed, small_blocks):
    compare(attention.ring, arrays((2, 32, 4, 8), kv_heads, dtype, packed), axes and make_mesh(**axes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "kv_heads", "dtype", "packed"),
    [
        (None, 2, "bfloat16", False),
        ({"data": 2, "sequence": 2, "tensor": 2}, 1, "float32", True),
    ],
    ids=str,
)
def test_splash_computes_plain_attention(axes, kv_heads, dtype, packed):
    inputs = arrays((2, 256, 4, 16), kv_heads, dtype, packed)
    compare(INTERPRETED, inputs, axes and make_mesh(**axes))


@pytest.mark.parametrize("kernel", [attention.ring, pytest.param(INTERPRETED, marks=pytest.mark.slow)])
def test_no_result_depends_on_later_places_or_other_segments(kernel):
    q, k, v, _, _ = arrays((1, 128, 2, 8), 1)
    segments = jnp.asarray(np.arange(128) >= 40, jnp.int32)[None]
    run = jax.jit(functools.partial(kernel, segments=segments))
    before = run(q, k, v)
    changed = np.asarray(run(q, *(x.at[:, 20:100].add(1.0) for x in (k, v))) != before).any((0, 2, 3))
    np.testing.assert_array_equal(changed, np.arange(128) >= 20)
    changed = np.asarray(run(q, *(x.at[:, :40].add(1.0) for x in (k, v))) != before).any((0, 2, 3))
    np.testing.assert_array_equal(changed, np.arange(128) < 40)


@pytest.mark.slow
def test_a_ring_holds_no_row_of_scores_and_sends_keys_only_to_the_next():
    mesh, size = make_mesh(data=1, sequence=8), 1024
    place = jax.NamedSharding(mesh, P(None, "sequence"))
    q, k = (jax.ShapeDtypeStruct((1, size, n, 4), "float32", sharding=place) for n in (4, 2))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda q, k, v: attention.ring(q, k, v).sum(), (0, 1, 2)))
        compiled = gradient.lower(q, k, k).compile()
    text = compiled.as_text()
    assert "collective-permute" in text
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all") if kind in text]
    scores = 4 * size // 8 * size * 4  # bytes, of one device's queries with all keys
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 1.5


@pytest.mark.parametrize("kernel", [attention.ring, INTERPRETED], ids=["ring", "splash"])
@pytest.mark.parametrize(
    ("axes", "shapes", "message"),
    [
        ({"data": 4, "sequence": 2}, ((2, 256, 4, 8), (2, 256, 4, 8)), r"data x fsdp = 4 to divide batch = 2"),
        ({"data": 1, "tensor": 8}, ((2, 256, 4, 8), (2, 256, 4, 8)), r"tensor = 8 to divide heads = 4"),
        ({"data": 1, "sequence": 8}, ((2, 257, 4, 8), (2, 257, 4, 8)), r"sequence = 8 to divide length = 257"),
        ({"data": 1}, ((2, 256, 4, 8), (2, 256, 3, 8)), r"\(2, 256, 3, 8\).*K a divisor of N"),
        ({"data": 1}, ((2, 256, 4, 8), (2, 128, 4, 8)), r"expected \(B, T, N, H\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(kernel, axes, shapes, message):
    q, k = (jnp.zeros(shape) for shape in shapes)
    with jax.set_mesh(make_mesh(**axes)), pytest.raises(ValueError, match=message):
        jax.eval_shape(kernel, q, k, k)


def test_splash_names_a_length_that_its_tiles_do_not_divide():
    q = jnp.zeros((2, 256, 4, 8))
    with jax.set_mesh(make_mesh(data=1, sequence=4)), pytest.raises(ValueError, match="multiple of 512, and it is 256"):
        jax.eval_shape(INTERPRETED, q, q, q)


# What is picked

TPU = Case((8, 1024, 8, 128), 8, "bfloat16", packed=False, platform="tpu", axes={})
GPU = Case((8, 1024, 8, 128), 8, "bfloat16", packed=False, platform="gpu", axes={})


def changed(case, **fields):
    return Case(**{**vars(case), **fields})


@pytest.mark.parametrize(
    ("case", "expected", "line"),
    [
        (changed(TPU, platform="cpu"), "xla", r"attention: xla \(CPU, length 1024, head size 128\)$"),
        (TPU, "splash", r"attention: splash \(TPU, length 1024, head size 128\)$"),
        (changed(TPU, dtype="float32", packed=True), "splash", "splash"),
        (changed(TPU, shape=(8, 1000, 8, 128)), "xla", r"xla \(.*; splash needs a length that is a multiple of 128"),
        (changed(TPU, axes={"data": 16}), "xla", "splash needs data x fsdp = 16 to divide batch = 8"),
        (changed(TPU, axes={"sequence": 4}), "splash", r"splash \(TPU, length 1024, head size 128, sequence=4\)"),
        (changed(TPU, axes={"sequence": 16}), "xla", "multiple of 2048"),
        (changed(TPU, shape=(1, 2**15, 8, 128), axes={"sequence": 8}), "ring", r"ring \(TPU.*sequence=8\)"),
        (changed(TPU, shape=(1, 2**14, 8, 128), axes={"sequence": 8}), "splash", "sequence=8"),
        (changed(TPU, shape=(1, 2**14, 8, 128), axes={"sequence": 8}, kv_heads=4), "ring", "sequence=8"),
        (changed(TPU, shape=(1, 2**15, 8, 128), axes={"sequence": 1}), "splash", "length 32768, head size 128\\)"),
        (changed(TPU, platform="cpu", shape=(1, 2**15, 8, 8), axes={"sequence": 8}), "ring", "CPU"),
        (GPU, "cudnn", r"attention: cudnn \(GPU, length 1024, head size 128\)$"),
        (changed(GPU, packed=True), "cudnn", "cudnn"),
        (changed(GPU, packed=True, shape=(8, 1023, 8, 128)), "xla", "cudnn needs an even length"),
        (changed(GPU, dtype="float32"), "xla", r"; cudnn needs .*; here are gpu 9.0 and float32"),
        (changed(GPU, shape=(8, 1024, 8, 257)), "xla", "multiple of 8 up to 256, and it is 257"),
        (changed(GPU, axes={"sequence": 2}), "xla", "cudnn can't split the length, and the mesh has sequence=2"),
        (changed(GPU, axes={"tensor": 2}, kv_heads=1), "xla", "tensor = 2 to divide kv_heads = 1"),
    ],
)  # fmt: skip
def test_auto_picks_the_best_that_runs_and_says_which(case, expected, line, monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda: (9, 0))
    kernel, said = pick("auto", case)
    assert kernel == expected
    assert re.search(line, said), said


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "xla"), ((8, 0), "cudnn"), ((0, 0), "xla"), (None, "cudnn")]
)
def test_a_gpu_that_is_too_old_or_not_nvidias_computes_with_xla(capability, expected, monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    assert pick("auto", GPU)[0] == expected
    assert pick("auto", changed(GPU, shape=(8, 1024, 8, 256)))[0] == "xla"


@pytest.mark.parametrize(
    ("asked", "case", "message"),
    [
        ("cudnn", TPU, r'attention="cudnn" needs an Nvidia GPU .* here are tpu and bfloat16. Use attention="auto"'),
        ("splash", GPU, r'attention="splash" needs a TPU, and here is gpu. Use attention="auto" or attention="xla"'),
        ("ring", changed(TPU, axes={"sequence": 3}), r'"ring" needs sequence = 3 to divide length = 1024'),
    ],
)
def test_a_kernel_that_can_not_run_is_refused_where_it_is_asked_for(asked, case, message):
    with pytest.raises(ValueError, match=message):
        pick(asked, case)


def test_what_is_asked_for_is_picked():
    assert pick("xla", TPU) == ("xla", "attention: xla (TPU, length 1024, head size 128)")
    assert pick("ring", TPU)[0] == "ring"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (SimpleNamespace(compute_capability="9.0"), (9, 0)),
        (SimpleNamespace(compute_capability="12.0"), (12, 0)),
        (SimpleNamespace(compute_capability="gfx90a"), (0, 0)),
        (SimpleNamespace(), (0, 0)),
    ],
)
def test_the_capability_is_read_from_the_gpu(device, expected, monkeypatch):
    assert attention._capability() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention._capability() == expected


def test_the_place_is_that_of_the_mesh_that_is_set():
    mesh = make_mesh(data=2, sequence=4)
    assert attention.place() == ("cpu", {})
    assert attention.place(mesh) == ("cpu", {"data": 2, "fsdp": 1, "sequence": 4, "tensor": 1})
    found = []

    def body(x):
        found.append(attention.place())
        return x

    with jax.set_mesh(mesh):
        jax.eval_shape(body, 1.0)
        spec = P("data")
        jax.eval_shape(jax.shard_map(body, in_specs=spec, out_specs=spec, axis_names={"data"}), jnp.zeros(2))
    assert found == [attention.place(mesh), ("cpu", {"fsdp": 1, "sequence": 4, "tensor": 1})]
