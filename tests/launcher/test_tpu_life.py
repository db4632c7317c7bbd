"""The life of a run, from no machine to no machine, in the fake cloud: the launcher as a user runs it, workers that are
processes, and faults that come when they are told to."""

import contextlib
import hashlib
import json
import random
import re
import shlex
import subprocess
import time

import pytest
from cloud import HERE, ROOT, Cloud, repository
from faults import harness

from tpu import cost, state, verbs

ZONES = ("us-west4-a", "us-east5-a")
TYPE = "v5p-16"  # two hosts of four chips
STEPS = 40  # of stub/train.py
LONG = ("--config.train.duration=40",)  # of tests/faults/tiny.py
SHORT = ("--config.train.duration=12", "--config.train.eval_every=0")
STUB = (
    (HERE / "stub/train.py", "train.py"), (HERE / "stub/flaxmodels", "flaxmodels"), (ROOT / "configs", "configs"),
)  # fmt: skip
PRICES = (ROOT / "flaxmodels/perf/prices.toml", "flaxmodels/perf/prices.toml")
REAL = ((ROOT / "flaxmodels", "flaxmodels"), (ROOT / "train.py", "train.py"), (harness.TINY, "tests/faults/tiny.py"))
FAULTS = (
    {"do": "say", "saying": "capacity", "verb": "queued-resources create", "zone": ZONES[0]},
    {"do": "preempt", "step": 8},
    {"do": "kill", "host": 1, "step": 20},
    {"do": "preempt", "step": 32, "late": 1},
)


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """A repository whose training needs no JAX."""
    return repository(tmp_path_factory.mktemp("stub"), *STUB, PRICES)


@pytest.fixture
def small(tmp_path, stub):
    """A cloud, used from that repository."""
    made = Cloud.at(tmp_path, stub)
    yield made
    made.close()


@pytest.fixture
def real(tmp_path):
    """A cloud, used from a repository that trains."""
    made = Cloud.at(tmp_path, repository(tmp_path / "laptop", *REAL))
    yield made
    made.close()


def flags(cloud, name="a", **others):
    """Of every verb."""
    where = cloud.folder.parent
    given = {
        "name": name, "project": "p", "zone": ",".join(ZONES), "type": TYPE, "bucket": where / "bucket",
        "state": where / "runs", "install": "-e .", **others,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in given.items()]


def watched(cloud, name="a", every=0.2, command=(), limit=600.0, **others):
    """Run `watch` to its end."""
    words = ["--", *command] if command else []
    return cloud.launch("watch", *flags(cloud, name, **others), f"--every={every}", *words, limit=limit)


def planned(cloud, *faults, name="a", **rest):
    """Faults of which some wait for a step of the run."""
    cloud.plan(*faults, workdir=str(cloud.folder.parent / "bucket" / name), **rest)


def final(cloud, name="a"):
    """What stub/train.py has computed: of a run that lost nothing, always the same."""
    return json.loads((cloud.folder.parent / "bucket" / name / "final.json").read_text())


