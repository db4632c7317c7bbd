"""The block at the start of a run: what it runs on, with what, and where things lie."""

import dataclasses
import importlib.metadata
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxmodels
from flaxmodels import banner, job, sharding
from flaxmodels.runtime import compile_cache

V5E = "TPU v5 lite"


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as is looked at."""

    device_kind: str
    process_index: int = 0
    coords: tuple = (0, 0, 0)
    slice_index: int = 0
    platform: str = "tpu"

    @property
    def client(self):
        return types.SimpleNamespace(local_devices=list)


def slices(kind, sides, *, hosts=1, count=1, cores=1):
    """Devices of so many slices of a TPU, dealt out to hosts in their order."""
    found = [
        Chip(kind, coords=tuple(map(int, at)), slice_index=number)
        for number in range(count)
        for at in np.ndindex(*sides)
        for _ in range(cores)
    ]
    each = len(found) // hosts
    return [dataclasses.replace(chip, process_index=i // each) for i, chip in enumerate(found)]


def mesh(devices):
    return types.SimpleNamespace(devices=np.array(devices, dtype=object))


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        (slices(V5E, (4, 4, 1)), "v5e:4x4"),
        (slices(V5E, (1, 1, 1)), "v5e:1x1"),
        (slices("TPU v6 lite", (2, 4, 1), count=2), "2 x v6e:2x4"),
        (slices("TPU v5", (2, 2, 4)), "v5p:2x2x4"),
        (slices("TPU v4", (2, 2, 1)), "v4:2x2x1"),
        (slices("TPU v3", (2, 2, 1), cores=2), "v3:2x2"),
        (slices(V5E, (4, 4, 1))[:9], ""),  # a part of a slice
        ([*slices(V5E, (2, 2, 1)), Chip(V5E, slice_index=1)], ""),
        (slices("TPU v99", (2, 2, 1)), ""),
        ([Chip("cpu", platform="cpu")], ""),
    ],
)
def test_the_topology_is_named_as_plan_does(devices, name):
    assert banner.topology(devices) == name
    assert banner.topology(devices[::-1]) == name


SLICES = ["v5e:4x4", "v5p:2x2x2", "v6e:2x2", "v4:2x2x2"]
REAL = """
import sys
from flaxmodels import banner
from flaxmodels.perf import topologies
for name in sys.argv[1:]:
    print(banner.topology(topologies.devices(name)), banner.topology(topologies.devices(name, 2)), sep=",")
