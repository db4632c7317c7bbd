"""`--max_restarts=N`: a parent process that starts the same command again after a fault, and accounts for lost time.

It knows nothing of the run but the exit code of its child and what lies on disk, and loads no JAX, so that what broke
the child can't break it. In a run of several processes each has a supervisor: one that fails ends all, and all meet
again at the roll call.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flaxmodels import mirror, storage
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, goodput
from flaxmodels.runtime.lease import answered

FLAG = "--max_restarts"
# Seconds before a restart; doubled for each that made no progress, and then again this.
PAUSE = 1.0
FRUITLESS = 3  # restarts in a row without a newer step on disk, after which it gives up
STOPPED = (signal.SIGINT, signal.SIGTERM)
# From Linux's sys/prctl.h.
PR_SET_PDEATHSIG = 1


def add_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that can be restarted."""
    parser.add_argument(
        FLAG, type=_count, default=0, metavar="N", help="start again after a fault, up to N times (default: 0)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected an integer, at least 0")
    return int(text)


def default_workdir(config: str) -> Path:
    """Where a run of this config file writes, if no `--workdir` says otherwise."""
    return Path("runs", Path(config.partition(":")[0]).stem)


def run(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """`main(argv)`; with `--max_restarts=N`, this same command without that flag, as a child, again after each fault.

    A fault is exit code 1 or 75, or a death by a signal that did not ask to stop. SIGTERM and SIGINT are passed on, and
    the child ends with this process, however that ends.

    Args:
      main: takes the words of the command.
      argv: these words; the last of `sys.argv`.

    Returns:
      The exit code of the last child; 128 + the number of a signal that killed it.

    Raises:
      UserError: the flag stands in words that did not start this process.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=f"... [{FLAG}=N]")
    add_flag(flags)
    flags.add_argument("--workdir")
    flags.add_argument("--config", default="")
    asked, _ = flags.parse_known_args(argv)
    if not asked.max_restarts:
        return main(list(argv))
    workdir = storage.place(asked.workdir) if asked.workdir else default_workdir(asked.config)
    return _supervise(_command(list(argv)), workdir, asked.max_restarts)


def _command(argv: list[str]) -> list[str]:
    """This process's own command, with Python's flags, but without ours."""
    words = list(sys.orig_argv)
    if not argv or words[-len(argv) :] != argv:
        raise UserError(f"{FLAG} starts the command line of this process again, but it does not stand there.")
    own, skip = list[str](), False
    for word in argv:
        if not skip and word != FLAG and not word.startswith(f"{FLAG}="):
            own.append(word)
        skip = word == FLAG
    return [sys.executable, *words[1 : -len(argv)], *own]


def newest(workdir: Path) -> int:
    """The newest committed step on disk; 0 where there is none."""
    found = (file.parent.name for file in (workdir / "checkpoints").glob("*/MANIFEST.json"))
    return max((int(name) for name in found if name.isdecimal()), default=0)


def _newest(workdir: Path, known: int) -> int:
    """`newest`; what is known already, where a bucket does not answer."""
    try:
        return newest(workdir)
    except OSError as error:
        _say(f"{workdir}: {error.strerror}")
        return known


@dataclasses.dataclass
class _Asked:
    """What this process was asked, and the child to tell.

    Attributes:
      came: the first signal, or None.
      child: that runs now, if one does.
    """

    came: signal.Signals | None = None
    child: subprocess.Popen[bytes] | None = None


def _supervise(command: Sequence[str], workdir: Path, most: int) -> int:
    with answered(workdir):
        step, fruitless = newest(workdir), 0
    with _passing_on() as asked:
        for attempt in range(most + 1):
            code, seconds = _attempt(command, workdir, asked)
            before, step = step, _newest(workdir, step)
            fruitless = fruitless + 1 if step == before else 0
            if asked.came is not None:
                return code if code >= 0 else exits.SIGNALLED + asked.came
            if not _fault(code):
                return code if code >= 0 else exits.SIGNALLED - code
            how = f"{goodput.ending(code)} after {seconds:.0f} s, the newest step on disk is {step}"
            futile = min(fruitless, attempt)  # restarts; the first attempt was none
            if futile == FRUITLESS or attempt == most:
                why = f"as before the last {FRUITLESS} restarts" if futile == FRUITLESS else f"{FLAG}={most}"
                _say("\n".join([f"{how}: gave up, {why}. What was wrong stands above.", *goodput.summary(workdir)]))
                break
            pause = PAUSE * 2**futile
            _say(f"{how}: restart {attempt + 1} of {most} in {pause:g} s")
            until = time.monotonic() + pause
            while time.monotonic() < until and asked.came is None:
                time.sleep(0.05)
    return code if code >= 0 else exits.SIGNALLED - code


def _fault(code: int) -> bool:
    """Whether a process that ended so is to be started again."""
    return code in (exits.FAULT, exits.STUCK) or (code < 0 and -code not in STOPPED)


def _attempt(command: Sequence[str], workdir: Path, asked: _Asked) -> tuple[int, float]:
    """Run the command to its end: (return code, negative where a signal killed it; seconds)."""
    begun = time.monotonic()
    if asked.came is not None:
        return exits.SIGNALLED + asked.came, 0.0
    asked.child = child = subprocess.Popen(command, preexec_fn=_tie())
    try:
        if asked.came is not None:  # it came before there was anyone to tell
            child.send_signal(asked.came)
        code = child.wait()
    finally:
        asked.child = None
        child.kill()
    seconds = time.monotonic() - begun
    try:
        mirror.rescue(workdir, child.pid, lambda folder: goodput.close(folder, child.pid, code))
    except OSError as error:
        _say(f"{workdir}: {error.strerror}")
    return code, seconds


def _tie() -> Callable[[], None] | None:
    """What a child does before it runs the command: have the kernel kill it when this process ends, however it does."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this
            os._exit(exits.FAULT)

    return tie


@contextlib.contextmanager
def _passing_on() -> Iterator[_Asked]:
    """Pass SIGTERM and SIGINT on to the child; what came first is remembered."""
    asked = _Asked()

    def catch(number: int, frame: types.FrameType | None) -> None:
        asked.came = asked.came or signal.Signals(number)
        if asked.child is not None:
            asked.child.send_signal(number)

    previous = {number: signal.signal(number, catch) for number in STOPPED}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
