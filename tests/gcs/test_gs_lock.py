"""The lock of a workdir in a bucket, and the files that are kept elsewhere and copied there."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_gcs import Fault

from flaxmodels import manifest, mirror
from flaxmodels.registry import UserError
from flaxmodels.runtime import goodput, lease
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.lock import LOCK, workdir_lock

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Renewed often; but who is only slow, on a busy machine, is not dead. Nothing ends this process."""
    ended = []
    monkeypatch.setattr(lease, "EVERY", 0.05)
    monkeypatch.setattr(lease, "LOOK", 0.05)
    monkeypatch.setattr(lease.exits, "leave", ended.append)
    yield
    assert not ended


def test_one_holds_it_and_lets_go(workdir):
    with workdir_lock(workdir) as line:
        assert line.startswith(f"lock: {workdir}/.lock, renewed every")
        owner = json.loads((workdir / LOCK).read_text())
        assert owner["pid"] == os.getpid()
    assert not workdir.exists()


def test_it_is_renewed_and_the_other_is_refused(workdir):
    refused = pytest.raises(UserError, match=rf"belongs to another running process: pid {os.getpid()} on ")
    with workdir_lock(workdir):
        with refused, workdir_lock(workdir):
            pass
        assert (workdir / LOCK).exists()


def test_of_two_that_come_at_once_one_gets_it(workdir):
    got, refused, go, over = [], [], threading.Barrier(4), threading.Event()

    def run(number):
        go.wait()
        try:
            with workdir_lock(workdir):
                got.append(number)
                over.wait(60)
        except UserError:
            refused.append(number)
            if len(refused) == 3:
                over.set()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 3


class Clock:
    """What `lease` takes for the time: nothing but its own pauses passes."""

    def __init__(self):
        self._now = 0.0

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        self._now += seconds


def left(workdir, **changed):
    owner = {"host": "gone", "pid": 1, "since": "1970", "boot": "none", "token": "0"} | changed
    (workdir / LOCK).write_text(json.dumps(owner))


