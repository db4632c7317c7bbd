"""Real processes in a home folder of their own, with a fake uv: what a worker does when things go wrong around it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tpu import remote, shipping
from tpu.settings import Settings

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="workers are Linux machines"),
    pytest.mark.slow,
]

# uv: a folder with a python, and a record of what was asked. flaxmodels: what doctor was asked, and its exit code.
UV = f"""#!/bin/sh
echo "$PWD: $*" >>"$HOME/uv.log"
[ ! -e "$HOME/uv.fails" ] || {{ echo "error: no such package" >&2; exit 2; }}
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin" && ln -sf {sys.executable} "$last/bin/python"
  printf '#!/bin/sh\\necho "asked $*"\\nexit "$(cat "$HOME/doctor.code")"\\n' >"$last/bin/flaxmodels"
  chmod +x "$last/bin/flaxmodels"
fi
"""
# Trains till a file says stop. SIGTERM is counted, saves after a while, and ends with 143.
TRAIN = """
import os, pathlib, signal, subprocess, sys, time

home = pathlib.Path(os.environ["HOME"])
came = []

def asked(number, frame):
    came.append(number)
    (home / "signals").write_text(f"{len(came)}")
    if len(came) > 1:
        sys.exit(99)

signal.signal(signal.SIGTERM, asked if "deaf" not in sys.argv else signal.SIG_IGN)
if "worker" in sys.argv:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
print("python", sys.executable, *sys.argv[1:], flush=True)
print("file", pathlib.Path("kept.txt").read_text().strip(), pathlib.Path("new.txt").exists(), flush=True)
(home / "ready").write_text("")
while not came and not (home / "end").exists():
    time.sleep(0.02)
if came:
    while (home / "hold").exists():
        time.sleep(0.02)
    print("saved", flush=True)
    sys.exit(143)
