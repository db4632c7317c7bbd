"""The least time of a step: three roofs, and how long a ring takes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from flaxmodels.perf import roofline
from flaxmodels.perf.chips import CHIPS
from flaxmodels.perf.collectives import TRANSFER
from flaxmodels.perf.compiled import Row
from flaxmodels.perf.count import Count

V5E, V5P, H100 = (CHIPS[name] for name in ("v5e", "v5p", "H100"))


def mesh(axes, sides=None, slices=1, platform="tpu", nodes=1):
    """Devices in order on a mesh with these axes: on a torus with these sides in each slice, or in nodes."""
    size = math.prod(axes.values())
    places = list(np.ndindex(*sides)) if sides else [None] * (size // slices)
    found = [
        SimpleNamespace(
            platform=platform, coords=None if place is None else (*place, 0)[:3], slice_index=k,
            process_index=(k * len(places) + i) // (size // nodes),
        )
        for k in range(slices)
        for i, place in enumerate(places)
    ]  # fmt: skip
    grid = np.empty(size, object)
    grid[:] = found
    return SimpleNamespace(
        devices=grid.reshape(*axes.values()), axis_names=tuple(axes), shape=dict(axes), size=size,
    )  # fmt: skip


def work(flops=0.0, moved=0.0, dtype="bfloat16"):
    return Count({dtype: flops} if flops else {}, 0.0, moved, {})


def row(kind, axes, size, count=1):
    return Row(kind, axes, True, count, size)


ONE = mesh({"data": 1}, (1, 1))


def test_computing_bounds_where_it_takes_longest():
    found = roofline.roofline(work(197e12, 8.19e11 / 2), work(197e12), [], V5E, ONE, examples=10, tokens=1000)
    assert (found.seconds, found.compute, found.memory, found.network) == (1.0, 1.0, 0.5, 0.0)
    assert found.bound == "compute" and found.mfu == 1.0
    assert (found.examples_per_second, found.tokens_per_second) == (10, 1000)


def test_memory_bounds_where_it_takes_longest_and_the_mfu_falls():
    found = roofline.roofline(work(197e12, 8.19e11 * 4), work(197e12), [], V5E, ONE, examples=10)
    assert found.bound == "memory" and found.seconds == 4 and found.mfu == 0.25
    assert found.examples_per_second == 2.5 and found.tokens_per_second is None


def test_what_is_computed_twice_takes_time_and_is_no_use():
    found = roofline.roofline(work(4 * 197e12), work(3 * 197e12), [], V5E, ONE, examples=1)
    assert found.compute == 4 and found.mfu == 0.75


def test_each_dtype_has_its_own_peak_and_devices_share_the_work():
    mixed = Count({"bfloat16": 197e12, "int8": 393e12, "float32 highest": 197e12 / 6}, 0, 0, {})
    four = mesh({"data": 4}, (2, 2))
    assert roofline.compute_seconds(mixed, V5E, 1) == pytest.approx(3)
    assert roofline.roofline(mixed, mixed, [], V5E, four, 1).seconds == pytest.approx(3 / 4)
    assert roofline.mfu(work(197e12), 2.0, V5E, 1) == 0.5


def test_nothing_takes_no_time():
    found = roofline.roofline(work(), work(), [], V5E, ONE, 1)
    assert found.seconds == 0 and found.mfu == 0 and found.examples_per_second == math.inf


def test_a_ring_sends_all_but_its_own_part_and_an_all_reduce_twice():
    nodes = mesh({"data": 8}, platform="gpu")
    part = 7 / 8 * 450e9 / H100.link
    for kind, times in (("all-gather", 1), ("reduce-scatter", 1), ("all-to-all", 1), ("all-reduce", 2)):
        assert roofline.network_seconds(row(kind, ("data",), 450e9), H100, nodes) == pytest.approx(times * part)
    assert roofline.network_seconds(row("collective-permute", ("data",), 450e9), H100, nodes) == 1


def test_the_network_bounds_where_it_takes_longest():
    nodes = mesh({"data": 8}, platform="gpu")
    rows = [row("all-reduce", ("data",), 450e9), row("all-gather", ("data",), 450e9)]
    found = roofline.roofline(work(1e12, 1e9), work(1e12), rows, H100, nodes, 1)
    assert found.bound == "network" and found.seconds == found.network == pytest.approx(3 * 7 / 8)


def test_an_axis_uses_the_links_of_the_dimensions_that_it_lies_on():
    """4x4 of v5e is a part of a torus that does not close: of 4 links, 2 are used; along one side, 1."""
    torus = mesh({"data": 4, "fsdp": 4}, (4, 4))
    links = {
        axes: 4 * 3 / 4 / roofline.network_seconds(row("all-gather", axes, 4), V5E, torus)
        for axes in (("data",), ("fsdp",))
    }
    assert links == {("data",): pytest.approx(V5E.link / 4), ("fsdp",): pytest.approx(V5E.link / 4)}
    both = roofline.network_seconds(row("all-gather", ("data", "fsdp"), 16), V5E, torus)
    assert both == pytest.approx(15 / (V5E.link / 2))


def test_a_side_that_closes_to_a_ring_is_used_both_ways():
    whole = mesh({"data": 256}, (16, 16))
    assert roofline.network_seconds(row("all-gather", ("data",), 256), V5E, whole) == pytest.approx(255 / V5E.link)
    cube = mesh({"data": 4, "fsdp": 16}, (4, 4, 4))
    assert roofline.network_seconds(row("all-gather", ("data",), 4), V5P, cube) == pytest.approx(3 / (V5P.link / 3))


def test_across_slices_each_device_exchanges_what_it_has_over_the_slower_network():
    both = mesh({"data": 2, "fsdp": 16}, (4, 4), slices=2)
    between = row("all-reduce", ("data",), 1e9)
    assert roofline.network_seconds(between, V5E, both) == pytest.approx(2 * 1e9 / 2 / V5E.slow_link)
    all_of_it = row("all-reduce", ("data", "fsdp"), 1e9)
    within = 1e9 * 15 / 16 / (V5E.link / 2)
    assert roofline.network_seconds(all_of_it, V5E, both) == pytest.approx(2 * (within + 1e9 / 16 / 2 / V5E.slow_link))
    assert roofline.network_seconds(row(TRANSFER, (), 1e9), V5E, both) == 1e9 / V5E.slow_link


def test_nodes_of_gpus_are_joined_by_the_slower_network():
    nodes = mesh({"data": 16}, platform="gpu", nodes=2)
    expected = 1e9 * 7 / 8 / H100.link + 1e9 / 8 / 2 / H100.slow_link
    assert roofline.network_seconds(row("all-gather", ("data",), 1e9), H100, nodes) == pytest.approx(expected)


def test_a_collective_whose_axes_are_not_known_is_among_all():
    four = mesh({"data": 2, "fsdp": 2}, platform="gpu")
    known, unknown = (
        roofline.network_seconds(row("all-gather", axes, 8), H100, four) for axes in (("data", "fsdp"), ())
    )
    assert known == unknown == 8 * 3 / 4 / H100.link


def test_two_devices_of_one_chip_use_all_that_joins_them():
    chip = mesh({"data": 2}, (1, 1, 1, 2))
    for device in chip.devices.flat:
        device.coords = (0, 0, 0)
    found = roofline.network_seconds(row("all-gather", ("data",), 2), CHIPS["tpu7x"], chip)
    assert found == 1 / CHIPS["tpu7x"].link
