"""`flaxmodels verify resume`: a run that is killed again and again ends as one that was left alone, bit for bit.

Both are runs of the user's own config, made shorter, in processes that train as `flaxmodels train` does (`witness`).
One is killed at random moments (`kills`) and started again with the same command, until it ends. Then everything that
the two left is compared: each batch, each line of the log, and the last state. Read `run`, then `accounts.difference`.
"""

import dataclasses
import itertools
import json
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.registry import UserError
from flaxmodels.runtime import exits
from flaxmodels.runtime.exits import FaultError
from flaxmodels.verify import accounts
from flaxmodels.verify import kills as killing
from flaxmodels.verify.accounts import Account
from flaxmodels.verify.crew import Crew, addresses, environment, folder_for
from flaxmodels.verify.kills import Kill, Pace

LEAST_STEPS = 12
# Seconds for what is left of a run to end, after one of its processes was killed or asked to stop.
LEAVING = 120.0
MEETING = LEAVING / 2  # for all processes of a run to come
# Runs one after the other that end before they could be killed: then there is nothing to hit.
IDLE = 5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of it.

    Attributes:
      passed: whether nothing differs.
      said: a line or two on that.
      kills: that were made.
      again: steps that were made again after them.
    """

    passed: bool
    said: str
    kills: int
    again: int


def run(
    arguments: Sequence[str],
    given: Mapping[str, Any],
    *,
    kills: int = 20,
    steps: int = 60,
    hosts: int = 1,
    devices: int | None = None,
    seed: int | None = None,
    tolerance: float = 1e-3,
    limit: float = 3600.0,
    folder: Path | None = None,
    show: Callable[[str], None] = print,
) -> Verdict:
    """Train a config without a kill and with many, and compare.

    Args:
      arguments: "--config=FILE" and "--config.KEY=VALUE", as for training.
      given: the config that they stand for, resolved: dotted key -> value.
      kills: how many; where a run ends before the last ones, a new one gets these.
      steps: of the run.
      hosts: processes of this machine that train together.
      devices: simulated CPU devices in all; None: what the machine has, two for each host where they are several.
      seed: of the moments; None draws one.
      tolerance: relative, of losses and norms, where the backend can't promise bits.
      limit: seconds for the run without kills.
      folder: for all that is written, kept; None: a temporary one.
      show: is given each line when it is known.

    Raises:
      UserError: a number can't be, or the config is wrong.
      FaultError: the run fails by itself.
    """
    if kills < 1:
        raise UserError(f"--kills={kills}: expected at least 1, since a run that is left alone proves nothing.")
    if steps < LEAST_STEPS:
        raise UserError(f"--steps={steps}: expected at least {LEAST_STEPS}, so that there are saves to be killed in.")
    if hosts < 1:
        raise UserError(f"--hosts={hosts}: expected at least 1.")
    if devices is not None and (devices < 1 or devices % hosts):
        raise UserError(f"--devices={devices}: expected a multiple of --hosts={hosts}.")
    seed = secrets.randbelow(2**32) if seed is None else seed
    own = devices // hosts if devices else 2 if hosts > 1 else None
    with folder_for(folder, "verify_resume_") as place:
        trial = _Trial(arguments, shortened(given, steps), place, steps, hosts, own, limit, show)
        changed = ", ".join(f"{key}={value!r}" for key, value in trial.changes.items() if given.get(key) != value)
        show(f"made short: {changed}")
        show(f"seed {seed}: --seed={seed} draws the same kills again")
        expected, pace = trial.whole("left_alone")
        within = None if expected.bits else tolerance
        if not expected.bits:
            show(
                f"this GPU does not compute the same bits each time: losses and norms are compared within {tolerance:g}"
                f" (for bits, XLA_FLAGS={accounts.DETERMINISTIC})"
            )
        rng, every = random.Random(seed), trial.changes["checkpoint.every"]
        drawn = killing.draw(rng, kills, steps, every, hosts)
        tally, idle, differs = _Tally(kills), 0, ""
        for number in itertools.count(1):
            before = tally.made
            found = trial.killed(f"killed_{number}", drawn[before:], pace, tally)
            differs = tally.lost or accounts.difference(expected, found, steps, within)
            idle = 0 if tally.made > before else idle + 1
            if differs or tally.made == kills or idle == IDLE:
                break
            if idle:  # on a busy machine a moment may be over before it is seen, again and again
                drawn[tally.made :] = killing.draw(rng, kills - tally.made, steps, every, hosts)
            show(f"the run has ended; a new one gets the other {kills - tally.made}")
        if not tally.made and not differs:
            raise FaultError(f"the run ended before it could be killed once: nothing is proved. Raise --steps={steps}.")
        if not differs:
            return Verdict(True, f"{tally}; {accounts.compared(expected, within)}", tally.made, tally.again)
        if not tally.lost:
            again = accounts.difference(expected, trial.whole("left_alone_again")[0], steps, within)
            differs += "\n" + (
                f"But so do two runs that are left alone ({again}): the config does not compute the same twice."
                if again
                else "Two runs that are left alone are the same: what differs comes from resuming."
            )
        return Verdict(False, f"{tally}; {differs}", tally.made, tally.again)


def shortened(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Keys to change, so that a run of so many steps logs each, and is hit while it evaluates and saves too."""
    changes: dict[str, Any] = {
        "train.duration": steps,
        "train.log_every": 1,
        "train.eval_every": -(-steps // 3),
        "train.patience": 0,
        "checkpoint.every": max(steps // 12, 2),
        "checkpoint.every_seconds": 0.0,
        "checkpoint.keep": 2,  # so that nearly every save deletes
    }
    if given.get("optim.warmup"):
        changes["optim.warmup"] = 0  # it would be longer than the run
    return changes


@dataclasses.dataclass
class _Tally:
    """What the kills came to."""

    asked: int
    made: int = 0
    again: int = 0  # steps
    lost: str = ""

    def __str__(self) -> str:
        fewer = f" (the run ended before {self.asked - self.made} more)" if self.made < self.asked else ""
        return f"{self.made} kills{fewer}, {self.again} steps made again"


@dataclasses.dataclass(frozen=True)
class _Struck:
    """A kill: the line to show, the last step before it, and whether the run could save that."""

    line: str
    step: int
    saves: bool


class _Trial:
    """Runs of one config, in one folder."""

    def __init__(
        self,
        arguments: Sequence[str],
        changes: dict[str, Any],
        folder: Path,
        steps: int,
        hosts: int,
        devices: int | None,
        limit: float,
        show: Callable[[str], None],
    ) -> None:
        self.arguments, self.changes, self.folder, self.steps = arguments, changes, folder, steps
        self.hosts, self.limit, self.show = hosts, limit, show
        self._environment = environment(devices)
        # Restarts are quicker; and on a GPU, which chooses its kernels by measuring, all runs have the same program.
        self._environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        self._environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    def _start(self, name: str, number: int) -> Crew:
        words = [sys.executable, "-m", "flaxmodels.verify.witness", "--reports", "{reports}", *self.arguments]
        words += [f"--config.{key}={value!r}" for key, value in self.changes.items()]
        words += [f"--workdir={self.folder / name}"]
        # Where one is killed before all have met, the others wait for it so long.
        limits = [f"--init_timeout={MEETING:g}"] * (self.hosts > 1)
        commands = [[*words, *own, *limits] for own in addresses(self.hosts)]
        return Crew(commands, self.folder / "processes" / f"{name}_{number:03}", self._environment)

    def whole(self, name: str) -> tuple[Account, Pace]:
        """A run that is left alone; and how long it took."""
        account, begun = self._account(), time.monotonic()
        with self._start(name, 0) as crew:
            try:
                crew.wait("train", self.limit)
                crew.end(LEAVING)
            except FaultError as error:
                kind = UserError if exits.BAD_INPUT in crew.codes else FaultError
                raise kind(f"the run fails by itself, without a kill: {error}") from error
            seconds, made = time.monotonic() - begun, killing.steps(crew.reports())
            self._add(account, crew)
        self._finish(account, name, crew)
        logged = [line["step"] for line in account.lines if "train/loss" in line]  # the guard may leave some out
        if not logged or logged != sorted(set(logged)):
            raise FaultError("the run that was left alone did not log its steps in order, each once")
        first, last = min(made.values()), max(made.values())
        pace = Pace(first - begun, (last - first) / self.steps)
        self.show(f"left alone: {self.steps} steps in {seconds:.1f} s, {pace.start:.1f} s of it before the first")
        self.limit = min(self.limit, LEAVING + 5 * seconds)  # of those that are killed
        return account, pace

    def killed(self, name: str, drawn: Sequence[Kill], pace: Pace, tally: _Tally) -> Account:
        """A run that is killed, and started again, till it ends. Kills that were made are added to `tally`."""
        account, checkpoints = self._account(), self.folder / name / "checkpoints"
        before: _Struck | None = None  # the last kill, till it is known where the run went on
        for number, kill in enumerate([*drawn, None], 1):
            with self._start(name, number) as crew:
                begun = time.monotonic()
                if kill is None or not killing.strike(kill, crew, checkpoints, pace, self.limit):
                    kill, codes = None, self._ends(crew)
                else:
                    codes = self._left(crew, kill)
                steps = killing.steps(crew.reports())
                self._add(account, crew)
            if steps:
                pace = dataclasses.replace(pace, start=min(pace.start, min(steps.values()) - begun))  # it compiled once
            if before is not None and (steps or kill is None):
                self._tell(tally, before, min(steps) - 1 if steps else self.steps)
                before = None
            if kill is None:
                break
            if before is not None:
                self.show(f"{before.line} killed again before it resumed")
            tally.made += 1
            where = f"at step {max(steps)}" if steps else "before a step"
            line = (
                f"{tally.made:>3}/{tally.asked}  {kill!s:<36} {where:<14} on disk: {killing.on_disk(checkpoints):<26}"
            )
            asked = kill.kind == "SIGTERM"
            if asked and not set(codes) <= {exits.SIGNALLED + signal.SIGTERM, exits.DONE}:
                tally.lost = tally.lost or f"SIGTERM {where}: the processes left with {codes}, expected 143"
            # A step that was fed is not made where a signal came; what was made is in the log before it is saved.
            logged = max((line["step"] for line in self._lines(name)), default=0)
            last = max(steps) if steps and not asked else logged
            before = _Struck(line, last, asked and bool(steps))
        self._finish(account, name, crew)
        return account

    def _tell(self, tally: _Tally, struck: _Struck, resumed: int) -> None:
        """Show the line of a kill, now that it is known where the run went on."""
        again = max(struck.step - resumed, 0)
        tally.again += again
        self.show(f"{struck.line} resumed at {resumed}, {again} steps again")
        if struck.saves and again:
            lost = f"SIGTERM at step {struck.step} lost {again} steps: the run went on from step {resumed}"
            tally.lost = tally.lost or lost

    def _left(self, crew: Crew, kill: Kill) -> list[int | None]:
        """Exit codes after a signal, when all processes have left."""
        deadline = time.monotonic() + LEAVING
        while None in crew.codes:
            if time.monotonic() > deadline:
                left = [number for number, code in enumerate(crew.codes) if code is None]
                raise FaultError(f"after {kill} in process {kill.processes}, {left} still runs {LEAVING:g} s later")
            time.sleep(killing.PAUSE)
        return crew.codes

    def _ends(self, crew: Crew) -> list[int | None]:
        """Exit codes of a run that was not killed, at its end."""
        try:
            crew.wait("train", self.limit)
            crew.end(LEAVING)
        except FaultError as error:
            raise FaultError(f"the run fails when it is started again: {error}") from error
        return crew.codes

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The log of a run, without what the clock decides and without a line that a kill tore."""
        file = self.folder / name / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in found]

    def _account(self) -> Account:
        return Account([{} for _ in range(self.hosts)])

    def _add(self, account: Account, crew: Crew) -> None:
        """Add what the processes of one start were given."""
        for number, batches in enumerate(account.batches):
            for line in crew.reports(number):
                if (step := killing.step_of(line)) is not None:
                    batches.setdefault(step, set()).add(line["batch"])
                if line["phase"] == "assembled":
                    account.bits = account.bits and accounts.promises_bits(line["platform"], line["flags"])

    def _finish(self, account: Account, name: str, crew: Crew) -> None:
        """Add what a run that has ended left."""
        account.lines = self._lines(name)
        for number in range(self.hosts):
            found = next(line["found"] for line in crew.reports(number) if "found" in line)
            account.state.append({path: (digest, norm) for path, (digest, norm) in found["state"].items()})