sys.exit(int((home / "end").read_text()))
"""
WAIT = 60.0


def wait(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


class Machine:
    """A worker: a home folder, in which commands run as ssh runs them."""

    def __init__(self, home: Path, s: Settings, parcel: shipping.Parcel) -> None:
        self.home, self.s, self.parcel, self.environment, self.sessions = home, s, parcel, {}, []
        self.root = home / "flaxmodels" / s.name

    @property
    def words(self):
        path = f"{self.home.parent / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        given = {"HOME": str(self.home), "PATH": path, "TPU_WORKER_ID": "0", "FLAXMODELS_COPY_SECONDS": "0.2"}
        return {name: value for name, value in (given | self.environment).items() if value}

    def ask(self, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", text], env=self.words, cwd=self.home, capture_output=True, text=True, timeout=WAIT
        )

    def session(self, text: str, **given) -> subprocess.Popen[bytes]:
        """A command that is not waited for, in a group of its own, which ends with the test at the latest."""
        begun = subprocess.Popen(
            ["sh", "-c", text], **{"env": self.words, "cwd": self.home, "start_new_session": True} | given
        )
        self.sessions.append(begun)
        return begun

    def said(self, text: str) -> str:
        done = self.ask(text)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(line.startswith("worker 0: ") for line in done.stdout.splitlines()), done.stdout
        return done.stdout

    def state(self) -> remote.Worker:
        return remote.parse(self.said(remote.state(self.s)), 1)[0]

    def start(self, attempt: int = 1, *words: str) -> str:
        return self.said(remote.start(replace(self.s, command=("python", "train.py", *words)), attempt))

    def finish(self, code: int) -> None:
        """Have the training end with a code, which it finds whole or not at all."""
        wait((self.home / "ready").exists)
        (self.home / "end.part").write_text(str(code))
        (self.home / "end.part").replace(self.home / "end")

    def end(self, code: int) -> None:
        self.finish(code)
        wait(lambda: self.state().what != "running")
        (self.home / "end").unlink()
        (self.home / "ready").unlink()

    def processes(self, of: str = "FLAXMODELS_ATTEMPT") -> list[int]:
        mark, found = f"{of}={self.root}/".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def log(self, attempt: int) -> str:
        return (self.root / f"attempt-{attempt}.log").read_text()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A machine on which a parcel is installed."""
    top = tmp_path_factory.mktemp("template")
    repository = top / "repository"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    (repository / "train.py").write_text(TRAIN)
    (repository / "kept.txt").write_text("committed\n")
    (repository / ".gitignore").write_text("runs/\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (repository / "kept.txt").write_text("changed\n")
    (repository / "new.txt").write_text("new\n")
    machine = Machine(top / "home", Settings("a", type="v5litepod-16"), shipping.pack(repository, top / "parcels"))
    machine.home.mkdir()
    bin = top / "bin"
    bin.mkdir()
    (bin / "uv").write_text(UV)
    (bin / "uv").chmod(0o755)
    (machine.home / "doctor.code").write_text("0")
    machine.s = replace(machine.s, bucket=str(top / "bucket"))
    shutil.copy(machine.parcel.file, machine.home / remote.landing(machine.s, machine.parcel))
    assert "installed parcel" in machine.said(remote.install(machine.s, machine.parcel))
    return machine


@pytest.fixture
def machine(template, tmp_path):
    """A machine of its own, with the parcel of the template installed; nothing of it runs on after the test."""
    shutil.copytree(template.home.parent, tmp_path / "top", symlinks=True)
    s = replace(template.s, bucket=str(tmp_path / "top" / "bucket"))
    machine = Machine(tmp_path / "top" / "home", s, template.parcel)
    yield machine
    for session in machine.sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session.pid, signal.SIGKILL)
        session.wait(WAIT)
    for of in ("FLAXMODELS_KEEPER", "FLAXMODELS_ATTEMPT"):
        for pid in machine.processes(of):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_parcel_is_the_commit_with_the_changes_on_top(template):
    code = template.root / template.parcel.sha / "code"
    git = ["git", "-C", str(code)]
    assert (code / "kept.txt").read_text() == "changed\n" and (code / "new.txt").read_text() == "new\n"
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert head == template.parcel.revision
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert status.split() == ["M", "kept.txt", "A", "new.txt"]  # as the run records it: dirty
    shipped = Path(template.s.workdir) / "shipped" / template.parcel.sha
    assert {file.name for file in shipped.iterdir()} == {"patch", "shipped.json"}
    asked = (template.home / "uv.log").read_text().splitlines()
    place = template.root / template.parcel.sha
    assert asked[0].endswith(f": venv --quiet --python 3.12 {place}/venv")
    assert asked[1] == (
        f"{code}: pip install --quiet --python {place}/venv/bin/python --constraint {place}/constraints.txt "
        "-e .[tpu,gcs,logging,text]"
    )
    assert template.state() == remote.Worker(0, "installed", sha=template.parcel.sha)


def test_installing_again_says_so_and_other_words_install_again(machine):
    before = (machine.home / "uv.log").read_text()
    assert f"parcel {machine.parcel.sha} is installed" in machine.said(remote.install(machine.s, machine.parcel))
    assert (machine.home / "uv.log").read_text() == before
    machine.said(remote.install(replace(machine.s, install=("-e", ".[tpu]")), machine.parcel))
    assert (machine.home / "uv.log").read_text() != before
    (machine.home / "uv.fails").touch()
    assert machine.ask(remote.install(machine.s, machine.parcel)).returncode == 1
    assert machine.state().what == "absent"  # what was there is gone, and the new is not whole


def test_a_bucket_that_refuses_is_found_before_anything_is_installed(machine):
    shutil.rmtree(machine.root)
    shutil.rmtree(machine.s.bucket)
    Path(machine.s.bucket).write_text("no folder")
    before = (machine.home / "uv.log").read_text()
    done = machine.ask(remote.install(machine.s, machine.parcel))
    assert "can't write to " in remote.problems(done.stdout)[0] and "worker 0: mkdir: " in done.stdout
    assert (machine.home / "uv.log").read_text() == before


