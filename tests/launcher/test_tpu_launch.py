"""The command line, and the verbs `up`, `down`, `ssh` and `cost`."""

import ast
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from answers import Google, request
from cloud import ROOT
from fake import sayings

from tpu import keys, processes, settings, state, up, verbs
from tpu import launch as launcher
from tpu.cost import Life

A, B = "us-west4-a", "us-west1-c"
FLAGS = ["--name=a", "--type=v5litepod-16", f"--zone={A},{B}", "--project=p"]
CREATED = (
    f"$ gcloud compute tpus queued-resources create a --node-id=a --project=p --zone={A} "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
    "--valid-until-duration=720m --labels=flaxmodels=a --quiet"
)


@pytest.fixture
def google(monkeypatch, tmp_path):
    """A cloud in which nothing is there; no command waits."""
    made = Google(A, B)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "run", made)
    monkeypatch.setattr("time.sleep", made.slept.append)
    made.folder = tmp_path / "runs/tpu/a"
    return made


def launch(*words):
    return verbs.main(list(words))


def creates(google):
    return [zone for verb, zone in google.did if verb == "create"]


def test_the_first_command_that_a_user_tries_prints_what_it_would_do_and_does_nothing(tmp_path):
    words = ["up", *FLAGS[:2], f"--zone={A}", "--project=p", "--dry_run"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tpu/launch.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith("$")] == [
        f"$ gcloud compute tpus queued-resources describe a --project=p --zone={A} --format=json",
        CREATED,
        f"$ gcloud compute tpus tpu-vm list --project=p --zone={A} --format=json",
    ]
    assert "ready in us-west4-a: 4 hosts with 16 chips of v5e. It costs 3.84 USD an hour (spot)" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upp"], "'upp' is not a verb. Did you mean 'up'?"),
        (["up", "--nam=a"], "unknown flag '--nam=a'. Did you mean '--name'?"),
        (["up", "--name"], "--help` names all flags"),
        (["up", *FLAGS[:1], *FLAGS[2:], "--type=v5e-16"], "Did you mean 'v5litepod-16'?"),
        (["up", "--name=a"], "--project is missing"),
        (["up", *FLAGS, "--file=none.toml"], "none.toml"),
        (["up", *FLAGS, "--every=nan"], "--every='nan': expected a number above 0"),
        (["ssh", *FLAGS, "--worker=4"], "expected a number from 0 to 3, or 'all'"),
        (["ssh", *FLAGS, "--worker=all"], "needs a command"),
    ],
)
def test_bad_input_is_named_with_what_was_meant(google, capsys, words, said):
    assert launch(*words) == 2
    assert said in capsys.readouterr().err
    assert google.did == []


