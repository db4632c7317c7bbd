"""What is known of accelerators: by asking those that are there, and from a table for those that are not."""

import os
from types import SimpleNamespace

import jax
import pytest

from flaxmodels import hardware

GIB = 2**30


class Fake(SimpleNamespace):
    def memory_stats(self):
        return self.stats


def device(kind, own=(), platform="tpu", stats=None):
    """A device of a client whose process has the devices `own`."""
    client = SimpleNamespace(local_devices=lambda: list(own))
    return Fake(device_kind=kind, platform=platform, client=client, stats=stats)


def test_a_cpu_says_nothing():
    assert hardware.memory(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("kind", "gib"),
    [("TPU v4", 30.75), ("TPU v5 lite", 15.75), ("TPU v5", 95.74), ("TPU v6 lite", 31.25), ("TPU7x", 94.75)],
)
def test_a_device_that_is_not_there_is_known_by_its_kind(kind, gib):
    assert hardware.memory(device(kind)) == int(gib * GIB)


def test_a_device_that_is_there_says_itself():
    own = device("TPU v5 lite", stats={"bytes_limit": 7 * GIB})
    assert hardware.memory(device("TPU v5 lite", [own])) == 7 * GIB


def test_a_device_of_another_process_is_as_large_as_this_ones():
    """All processes must come to one answer, or they would choose different meshes."""
    own = device("NVIDIA H200", platform="gpu", stats={"bytes_limit": 60 * GIB})
    assert hardware.memory(device("NVIDIA H200", [own], platform="gpu")) == 60 * GIB


def test_a_device_that_does_not_say_is_known_by_its_kind():
    assert hardware.memory(device("TPU v4", [device("TPU v4", stats=None)])) == int(30.75 * GIB)
    assert hardware.memory(device("TPU v4", [device("TPU v4", stats={})])) == int(30.75 * GIB)


def test_an_unknown_kind_is_unknown():
    assert hardware.memory(device("NVIDIA GeForce RTX 4090", platform="gpu")) is None


@pytest.mark.parametrize("kind", hardware.KINDS)
def test_a_program_gets_less_than_the_data_sheet_says(kind):
    known = hardware.KINDS[kind]
    if kind.startswith("TPU"):
        assert 0.9 < known.usable / known.memory < 1
    else:
        assert known.usable == pytest.approx(0.75 * known.memory, abs=1) and known.devices_per_chip == 1


def test_the_cache_folder_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hardware.cache_folder() == tmp_path / "flaxmodels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hardware.cache_folder() == tmp_path / ".cache" / "flaxmodels"


def test_libtpu_is_told_that_there_is_no_tpu(monkeypatch):
    monkeypatch.setattr(hardware, "DEVICES", ())
    monkeypatch.setattr(os, "environ", {"TPU_LOG_DIR": "/elsewhere"})
    hardware.quiet_libtpu()
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1" and os.environ["TPU_LOG_DIR"] == "/elsewhere"


def test_on_a_machine_with_a_tpu_the_environment_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(hardware, "DEVICES", ((tmp_path, "accel*"),))
    monkeypatch.setattr(os, "environ", {})
    hardware.quiet_libtpu()
    assert os.environ == {}
