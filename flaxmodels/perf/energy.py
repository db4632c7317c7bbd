"""Joules that this machine has used, where it counts them: packages of processors (RAPL), and NVIDIA's GPUs.

The counters are of whole chips: what other programs do is in them, too.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

Counter = Callable[[], float]  # joules since some time

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


def counter(platform: str) -> tuple[Counter | None, str]:
    """What counts the energy of devices.

    Args:
      platform: of the devices, as `jax.Device` has it.

    Returns:
      (() -> joules, what it counts), or (None, why it can't be read).
    """
    if platform not in ("cpu", "gpu"):
        return None, f"energy of a {platform} can't be read from here"
    return _rapl() if platform == "cpu" else _nvml()


def _rapl() -> tuple[Counter | None, str]:
    """https://docs.kernel.org/power/powercap/powercap.html: microjoules of each package, from 0 again after a range."""
    zones = [zone for zone in sorted(POWERCAP.glob("*-rapl:*")) if zone.name.count(":") == 1]
    try:  # beside packages there may be "psys", which they are part of
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        files = [(zone / "energy_uj", zone / "max_energy_range_uj") for zone in packages]
        ranges = [int(largest.read_text()) for _, largest in files]
        last = [int(now.read_text()) for now, _ in files]
    except OSError as error:
        return None, f"energy can't be read: {error.filename}: {error.strerror}"
    if not packages:
        return None, f"energy can't be read: there is no counter in {POWERCAP}"
    total = 0

    def read() -> float:
        nonlocal total
        for i, (file, _) in enumerate(files):
            now = int(file.read_text())
            total += (now - last[i]) % (ranges[i] + 1)
            last[i] = now
        return total / 1e6

    count = len(packages)
    return read, f"energy of {count} processor package{'s' * (count > 1)}, all that runs on them (RAPL)"


def _nvml() -> tuple[Counter | None, str]:
    """https://docs.nvidia.com/deploy/nvml-api: millijoules since the driver was loaded, of Volta and later."""
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return None, f"energy can't be read: {NVML} is not installed"
    number = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(number)) or not number.value:
        return None, f"energy can't be read: {NVML} finds no GPU"
    gpus = [ctypes.c_void_p() for _ in range(number.value)]

    def read() -> float:
        total = 0.0
        for i, gpu in enumerate(gpus):
            used = ctypes.c_ulonglong()
            failed = library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(gpu))
            failed = failed or library.nvmlDeviceGetTotalEnergyConsumption(gpu, ctypes.byref(used))
            if failed:
                raise OSError(f"NVML error {failed}")
            total += used.value / 1e3
        return total

    try:
        read()
    except OSError as error:
        return None, f"energy can't be read: {error}"
    return read, f"energy of {len(gpus)} GPU{'s' * (len(gpus) > 1)}, all that runs on them (NVML)"
