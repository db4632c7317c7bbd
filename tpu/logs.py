"""What the workers print: as it comes, or the last of it, from the machine, the bucket, or the copies fetched."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tpu import acts, gcloud, remote
from tpu.diagnosis import first_error
from tpu.gcloud import Cloud
from tpu.meaning import CloudError, error_of
from tpu.processes import Done
from tpu.settings import Settings, UserError

SHOWN = 50  # lines of each worker
FETCHED = 20_000  # lines of each worker in which errors are looked for; the bucket has all
LIMIT = 300.0  # seconds to fetch them
FOREVER = 1e8  # seconds: who follows says when to stop
_STATE = "state "  # how a worker's last line begins, which is none of its output
_ATTEMPT = re.compile(r"attempt-(\d+)/?$")
_BEGUN = re.compile(r"launcher: attempt (\d+) begins")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument("--follow", action="store_true", help="go on as they write, till the attempt ends or Ctrl-C")
    parser.add_argument("--lines", default=str(SHOWN), metavar="N", help=f"of each worker (default: {SHOWN})")


def logs(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Print them, after the first error of any worker."""
    if not flags.lines.isdecimal():
        raise UserError(f"--lines={flags.lines!r}: expected a number of lines, at least 0.")
    zone = _zone(cloud, s)
    if flags.follow:
        if zone is None:
            raise CloudError("missing", f"{s.name!r} has no machine to follow.", "Without --follow: what it left.")
        follow(cloud, s, zone, int(flags.lines))
        return 0
    texts = (fetch(cloud, s, zone) if zone else {}) or stored(cloud, s)
    if not texts and not cloud.dry_run:
        raise CloudError(
            "missing", f"no log of {s.name!r}: not on a machine, in {s.workdir}/logs or in {s.folder}/logs."
        )
    if error := first_error(texts):
        cloud.say(f"first error, of {error}\n")
    for line in merged(texts, int(flags.lines)):
        cloud.say(line)
    return 0


def fetch(cloud: Cloud, s: Settings, zone: str) -> dict[int, str]:
    """The output of the newest attempt of each worker that answers, by number; copies go to the run's folder."""
    texts = dict[int, list[str]]()
    for done in _asked(cloud, s, zone, lambda slice: remote.log(s, FETCHED, slice=slice), LIMIT):
        for number, line in remote.lines(done.out):
            if not line.startswith(_STATE):
                texts.setdefault(number, []).append(line)
    found = {number: "\n".join(lines) + "\n" for number, lines in texts.items()}
    begun = max((int(said[1]) for text in found.values() if (said := _BEGUN.match(text))), default=newest(cloud, s))
    for number, text in found.items():
        file = _copies(s) / f"attempt-{begun}" / f"worker-{number}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return found


def stored(cloud: Cloud, s: Settings) -> dict[int, str]:
    """The output of the newest attempt as the bucket has it, or the last copy that was fetched; by number."""
    attempt = newest(cloud, s)
    if s.workdir.startswith("gs://") and attempt:
        _copies(s).mkdir(parents=True, exist_ok=True)
        words = gcloud.storage("cp", "--recursive", f"{s.workdir}/logs/attempt-{attempt}", str(_copies(s)))
        cloud.run(words, limit=LIMIT, check=False)  # what can't be had is looked for in the copies
    found = dict[int, str]()
    for folder in (_copies(s), Path(s.workdir, "logs")):
        for file in (folder / f"attempt-{attempt}").glob("worker-*.log"):
            if (number := file.stem.removeprefix("worker-")).isdecimal():
                found[int(number)] = file.read_text(errors="replace")
    return found


def newest(cloud: Cloud, s: Settings) -> int:
    """The newest attempt that left a log in the bucket, or a copy here; 0 where none did."""
    names = [str(folder) for place in (_copies(s), Path(s.workdir, "logs")) for folder in place.glob("attempt-*")]
    if s.workdir.startswith("gs://"):
        words = gcloud.storage("ls", f"{s.workdir}/logs/")
        done = cloud.run(words, quiet=True, check=False)
        if done.code and "matched no objects" not in done.err:
            raise error_of(words, done)
        names += done.out.split()
    return max((int(said[1]) for name in names if (said := _ATTEMPT.search(name))), default=0)


def merged(texts: Mapping[int, str], lines: int) -> Iterator[str]:
    """The last lines of all workers, each with its worker's name."""
    for number, text in sorted(texts.items()):
        for line in text.splitlines()[-lines:] if lines else []:
            yield _named(number, line)


def follow(cloud: Cloud, s: Settings, zone: str, lines: int) -> str:
    """Print what the workers write as they write it, till their attempt ends.

    Returns:
      All that they wrote, and their states, as `remote.parse` reads them; of who was lost on the way there is none.

    Raises:
      KeyboardInterrupt: Ctrl-C; the training goes on.
    """

    def show(line: str) -> None:
        said = next(remote.lines(line), None)
        if said is None or not said[1].startswith(_STATE):
            cloud.say(line if said is None else _named(*said))

    done = _asked(cloud, s, zone, lambda slice: remote.follow(s, lines, slice=slice), FOREVER, show)
    return "\n".join(one.out for one in done)


def _zone(cloud: Cloud, s: Settings) -> str | None:
    """Where the machine is; None where there is none, or no way to it."""
    try:
        return next((zone for zone, resource in acts.find(cloud, s) if resource.nodes), None)
    except CloudError as error:
        if error.kind == "gone":
            raise
        cloud.say(f"# {error}")
        return None


def _asked(
    cloud: Cloud,
    s: Settings,
    zone: str,
    text: Callable[[int], str],
    limit: float,
    stream: Callable[[str], None] | None = None,
) -> list[Done]:
    """Say to the workers of each slice what `text` says of its number; who does not answer is missing."""
    commands = [gcloud.ssh(s, zone, text(slice), node=node) for slice, node in enumerate(gcloud.node_names(s))]
    found = cloud.together(commands, limit=limit, stream=stream)
    for words, done in zip(commands, found, strict=True):
        if done.code:
            cloud.say(f"# {error_of(words, done)}")
    return found


def _copies(s: Settings) -> Path:
    return s.folder / "logs"


def _named(number: int, line: str) -> str:
    return f"w{number} | {line}"
