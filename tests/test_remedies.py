"""The smallest change that fits: of the kind that alters results least, as small as it can be, and compiled."""

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import small

from flaxmodels import memory, sections
from flaxmodels.memory import DoesNotFitError, Memory, OutOfMemoryError
from flaxmodels.perf import cache, cells, levers, remedies, rescue
from flaxmodels.perf.cells import Cell, Target
from flaxmodels.perf.chips import CHIPS, CPU

LIMIT = 1_000_000
KEPT = {"none": 1.0, "dots": 0.6, "nothing": 0.3}
TRANSFORMER = dict(name="transformer", layers=2, width=32, heads=2)


pytestmark = pytest.mark.usefixtures("looked_once")


def target(count=1):
    return Target("machine", jax.devices()[:count], CHIPS["v5e"])


class Machine:
    """A measure whose memory follows from the config as one would have it, with so many bytes of each class.

    Working memory is of an example, where nothing is saved; `logits` are a share of it that chunks divide.
    """

    def __init__(self, parameters=0, working=0, logits=0.0, data=0):
        self.sizes, self.asked = (parameters, working, logits, data), []

    def __call__(self, config, devices, changes):
        self.asked.append(dict(changes))
        return self.cell(config, devices, changes)

    def cell(self, config, devices, changes):
        parameters, working, logits, data = self.sizes
        values = {key: value for key, value, _ in sections.resolved(cells.changed(config, changes))}
        axes = {axis: values[f"mesh.{axis}"] for axis in ("fsdp", "sequence", "tensor")}
        axes["data"] = values["mesh.data"] or max(len(devices.devices) // math.prod(axes.values()), 1)
        if math.prod(axes.values()) != len(devices.devices):
            return Cell("machine", dict(changes), refusal="mesh: other devices")
        size, micro = values["data.batch_size"], values["train.microbatches"]
        if size % (axes["data"] * axes["fsdp"] * micro):
            return Cell("machine", dict(changes), refusal="data.batch_size does not divide")
        shards = axes["fsdp"] * axes["sequence"] * axes["tensor"]
        held, bits = parameters // shards, 2 if values["optim.moments"] == "bfloat16" else 4
        one = size * working / (math.prod(axes.values()) * micro)
        kept = one * (1 - logits) * KEPT[values.get("model.remat", "none")] + one * logits / values["loss.chunks"]
        data = data if values["data.placement"] != "host" else 0
        sums = held if micro > 1 else 0
        found = Memory(held, held + held * bits // 4, 0, 0, data, held + sums + int(kept), 0, 0, 0, LIMIT)
        peak = found.state + found.data + found.temporaries
        found = Memory(**{**vars(found), "peak": peak})
        return Cell(
            "machine", dict(changes), axes, size, found, gradients=held, activations=int(kept), fits=peak <= LIMIT,
            over=max(peak - LIMIT, 0),
        )  # fmt: skip


def smallest(machine, config, count=1, **options):
    return remedies.smallest_change(config, target(count), measure=machine, **options)


MLP = small.config("mlp", data=dict(batch_size=64))
NET = small.config("transformer", data=dict(batch_size=64)) | dict(model=TRANSFORMER)


@pytest.mark.parametrize(
    ("config", "count", "machine", "changes"),
    [
        (MLP, 1, Machine(working=10_000), {}),
        (MLP, 1, Machine(working=10_000, data=500_000), {"data.placement": "host"}),
        pytest.param(NET, 1, Machine(working=20_000), {"model.remat": "dots"}, marks=pytest.mark.slow),
        pytest.param(NET, 1, Machine(working=40_000), {"model.remat": "nothing"}, marks=pytest.mark.slow),
        pytest.param(NET, 1, Machine(working=40_000, logits=0.75), {"loss.chunks": 8}, marks=pytest.mark.slow),
        pytest.param(NET, 1, Machine(working=80_000), {"train.microbatches": 8}, marks=pytest.mark.slow),
        (MLP, 1, Machine(working=20_000), {"train.microbatches": 2}),
        (MLP, 1, Machine(working=400_000), {"train.microbatches": 32}),
        (MLP, 4, Machine(400_000), {"mesh.fsdp": 2}),
        (MLP, 4, Machine(1_000_000), {"mesh.fsdp": 4}),
        (MLP, 1, Machine(260_000), {"optim.moments": "bfloat16"}),
    ],
)
def test_one_change_that_suffices(config, count, machine, changes):
    found, cell = smallest(machine, config, count)
    assert found == changes == cell.changes and cell.fits and found in machine.asked
    said = remedies.sentence((found, cell))
    assert ("It fits as it is" if not changes else remedies.flags(changes)) in said and "976.6 KiB" in said
    assert len(machine.asked) == len({str(changes) for changes in machine.asked}) <= 8  # nothing is compiled twice


def test_several_changes_none_of_which_could_be_left_out_or_smaller():
    machine = Machine(200_000, working=100_000)
    found, cell = smallest(machine, MLP)
    assert cell.fits and found == {"train.microbatches": 64, "optim.moments": "bfloat16"}
    for number in range(len(found)):
        for part in itertools.combinations(found.items(), number):
            assert not machine.cell(MLP, target(), dict(part)).fits
    seen = levers.look(MLP, target())
    for lever in levers.savers(seen, cell.mesh):
        for weaker, own in itertools.pairwise(lever.steps):
            if found.get(lever.name) == own[lever.name]:
                assert not machine.cell(MLP, target(), {**found, **weaker}).fits


def test_the_batch_changes_last():
    """Microbatches need memory for their sum, which there is not; nor are the moments large enough."""
    machine = Machine(225_000, working=5_000)
    assert smallest(machine, MLP)[0] == {"data.batch_size": 16}
    assert {"optim.moments": "bfloat16"} in machine.asked


def test_what_can_never_fit():
    machine = Machine(parameters=10**7)
    assert smallest(machine, MLP) is None and "No change" in remedies.sentence(None)
    assert len(machine.asked) <= 12


def test_a_config_that_is_refused_for_another_reason():
    machine = Machine()
    config = small.config("mlp", mesh=dict(fsdp=16))
    assert smallest(machine, config) is None and machine.asked == [{}]


def test_no_compilation_begins_after_the_time():
    machine = Machine(parameters=220_000, working=400_000)
    assert smallest(machine, MLP, seconds=0) is None and machine.asked == [{}]


def test_a_limit_of_ones_own():
    machine = Machine(working=10_000)
    assert smallest(machine, MLP)[0] == {}
    found, cell = smallest(machine, MLP, limit=200_000)
    assert found == {"train.microbatches": 4} and cell.memory.peak <= 200_000
    assert "156.2 KiB of 195.3 KiB" in remedies.sentence((found, cell), 200_000)


@pytest.fixture
def here(monkeypatch):
    """The CPU at hand, whose speed nobody measures."""
    found = Target("cpu", jax.devices()[:1], dataclasses.replace(CHIPS["v5e"], name=CPU))
    monkeypatch.setattr(cells, "targets", lambda names: [found])
    return found


@pytest.mark.slow
def test_a_run_without_memory_ends_with_a_change_that_was_compiled(capsys, here):
    """On the CPU at hand, with the compiler: less than what the step takes."""
    config = small.config("mlp", data=dict(batch_size=8192), mesh=dict(platform="cpu"))
    limit = cells.cell(config, here).memory.peak * 3 // 4
    with pytest.raises(OutOfMemoryError) as caught, rescue.offered(config):
        raise OutOfMemoryError(f"out of memory.\n{memory.ADVICE}", limit)
    said = str(caught.value)
    assert "The smallest change that fits: --config.train.microbatches=" in said and memory.ADVICE not in said
    flag = said.partition("--config.")[2].split()[0].partition("=")
    assert cells.cell(config, here, {flag[0]: int(flag[2])}).memory.peak <= limit
    assert "looking for the smallest change" in capsys.readouterr().err


@pytest.mark.nightly
def test_what_can_not_fit_a_tpu_and_the_change_that_does(monkeypatch, tmp_path):
    """Both are compiled for one chip of a v5e: activations of a million examples, then of half of them at a time."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = dict(batch_size=2**20, examples=2**20)
    config = small.config("mlp", data=batch) | dict(model=dict(name="mlp", hidden=(4096, 4096)))
    (chip,) = cells.targets(["v5e:1x1"])
    assert not cells.cell(config, chip).fits
    changes, cell = remedies.smallest_change(config, chip)
    assert changes == {"train.microbatches": 2} and cell.fits and cell.memory.peak < cell.memory.limit


SCRIPT = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
import small, sys
from flaxmodels import loop
from flaxmodels.perf import rescue
if __name__ == "__main__":
    changes = dict(word.partition("=")[::2] for word in sys.argv[2:])
    config = small.config(
        "mlp", data=dict(batch_size=131072, examples=131072),
        train=dict(duration=1, microbatches=int(changes.get("--config.train.microbatches", 1))),
    ) | dict(model=dict(name="mlp", hidden=(4096,)))
    with rescue.offered(config):
        loop.fit(config, sys.argv[1])
"""


@pytest.mark.nightly
def test_a_process_whose_memory_is_limited_runs_with_the_change_that_it_was_told(tmp_path):
    def run(name, *words):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), *words]
        env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}", "XLA_FLAGS": ""}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)

    failed = run("first")
    assert failed.returncode == 1 and "OutOfMemoryError: out of memory on 1 x cpu" in failed.stderr
    words = re.search(r"The smallest change that fits: (.*)", failed.stderr)[1].split()
    assert len(words) == 1 and words[0].startswith("--config.train.microbatches=")
    done = run("second", *words)
    assert done.returncode == 0 and "finished: all steps made" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ValueError("another"),
        OutOfMemoryError(f"on a host of which nobody knows.\n{memory.ADVICE}"),
        OutOfMemoryError(f"nothing will do.\n{memory.ADVICE}", 1),
    ],
)
def test_where_there_is_nothing_to_offer_the_error_passes(error, monkeypatch, here):
    monkeypatch.setattr(remedies, "smallest_change", lambda *args, **options: None)
    before = str(error)
    with pytest.raises(type(error)) as caught, rescue.offered(MLP):
        raise error
    assert caught.value is error and str(error) == before


def test_ctrl_c_while_it_looks_leaves_the_error(monkeypatch, here):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    looked = []
    monkeypatch.setattr(cache, "look_again", lambda: looked.append(1))
    monkeypatch.setattr(remedies, "smallest_change", interrupted)
    with pytest.raises(DoesNotFitError, match="general advice") as caught, rescue.offered(MLP):
        raise DoesNotFitError("general advice", 2, 1)
    assert caught.value.limit == 1 and looked, "data may have changed since another look"


def test_one_process_of_several_does_not_look(monkeypatch):
    monkeypatch.setattr(remedies, "smallest_change", lambda *args, **options: pytest.fail("it looked"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(DoesNotFitError), rescue.offered(MLP):
        raise DoesNotFitError("too large", 2, 1)
