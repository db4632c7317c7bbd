"""What a checkpoint says of where it came from: facts that are JSON, and the revision of the code, found in time."""

import json
import subprocess
import types

import jax
import pytest

from flaxmodels import resume
from flaxmodels.registry import UserError


def git(*words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of its own, whose revision is looked up anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    resume.revision.cache_clear()
    yield tmp_path
    resume.revision.cache_clear()


def test_the_revision_is_that_of_the_working_directory(folder):
    assert resume.revision() is None  # no repository
    (folder / "a.py").write_text("1")
    git("init", "-q")
    git("add", "a.py")
    git("commit", "-q", "-m", "a")
    (folder / "runs").mkdir()
    (folder / "runs/log").write_text("what a run writes is no change")
    assert resume.revision() is None  # looked up once, when the code was loaded
    resume.revision.cache_clear()
    found = resume.revision()
    assert len(found["revision"]) == 40 and found["dirty"] is False
    (folder / "a.py").write_text("2")
    resume.revision.cache_clear()
    assert resume.revision() == {**found, "dirty": True}


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 3", "printf '\\377'", None])
def test_a_git_that_hangs_or_fails_keeps_no_run_from_starting(folder, monkeypatch, script):
    monkeypatch.setattr(resume, "GIT_LIMIT", 0.1)
    if script is not None:
        (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) if script is None else f"{folder}:/bin:/usr/bin")
    assert resume.revision() is None


def test_facts_are_json_and_say_what_a_checkpoint_came_from():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), devices=jax.devices())
    job = types.SimpleNamespace(identity={"seed": 0, "tokenizer": "ab12"}, mesh=mesh)
    facts = resume.facts(job, {"seed": 0, "model.activation": jax.nn.relu}, 36)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["parent"] == 36 and facts["mesh"] == {"data": 4, "fsdp": 2} and facts["platform"] == "cpu"
    assert facts["tokenizer"] == "ab12" and facts["processes"] == 1
    same = resume.facts(job, {"model.activation": jax.nn.relu, "seed": 0}, None)
    assert same["config sha256"] == facts["config sha256"] != resume.facts(job, {"seed": 1}, None)["config sha256"]
    job.identity["seed"] = 1
    assert resume.facts(job, {}, None)["data sha256"] != facts["data sha256"] == same["data sha256"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": {"se'])
def test_a_config_that_a_crash_cut_off_is_named(tmp_path, text):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json' is damaged .* --allow_config_change"):
        resume.same_config(tmp_path, [("seed", 0, "default")], False)
    resume.same_config(tmp_path, [("seed", 0, "default")], True)
    resume.write_config(tmp_path, {"seed": 0})
    resume.same_config(tmp_path, [("seed", 0, "default")], False)
