"""Rules that say how parameters lie on a mesh: path regex -> spec, with a shape-based FSDP fallback.

Models are single-device code. Here, outside of them, a parameter's path is looked up in `RULES` (or a user's own);
what no rule names gets its largest divisible dimension sharded over `fsdp` and `sequence`. Optimizer state follows its
parameters, since its paths end in theirs. Meshes are made in `meshes`. Words as in `jax.sharding`: mesh, axis, spec.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import registry
from flaxmodels.meshes import AXES as AXES
from flaxmodels.meshes import BATCH_AXES as BATCH_AXES
from flaxmodels.meshes import automatic as automatic
from flaxmodels.meshes import describe as describe
from flaxmodels.meshes import find_devices as find_devices
from flaxmodels.meshes import make_mesh as make_mesh
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError

Rules = tuple[tuple[str, tuple[Any, ...]], ...]

# Tensor parallelism as Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053): split the first map of a pair by
# its outputs, the second by its inputs. A spec names the last dimensions; leading ones (a layer axis) stay whole. An
# axis of these rules that does not divide its dimension is left out (`padding_report`); `fsdp` comes from the fallback.
RULES: Rules = (
    (r"attention/(query|key|value)/kernel", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, None)),
    (r"mlp/(gate|up)/kernel", (None, "tensor")),
    (r"mlp/down/kernel", ("tensor", None)),
    (r"embed/embedding", ("tensor", None)),
    (r"head/kernel", (None, "tensor")),
    (r"(hidden_\d+|dense)/kernel", (None, "tensor")),
    # Factors of `lora`: what is as long as a split side of the matrix is split as that is.
    (r"attention/(query|key|value)/kernel_lora_b", (None, "tensor", None)),
    (r"attention/out/kernel_lora_a", ("tensor", None, None)),
    (r"mlp/(gate|up)/kernel_lora_b", (None, "tensor")),
    (r"mlp/down/kernel_lora_a", ("tensor", None)),
)

VOCABULARY = r"(embed/embedding|head/kernel)$"

# The fields in which models keep the sizes that these rules split.
FIELDS = (
    (r"attention/(query|out)/kernel", "heads"),
    (r"attention/(key|value)/kernel", "kv_heads"),
    (r"mlp/(gate|up|down)/kernel", "mlp_width"),
    (VOCABULARY, "vocab_size"),
    (r"head/kernel", "classes"),
)

# Logical names of activations that models mark (nn.with_logical_constraint) -> mesh axes.
ACTIVATIONS = (
    ("batch", BATCH_AXES),
    ("length", "sequence"),
    ("kv_length", None),  # each query sees all keys before it
    ("embed", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)

# Parameters, which devices along a sequence share, are sharded over these too: each would hold the same otherwise.
PARAMETER_AXES = ("fsdp", "sequence")

# Elements under which the fallback leaves a parameter whole: gathering it would cost more than holding it.
MIN_SHARDED = 1024


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


def check_program(mesh: Mesh, lowered: jax.stages.Lowered) -> None:
    """UserError for a train step that XLA would get wrong on this mesh.

    The gradient of a convolution's kernel, with inputs split along height or width over one axis, comes out multiplied
    by the devices of any other axis that splits neither: seen with jax 0.10.2 and 0.12.0, on CPU. Inputs are split so
    over `sequence`, by a mark or by a parameter's sharding that spreads; what then splits nothing is `tensor`.
    """
    if mesh.shape["sequence"] > 1 and mesh.shape["tensor"] > 1 and "stablehlo.convolution" in lowered.as_text():
        raise UserError(
            f"mesh: sequence={mesh.shape['sequence']} x tensor={mesh.shape['tensor']}: the model has convolutions, and "
            "XLA gets their gradients wrong where both are more than 1. Use data or fsdp instead of one of them."
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
    if (own := _own(path, rules)) is not None:
        return P(*_fit(own, path, shape, mesh, strict=True))
    return P(*_fallback(_fit(_built_in(path, shape), path, shape, mesh, strict=False), shape, mesh))


def _own(path: str, rules: Rules) -> tuple[Any, ...] | None:
    return next((spec for pattern, spec in rules if re.search(f"(?:{pattern})$", path)), None)


def _built_in(path: str, shape: Sequence[int]) -> tuple[Any, ...]:
    found = (spec for pattern, spec in RULES if re.search(f"(?:{pattern})$", path) and len(spec) <= len(shape))
    return next(found, ())


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
    """Shard the largest free dimension that `PARAMETER_AXES` divide, else the first of them; of equal ones the last."""
    for names in (PARAMETER_AXES, PARAMETER_AXES[:1]):
        axes = tuple(name for name in names if mesh.shape[name] > 1)
        parts = math.prod(mesh.shape[name] for name in axes)
        free = [i for i, entry in enumerate(entries) if entry is None and shape[i] % parts == 0]
        if axes and free and math.prod(shape) >= MIN_SHARDED:
            entries[max(free, key=lambda i: (shape[i], i))] = axes if len(axes) > 1 else axes[0]
            break
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
    shapes = {path_of(keys): tuple(x.shape) for keys, x in leaves}
    for pattern, _ in rules:
        if not any(re.search(f"(?:{pattern})$", path) for path in shapes):
            raise UserError(
                f"sharding.rules: {pattern!r} is found at the end of no parameter's path. "
                f"{registry.suggest(pattern, shapes)}"
            )

    def one(keys: tuple[Any, ...], x: Any) -> NamedSharding:
        parts = path_of(keys).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        path = next((end for end in ends if end in shapes), "/".join(parts))
        # A factored moment has a shape of its own, which a rule for the parameter can't fit.
        own = rules if shapes.get(path) == tuple(x.shape) else ()
        return NamedSharding(mesh, spec_of(path, x.shape, mesh, own))

    return jax.tree.map_with_path(one, tree)


def tensor_sizes(params: Any) -> tuple[int, ...]:
    """What `tensor` would split by the built-in rules, but for the vocabulary, which may stay whole.

    Args:
      params: anything with shapes and dtypes.

    Returns:
      Sizes of dimensions; none where the rules split less than half of the parameters, so that most of the work would
      be the same on each device.
    """
    sizes, split, total = set[int](), 0, 0
    for keys, x in jax.tree.leaves_with_path(params):
        path = path_of(keys)
        spec = _built_in(path, x.shape)
        if not re.search(VOCABULARY, path):
            total += _bytes(x)
            split += _bytes(x) if spec else 0
            sizes |= {size for size, axis in zip(x.shape[len(x.shape) - len(spec) :], spec) if axis}
    return tuple(sorted(sizes)) if 2 * split > total else ()


def replicated_report(params: Any, limit: int = 2**20, rules: Rules = ()) -> list[str]:
    """A line for each parameter of over `limit` bytes that is whole on every device though the mesh could split it.

    Args:
      params: `jax.ShapeDtypeStruct` (or arrays) with shardings.
      limit: bytes.
      rules: a user's own; a parameter that one of them names is whole on purpose.
    """
    lines = []
    for path, x, mesh in _large(params, limit):
        axes = [name for name in (*PARAMETER_AXES, "tensor") if mesh.shape[name] > 1]
        if not axes or not x.sharding.is_fully_replicated or _own(path, rules) is not None:
            continue
        said = " x ".join(f"{name}={mesh.shape[name]}" for name in axes)
        parts = math.prod(mesh.shape[name] for name in PARAMETER_AXES)
        largest = max(range(len(x.shape)), key=lambda i: (x.shape[i], i))
        advice = f"No dimension divides by {said}: pad dimension {largest} to {_padded(x.shape[largest], parts)}"
        lines.append(
            f"{path} {tuple(x.shape)} is replicated: {_bytes(x) / 2**20:.1f} MiB on every device. "
            + (advice if parts > 1 else f"No rule splits it over {said}: use mesh.fsdp")
            + f', or add ("{path}", spec) to sharding.rules.'
        )
    return lines


def padding_report(params: Any, limit: int = 2**20, rules: Rules = (), fields: Collection[str] = ()) -> list[str]:
    """A line for each size that a built-in rule would split but the mesh does not divide, with one that it does.

    Args:
      params: `jax.ShapeDtypeStruct` (or arrays) with shardings.
      limit: bytes of a parameter up to which it does not matter.
      rules: a user's own, which stand instead of the built-in ones.
      fields: of the model; one that is the size in question is named.
    """
    found: dict[tuple[str, int, str, int], list[str]] = {}
    for path, x, mesh in _large(params, limit):
        spec = _built_in(path, x.shape) if _own(path, rules) is None else ()
        for size, axis in zip(x.shape[len(x.shape) - len(spec) :], spec):
            if axis is not None and size % (parts := mesh.shape[axis]):
                names = (name for pattern, name in FIELDS if name in fields and re.search(f"(?:{pattern})$", path))
                key = next((f"model.{name}" for name in names), f"a dimension of {path}")
                found.setdefault((key, size, axis, parts), []).append(path)
    lines = []
    for (key, size, axis, parts), paths in found.items():
        smaller = f", or mesh.{axis}={math.gcd(size, parts)}" if math.gcd(size, parts) > 1 else ""
        better = f"{_padded(size, parts)}" if size > 128 else f"a multiple of {parts}"
        lines.append(
            f"{key}, {size}, does not divide over {axis}={parts}, where each device has all of "
            f"{', '.join(paths)}, and all its work. Use {better}{smaller}."
        )
    return lines


def _large(params: Any, limit: int) -> Iterator[tuple[str, Any, Mesh]]:
    for keys, x in jax.tree.leaves_with_path(params):
        if _bytes(x) > limit:
            yield path_of(keys), x, x.sharding.mesh


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _padded(size: int, parts: int) -> int:
    """The next multiple of `parts`; of 128 too where that is little, since matrix units of accelerators like it."""
    unit = math.lcm(parts, 128) if size > 1024 else parts
    return -(-size // unit) * unit
