"""What a user says of one run: a TOML file, and flags over it, checked before anything costs money."""

import dataclasses
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tpu.keys import KEYS, Capacity, UserError, suggest

FILE = "tpu.toml"
# What the training is told beyond the user's own words: where it saves, that it starts again after a fault, and that a
# checkpoint which a dying machine left damaged is moved aside. (flag, what is added)
TRAINING = (
    ("--max_restarts", "--max_restarts=20"),
    ("--config.checkpoint.damaged", "--config.checkpoint.damaged=pass over"),
)
_WORKDIR = "--workdir"


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run on one machine: a slice, or several slices of one shape.

    Attributes:
      name: of the run, the machine and the folder in the bucket.
      project: of Google Cloud.
      zones: tried in turn; the key and the flag are `zone`, such as "us-west4-a,us-west1-c".
      type: accelerator type of a slice, such as "v5litepod-16".
      runtime_version: of the TPU VM's image; None: the one for the type.
      capacity: "spot" machines are cheapest and may be taken back at any time.
      slices: how many of the type.
      bucket: "gs://..." that the machine may write to, or a folder that all workers see.
      max_hours: of machines, after which the run is saved, and the machine deleted.
      max_cost: USD, likewise.
      idle_minutes: without a training process, after which the machine is deleted.
      queue_hours: after which a request that still waits lapses: nobody may be watching when it is granted.
      zone_patience: minutes that a request may wait in a zone before the next is tried.
      command: of the training, without where it saves.
      install: words for pip.
      prices: a TOML file over flaxmodels/perf/prices.toml.
      state: folder on this machine.
      network: of the machine; None: the project's default network.
      subnetwork: likewise.
      service_account: that the machine acts as; None: the project's default one.
      labels: of the machine, for the bill.
      tags: of the machine, for the firewall.
      internal_ips: the machine gets no address outside the network.
      ssh_flags: words for every `gcloud ... ssh` and `scp`, such as "--internal-ip".
    """

    name: str
    project: str = ""
    zones: tuple[str, ...] = ()
    type: str = ""
    runtime_version: str | None = None
    capacity: Capacity = "spot"
    slices: int = 1
    bucket: str | None = None
    max_hours: float | None = None
    max_cost: float | None = None
    idle_minutes: float = 30.0
    queue_hours: float = 12.0
    zone_patience: float = 30.0
    command: tuple[str, ...] = ("python", "train.py", "--config=configs/digits_mlp.py")
    install: tuple[str, ...] = ("-e", ".[tpu,gcs,logging,text]")
    prices: Path | None = None
    state: Path = Path("runs/tpu")
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None
    labels: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    internal_ips: bool = False
    ssh_flags: tuple[str, ...] = ()

    @property
    def workdir(self) -> str:
        """Where the training saves: the user's own `--workdir`, or the folder of this name in the bucket."""
        own = _said(self.command, _WORKDIR)
        if own is not None:
            return own
        if self.bucket is None:
            raise UserError(
                "no bucket: a machine's own disk goes when it goes. Say --bucket=gs://NAME, which "
                "`gcloud storage buckets create gs://NAME --location=REGION` makes."
            )
        return f"{self.bucket.rstrip('/')}/{self.name}"

    @property
    def training(self) -> tuple[str, ...]:
        """The whole command of every worker."""
        added = tuple(words for flag, words in TRAINING if _said(self.command, flag) is None)
        workdir = () if _said(self.command, _WORKDIR) is not None else (f"{_WORKDIR}={self.workdir}",)
        return (*self.command, *workdir, *added)

    @property
    def folder(self) -> Path:
        """Where this run's state, logs and parcels lie on this machine."""
        return self.state / self.name


def load(file: Path | None, flags: Mapping[str, Any], needs: Collection[str] = ("project", "zone", "type")) -> Settings:
    """What the file says, and over it what the flags say.

    Args:
      file: TOML; None: `tpu.toml` in this folder, where there is one.
      flags: name -> text, or None for one that was not given; other names than those of settings are passed over.
      needs: the keys besides `name` that must be said.

    Raises:
      UserError: an unknown key, a wrong value, or one that is missing.
    """
    said = {_key(key, f"{str(file)!r}"): value for key, value in _read(file).items()}
    said |= {key: flags[key] for key in KEYS if flags.get(key) is not None}
    for key in ("name", *needs):
        if key not in said:
            raise UserError(f"--{key} is missing: {KEYS[key].said}. Say it with the flag, or in {FILE}.")
    return Settings(**{KEYS[key].field or key: KEYS[key].read(key, value) for key, value in said.items()})


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        file = Path(FILE)
        if not file.exists():
            return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--file={str(file)!r} can't be read: {error}") from error


def _key(key: str, where: str) -> str:
    if key not in KEYS:
        raise UserError(f"{where}: unknown key {key!r}. {suggest(key, KEYS)}")
    return key


def _said(words: Iterable[str], flag: str) -> str | None:
    """The value of a flag among the words of a command, "" for a flag without one; None where it is not there."""
    words = list(words)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            following = words[index + 1] if index + 1 < len(words) else ""
            return value if equals else "" if following.startswith("-") else following
    return None
