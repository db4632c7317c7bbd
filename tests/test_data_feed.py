"""The same batches, wherever the data lie, whoever reads them, and however many processes and parts there are."""

import io
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
from conftest import ROOT

from flaxmodels import evaluating, hardware, loop
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data import order
from flaxmodels.data.feed import _columns, choose
from flaxmodels.data.synthetic import synthetic_images
from flaxmodels.job import assemble
from flaxmodels.registry import UserError
from flaxmodels.sharding import make_mesh

SIZE, BATCH = 2133, 32
STEPS = 200  # a little over three epochs


def stored(**data):
    base = {"name": "small:stored_images", "examples": SIZE, "test_examples": 21, "batch_size": BATCH}
    return small.config("mlp", data=base | data, train={"log_every": 1})


def job_of(placement="disk", devices=8, **data):
    return assemble(stored(placement=placement, **data), jax.devices()[:devices])


def ids(job, first=0, last=STEPS, most=1):
    """The example ids of each global batch, as the step gets them."""
    plan = [(step, min(most, last - step)) for step in range(first, last, most)]
    found = []
    for (step, count), feed in zip(plan, job.train.dispatches(job.seed, plan, most), strict=True):
        row = step - int(feed["first"])
        found.append(np.asarray(feed["each"]["index"])[row : row + count])
    return np.concatenate(found)


EXPECTED = order.train_indices(0, 0, STEPS, BATCH, SIZE)


@pytest.mark.parametrize("placement", ["disk", "host", "device"])
@pytest.mark.parametrize("most", [1, 7])
def test_ids_do_not_depend_on_placement(placement, most):
    np.testing.assert_array_equal(ids(job_of(placement), most=most), EXPECTED)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 16, "prefetch": 8}, {"prefetch": 1}])
def test_ids_do_not_depend_on_threads(options):
    np.testing.assert_array_equal(ids(job_of(**options), last=60), EXPECTED[:60])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ids_do_not_depend_on_workers(workers):
    job = job_of(workers=workers)
    stop = 97
    np.testing.assert_array_equal(ids(job, last=stop), EXPECTED[:stop])
    np.testing.assert_array_equal(ids(job_of(workers=2 - workers), first=stop), EXPECTED[stop:])


def test_every_example_once_an_epoch():
    seen = ids(job_of())
    for epoch in seen.ravel()[: 3 * SIZE].reshape(3, SIZE):
        assert sorted(epoch) == list(range(SIZE))


@pytest.mark.parametrize("placement", ["disk", "host", "device"])
def test_any_batch_can_be_had_by_itself(placement):
    job = job_of(placement)
    plan = [(step, 1) for step in range(41, 44)]
    for (step, _), feed in zip(plan, job.train.dispatches(job.seed, plan, 1), strict=True):
        row = step - int(feed["first"])
        batch = job.train.batch(jax.tree.map(lambda x, row=row: x[row], feed["each"]), feed["every"])
        alone = job.train.batch(*job.train.train_at(job.seed, step))
        assert small.bits(batch) == small.bits(alone)


def test_evaluation_is_the_same_from_disk():
    each = [list(job_of(p).test.evaluation()) for p in ("disk", "host", "device")]
    batches = [
        small.bits([job_of(p).test.batch(e, every) for e, every in found])
        for p, found in zip(("disk", "host", "device"), each)
    ]
    assert batches[0] == batches[1] == batches[2]
    job = job_of()
    for number, (e, _) in enumerate(job.test.evaluation()):
        np.testing.assert_array_equal(e["index"], job.test.eval_at(number)[0]["index"])


SCRIPT = """
import json, sys
import jax, numpy as np
import small
from flaxmodels.job import assemble

if __name__ == "__main__":  # a worker process imports this file again
    rank, count, port, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, rank, initialization_timeout=120)
    for config, first, last in runs:
        job = assemble(config)
        plan = [(step, 1) for step in range(first, last)]
        local = []
        for feed in job.train.dispatches(job.seed, plan, 1):
            shards = sorted(feed["each"]["index"].addressable_shards, key=lambda s: s.index[1].start or 0)
            row = np.concatenate([np.asarray(s.data)[0] for s in shards])
            images = [np.asarray(s.data) for s in feed["each"]["rows"]["image"].addressable_shards]
            local.append([row.tolist(), int(sum(int(x.sum()) for x in images))])
        print("ids", json.dumps(local), flush=True)
"""


def in_processes(count, devices, tmp_path, runs):
    """What each of `count` processes saw of each run: runs x processes x steps x [ids, sum of the images]."""
    script = tmp_path / "ids.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "NPROC": "16",
    }
    options = {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen([*command, str(rank), str(count), str(port), json.dumps(runs)], **options)
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, [err[-2000:] for _, err in said]
    found = [[json.loads(line[4:]) for line in out.splitlines() if line.startswith("ids ")] for out, _ in said]
    return list(zip(*found))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 8), (2, 4), pytest.param(4, 2, marks=pytest.mark.nightly)])
