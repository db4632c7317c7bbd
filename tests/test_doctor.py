"""The doctor: each check on facts that are made up, then the whole command on this machine."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxmodels import manifest
from flaxmodels.cli.doctor import doctor
from flaxmodels.registry import UserError
from flaxmodels.verify import devices, finding, hosts, machine, storage, versions
from flaxmodels.verify import doctor as examination
from flaxmodels.verify.expected import Expected, chips, here
from flaxmodels.verify.finding import Finding

ROOT = Path(__file__).parent.parent


def bad(findings):
    """(level, text and fix) of what is not well."""
    return [(one.level, f"{one.text} {one.fix}") for one in findings if one.level != "ok"]


def only(findings):
    """The one thing that is not well."""
    (one,) = bad(findings)
    return one


# Versions

JAX = ["jaxlib<=0.10.2,>=0.10.1", "numpy>=2.0", 'libtpu==0.0.42.*; extra == "tpu"', 'x==1; extra == "k8s"']
OURS = ["jax>=0.10.2,<0.13", "rich>=14", 'tokenizers>=0.20; extra == "text"']
WELL = {"flaxmodels-train": "1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "rich": "14.1"}


@pytest.mark.parametrize(
    ("changed", "level", "said"),
    [
        ({"jaxlib": "0.9.0"}, "problem", 'jaxlib 0.9.0: jax 0.10.2 needs <=0.10.2,>=0.10.1. pip install "jaxlib<='),
        ({"jaxlib": "0.11.0"}, "problem", "jaxlib 0.11.0: jax 0.10.2 needs"),
        ({"libtpu": "0.0.41"}, "problem", 'libtpu 0.0.41: jax 0.10.2 needs ==0.0.42.*. pip install "libtpu==0.0.42.*"'),
        ({"libtpu": "0.0.43"}, "problem", "libtpu 0.0.43: jax 0.10.2 needs"),
        ({"numpy": "1.26.4"}, "problem", "numpy 1.26.4: jax 0.10.2 needs >=2.0"),
        ({"jax": "0.13.0"}, "warning", "jax 0.13.0: flaxmodels-train 1.0 is tested with <0.13,>=0.10.2."),
        ({"jax": "0.9.0"}, "problem", "jax 0.9.0: flaxmodels-train 1.0 needs"),
        ({"rich": None}, "problem", 'rich is not installed, and flaxmodels-train 1.0 needs it. pip install "rich>=14"'),
        ({"tokenizers": "0.1"}, "problem", "tokenizers 0.1: flaxmodels-train 1.0 needs >=0.20"),
        ({"tensorflow": "2.20", "tensorflow-cpu": "2.20"}, "problem", "both installed. pip uninstall tensorflow"),
    ],
    ids=str,
)
def test_versions_that_do_not_go_together(changed, level, said):
    found = {name: version for name, version in {**WELL, **changed}.items() if version is not None}
    got, text = only(versions.packages(found, {"flaxmodels-train": OURS, "jax": JAX}))
    assert got == level and said in text


def test_versions_that_go_together():
    for more in ({}, {"libtpu": "0.0.42.1"}, {"jaxlib": "0.10.1"}, {"tokenizers": "0.20.1.dev0"}):
        assert not bad(versions.packages({**WELL, **more}, {"flaxmodels-train": OURS, "jax": JAX})), more


def test_what_is_installed_here_goes_together():
    found = versions.installed()
    wanted = versions.requirements(found)
    assert any(re.match(r"jax\b", line) for line in wanted["flaxmodels-train"])
    assert any("libtpu" in line for line in wanted["jax"])
    assert not bad(versions.packages(found, wanted))


@pytest.mark.parametrize(
    ("environ", "level", "said"),
    [
        ({"XLA_FLAGS": "--xla_a=1 --xla_a=2"}, "warning", "sets xla_a to 1 and to 2: the last one counts"),
        ({"XLA_FLAGS": "--xla_tpu_a=1"}, "problem", "move it to LIBTPU_INIT_ARGS"),
        ({"XLA_FLAGS": "--xla_a='1"}, "problem", "can't be read"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "warning", "8 devices of one CPU"),
        ({"JAX_DEBUG_NANS": "True"}, "warning", "unset JAX_DEBUG_NANS"),
        ({"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": "gpu"}, "warning", "unset JAX_PLATFORM_NAME"),
        ({"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg"}, "warning", "others on another mesh"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "75%"}, "problem", "from 0 to 1"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.5"}, "problem", "from 0 to 1"),
        ({"LD_LIBRARY_PATH": "/usr/lib:/usr/local/cuda/lib64"}, "warning", "/usr/local/cuda/lib64"),
    ],
    ids=str,
)
def test_settings_that_work_against_it(environ, level, said):
    got, text = only(versions.environment(environ))
    assert got == level and said in text


def test_settings_that_are_well():
    for environ in (
        {},
        {"XLA_FLAGS": "--xla_a=1 --xla_b", "JAX_DEBUG_NANS": "0", "JAX_PLATFORMS": "tpu,cpu"},
        {"LIBTPU_INIT_ARGS": "--xla_tpu_a=1", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"},
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.5", "TF_FORCE_UNIFIED_MEMORY": "1"},
    ):
        assert not bad(versions.environment(environ)), environ


# The machine

CPU = devices.Started("cpu", ("cpu",), "threefry2x32")
TPU = {"TPU": ["TPU v5e"] * 4, "NVIDIA GPU": [], "AMD GPU": []}
GPU = {"TPU": [], "NVIDIA GPU": ["/dev/nvidia0"], "AMD GPU": []}


@pytest.mark.parametrize(
    ("there", "jax", "environ", "installed", "said"),
    [
        (TPU, CPU, {}, {}, r"TPU v5e, TPU v5e and 2 more\), and JAX runs on cpu.*flaxmodels-train\[tpu\]"),
        (TPU, CPU, {"JAX_PLATFORMS": "cpu"}, {"libtpu": "1"}, "JAX_PLATFORMS=cpu hides it. unset JAX_PLATFORMS"),
        (GPU, CPU, {}, {}, r"/dev/nvidia0.*flaxmodels-train\[cuda\]"),
        (GPU, CPU, {"CUDA_VISIBLE_DEVICES": "-1"}, {}, "unset CUDA_VISIBLE_DEVICES"),
        (GPU, CPU, {}, {"jax-cuda12-plugin": "1"}, "JAX_PLATFORMS=cuda says why"),
        ({"AMD GPU": ["/dev/kfd"]}, CPU, {}, {}, "install jax-rocm"),
        ({}, devices.Started(said="a bug"), {}, {}, "JAX does not start: a bug"),
        ({}, devices.Started(said="no"), {"JAX_PLATFORMS": "tpu"}, {}, "with JAX_PLATFORMS=tpu: no unset JAX_PLAT"),
    ],
    ids=str,
)
def test_an_accelerator_that_is_not_used(there, jax, environ, installed, said):
    level, text = only(devices.accelerators(there, jax, environ, installed))
    assert level == "problem"
    assert re.search(said, text), text


def test_an_accelerator_that_is_used():
    tpus = devices.Started("tpu", ("TPU v5 lite",) * 4, "threefry2x32")
    (found,) = devices.accelerators(TPU, tpus, {"JAX_PLATFORMS": "tpu,cpu"}, {"libtpu": "1"})
    assert str(found).startswith("ok") and "4 x TPU v5 lite" in found.text
    (found,) = devices.accelerators({}, CPU, {}, {})
    assert "no accelerator" in found.text
    rbg = devices.Started("cpu", ("cpu",), "rbg")
    assert "rbg" in only(devices.accelerators({}, rbg, {}, {}))[1]


def files(root, **contents):
    """Files below a folder that stands for /."""
    for name, content in contents.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_accelerators_are_found_in_the_system(tmp_path):
    assert not any(devices.present(tmp_path).values())
    for number, (vendor, device) in enumerate([("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x8086", "0x0063")]):
        files(tmp_path / f"sys/bus/pci/devices/{number}", vendor=vendor + "\n", device=device + "\n")
    files(tmp_path, dev__nvidia0="", dev__nvidiactl="", dev__kfd="")
    assert devices.present(tmp_path) == {"TPU": ["TPU v5e"], "NVIDIA GPU": ["/dev/nvidia0"], "AMD GPU": ["/dev/kfd"]}
    files(tmp_path / "other", dev__accel0="", dev__accel1="")
    assert devices.present(tmp_path / "other")["TPU"] == ["/dev/accel0", "/dev/accel1"]


def test_who_holds_an_accelerator(tmp_path):
    for pid, target in (
        ("11", "/dev/vfio/0"),
        ("12", "/tmp/libtpu_lockfile"),
        ("13", "/dev/null"),
        ("14", "/dev/nvidia1"),
    ):
        (tmp_path / pid / "fd").mkdir(parents=True)
        (tmp_path / pid / "fd/3").symlink_to(target)
        (tmp_path / pid / "cmdline").write_bytes(b"python\0train.py\0")
    found = devices.holders(tmp_path)
    assert [(one.pid, one.command) for one in found] == [(pid, "python train.py") for pid in (11, 12, 14)]
    levels = [level for level, _ in bad(devices.held(found, tmp_path / "none"))]
    assert levels == ["problem", "problem", "warning"]
    assert "pid 11 (python train.py) holds /dev/vfio/0" in bad(devices.held(found, tmp_path / "none"))[0][1]


def test_a_process_that_holds_the_lock_of_libtpu_is_found(tmp_path):
    lock = tmp_path / "libtpu_lockfile"
    with lock.open("w") as held:
        child = subprocess.Popen(["sleep", "60"], stdout=held)
    try:
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # it is there before it has its name
        (found,) = [one for one in devices.holders() if one.pid == child.pid]
        assert found == devices.Holder(child.pid, "sleep 60", (str(lock),))
    finally:
        child.kill()
        child.wait()
    assert not bad(devices.held([], lock))


MEMINFO = "MemTotal:       64000000 kB\nMemFree:  1 kB\nMemAvailable:   32000000 kB\n"


@pytest.mark.parametrize(
    "group",
    [
        {"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__memory.max": "8589934592\n",
         "sys__fs__cgroup__a__memory.current": "8000000000\n", "sys__fs__cgroup__a__b__memory.max": "max\n"},
        {"proc__self__cgroup": "4:memory:/a\n0::/\n", "sys__fs__cgroup__memory__a__memory.limit_in_bytes": "8589934592",
         "sys__fs__cgroup__memory__a__memory.usage_in_bytes": "8000000000"},
        {"proc__self__cgroup": "0::/not/seen/in/a/container\n", "sys__fs__cgroup__memory.max": "8589934592\n",
         "sys__fs__cgroup__memory.current": "8000000000\n"},
    ],
    ids=["v2, above", "v1", "v2, container"],
)  # fmt: skip
def test_the_limit_of_a_control_group_counts(tmp_path, group):
    files(tmp_path, proc__meminfo=MEMINFO)
    assert not bad(machine.memory(tmp_path))
    files(tmp_path, **group)
    assert machine.memory_limit(tmp_path) == (2**33, 8 * 10**9)
    level, text = only(machine.memory(tmp_path))
    assert level == "warning" and "allows 8.0 GiB, of which 7.5 GiB are in use" in text


def test_more_workers_than_processors(tmp_path):
    files(tmp_path, **{"sys__fs__cgroup__cpu.max": "100000 100000\n"})
    assert "this process may use 1" in only(machine.processors(2, 8, tmp_path))[1]
    assert not bad(machine.processors(1, 8, tmp_path)) and not bad(machine.processors(0, 8, tmp_path / "none"))
    assert "may use" not in machine.processors(0, 8, tmp_path / "none")[0].text or os.cpu_count() > 1


def test_shared_memory_matters_between_gpus(tmp_path):
    assert not bad(machine.shared_memory(0, tmp_path))
    assert "NCCL" in only(machine.shared_memory(2, Path("/proc")))[1]
    assert only(machine.shared_memory(0, tmp_path / "none"))[0] == "warning"


# The storage

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 27 0:25 / {0} rw,relatime shared:1 - tmpfs tmpfs rw
31 30 0:26 / {0}/ro ro,relatime - nfs4 server:/a rw
32 30 0:26 / {0}/with\\040space rw - fuse.gcsfuse bucket rw
33 30 0:27 / {0}/layer rw - overlay overlay rw
"""


