"""A cell of a plan: what is compiled is what is trained, what can't be is said, and what is kept is never wrong."""

import dataclasses
import json
import types

import jax
import pytest
import small

from flaxmodels import hardware, job
from flaxmodels.perf import cache, cells, chips, compiled, count
from flaxmodels.perf.cells import Target
from flaxmodels.registry import UserError

CHIP = dataclasses.replace(chips.CHIPS["v5e"], name=chips.CPU, memory=2**30)


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A cache of this test's own, and a CPU that is not measured."""
    monkeypatch.setattr(hardware, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(chips, "measured_cpu", lambda devices: CHIP)
    return tmp_path


@pytest.fixture
def two():
    return Target("cpu:2", jax.devices()[:2], CHIP)


def config(family="mlp", **sections):
    return small.config(family, **sections)


@pytest.fixture(scope="module")
def found():
    """An MLP on two devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "get", lambda kind, key: None)
        patch.setattr(cache, "put", lambda kind, key, value: None)
        return cells.cell(config(), Target("cpu:2", jax.devices()[:2], CHIP))


# Targets and changes


def test_targets():
    one, eight = cells.targets(["cpu:1", "cpu:8"])
    assert (one.name, len(one.devices), len(eight.devices)) == ("cpu:1", 1, 8) and one.chip == CHIP
    (all_of_them,) = cells.targets(["cpu"])
    assert list(all_of_them.devices) == jax.devices()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cpu:0", "no number of devices. Eight simulated ones are 'cpu:8'"),
        ("cpu:x", "no number of devices"),
        ("v5e:4x4*", "'' is no number of slices. Two are written 'v5e:4x4\\*2'"),
        ("v5e:4x4*x", "'x' is no number of slices"),
        ("v5e", "is not VERSION:SHAPE"),
        ("", "is not VERSION:SHAPE"),
    ],
)
def test_names_that_stand_for_nothing(name, said):
    with pytest.raises(UserError, match=said):
        cells.targets([name])


@pytest.mark.parametrize("other", ["cpu", "gpu", "tpu"])
def test_simulated_devices_beside_those_at_hand_are_refused(other):
    with pytest.raises(UserError, match=f"does not find those of '{other}': plan them in two calls"):
        cells.targets([other, "cpu:8"])


def test_changes():
    before = {"seed": 1, "mesh": "auto", "data": {"batch_size": 8, "name": "x"}}
    after = cells.changed(before, {"data.batch_size": 4, "mesh.fsdp": 2, "train.microbatches": 2, "seed": 3})
    assert after == {
        "seed": 3, "mesh": {"fsdp": 2}, "data": {"batch_size": 4, "name": "x"}, "train": {"microbatches": 2},
    }  # fmt: skip
    assert cells.changed(after, {"mesh": "auto"})["mesh"] == "auto"
    assert before["data"] == {"batch_size": 8, "name": "x"}


# What is found


@pytest.mark.slow
def test_a_cell_is_the_step_that_is_trained(found):
    made = job.assemble(config(), jax.devices()[:2])
    program = made.lower_train()[0].compile()
    report = compiled.report(program, made)
    assert (
        found.memory == dataclasses.replace(report.memory, limit=CHIP.memory)
        and found.collectives == report.collectives
    )
    assert found.mesh == dict(made.mesh.shape) and found.batch_size == 16 and found.steps == 20 and found.tokens is None
    assert found.fits and not found.over and not found.refusal and found.roofline.seconds > 0
    # An MLP of 784-64-10: the forward pass, and twice that less the gradient of the inputs.
    inputs, classes = made.train.example()["inputs"].shape, made.model.classes
    wide = inputs[0] * 64 * (inputs[1] * inputs[2] * inputs[3] * 2 + classes * 3) * 2
    assert found.flops == wide


@pytest.mark.slow
def test_gradients_and_activations_are_the_temporaries(found):
    parameters = sum(x.nbytes for x in jax.tree.leaves(job.assemble(config(), jax.devices()[:2]).fresh().params))
    assert found.gradients == parameters and found.gradients + found.activations == found.memory.temporaries


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_gradients_do_not(two):
    wide = config(data=dict(batch_size=2048)) | {"model": dict(name="mlp", hidden=(512, 512))}
    one, other = (cells.cell(wide, two, {"data.batch_size": size}) for size in (2048, 4096))
    assert one.gradients == other.gradients
    assert other.activations == pytest.approx(2 * one.activations, rel=0.1)
    assert other.saved == pytest.approx(2 * one.saved, rel=0.05) and one.saved == pytest.approx(
        one.activations, rel=0.6
    )
    parts = cells.cell(wide, two, {"train.microbatches": 4})
    assert parts.activations < 0.5 * one.activations and parts.saved == pytest.approx(one.saved / 4, rel=0.05)


@pytest.mark.slow
def test_json_both_ways(found):
    assert cells.of_json(json.loads(json.dumps(found.to_json()))) == found
    refused = dataclasses.replace(found, memory=None, roofline=None, refusal="no", changes={"model.hidden": (1, 2)})
    assert cells.of_json(json.loads(json.dumps(refused.to_json()))) == refused


def test_what_is_refused_is_a_cell(two):
    odd = cells.cell(config(), two, {"data.batch_size": 15})
    assert odd.refusal.startswith("data.batch_size=15 does not divide over the 2 devices") and not odd.fits
    assert odd.memory is None and odd.roofline is None and odd.changes == {"data.batch_size": 15}
    assert "optim.rate=1: unknown key" in cells.cell(config(), two, {"optim.rate": 1}).refusal


@pytest.mark.slow
def test_what_needs_more_than_there_is(two):
    small_chip = dataclasses.replace(CHIP, memory=100_000)
    cell = cells.cell(config(), dataclasses.replace(two, chip=small_chip))
    assert not cell.fits and cell.memory.limit == 100_000 and cell.over == cell.memory.peak - 100_000 > 0
    assert cell.roofline is None and not cell.refusal


def refusing(monkeypatch, error):
    def compile_program(lowered, mesh):
        raise error

    monkeypatch.setattr(compiled, "compile_program", compile_program)


def test_what_the_compiler_refuses_as_too_large(monkeypatch, two):
    refusing(monkeypatch, compiled.DoesNotFitError("too large", 5_000_000, 1_000_000))
    cell = cells.cell(config(), two)
    assert not cell.fits and cell.over == 4_000_000 and cell.memory.peak == 5_000_000 and cell.memory.limit == 1_000_000
    held = cell.memory.state + cell.memory.batch + cell.memory.data
    assert cell.memory.temporaries == 5_000_000 - held and cell.memory.parameters > 0
    assert cells.cell(config(), two) == cell


def test_temporaries_that_are_too_large_alone_leave_no_room_for_arguments(monkeypatch, two):
    said = "it needs 5.0 MB on each for temporaries alone, which has 1.0 MB"
    refusing(monkeypatch, compiled.DoesNotFitError(said, 5_000_000, 1_000_000))
    memory = cells.cell(config(), two).memory
    assert memory.temporaries == 5_000_000 and memory.peak == 5_000_000 + memory.state + memory.batch + memory.data


def test_a_kernel_that_lacks_memory_is_refused(monkeypatch, two):
    """That memory is not a device's, which the compiler would say: a smaller batch may not help. It is not kept."""
    refusing(monkeypatch, compiled.DoesNotFitError("Ran out of memory in memory space vmem", None, 2**30))
    cell = cells.cell(config(), two)
    assert "memory space vmem" in cell.refusal and cell.memory is None and not cell.fits
    refusing(monkeypatch, compiled.DoesNotFitError("too large", 5_000_000, 1_000_000))
    assert not cells.cell(config(), two).refusal


def test_what_was_not_counted_is_said(monkeypatch, two):
    refusing(monkeypatch, compiled.DoesNotFitError("too large", 5_000_000, 1_000_000))
    counted = count.of_job(job.assemble(config(), two.devices))
    unsure = dataclasses.replace(counted, hardware=dataclasses.replace(counted.hardware, notes=("not counted", "x")))
    monkeypatch.setattr(count, "of_job", lambda made: unsure)
    assert cells.cell(config(), two).notes == ("not counted", "x")


def test_a_compiler_that_fails(monkeypatch, two):
    refusing(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: a bug\nand more"))
    cell = cells.cell(config(), two)
    assert cell.refusal == "the compiler fails: INTERNAL: a bug"


# What is kept


@pytest.fixture
def counted(monkeypatch):
    """Counts of what costs time."""
    counts = {"assemble": 0, "compile": 0}

    def counting(name, function):
        def called(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(job, "assemble", counting("assemble", job.assemble))
    monkeypatch.setattr(compiled, "compile_program", counting("compile", compiled.compile_program))
    return counts


@pytest.mark.slow
def test_the_second_time_nothing_is_lowered(two, counted):
    first = cells.cell(config(), two, {"optim.learning_rate": 0.1})
    before = dict(counted)
    assert cells.cell(config(optim=dict(learning_rate=0.1)), two, {"train.log_every": 1}).changes == {
        "train.log_every": 1
    }
    again = cells.cell(config(), two, {"optim.learning_rate": 0.1})
    assert counted == before and again == first


@pytest.mark.slow
def test_a_program_is_compiled_once(two, counted, monkeypatch):
    """What changes the config, and not the program, is lowered again, and not compiled."""
    first = cells.cell(config(), two)
    again = cells.cell(config(), two, {"train.log_every": 5})
    assert counted == {"assemble": 2, "compile": 1} and again == dataclasses.replace(first, changes=again.changes)
    own = {"model": dict(name="small:Ordinary")}
    for _ in range(2):  # its file may have changed: never without lowering
        assert not cells.cell(config() | own, two).refusal
    assert counted == {"assemble": 4, "compile": 2}


def test_all_that_a_result_follows_from_is_in_its_key(two):
    def key(chip=CHIP, name="cpu:2", devices=two.devices, **sections):
        return cache.config_key(config(**sections), name, devices, dataclasses.asdict(chip))

    base = key()
    assert base == key() and len(base) == 64
    others = [
        key(data=dict(batch_size=32)),
        key(data=dict(seed=1)),
        key(chip=dataclasses.replace(CHIP, bandwidth=1.0)),
        key(name="cpu:3"),
        key(devices=jax.devices()[:3]),
    ]
    for name in cache.FLAGS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, "--flag")
            others.append(key())
    for name, value in (("versions", {"jax": "0"}), ("sources", "other")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, name, lambda *_, value=value: value)
            others.append(key())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "memory", lambda device: 2**30)
        others.append(key())
    with jax.default_matmul_precision("highest"):
        others.append(key())
    assert len({base, *others}) == 1 + len(others)
    own = config() | {"model": {"name": "small:Ordinary"}}, config() | {"loss": {"name": len}}
    assert [cache.config_key(one, "cpu:2", two.devices, {}) for one in own] == [None, None]


def test_data_are_looked_at_again_when_asked(two, monkeypatch):
    def key():
        return cache.config_key(config(), "cpu:2", two.devices, {})

    before, load = key(), cache.data.load
    other = types.SimpleNamespace(load=lambda **options: load(**options | {"seed": 7}))
    monkeypatch.setattr(cache, "data", other)
    assert key() == before
    cache.look_again()
    assert key() != before
    cache.look_again()


def test_sources_are_those_on_the_disk(tmp_path, monkeypatch):
    for name in ("a.py", "b/c.toml", "b/d.txt"):
        (tmp_path / "perf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "perf" / name).write_text(name)
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "perf" / "cache.py"))
    hashed = cache.sources.__wrapped__
    base = hashed()
    (tmp_path / "perf" / "b/d.txt").write_text("no source")
    assert hashed() == base != hashed("perf/a.py")
    (tmp_path / "perf" / "b/c.toml").write_text("else")
    assert hashed() != base


def test_what_is_kept_is_never_another_ones_or_damaged(empty):
    cache.put("cells", "a", {"x": [1, None, "ü"]})
    assert cache.get("cells", "a") == {"x": [1, None, "ü"]} and cache.get("cells", "b") is None
    entry = empty / "cells" / "a.json"
    entry.with_name("b.json").write_bytes(entry.read_bytes())
    assert cache.get("cells", "b") is None
    whole = entry.read_bytes()
    for damaged in (whole[:-5], whole.replace(b"1", b"2"), b"", b"[]", b"\xff"):
        entry.write_bytes(damaged)
        assert cache.get("cells", "a") is None


def test_a_cache_that_can_not_be_written_is_none(empty, monkeypatch):
    (empty / "cells").write_text("a file")
    cache.put("cells", "a", 1)
    assert cache.get("cells", "a") is None


def test_old_entries_go(empty, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 3)
    for name in "abcde":
        cache.put("cells", name, name)
    assert len(list((empty / "cells").iterdir())) == 3 and cache.get("cells", "e") == "e"
