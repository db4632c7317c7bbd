"""What devices can do and cost: the table, the CPU at hand, the prices."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from flaxmodels import hardware
from flaxmodels.perf import chips, this_cpu
from flaxmodels.registry import UserError

PUBLISHED = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12, "A100": 312e12}


def device(kind, platform="tpu"):
    return SimpleNamespace(device_kind=kind, platform=platform)


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A CPU that is measured in no time; how often is counted."""
    found = []

    def measure(machine):
        found.append(machine)
        return this_cpu.Measured(machine, "2026-01-02", {"float32": 8e9}, 4e9)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(this_cpu, "_measure", measure)
    chips.measured_cpu.cache_clear()
    yield found
    chips.measured_cpu.cache_clear()


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_figures_are_of_a_device_and_have_a_source(chip):
    peak = chip.peak["bfloat16"] * chip.devices
    assert peak == pytest.approx(PUBLISHED.get(chip.name, peak)) and chip.devices == (2 if chip.name == "tpu7x" else 1)
    assert 100 < chip.peak["bfloat16"] / chip.bandwidth < 1000  # FLOPs that hide the read of a byte
    assert chip.slow_link < chip.link < chip.bandwidth and 0 < chip.efficiency < 1
    assert chip.memory == next(kind.usable for kind in hardware.KINDS.values() if kind.name == chip.name)
    assert chip.peak["float32 highest"] < chip.peak["float32 high"] <= chip.peak["float32"] <= chip.peak["bfloat16"]
    assert chip.source.startswith(("https://", "Nvidia")) and "efficiency" in chip.source
    assert (chip.torus > 0) == (chip.closes > 0) == ("tpu" in chip.source)


def test_a_device_is_known_by_its_kind():
    assert chips.of(device("TPU v5 lite")) is chips.CHIPS["v5e"] is chips.of(device("TPU v5e"))
    assert chips.of(device("NVIDIA H100 80GB HBM3", "gpu")) is chips.CHIPS["H100"]


def test_one_that_is_not_known_is_refused_by_name():
    with pytest.raises(UserError, match=r"'NVIDIA H100 PCIe' can do is not known.*NVIDIA H100 80GB HBM3"):
        chips.of(device("NVIDIA H100 PCIe", "gpu"))
    with pytest.raises(UserError, match="'TPU v3'"):  # has a memory, and no data sheet here
        chips.of(device("TPU v3"))


def test_a_dtype_that_the_data_sheet_lacks_is_computed_in_the_next_that_it_has():
    v5e, h100, a100 = (chips.CHIPS[name] for name in ("v5e", "H100", "A100"))
    assert v5e.flops("float16") == v5e.flops("bfloat16") == 197e12
    assert v5e.flops("float8_e4m3fn") == 197e12 and v5e.flops("uint8") == v5e.peak["int8"] == 393e12
    assert h100.flops("float8_e5m2") == h100.peak["float8"] and a100.flops("float8_e5m2") == a100.peak["bfloat16"]
    assert chips.CHIPS["tpu7x"].flops("int8") == chips.CHIPS["tpu7x"].peak["bfloat16"]
    assert h100.flops("float64") == h100.peak["float32 highest"] == min(h100.peak.values())


def test_simulated_devices_share_the_machine(cpu):
    one, eight = chips.measured_cpu(1), chips.of(jax.devices()[0])
    assert one.peak["float32"] == 8e9 == 8 * eight.peak["float32"] and one.bandwidth == 4e9 == 8 * eight.bandwidth
    assert eight.devices == 8 and one.memory // 8 == pytest.approx(eight.memory, abs=1)
    assert one.link == one.slow_link == 2e9  # a copy is read and written
    assert one.name == chips.CPU and "2026-01-02" in one.source and len(cpu) == 1


def test_the_cpu_is_measured_once_and_kept(cpu, tmp_path):
    for _ in range(2):
        chips.measured_cpu(2)
        chips.measured_cpu.cache_clear()
    assert len(cpu) == 1 and [path.name for path in (tmp_path / "flaxmodels").iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("kept", ["", "[]", "{", '{"a": 1}', '{"a": {"peak": {}}}'])
def test_a_file_that_is_not_ours_is_measured_anew(cpu, tmp_path, kept):
    (tmp_path / "flaxmodels").mkdir()
    (tmp_path / "flaxmodels" / "cpu.json").write_text(kept)
    assert chips.measured_cpu(1).bandwidth == 4e9 and len(cpu) == 1


def test_another_machine_with_the_same_home_keeps_its_own(cpu, tmp_path):
    other = this_cpu.Measured("another", "2025-05-05", {"float32": 1.0}, 1.0)
    (tmp_path / "flaxmodels").mkdir()
    path = tmp_path / "flaxmodels" / "cpu.json"
    path.write_text(json.dumps({"another": dataclasses.asdict(other)}))
    assert chips.measured_cpu(1).bandwidth == 4e9
    assert json.loads(path.read_text())["another"] == dataclasses.asdict(other)


def test_a_home_that_cant_be_written_is_no_error(cpu, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    assert chips.measured_cpu(1).bandwidth == 4e9


@pytest.mark.slow
def test_this_cpu_multiplies_and_copies(monkeypatch, tmp_path):
    monkeypatch.setattr(this_cpu, "SIDE", 128)
    monkeypatch.setattr(this_cpu, "SIZE", 2**20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = this_cpu.measured()
    assert 1e8 < found.peak["float32"] < 1e14 and found.peak["bfloat16"] > 0 and 1e8 < found.bandwidth < 1e13
    assert found == this_cpu.measured()


def test_every_chip_but_the_newest_has_a_price_with_its_date():
    for name in set(chips.CHIPS) - {"tpu7x"}:
        found = chips.price(name)
        assert 0 < found.spot < found.on_demand and found.date >= "2026-01-01" and found.source
    assert chips.price("tpu7x") == chips.price(chips.CPU) == chips.Price()


def test_prices_of_ones_own_override_each_by_itself(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text("[v5e]\nspot = 0.1\n[cpu]\non_demand = 0.05\ndate = 2027-01-01\n")
    found, ours = chips.price("v5e", path), chips.price("v5e")
    assert found == dataclasses.replace(ours, spot=0.1) and ours.date
    assert chips.price("v5e", path, spot=True) == dataclasses.replace(found, date="", source=""), "not of our date"
    assert chips.price("v4", str(path)) == chips.price("v4")
    assert chips.price("cpu", path) == chips.Price(on_demand=0.05, date="2027-01-01")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[v5]\non_demand = 1", "no chip 'v5'. Did you mean 'v5"),
        ("[v5e]\nondemand = 1", "v5e: unknown key 'ondemand'. Did you mean 'on_demand'"),
        ("[v5e]\nspot = -1", "spot=-1 is not a price"),
        ("[v5e]\nspot = true", "spot=True is not a price"),
        ("[v5e]\nspot = nan", "spot=nan is not a price"),
        ("v5e = 1", "1 is not a table"),
        ("[v5e", "can't be read"),
    ],
)
def test_bad_prices_are_named(tmp_path, text, said):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        chips.price("v5e", path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        chips.price("v5e", tmp_path / "none.toml")
