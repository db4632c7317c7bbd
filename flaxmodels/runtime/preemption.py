"""Notices of Google Cloud that this machine is about to be taken away: the same as a signal, with its own words.

The metadata server of a VM answers a question when its answer changes; so a thread for each of `KEYS` asks and waits.
A TPU VM is a VM: its server has the same keys, and tells of a maintenance, which a TPU never survives, in a third one.
https://docs.cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
https://docs.cloud.google.com/tpu/docs/view-maintenance-notifications
"""

import contextlib
import dataclasses
import http.client
import os
import re
import signal
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flaxmodels.runtime.signals import NOTICE


@dataclasses.dataclass(frozen=True)
class Key:
    """What a value says.

    Attributes:
      gone: matches one that means that the machine is taken away, and not just moved, or that it will be some day.
      words: of the question.
      new: only a value that comes while we watch counts. A maintenance may be over when its notice still stands, and
        would stop each start.
    """

    gone: re.Pattern[str]
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    new: bool = False


KEYS = {
    "preempted": Key(re.compile("TRUE")),
    "maintenance-event": Key(re.compile("TERMINATE")),
    # Announced days before as PENDING. The key is a folder, and its answer JSON, in which both spellings are found.
    "upcoming-maintenance": Key(
        re.compile(r'.*"maintenance_?status"\s*:\s*"ONGOING"', re.IGNORECASE | re.DOTALL),
        {"alt": "json", "recursive": "true"},
        new=True,
    ),
}
HOST = "metadata.google.internal"
PRODUCT = Path("/sys/class/dmi/id/product_name")
WAIT = 60.0  # seconds that the server holds a question whose answer does not change
LATE = 10.0  # seconds after which an answer no longer comes
PAUSE, LONGEST = 1.0, 60.0  # seconds between attempts: at first, and after many that failed
MOST = 4096  # bytes of an answer


def host() -> str:
    """Where the metadata server is; "" on a machine that is not one of Google Cloud. Asks nobody."""
    named = os.environ.get("GCE_METADATA_HOST", "")
    with contextlib.suppress(OSError):
        return named or HOST * (PRODUCT.read_text().strip() == "Google Compute Engine")
    return named


@contextlib.contextmanager
def watched(ask: Callable[[signal.Signals, str], object]) -> Iterator[None]:
    """While open, `ask(SIGTERM, NOTICE)` is called, in another thread, when a notice comes."""
    server, closed = host(), threading.Event()
    for key in KEYS if server else ():
        threading.Thread(target=_watch, args=(server, key, ask, closed), name=f"notice of {key}", daemon=True).start()
    try:
        yield
    finally:
        closed.set()  # and the thread ends when its question is answered: nobody waits for it


def _watch(server: str, key: str, ask: Callable[[signal.Signals, str], object], closed: threading.Event) -> None:
    """Ask till a notice comes; a server that does not know the key is asked once."""
    etag, pause, standing = "", PAUSE, KEYS[key].new
    while not closed.is_set():
        try:
            value, etag = _asked(server, key, etag)
            gone, pause = bool(KEYS[key].gone.match(value)), PAUSE
            standing = standing and gone
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                if error.code in (403, 404):
                    return
                standing = False  # where there never was a notice, this is how it says so
            gone, pause = False, min(2 * pause, LONGEST)
        if gone and not standing and not closed.is_set():
            ask(signal.SIGTERM, NOTICE)
            return
        closed.wait(pause)  # nothing is missed meanwhile: the tag tells what was seen


def _asked(server: str, key: str, etag: str) -> tuple[str, str]:
    """(value, its tag): the present one where `etag` is "", else the first whose tag is another one, or that of now.

    Raises:
      OSError or http.client.HTTPException: the server does not answer, or is none of Google Cloud.
    """
    waiting = {"wait_for_change": "true", "last_etag": etag, "timeout_sec": f"{WAIT:.0f}"} if etag else {}
    url = f"http://{server}/computeMetadata/v1/instance/{key}?{urllib.parse.urlencode({**KEYS[key].words, **waiting})}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has metadata of its own
    with opener.open(request, timeout=LATE + WAIT * bool(etag)) as answer:
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise OSError(f"{server} is no metadata server")
        return answer.read(MOST).decode("utf-8", "replace").strip(), answer.headers.get("ETag", "")