def test_a_half_copied_parcel_is_not_installed(machine):
    tar = machine.home / remote.landing(machine.s, machine.parcel)
    whole = tar.read_bytes()
    for half, script in ((whole[: len(whole) // 2], True), (whole[:-1] + b"x", True), (whole[:-1], False)):
        tar.write_bytes(half)
        (machine.root / "installed").unlink(missing_ok=True)
        if not script:
            shutil.rmtree(machine.root)
        done = machine.ask(remote.install(machine.s, machine.parcel))
        assert done.returncode == 1 and "as it was sent: ship it again" in remote.problems(done.stdout)[0]
        assert machine.state() == remote.Worker(0, "absent")
    tar.unlink()
    assert machine.ask(remote.install(machine.s, machine.parcel)).returncode == 1


def test_what_uv_says_is_shown_and_the_next_try_installs(machine):
    (machine.root / "installed").unlink()
    (machine.home / "uv.fails").touch()
    done = machine.ask(remote.install(machine.s, machine.parcel))
    assert done.returncode == 1 and "worker 0: error: no such package" in done.stdout
    assert remote.problems(done.stdout) == {0: "no Python 3.12 (above is what uv says)"}
    (machine.home / "uv.fails").unlink()
    machine.said(remote.install(machine.s, machine.parcel))
    assert machine.state().what == "installed"


def test_uv_is_installed_where_it_is_not_there(machine):
    (machine.root / "installed").unlink()
    bin, tools = machine.home.parent / "bin", machine.home.parent / "tools"
    (bin / "uv").rename(bin / "uv.real")
    tools.mkdir()
    for file in (file for folder in ("/usr/local/bin", "/usr/bin", "/bin") for file in Path(folder).iterdir()):
        if file.name != "uv" and not (tools / file.name).is_symlink():  # this computer may have one
            (tools / file.name).symlink_to(file)
    machine.environment["PATH"] = f"{bin}:{tools}"
    (bin / "python3").write_text(
        f'#!/bin/sh\necho "$*" >"$HOME/pip.log"\nmkdir -p "$HOME/.local/bin"\ncp {bin}/uv.real "$HOME/.local/bin/uv"\n'
    )
    (bin / "python3").chmod(0o755)
    machine.said(remote.install(machine.s, machine.parcel))
    assert (machine.home / "pip.log").read_text() == "-m pip install --quiet --user uv\n"
    assert machine.state().what == "installed"


def test_a_training_runs_on_when_ssh_dies_and_is_never_started_twice(machine):
    text = remote.start(replace(machine.s, command=("python", "train.py")), 1)
    ssh = machine.session(f"{text}; sleep 600")
    wait((machine.home / "ready").exists)
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.killpg(ssh.pid, number)
    assert ssh.wait(WAIT) < 0
    assert machine.state() == remote.Worker(0, "running", 1, sha=machine.parcel.sha)
    running = machine.processes()
    assert "attempt 1 is not started: attempt 1 was before (it is running)" in machine.start(1)
    assert machine.processes() == running and len(running) == 1
    assert os.getsid(running[0]) != os.getsid(0)
    machine.finish(0)
    wait(lambda: machine.state().what == "ended")
    assert machine.state() == remote.Worker(0, "ended", 1, 0, machine.parcel.sha)


def test_of_several_starts_at_once_one_starts(machine):
    text = remote.start(replace(machine.s, command=("python", "train.py")), 1)
    for ssh in [machine.session(text, stdout=subprocess.DEVNULL) for _ in range(4)]:
        assert ssh.wait(WAIT) == 0
    assert len(machine.processes("FLAXMODELS_KEEPER")) >= 1 and len(machine.processes()) == 1
    assert machine.log(1).count("launcher: attempt 1 begins") == 1


def test_a_training_that_knows_of_no_signal_ends_by_it(machine):
    machine.said(remote.start(replace(machine.s, command=("sh", "-c", "exec sleep 600")), 1))
    machine.said(remote.stop(machine.s, 30))
    assert machine.state().code == 143


def test_the_command_runs_in_the_code_with_the_python_of_its_environment(machine):
    machine.start(1, "two words", "it's", "$HOME")
    wait((machine.home / "ready").exists)
    text = machine.log(1)
    assert f"python {machine.root / machine.parcel.sha}/venv/bin/python two words it's $HOME --workdir=" in text
    assert "file changed True" in text


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_kept_and_an_attempt_that_ended_is_not_repeated(machine, code):
    machine.start()
    machine.end(code)
    ended = remote.Worker(0, "ended", 1, code, machine.parcel.sha)
    assert machine.state() == ended
    assert "(it is ended)" in machine.start(1)
    assert machine.state() == ended and not machine.processes()


def test_kill_9_of_the_training_leaves_its_code_and_no_leftover(machine):
    machine.start(1, "worker")
    wait((machine.home / "ready").exists)
    assert len(machine.processes()) == 2
    os.kill(int((machine.root / "attempt-1.pid").read_text()), signal.SIGKILL)
    wait(lambda: machine.state().what != "running")
    assert machine.state().code == 137 and not machine.processes()
    assert "launcher: attempt 1 ended with exit code 137" in machine.log(1)


def test_what_left_no_exit_code_is_dead_whoever_has_its_number_now(machine):
    machine.start()
    wait((machine.home / "ready").exists)
    for of in ("FLAXMODELS_KEEPER", "FLAXMODELS_ATTEMPT"):  # as when the power goes
        for pid in machine.processes(of):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: not machine.processes())
    for kind in ("pid", "keeper"):  # after a reboot these numbers are another's
        (machine.root / f"attempt-1.{kind}").write_text(f"{os.getpid()}\n")
    assert machine.state() == remote.Worker(0, "dead", 1, sha=machine.parcel.sha)
    machine.said(remote.stop(machine.s, 1))  # and does not stop this process
    machine.start(2)
    assert machine.state() == remote.Worker(0, "running", 2, sha=machine.parcel.sha)


def test_stop_signals_no_process_that_got_the_number_of_ours(machine):
    machine.start(1, "worker")
    wait((machine.home / "ready").exists)
    for pid in (*machine.processes("FLAXMODELS_KEEPER"), int((machine.root / "attempt-1.pid").read_text())):
        os.kill(pid, signal.SIGKILL)  # what is left is a child of the training
    other = machine.session("exec sleep 600")
    (machine.root / "attempt-1.pid").write_text(f"{other.pid}\n")
    machine.said(remote.stop(machine.s, 1))
    assert other.poll() is None and machine.state().what == "dead" and not machine.processes()


def test_a_training_whose_keeper_was_killed_still_runs(machine):
    machine.start()
    wait((machine.home / "ready").exists)
    (keeper,) = machine.processes("FLAXMODELS_KEEPER")
    os.kill(keeper, signal.SIGKILL)
    assert machine.state().what == "running"
    machine.finish(0)
    wait(lambda: machine.state().what == "dead")


def test_stop_signals_once_and_waits_till_it_is_saved(machine):
    machine.start(1, "worker")
    wait((machine.home / "ready").exists)
    (machine.home / "hold").touch()
    first = machine.session(remote.stop(machine.s, 60))
    wait((machine.home / "signals").exists)
    os.killpg(first.pid, signal.SIGKILL)  # and who stops it starts anew
    assert first.wait(WAIT) < 0
    asked = [machine.session(remote.stop(machine.s, 60)) for _ in range(2)]
    time.sleep(0.5)  # what they would do wrong they do now
    (machine.home / "hold").unlink()
    for ask in asked:
        assert ask.wait(WAIT) == 0
    assert (machine.home / "signals").read_text() == "1"
    assert machine.state() == remote.Worker(0, "ended", 1, 143, machine.parcel.sha)
    assert "saved" in machine.log(1) and not machine.processes()


def test_what_does_not_stop_is_killed(machine):
    machine.start(1, "deaf")
    wait((machine.home / "ready").exists)
    assert "attempt 1 did not end in 1 s: killed" in machine.said(remote.stop(machine.s, 1))
    assert machine.state().code == 137


def test_a_later_attempt_ends_what_runs_of_an_earlier_one_and_a_check(machine):
    machine.start(1)
    wait((machine.home / "ready").exists)
    first = machine.processes()
    left = machine.session("exec sleep 600", env=machine.words | {"FLAXMODELS_ATTEMPT": f"{machine.root}/check/"})
    assert "attempt 1 still ran: killed" in machine.start(2)
    assert left.wait(WAIT) == -signal.SIGKILL
    assert not set(first) & set(machine.processes())
    wait(lambda: (machine.root / "attempt-1.code").exists())
    wait(lambda: "file changed" in machine.log(2))
    assert machine.state() == remote.Worker(0, "running", 2, sha=machine.parcel.sha)
    assert "(it is running)" in machine.start(1)
    assert len(machine.processes()) == 1


def test_two_names_on_one_machine_do_not_touch_each_other(machine):
    other = Machine(machine.home, replace(machine.s, name="ab"), machine.parcel)
    shutil.copytree(machine.root, other.root, symlinks=True)
    other.start(3)
    assert machine.state().what == "installed"
    machine.start()
    wait((machine.home / "ready").exists)
    assert len(machine.processes()) == len(other.processes()) == 1
    machine.said(remote.stop(machine.s, 30))
    assert machine.state().what == "ended" and other.state() == remote.Worker(0, "running", 3, sha=machine.parcel.sha)
    other.said(remote.stop(other.s, 1))


def test_logs_go_to_the_folder_while_it_runs_and_whole_at_the_end(machine):
    machine.start()
    copied = Path(machine.s.workdir) / "logs" / "attempt-1" / "worker-0.log"
    wait(copied.exists)
    wait(lambda: "file changed" in copied.read_text())
    machine.end(3)
    assert copied.read_text() == machine.log(1)
    assert copied.read_text().splitlines()[-1].startswith("launcher: attempt 1 ended with exit code 3, 20")
    assert [file.name for file in copied.parent.iterdir()] == ["worker-0.log"]
    wait(lambda: not machine.processes("FLAXMODELS_KEEPER"))


def test_logs_go_to_a_bucket_through_gcloud(machine):
    gcloud = machine.home.parent / "bin" / "gcloud"
    gcloud.write_text('#!/bin/sh\necho "$*" >>"$HOME/gcloud.log"\nexit 1\n')
    gcloud.chmod(0o755)
    machine.s = replace(machine.s, bucket="gs://b")
    machine.start()
    machine.end(0)
    assert machine.state().code == 0  # a bucket that refuses does not keep the exit code from us
    copy = (
        f"storage cp --quiet --no-user-output-enabled {machine.root}/attempt-1.log gs://b/a/logs/attempt-1/worker-0.log"
    )
    assert set((machine.home / "gcloud.log").read_text().splitlines()) == {copy}


LATE = """#!/bin/sh
if [ ! -e "$HOME/first" ]; then
  echo "$$" >"$HOME/first"
  exec sleep 600
fi
runs() { [ -n "$(tr -d '\\0' 2>/dev/null <"/proc/$(cat "$HOME/first")/cmdline")" ]; }
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do runs && sleep 0.5; done
runs && echo runs >"$HOME/last" || echo ended >"$HOME/last"
"""


def test_a_copy_that_takes_long_does_not_outlive_the_attempt(machine):
    """It would put into the bucket what is older than the last copy, and after that."""
    gcloud = machine.home.parent / "bin" / "gcloud"
    gcloud.write_text(LATE)
    gcloud.chmod(0o755)
    machine.s = replace(machine.s, bucket="gs://b")
    machine.start()
    wait((machine.home / "first").exists)
    machine.end(0)
    assert (machine.home / "last").read_text() == "ended\n"


def test_log_and_follow_have_the_workers_name(machine):
    machine.start()
    wait((machine.home / "ready").exists)
    text, state = machine.said(remote.log(machine.s, 1)).splitlines()
    assert text == "worker 0: file changed True" and remote.parse(state, 1)[0].what == "running"
    with machine.session(remote.follow(machine.s), stdout=subprocess.PIPE) as follow:
        assert b"attempt 1 begins" in follow.stdout.readline()
        machine.finish(7)
        rest = follow.stdout.read().decode()
    assert "worker 0: launcher: attempt 1 ended with exit code 7" in rest
    assert remote.parse(rest, 1)[0].code == 7
    assert machine.said(remote.log(machine.s, 0)).count("\n") == machine.log(1).count("\n") + 1


def test_check_asks_the_doctor_and_does_not_disturb_a_training(machine):
    assert "worker 0: asked doctor --hosts=4 --chips=16" in machine.said(remote.check(machine.s))
    (machine.home / "doctor.code").write_text("1")
    done = machine.ask(remote.check(machine.s))
    assert done.returncode == 1 and "doctor says what is wrong" in remote.problems(done.stdout)[0]
    machine.start()
    assert "attempt 1 runs: nothing to check" in machine.said(remote.check(machine.s))


def test_a_check_that_lost_its_session_is_ended_by_the_next(machine):
    slow = machine.root / machine.parcel.sha / "venv" / "bin" / "flaxmodels"
    quick = slow.read_text()
    slow.write_text('#!/bin/sh\n: >"$HOME/checking"\nsleep 600\n')
    with machine.session(remote.check(machine.s), stdout=subprocess.PIPE) as first:
        wait((machine.home / "checking").exists)
        slow.write_text(quick)
        machine.said(remote.check(machine.s))
        assert b"problem: flaxmodels doctor" in first.stdout.read()


def test_who_else_holds_the_tpu_is_named(machine):
    devices = machine.home / "dev"
    devices.mkdir()
    (devices / "accel0").touch()
    machine.environment["FLAXMODELS_DEVICES"] = str(devices)
    for name in ("loginctl", "sudo"):
        (machine.home.parent / "bin" / name).write_text('#!/bin/sh\necho "$0 $*" >>"$HOME/asked"\n')
        (machine.home.parent / "bin" / name).chmod(0o755)
    with (devices / "accel0").open() as held:
        holder = machine.session("exec sleep 600", pass_fds=[held.fileno()])
        wait(lambda: Path(f"/proc/{holder.pid}/cmdline").read_bytes().startswith(b"sleep"))
    done = machine.ask(remote.start(machine.s, 1))
    assert done.returncode == 1
    expected = f"process {holder.pid} holds the TPU (sleep 600 ): end it with `kill {holder.pid}`"
    assert remote.problems(done.stdout) == {0: expected}
    assert machine.state().what == "installed"
    holder.kill()
    holder.wait(WAIT)
    machine.start(1)
    assert "loginctl enable-linger" in (machine.home / "asked").read_text()


def test_the_number_comes_from_the_metadata_server(machine):
    (machine.home.parent / "bin" / "curl").write_text('#!/bin/sh\ncat "$HOME/curl"\n')
    (machine.home.parent / "bin" / "curl").chmod(0o755)
    machine.environment["TPU_WORKER_ID"] = ""
    for answer, said in {"3 200": "worker 3: state", "<html> 404": "worker 0: state"}.items():
        (machine.home / "curl").write_text(answer)
        assert machine.ask(remote.state(machine.s)).stdout.startswith(said)
    (machine.home / "curl").write_text("2 200")
    assert machine.ask(remote.state(machine.s, slice=1)).stdout.startswith("worker 6: state")  # 4 hosts a slice
    (machine.home / "curl").write_text(" 503")
    done = machine.ask(remote.state(machine.s))
    assert done.returncode == 1 and done.stdout.startswith("worker ?: problem: the metadata server")


def test_another_parcel_is_not_installed_under_a_training(machine):
    machine.start()
    (machine.root / "installed").write_text("000000000000\n")
    done = machine.ask(remote.install(machine.s, machine.parcel))
    assert done.returncode == 1 and "stop it before another is installed" in remote.problems(done.stdout)[0]
