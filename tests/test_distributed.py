"""Processes find each other, or learn why not; and what they tell each other is the same in all."""

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import math
import os
import signal
import socket
import threading
import time
import types

import jax
import pytest

from flaxmodels import sharding
from flaxmodels.registry import UserError
from flaxmodels.runtime import agreement, cluster, distributed, exits, peers, pulse, roll_call, sameness
from flaxmodels.runtime.cluster import Place
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.place import add_flags, place_of
from flaxmodels.runtime.signals import Stop

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[007-009,12],other1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}
METADATA = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:0:10.0.0.5,b:1:10.0.0.6,c:2:10.0.0.7,d:3:10.0.0.8",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n",
}


def flags(*words):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(words)


def unreachable(name):
    raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "node1"},  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # `srun -n 1` in an allocation of 8
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "notebook-0"},  # any pod
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "5"},  # one of a sweep
        {**TPU, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {**TPU, "TPU_SKIP_MDS_QUERY": "1"},
        {**TPU, "JAX_PLATFORMS": "cpu"},
    ],
)
def test_one_process_alone_asks_nobody(environment):
    assert cluster.find(environment, unreachable) is None
    assert place_of(flags(), {**environment, "TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_tpu_of_one_host_is_alone():
    metadata = {"agent-worker-number": "", "worker-network-endpoints": "10.0.0.5", "tpu-env": ""}
    assert cluster.find(TPU, metadata.__getitem__) is None


@pytest.mark.parametrize(
    ("environment", "address", "processes", "process", "ids"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "n:5", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, "n:5", 4, 3, None),
        ({"JAX_COORDINATOR_ADDRESS": "n:5", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, "n:5", 4, 2, None),
        (SLURM, "node007:", 8, 3, (1,)),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu1,gpu2", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, "gpu1:", 8, 3, None),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[3,5]", "CUDA_VISIBLE_DEVICES": "0"}, "n3:", 8, 3, None),
        ({**SLURM, "SLURM_STEP_NODELIST": "alone", "CUDA_VISIBLE_DEVICES": "0,1"}, "alone:", 8, 3, (1,)),
        ({**SLURM, "SLURM_STEP_NODELIST": "rack[01-02]n[3,5]-ib,other"}, "rack01n3-ib:", 8, 3, (1,)),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "n:5"}, "n:5", 8, 3, (1,)),
        (OPEN_MPI, "10.96.0.1:", 4, 2, (0,)),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,fe80::2]:43"}, "[fe80::1]:", 4, 2, (0,)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "localhost:", 4, 2, (0,)),
        ({**TPU, "TPU_WORKER_HOSTNAMES": "h0,h1,h2", "TPU_WORKER_ID": "1"}, "h0:8476", 3, 1, None),
        (TPU, "10.9.9.9:8476", 8, 6, None),
    ],
)
def test_what_launchers_tell(environment, address, processes, process, ids):
    place = cluster.find(environment, METADATA.__getitem__)
    assert place.address.startswith(address)
    assert (place.processes, place.process, place.local_device_ids) == (processes, process, ids)
    assert 1024 < int(place.address.rpartition(":")[2]) < 2**16 or place.address == "n:5"
    # All processes of a job compute one address, and another job another.
    if "SLURM_JOB_ID" in environment and address != "n:5":
        assert cluster.find({**environment, "SLURM_PROCID": "5", "SLURM_LOCALID": "0"}).address == place.address
        assert cluster.find({**environment, "SLURM_JOB_ID": "78"}).address != place.address


def test_two_jobs_of_open_mpi_on_one_host_have_two_ports():
    jobs = (
        [("OMPI_MCA_orte_hnp_uri", f"{number}.0;tcp://10.0.0.1:3") for number in (7, 8)],
        [("PMIX_NAMESPACE", f"prterun-node1.cluster.org-{number}@1") for number in (7, 8)],  # from version 5 on
    )
    base = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    del base["OMPI_MCA_orte_hnp_uri"]
    for first, second in jobs:
        assert cluster.find(dict([*base.items(), first])).address != cluster.find(dict([*base.items(), second])).address


