"""What is known of accelerators without having one: the memory of a device, by its kind."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of device, as JAX lists it: a chip, or a half of one.

    Attributes:
      name: in short: that of a TPU as Google Cloud writes it.
      devices_per_chip: JAX lists the two halves of a chip of TPU v2, v3 and 7x; all other chips are one device, also
        those of two cores (v4, v5p), which run as one ("megacore").
      memory: of a device, bytes, by the data sheet (https://docs.cloud.google.com/tpu/docs, the page of each version).
        That of v5p says 95 GB, which is less than a program may use: here it is 96 GiB. Of a GPU, what `nvidia-smi`
        shows as total.
      usable: what of it XLA's compiler lets a program have, bytes; a little is kept for the runtime. The figures of
        TPUs are those that libtpu 0.0.42.1 names when it refuses a program as too large, to 0.01 GiB. Of a GPU, JAX
        takes three quarters (https://docs.jax.dev/en/latest/gpu_memory_allocation.html), and where the environment
        says otherwise the device itself knows.
    """

    name: str
    devices_per_chip: int
    memory: int
    usable: int


def _kind(name: str, devices_per_chip: int, memory: float, usable: float) -> Kind:
    return Kind(name, devices_per_chip, int(memory * GIB), int(usable * GIB))


def _gpu(name: str, memory: float) -> Kind:
    return _kind(name, 1, memory, 0.75 * memory)


# By `jax.Device.device_kind`. Where two spellings stand for one kind, versions of libtpu differ.
KINDS: Mapping[str, Kind] = {
    "TPU v2": _kind("v2", 2, 8, 7.48),
    "TPU v3": _kind("v3", 2, 16, 15.48),
    "TPU v4": _kind("v4", 1, 32, 30.75),
    "TPU v5 lite": _kind("v5e", 1, 16, 15.75),
    "TPU v5e": _kind("v5e", 1, 16, 15.75),
    "TPU v5": _kind("v5p", 1, 96, 95.74),
    "TPU v5p": _kind("v5p", 1, 96, 95.74),
    "TPU v6 lite": _kind("v6e", 1, 32, 31.25),
    "TPU v6e": _kind("v6e", 1, 32, 31.25),
    "TPU7x": _kind("tpu7x", 2, 96, 94.75),
    "NVIDIA A100-SXM4-40GB": _gpu("A100-40GB", 40.0),
    "NVIDIA A100-SXM4-80GB": _gpu("A100", 80.0),
    "NVIDIA H100 80GB HBM3": _gpu("H100", 79.65),
    "NVIDIA H200": _gpu("H200", 140.4),
    "NVIDIA B200": _gpu("B200", 179.06),
}


def memory(device: jax.Device) -> int | None:
    """Bytes that a program may use on a device; None where nothing says, as on a CPU.

    A device of another process is as large as this process's own of its kind, which say themselves. Those of a topology
    (`perf.topologies`) are nobody's own, and `KINDS` knows.
    """
    if device.platform == "cpu":
        return None
    own = next((d for d in device.client.local_devices() if d.device_kind == device.device_kind), None)
    limit = ((own and own.memory_stats()) or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return KINDS[device.device_kind].usable if device.device_kind in KINDS else None


def cache_folder() -> Path:
    """The folder of this user for what is worth keeping between runs; it need not exist. `XDG_CACHE_HOME` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaxmodels"


def make_cache_folder(*names: str) -> Path:
    """A folder below `cache_folder`, made if it is not there, and all of ours above it, for this user alone.

    Raises:
      OSError: it can't be made.
      RuntimeError: this user has no home.
    """
    place = cache_folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    for name in ("", *names):
        place = place / name
        place.mkdir(mode=0o700, exist_ok=True)
    return place


# libtpu asks a cloud's metadata server, the environment and a lock file which TPU is its own. Where there is none, it
# writes five lines of warnings about that, keeps a log in /tmp, and refuses to be loaded by two processes at once.
_NO_TPU: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Files of a TPU: up to v4, and after.
DEVICES = ((Path("/dev"), "accel*"), (Path("/dev/vfio"), "[0-9]*"))


def quiet_libtpu() -> None:
    """Tell libtpu, before it is loaded, that this machine has no TPU; where it has one, do nothing.

    Sets environment variables, and leaves alone those that are set.
    """
    if not any(list(folder.glob(name)) for folder, name in DEVICES):
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