def test_an_older_python_is_told_what_is_expected(monkeypatch, capsys):
    find = launcher.util.find_spec
    monkeypatch.setattr(launcher.util, "find_spec", lambda name: None if name == "tomllib" else find(name))
    assert launcher.main(["up"]) == 2
    assert "expected Python 3.11 or later, on Linux, macOS or WSL" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_named(google, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launch("up", *FLAGS, "--state=file") == 2
    assert "error: --state='file' can't be written" in capsys.readouterr().err
    assert launch("gke", *FLAGS, "--bucket=gs://b", "--to=file/x.yaml") == 1
    assert capsys.readouterr().err.startswith("error: file: ")
    assert google.did == []


def test_help_names_all_verbs_and_a_verb_its_flags(capsys):
    assert launch() == launch("--help") == 0
    told = capsys.readouterr().out
    assert all(f"\n  {verb} " in told for verb in verbs.VERBS)
    with pytest.raises(SystemExit) as left:
        launch("up", "--help")
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--{key}" in told for key in [*keys.KEYS, "dry_run", "every"])


def test_without_gcloud_the_remedy_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch("up", *FLAGS) == 1
    assert "https://cloud.google.com/sdk/docs/install" in capsys.readouterr().err


def test_who_is_not_logged_in_is_told_how(google, capsys):
    google.say["queued-resources describe"] = ["ERROR: You do not currently have an active account selected."]
    assert launch("up", *FLAGS) == 1
    assert "`gcloud auth login`" in capsys.readouterr().err


def test_up_waits_till_the_machine_is_there_and_remembers_what_it_costs(google, capsys):
    google.grants[A] = [request(name) for name in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")]
    assert launch("up", *FLAGS, "--every=7") == 0
    told = capsys.readouterr().out
    assert CREATED in told and "WAITING_FOR_RESOURCES in us-west4-a" in told and "is ready in us-west4-a" in told
    assert google.slept == [7.0] * 3
    (life,) = state.load(google.folder).lives
    assert (life.zone, life.ended, life.chips, life.usd_per_hour) == (A, None, 16, pytest.approx(3.84))
    assert life.begun is not None
    kept = state.load(google.folder)
    assert (kept.phase, kept.why) == ("waiting", f"{A} is ready for `run` or `watch`") and kept.since >= life.begun


def test_up_waits_on_where_the_cloud_does_not_answer_for_a_while(google, capsys):
    google.grants[A] = [request("WAITING_FOR_RESOURCES"), request("WAITING_FOR_RESOURCES"), request("ACTIVE")]
    create = google._create

    def created(words, zone):
        google.say["queued-resources describe"] = ["ERROR: UNAVAILABLE"] * 4  # more than a command tries by itself
        return create(words, zone)

    google._create = created
    assert launch("up", *FLAGS) == 0
    assert google.slept[:4] == [1.0, 5.0, 20.0, up.EVERY]
    assert "UNAVAILABLE" in capsys.readouterr().out
    google.there[A] = None
    google.say["queued-resources describe"] = ["ERROR: UNAVAILABLE"] * 4
    assert launch("up", *FLAGS) == 1


def test_up_again_makes_no_second_machine(google):
    assert launch("up", *FLAGS) == launch("up", *FLAGS) == 0
    assert creates(google) == [A]
    google.there[A], google.there[B] = None, request("WAITING_FOR_RESOURCES")
    google.there[B], google.nodes[B] = [google.there[B], request("ACTIVE")], {"a": {"state": "READY"}}
    assert launch("up", *FLAGS) == 0
    assert creates(google) == [A]


def test_up_refuses_a_machine_of_another_type(google, capsys):
    google.there[B], google.nodes[B] = request("ACTIVE", type="v4-8"), {"a": {"state": "READY"}}
    assert launch("up", *FLAGS) == 2
    assert "taken in us-west1-c: a v4-8" in capsys.readouterr().err
    assert creates(google) == []


def test_up_goes_on_in_the_next_zone_where_there_is_no_room(google):
    google.say["queued-resources create"] = ["ERROR: There is no more capacity in the zone"]
    assert launch("up", *FLAGS) == 0
    assert creates(google) == [A, B]
    assert [life.zone for life in state.load(google.folder).lives] == [B]


def test_up_goes_on_in_the_next_zone_where_a_request_fails(google):
    google.grants[A] = [request("ACCEPTED"), request("FAILED", failedData={"error": {"message": "no more capacity"}})]
    assert launch("up", *FLAGS) == 0
    assert creates(google) == [A, B]
    assert google.there[A] is None


def test_up_asks_all_zones_again_after_a_while(google, monkeypatch):
    google.say["queued-resources create"] = ["ERROR: There is no more capacity in the zone"] * 4
    clock = [1e9]

    def wait(seconds):
        clock[0] += seconds

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setattr("time.time", lambda: clock[0])
    assert launch("up", *FLAGS) == 0
    assert creates(google) == [A, B, A, B, A]
    assert 60 < clock[0] - 1e9 < 600


def test_up_ends_where_no_zone_will_ever_do(google, capsys):
    google.say["queued-resources create"] = ["ERROR: Quota limit 'X' has been exceeded. Limit: 0"] * 2
    assert launch("up", *FLAGS) == 1
    assert creates(google) == [A, B]
    told = capsys.readouterr().err
    assert "Limit: 0" in told and "iam-admin/quotas" in told


def test_a_type_that_no_zone_has_is_bad_input(google, capsys):
    said = sayings.said("unknown type", command="x", type="v5litepod-16", zone=A)
    google.say["queued-resources create"] = [said] * 2
    assert launch("up", *FLAGS) == 2
    assert "was not found in zone us-west4-a" in capsys.readouterr().err


def test_ctrl_c_leaves_the_request_and_says_so(google, monkeypatch, capsys):
    google.grants[A] = request("WAITING_FOR_RESOURCES")

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert launch("up", *FLAGS) == 130
    assert "till `down`" in capsys.readouterr().err
    assert google.there[A] is not None
    assert [life.zone for life in state.load(google.folder).lives] == [A]


def test_what_is_asked_for_is_written_down_before(google, monkeypatch):
    def interrupted(words, zone):
        raise KeyboardInterrupt

    monkeypatch.setattr(google, "_create", interrupted)
    assert launch("up", *FLAGS) == 130
    assert [life.zone for life in state.load(google.folder).lives] == [A]


def test_after_a_run_that_has_ended_a_machine_can_be_asked_for_again(google):
    before = Life(B, 1.0, 2.0, 16, 1.0, "deleted")
    state.save(google.folder, state.Kept(end="done", phase="done", lives=(before,), attempt=3))
    assert launch("up", *FLAGS) == 0
    kept = state.load(google.folder)
    assert kept.lives[0] == before and kept.lives[1].zone == A and kept.attempt == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_launcher_and_the_command_that_it_runs(tmp_path, number):
    """Neither an orphan that still creates something, nor a state file without what was asked for."""
    (tmp_path / "bin").mkdir()
    gcloud = tmp_path / "bin/gcloud"
    gcloud.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 100\n")
    gcloud.chmod(0o755)
    words = [sys.executable, str(ROOT / "tpu/launch.py"), "up", *FLAGS]
    child = subprocess.Popen(
        words, cwd=tmp_path, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun = time.monotonic()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    child.send_signal(number)
    assert "till `down`" in child.communicate(timeout=60)[1]
    assert child.returncode == 130
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline").exists()


def test_down_deletes_and_proves_it(google, capsys):
    launch("up", *FLAGS)
    assert launch("down", "--name=a", f"--zone={A},{B}", "--project=p") == 0
    assert "Nothing of a is left in us-west4-a, us-west1-c." in capsys.readouterr().out
    assert google.there == {A: None, B: None}
    (life,) = state.load(google.folder).lives
    assert life.ended is not None and life.why == "deleted"
    assert state.load(google.folder).why == "deleted by `down`"


def test_down_deletes_where_the_state_file_is_damaged(google, capsys):
    launch("up", *FLAGS)
    (google.folder / state.FILE).write_text("{")
    assert launch("down", *FLAGS) == 0
    assert google.there == {A: None, B: None} and (google.folder / state.FILE).read_text() == "{"
    told = capsys.readouterr().out
    assert "is damaged" in told and "Nothing of a is left" in told


def test_down_lets_the_training_save_unless_it_is_told_not_to(google):
    untyped = [flag for flag in FLAGS if not flag.startswith("--type")]  # the cloud tells what it is
    for flags, stops in ((FLAGS, 1), (untyped, 1), ([*FLAGS, "--now"], 0)):
        launch("up", *FLAGS)
        google.did.clear()
        assert launch("down", *flags) == 0
        assert google.did.count(("ssh", A)) == stops


def test_down_looks_where_the_run_has_been_whatever_the_settings_say_now(google):
    google.there["us-east5-a"], google.nodes["us-east5-a"] = request("ACTIVE"), {"a": {"state": "READY"}}
    state.save(google.folder, state.Kept(lives=(Life("us-east5-a", 1.0, None, 16, 1.0),)))
    assert launch("down", *FLAGS) == 0
    assert google.there["us-east5-a"] is None


def test_down_goes_on_where_a_zone_does_not_answer(google, capsys):
    google.there[B], google.nodes[B] = request("ACTIVE"), {"a": {"state": "READY"}}
    google.say["queued-resources describe"] = [sayings.said("permission", command="x", zone=A)]
    assert launch("down", *FLAGS) == 1
    assert google.there[B] is None
    told = capsys.readouterr()
    assert f"# {A}: " in told.out and "PERMISSION_DENIED" in told.err and "is left in" not in told.out


def test_down_says_what_is_left(google, capsys, monkeypatch):
    monkeypatch.setattr("tpu.acts.delete", lambda *arguments: None)
    google.there[A] = request("SUSPENDED")
    assert launch("down", *FLAGS) == 1
    assert "still there: queued resource a in us-west4-a: SUSPENDED" in capsys.readouterr().err


def test_one_command_at_a_time_changes_a_run(google, capsys):
    with state.held(google.folder, "watch"):
        assert launch("up", *FLAGS) == launch("down", *FLAGS) == 2
    assert "watch, pid" in capsys.readouterr().err
    assert google.did == []


def test_ssh_goes_to_the_worker_of_that_number(google, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("tpu.gcloud.Cloud.attach", lambda self, words: asked.append(words) or 3)
    assert launch("ssh", *FLAGS) == 1
    assert "nothing of this name" in capsys.readouterr().err
    google.there[A], google.nodes[A] = request("ACTIVE"), {"a": {"state": "READY"}}
    assert launch("ssh", *FLAGS, "--worker=2") == 3
    assert "--worker=2" in asked[0] and not any(word.startswith("--command") for word in asked[0])
    assert launch("ssh", *FLAGS, "--worker=all", "--", "ls", "a b") == 3
    assert "--command=ls 'a b'" in asked[1] and "--worker=all" in asked[1]
    assert launch("ssh", *FLAGS, "--", "ls ~/x*") == 3
    assert "--command=ls ~/x*" in asked[2]
    google.nodes[A] = {"a-0": {"state": "READY"}, "a-1": {"state": "READY"}}
    assert launch("ssh", *FLAGS, "--slices=2", "--worker=6") == 3
    assert asked[3][5] == "a-1" and "--worker=2" in asked[3]


def test_cost_tells_what_was_and_what_is(google, capsys):
    state.save(google.folder, state.Kept(lives=(Life(A, 0.0, 7200.0, 16, 3.84, "preempted"),)))
    assert launch("cost", "--name=a") == 0
    told = capsys.readouterr().out
    assert "preempted" in told and "7.68" in told and f"Nothing of a is there now in {A}" not in told
    google.there[A] = request("ACTIVE")
    assert launch("cost", *FLAGS) == 0
    assert "queued resource a in us-west4-a: ACTIVE" in capsys.readouterr().out
    assert launch("cost", "--name=b") == 0
    assert "knows of no machine" in capsys.readouterr().out


def test_what_follows_two_dashes_is_the_training(google):
    flags = [*FLAGS, "--bucket=gs://b", "--dry_run", "--", "python", "own.py", "--lr=1"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(up, "up", lambda s, cloud, flags: seen.append(s) or 0)
        assert launch("up", *flags) == 0
    assert seen[0].command == ("python", "own.py", "--lr=1")


def test_a_single_word_after_two_dashes_is_a_line_for_a_shell(google):
    google.there[A], google.nodes[A] = request("ACTIVE"), {"a": {"state": "READY"}}
    assert (
        launch("run", *FLAGS, "--bucket=/b", "--dry_run", "--", "python train.py --config=configs/digits_cnn.py") == 0
    )
    assert launch("run", *FLAGS, "--bucket=/b", "--dry_run", "--", "python", "train.py", "--config=digits_cnn.py") == 2


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    words = [sys.executable, str(ROOT / "tpu/launch.py"), "up", *FLAGS, "--dry_run"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash", *words], cwd=tmp_path, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 141) and done.stderr == ""


def test_the_launcher_needs_the_standard_library_alone():
    """And no file of it hides a module of that, where its folder is looked in first."""
    for file in sorted((ROOT / "tpu").glob("*.py")):
        assert file.stem not in sys.stdlib_module_names
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            strange = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"tpu"}
            assert not strange, (file.name, strange)


def test_the_file_that_comes_with_it_is_one():
    s = settings.load(ROOT / "tpu/tpu.toml", {})
    assert json.dumps(s.zones) and s.training


def test_each_verb_is_there():
    for name, verb in verbs.VERBS.items():
        place, _, function = verb.place.partition(":")
        file = ROOT / Path(*place.split(".")).with_suffix(".py")
        assert any(
            isinstance(node, ast.FunctionDef) and node.name == function for node in ast.parse(file.read_text()).body
        ), name
