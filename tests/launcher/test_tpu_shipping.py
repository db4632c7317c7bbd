import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tpu import shipping
from tpu.settings import UserError


def git(repository: Path, *words: str) -> str:
    command = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@example.com", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    repository = tmp_path_factory.mktemp("begun") / "repository"
    repository.mkdir()
    git(repository, "init", "-q")
    (repository / "a.txt").write_text("one\n")
    (repository / "gone.txt").write_text("gone\n")
    (repository / ".gitignore").write_text("runs/\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    return repository


@pytest.fixture
def repository(begun, tmp_path):
    """One of its own, with a commit."""
    git(tmp_path, "clone", "-q", str(begun), "repository")
    return tmp_path / "repository"


def test_a_clean_commit_has_no_patch_and_is_packed_once(repository, tmp_path):
    parcel = shipping.pack(repository, tmp_path / "parcels")
    assert parcel.file == tmp_path / "parcels" / f"parcel-{parcel.sha}.tar"
    assert (parcel.revision, parcel.patch_sha, parcel.files) == (git(repository, "rev-parse", "HEAD"), "", ())
    with tarfile.open(parcel.file) as tar:
        assert {"worker.sh", "constraints.txt", "patch", "shipped.json", "bundle"} == set(tar.getnames())
        shipped = json.load(tar.extractfile("shipped.json"))
    assert shipped == {
        "sha": parcel.sha, "revision": parcel.revision, "dirty": False, "patch_sha256": "", "files": [],
    }  # fmt: skip
    assert parcel.digest == hashlib.sha256(parcel.file.read_bytes()).hexdigest()
    before = parcel.file.stat()
    time.sleep(0.01)
    assert shipping.pack(repository, tmp_path / "parcels") == parcel
    assert parcel.file.stat() == before and len(list(parcel.file.parent.iterdir())) == 1


def test_the_patch_brings_every_change_and_the_repository_keeps_its_own(repository, tmp_path):
    (repository / "a.txt").write_text("two\n")
    (repository / "gone.txt").unlink()
    (repository / "umlaut ä.bin").write_bytes(bytes(range(256)))
    (repository / "run.sh").write_text("#!/bin/sh\n")
    (repository / "run.sh").chmod(0o755)
    (repository / "link").symlink_to("a.txt")
    (repository / "runs").mkdir()
    (repository / "runs" / "log").write_text("stays here")
    git(repository, "config", "diff.noprefix", "true")
    (repository / "staged.txt").write_text("staged\n")
    git(repository, "add", "staged.txt")
    status = git(repository, "status", "--porcelain")
    objects = sorted((repository / ".git" / "objects").rglob("*"))

    parcel = shipping.pack(repository, tmp_path / "parcels")
    assert set(parcel.files) == {"a.txt", "gone.txt", "umlaut ä.bin", "run.sh", "link", "staged.txt"}
    assert git(repository, "status", "--porcelain") == status
    assert sorted((repository / ".git" / "objects").rglob("*")) == objects

    with tarfile.open(parcel.file) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(tmp_path / "unpacked" / "bundle"), "clone")
    git(clone, "apply", "--index", str(tmp_path / "unpacked" / "patch"))
    found = {file.name for file in clone.iterdir()} - {".git"}
    assert found == {"a.txt", "umlaut ä.bin", "run.sh", "link", "staged.txt", ".gitignore"}
    for name in found:
        assert (clone / name).read_bytes() == (repository / name).read_bytes()
    assert os.access(clone / "run.sh", os.X_OK) and (clone / "link").is_symlink()
    assert git(clone, "rev-parse", "HEAD") == parcel.revision
    assert parcel.patch_sha == hashlib.sha256((tmp_path / "unpacked" / "patch").read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_name_goes_by_the_content(repository, tmp_path):
    clean = shipping.pack(repository, tmp_path / "parcels")
    (repository / "a.txt").write_text("two\n")
    changed = shipping.pack(repository, tmp_path / "parcels")
    (repository / "a.txt").write_text("one\n")
    assert shipping.pack(repository, tmp_path / "parcels") == clean
    assert changed.sha != clean.sha and changed.revision == clean.revision
    git(repository, "commit", "-q", "--allow-empty", "-m", "second")
    assert shipping.pack(repository, tmp_path / "parcels").sha not in (clean.sha, changed.sha)


@pytest.mark.slow
def test_a_dry_run_tells_of_the_same_parcel_and_leaves_nothing(repository, tmp_path):
    (repository / "a.txt").write_text("two\n")
    told = shipping.pack(repository, tmp_path / "parcels", dry_run=True)
    assert not (tmp_path / "parcels").exists()
    assert shipping.pack(repository, tmp_path / "parcels") == told
    assert shipping.pack(repository, tmp_path / "parcels", dry_run=True) == told


@pytest.mark.slow
def test_data_are_refused_by_name(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "MOST", 1000)
    (repository / "data.bin").write_bytes(b"0" * 1001)
    with pytest.raises(UserError, match=r"more than 0\.0 MiB: data\.bin \(0\.0 MiB\).*into the bucket.*\.gitignore"):
        shipping.pack(repository, tmp_path / "parcels")
    (repository / "data.bin").unlink()
    monkeypatch.setattr(shipping, "LONGEST", 100)
    with pytest.raises(UserError, match=r"the history of .*gitignore \(.*into the bucket"):
        shipping.pack(repository, tmp_path / "parcels")
    assert not (tmp_path / "parcels").exists()


@pytest.mark.slow
def test_what_is_no_repository_of_its_own_is_refused(repository, tmp_path):
    with pytest.raises(UserError, match="is not the top folder of a git repository"):
        shipping.pack(tmp_path, tmp_path / "parcels")
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    with pytest.raises(UserError, match="has no commit yet: commit once"):
        shipping.pack(empty, tmp_path / "parcels")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{repository}", "shallow")
    with pytest.raises(UserError, match=r"shallow clone.*--unshallow"):
        shipping.pack(tmp_path / "shallow", tmp_path / "parcels")
    git(repository, "clone", "-q", ".", "inner")
    with pytest.raises(UserError, match="'inner' is a git repository inside this one"):
        shipping.pack(repository, tmp_path / "parcels")


def test_a_config_that_is_not_there_is_refused_before_it_costs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/gpt2.py").touch()
    good = ("--config=configs/gpt2.py", "--config=configs/gpt2.py:small", "--config=/elsewhere.py", "--config.x=y")
    for words in [("python", "train.py", word) for word in good] + [("--config", "configs/gpt2.py")]:
        shipping.refuse_missing(tmp_path, words)
    for words in (["--config=configs/gpt3.py"], ["--config", "configs/gpt3.py:small"]):
        with pytest.raises(UserError, match="Did you mean 'configs/gpt2"):
            shipping.refuse_missing(tmp_path, words)


@pytest.mark.slow
def test_a_hook_of_git_packs_the_repository_it_is_asked_for(repository, tmp_path, monkeypatch):
    parcel = shipping.pack(repository, tmp_path / "parcels")
    code = (
        "import sys; from pathlib import Path; from tpu import shipping; "
        "print(shipping.pack(Path(sys.argv[1]), Path(sys.argv[2])).sha)"
    )
    environment = os.environ | {"GIT_INDEX_FILE": "/nowhere/index", "GIT_DIR": "/nowhere"}
    said = subprocess.run(
        [sys.executable, "-S", "-c", code, str(repository), str(tmp_path / "parcels")],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == parcel.sha


@pytest.mark.slow
def test_a_worktree_is_a_repository_too(repository, tmp_path):
    git(repository, "worktree", "add", "-q", str(tmp_path / "tree"))
    (tmp_path / "tree" / "a.txt").write_text("tree\n")
    assert shipping.pack(tmp_path / "tree", tmp_path / "parcels").files == ("a.txt",)