def test_ids_do_not_depend_on_processes(count, devices, tmp_path):
    """Three epochs, stopped at a random step and gone on with by another number of workers, with 1 and 4 parts."""
    stop = int(np.random.default_rng(count).integers(20, STEPS - 20))
    first, second, parts = stored(placement="disk"), stored(placement="disk", workers=1), stored(placement="disk")
    parts["train"] = parts["train"] | {"microbatches": 4}
    runs = in_processes(count, devices, tmp_path, [(first, 0, stop), (second, stop, STEPS), (parts, 0, STEPS)])
    seen = []
    for run in runs:
        steps = [np.concatenate([process[step][0] for process in run]) for step in range(len(run[0]))]
        sums = [sum(process[step][1] for process in run) for step in range(len(run[0]))]
        seen.append((np.stack(steps), sums))
    np.testing.assert_array_equal(np.concatenate([seen[0][0], seen[1][0]]), EXPECTED)
    np.testing.assert_array_equal(seen[2][0], EXPECTED)
    images = job_of("host").train.split.arrays["image"]
    expected = [int(images[row].astype(np.int64).sum()) for row in EXPECTED]
    assert seen[0][1] + seen[1][1] == seen[2][1] == expected, "the rows are those of the ids"


def losses(tmp_path, config, **options):
    loop.fit(config, tmp_path, stream=io.StringIO(), **options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [pytest.param(90, marks=pytest.mark.nightly), 150]
)  # in the second and in the third epoch of 66.6 steps
def test_resumed_from_disk_is_uninterrupted(tmp_path, stop):
    def config(duration, **data):
        base = stored(placement="disk", **data)
        base["train"] = base["train"] | {"duration": duration}
        return base

    whole = losses(tmp_path / "whole", config(STEPS))
    losses(tmp_path / "parts", config(stop))
    resumed = losses(tmp_path / "parts", config(STEPS, workers=1, threads=2), allow_config_change=True)
    assert resumed == whole and len(whole) == STEPS


@pytest.mark.parametrize("placement", ["disk", "host"])
@pytest.mark.slow
def test_what_can_not_be_read_is_left_out_in_its_place(tmp_path, placement):
    unreadable = tuple(range(5, 25))
    whole, part = job_of(placement), job_of(placement, unreadable=unreadable)
    assert part.train.skipped == (0 if placement == "disk" else 20)
    np.testing.assert_array_equal(ids(whole, last=70), ids(part, last=70))
    assert part.train.skipped >= 20
    for step in range(30):
        each, every = part.train.train_at(0, step)
        there, all_ = part.train.batch(each, every), whole.train.batch(*whole.train.train_at(0, step))
        skipped = np.isin(np.asarray(each["index"]), unreadable)
        np.testing.assert_array_equal(there["weights"], np.where(skipped, 0, 1))
        np.testing.assert_array_equal(np.asarray(there["inputs"])[~skipped], np.asarray(all_["inputs"])[~skipped])
    out = io.StringIO()
    loop.fit(stored(placement=placement, unreadable=unreadable), tmp_path, stream=out)
    assert "examples could not be read so far, and were left out" in out.getvalue()


@pytest.mark.slow
def test_microbatches_train_alike():
    """Sums and counts add up, with unequal weights (unreadable examples) too; no dropout, whose masks differ."""
    found = []
    for parts in (1, 4):
        config = stored(batch_size=64, unreadable=tuple(range(0, 200, 3)))
        config["model"] = {"name": "mlp", "hidden": (16,)}
        config["train"] = {"duration": 10, "microbatches": parts}
        job = assemble(config)
        state, packed, names = small.train(job)
        found.append((small.means(packed, names), jax.device_get(state.params)))
    for name in ("loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(found[0][0][name], found[1][0][name], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"microbatches": 3}}, "train.microbatches=3 does not divide data.batch_size=32"),
        ({"train": {"microbatches": 8}}, "data.batch_size / train.microbatches=4 does not divide over the 8 devices"),
        ({"data": {"placement": "device", "workers": 2}}, "data.placement='device' leaves nothing to do"),
        ({"data": {"name": "synthetic_images", "placement": "disk"}}, "reads everything into memory"),
        ({"data": {"placement": "host", "workers": 2}}, "data.workers=2 would have nothing to do"),
        ({"data": {"workers": -1}}, "data.workers=-1 is out of range"),
        ({"data": {"augment": ({"name": "flipp"},)}}, "Did you mean 'flip'"),
    ],
)
def test_bad_input(change, message):
    config = stored()
    if change.get("data", {}).get("name"):
        config["data"] = {"batch_size": BATCH}
    for section, options in change.items():
        config[section] = config[section] | options
    with pytest.raises(UserError) as error:
        assemble(config)
    assert message in str(error.value)