def test_the_file_system_of_a_folder(tmp_path):
    table = MOUNTS.format(tmp_path.resolve())
    for name, kind in (("", "tmpfs"), ("ro", "nfs4"), ("with space", "fuse.gcsfuse"), ("ro2", "tmpfs")):
        (tmp_path / name).mkdir(exist_ok=True)
        assert storage.mount(tmp_path / name, table)[0] == kind
    assert storage.mount(Path("/"), table)[:2] == ("ext4", "/")


def test_storage_that_a_run_should_not_trust(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "measure", lambda folder: WELL_DONE)
    table = MOUNTS.format(tmp_path.resolve())
    for name in ("ro", "with space", "layer"):
        (tmp_path / name).mkdir()
    assert "takes memory" in only(storage.storage(tmp_path / "new" / "run", table=table))[1]
    assert only(storage.storage(tmp_path / "ro", table=table)) == (
        "problem", f"{tmp_path}/ro is read-only (nfs4 at {tmp_path.resolve()}/ro). choose another --workdir",
    )  # fmt: skip
    assert "renames of folders" in only(storage.storage(tmp_path / "with space", table=table))[1]
    assert "lost with the container" in only(storage.storage(tmp_path / "layer", table=table))[1]
    assert not bad(storage.storage(tmp_path, table=MOUNTS.format("/none")))
    level, text = only(storage.storage(tmp_path, needed=2**60, table=MOUNTS.format("/none")))
    assert level == "problem" and "checkpoints take 1048576.0 TiB" in text
    assert not list(tmp_path.glob(".doctor*"))