def test_flags_go_before_the_environment():
    everything = ("--coordinator_address=[::1]:99", "--num_processes=2", "--process_id=1", "--local_device_ids=0,2")
    assert place_of(flags(*everything), SLURM) == Place("[::1]:99", 2, 1, (0, 2))
    place = place_of(flags("--coordinator_address=head:5"), SLURM)
    assert (place.address, place.processes, place.process) == ("head:5", 8, 3)
    assert place_of(flags("--distributed=off"), SLURM) is None
    assert place_of(flags("--num_processes=1"), {}) is None


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--num_processes=2", "--process_id=0"], {}, "--coordinator_address: not set. Several processes need"),
        (["--process_id=0"], {}, "--coordinator_address and --num_processes: not set"),
        ([], {"JAX_COORDINATOR_ADDRESS": "n:5", "JAX_NUM_PROCESSES": "4"}, "--process_id: not set, and JAX_NUM"),
        ([], {"JAX_COORDINATOR_ADDRESS": "n:5"}, "--num_processes and --process_id: not set, and JAX_COORD"),
        ([], {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "--coordinator_address: not set, and Open MPI does not tell"),
        (["--coordinator_address=n:5", "--num_processes=2", "--process_id=2"], {}, "--process_id=2 is none of 2"),
        (["--coordinator_address=n", "--num_processes=2", "--process_id=1"], {}, "='n': expected HOST:PORT"),
        (["--coordinator_address=n:99999", "--num_processes=2", "--process_id=1"], {}, "expected HOST:PORT"),
        (["--distributed=off", "--num_processes=2"], {}, "--distributed=off with --num_processes"),
        (["--local_device_ids=0"], {}, "--local_device_ids is for one of several processes, and this one is alone"),
        (["--local_device_ids=0", "--distributed=off"], SLURM, "--local_device_ids is for one of several"),
        (["--local_device_ids=0", "--num_processes=1"], {}, "--local_device_ids is for one of several"),
        ([], {**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID='x' in the environment is not a number"),
    ],
)
def test_places_that_can_not_be(words, environment, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("(", r"\(")):
        place_of(flags(*words), environment)


@pytest.mark.parametrize(
    "word", ["--num_processes=0", "--process_id=-1", "--init_timeout=0", "--heartbeat_timeout=x", "--stuck_after=no"]
)
def test_flags_that_can_not_be(word, capsys):
    with pytest.raises(SystemExit):
        flags(word)
    assert "expected" in capsys.readouterr().err


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(*calls):
    """The result, or the error, of each call, made at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception(timeout=60) or future.result() for future in futures]


def met(port, *who, timeout=20.0, first=lambda: None):
    """What `roll_call.meet` gives for each (processes, process); all but process 0 do something first."""
    left = threading.Barrier(len(who))

    def call(processes, process):
        if process:
            first()
        with contextlib.ExitStack() as stack:
            ties = roll_call.meet(("localhost", port), processes, process, timeout)
            for tie in ties.values():
                stack.enter_context(tie.connection)
            if not process:  # stands in for JAX's service, which takes the port over
                stack.enter_context(socket.create_server(("localhost", port)))
            assert set(ties) == ({0} if process else set(range(1, processes)))
            for tie in ties.values():
                assert tie.who.endswith(f", pid {os.getpid()}")
                tie.connection.sendall(b"%d" % process)
            for number, tie in ties.items():
                assert tie.connection.recv(1) == b"%d" % number
            left.wait(60)

    return together(*(lambda pair=pair: call(*pair) for pair in who))


def test_processes_meet():
    assert met(free_port(), (3, 2), (3, 0), (3, 1)) == [None] * 3


def test_who_is_missing_is_said_to_all(monkeypatch):
    """Here the time is over as soon as one has come."""
    clock, wrong = [0.0], roll_call._wrong

    def come(*hello):
        clock[0] += 60
        return wrong(*hello)

    monkeypatch.setattr(roll_call, "_wrong", come)
    monkeypatch.setattr(roll_call, "time", types.SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    found = met(free_port(), (4, 0), (4, 2), timeout=50.0)
    for error in found:
        assert isinstance(error, FaultError)
        assert "2 of 4 processes did not come within 50 s: 1, 3. Here: 0 on " in str(error)


def test_process_0_is_missing():
    port = free_port()
    (error,) = met(port, (2, 1), timeout=1.0)
    assert isinstance(error, FaultError)
    assert f"process 1 of 2 could not reach process 0 at localhost:{port} within 1 s: " in str(error)


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ([(3, 0), (3, 1), (3, 1)], "two processes have --process_id=1"),
        ([(2, 0), (3, 2)], "was started with --num_processes=3, process 0 with 2"),
    ],
)
def test_processes_that_contradict_each_other(who, message):
    for error in met(free_port(), *who):
        assert isinstance(error, UserError) and message in str(error)


def test_the_port_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (error,) = met(port, (2, 0))
    assert isinstance(error, UserError) and f"can't listen on port {port}" in str(error)


def test_strangers_hold_up_nobody():
    port, stop, seen = free_port(), threading.Event(), []

    def stranger():
        while not stop.is_set():
            try:
                with socket.create_connection(("localhost", port), timeout=1) as connection:
                    connection.sendall(b'{"process": 1}\n')
                    seen.append(connection.recv(10))
            except OSError:
                time.sleep(0.01)

    def run():
        while not seen:
            time.sleep(0.01)
        stop.set()

    found, _ = together(lambda: met(port, (2, 0), (2, 1), first=run), stranger)
    assert found == [None, None]
    assert not any(seen)


class Store:
    """Stands in for the key-value store of JAX's coordination service."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(folder)]


@pytest.fixture
def processes(monkeypatch):
    """Threads as processes: processes(call of process 0, of process 1, ...) gives results or errors."""
    store, here = Store(), threading.local()
    monkeypatch.setattr(peers, "PAUSE", 0.01)
    monkeypatch.setattr(peers, "_store", lambda: store)
    monkeypatch.setattr(peers, "_unique", lambda about: f"{next(here.count)}-{about}")

    def run(*calls):
        monkeypatch.setattr(peers, "count", lambda: len(calls))
        monkeypatch.setattr(peers, "me", lambda: here.index)

        def call(index, function):
            here.index, here.count = index, iter(range(100))
            return function()

        return together(*(lambda i=i, f=f: call(i, f) for i, f in enumerate(calls)))

    return run


def test_equal_facts_go_on(processes):
    facts = {"config": {"seed": 1, "data.path": ("a", None)}, "file": {"step.py": "12"}}
    assert processes(*[lambda: peers.compare(facts)] * 3) == [None] * 3


def test_what_differs_is_named_in_all(processes):
    first = {"config": {"seed": 1, "lr": 0.2}, "file": {"step.py": "12"}, "program": {"of the train step": "a"}}
    other = {"config": {"seed": 1, "lr": 0.1}, "file": {"step.py": "13"}, "program": {"of the train step": "b"}}
    found = processes(*(lambda f=f: peers.compare(f) for f in (first, first, other)))
    host = socket.gethostname()
    for error in found:
        assert isinstance(error, UserError)
        assert str(error) == (
            f"process 2 ({host}) differs from process 0 ({host}): lr=0.1, there 0.2; file step.py differs; "
            "program of the train step differs"
        )


def test_a_fact_that_only_one_has_differs():
    assert peers.differences({"config": {"a": 1}}, {"config": {"a": 1, "b": None}}) == ""
    assert peers.differences({"file": {"a": "1", "mine": "2"}}, {"file": {"a": "1"}}) == "file mine differs"
    many = {"config": {str(i): i for i in range(9)}}
    assert peers.differences(many, {"config": {}}).endswith("; and 4 more")


@pytest.mark.parametrize("kind", [UserError, FaultError, ValueError])
def test_the_error_of_one_is_seen_by_those_that_wait(processes, kind):
    def failing():
        with peers.telling():
            raise kind("no such file")

    waits, fails = processes(lambda: peers.compare({}, limit=20), failing)
    assert isinstance(waits, UserError if kind is UserError else FaultError) and isinstance(fails, kind)
    assert "process 1 (" in str(waits) and str(waits).endswith("no such file")


def test_who_does_not_answer_is_named(processes):
    (error, *_) = processes(lambda: peers.settle("", limit=0.2), lambda: None, lambda: None)
    assert isinstance(error, FaultError) and "processes 1, 2 did not answer within 0.2 s" in str(error)


def test_only_the_first_error_is_reported(processes):
    """What follows from it in the others would only hide it."""

    told = threading.Event()

    def consequence():
        try:
            with peers.telling():
                peers.compare({}, limit=50)
        finally:
            told.set()

    def cause():
        with peers.telling():
            raise ValueError("the cause")

    def third():
        assert told.wait(50)
        raise peers.failed()

    *_, seen = processes(consequence, cause, third)
    assert str(seen).startswith("process 1 (") and str(seen).endswith("failed: ValueError: the cause")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 2), (FaultError("x"), 1), (KeyboardInterrupt(), 130), (OSError(), 1), (SystemExit(5), 5)],
)
def test_exit_codes(error, code):
    assert exits.code_of(error) == code


