"""The verb `slurm`: a batch script for a cluster of GPUs, from the settings of a run.

One task a node: one process drives all GPUs of its node, as on a host of TPUs, so that data are read once a node, and
there are no more processes to wait for each other than nodes. The repository, with its `.venv`, and the bucket are on
storage that all nodes see.
"""

import argparse
import math
import re
import shlex
from pathlib import Path

from tpu.gcloud import Cloud
from tpu.settings import Settings, UserError

NOTICE = 300  # seconds before a time limit at which all tasks get SIGTERM, to save
LATEST = NOTICE + 60  # Slurm may send it a minute early
STOPPED = 143  # exit code after SIGTERM: saved, and the same command goes on
LIMIT = 3  # exit code where the hours are used up, as that of `watch`
SETUP = ". .venv/bin/activate"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument("--to", type=Path, metavar="FILE", help="the script (default: job.sbatch in the state folder)")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="(1)")
    parser.add_argument("--gpus", type=_count, default=8, metavar="N", help="of each node (8)")
    parser.add_argument("--partition", metavar="NAME", help="(default: the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="that pays (default: the user's)")
    parser.add_argument(
        "--hours", type=_hours, metavar="H", help="of one allocation, after which it queues again (default: max_hours)"
    )
    parser.add_argument("--setup", default=SETUP, metavar="LINE", help=f"of shell, before the training ({SETUP!r})")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected an integer, at least 1")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not LATEST / 3600 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit: expected hours, more than {LATEST / 3600}")
    return hours


def slurm(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Write the batch script of a run; with `--dry_run`, print it."""
    to = flags.to or Path(s.folder, "job.sbatch")
    text = script(s, flags, to.parent)
    if cloud.dry_run:
        cloud.say(text.removesuffix("\n"))
        return 0
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text)
    if s.max_cost is not None:
        cloud.say(f"# max_cost={s.max_cost:g} does not count: what the hours of a cluster cost is not known here.")
    cloud.say(
        f"# {to}: {flags.nodes} x {flags.gpus} GPUs. From the root of the repository: sbatch {shlex.quote(str(to))}"
    )
    return 0


def script(s: Settings, flags: argparse.Namespace, folder: Path) -> str:
    """The whole text of a batch script.

    Args:
      s: of the run.
      flags: of `add_flags`.
      folder: for its log and its clock; relative to where it is submitted.

    Raises:
      UserError: the settings can't be a job.
    """
    if not re.fullmatch(r"[\w./@:+=,-]+", str(folder)):
        raise UserError(
            f"--to: the log can't go to {str(folder)!r}: expected a path of letters, digits and ./_@:+=,- only."
        )
    hours = min((h for h in (flags.hours, s.max_hours) if h is not None), default=None)
    options = {
        "job-name": s.name,
        "partition": flags.partition,
        "account": flags.account,
        "nodes": flags.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": flags.gpus,
        "time": hours and math.ceil(hours * 60),
        "output": folder / "slurm-%j.log",
        "open-mode": "append",
    }
    head = "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items() if value is not None)
    begin, end = ("", "") if s.max_hours is None or hours is None else _clock(s.max_hours, hours, folder)
    return _SCRIPT.format(
        head=head, notice=NOTICE, setup=flags.setup, begin=begin, end=end, stopped=STOPPED, words=shlex.join(s.training)
    )


def _clock(most: float, once: float, folder: Path) -> tuple[str, str]:
    """Shell that counts the hours of all starts of a job together: for before the training, and for after it."""
    begin = _CLOCK.format(
        folder=folder, most=round(most * 3600), once=round(once * 3600), hours=f"{most:g}", latest=LATEST, limit=LIMIT
    )
    stop = f'echo "stopped by max_hours={most:g}: saved"; exit {LIMIT}'
    return begin, f'if [ "$((left - SECONDS))" -le {LATEST} ]; then {stop}; fi\n'


_CLOCK = """
# The hours of all starts together. A user may lower the time limit of a job that runs.
clock="{folder}/seconds-$SLURM_JOB_ID"
used=$(cat "$clock" 2>/dev/null || echo 0)
left=$(({most} - used))
if [ "$left" -le {latest} ]; then echo "max_hours={hours} are used up: not started again"; exit {limit}; fi
if [ "$left" -lt {once} ]; then scontrol update JobId="$SLURM_JOB_ID" TimeLimit="$((left / 60))" || exit 1; fi
trap 'echo "$((used + SECONDS))" >"$clock"' EXIT
"""

# `--signal` without `B:` reaches the tasks themselves. SIGTERM to `srun`, as a trap of this shell could send, would be
# SIGKILL for them.
_SCRIPT = """\
#!/bin/bash
{head}#SBATCH --requeue
#SBATCH --signal=TERM@{notice}
# Before its time limit, and where another job takes the nodes, the run gets SIGTERM, saves, and queues again.
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
# shellcheck disable=SC1091
{setup} || exit 1
{begin}
# All processes meet at the first node. Two jobs may share it: the port is the job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:$((61440 + SLURM_JOB_ID % 4096))"

# One that fails is told of by itself to the others, which leave; they are waited for, and not killed.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=600 {words}
code=$?
if [ "$code" != {stopped} ]; then exit "$code"; fi
{end}echo "stopped and saved: queued again"
scontrol requeue "$SLURM_JOB_ID"
"""