WELL_DONE = storage.Speed(1e9, (0.001, 0.002), (0.0, 0.01), locks=True, renames=True)


@pytest.mark.parametrize(
    ("speed", "level", "said"),
    [
        (dict(bytes_per_second=1e6), "warning", "976.6 KiB/s"),
        (dict(fsync=(0.1, 0.5)), "warning", "1 of 20 over 500 ms: slow"),
        (dict(locks=False), "problem", "two runs can destroy each other"),
        (dict(renames=False), "problem", "can't be renamed"),
        (dict(offset=(-90.0, 0.5)), "warning", "the storage's clock is 1m 30s behind this host's, +-500 ms"),
    ],
    ids=str,
)
def test_storage_that_is_slow_or_does_not_do_what_it_must(tmp_path, monkeypatch, speed, level, said):
    monkeypatch.setattr(storage, "measure", lambda folder: dataclasses.replace(WELL_DONE, **speed))
    got, text = only(storage.storage(tmp_path, table=MOUNTS.format("/none")))
    assert got == level and said in text


def test_storage_is_measured(tmp_path):
    speed = storage.measure(tmp_path, most=2 * 2**20)
    assert speed.bytes_per_second > 0 and speed.locks and speed.renames
    assert 0 <= speed.fsync[0] <= speed.fsync[1]
    assert abs(speed.offset[0]) < 1 and speed.offset[1] > 0
    assert not list(tmp_path.iterdir())