def test_that_of_a_machine_that_is_gone_is_taken_over_when_it_is_seen_to_be(workdir, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    left(workdir)
    with workdir_lock(workdir):
        assert json.loads((workdir / LOCK).read_text())["pid"] == os.getpid()
    assert clock.monotonic() >= lease.DEAD


def test_that_of_a_dead_process_of_this_machine_is_taken_over_at_once(workdir, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = {"host": lease.socket.gethostname(), "boot": lease._boot()}
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    left(workdir, pid=process.pid, **here)
    with workdir_lock(workdir):
        pass
    left(workdir, pid=os.getpid(), **here)  # as in a container, where all begin with the same number
    with workdir_lock(workdir):
        pass
    assert clock.monotonic() == 0


def test_an_answer_that_was_lost_is_no_other_owner(workdir, cloud, monkeypatch):
    objects = type(workdir)
    write = objects.write_bytes

    def lost(self, data, generation=None):
        write(self, data, generation)
        monkeypatch.setattr(objects, "write_bytes", write)
        raise FileExistsError

    monkeypatch.setattr(objects, "write_bytes", lost)
    with workdir_lock(workdir):
        pass


def test_who_was_asleep_while_another_took_it_ends(workdir, monkeypatch):
    ended = threading.Event()
    said = []
    monkeypatch.setattr(lease.exits, "leave", lambda error: (said.append(str(error)), ended.set()))
    with workdir_lock(workdir):
        left(workdir)
        assert ended.wait(60)
    assert "another run took the workdir" in said[0]
    assert json.loads((workdir / LOCK).read_text())["host"] == "gone", "the other's lock stays"


def test_who_was_asleep_while_another_took_it_commits_nothing(workdir, monkeypatch, fresh):
    def leave(error):
        raise SystemExit(str(error))

    monkeypatch.setattr(lease, "EVERY", 60.0)  # it commits before it renews
    monkeypatch.setattr(lease.exits, "leave", leave)
    with workdir_lock(workdir), mirror.kept(workdir) as folder:
        for step in ("4", "8"):
            (workdir / step / "data").write_bytes(b"data")
        (folder / "metrics.jsonl").write_text("older\n")
        manifest.write(workdir / "4", {}, before=lambda: lease.confirm(workdir))
        left(workdir)
        (workdir / "metrics.jsonl").write_text("of the other\n")
        with pytest.raises(SystemExit, match="another run took the workdir"):
            manifest.write(workdir / "8", {}, before=lambda: lease.confirm(workdir))
        mirror.flush(workdir)
        mirror.rescue(workdir, os.getpid(), lambda folder: pytest.fail("it left nothing"))
    assert manifest.committed(workdir / "4") and not manifest.committed(workdir / "8")
    assert (workdir / "metrics.jsonl").read_text() == "of the other\n"


def test_a_storage_that_was_away_is_no_reason_to_end(workdir, cloud, monkeypatch):
    monkeypatch.setattr(lease.exits, "leave", lambda error: pytest.fail(str(error)))
    with workdir_lock(workdir):
        before = (workdir / LOCK).read()[1]
        cloud.faults.append(Fault("POST write", 403, times=3))
        while (workdir / LOCK).read()[1] == before or cloud.faults[-1].times:
            time.sleep(0.01)


def test_a_bucket_that_is_not_there_is_said(cloud):
    from flaxmodels import storage

    refused = pytest.raises(UserError, match="gs://nowhere does not exist")
    with refused, workdir_lock(storage.place("gs://nowhere/run")):
        pass


def test_a_bucket_that_does_not_answer_is_a_fault(workdir, cloud, impatient):
    with pytest.raises(FaultError, match=f"{workdir}: gs://bucket does not answer as it should"), workdir_lock(workdir):
        cloud.faults.append(Fault("read|stat|list", 503))
        workdir.exists()
    cloud.faults.append(Fault("read", 503))
    with pytest.raises(FaultError, match="the same command goes on"), workdir_lock(workdir):
        pass


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(mirror, "_OPEN", {})
    monkeypatch.setattr(mirror.atexit, "register", lambda function: None)
    yield
    for one in mirror._OPEN.values():
        one.over.set()


def test_of_a_folder_nothing_is_kept_elsewhere(tmp_path, fresh):
    with mirror.kept(tmp_path) as folder:
        assert folder == tmp_path == mirror.local(tmp_path, 3)
    mirror.flush(tmp_path)
    assert not mirror._OPEN


def test_what_changed_is_copied(workdir, cloud, fresh):
    with mirror.kept(workdir) as folder:
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_bytes(b"1")
        (folder / "metrics.jsonl").write_text("a\n")
        (folder / "half.tmp").write_text("half")
        assert mirror.remote(folder / "a" / "b") == workdir / "a" / "b" and mirror.remote(Path("a")) == Path("a")
        mirror.flush(workdir)
        there = cloud.objects("bucket", f"{workdir.key}/")
        assert there == {f"{workdir.key}/metrics.jsonl": b"a\n", f"{workdir.key}/tensorboard/events": b"1"}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("b\n")
        cloud.requests.clear()
        mirror.flush(workdir)
        assert cloud.requests == [f"POST write {workdir.key}/metrics.jsonl"]
        (folder / "curves.png").write_bytes(b"p")
    assert (workdir / "curves.png").read_bytes() == b"p" and (workdir / "metrics.jsonl").read_text() == "a\nb\n"


def test_what_a_run_goes_on_with_comes_from_the_bucket(workdir, fresh):
    (workdir / "metrics.jsonl").write_text("of the bucket\n")
    folder = mirror.local(workdir)
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "goodput.jsonl"):
        (folder / name).write_text("of this machine\n")
    with mirror.kept(workdir) as folder:
        assert (folder / "metrics.jsonl").read_text() == "of the bucket\n" and not (folder / "goodput.jsonl").exists()
    (workdir / "metrics.jsonl").write_text("of another\n")
    with mirror.kept(workdir) as again:  # `fit` may be called again
        assert again == folder and (folder / "metrics.jsonl").read_text() == "of another\n"


def test_a_bucket_that_does_not_answer_is_told_once_and_nothing_is_lost(workdir, cloud, fresh, impatient, capsys):
    with mirror.kept(workdir) as folder:
        (folder / "metrics.jsonl").write_text("a\n")
        cloud.faults.append(Fault("write", 503))
        one = mirror._OPEN[str(workdir)]
        one._try("later")
        one._try("later")
        with pytest.raises(OSError, match="does not answer"):
            mirror.flush(workdir)
        cloud.faults.clear()
    assert capsys.readouterr().err.count("warning: lines of the log are not in gs://bucket/") == 1
    assert (workdir / "metrics.jsonl").read_text() == "a\n"


def test_what_a_killed_process_left_is_copied_by_who_started_it(workdir, fresh, monkeypatch):
    code = (
        "import os, sys, time; from flaxmodels import mirror, storage; from flaxmodels.runtime import goodput\n"
        "mirror.SOON = 3600.0\n"
        "w = storage.place(sys.argv[1]); f = mirror.folder(w); (f / 'logs').mkdir()\n"
        "(f / 'logs' / 'x').write_text('last')\n"
        "a = goodput.Attempt(f); a.start(0)\n"
        "while not (f / 'goodput.jsonl').exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(workdir)], cwd=Path(__file__).parents[2])
    assert process.wait(300) == -9
    assert not (workdir / "logs").exists()
    mirror.rescue(workdir, process.pid, lambda folder: goodput.close(folder, process.pid, -9))
    assert (workdir / "logs" / "x").read_text() == "last"
    assert [record["ended"] for record in goodput.read(workdir)] == [-9]
    here = mirror.local(workdir).parent
    assert any(here.glob(f"*.{process.pid}"))
    mirror.folder(workdir)
    assert not any(here.glob(f"*.{process.pid}")), "the next process of this machine clears it away"
