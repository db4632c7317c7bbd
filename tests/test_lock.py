"""One run a workdir: by the kernel's lock, and where that is not enough by a file that is renewed."""

import errno
import json
import os
import socket
import subprocess
import threading
import time

import pytest

from flaxmodels.registry import UserError
from flaxmodels.runtime import lock
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.lock import BEAT, LOCK, workdir_lock


@pytest.fixture
def lockless(monkeypatch):
    """A file system without locks, and a clock that runs fast."""

    def flock(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    for name, seconds in [("EVERY", 0.02), ("DEAD", 0.2), ("SETTLED", 0.03)]:
        monkeypatch.setattr(lock, name, seconds)


def owned(workdir, host="elsewhere", pid=7, beat="token 3"):
    workdir.mkdir()
    (workdir / LOCK).write_text(json.dumps({"host": host, "pid": pid, "since": "yesterday"}))
    (workdir / BEAT).write_text(beat)


def test_the_kernels_lock_needs_nothing_besides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_local", lambda workdir: "")
    with workdir_lock(tmp_path / "run") as said:
        assert said == "" and [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
        mine = f"belongs to another running process: pid {os.getpid()} on "
        with pytest.raises(UserError, match=mine), workdir_lock(tmp_path / "run"):
            pass
    with workdir_lock(tmp_path / "run"):
        pass


def test_without_locks_a_file_is_renewed_and_it_says_so(tmp_path, lockless):
    workdir = tmp_path / "run"
    with workdir_lock(workdir) as said:
        assert said.startswith("lock: the file system of the workdir has no locks;")
        seen = {(workdir / BEAT).read_text()}
        deadline = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(text := (workdir / BEAT).read_text())
            assert text is not None
        assert len(seen - {""}) >= 2
        with pytest.raises(UserError, match=f"pid {os.getpid()} on {socket.gethostname()}"), workdir_lock(workdir):
            pass
    assert not (workdir / BEAT).exists()
    with workdir_lock(workdir):
        pass


def test_an_owner_elsewhere_that_no_longer_renews_is_dead(tmp_path, lockless):
    workdir = tmp_path / "run"
    owned(workdir)
    begun = time.monotonic()
    with workdir_lock(workdir):
        assert time.monotonic() - begun >= lock.DEAD
        assert json.loads((workdir / LOCK).read_text())["pid"] == os.getpid()


def test_an_owner_elsewhere_that_lives_is_named_at_once(tmp_path, lockless, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 60.0)
    workdir, over = tmp_path / "run", threading.Event()
    owned(workdir)

    def renew():
        count, new = 0, tmp_path / "new"
        while not over.wait(0.01):
            new.write_text(f"token {(count := count + 1)}")
            new.replace(workdir / BEAT)  # which is never seen empty, as that of no owner

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="process: pid 7 on elsewhere, since yesterday"), workdir_lock(workdir):
            pass
    finally:
        over.set()
        thread.join()


def test_a_dead_owner_on_this_host_is_not_waited_for(tmp_path, lockless, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 60.0)
    child = subprocess.Popen(["true"])
    child.wait()
    owned(tmp_path / "run", socket.gethostname(), child.pid)
    with workdir_lock(tmp_path / "run"):
        pass


def test_of_two_that_begin_together_one_goes_on(tmp_path, lockless, monkeypatch):
    monkeypatch.setattr(lock, "SETTLED", 0.3)
    monkeypatch.setattr(lock, "DEAD", 60.0)
    workdir, results, both = tmp_path / "run", [], threading.Barrier(2)
    workdir.mkdir()

    def begin():
        both.wait(60)
        try:
            with workdir_lock(workdir):
                results.append(True)
                both.wait(60)
        except UserError:
            results.append(False)
            both.wait(60)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results) == [False, True]


MOUNTS = """22 1 0:20 / / rw,relatime - ext4 /dev/root rw
30 22 0:25 / /mnt/my\\040bucket rw - fuse.gcsfuse bucket rw,user_id=0
31 22 0:26 / /mnt/near rw,relatime - nfs4 host:/x rw,vers=4.2,local_lock=none
32 22 0:27 / /mnt/old rw,relatime - nfs host:/y rw,nolock,local_lock=all
"""


def test_which_locks_reach_other_hosts(tmp_path, monkeypatch):
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "mounts")
    for folder, said in [
        ("/mnt/my bucket/runs/a", "(fuse.gcsfuse) may have locks that other hosts don't see"),
        ("/mnt/near/run", ""), ("/mnt/old", "(nfs) may have"), ("/mnt/nearer", ""), ("/home/x", ""),
    ]:  # fmt: skip
        assert lock._local(lock.Path(folder)).startswith(said) and bool(lock._local(lock.Path(folder))) == bool(said)
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "none")
    assert lock._local(tmp_path) == ""


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, UserError), (errno.ENOSPC, FaultError)])
def test_f9_what_can_not_be_written_is_named(tmp_path, monkeypatch, number, kind):
    """A folder that is read-only is for a person to mend; a disk that is full may be empty when it is tried again."""

    def fail(*words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, "pwrite", fail)
    said = f"--workdir='{tmp_path}' can't be written: {os.strerror(number)}"
    with pytest.raises(kind, match=said), workdir_lock(tmp_path):
        pass


def test_a_folder_that_nothing_came_into_is_removed(tmp_path, lockless, monkeypatch):
    monkeypatch.setattr(lock, "EVERY", 60.0)  # no renewal as it is removed
    for inner in (tmp_path / "deep" / "run", tmp_path / "run"):
        with pytest.raises(KeyError), workdir_lock(inner):
            raise KeyError
    assert list(tmp_path.iterdir()) == []