def test_storage_that_can_not_be_written(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "measure", full)
    level, text = only(storage.storage(tmp_path, table=MOUNTS.format("/none")))
    assert level == "problem" and f"{tmp_path} can't be written: No space left on device" in text
    level, text = only(storage.compiled_programs({"JAX_COMPILATION_CACHE_DIR": "/proc/none"}))
    assert level == "warning" and "choose another" in text


def test_data_sets_lie_on_this_machine():
    (found,) = examination.data_sets({})
    assert found.level == "ok" and found.text == str(Path("~/tensorflow_datasets").expanduser())
    assert examination.data_sets({"TFDS_DATA_DIR": "/data"})[0].text == "/data"
    level, text = only(examination.data_sets({"TFDS_DATA_DIR": "gs://bucket/sets"}))
    assert level == "warning" and "TFDS_DATA_DIR=gs://bucket/sets is no folder of this machine" in text


def step(workdir, number, *, commit=True):
    folder = workdir / "checkpoints" / str(number)
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(bytes(100))
    if commit:
        manifest.write(folder, {"step": number})
    return folder


def test_what_lies_in_a_workdir(tmp_path):
    assert not bad(storage.contents(tmp_path / "none"))
    step(tmp_path, 4), step(tmp_path, 8)
    (found,) = storage.contents(tmp_path)
    assert found.text == "steps 8, 4: 2 of 2 verified byte by byte"
    step(tmp_path, 12, commit=False)
    assert "step 12 was never committed" in only(storage.contents(tmp_path))[1]
    (tmp_path / "checkpoints/8/data").write_bytes(b"\1" + bytes(99))
    found = bad(storage.contents(tmp_path))
    assert len(found) == 2 and found[1][0] == "problem"
    assert "step 8 is damaged: " in found[1][1] and "flaxmodels checkpoint verify" in found[1][1]


