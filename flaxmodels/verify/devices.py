"""Accelerators: which the system has, whether JAX uses them, and who else holds them. Imports no JAX."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels.verify.finding import Finding, ok, problem, warning
from flaxmodels.verify.machine import read

LOCK = Path("/tmp/libtpu_lockfile")
# PCI ids of TPUs, by Google's vendor id: their devices may also be its network cards and disks.
GOOGLE = "0x1ae0"
TPUS = {
    "0x0027": "TPU v2 or v3", "0x005e": "TPU v4", "0x0062": "TPU v5p", "0x0063": "TPU v5e", "0x006f": "TPU v6e",
    "0x0076": "TPU 7x",
}  # fmt: skip
# Files of devices that a process holds open while it uses them.
HELD = re.compile(r"/dev/(accel\d+|vfio/\d+|nvidia\d+)$|/libtpu_lockfile$")
# Of a kind of accelerator: JAX's name for it, others for the same, our extra, and the package that brings it.
KINDS: Mapping[str, tuple[str, tuple[str, ...], str, str]] = {
    "TPU": ("tpu", (), "tpu", "libtpu"),
    "NVIDIA GPU": ("gpu", ("cuda",), "cuda", "jax-cuda"),
    "AMD GPU": ("gpu", ("rocm",), "", "jax-rocm"),
}


def present(root: Path = Path("/")) -> dict[str, list[str]]:
    """Kind -> names of the accelerators that the system has, whether JAX knows of them or not."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        if read(vendor) == GOOGLE and (name := TPUS.get(read(vendor.with_name("device")))):
            found["TPU"].append(name)
    if not found["TPU"]:
        found["TPU"] = [f"/{file.relative_to(root)}" for file in sorted(root.glob("dev/accel[0-9]*"))]
    found["NVIDIA GPU"] = [f"/{file.relative_to(root)}" for file in sorted(root.glob("dev/nvidia[0-9]*"))]
    found["AMD GPU"] = ["/dev/kfd"] if (root / "dev/kfd").exists() else []
    return found


def nvidia_smi(seconds: float = 5.0) -> list[str]:
    """Names of GPUs, as the driver says; empty where there is none, or it does not answer."""
    command = shutil.which("nvidia-smi")
    words = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if command is None:
        return []
    try:
        done = subprocess.run([command, *words], capture_output=True, text=True, timeout=seconds)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


@dataclasses.dataclass(frozen=True)
class Started:
    """What JAX finds when it starts.

    Attributes:
      backend: "cpu", "gpu" or "tpu"; "" where it does not start.
      devices: their kinds.
      prng: the random number generator in use.
      said: the end of what it printed.
    """

    backend: str = ""
    devices: tuple[str, ...] = ()
    prng: str = ""
    said: str = ""


_LOOK = """
import json
from flaxmodels import hardware
hardware.quiet_libtpu()
import jax
kinds = [device.device_kind for device in jax.devices()]
print(json.dumps([jax.default_backend(), kinds, str(jax.config.jax_default_prng_impl)]))
"""


