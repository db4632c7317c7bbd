"""A fake cloud for a test, and the launcher as a user runs it there.

cloud.plan({"do": "preempt", "step": 12}, polls={"PROVISIONING": 3})
cloud.launch("up", "--name=a")
assert cloud.ended("queued-resources create") == [1, 0]
assert cloud.processes() == {}
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = HERE / "fake/bin"


def repository(folder: Path, *sources: tuple[Path, str]) -> Path:
    """A git repository with one commit: the launcher, and copies of files or folders under other names.

    Its train.py differs from the commit by a comment, so that there is a patch to ship.
    """
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for source, name in ((ROOT / "tpu", "tpu"), *sources):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, place)
    (folder / ".gitignore").write_text("__pycache__/\n/runs/\n")
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    for words in (
        ("-c", "init.defaultBranch=main", "init", "-q"),
        ("add", "-A"),
        (*who, "commit", "-q", "-m", "first"),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    with (folder / "train.py").open("a") as file:
        file.write("# Not committed.\n")
    return folder


@dataclasses.dataclass(frozen=True)
class Cloud:
    """A cloud's folder, and a laptop that it is used from.

    Attributes:
      folder: state of the cloud; see fake/store.py.
      laptop: the folder that commands run in, with a home of its own.
      env: of each command.
    """

    folder: Path
    laptop: Path
    env: dict[str, str]

    @classmethod
    def at(cls, where: Path, laptop: Path = ROOT) -> Self:
        """A cloud without a machine."""
        folder, home = where / "cloud", where / "home"
        folder.mkdir()
        home.mkdir()
        (folder / "lock").touch()
        env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "FAKE_CLOUD": str(folder),
            "FAKE_PYTHON": sys.executable,
            "PYTHONUNBUFFERED": "1",
        }
        return cls(folder, laptop, env)

    def plan(self, *faults: dict[str, Any], **rest: Any) -> None:
        """What is to happen; see fake/faults.py and fake/store.py."""
        (self.folder / "plan.json").write_text(json.dumps({"faults": faults, **rest}))

    def gcloud(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run `gcloud`."""
        return self._run(["gcloud", *map(str, words)], 60.0)

    def launch(self, *words: object, limit: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run the launcher to its end, at most `limit` seconds."""
        return self._run(self._launcher(words), limit)

    def start(self, *words: object, out: Path) -> subprocess.Popen[bytes]:
        """Start the launcher; what it prints is added to `out`."""
        with out.open("ab") as file:
            return subprocess.Popen(
                self._launcher(words), cwd=self.laptop, env=self.env, stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip

    def _launcher(self, words: tuple[object, ...]) -> list[str]:
        return [sys.executable, str(self.laptop / "tpu/launch.py"), *map(str, words)]

    def _run(self, words: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.laptop, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=limit,
        )  # fmt: skip

    def commands(self) -> list[dict[str, Any]]:
        """The commands that began, in order: {"number", "words", "time"}, and "code" where it ended."""
        file, found = self.folder / "commands.jsonl", dict[int, dict[str, Any]]()
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            found.setdefault(row["number"], row)
            found[row["number"]].update({key: row[key] for key in row.keys() & {"words", "code"}})
        return [found[number] for number in sorted(found)]

    def ended(self, verb: str) -> list[int | None]:
        """Exit codes of the commands with these words, such as "queued-resources create"; None where one was killed."""
        return [row.get("code") for row in self.commands() if verb in " ".join(row["words"])]

    def state(self) -> dict[str, Any]:
        """All that the cloud knows."""
        return json.loads((self.folder / "state.json").read_text())

    def resources(self) -> dict[str, str]:
        """Zone and name of each queued resource -> its state."""
        return {key: one["state"] for key, one in self.state()["resources"].items()}

    def fired(self) -> int:
        """How many faults of machines have happened."""
        return sum(self.state()["fired"].values())

    def processes(self) -> dict[int, str]:
        """Number -> command line of all that runs in the cloud or was started from the laptop."""
        from fake import hosts

        return hosts.processes("FAKE_CLOUD", str(self.folder))

    def switch_off(self) -> None:
        """The laptop is without power: what runs on it ends, what runs in the cloud goes on."""
        self._kill(lambda: [number for number in self.processes() if not _hosted(number)])

    def close(self) -> None:
        """Kill what is left."""
        self._kill(lambda: list(self.processes()))

    def _kill(self, which: Callable[[], list[int]]) -> None:
        deadline = time.monotonic() + 60
        while numbers := which():
            assert time.monotonic() < deadline, self.processes()
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.01)


def _hosted(number: int) -> bool:
    """Whether a process runs on a machine of the cloud, or watches one."""
    try:
        return b"\0FAKE_MACHINE=" in b"\0" + Path(f"/proc/{number}/environ").read_bytes()
    except OSError:
        return True