def test_a_workdir_that_another_run_holds(tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "it has just started" in only(storage.contents(tmp_path))[1]
        held.write(json.dumps({"host": "a", "pid": 7, "since": "noon"}))
        held.flush()
        assert "pid 7 on a, since noon" in only(storage.contents(tmp_path))[1]
    assert not bad(storage.contents(tmp_path))


# The hosts

HOST = dict(host="a", devices=["cpu"] * 4, offset=0.0, bound=0.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(devices=["cpu"] * 3), "process 1 (b) has 3 devices, most have 4"),
        (dict(devices=["gpu"] * 4), "devices of several kinds: cpu, gpu"),
        (dict(offset=-30.0), "process 1 (b) is 30s behind process 0, +-50 ms"),
    ],
)
def test_hosts_that_do_not_fit_together(other, said):
    third = {**HOST, "host": "c"}
    assert said in only(hosts.present([HOST, {**HOST, "host": "b", "bound": 0.05, **other}, third], Expected()))[1]


def test_hosts_that_fit_together():
    said = [HOST, {**HOST, "host": "b", "offset": 0.9, "bound": 0.3}]
    texts = ["2 processes on 2 hosts (a, b), 8 devices in all", "of all hosts within 1200 ms of that of process 0"]
    assert [one.text for one in hosts.present(said, Expected())] == texts
    assert [one.text for one in hosts.present(said, Expected(2, 8))] == [texts[0], "all 8 are there", texts[1]]
    assert [one.text for one in hosts.present(said, Expected(chips=8))] == [texts[0], "all 8 are there", texts[1]]


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (Expected(3), r"hosts .*the run has 2 processes, and 3 are expected; here are a, b\. .*--num_processes=3"),
        (Expected(2, 8), r"chips .*process 1 \(b\) has 2 of 4 chips\. "),
        (Expected(chips=8), r"chips .*process 1 \(b\) has 2 of 4 chips\. "),
        (Expected(2, 4), r"chips .*process 0 \(a\) has 4 chips, and 2 are expected\. "),
        (Expected(chips=7), r"chips .*6 of 7 chips are there"),
    ],
)
def test_what_is_missing_is_named(expected, said):
    found = hosts.present([HOST, {**HOST, "host": "b", "devices": ["cpu"] * 2}], expected)
    wrong = [str(one) for one in found if one.level == "problem"]
    assert wrong and re.search(said, wrong[0]), wrong
    assert expected.chips is None or not any("most have" in one for one in wrong)


