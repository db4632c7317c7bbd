"""Any change of a committed folder is seen and named; a folder is committed whole or not at all."""

import itertools
import json
import os
import shutil

import pytest

from flaxmodels import manifest
from flaxmodels.registry import UserError

FILES = {"a": b"12345", "inner/b": b"", "inner/deep/c": bytes(range(256)) * 40}
FACTS = {"step": 3, "loss": 0.1, "text": "naïve", "none": None, "list": (1, 2), "function": json.dumps}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write(folder, FACTS)
    return folder


def test_a_committed_folder_is_whole_and_has_its_facts(folder):
    assert manifest.committed(folder) and manifest.verify(folder) == []
    assert manifest.read(folder) == FACTS | {"list": [1, 2], "function": "json:dumps"}
    listed = json.loads((folder / manifest.NAME).read_text())["files"]
    assert list(listed) == sorted(FILES) and {name: found["size"] for name, found in listed.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    shutil.copytree(folder, folder.with_name("copy"))
    assert manifest.verify(folder.with_name("copy")) == []


def test_each_change_is_named(folder):
    (folder / "a").write_bytes(b"12346")
    assert manifest.verify(folder) == ["a is damaged: its SHA-256 is another one"]
    (folder / "a").write_bytes(b"1234")
    (folder / "inner/b").unlink()
    (folder / "inner/new").touch()
    (folder / "inner/deep/c").unlink()
    (folder / "inner/deep/c").symlink_to(folder / "a")
    assert manifest.verify(folder) == [
        "inner/b is missing",
        "inner/new was not there when it was written",
        "inner/deep/c is not a plain file any more",
        "a has 4 bytes, 5 were written",
    ]
    shutil.rmtree(folder / "inner")
    assert manifest.verify(folder)[:2] == ["inner/b is missing", "inner/deep/c is missing"]


def test_shares_together_see_what_one_sees(folder):
    for name in FILES:
        (folder / name).write_bytes(b"another")
    (folder / "new").touch()
    whole = manifest.verify(folder)
    assert len(whole) == 4
    for parts in (2, 3, 5):
        shares = [manifest.verify(folder, part, parts) for part in range(parts)]
        assert sorted(itertools.chain(*shares)) == sorted(whole) and max(map(len, shares)) < 4
    (folder / manifest.NAME).write_bytes(b"{}")
    assert [len(manifest.verify(folder, part, 2)) for part in range(2)] == [1, 0]


def test_every_byte_of_the_manifest_itself_counts(folder):
    file = folder / manifest.NAME
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"MANIFEST.json in '.*step' is damaged"):
            manifest.read(folder)
    for text in (whole[:-1], whole + b"\n", b"", whole.replace(b"3", b"3.0", 1), b"[" * 100_000, b"null", b"\xff"):
        file.write_bytes(text)
        assert len(manifest.verify(folder)) == 1 and "damaged" in manifest.verify(folder)[0]
    file.unlink()
    assert not manifest.committed(folder) and "never committed" in manifest.verify(folder)[0]
    file.mkdir()
    assert not manifest.committed(folder) and "Is a directory" in manifest.verify(folder)[0]


def test_a_format_of_the_future_is_not_called_damaged(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    manifest.write(folder, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"format 2, which is newer: expected 1"):
        manifest.read(folder)


def test_amending_replaces_facts_and_nothing_else(folder):
    before = json.loads((folder / manifest.NAME).read_text())
    (folder / "a").write_bytes(b"12346")  # is not hashed again: the damage stays to be seen
    manifest.amend(folder, {"step": 4})
    assert manifest.read(folder) == {"step": 4} and len(manifest.verify(folder)) == 1
    assert json.loads((folder / manifest.NAME).read_text())["files"] == before["files"]
    (folder / manifest.NAME).write_text("{}")
    with pytest.raises(UserError, match=r"damaged"):
        manifest.amend(folder, {"step": 5})


@pytest.mark.parametrize("number", range(8))
def test_what_fails_to_reach_storage_is_not_committed(folder, monkeypatch, number):
    """Three files, three folders, the manifest: whichever fsync fails."""
    calls = iter(range(100))

    def fsync(descriptor):
        if next(calls) == number:
            raise OSError(5, "Input/output error")

    (folder / manifest.NAME).unlink()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error"):
        manifest.write(folder, FACTS)
    monkeypatch.undo()
    # The eighth is that of the folder after the rename: what it names is whole, should it be there after a crash.
    assert manifest.committed(folder) == (number == 7)
    assert not list(folder.glob("*.tmp"))