def test_numbers_do_not_pass_for_classes():
    images = np.zeros((40, 2, 2, 1), np.float32)
    for targets in (np.arange(40.0), np.zeros((40, 3))):
        arrays = {"inputs": images, "targets": targets}
        config = small.config("mlp")
        config["data"] = {"name": "arrays", "train": arrays, "batch_size": 8}
        with pytest.raises(UserError, match="are numbers"):
            assemble(config)
        assemble(config | {"loss": {"name": "mean_squared_error"}})
        part = {"name": "arrays", "train": arrays, "weight": 1}
        with pytest.raises(UserError, match="are numbers"):
            assemble(config | {"data": {"name": "mixture", "sources": (part, part), "batch_size": 8}})


CHANGES = {
    "examples": {"examples": SIZE - 1},
    "content": {"seed": 1},
    "global batch": {"batch_size": 16},
    "augment": {"augment": ({"name": "flip"},)},
    "source": {"name": "synthetic_images"},
}


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES)
def test_other_data_are_refused_by_field(tmp_path, field):
    config = stored()
    config["train"] = {"duration": 2}
    loop.fit(config, tmp_path, stream=io.StringIO())
    config["train"] = {"duration": 4}
    config["data"] = config["data"] | CHANGES[field]
    with pytest.raises(UserError, match=f"{field} was .*, is .*--allow_data_change") as error:
        loop.fit(config, tmp_path, allow_config_change=True, stream=io.StringIO())
    others = set(CHANGES) - {field, "content"}
    assert not [name for name in others if f"{name} was" in str(error.value)], error.value
    outcome = loop.fit(config, tmp_path, allow_config_change=True, allow_data_change=True, stream=io.StringIO())
    assert outcome.step == 4


def test_a_mixture_is_dealt_by_its_weights():
    parts = (
        {"name": "synthetic_images", "examples": 100, "weight": 3, "test_examples": 16},
        {"name": "small:stored_images", "examples": 40, "weight": 1, "seed": 5, "test_examples": 8},
    )
    base = {"name": "mixture", "batch_size": 40, "sources": parts}
    found = {}
    for placement in ("disk", "host", "device"):
        job = assemble(small.config("mlp", data=base | {"placement": placement}), jax.devices()[:8])
        assert job.source.train.size == 140 and job.source.test.size == 24
        found[placement] = [job.train.batch(*job.train.train_at(0, step)) for step in range(5)]
        index = np.concatenate([np.asarray(job.train.train_at(0, step)[0]["index"]) for step in range(25)])
        assert np.bincount(index >= 100).tolist() == [750, 250]
        images = [job.source.train.gather(job.source.train.arrays, np.array([k], np.int32))["image"] for k in (0, 100)]
        assert not np.array_equal(*images)
        assert sum(int((np.asarray(e["index"]) >= 0).sum()) for e, _ in job.test.evaluation()) == 24
    assert small.bits(found["disk"]) == small.bits(found["host"]) == small.bits(found["device"])


ONE, TWO = {"name": "synthetic_images", "weight": 1}, {"name": "synthetic_images", "weight": 1e6}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((ONE,), "a mixture needs two or more"),
        (({"name": "digits"}, ONE), "data.sources[0] has no 'weight'"),
        ((ONE, {"name": "synthetic_tokens", "weight": 1}), "needs them equal"),
        ((ONE, TWO), "data.sources[0].weight=1 beside 1000001 in all is less than one example in 1000"),
        ((ONE, ONE | {"weight": -1}), "data.sources[1].weight=-1 is out of range"),
        ((ONE, ONE | {"name": "synthetic_image"}), "data.sources[1].name='synthetic_image' does not exist"),
        ((ONE | {"weight": 0}, ONE | {"weight": 0}), "all weights are 0"),
        (({"name": "mixture", "sources": (ONE, ONE), "weight": 1}, ONE), "data.sources has a mixture in it"),
        ((ONE, ONE | {"sides": 2}), "data.sources[1].sides=2: unknown key. Did you mean 'side'?"),
    ],
)
def test_bad_mixtures(sources, message):
    with pytest.raises(UserError) as error:
        assemble(small.config("mlp", data={"name": "mixture", "batch_size": 8, "sources": sources}))
    assert message in str(error.value)