def test_halves_of_a_chip_are_one():
    assert chips(["TPU v3"] * 8) == 4 and chips(["TPU v5 lite"] * 4) == 4 and chips(["cpu"] * 3) == 3 and chips([]) == 0
    found = hosts.present([{**HOST, "devices": ["TPU v3"] * 8}] * 2, Expected(2, 8))
    assert not bad(found) and "all 8 are there" in [one.text for one in found]


def test_this_host_and_its_share():
    assert here(4, Expected()) == [] and here(4, Expected(1)) == []
    assert [one.text for one in here(4, Expected(1, 4))] == ["4 of 4 of this host are there"]
    assert "this host has 3 of 4 chips." in only(here(3, Expected(1, 4)))[1]
    alone, few = bad(here(0, Expected(4, 16)))
    assert "this process is alone, and 4 are expected" in alone[1] and "this host has 0 of 4 chips" in few[1]
    assert not bad(here(4, Expected(4, 16), alone=False))
    with pytest.raises(UserError, match=r"--chips=15 does not divide over --hosts=4: expected"):
        Expected(4, 15)


def test_a_clock_is_compared_with_that_of_process_0(monkeypatch):
    """What comes back lies within the bound, however long each round takes: at its edge where all the wait is on one
    side of the reading. The clock is ours, in eighths of a second: sums of them are exact, so the edge is too."""
    clock, ahead = [1024.0], 5.0
    waits = iter([(2.0, 1.0), (0.25, 0.0), (0.0, 0.5)])

    def settle(problem):
        before, after = next(waits)
        clock[0] += before
        yet.append(after)

    def told(now):
        clock[0] += yet.pop()
        return now - ahead

    yet: list[float] = []
    monkeypatch.setattr(hosts.peers, "me", lambda: 1)
    monkeypatch.setattr(hosts.time, "time", lambda: clock[0])
    monkeypatch.setattr(hosts.peers, "settle", settle)
    monkeypatch.setattr(hosts.peers, "told", told)
    offset, bound = hosts.clock(rounds=3)
    assert (offset, bound) == (ahead - 0.125, 0.125)
    assert abs(offset - ahead) <= bound


# What is shown

FINDINGS = [
    Finding("a", "ok", "well"),
    Finding("b", "warning", "not so well", "this"),
    Finding("long name", "problem", "broken: " + "word " * 30, "that"),
]


def test_a_line_each_in_a_pipe():
    out = io.StringIO()
    finding.show(FINDINGS, out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and lines[1] == "warning  b               not so well Fix: this"
    assert lines[3] == "1 problem and 1 warning"
    assert finding.verdict(FINDINGS[:1]) == "nothing is wrong: 1 checks"


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_in_a_terminal(width, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    finding.show(FINDINGS, out)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]
    assert max(map(len, lines)) <= width
    assert "                    fix: this" in lines and lines[-1] == "1 problem and 1 warning"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wrkdir=a"], "Did you mean '--workdir'"),
        (["--config.optim.lr=1"], "add --config=FILE"),
        (["--config=none.py"], "there is no such file"),
        (["--process_id=1"], "--num_processes"),
        (["--hosts=2", "--chips=3"], "does not divide"),
    ],
)
def test_wrong_flags_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        doctor(words)