def look(seconds: float = 60.0) -> Started:
    """Start JAX in a process of its own: it may hang, or end its process."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK], env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Started(said=f"it did not come back within {seconds:g} s")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # Of an abort in C++ the first line says why, and what follows are frames.
    fatal = [line for line in lines if re.match(r"F\d{4}|.*Unknown flag", line)]
    said = " ".join(fatal[:1] or lines[-1:])[-300:]
    try:
        backend, devices, prng = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Started(said=said or f"it ended with code {done.returncode}")
    return Started(backend, tuple(devices), prng, said)


def accelerators(
    there: Mapping[str, Sequence[str]], jax: Started, environ: Mapping[str, str], installed: Mapping[str, str]
) -> list[Finding]:
    """Whether JAX uses what is there.

    Args:
      there: as `present` says.
      jax: as `look` says.
      environ: what JAX is started with.
      installed: package -> version.
    """
    what = "accelerator"
    found = [_unused(kind, names, jax, environ, installed) for kind, names in there.items() if names]
    unused = [finding for finding in found if finding is not None]
    if not jax.backend:
        asked = environ.get("JAX_PLATFORMS", "")
        fix = "unset JAX_PLATFORMS" if asked else "python -c 'import jax; jax.devices()' shows all of it"
        said = f"JAX does not start{f' with JAX_PLATFORMS={asked}' if asked else ''}: {jax.said}"
        return [problem(what, said, fix), *unused]
    kinds = ", ".join(f"{jax.devices.count(kind)} x {kind}" for kind in dict.fromkeys(jax.devices))
    used = ok(what, f"JAX uses {kinds}" + ("" if any(there.values()) else "; the machine has no accelerator"))
    rbg = "rbg" in jax.prng and "rbg" not in environ.get("JAX_DEFAULT_PRNG_IMPL", "")
    text = f"JAX makes random numbers with {jax.prng}: they are others on another mesh or version."
    return [*(unused or [used]), *([warning(what, text, "set jax_default_prng_impl to threefry2x32")] * rbg)]


def _unused(
    kind: str, names: Sequence[str], jax: Started, environ: Mapping[str, str], installed: Mapping[str, str]
) -> Finding | None:
    backend, others, extra, package = KINDS[kind]
    if jax.backend == backend:
        return None
    listed = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    text = f"{kind} is there ({listed}), and JAX {f'runs on {jax.backend}' if jax.backend else 'does not start'}"
    platforms = environ.get("JAX_PLATFORMS", "")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if platforms and not {backend, *others} & set(platforms.split(",")):
        return problem("accelerator", f"{text}: JAX_PLATFORMS={platforms} hides it.", "unset JAX_PLATFORMS")
    if kind == "NVIDIA GPU" and visible is not None and visible.strip() in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return problem("accelerator", f"{text}: CUDA_VISIBLE_DEVICES={visible!r} hides it.", fix)
    if not any(name.startswith(package) for name in installed):
        fix = f'pip install "flaxmodels-train[{extra}]"' if extra else f"install {package} for your version of ROCm"
        return problem("accelerator", f"{text}: {package} is not installed.", fix)
    said = f" JAX says: {jax.said}" if jax.said else ""
    return problem("accelerator", f"{text}.{said}", f"JAX_PLATFORMS={others[0] if others else backend} says why")


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has devices open.

    Attributes:
      pid: its number.
      command: its words.
      files: of the devices.
    """

    pid: int
    command: str
    files: tuple[str, ...]


def holders(proc: Path = Path("/proc")) -> tuple[Holder, ...]:
    """All other processes that hold an accelerator or libtpu's lock, of those that this user may look into."""
    found = []
    for process in proc.iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        files = set()
        try:
            for link in (process / "fd").iterdir():
                if HELD.search(target := str(link.readlink())):
                    files.add(target)
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended, or belongs to someone else
            continue
        if files:
            found.append(Holder(int(process.name), command, tuple(sorted(files))))
    return tuple(sorted(found, key=lambda holder: holder.pid))


def held(who: Sequence[Holder], lock: Path = LOCK) -> list[Finding]:
    """Who keeps a TPU or a GPU from this process.

    Args:
      who: as `holders` says.
      lock: the file by which libtpu keeps others out.
    """
    found = []
    for one in who:
        devices = ", ".join(one.files[:3]) + (f" and {len(one.files) - 3} more" if len(one.files) > 3 else "")
        text = f"pid {one.pid} ({_short(one.command)}) holds {devices}"
        if any("nvidia" in file for file in one.files):  # which can be shared, and has less memory for it
            found.append(warning("devices", f"{text}: its memory is missing here.", f"kill {one.pid}, if it is yours"))
        else:
            fix = f"wait for it, or kill {one.pid}, if it is yours"
            found.append(problem("devices", f"{text}: a TPU serves one process.", fix))
    if lock.exists() and not os.access(lock, os.W_OK):
        text = f"{lock} belongs to {_owner(lock)}: libtpu can't lock it, and says that the TPU is in use."
        found.append(problem("devices", text, f"sudo rm {lock}, when no process holds a TPU"))
    return found or [ok("devices", "no other process holds an accelerator")]


def huge_pages(tpu: bool, root: Path = Path("/")) -> list[Finding]:
    """What libtpu asks of the kernel."""
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    if tpu and "[always]" not in read(file):
        fix = f"sudo sh -c 'echo always > {file}'"
        return [warning("huge pages", "not always on: a TPU starts and ends much more slowly.", fix)]
    return []


def _short(command: str) -> str:
    return command if len(command) <= 60 else f"{command[:57]}..."


def _owner(file: Path) -> str:
    try:
        return file.owner()
    except (KeyError, OSError):
        return "another user"