def test_the_failure_of_an_earlier_run_is_not_of_the_next(monkeypatch):
    """In processes that go on after an error, such as those of notebooks."""
    store = Store()
    monkeypatch.setattr(peers, "_store", lambda: store)
    monkeypatch.setattr(peers, "_RUN", 0)
    monkeypatch.setattr(peers, "_COUNT", 3)
    monkeypatch.setattr(peers, "me", lambda: 1)
    peers.begin()
    before = peers._unique("told")
    peers.report(ValueError("mine"))
    monkeypatch.setattr(peers, "me", lambda: 0)
    assert str(peers.failed()).endswith("failed: ValueError: mine")
    peers.begin()  # here process 0 is ahead of process 1
    assert peers.failed() is None
    peers.begin()
    assert peers._unique("told") != before and peers._COUNT == 1
    monkeypatch.setattr(peers.pulse, "_current", object())  # the processes of a command end with the first error
    peers.begin()
    assert peers._COUNT == 1


def test_a_signal_that_ended_another_process_is_one_here(processes):
    def signalled():
        with peers.telling():
            raise exits.SignalledError("SIGTERM: nothing had been computed yet", signal.SIGTERM)

    waits, _ = processes(lambda: peers.compare({}, limit=20), signalled)
    assert isinstance(waits, exits.SignalledError) and exits.code_of(waits) == 143
    assert str(waits).startswith("process 1 (") and str(waits).endswith(") SIGTERM: nothing had been computed yet")


