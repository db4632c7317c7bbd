"""What `ssh --command` says to a worker, and what a worker's lines say of it.

All that is done there is done by `worker.sh`, which a parcel brings; here are only the words of its verbs.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tpu import machines
from tpu.settings import Settings
from tpu.shipping import Parcel

What = Literal["silent", "absent", "installed", "running", "ended", "dead"]
# As worker.sh tells its own number, for a machine that has no worker.sh yet.
_NUMBER = (
    "${TPU_WORKER_ID:-$(curl -sf -m 10 --retry 3 -H Metadata-Flavor:Google "
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/agent-worker-number)}"
)
_LINE = re.compile(r"worker (\d+): (.*)")
_STATE = re.compile(r"worker (\d+): state (\w+) attempt=(\d+) code=(\d+|-) sha=(\w+|-)")


@dataclass(frozen=True)
class Worker:
    """What a worker says of itself.

    Attributes:
      number: among all workers of all slices, from 0.
      what: "silent" did not answer; "absent" nothing is installed; "installed" and never started; "running";
        "ended" with an exit code; "dead": it was started, and neither runs nor left an exit code.
      attempt: the newest that was started; 0 where none was.
      code: the exit code, where it ended.
      sha: of the parcel that is installed, or "".
    """

    number: int
    what: What
    attempt: int = 0
    code: int | None = None
    sha: str = ""


def landing(s: Settings, parcel: Parcel) -> str:
    """Where `scp` puts a parcel: a name in the home folder of each worker."""
    return f"flaxmodels-{s.name}-{parcel.sha}.tar"


def install(s: Settings, parcel: Parcel, *, slice: int = 0) -> str:
    """Unpack and install the parcel that has landed; says so where that was done before."""
    tar, script = shlex.quote(landing(s, parcel)), _script(s)
    whole = f"echo '{parcel.digest}  '{tar} | sha256sum --check --status"
    unpack = f"mkdir -p {_folder(s)} && tar -xOf {tar} worker.sh >{script}.new && mv {script}.new {script}"
    call = _call(s, slice, "install", parcel.sha, parcel.digest, s.workdir, *s.install)
    lost = f"{_tell(s, slice, f'problem: parcel {parcel.sha} is not here as it was sent: ship it again')}; exit 1"
    return f"{whole} && {unpack}; if [ -f {script} ]; then {call}; else {lost}; fi"


def check(s: Settings, *, slice: int = 0) -> str:
    """Whether all hosts and chips are there, and the software works; all workers must be asked at the same time."""
    machine = machines.of(s.type)
    return _call(s, slice, "check", str(machine.hosts * s.slices), str(machine.chips * s.slices))


def start(s: Settings, attempt: int, *, slice: int = 0) -> str:
    """Start the training, which outlives the ssh session; one that runs is left alone.

    Args:
      s: whose `training` is the command.
      attempt: the same on all workers; one that is not above the last of a worker starts nothing there.
      slice: of the workers that are asked.
    """
    return _call(s, slice, "start", str(attempt), s.workdir, *s.training)


def state(s: Settings, *, slice: int = 0) -> str:
    """One line that `parse` reads; also of a machine that nothing was shipped to."""
    return _where_there_is_one(s, slice, "state absent attempt=0 code=- sha=-", "state")


def stop(s: Settings, seconds: float, *, slice: int = 0) -> str:
    """SIGTERM, so that the training saves and ends; SIGKILL for what still runs after `seconds`."""
    return _call(s, slice, "stop", f"{seconds:.0f}")


def log(s: Settings, lines: int, *, slice: int = 0) -> str:
    """The last lines of the newest attempt's output; all of them where `lines` is 0."""
    return _where_there_is_one(s, slice, "state absent attempt=0 code=- sha=-", "log", str(lines))


def follow(s: Settings, lines: int = 100, *, slice: int = 0) -> str:
    """The newest attempt's output as it comes, till the attempt ends."""
    return _call(s, slice, "follow", str(lines))


def parse(text: str, hosts: int) -> tuple[Worker, ...]:
    """What the lines of `state` say: a `Worker` for each of `hosts` (of all slices), in order.

    A worker without a line is silent. Lines of anything else that speaks on the way are passed over.
    """
    said = {int(found[1]): found for found in _STATE.finditer(text) if found[2] in get_args(What)}
    return tuple(_worker(number, said.get(number)) for number in range(hosts))


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, what it says) of each line that a worker wrote."""
    for line in text.splitlines():
        if found := _LINE.match(line):
            yield int(found[1]), found[2]


def problems(text: str) -> dict[int, str]:
    """What is wrong, by the number of the worker that says so; the first of each."""
    found = dict[int, str]()
    for number, line in lines(text):
        if line.startswith("problem: "):
            found.setdefault(number, line.removeprefix("problem: "))
    return found


def _worker(number: int, found: re.Match[str] | None) -> Worker:
    if found is None:
        return Worker(number, "silent")
    what = next(word for word in get_args(What) if word == found[2])
    code, sha = (None if text == "-" else text for text in found.group(4, 5))
    return Worker(number, what, int(found[3]), None if code is None else int(code), sha or "")


def _first(s: Settings, slice: int) -> int:
    """The number of the first worker of a slice."""
    return slice * machines.of(s.type).hosts


def _folder(s: Settings) -> str:
    return f"flaxmodels/{shlex.quote(s.name)}"  # ssh begins at home


def _script(s: Settings) -> str:
    return f"{_folder(s)}/worker.sh"


def _where_there_is_one(s: Settings, slice: int, said: str, *words: str) -> str:
    """Have a worker's script do something; a worker without one says so."""
    return f"if [ -f {_script(s)} ]; then {_call(s, slice, *words)}; else {_tell(s, slice, said)}; fi"


def _tell(s: Settings, slice: int, said: str) -> str:
    """Have a worker say something without its script."""
    return f'n={_NUMBER}; echo "worker $(({_first(s, slice)} + ${{n:-0}})): {said}"'


def _call(s: Settings, slice: int, *words: str) -> str:
    first = _first(s, slice)
    return f"{f'FIRST={first} ' if first else ''}sh {_script(s)} {shlex.join(words)}"
