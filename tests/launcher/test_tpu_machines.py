"""The table of accelerator types, held against what the planner knows of the same chips."""

import math
import tomllib

import pytest

from tpu import machines
from tpu.settings import UserError


def test_hosts_chips_and_topologies_of_types_that_people_use():
    found = {name: (one.chips, one.hosts, one.topology) for name, one in machines.TYPES.items()}
    assert found["v5litepod-1"] == (1, 1, "v5e:1x1")
    assert found["v5litepod-8"] == (8, 1, "v5e:2x4")
    assert found["v5litepod-16"] == (16, 4, "v5e:4x4")
    assert found["v5litepod-256"] == (256, 64, "v5e:16x16")
    assert found["v4-8"] == (4, 1, "v4:2x2x1")
    assert found["v4-16"] == (8, 2, "v4:2x2x2")
    assert found["v4-32"] == (16, 4, "v4:2x2x4")
    assert found["v5p-16"] == (8, 2, "v5p:2x2x2")
    assert found["v6e-8"] == (8, 1, "v6e:2x4")


def test_every_type_is_what_the_planner_makes_of_its_name_and_chips():
    from flaxmodels import hardware
    from flaxmodels.perf import chips, topologies

    kinds = {kind.name: kind for kind in hardware.KINDS.values()}
    for name, machine in machines.TYPES.items():
        version, shape = topologies.parse(machine.topology)
        assert version == machine.chip
        assert math.prod(shape) == machine.chips
        assert machine.peak == chips.CHIPS[machine.chip].peak["bfloat16"]
        assert machine.hbm == kinds[machine.chip].memory
        assert machine.chips / machine.hosts in (1, 4, 8)
        if name not in ("v4-1536", "v5p-1536"):  # which it does not know by its number
            assert topologies._meant(name) == machine.topology


@pytest.mark.parametrize(
    ("name", "near"),
    [("v5e-16", "v5litepod-16"), ("v5litepod-17", "v5litepod-16"), ("v4-9", "v4-8"), ("V6E-8", "v6e-8"),
     ("trillium-64", "v6e-64"), ("v5-8", "v5p-8"), ("v5litepood-16", "v5litepod-16"), ("v6e-1024", "v6e-256")],
)  # fmt: skip
def test_a_type_that_is_none_is_answered_with_the_nearest(name, near):
    with pytest.raises(UserError, match=f"--type='{name}' .* Did you mean '{near}'"):
        machines.of(name)


def test_a_type_of_a_version_that_this_can_not_create_says_so():
    with pytest.raises(UserError, match="creates none of that version"):
        machines.of("tpu7x-8")


def test_a_zone_that_is_known_for_a_chip_needs_no_hint():
    machine = machines.of("v5litepod-16")
    assert machines.offered(machine, "us-west4-a") == ""
    assert "us-west4-a" in machines.offered(machine, "us-east1-d")


def test_prices_are_those_of_the_planner_per_chip():
    ours = tomllib.loads(machines.PRICES.read_text())["v5e"]
    machine = machines.of("v5litepod-16")
    assert machines.price(machine, "spot") == ours["spot"]
    assert machines.price(machine, "on demand") == machines.price(machine, "reserved") == ours["on_demand"]


def test_a_file_of_the_users_own_counts_before_them(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[v5e]\nspot = 0.1\nreserved = 0.5\n")
    machine = machines.of("v5litepod-16")
    assert machines.price(machine, "spot", own) == 0.1
    assert machines.price(machine, "reserved", own) == 0.5
    assert machines.price(machine, "on demand", own) == machines.price(machine, "on demand")
    assert machines.price(machines.of("v4-8"), "spot", own) == machines.price(machines.of("v4-8"), "spot")


@pytest.mark.parametrize("text", ["[v5e]\nspot = 'x'", "[v5e]\nspot = -1", "[v5e]\nspot = nan", "v5e = 1", "["])
def test_a_file_of_prices_that_is_wrong_is_named(tmp_path, text):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(UserError, match=r"own\.toml"):
        machines.price(machines.of("v5litepod-16"), "spot", own)


def test_a_chip_without_a_price_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "PRICES", tmp_path / "empty.toml")
    (tmp_path / "empty.toml").touch()
    assert machines.price(machines.of("v4-8"), "spot") is None