@pytest.mark.parametrize("heartbeat", [1.0, 60.0, 600.0])
def test_our_heartbeat_is_first(monkeypatch, heartbeat):
    """That of JAX aborts the process without a message."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **options: given.update(options))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    distributed.start(Place("localhost:1", 2, 0), 30.0, heartbeat)
    assert given["heartbeat_timeout_seconds"] > heartbeat + 2 * pulse.TICK + pulse.WORDS + pulse.LAST


def test_how_long_nothing_may_move_is_a_flag():
    assert flags().stuck_after is None and flags("--stuck_after=30").stuck_after == 30
    assert flags("--stuck_after=off").stuck_after == math.inf


def test_leaving(processes):
    assert processes(*[lambda: peers.leave(20)] * 2) == [None, None]


@pytest.mark.parametrize("other", ["comes", "is cut off", "does not come"])
def test_leaving_with_an_error(processes, other):
    act = {"comes": lambda: peers.leave_with_error(20), "is cut off": peers.cut, "does not come": lambda: None}[other]
    here, _ = processes(lambda: peers.leave_with_error(0.3 if other == "does not come" else 20), act)
    assert here is (other == "comes")


@pytest.mark.parametrize("leaving", [peers.cut, lambda: peers.leave_with_error(20)])
def test_the_store_goes_last(processes, monkeypatch, leaving):
    monkeypatch.setattr(peers, "LAST", 50.0)
    monkeypatch.setattr(peers, "PAUSE", 0.001)
    order, gone = [], threading.Event()

    def first():
        order.append(1)
        peers.cut()
        gone.set()

    def last():
        assert gone.wait(50)
        time.sleep(0.2)
        order.append(2)
        peers.cut()

    processes(lambda: (leaving(), order.append(0)), first, last)
    assert order == [1, 2, 0]


def test_the_store_goes_when_the_others_are_gone(processes, monkeypatch):
    """That they leave is not enough: they still print."""
    monkeypatch.setattr(peers, "LAST", 50.0)
    monkeypatch.setattr(peers, "PAUSE", 0.001)
    order, gone = [], threading.Event()
    monkeypatch.setattr(peers.pulse, "current", lambda: types.SimpleNamespace(deserted=gone.is_set))

    def other():
        peers.cut()
        time.sleep(0.2)
        order.append(1)
        gone.set()

    processes(lambda: (peers.cut(), order.append(0)), other)
    assert order == [1, 0]


def test_one_process_alone_compares_nothing(monkeypatch):
    monkeypatch.setattr(peers, "_store", lambda: pytest.fail("asked the store"))
    peers.compare({"config": {"a": 1}})
    assert peers.told({"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="wrong"):
        peers.settle("wrong")
    with pytest.raises(ValueError, match="mine"), peers.telling():
        raise ValueError("mine")


def test_gloo_gets_threads(monkeypatch):
    """As many as its collectives hold at a time, unless the user says how many."""
    for devices, given, expected in [(8, None, True), (1, None, False), (8, "3", False)]:
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices} --xla_other=1")
        monkeypatch.delenv("NPROC", raising=False)
        if given:
            monkeypatch.setenv("NPROC", given)
        distributed._threads_for_gloo()
        assert (int(os.environ.get("NPROC", 0)) >= 32) == expected


class Came(Stop):
    """A process to which a signal came."""

    def __init__(self, number):
        super().__init__()
        self.signal = number


def test_the_answer_comes_one_question_late():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    stop = Stop()
    decision = agreement.Together(stop, lambda: False, mesh)
    assert not decision.stop() and not decision.stop()
    stop.signal = signal.SIGTERM
    assert not decision.stop()
    assert decision.stop() and decision.signal == signal.SIGTERM
    assert not decision.late()


def test_a_late_save_is_asked_for_once():
    late = [False]
    decision = agreement.Together(Stop(), lambda: late[0], sharding.make_mesh())
    saves = []
    for step in range(20):
        late[0] = late[0] or step in (3, 4, 11)
        assert not decision.stop()
        if decision.late():
            saves.append(step)
            late[0] = False
    assert saves == [4, 12]


def test_the_question_costs_no_transfer():
    """The same question is sent once: asking it again passes where transfers are refused."""
    decision = agreement.Together(Stop(), lambda: False, sharding.make_mesh())
    decision.stop()
    with jax.transfer_guard_host_to_device("disallow"):
        for _ in range(3):
            decision.stop()


def test_one_process_alone_decides_at_once():
    decision = agreement.make(Came(signal.SIGINT), lambda: True, sharding.make_mesh())
    assert isinstance(decision, agreement.Alone)
    assert decision.stop() and decision.signal == signal.SIGINT and decision.late()


def test_code_is_ours_and_that_of_the_modules_a_config_names(tmp_path, monkeypatch):
    package = tmp_path / "someones"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("Net = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("someones.layers")  # as a config's model.name does
    plain = sameness.code({"model.name": "mlp", "data.path": "/a:b/c"})
    assert "flaxmodels/step.py" in plain and not any("someones" in name for name in plain)
    for value in ("someones.layers:Net", ({"name": "someones.layers:Net"},)):
        named = sameness.code({"model.name": value})
        assert named.keys() - plain.keys() == {"someones", "someones.layers"}
        (package / "layers.py").write_text("Net = 2\n")
        changed = sameness.code({"model.name": value})
        assert [name for name in named if named[name] != changed[name]] == ["someones.layers"]
        (package / "layers.py").write_text("Net = 1\n")
    json.dumps(plain)


def test_programs_are_compared_without_their_places():
    def one(x):
        return x + 1

    def two(x):
        return x + 1

    two.__name__ = two.__qualname__ = "one"
    programs = [sameness.program(jax.jit(f).lower(1.0)) for f in (one, two, lambda x: x + 2)]
    assert programs[0] == programs[1] != programs[2]
