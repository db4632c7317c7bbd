"""The state file: it comes back as it was written, whole or not at all, and one command at a time has it."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from modelled import PARCEL, kept

from tpu import state
from tpu.cost import Life
from tpu.settings import UserError
from tpu.state import Held, Kept, StateError

FULL = kept(
    phase="running",
    since=1.5,
    held=Held("z1-a", 1.25, met=True, silent=3.0),
    refused={"z2-b": "Quota."},
    lives=(Life("z1-a", None, None, 16, 3.84), Life("z2-b", 1.0, 2.0, 16, None, "preempted")),
)


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "runs" / "a"
    assert state.load(folder) == Kept()
    for one in (FULL, Kept(), replace(FULL, held=None)):
        state.save(folder, one)
        assert state.load(folder) == one
    assert [file.name for file in folder.iterdir()] == [state.FILE]
    assert json.loads((folder / state.FILE).read_text())["format"] == state.FORMAT


def damaged():
    good = json.loads(state.written(FULL))
    yield "", "Expecting value"
    yield state.written(FULL)[:-40], "Expecting|Unterminated"
    yield "[]", "no format number"
    yield "[" * 100_000, "nested too deeply"
    yield json.dumps(good | {"format": 2}), "its format is 2, this version reads 1"
    yield json.dumps(good | {"kept": 3}), "kept is '3'"
    for key, value, said in [
        ("phase", "sleeping", "kept.phase is 'sleeping'"),
        ("attempt", "2", "kept.attempt is '2'"),
        ("attempt", True, "kept.attempt is 'True'"),
        ("since", True, "kept.since is 'True'"),
        ("looked", float("nan"), "kept.looked is 'nan'"),
        ("lives", {}, "kept.lives is"),
        ("lives", [3], r"kept.lives\[0\] is '3'"),
        ("refused", {"z": 1}, "kept.refused.z is '1'"),
        ("held", {"zone": "z"}, r"kept.held.\w+ is missing"),
        ("extra", 1, "kept.extra is unknown"),
    ]:
        yield json.dumps(good | {"kept": good["kept"] | {key: value}}), said
    yield (
        json.dumps(good | {"kept": {key: one for key, one in good["kept"].items() if key != "zone"}}),
        "zone is missing",
    )


@pytest.mark.parametrize("text, said", [pytest.param(*row, id=row[1]) for row in damaged()])
def test_a_damaged_file_is_an_error_with_a_remedy(tmp_path, text, said):
    (tmp_path / state.FILE).write_text(text)
    with pytest.raises(StateError, match=said) as caught:
        state.load(tmp_path)
    assert f"{tmp_path / state.FILE} is damaged" in str(caught.value) and "Move it away" in str(caught.value)


def test_a_file_that_is_no_text_or_can_not_be_read(tmp_path):
    (tmp_path / state.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(StateError, match="can't be read"):
        state.load(tmp_path)
    (tmp_path / "b" / state.FILE).mkdir(parents=True)
    with pytest.raises(StateError, match="can't be read"):
        state.load(tmp_path / "b")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    state.save(tmp_path, FULL)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StateError, match="No space left on device"):
                state.save(tmp_path, Kept())
        assert state.load(tmp_path) == FULL
        assert [file.name for file in tmp_path.iterdir()] == [state.FILE]


def test_it_is_on_disk_before_it_is_named(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder."""
    done, fsync, move = [], os.fsync, os.replace

    def watched_fsync(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def watched_move(*words):
        done.append("named")
        move(*words)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_move)
    state.save(tmp_path, FULL)
    assert done == ["file", "named", "folder"]


def test_lives_open_and_close():
    one = state.opened(Kept(), Life("z1-a", None, None, 4, 1.0))
    assert state.opened(one, Life("z1-a", 5.0, None, 4, 1.0)).lives == (Life("z1-a", 5.0, None, 4, 1.0),)
    two = state.opened(state.opened(one, Life("z1-a", 5.0, None, 4, 1.0)), Life("z2-b", None, None, 4, 1.0))
    held = replace(two, held=Held("z1-a", 1.0))
    ended = Life("z1-a", 5.0, 9.0, 4, 1.0, "deleted")
    assert state.closed(held, 9.0, "deleted", "z1-a").lives == (ended, Life("z2-b", None, None, 4, 1.0))
    assert state.closed(held, 9.0, "deleted", "z1-a").held is None
    assert state.closed(held, 9.0, "deleted", "z2-b").held == held.held
    assert state.closed(held, 9.0, "deleted").lives == (ended,)  # what never began to cost is forgotten
    assert state.closed(held, 3.0, "deleted").lives == (replace(ended, ended=5.0),)  # nor by a clock that went back
    again = state.closed(state.closed(held, 9.0, "deleted"), 20.0, "deleted")
    assert again.lives == (ended,)


def test_afresh_keeps_what_it_cost_and_its_code():
    before = replace(FULL, end="failed", code=1, attempt=7, step=30, fruitless=3, phase="failed", bad=2)
    after = state.afresh(before)
    assert (after.attempt, after.step, after.mark, after.parcel, after.lives) == (7, 30, 30, PARCEL, before.lives)
    assert (after.end, after.code, after.fruitless, after.bad, after.phase, after.refused) == (
        "",
        0,
        0,
        0,
        "waiting",
        {},
    )


def test_one_command_at_a_time(tmp_path):
    assert state.owner(tmp_path / "none") == ""
    with state.held(tmp_path, "watch"):
        assert state.owner(tmp_path).startswith(f"watch, pid {os.getpid()} on ")
        refused = pytest.raises(UserError, match=rf"belongs to another command: watch, pid {os.getpid()} on .*Ctrl-C")
        with refused, state.held(tmp_path, "down"):
            raise AssertionError("two at a time")
        assert state.owner(tmp_path).startswith("watch")  # who was refused did not write itself there
    assert state.owner(tmp_path) == ""
    with state.held(tmp_path, "down"):
        assert state.owner(tmp_path).startswith("down")


def test_the_lock_of_a_dead_process_holds_nobody_back(tmp_path):
    code = "import os, sys; from tpu import state; from pathlib import Path\n"
    code += "with state.held(Path(sys.argv[1]), 'watch'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=state.__file__.rpartition("/tpu/")[0], timeout=60)
    assert (tmp_path / state.LOCK).read_text().startswith("watch")
    with state.held(tmp_path, "down"):
        pass