def fetched(server, prefix, to):
    """What a bucket has of a run, as a folder."""
    for name, data in server.objects("bucket", f"{prefix}/").items():
        file = to / name.removeprefix(f"{prefix}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return to


def nothing_left(cloud):
    """No resource, and no process of any; and there never was a second machine beside the first."""
    assert cloud.resources() == {} and cloud.state()["most"] == 1
    assert harness.wait_for(lambda: not cloud.processes(), 60), cloud.processes()


def chain(steps=STEPS):
    """What stub/train.py computes where nothing happens."""
    value = ""
    for step in range(1, steps + 1):
        value = hashlib.sha256(f"{value}{step}".encode()).hexdigest()
    return {"step": steps, "value": value}


def said(done):
    """All that a command printed, for an assertion's message."""
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def lived(cloud, whole, topology, words, *faults, host, workdir, **settings):
    """A run that really trains in a cloud with faults, beside the same on a disk and left alone: both end well."""
    alone = topology.processes == 1  # processes that wait for each other need the whole machine
    with harness.start(whole, topology, *words) as group:
        quick = dict.fromkeys(("ACCEPTED", "WAITING_FOR_RESOURCES", "SUSPENDING"), 0)
        cloud.plan(*faults, host=host, polls=quick, workdir=str(workdir))
        if not alone:
            assert set(group.wait(600)) == {0}, group
        command = ["python", "train.py", "--config=tests/faults/tiny.py", *words]
        done = watched(cloud, every=0.3 if alone else 1, limit=600, command=command, **settings)
        assert done.returncode == 0, said(done)
        assert set(group.wait(600)) == {0}, group
    assert cloud.fired() == sum("step" in fault for fault in faults), said(done)
    nothing_left(cloud)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type", "slices", "topology"),
    [
        ("v5litepod-1", 2, harness.Topology("T2x1", 2, 1)),
        pytest.param(TYPE, 1, harness.T2x4, marks=pytest.mark.nightly),
    ],
)
def test_the_whole_life(real, tmp_path, programs, type, slices, topology):
    """A zone without capacity, two preemptions, a host that fails: one command, and the same bits as if nothing was."""
    run, whole = tmp_path / "bucket/a", tmp_path / "whole"
    done = lived(real, whole, topology, LONG, *FAULTS, host=programs, workdir=run, type=type, slices=slices)
    assert real.ended("queued-resources create") == [1, 0, 0, 0], said(done)
    assert harness.same(run, whole, 40) == ""
    assert sorted(folder.name for folder in (run / "logs").glob("attempt-*")) == [f"attempt-{i}" for i in (1, 2, 3, 4)]
    (shipped,) = run.glob("shipped/*/shipped.json")
    assert json.loads(shipped.read_text())["files"] == ["train.py"]
    assert "# Not committed." in shipped.with_name("patch").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type", "slices", "topology", "duration", "faults"),
    [
        pytest.param("v5litepod-1", 1, harness.T1, SHORT, [{"do": "preempt", "step": 4}], id="short"),
        pytest.param(
            "v5litepod-1", 2, harness.Topology("T2x1", 2, 1), LONG, FAULTS, marks=pytest.mark.nightly, id="whole"
        ),
    ],
)
def test_a_life_in_a_bucket(bucket, real, tmp_path, programs, type, slices, topology, duration, faults):
    """The same on Cloud Storage; and another laptop is told how it was, by the bucket alone."""
    real.env.update(bucket.environment())
    place = {"type": type, "slices": slices, "bucket": "gs://bucket"}
    host, whole = {**programs, **bucket.environment()}, tmp_path / "whole"
    done = lived(real, whole, topology, duration, *faults, host=host, workdir="gs://bucket/a", **place)
    run = fetched(bucket, "a", tmp_path / "fetched")
    last = harness.last_step(whole)
    assert harness.same(run, whole, last) == ""
    assert sorted(int(folder.name) for folder in (run / "checkpoints").iterdir()) == harness.on_disk(whole)
    (shipped,) = run.glob("shipped/*/shipped.json")
    assert "# Not committed." in shipped.with_name("patch").read_text()
    attempts = max(int(folder.name.removeprefix("attempt-")) for folder in (run / "logs").glob("attempt-*"))
    assert attempts > sum(fault["do"] == "preempt" for fault in faults)
    assert f"step {last}, in gs://bucket/a" in done.stdout, said(done)
    other = [*flags(real, **{**place, "state": tmp_path / "other"})]
    told = real.launch("logs", *other)
    for worker in range(topology.processes):
        assert f"w{worker} | launcher: attempt {attempts} ended with exit code 0" in told.stdout, said(told)
        assert (run / f"logs/attempt-{attempts}/worker-{worker}.log").exists()
    told = real.launch("status", *other)
    assert f"step      {last}, the newest checkpoint in gs://bucket/a" in told.stdout.splitlines(), said(told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "faults"),
    [
        pytest.param(
            1,
            [{"do": "say", "saying": "quota", "verb": "queued-resources create", "zone": ZONES[0]}],
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            1,
            [{"do": "say", "saying": "internal", "verb": "queued-resources create", "after": True}],
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            5,
            [
                {"do": "fail", "saying": "capacity", "state": "WAITING_FOR_RESOURCES"},
                {"do": "preempt", "state": "PROVISIONING"},
                {"do": "preempt", "verb": "tpu-vm ssh", "text": "worker.sh install"},
                {"do": "preempt", "verb": "tpu-vm ssh", "text": "worker.sh start", "after": True, "late": 2},
            ],
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            1,
            [
                {"do": "say", "saying": "transient", "verb": "queued-resources describe", "nth": 4},
                {"do": "mute", "worker": 1, "verb": "tpu-vm ssh", "text": "worker.sh install"},
                {"do": "mute", "worker": 0, "verb": "tpu-vm ssh", "text": "worker.sh state", "nth": 6, "times": 3},
                {"do": "kill", "host": 0, "step": 12},
            ],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["quota", "half", "preempted", "hosts"],
)
def test_what_goes_wrong_changes_nothing_but_the_time(small, machines, faults):
    planned(small, *faults)
    done = watched(small)
    assert done.returncode == 0, said(done)
    assert final(small) == chain(), said(done)
    assert small.state()["machines"] == machines, said(done)
    nothing_left(small)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_watch_may_be_killed_at_any_moment(small, tmp_path, count):
    """It alone, or all that runs on the laptop: the same command again goes on, to the same end."""
    planned(small, *FAULTS)
    (seed,) = harness.seeds(1)
    draw, out = random.Random(seed), tmp_path / "out"
    for _ in range(count):
        process = small.start("watch", *flags(small), "--every=0.1", out=out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(draw.uniform(0.2, 4.0)) == 0, out.read_text()
        if draw.random() < 0.5:
            process.kill()
        else:
            small.switch_off()
        process.wait()
    with out.open("a") as file:
        done = watched(small)
        file.write(said(done))
    assert done.returncode == 0, out.read_text()
    assert final(small) == chain(), out.read_text()
    assert small.state()["machines"] >= 3  # of a command that was killed nobody knows how it ended
    nothing_left(small)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["max_cost", pytest.param("max_hours", marks=pytest.mark.nightly)])
def test_a_limit_saves_and_deletes_and_says_so(small, tmp_path, key):
    """One that is reached a moment after the run is under way, however long it took to get there."""
    planned(small)
    command = ["--", "python", "train.py", "--steps=100000"]
    first = small.start("watch", *flags(small), "--every=0.2", *command, out=tmp_path / "out")
    run = small.folder.parent / "bucket/a"
    assert harness.wait_for(lambda: any(run.glob("checkpoints/*/MANIFEST.json")), 120), (tmp_path / "out").read_text()
    first.kill()
    first.wait()
    hours, usd = cost.spent(state.load(tmp_path / "runs/a").lives, time.time() + 2)
    done = watched(small, command=command[1:], **{key: usd if key == "max_cost" else hours})
    assert done.returncode == 3, said(done)
    assert key in done.stdout and "limit" in done.stdout
    nothing_left(small)
    log = (run / "logs/attempt-1/worker-0.log").read_text()
    last = int(re.findall(r"step (\d+)", log)[-1])
    steps = sorted(int(file.parent.name) for file in run.glob("checkpoints/*/MANIFEST.json"))
    assert steps[-1] == last > 0 and "exit code 143" in log


@pytest.mark.slow
def test_wrong_input_is_said_and_not_tried_again(small):
    planned(small)
    done = watched(small, command=["python", "train.py", "--fails=2"])
    assert done.returncode == 2, said(done)
    assert "this is wrong on purpose" in done.stdout
    assert len(small.ended("queued-resources create")) == 1
    assert sum("worker.sh start" in " ".join(row["words"]) for row in small.commands()) == 1
    nothing_left(small)


@pytest.mark.slow
def test_a_bucket_that_takes_nothing_ends_the_run(bucket, small):
    """One that is not there before a machine is asked for; one that refuses the machine before it is installed."""
    from gcs import fake_gcs

    small.env.update(bucket.environment())
    small.plan(host=bucket.environment())
    done = watched(small, bucket="gs://nobodys")
    assert done.returncode == 1 and "gs://nobodys not found: 404." in done.stderr, said(done)
    assert small.ended("queued-resources create") == []
    bucket.faults.append(fake_gcs.Fault("^POST write", 403))
    done = watched(small, bucket="gs://bucket")
    assert done.returncode == 1 and "needs roles/storage.objectUser" in done.stdout, said(done)
    assert "worker 0: ERROR: (gcloud.storage.cp) [somebody@example.com] does not have permission" in done.stdout
    assert small.ended("worker.sh start") == [] and bucket.objects("bucket") == {}
    nothing_left(small)


def documented_commands():
    """The words after `python tpu/launch.py` of each command of tpu/README.md."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "tpu/README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python tpu/launch.py ")]


OFFLINE = ("gke", "slurm")  # verbs that run no command


def given(cloud, words):
    """The words of a command, for a bucket and a state folder of a test, and without --dry_run."""
    where, verb = cloud.folder.parent, words[0]
    own = [f"--state={where / 'runs'}", "--install=-e ."]
    own += [] if verb in OFFLINE else [f"--bucket={where / 'bucket'}"]
    own += ["--every=0.2"] if verb in ("up", "watch") else []
    at = words.index("--") if "--" in words else len(words)
    return [word for word in [*words[:at], *own, *words[at:]] if word != "--dry_run"]


def told(done):
    """The commands that the launcher printed."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ gcloud ")]


