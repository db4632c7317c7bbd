"""Kernels of attention beside XLA's own, and which one is best where.

Queries are (B, T, N, H), keys and values (B, T, K, H), where K divides N: key head `k` serves the queries' heads
`k * N/K` to `(k + 1) * N/K - 1`. Letters: B batch, T length, N heads, K heads of keys and values, H size of a head.
Segments are (B, T) of an integer dtype: a query sees keys of its own segment, up to its own place.

`pick` chooses, and `run` runs what it chose. `splash` and `ring` run on each device's part of the arrays, by
`jax.shard_map` over the mesh that is set (`jax.set_mesh`): examples over `data` and `fsdp`, heads over `tensor`, places
over `sequence`. Without a mesh they run as they are.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels.masked import attend, visible
from flaxmodels.masked import cached as cached
from flaxmodels.masked import store as store
from flaxmodels.ring import travelling

BATCH, LENGTH, HEADS = ("data", "fsdp"), "sequence", "tensor"

# With `sequence`, keys and values can be gathered, or go round the ring while each device computes on those it has:
# T/S x N/K multiply-adds for each of their numbers, hence as many operations for each byte in bfloat16. Accelerators
# do 2,000 to 5,000 operations in the time in which a byte comes from a neighbour. Above that the ring hides its
# transfers and saves the memory of the whole; below, it waits S - 1 times for what a gather brings at once.
RING_FROM = 4096
BLOCK = 512  # places of a tile of `splash`: its scores in float32 are 1 MiB


@dataclasses.dataclass(frozen=True)
class Case:
    """What there is to compute, and where.

    Attributes:
      shape: (B, T, N, H) of the queries, over all devices.
      kv_heads: K.
      dtype: its name.
      packed: whether there are segments.
      platform: "cpu", "gpu" or "tpu".
      axes: sizes of the mesh's axes; {} without a mesh.
      causal: whether a query sees no keys after itself.
      window: how many of them it sees, itself among them; 0 for all.
      softcap: of scores; 0 for none.
      prefix: whether some keys are seen from places before them.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    dtype: str
    packed: bool
    platform: str
    axes: Mapping[str, int]
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    prefix: bool = False


def place(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, dict[str, int]]:
    """(platform, sizes of the axes) of a mesh; None: of the one that is set, or else JAX's default and no axes.

    An axis of a `jax.shard_map` around all this is left out: arrays are parts already.
    """
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    kinds = zip(abstract.axis_names, abstract.axis_sizes, abstract.axis_types, strict=True)
    axes = {name: size for name, size, kind in kinds if kind != AxisType.Manual}
    device = abstract.abstract_device
    return (device.platform if device else jax.default_backend()), axes


def pick(asked: str, case: Case) -> tuple[str, str]:
    """The kernel to use, and a line for the log that says why.

    Args:
      asked: "auto", "xla", "cudnn", "splash" or "ring".
      case: what there is to compute.

    Raises:
      ValueError: the kernel that was asked for can't compute this.
    """
    _, T, N, H = case.shape
    parts = case.axes.get(LENGTH, 1)
    where = f"{case.platform.upper()}, length {T}, head size {H}" + f", sequence={parts}" * (parts > 1)
    if asked != "auto":
        if obstacle := _OBSTACLES[asked](case):
            raise ValueError(f'attention="{asked}" {obstacle}. Use attention="auto" or attention="xla".')
        return asked, f"attention: {asked} ({where})"
    wanted = ["ring"] if parts > 1 and T // parts * (N // case.kv_heads) >= RING_FROM else []
    wanted += [name for name, platform in (("cudnn", "gpu"), ("splash", "tpu")) if platform == case.platform]
    reasons = []
    for name in wanted:
        if not (obstacle := _OBSTACLES[name](case)):
            return name, f"attention: {name} ({where})"
        reasons.append(f"; {name} {obstacle}")
    return "xla", f"attention: xla ({where}){''.join(reasons)}"