"""


@pytest.mark.slow
def test_the_topology_of_what_libtpu_makes(run):
    pytest.importorskip("libtpu")
    done = run("-c", REAL, *SLICES)
    assert done.stdout.split("\n")[:-1] == [f"{name},2 x {name}" for name in SLICES], done.stderr


NAMES = [f"w-{number}" for number in range(8)]


@pytest.mark.parametrize(
    ("devices", "hosts", "said"),
    [
        (
            slices(V5E, (4, 4, 1), hosts=4), NAMES[:4],
            ["hosts: 4 x 4 chips (w-0, w-1, w-2 and 1 more)", f"chips: 16 x {V5E}, 15.8 GiB each, topology v5e:4x4"],
        ),
        (
            slices("TPU v3", (2, 2, 1), cores=2), NAMES[:1],
            ["hosts: 1 x 4 chips (w-0)", "chips: 4 x TPU v3, 31.0 GiB each, topology v3:2x2"],
        ),
        (
            [Chip("NVIDIA H200", number, platform="gpu") for number in (0, 1)], NAMES[:1] * 2,
            ["hosts: 1, 2 processes x 1 chip (w-0)", "chips: 2 x NVIDIA H200, 105.3 GiB each"],
        ),
        ([Chip("cpu", platform="cpu")], NAMES[:1], ["hosts: 1 x 1 device (w-0)"]),
        ([Chip("cpu", platform="cpu")] * 8, NAMES[:1], ["hosts: 1 x 8 devices (w-0)"]),
        ([Chip("cpu", n, platform="cpu") for n in (0, 0, 1)], NAMES[:2], ["hosts: 2 x 1 to 2 devices (w-0, w-1)"]),
        (
            [Chip("cpu", n, platform="cpu") for n in (0, 0, 1, 1)], NAMES[:1],
            ["hosts: 2 processes x 2 devices; this is process 0, on w-0"],
        ),
    ],
)  # fmt: skip
def test_hosts_and_chips(devices, hosts, said):
    assert list(banner.machines(mesh(devices), hosts)) == said


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_versions(monkeypatch):
    found = list(banner.versions(sharding.make_mesh(devices=jax.devices()[:1])))
    assert found[0] == f"flaxmodels {flaxmodels.__version__}" and f"jax {jax.__version__}" in found
    assert [part.split()[0] for part in found] == ["flaxmodels", "jax", "jaxlib", "flax", "optax", "orbax", "Python"]
    assert not any("?" in part for part in found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"libtpu": "0.0.42"}[name])
    assert "libtpu 0.0.42" in banner.versions(mesh([Chip("TPU v4")]))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert [part.split()[0] for part in banner.versions(mesh([Chip("TPU v4")]))][-2:] == ["orbax", "Python"]


def test_the_revision():
    assert banner.code(None) == ""
    assert banner.code({"revision": "0123456789abcdef", "dirty": False}) == "; git 0123456789"
    assert banner.code({"revision": "0123456789abcdef", "dirty": True}) == "; git 0123456789 with changes"


def test_where_things_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "place", lambda: "")
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/sets")
    assert list(banner.places({"name": "synthetic_tokens"}, tmp_path, 1)) == ["caches: compiled programs are not kept"]
    monkeypatch.setattr(compile_cache, "place", lambda: "/kept")
    caches = "caches: compiled programs in /kept, data sets in /data/sets"
    assert list(banner.places({"name": "mnist"}, tmp_path, 1)) == [caches]
    logs = f"logs: {tmp_path}/logs/host-0000.log to host-0015.log"
    assert list(banner.places({"name": "mnist"}, tmp_path, 16)) == [logs, caches]
    assert banner.data_folders({"name": "mnist", "data_dir": "/other"}) == ["/other"]
    assert banner.data_folders({"name": "package.module:mine", "sources": ["a"]}) == []
    parts = [{"name": "mnist"}, {"name": "digits", "weight": 2}, {"name": "text"}, {"name": "tfds", "data_dir": "/b"}]
    assert banner.data_folders({"name": "mixture", "sources": parts}) == ["/data/sets", "/b"]


def test_a_workdir_in_a_bucket_has_a_folder_here(monkeypatch):
    monkeypatch.setattr(banner.storage, "is_object", lambda path: True)
    monkeypatch.setenv("XDG_CACHE_HOME", "/here")
    logs, mirrored, caches = banner.places({"name": "synthetic_tokens"}, Path("bucket/run"), 2)
    assert logs == "logs: bucket/run/logs/host-0000.log to host-0001.log"
    assert re.fullmatch(r"mirror: /here/flaxmodels/\S+ is copied there every 15 s", mirrored)
    assert caches.startswith("caches: ")


def test_the_whole_block():
    config = {"model": {"name": "mlp", "hidden": (4,)}, "data": {"name": "synthetic_images", "batch_size": 8}}
    rest = {"optim": {"name": "sgd", "learning_rate": 0.1}, "train": {"duration": 1}}
    made = job.assemble(config | rest, jax.devices()[:1])
    found = banner.lines(made, Path("runs/a"), 40)
    words = [line.partition(":")[0] for line in found]
    assert words[:3] == ["hosts", "versions", "mesh"] and words[-2:] == ["workdir", "caches"]
    assert "workdir: runs/a, resumed at step 40" in found and all(note in found for note in made.notes)
    assert "workdir: runs/a" in banner.lines(made, Path("runs/a"), 0)