@pytest.mark.slow
def test_parts_of_a_mixture_may_leave_out_and_need_other_dtypes(tmp_path):
    """Packed texts number their documents in as many bits as they need; only one part has what could not be read."""
    names = {"many": ("a b\n", 3000), "few": ("some words that make a longer line than that\n", 400)}
    for name, (line, times) in names.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} {line}" for i in range(times)))
    parts = tuple({"name": "lines", "path": str(tmp_path / f"{n}.txt"), "length": 2048, "weight": 1} for n in names)
    counts = {}
    for sources in (parts, parts[::-1]):
        for placement in ("disk", "host", "device"):
            base = {"name": "mixture", "batch_size": 8, "sources": sources, "placement": placement}
            job = assemble(small.config("transformer", data=base))
            batches = [job.test.batch(each, every) for each, every in job.test.evaluation()]
            counts[sources[0]["path"], placement] = sum(float(b["weights"].sum()) for b in batches)
            most = max(int(b["inputs"]["segments"].max()) for b in batches)
            assert most > 255, "more documents in a window than a byte can count"
    alone = [small.config("transformer", data={k: v for k, v in part.items() if k != "weight"}) for part in parts]
    jobs = [assemble(config | {"data": config["data"] | {"batch_size": 8}}) for config in alone]
    found = [sum(float(j.test.batch(*b)["weights"].sum()) for b in j.test.evaluation()) for j in jobs]
    assert set(counts.values()) == {sum(found)}

    unread = {"name": "small:stored_images", "examples": 40, "unreadable": (3, 5), "weight": 1}
    sources = ({"name": "synthetic_images", "examples": 40, "weight": 1}, unread)
    job = assemble(small.config("mlp", data={"name": "mixture", "batch_size": 16, "sources": sources}))
    each = [job.train.train_at(0, step) for step in range(5)]
    weights = np.concatenate([job.train.batch(*one)["weights"] for one in each])
    index = np.concatenate([one[0]["index"] for one in each])
    np.testing.assert_array_equal(weights == 0, np.isin(index, (43, 45)))


def test_columns_of_several_spans():
    index = np.arange(24).reshape(2, 12)
    assert _columns(index, ((0, 12),)) is index
    np.testing.assert_array_equal(_columns(index, ((0, 2), (6, 8)))[1], [12, 13, 18, 19])


@pytest.mark.slow
def test_what_is_best_starts_anew_on_other_test_data(tmp_path):
    config = stored()
    config["train"] = {"duration": 60, "patience": 50}
    first = loop.fit(config, tmp_path, stream=io.StringIO())
    config["data"] |= {"test_examples": 40, "seed": 1}  # other patterns: what was learned does not help
    config["train"]["duration"] = 61
    out = io.StringIO()
    loop.fit(config, tmp_path, allow_config_change=True, allow_data_change=True, stream=out)
    assert "going on with other data: " in out.getvalue() and "test examples was 21, is 40" in out.getvalue()
    job = assemble(config)
    with pytest.raises(UserError, match="or evaluate on these with --allow_data_change"):
        evaluating.evaluate_checkpoint(assemble(config | {"data": config["data"] | {"test_examples": 30}}), tmp_path)
    assert evaluating.evaluate_checkpoint(job, tmp_path, "latest")[2] == 40
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    found = checkpoints.meta(checkpoints.latest())["memory"]
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["best"] == last["eval/loss"] > first.metrics["eval/loss"] and found["stale"] == 0


@pytest.mark.slow
def test_options_of_an_own_source_are_part_of_its_identity(tmp_path):
    """What they do to the data we can't know: they may not change without a word, in a mixture either."""
    config = stored()
    config["train"] = {"duration": 2}
    loop.fit(config, tmp_path, stream=io.StringIO())
    config["data"] = config["data"] | {"unreadable": (1,)}
    config["train"] = {"duration": 3}
    with pytest.raises(UserError, match=r"options was .*'unreadable': \[1\]"):
        loop.fit(config, tmp_path, allow_config_change=True, stream=io.StringIO())
    parts = ({"name": "synthetic_images", "weight": 1}, {"name": "small:stored_images", "seed": 5, "weight": 1})
    job = assemble(small.config("mlp", data={"name": "mixture", "batch_size": 16, "sources": parts}))
    assert job.identity["options"] == [[], {"name": "small:stored_images", "seed": 5, "weight": 1}]


def test_nothing_readable_is_an_error(tmp_path):
    config = stored(placement="disk", unreadable=tuple(range(SIZE)))
    with pytest.raises(UserError, match="not one example could be read"):
        loop.fit(config, tmp_path, stream=io.StringIO())


@pytest.mark.parametrize(("memory", "place"), [(None, "device"), (20.1, "device"), (19.9, "host")])
def test_data_take_a_twentieth_of_a_device(monkeypatch, memory, place):
    """Whatever says how large it is: a device that is there, or a table for one that is only compiled for."""
    source = synthetic_images(examples=64)
    monkeypatch.setattr(hardware, "memory", lambda _: memory and memory * source.nbytes)
    where, why = choose("auto", source, make_mesh())
    assert where == place and f"{source.nbytes / 2**20:.1f} MiB are {'within' if place == 'device' else 'over'}" in why