def run(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
) -> jax.Array:
    """Attention by a kernel that `pick` picked for such a case.

    Args:
      kernel: its name.
      q: (B, T, N, H).
      k: (B, T, K, H) of the same dtype.
      v: as `k`.
      causal: as in `masked.visible`, like `window`, `segments` and `prefix`.
      window: of keys that a query sees, itself among them; 0 for all.
      softcap: of scores, as in `masked.attend`.
      scale: of scores; None: H**-0.5.
      segments: (B, T) int, or None.
      prefix: (B, T) int or bool, or None.

    Returns:
      (B, T, N, H) in the dtype of `q`.
    """
    if kernel == "ring":
        return ring(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v, segments=segments)
    if kernel == "splash":
        return splash(q, k, v, segments=segments, causal=causal, window=window, softcap=softcap, scale=scale)
    if softcap:
        seen = visible(q.shape[1], causal=causal, window=window, segments=segments, prefix=prefix)
        return attend(q, k, v, seen, scale=scale, softcap=softcap)
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None]
    if prefix is not None or (window and segments is not None):  # a mask of our own, and no other
        mask = visible(q.shape[1], causal=causal, window=window, segments=segments, prefix=prefix)[:, None]
        causal, window = False, 0
    plain = functools.partial(jax.nn.dot_product_attention, implementation=kernel)
    local = (window - 1, 0) if window else None
    out: jax.Array = plain(q, k, v, mask=mask, is_causal=causal, scale=scale, local_window_size=local)
    return out


def _cudnn_obstacle(case: Case) -> str:
    capability = _capability()
    _, T, _, H = case.shape
    if case.platform != "gpu" or case.dtype not in ("bfloat16", "float16") or (capability and capability < (8, 0)):
        kind = f" {capability[0]}.{capability[1]}" if case.platform == "gpu" and capability else ""
        return (
            f'needs an Nvidia GPU of compute capability 8.0 or later and dtype="bfloat16"; '
            f"here are {case.platform}{kind} and {case.dtype}"
        )
    if case.softcap:
        return "can't cap scores, and the model has a softcap"
    largest = 256 if capability and capability >= (9, 0) else 128
    if H not in range(8, largest + 1, 8):
        return f"needs a head size that is a multiple of 8 up to {largest}, and it is {H}"
    if (case.packed or case.prefix) and T % 2:
        return f"needs an even length for packed rows or a prefix, and it is {T}"
    if case.axes.get(LENGTH, 1) > 1:
        return f"can't split the length, and the mesh has {LENGTH}={case.axes[LENGTH]}"
    return _split_obstacle(case) or _indivisible("kv_heads", case.kv_heads, HEADS, case.axes)


def _capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU: None where it has none, or none of Nvidia's."""
    if jax.default_backend() != "gpu":
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _splash_obstacle(case: Case) -> str:
    if case.platform != "tpu":
        return f"needs a TPU, and here is {case.platform}"
    if case.prefix:
        return "has no mask for a prefix that all see"
    return _split_obstacle(case) or _length_obstacle(case.shape[1], case.axes)


def _length_obstacle(length: int, axes: Mapping[str, int]) -> str:
    parts = axes.get(LENGTH, 1)
    return f"needs a length that is a multiple of {128 * parts}, and it is {length}" if length % (128 * parts) else ""


def _ring_obstacle(case: Case) -> str:
    asked = {
        "a prefix": case.prefix,
        "a window": case.window,
        "a softcap": case.softcap,
        "no causal mask": not case.causal,
    }
    if found := [name for name, value in asked.items() if value]:
        return f"is for plain causal attention, and here is {' and '.join(found)}"
    return _split_obstacle(case)


def _split_obstacle(case: Case) -> str:
    """What the mesh does not divide."""
    B, T, N, _ = case.shape
    found = (
        _indivisible(name, size, axis, case.axes)
        for name, size, axis in (("batch", B, BATCH), ("length", T, LENGTH), ("heads", N, HEADS))
    )
    return next(filter(None, found), "")


def _indivisible(name: str, size: int, axis: str | tuple[str, ...], axes: Mapping[str, int]) -> str:
    names = [axis] if isinstance(axis, str) else list(axis)
    parts = math.prod(axes.get(name, 1) for name in names)
    return f"needs {' x '.join(names)} = {parts} to divide {name} = {size}" if size % parts else ""


