"""The batch script: run by a shell, with an `srun` and a `scontrol` that stand for those of a cluster."""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from flaxmodels.runtime import cluster
from tpu import settings, slurm
from tpu.gcloud import Cloud

# What `srun` is to run comes as its last words. Each task's environment goes to a file; the code is the wish of a test.
SRUN = """#!/bin/sh
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_STEP_NODELIST='node[007-008]' SLURM_STEP_NUM_TASKS=2 \\
  SLURM_STEP_TASKS_PER_NODE='1(x2)' env >"$OUT/task$task"
done
printf '%s\\n' "$@" >"$OUT/words"
sleep "${SLEEP:-0}"
exit "$CODE"
"""
SCONTROL = """#!/bin/sh
echo "$@" >>"$OUT/scontrol"
if [ "$1" = show ]; then printf 'node007\\nnode008\\n'; fi
"""


def made(**given):
    return settings.Settings(**{"name": "a", "bucket": "/shared/runs", **given})


def flags(*words):
    parser = argparse.ArgumentParser()
    slurm.add_flags(parser)
    return parser.parse_args(["--setup=true", "--nodes=2", *words])


@pytest.fixture
def submit(tmp_path):
    """submit(settings, flags, code) -> (the finished script, the folder of what it did)."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(s, given, code=0, **env):
        script = tmp_path / "job.sbatch"
        script.write_text(slurm.script(s, given, Path("state")))
        (tmp_path / "state").mkdir(exist_ok=True)
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(tmp_path), "CODE": str(code),
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[007-008]", "SLURM_SUBMIT_DIR": str(tmp_path), **env,
        }  # fmt: skip
        return subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60), tmp_path

    return run


def asked(out):
    found = out / "scontrol"
    return [line.split()[0] for line in found.read_text().splitlines()] if found.exists() else []


def test_every_task_finds_its_place(submit):
    done, out = submit(made(), flags())
    assert done.returncode == 0, done.stderr
    envs = [dict(line.split("=", 1) for line in (out / f"task{n}").read_text().splitlines()) for n in (0, 1)]
    places = [cluster.find(env) for env in envs]
    assert [(place.process, place.processes) for place in places] == [(0, 2), (1, 2)]
    assert {place.address for place in places} == {f"node007:{61440 + 4711 % 4096}"}
    assert {place.local_device_ids for place in places} == {None}  # all GPUs of the node


def test_it_runs_the_whole_command(submit):
    s = made(command=("python", "train.py", "--config=a b.py", "--config.name=it's"))
    _, out = submit(s, flags())
    words = (out / "words").read_text().splitlines()
    assert words[-len(s.training) :] == list(s.training)
    assert "--workdir=/shared/runs/a" in words
    assert "--config.checkpoint.damaged=pass over" in words


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_only_what_was_asked_to_stop_queues_again(submit, code):
    done, out = submit(made(), flags(), code)
    assert (done.returncode, asked(out)) == (code, ["show"])


def test_what_was_asked_to_stop_queues_again(submit):
    done, out = submit(made(), flags(), slurm.STOPPED)
    assert asked(out) == ["show", "requeue"]
    assert "4711" in (out / "scontrol").read_text()
    assert "queued again" in done.stdout


def test_hours_count_over_all_starts(submit):
    s, given = made(max_hours=3), flags("--hours=2")
    done, out = submit(s, given, slurm.STOPPED)
    clock = out / "state" / "seconds-4711"
    assert asked(out) == ["show", "requeue"]
    assert 0 <= int(clock.read_text()) < 60
    clock.write_text("7100")  # the next start may no longer last its two hours
    done, out = submit(s, given, slurm.STOPPED)
    assert f"update JobId=4711 TimeLimit={(3 * 3600 - 7100) // 60}" in (out / "scontrol").read_text()
    assert int(clock.read_text()) >= 7100
    clock.write_text(str(3 * 3600 - slurm.LATEST - 1))
    done, out = submit(s, given, slurm.STOPPED, SLEEP="1")
    assert (done.returncode, done.stdout) == (slurm.LIMIT, "stopped by max_hours=3: saved\n")
    (out / "scontrol").unlink()
    done, out = submit(s, given)
    assert (done.returncode, asked(out)) == (slurm.LIMIT, [])
    assert "used up" in done.stdout


def test_head_says_what_sbatch_should_know():
    text = slurm.script(
        made(max_hours=48), flags("--gpus=4", "--partition=gpu", "--account=lab", "--hours=12"), Path("s")
    )
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert set(head) == {
        "--job-name=a", "--partition=gpu", "--account=lab", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4",
        "--time=720", "--output=s/slurm-%j.log", "--open-mode=append", "--requeue", f"--signal=TERM@{slurm.NOTICE}",
    }  # fmt: skip
    assert "--time" not in slurm.script(made(), flags(), Path("s"))
    assert text.index("#SBATCH --signal") < text.index("set -")  # sbatch reads none below the first command


@pytest.mark.parametrize("words", [["--nodes=0"], ["--gpus=x"], ["--hours=0.1"], ["--hours=nan"]])
def test_what_can_not_be_is_refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        flags(*words)
    assert left.value.code == 2


@pytest.mark.parametrize("folder", ["my runs", "runs%j", "a$b", "it's"])
def test_a_folder_that_slurm_or_the_shell_reads_otherwise_is_refused(folder):
    with pytest.raises(settings.UserError, match="path of letters"):
        slurm.script(made(), flags(), Path(folder))


def test_verb_writes_it_and_a_dry_run_prints_the_same(tmp_path, capsys):
    s = made(state=tmp_path, max_cost=5.0)
    assert slurm.slurm(s, Cloud(True), flags()) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert slurm.slurm(s, Cloud(False), flags()) == 0
    to = tmp_path / "a" / "job.sbatch"
    said = capsys.readouterr().out
    assert f"sbatch {shlex.quote(str(to))}" in said
    assert "max_cost=5 does not count" in said
    assert to.read_text() == printed