def without_polls(commands):
    """The commands that change something, or show it to the user."""
    polls = (" describe ", " list ", " storage ls ", "worker.sh state")
    return [words for words in commands if not any(poll in " ".join(words) for poll in polls)]


@pytest.mark.slow
def test_every_documented_command_runs_dry(small):
    """And nothing is done: no command, no file."""
    found = documented_commands()
    assert {words[0] for words in found} >= set(verbs.VERBS)
    for words in found:
        words = given(small, words)
        done = small.launch(words[0], "--dry_run", *words[1:])
        assert done.returncode == 0, said(done)
        assert bool(told(done)) == (words[0] not in OFFLINE), said(done)
    assert small.commands() == [] and not (small.folder.parent / "bucket").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words[:1] + words[2:]), marks=[] if i == 1 else pytest.mark.nightly)
        for i, words in enumerate(documented_commands())
    ],
)
def test_a_dry_run_prints_the_commands_that_are_executed(small, words):
    """From what its good case begins with (`VERBS.there`), to the end of that."""
    words = given(small, words)
    verb, there = words[0], verbs.VERBS[words[0]].there
    dry = small.launch(verb, "--dry_run", *words[1:])
    machine = [word for word in words if word.partition("=")[0] in ("--file", "--name", "--type")]
    if there:
        prepare = given(small, ["up", *machine])
        assert small.launch(*prepare).returncode == 0
    if "training" in there:
        prepare = given(small, ["run", *machine, "--", "python", "train.py", "--steps=20"])
        assert small.launch(*prepare).returncode == 0
    before = len(small.commands())
    done = small.launch(*words)
    assert done.returncode == 0, said(done)
    ran = [row["words"] for row in small.commands()[before:]]
    assert without_polls(told(dry)) == without_polls(ran), said(dry) + said(done)
    assert {tuple(words) for words in ran} == {tuple(words) for words in told(done)}
    assert bool(without_polls(ran)) == (verb not in (*OFFLINE, "status", "cost"))
