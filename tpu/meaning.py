"""What an error of `gcloud` means, and what to do about it."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tpu.processes import EXPIRED, Done

Kind = Literal[
    "capacity", "quota", "permission", "missing", "exists", "transient", "usage", "gone", "worker", "unknown"
]
INSTALL = "https://cloud.google.com/sdk/docs/install"


class CloudError(RuntimeError):
    """A command failed: shown without a traceback, and the launcher leaves with exit code 1.

    Args:
      kind: what it means; "gone": gcloud is not installed, "worker": a command on a worker failed.
      said: what was said.
      remedy: what to do.
      done: how the command ended; None where it could not be run.
    """

    def __init__(self, kind: Kind, said: str, remedy: str = "", done: Done | None = None) -> None:
        stop = "." if remedy and said[-1:].isalnum() else ""
        super().__init__(f"{said}{stop} {remedy}".strip())
        self.kind, self.said, self.remedy, self.done = kind, said, remedy, done


class _Sign(NamedTuple):
    """What is found in the words of an error, without regard to case."""

    kind: Kind
    pattern: str
    remedy: str


def _http(codes: str) -> str:
    """A status of the service's answer, among the numbers that an error is full of."""
    return rf"(status|code)\W{{1,4}}({codes})\b|httperror ({codes})\b"


# The first that is found counts.
_SIGNS = (
    _Sign(
        "permission",
        r"do not currently have an active account|gcloud auth login|invalid_grant|reauthenticat|"
        r"unauthenticated|invalid authentication credentials",
        "Log in: `gcloud auth login`.",
    ),
    _Sign(
        "permission",
        r"ssh key is not present|needs? to be added to .*agent|permission denied \(publickey",
        "gcloud reaches several workers through the ssh agent only: `eval \"$(ssh-agent)\"`, then "
        "`ssh-add ~/.ssh/google_compute_engine` (the key is made by the first `python tpu/launch.py ssh`).",
    ),
    _Sign(
        "transient",
        r"connect to host \S+ port 22",
        "A new machine may need a minute. Else a firewall rule must allow port 22, and a machine without an external "
        "address is reached from within its network: --ssh_flags=--internal-ip.",
    ),
    _Sign(
        "permission",
        r"service_disabled|has not been used in project|api .{0,80}not enabled|it is disabled",
        "Switch the API on: `gcloud services enable tpu.googleapis.com`.",
    ),
    _Sign(
        "permission",
        r"billing.{0,40}(disabled|not enabled|must be enabled)",
        "The project has no billing account: https://console.cloud.google.com/billing.",
    ),
    _Sign("transient", r"rate.?limit|(requests?|queries).{0,60}per.?(minute|second)", ""),
    _Sign(
        "capacity",
        r"no more capacity|(insufficient|not enough).{0,40}(capacity|resources)|stockout|resource.?pool.?exhausted|"
        r"does not have enough resources|currently unavailable in",
        "Try other zones (--zone=A,B), a smaller --type, or wait.",
    ),
    _Sign(
        "quota",
        r"quota",
        "Ask for more at https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API; spot machines have "
        "quotas of their own), or try another --zone, --type or --capacity.",
    ),
    _Sign("exists", rf"already.?exists|{_http('409')}", ""),
    _Sign(
        "permission",
        rf"permission.?denied|does not have (the )?permission|required .{{0,60}}permission|forbidden|{_http('403')}",
        "See that --project and --zone exist, that `gcloud auth list` shows your account, and that it has the role "
        "roles/tpu.admin there; for ssh roles/compute.instanceAdmin.v1 and roles/iam.serviceAccountUser too.",
    ),
    _Sign(
        "usage",
        rf"unrecognized arguments|invalid (choice|value)|must be specified|invalid.argument|{_http('400')}",
        "",
    ),
    _Sign("missing", rf"not.?found|does not exist|{_http('404')}", ""),
    _Sign(
        "transient",
        rf"{_http('429|500|502|503|504')}|unavailable|internal error|deadline.?exceeded|backend error|try again|"
        r"connection (reset|refused|aborted|timed out)|connectionerror|broken pipe|temporary failure|timed out|"
        r"network is unreachable|could not resolve host|max retries exceeded|aborted",
        "",
    ),
)  # fmt: skip
_OF_BUCKETS = (
    _Sign(
        "permission",
        r"does not have storage\.",
        "See that the bucket is yours (its name is unique in the world), and that the account has the role "
        "roles/storage.objectUser on it.",
    ),
    _Sign(
        "missing",
        r"not found: 404|bucket does not exist",
        "`gcloud storage buckets create gs://NAME --location=REGION`.",
    ),
)
# What gcloud says around the words of ssh, which are those that tell what is wrong.
_AROUND = re.compile(
    r"Using (ssh|scp) batch size|(SSH|SCP): Attempting|Retrying: |Failed to execute command on multiple workers|"
    r".*\bexited with return code \[|SSH key found in"
)


def error_of(words: Sequence[str], done: Done) -> CloudError:
    """The error of a command that ended with a code that is not 0."""
    text = done.err if done.err.strip() else done.out
    sign = _sign(text, (_SIGNS[0], *_OF_BUCKETS, *_SIGNS) if tuple(words[1:2]) == ("storage",) else _SIGNS)
    short = shortened(text)
    if done.code == EXPIRED:
        said = f"`{_short(words)}` did not end in time" + (f": {short}" if short else ".")
        return CloudError("transient", said, sign.remedy, done)
    said = f"`{_short(words)}` failed with code {done.code}: {short or 'it said nothing'}"
    return CloudError(sign.kind, said, sign.remedy, done)


def kind(said: str) -> Kind:
    """What an error means, by its words."""
    return _sign(said).kind


def _sign(text: str, signs: Sequence[_Sign] = _SIGNS) -> _Sign:
    found = (sign for sign in signs if re.search(sign.pattern, text, re.IGNORECASE))
    return next(found, _Sign("unknown", "", ""))


def not_installed(command: str) -> CloudError:
    """The error where there is no such command on this machine."""
    return CloudError("gone", f"{command!r} is not installed here, or not on PATH.", f"Install it: {INSTALL}.")


def shortened(text: str, most: int = 600) -> str:
    """What matters of an error's text: from its first line with ERROR on, in one line."""
    text = text.partition("Exception in thread")[0].strip() or text  # each try of a thread has said why before
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    lines = [line for line in lines if not _AROUND.match(line)] or lines
    first = next((index for index, line in enumerate(lines) if "ERROR" in line), max(0, len(lines) - 3))
    short = " ".join(lines[first:])
    return short if len(short) <= most else f"{short[:most]} ..."


def _short(words: Sequence[str]) -> str:
    """The command's name and verb, without flags."""
    return " ".join(word for word in words[:6] if not word.startswith("-"))
