"""One mesh, and rules that say how parameters lie on it: path regex -> spec, with a shape-based FSDP fallback.

Models are single-device code. Here, outside of them, a parameter's path is looked up in `RULES` (or a user's own);
what no rule names gets its largest divisible dimension sharded over `fsdp`. Optimizer state follows its parameters,
since its paths end in theirs. Words as in `jax.sharding`: mesh, axis, spec.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import registry
from flaxmodels.registry import Positive, UserError

AXES = ("data", "fsdp", "tensor")
# A batch is split over both: FSDP is data parallelism whose parameters are sharded too.
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, tuple[Any, ...]], ...]

# Tensor parallelism as Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053): split the first map of a pair by
# its outputs, the second by its inputs. A spec names the last dimensions; leading ones (a layer axis) stay whole. An
# axis of these rules that does not divide its dimension is left out; `fsdp` comes from the fallback.
RULES: Rules = (
    (r"attention/(query|key|value)/kernel", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, None)),
    (r"mlp/(gate|up)/kernel", (None, "tensor")),
    (r"mlp/down/kernel", ("tensor", None)),
    (r"embed/embedding", ("tensor", None)),
    (r"head/kernel", (None, "tensor")),
    (r"(hidden_\d+|dense)/kernel", (None, "tensor")),
)

# Logical names of activations that models mark (nn.with_logical_constraint) -> mesh axes.
ACTIVATIONS = (
    ("batch", BATCH_AXES),
    ("length", None),
    ("embed", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)

# Elements under which the fallback leaves a parameter whole: gathering it would cost more than holding it.
MIN_SHARDED = 1024


def make_mesh(
    data: Positive | None = None,
    fsdp: Positive = 1,
    tensor: Positive = 1,
    platform: Literal["cpu", "gpu", "tpu"] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices with axes `data`, `fsdp`, `tensor`.

    Args:
      data: devices along the data axis; None takes what the other two leave.
      fsdp: devices over which parameters, gradients and optimizer state are sharded.
      tensor: devices over which heads, MLP and vocabulary are split.
      platform: what kind of device to use; None takes the best there is.
      devices: default all that JAX finds.

    Raises:
      UserError: there is no such device, or the axes don't multiply to the number of devices.
    """
    devices = list(find_devices(platform) if devices is None else devices)
    inner = fsdp * tensor
    data = max(len(devices) // inner, 1) if data is None else data
    if data * inner != len(devices):
        raise UserError(
            f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} is {data * inner} devices, but there are "
            f"{len(devices)}. Leave mesh.data out and choose fsdp x tensor to divide {len(devices)}."
        )
    grid = jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(grid.devices, AXES)  # Linen does not work with the explicit axes that are make_mesh's default


def find_devices(platform: str | None = None) -> list[jax.Device]:
    """All devices of a kind; None: of the best kind there is. UserError if there are none."""
    try:
        return jax.devices(platform)
    except (RuntimeError, AssertionError) as error:  # the second, bare, where the CUDA plugin is not installed
        asked = [f"mesh.platform={platform!r}"] if platform else []
        asked += [f"JAX_PLATFORMS={name!r}"] if (name := os.environ.get("JAX_PLATFORMS")) else []
        reason = (str(error).strip() or "its plugin is not installed").splitlines()[0]
        raise UserError(
            f"{', '.join(asked) or 'JAX'}: there is no such device ({reason}).\n"
            "Install flaxmodels-train[cuda] or [tpu] for the device, or leave both out to use what is there."
        ) from error


def describe(mesh: Mesh) -> str:
    """The mesh in a line: "8 x cpu: data=4, fsdp=2"."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}: {axes}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, lead: int = 0) -> NamedSharding:
    """Examples split over `BATCH_AXES`, after `lead` whole dimensions (steps of one dispatch)."""
    return NamedSharding(mesh, P(*(None,) * lead, BATCH_AXES))


def check_batch(mesh: Mesh, batch_size: int, where: str = "data.batch_size") -> None:
    """UserError unless the mesh divides `batch_size`; it names the nearest sizes that would do."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"{where}={batch_size} does not divide over the {parts} devices of {describe(mesh)}: use {near}."
        )


def check_rules(rules: Sequence[Any]) -> Rules:
    """A config's rules, ((regex, spec), ...), checked: regexes compile, axes exist (UserError)."""
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], tuple)):
            raise UserError(
                f'sharding.rules: {rule!r} is no rule: expected (regex, spec), such as ("up/kernel", ("fsdp", None)).'
            )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise UserError(f"sharding.rules: {rule[0]!r} is not a regular expression: {error}.") from error
        names = _names(rule[1])
        for axis in names:
            if axis not in AXES:
                raise UserError(f"sharding.rules: {rule[0]!r} names axis {axis!r}. {registry.suggest(axis, AXES)}")
            if names.count(axis) > 1:
                raise UserError(f"sharding.rules: {rule[0]!r} names axis {axis!r} twice: a spec can use each once.")
    return tuple(rules)


