"""TPU slices that are not there: their names, and programs compiled for them."""

import importlib.util
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import small
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import cli, hardware, job, sharding
from flaxmodels.config import load_config
from flaxmodels.perf import compiled, gpus, topologies
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

GIB = 2**30
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install 'flaxmodels-train[tpu]'",
)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5e:4x4", ("v5e", (4, 4))),
        ("v5e:1x1", ("v5e", (1, 1))),
        ("v6e:16x16", ("v6e", (16, 16))),
        ("v4:2x2x1", ("v4", (2, 2, 1))),
        ("v5p:4x4x12", ("v5p", (4, 4, 12))),
        ("tpu7x:1x1x1", ("tpu7x", (1, 1, 1))),
    ],
)
def test_names(name, parsed):
    assert topologies.parse(name) == parsed


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5litepod-16", "v5e:4x4"), ("v5e-8", "v5e:2x4"), ("v6e-16", "v6e:4x4"), ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("v4-8", "v4:2x2x1"), ("v5p-128", "v5p:4x4x4"), ("v5p-16", "v5p:2x2x2"), ("tpu7x-8", "tpu7x:2x2x1"),
        ("V5E:4X4", "v5e:4x4"), ("TPU v5 lite:2x4", "v5e:2x4"), ("tpu v5p 2x2x4", "v5p:2x2x4"),
        ("v5:2x2x2", "v5p:2x2x2"), ("v5e=4x4", "v5e:4x4"), ("v5e:16", "v5e:4x4"), ("ironwood:2x2x1", "tpu7x:2x2x1"),
    ],
)  # fmt: skip
def test_other_spellings_are_refused_with_the_right_one(name, meant):
    assert topologies.parse(meant)
    with pytest.raises(
        UserError, match=re.escape(f"topology {name!r} is not VERSION:SHAPE") + f".*Did you mean '{meant}'"
    ):
        topologies.parse(name)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:0x4", "h100:8", "v5p-100", "v5e-5", "v5p:2x2x0", "4x4", "v2:2x2"]
)
def test_what_is_no_topology_at_all(name):
    with pytest.raises(UserError, match=r"is not VERSION:SHAPE, such as 'v5e:4x4'.*Versions are v4, v5e") as caught:
        topologies.parse(name)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:3x3", "slices of v5e are 1x1, 2x2, 2x4, 4x4"),
        ("v5e:8x4", "Did you mean 'v5e:4x8'?"),
        ("v5e:4x4x1", "Did you mean 'v5e:4x4'?"),
        ("v5e:32x32", "1024 chips are more than the 256 of a v5e pod. Use several slices"),
        ("v4:2x2", "three sides, in chips, such as v4:2x2x1"),
        ("v5p:3x2x1", "hosts of 2x2x1 chips: the first two sides are even. Did you mean 'v5p:4x2x1'?"),
    ],
)
def test_shapes_that_do_not_exist(name, said):
    with pytest.raises(UserError, match=re.escape(f"topology {name!r}: ") + f".*{re.escape(said)}"):
        topologies.devices(name)


def test_a_number_of_slices():
    with pytest.raises(UserError, match="num_slices=0 must be at least 1"):
        topologies.devices("v5e:4x4", 0)


@pytest.mark.parametrize(
    ("reason", "error", "said"),
    [
        (
            "JAX TPU support not installed; cannot generate TPU topology.",
            UserError,
            r"pip install 'flaxmodels-train\[tpu\]'",
        ),
        ("ABORTED: The TPU is already in use by process with pid 1.", UserError, "JAX_PLATFORMS=cpu"),
        ("INTERNAL: something", FaultError, "libtpu refuses it: INTERNAL: something"),
    ],
)
def test_libtpu_that_does_not_answer(monkeypatch, reason, error, said):
    def refuse(**_):
        raise RuntimeError(reason)

    monkeypatch.setattr(hardware, "DEVICES", ())
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refuse)
    with pytest.raises(error, match=said):
        topologies.devices("v5e:4x4")


# GPUs


@pytest.mark.parametrize(("name", "shape"), [("h100:1", (1, 1)), ("h200:8", (1, 8)), ("a100:2x8", (2, 8))])
def test_names_of_gpus(name, shape):
    gpu, parsed = gpus.parse(name)
    assert parsed == shape and gpu.kind in hardware.KINDS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h10:8", "there is no GPU 'h10'. Did you mean 'h100'?"),
        ("h100", "is not GPU:NUMBER, such as 'h100:8', or GPU:NODESxNUMBER, such as 'h100:2x8'"),
        ("h100:0", "is not GPU:NUMBER"),
        ("h100:16", "a node has at most 8 GPUs. Did you mean 'h100:2x8'?"),
        ("h100:2x16", "a node has at most 8 GPUs."),
    ],
)
def test_gpus_that_do_not_exist(name, said):
    with pytest.raises(UserError, match=re.escape(f"topology {name!r}") + f".*{re.escape(said)}"):
        gpus.devices(name)


