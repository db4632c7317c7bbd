"""A workdir in a bucket: whether this account may use it, and how fast it takes what a save writes."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from flaxmodels.console import human_bytes
from flaxmodels.registry import UserError
from flaxmodels.verify.finding import Finding, ok, problem, warning

LARGE, SMALL, TIMES = 16 * 2**20, 4096, 5  # bytes of an object, and how often a small one is written
SLOW = 0.5  # seconds of a small object, above which a save is felt


def bucket(workdir: Path) -> Iterator[Finding]:
    """Write objects below a workdir, read them, and delete them.

    Args:
      workdir: "gs://BUCKET/NAME", which need not exist yet.
    """
    file = workdir / f".doctor_{uuid.uuid4().hex}"
    try:
        data = os.urandom(LARGE)
        written = _seconds(lambda: file.write_bytes(data))
        read = _seconds(lambda: _check(file.read_bytes() == data))
        small = min(_seconds(lambda: file.write_bytes(data[:SMALL])) for _ in range(TIMES))
        file.unlink()
    except (OSError, UserError) as error:
        with contextlib.suppress(OSError, UserError):  # what was written is not left to be paid for
            file.unlink(missing_ok=True)
        text = getattr(error, "strerror", None) or str(error)
        yield problem("storage", f"{workdir}: {text}", "choose another --workdir, or mend that")
        return
    text = f"{workdir}: writes {human_bytes(LARGE / written)}/s, reads {human_bytes(LARGE / read)}/s"
    text += f", and a small object takes {1000 * small:.0f} ms"
    if small > SLOW:
        yield warning("storage", f"{text}: slow.", "a bucket in the region of the machines")
    else:
        yield ok("storage", text)


def _check(same: bool) -> None:
    if not same:
        raise OSError(0, "what was written is not what is read")


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
