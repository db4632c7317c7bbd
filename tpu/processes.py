"""Processes of this machine: several at a time, with a time limit, and none left behind."""

import contextlib
import dataclasses
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

EXPIRED = 124  # the exit code of a command that ran past its limit, as of `timeout`
GRACE = 5.0  # seconds that a process which must end has for it
_LINGERS = 2.0  # seconds after a process ended, for what it left to let go of its output


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (124: past its time limit), standard output and standard error."""

    code: int
    out: str
    err: str


def run(commands: Sequence[Sequence[str]], limit: float, stream: Callable[[str], None] | None = None) -> list[Done]:
    """Run commands at the same time, without a terminal; in order, how each ended.

    Each is the leader of a group of its own, so that Ctrl-C reaches this process alone and a time limit ends all that a
    command started, such as the ssh that `gcloud` waits for.

    Args:
      commands: words of each.
      limit: seconds for all.
      stream: is given each line of their standard outputs as it comes.

    Raises:
      FileNotFoundError: there is no such command.
      ValueError: this is not the main thread, which alone knows of signals.
    """
    deadline = time.monotonic() + limit
    children: list[subprocess.Popen[bytes]] = []
    try:
        for words in commands:
            with _uninterrupted():
                children.append(
                    subprocess.Popen(
                        list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        process_group=0,
                    )
                )  # fmt: skip
        said = _listen(children, deadline, stream)
        codes = [_code(child, deadline) for child in children]
    finally:
        _end(children)
    return [Done(code, out, err) for code, (out, err) in zip(codes, said, strict=True)]


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that Python handles are raised at the end: within Popen they would leave a command that nobody knows of.

    They are not blocked, since the command would inherit that.
    """
    came: list[int] = []

    def tell() -> None:
        for number in came:
            signal.raise_signal(number)

    with contextlib.ExitStack() as stack:  # all handlers are as they were, also if a signal comes meanwhile
        stack.callback(tell)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(handler := signal.getsignal(number)):
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _: came.append(number))
        yield


def _listen(
    children: Sequence[subprocess.Popen[bytes]], deadline: float, stream: Callable[[str], None] | None
) -> list[tuple[str, str]]:
    """(standard output, standard error) of each, until all are closed or the time is up."""
    heard = {pipe.fileno(): bytearray() for child in children for pipe in (child.stdout, child.stderr) if pipe}
    passed = {child.stdout.fileno(): 0 for child in children if child.stdout} if stream else {}
    ended: float | None = None
    with selectors.DefaultSelector() as selector:
        for number in heard:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            if ended is None and all(child.poll() is not None for child in children):
                ended = time.monotonic()
            if ended is not None and time.monotonic() > ended + _LINGERS:  # some grandchild holds on to them
                break
            for key, _ in selector.select(min(0.1, max(0.0, deadline - time.monotonic()))):
                data = os.read(key.fd, 1 << 16)
                heard[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                if stream is not None and key.fd in passed:
                    passed[key.fd] = _pass(heard[key.fd], passed[key.fd], stream, last=not data)
    texts = {number: data.decode("utf-8", "replace") for number, data in heard.items()}
    return [
        (texts[child.stdout.fileno()], texts[child.stderr.fileno()])
        for child in children
        if child.stdout and child.stderr
    ]


def _pass(heard: bytearray, passed: int, stream: Callable[[str], None], *, last: bool) -> int:
    """Give `stream` the lines after the first `passed` bytes; how many bytes are passed now."""
    upto = len(heard) if last else heard.rfind(b"\n") + 1
    if upto > passed:
        for line in heard[passed:upto].decode("utf-8", "replace").splitlines():
            stream(line)
    return max(upto, passed)


def _code(child: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        code = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return EXPIRED
    return code if code >= 0 else 128 - code  # as a shell reports a signal


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the groups of the commands that still run: asked first, then forced."""
    running = [child for child in children if child.poll() is None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in running:
            with contextlib.suppress(ProcessLookupError):  # none of the group is left
                os.killpg(child.pid, number)
        until = time.monotonic() + GRACE
        for child in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
    for child in children:
        for pipe in (child.stdout, child.stderr):
            if pipe:
                pipe.close()