def test_a_plugin_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    for reason, error, said in (
        ("PJRT plugin not found for cuda", UserError, r"pip install 'flaxmodels-train\[cuda\]'"),
        ("INTERNAL: something", FaultError, "refuses it: INTERNAL: something"),
    ):

        def refuse(reason=reason, **_):
            raise RuntimeError(reason)

        monkeypatch.setattr(gpus.topologies, "get_topology_desc", lambda refuse=refuse, **_: refuse())
        with pytest.raises(error, match=said):
            gpus.devices("h100:8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="the CUDA plugin is not installed")
def test_gpus_are_those_that_jax_lists_on_real_ones():
    """In a process of its own: the plugin must be told before JAX starts that there is no GPU."""
    code = (
        "from flaxmodels.perf import cells\n"
        "for name in ('h100:8', 'h200:2x8', 'b200:1', 'a100:4'):\n"
        "    (one,) = cells.targets([name])\n"
        "    print(name, len(one.devices), one.devices[0].device_kind, max(d.process_index for d in one.devices) + 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "h100:8 8 NVIDIA H100 80GB HBM3 1",
        "h200:2x8 16 NVIDIA H200 2",
        "b200:1 1 NVIDIA B200 1",
        "a100:4 4 NVIDIA A100-SXM4-80GB 1",
    ], done.stderr


# With libtpu


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slices", "chips", "hosts"),
    [
        ("v4:2x2x1", 1, 4, 1), ("v4:2x2x2", 1, 8, 2), ("v5e:1x1", 1, 1, 1), ("v5e:2x4", 1, 8, 1), ("v5e:4x4", 1, 16, 4),
        ("v5e:4x4", 2, 32, 8), ("v5p:1x1x1", 1, 1, 1), ("v5p:4x4x4", 1, 64, 16), ("v6e:4x4", 1, 16, 4),
        ("tpu7x:2x2x1", 1, 4, 1), ("tpu7x:2x2x4", 1, 16, 4),
    ],
)  # fmt: skip
def test_devices_are_those_that_jax_lists_on_real_ones(name, slices, chips, hosts):
    devices = topologies.devices(name, slices)
    kind = hardware.KINDS[devices[0].device_kind]
    assert kind.name == name.partition(":")[0] and {d.device_kind for d in devices} == {devices[0].device_kind}
    assert len(devices) == chips * kind.devices_per_chip
    assert len({(getattr(d, "slice_index", 0), d.process_index) for d in devices}) == hosts
    assert {getattr(d, "slice_index", 0) or 0 for d in devices} == set(range(slices))


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_memory_is_what_the_compiler_allows(name):
    """The table of `hardware`, against what libtpu says when a program is too large."""
    mesh = sharding.make_mesh(devices=topologies.devices(name))
    large = jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=NamedSharding(mesh, P()))
    with pytest.raises(compiled.DoesNotFitError, match=r"it needs .* on each.*, which has") as caught:
        compiled.compile_program(jax.jit(jnp.sum).lower(large), mesh)
    assert caught.value.needed >= 256 * GIB
    assert caught.value.limit == hardware.memory(mesh.devices.flat[0])


AXES = {"data": {}, "fsdp": dict(fsdp=8), "fsdp x tensor": dict(fsdp=4, tensor=2)}


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [pytest.param(axes, marks=[pytest.mark.nightly] * (len(axes) < 2)) for axes in AXES.values()],
    ids=AXES,
)
def test_the_transformer_compiles(axes):
    config = small.config(
        "transformer", mesh=axes or dict(data=8), data=dict(length=128, vocab_size=512, batch_size=32)
    )
    config["model"] = dict(name="transformer", layers=4, width=256, heads=4)
    made = job.assemble(config, devices=topologies.devices("v5e:2x4"))
    program, _ = compiled.compile_program(made.lower_train()[0], made.mesh)
    report = compiled.report(program, made)
    memory = report.memory
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made.abstract))
    share = math.prod(axes.values()) if axes else 1
    assert total / share <= memory.state <= 1.05 * total / share
    assert memory.state_is_donated and memory.state < memory.peak < memory.limit == 15.75 * GIB
    sent = {axis for row in report.collectives for axis in row.axes}
    assert sent == set(axes or {"data"}) and not report.notes
    if "fsdp" in axes:  # all parameters are gathered, going forward and back, layer by layer
        gathered = sum(row.bytes for row in report.collectives if row.axes == ("fsdp",))
        assert gathered > 2 * 2 * total / 3 / 4 / axes.get("tensor", 1)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [("gpt2_124m", "v5e:4x4"), ("llama3_8b", "v5p:4x4x4")])
def test_the_state_of_a_large_config_is_split_evenly(name, topology):
    made = job.assemble(load_config(ROOT / "configs" / f"{name}.py"), devices=topologies.devices(topology))
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made.abstract))
    share = total / made.mesh.shape["fsdp"]
    assert share <= compiled.on_a_device(made.abstract) <= 1.05 * share


@libtpu
@pytest.mark.slow
def test_a_config_file_is_compiled_and_shown(capsys):
    assert cli.main(["shardings", f"--config={ROOT}/configs/digits_mlp.py", "--topology=v5e:2x2", "--compile"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"compiled in \d+ s\n4 x TPU v5 lite: data=4; bytes of one device\n", said)
    assert "of 15.8 GiB: fits" in said and re.search(r"all-reduce .* x  along data", said)


@libtpu
@pytest.mark.slow
def test_evaluation_compiles_and_programs_are_not_stored():
    """JAX would store a program for a topology in its cache, and could not read it; here warnings are errors."""
    made = job.assemble(small.config("mlp"), devices=topologies.devices("v5e:2x4"))
    for _ in range(2):
        program, _ = compiled.compile_program(made.lower_eval()[0], made.mesh)
        assert program.memory_analysis().peak_memory_in_bytes > 0