_OBSTACLES: Mapping[str, Callable[[Case], str]] = {
    "xla": lambda case: "",
    "cudnn": _cudnn_obstacle,
    "splash": _splash_obstacle,
    "ring": _ring_obstacle,
}


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention on TPU, which skips what the mask hides; with `sequence`, keys and values are gathered.

    Args:
      q: (B, T, N, H), T a multiple of 128 on each device.
      k: (B, T, K, H) of the same dtype.
      v: as `k`.
      segments: (B, T) int, or None.
      causal: as in `run`, like `window`, `softcap` and `scale`.
      window: of keys that a query sees; tiles of keys before it are skipped.
      softcap: of scores.
      scale: of scores.
      interpret: run on any platform, slowly, as tests do.

    Returns:
      (B, T, N, H) in the dtype of `q`.

    Raises:
      ValueError: the mesh does not divide the batch, the heads or the length.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # slow to import, and for TPUs

    axes, k, v = _prepare("splash", q, k, v)
    (_, T, N, H), parts = q.shape, axes.get(LENGTH, 1)
    if obstacle := _length_obstacle(T, axes):
        raise ValueError(f"splash {obstacle}.")
    block = math.gcd(T // parts, BLOCK)
    sizes = pallas.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    heads = N // axes.get(HEADS, 1)
    mask: Any = pallas.CausalMask((T, T)) if causal else pallas.FullMask((T, T))
    if window:
        mask = pallas.LocalMask((T, T), (window - 1, 0), 0)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None, interpret=interpret,
    )  # fmt: skip

    def local(kernel: Any, q: Any, k: Any, v: Any, own: Any, every: Any) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q * (H**-0.5 if scale is None else scale), k, v))
        ids = None if own is None else pallas.SegmentIds(own, every)
        return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)

    if not axes:
        return local(kernel, q, k, v, segments, segments)
    batch, length, head = _specs(axes)
    masks = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(None, length)))
    whole = P(batch, None, head, None)
    places = (masks, P(batch, length, head, None), whole, whole, P(batch, length), P(batch, None))
    return _mapped(local, axes, places)(kernel, q, k, v, segments, segments)


def ring(q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None = None) -> jax.Array:
    """Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel from device to device of `sequence`.

    No device ever holds those of the whole length, nor more than (T / sequence) x 512 scores a head. Softmax is
    summed as it comes, in float32. The backward pass goes round the ring again, and the keys' gradients with it.

    Args:
      q: (B, T, N, H).
      k: (B, T, K, H) of the same dtype.
      v: as `k`.
      segments: (B, T) int, or None.

    Returns:
      (B, T, N, H) in the dtype of `q`.

    Raises:
      ValueError: the mesh does not divide the batch, the heads or the length.
    """
    axes, k, v = _prepare("ring", q, k, v)
    parts = axes.get(LENGTH, 1)
    local = functools.partial(travelling, LENGTH, parts)
    if not axes:
        return local(q, k, v, segments)
    batch, length, head = _specs(axes)
    array = P(batch, length, head, None)
    places = (array, array, array, P(batch, length))
    return _mapped(local, axes, places)(q, k, v, segments)


def _prepare(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[dict[str, int], jax.Array, jax.Array]:
    """The axes that split arrays; keys and values, repeated where `tensor` does not divide their heads."""
    (B, T, N, H), K, (platform, axes) = q.shape, k.shape[2], place()
    if k.shape != (B, T, K, H) or v.shape != k.shape or N % K:
        raise ValueError(
            f"{name}: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: expected (B, T, N, H), and (B, T, K, H) for "
            "both others, K a divisor of N."
        )
    if obstacle := _split_obstacle(Case((B, T, N, H), K, q.dtype.name, False, platform, axes)):
        raise ValueError(f"{name} {obstacle}.")
    repeats = math.lcm(K, axes.get(HEADS, 1)) // K
    k, v = ((jnp.repeat(x, repeats, axis=2) if repeats > 1 else x) for x in (k, v))
    return axes, k, v


def _specs(axes: Mapping[str, int]) -> tuple[tuple[str, ...] | None, str | None, str | None]:
    """What batch, length and heads lie on."""
    batch = tuple(name for name in BATCH if name in axes)
    return batch or None, LENGTH if LENGTH in axes else None, HEADS if HEADS in axes else None


def _mapped(local: Callable[..., jax.Array], axes: Mapping[str, int], places: tuple[Any, ...]) -> Callable[..., Any]:
    """`local` on each device's part; the result lies as the queries do, which are (B, T, N, H) in any case."""
    batch, length, head = _specs(axes)
    out = P(batch, length, head, None)
    return jax.shard_map(local, in_specs=places, out_specs=out, axis_names=set(axes), check_vma=False)