def _names(spec: Sequence[Any]) -> list[str]:
    return [name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))]


def spec_of(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules = ()) -> P:
    """How an array of `shape` at `path` lies on `mesh`.

    Args:
      path: such as "blocks/mlp/up/kernel"; a rule's regex must be found at its end.
      shape: of the array.
      mesh: the mesh.
      rules: a user's own, tried before `RULES`; these must fit, axis by axis.

    Raises:
      UserError: one of `rules` names an axis that does not divide its dimension, or more dimensions than there are.
    """
    own = next((spec for pattern, spec in rules if re.search(f"(?:{pattern})$", path)), None)
    if own is not None:
        return P(*_fit(own, path, shape, mesh, strict=True))
    spec = next((spec for pattern, spec in RULES if re.search(f"(?:{pattern})$", path) and len(spec) <= len(shape)), ())
    return P(*_fallback(_fit(spec, path, shape, mesh, strict=False), shape, mesh))


def _fit(spec: Sequence[Any], path: str, shape: Sequence[int], mesh: Mesh, *, strict: bool) -> list[Any]:
    if len(spec) > len(shape):
        raise UserError(
            f"sharding.rules: {path!r} has shape {tuple(shape)}, fewer dimensions than its spec {tuple(spec)}."
        )
    entries: list[Any] = [None] * (len(shape) - len(spec)) + list(spec)
    for i, entry in enumerate(entries):
        parts = math.prod(mesh.shape[name] for name in _names([entry]))
        if shape[i] % parts and strict:
            raise UserError(
                f"sharding.rules: dimension {i} of {path!r} is {shape[i]}, which {entry!r}={parts} does not divide."
            )
        entries[i] = entry if parts > 1 and shape[i] % parts == 0 else None
    return entries


def _fallback(entries: list[Any], shape: Sequence[int], mesh: Mesh) -> list[Any]:
    """Shard the largest free dimension that `fsdp` divides; of equal ones the last."""
    size = mesh.shape["fsdp"]
    free = [i for i, entry in enumerate(entries) if entry is None and shape[i] % size == 0]
    if size > 1 and free and math.prod(shape) >= MIN_SHARDED:
        entries[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return entries


def shard_tree(tree: Any, mesh: Mesh, rules: Rules = (), params: Any = None) -> Any:
    """A `NamedSharding` for each leaf (anything with a shape) of a pytree, from its path.

    Args:
      tree: parameters, or a whole train state.
      mesh: the mesh.
      rules: a user's own; their regexes see paths of parameters, such as "blocks/mlp/up/kernel".
      params: the parameters in `tree`; None: `tree` itself. A leaf whose path ends in the path of a parameter of the
        same shape (a moment, an average) lies as that parameter does.

    Raises:
      UserError: one of `rules` does not fit, or matches nothing.
    """
    leaves = jax.tree.leaves_with_path(tree if params is None else params)
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(x.shape) for keys, x in leaves}
    for pattern, _ in rules:
        if not any(re.search(f"(?:{pattern})$", path) for path in shapes):
            raise UserError(
                f"sharding.rules: {pattern!r} is found at the end of no parameter's path. "
                f"{registry.suggest(pattern, shapes)}"
            )

    def one(keys: tuple[Any, ...], x: Any) -> NamedSharding:
        parts = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        path = next((end for end in ends if end in shapes), "/".join(parts))
        # A factored moment has a shape of its own, which a rule for the parameter can't fit.
        own = rules if shapes.get(path) == tuple(x.shape) else ()
        return NamedSharding(mesh, spec_of(path, x.shape, mesh, own))

    return jax.tree.map_with_path(one, tree)


def replicated_report(params: Any, limit: int = 2**20) -> list[str]:
    """A line for each parameter of over `limit` bytes that is whole on every device though the mesh could split it.

    Args:
      params: `jax.ShapeDtypeStruct` (or arrays) with shardings.
      limit: bytes.
    """
    lines = []
    for keys, x in jax.tree.leaves_with_path(params):
        size, mesh = math.prod(x.shape) * np.dtype(x.dtype).itemsize, x.sharding.mesh
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and size > limit and x.sharding.is_fully_replicated:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            lines.append(
                f"{path} {tuple(x.shape)} is replicated: {size / 2**20:.1f} MiB on every device. No dimension divides "
                f'by fsdp={mesh.shape["fsdp"]}: pad one, or add ("{path}", spec) to sharding.rules.'
            )
    return lines
