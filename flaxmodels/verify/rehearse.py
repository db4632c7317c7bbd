"""`flaxmodels rehearse`: what a run on several hosts goes through, with real processes of this machine.

They start as on a cluster, over gloo in place of its network, and train a few steps of the user's own config with
`fit`. Then others resume it, in another number, and one alone. Read `run`.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.verify.crew import Crew, addresses, environment, folder_for

Found = list[dict[str, Any]]  # what each process of a scene found in a phase
# (found, what the scenes before found by phase) -> (whether it is well, what to say of it)
Judge = Callable[[Found, Mapping[str, Found]], tuple[bool, str]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One check.

    Attributes:
      scene: hosts x devices of each.
      phase: what the processes did.
      passed: whether it went well.
      seconds: how long it took.
      said: what was seen.
    """

    scene: str
    phase: str
    passed: bool
    seconds: float
    said: str

    def __str__(self) -> str:
        return (
            f"{'pass' if self.passed else 'FAIL'}  {self.scene:<8} {self.phase:<11} {self.seconds:>6.1f} s  {self.said}"
        )


def run(
    arguments: Sequence[str],
    *,
    hosts: int = 4,
    devices_per_host: int = 2,
    steps: int = 6,
    limit: float = 180.0,
    tolerance: float = 2e-5,
    folder: Path | None = None,
    show: Callable[[str], None] = print,
) -> tuple[Line, ...]:
    """Train a few steps of a config on simulated hosts, then resume it on fewer, and on one device.

    Args:
      arguments: "--config=FILE" and "--config.KEY=VALUE", as for training.
      hosts: processes.
      devices_per_host: simulated devices of each.
      steps: of the whole run; half of them are made again by those who resume.
      limit: seconds for each phase of a scene; then all processes are killed, and the late ones are named.
      tolerance: relative, of losses and metrics of a step on other hosts.
      folder: for all that the processes write, kept; None: a temporary one.
      show: is given each line when it is known.

    Returns:
      A line for each check. After one that did not pass nothing further is tried.

    Raises:
      UserError: a number can't be.
    """
    for name, value, least in (("hosts", hosts, 2), ("devices_per_host", devices_per_host, 1)):
        if value < least:
            raise UserError(f"--{name}={value}: expected at least {least}.")
    if steps < 2 or steps % 2:
        raise UserError(f"--steps={steps}: expected an even number, since half of them are made again.")
    if not limit > 0:
        raise UserError(f"--limit={limit:g}: expected more than 0 seconds.")
    fewer = max(n for n in range(1, hosts) if hosts * devices_per_host % n == 0)
    with folder_for(folder, "rehearse_") as place:
        stage = _Stage(arguments, place, steps, limit, show)
        judges = _judges(steps, tolerance)
        with contextlib.suppress(FaultError):  # it has been shown
            stage.play(hosts, devices_per_host, ("start", "batches", "train", "checkpoint", "evaluation"), judges)
            stage.play(fewer, hosts * devices_per_host // fewer, ("start", "restore", "resume"), judges)
            stage.play(1, 1, ("start", "batches", "evaluation", "restore", "resume"), judges)
    return tuple(stage.lines)


class _Stage:
    """Plays scenes, one after the other, in one folder."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, steps: int, limit: float, show: Callable[[str], None]
    ) -> None:
        self.arguments, self.folder, self.steps, self.limit, self.show = arguments, folder, steps, limit, show
        self.lines: list[Line] = []
        self.found: dict[str, Found] = {}  # by phase, of the first scene that had it

    def play(self, hosts: int, devices: int, phases: Sequence[str], judges: Mapping[str, Judge]) -> None:
        """Start `hosts` processes, and go through phases with them. FaultError if one fails or is late."""
        scene, name = f"{hosts} x {devices}", f"{hosts}x{devices}"
        copy = self._copy(f"resumed_{name}") if "resume" in phases else self.folder / "unused"
        with Crew(self._commands(hosts, phases, copy), self.folder / f"processes_{name}", environment(devices)) as crew:
            for phase in (*phases, "leave"):
                begun = time.monotonic()
                try:
                    found = crew.wait(phase, self.limit) if phase in judges else crew.end(self.limit)
                    passed, said = judges[phase](found, self.found) if found else (True, "all by themselves")
                except FaultError as error:
                    self._say(Line(scene, phase, False, time.monotonic() - begun, str(error)))
                    raise
                self.found.setdefault(phase, found)
                self._say(Line(scene, phase, passed, time.monotonic() - begun, said))
                if not passed:
                    raise FaultError(said)

    def _say(self, line: Line) -> None:
        self.lines.append(line)
        self.show(str(line))

    def _commands(self, hosts: int, phases: Sequence[str], copy: Path) -> list[list[str]]:
        words = [sys.executable, "-m", "flaxmodels.verify.actor", "--reports", "{reports}", *self.arguments]
        words += [f"--workdir={self.folder / 'workdir'}", f"--copy={copy}", f"--steps={self.steps}"]
        words += [f"--phases={','.join(phases[1:])}"]
        # JAX ends all when it misses one for so long; here that is found sooner, with more to say.
        limits = [f"--init_timeout={self.limit}", f"--heartbeat_timeout={max(2 * self.limit, 100)}"]
        return [[*words, *own, *limits] for own in addresses(hosts)]

    def _copy(self, name: str) -> Path:
        """The workdir as it was in the middle of the run."""
        source, copy = self.folder / "workdir", self.folder / name
        half = Path("checkpoints", str(self.steps // 2))
        shutil.copytree(source / half, copy / half)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(source / file, copy / file)
        return copy


def _judges(steps: int, tolerance: float) -> dict[str, Judge]:
    """Phase -> what must be true of it."""

    def start(found: Found, _: Mapping[str, Found]) -> tuple[bool, str]:
        total, local = found[0]["devices"]
        return total == local * len(found), f"{len(found)} started, {total} devices in all"

    def batches(found: Found, before: Mapping[str, Found]) -> tuple[bool, str]:
        size, merged, own = found[0]["batch_size"], _merged(found), len(found[0]["rows"][0])
        if len(found) > 1 and any(len(rows) != size for rows in merged):
            return False, f"the processes do not hold the {size} rows of a batch between them"
        if "batches" in before:
            same = merged == _merged(before["batches"])
            return same, "the same bits" if same else "other bits than the rows of several processes"
        return all(len(row) == 1 for rows in merged for row in rows.values()), f"{own} of {size} rows on a host"

    def train(found: Found, _: Mapping[str, Found]) -> tuple[bool, str]:
        values = list(found[0]["losses"].values())
        alike = all(each["params"] == found[0]["params"] and each["step"] == steps for each in found)
        ends = f"loss {values[0]:.4f} to {values[-1]:.4f}" if values else "no loss"
        return alike and len(values) == steps and all(map(math.isfinite, values)), f"{steps} steps, {ends}"

    def checkpoint(found: Found, _: Mapping[str, Found]) -> tuple[bool, str]:
        good = all(each["steps"] == [steps // 2, steps] for each in found)
        return good, f"steps {', '.join(map(str, found[0]['steps']))}, written by {found[0]['writers']} processes"

    def evaluation(found: Found, before: Mapping[str, Found]) -> tuple[bool, str]:
        first = found[0]
        said = f"{first['size']} examples by {first['batch']}, {first['count']:g} targets counted"
        good = all(each == first for each in found)
        if "evaluation" in before:
            other = before["evaluation"][0]
            off = max(_off(other["metrics"][name], value) for name, value in first["metrics"].items())
            return good and other["count"] == first["count"] and off <= tolerance, f"{said}; metrics off by {off:.1e}"
        return good, said

    def restore(found: Found, before: Mapping[str, Found]) -> tuple[bool, str]:
        saved = before["train"][0]["params"]
        other = [path for path in saved if any(each["params"].get(path) != saved[path] for each in found)]
        return not other, f"{other[0]} has other bits" if other else f"{len(saved)} parameters, the same bits"

    def resume(found: Found, before: Mapping[str, Found]) -> tuple[bool, str]:
        expected, again = before["train"][0]["losses"], found[0]["losses"]
        off = max(_off(expected[str(n)], again.get(str(n), math.nan)) for n in range(steps // 2 + 1, steps + 1))
        return off <= tolerance, f"steps {steps // 2 + 1} to {steps} again, losses off by {off:.1e}"

    return {
        "start": start, "batches": batches, "train": train, "checkpoint": checkpoint, "evaluation": evaluation,
        "restore": restore, "resume": resume,
    }  # fmt: skip


def _merged(found: Found) -> list[dict[str, set[str]]]:
    """Of each step, place in the batch -> digests of its row; more than one where two processes see other bits."""
    steps: list[dict[str, set[str]]] = [{} for _ in found[0]["rows"]]
    for each in found:
        for step, rows in zip(steps, each["rows"], strict=True):
            for place, digest in rows.items():
                step.setdefault(place, set()).add(digest)
    return steps


def _off(expected: float, found: float) -> float:
    """|found - expected| / |expected|; infinite where one is not a number."""
    if found == expected:
        return 0.0
    off = abs(found - expected) / abs(expected) if expected else math.inf
    return off if math.isfinite(off) else math.inf