@pytest.mark.parametrize("word", ["--hosts=0", "--chips=four"])
def test_numbers_that_are_none_are_refused(word, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor([word])
    assert ended.value.code == 2
    assert (
        f"'{word.partition('=')[2]}' is no number of them: expected an integer, at least 1" in capsys.readouterr().err
    )


def test_a_config_that_is_wrong_is_a_problem():
    needed, found, _ = examination._wanted({"optim": {"lr": 1}}, CPU)
    assert needed == 0 and only(found)[0] == "problem" and "model" in only(found)[1]


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    begun = time.monotonic()
    assert doctor([f"--workdir={tmp_path / 'run'}", f"--config={ROOT / 'configs/digits_mlp.py'}", "--json"]) == 0
    assert time.monotonic() - begun < 60
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["level"] for one in found} == {"ok", "warning"}
    there = {one["what"]: one["text"] for one in found}
    assert "jax " in there["packages"] and "JAX uses 2 x cpu" in there["accelerator"]
    assert "checkpoints take" in there["space"] and "4 of it are on disk" in there["config"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_comes_although_jax_is_broken(tmp_path):
    """What is broken must not keep it from saying so."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise ImportError('jaxlib is of another version')\n")
    code = "import sys; from flaxmodels.cli.doctor import doctor; sys.exit(doctor(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, f"--workdir={tmp_path}"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "problem  accelerator     JAX does not start: ImportError: jaxlib is of another version" in done.stdout


@contextlib.contextmanager
def started(tmp_path, words, devices, each=lambda rank: {}):
    """The doctor in processes of one run, with so many devices each; one without devices does not come."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flaxmodels", "doctor", f"--workdir={tmp_path}", f"--num_processes={len(devices)}"]
    running = []
    try:
        for rank, count in enumerate(devices):
            flag = f"--xla_force_host_platform_device_count={count}"
            env = {**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": str(ROOT), **each(rank)}
            own = [*command, f"--coordinator_address=localhost:{port}", f"--process_id={rank}", *words]
            if count:
                running.append(subprocess.Popen(own, env=env, text=True, stdout=subprocess.PIPE))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_of_one_run(tmp_path):
    words = ["--init_timeout=60", "--hosts=2", "--chips=4"]
    with started(tmp_path, words, (2, 1), lambda rank: {"JAX_DEBUG_NANS": str(rank)}) as running:
        first, second = (process.communicate(timeout=200)[0] for process in running)
        assert [process.returncode for process in running] == [1, 1]
    assert re.search(r"ok +hosts +2 processes on 1 hosts \(.*\), 3 devices in all", first), first
    assert re.search(r"problem +chips +process 1 \(.*\) has 1 of 2 chips\.", first)
    assert re.search(r"ok +clocks +of all hosts within \d+ ms", first)
    assert re.search(r"warning +environment +process 1 \(.*\): JAX_DEBUG_NANS=1", first)
    assert second == ""


@pytest.mark.slow
def test_a_process_that_does_not_come(tmp_path):
    """It is named, and what is there is looked at without waiting for it."""
    with started(tmp_path, ["--init_timeout=3", "--hosts=2", "--chips=4"], (2, 0)) as (running,):
        said = running.communicate(timeout=100)[0]
        assert running.returncode == 1
    assert re.search(r"problem +hosts +1 of 2 processes did not come within 3 s: 1\. Here: 0 on .*, pid", said), said
    assert re.search(r"ok +packages", said) and "JAX uses" not in said


@pytest.mark.nightly
def test_a_process_whose_jax_does_not_start(tmp_path):
    """The others might wait for it in their own start: all end, and each says why."""
    words = ["--init_timeout=60", "--hosts=2"]
    with started(tmp_path, words, (1, 1), lambda rank: {"JAX_PLATFORMS": "tpu"} if rank else {}) as running:
        first, second = (process.communicate(timeout=200)[0] for process in running)
        assert [process.returncode for process in running] == [1, 1], (first, second)
    assert re.search(r"problem +accelerator +JAX does not start with JAX_PLATFORMS=tpu", second), second
