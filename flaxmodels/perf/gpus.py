"""GPUs that are not there: enough to compile for them, where the CUDA plugin of JAX is installed.

Nothing can be allocated or run on them. XLA asks no GPU: it takes what it has to know of one from a description, and
chooses kernels by heuristics where it would otherwise try them out.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.experimental import topologies

from flaxmodels import hardware
from flaxmodels.registry import UserError, suggest
from flaxmodels.runtime.exits import FaultError

# What NVLink joins in one node, of those that can be rented.
NODE = 8
# Without it the plugin looks for CUDA and a driver when it is loaded, and is not there where there are none.
_UNCHECKED = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


class _Gpu(NamedTuple):
    """What XLA asks of a GPU.

    `kind` is `jax.Device.device_kind`; `bandwidth` of its memory, bytes/s; `l2` bytes; `clock` GHz, boost; `shared`
    bytes of a multiprocessor, of which a block may have 1 KiB less.
    """

    kind: str
    major: int
    multiprocessors: int
    bandwidth: float
    l2: int
    clock: float
    shared: int


# Data sheets of NVIDIA, and the tables of the CUDA programming guide for each compute capability.
GPUS: Mapping[str, _Gpu] = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 2.039e12, 40 * 2**20, 1.41, 164 * 2**10),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 3.352e12, 50 * 2**20, 1.98, 228 * 2**10),
    "h200": _Gpu("NVIDIA H200", 9, 132, 4.8e12, 50 * 2**20, 1.98, 228 * 2**10),
    "b200": _Gpu("NVIDIA B200", 10, 148, 8e12, 126 * 2**20, 1.965, 228 * 2**10),
}


def prepare() -> None:
    """Let the plugin be loaded where there is no GPU; to be called before JAX starts."""
    os.environ.setdefault(_UNCHECKED, "1")


def devices(name: str) -> list[jax.Device]:
    """The GPUs of a node, or of several.

    Args:
      name: "GPU:NUMBER", such as "h100:8", or "GPU:NODESxNUMBER".

    Raises:
      UserError: there are no such GPUs, or the plugin, which has the compiler, is not installed.
    """
    gpu, shape = parse(name)
    prepare()
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_description(gpu), topology="x".join(map(str, (1, *shape)))
        )
    except (RuntimeError, NotImplementedError) as error:
        raise _refusal(name, str(error)) from error
    return list(found.devices)


def parse(name: str) -> tuple[_Gpu, tuple[int, int]]:
    """What a name stands for: (the GPU, (nodes, GPUs of each)). UserError, with what it should be, if there is none."""
    kind, _, count = name.partition(":")
    if kind not in GPUS:
        raise UserError(f"topology {name!r}: there is no GPU {kind!r}. {suggest(kind, GPUS)}")
    sides = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d*)", count)
    if not sides:
        raise UserError(
            f"topology {name!r} is not GPU:NUMBER, such as '{kind}:8', or GPU:NODESxNUMBER, such as '{kind}:2x{NODE}'."
        )
    nodes, each = int(sides[1] or 1), int(sides[2])
    if each > NODE:
        meant = f" Did you mean '{kind}:{each // NODE}x{NODE}'?" if each % NODE == 0 and not sides[1] else ""
        raise UserError(f"topology {name!r}: a node has at most {NODE} GPUs.{meant}")
    return GPUS[kind], (nodes, each)


def _description(gpu: _Gpu) -> str:
    """A `GpuTargetConfigProto` of XLA, as text; limits of launches are those of every compute capability from 8.0."""
    memory = hardware.KINDS[gpu.kind].memory
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: {gpu.multiprocessors} fpus_per_core: {64 if gpu.major == 8 else 128} clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {gpu.major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
device_description_str: "{gpu.kind}"
"""


def _refusal(name: str, reason: str) -> Exception:
    if "not found" in reason.lower() or "not implemented" in reason.lower() or "unknown" in reason.lower():
        return UserError(
            f"topology {name!r}: to compile for a GPU takes the CUDA plugin of JAX, and it is not installed. "
            "pip install 'flaxmodels-train[cuda]' brings it, on Linux; no GPU is needed."
        )
    return FaultError(f"topology {name!r}: the CUDA plugin refuses it: {reason}")
