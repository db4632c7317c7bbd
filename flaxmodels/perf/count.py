"""FLOPs and bytes of a program, counted from what was traced, before anything is compiled.

XLA's cost analysis takes the body of a loop once and a kernel of Pallas or cuDNN for nothing; here loops count as
often as they turn, and what kernels of attention do inside counts as the matrix products that they stand for.

Read `of_job`. A matrix product of (m, k) with (k, n) is 2 m k n FLOPs, a convolution 2 times its results times its
window times the channels that each sees; padding counts, as in textbooks, but not the holes of dilation. What a causal
mask hides counts, too: attention to T places costs what it would without the mask, whichever kernel computes it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr

from flaxmodels import sharding
from flaxmodels.job import Job, bad_fit
from flaxmodels.perf import traffic
from flaxmodels.perf.jaxprs import RECOMPUTED, Body, Loop, Op, Value, flatten
from flaxmodels.step import Gradient

FUSED = "fused"  # in `Count.by_op`
_MODEL = "flaxmodels.gradient"  # scope of the model and its loss, forward and backward


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program computes and moves, on all devices together.

    Attributes:
      flops: of matrix products and convolutions, a multiply-add being two, by dtype; see `chips.Chip.peak`.
      other_flops: of everything else, one for each element of a result, or of the operand of a reduction.
      bytes: read from memory and written to it, by the model of `traffic`.
      by_op: primitive -> (FLOPs, bytes); "fused" are operations element by element.
      notes: sentences on what is not certain.
    """

    flops: Mapping[str, float]
    other_flops: float
    bytes: float
    by_op: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...] = ()

    @property
    def total_flops(self) -> float:
        """Of matrix products and convolutions of all dtypes."""
        return sum(self.flops.values())


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of a job.

    Attributes:
      model: of the model and its loss, forward and backward, without what the backward pass computes again
        (`model.remat`, flash attention) and without the optimizer: what an MFU counts.
      hardware: of all that runs.
    """

    model: Count
    hardware: Count


def count(jaxpr: ClosedJaxpr) -> Count:
    """What a program computes and moves.

    A loop whose length is not in the program, such as that over the steps of a dispatch, counts as one turn. Of a
    conditional the branch that costs most counts. What each of several devices does (`shard_map`) counts for all.

    Args:
      jaxpr: of `jax.make_jaxpr`, or `traced.jaxpr` of `jax.jit(f).trace(...)`.
    """
    return _counted(flatten(jaxpr), lambda op: 1.0)


def of_job(job: Job) -> Step:
    """What one update of a job computes and moves, on all devices of its mesh; nothing is compiled or allocated.

    A dispatch of several steps counts as one.

    Raises:
      UserError: the model does not fit the data.
    """
    single = dataclasses.replace(job, cadence=dataclasses.replace(job.cadence, steps_per_dispatch=1))
    program, _ = single.update(_scoped)
    feed = single.train.abstract_dispatch(1)
    with bad_fit(), jax.set_mesh(job.mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        body = flatten(jax.make_jaxpr(program)(job.abstract, feed))
    return Step(model=_counted(body, _of_the_model), hardware=_counted(body, lambda op: 1.0))


def _scoped(gradient: Gradient) -> Gradient:
    def named(*arguments: Any) -> Any:
        with jax.named_scope(_MODEL):
            return gradient(*arguments)

    return named


# Of the products in kernels of splash attention's backward pass, those that are not computed again: of 3 (scores, their
# gradient, that of queries) the last, and of 4 (scores, gradients of values, of scores, of keys) all but the first.
# What one kernel lacks the other has: together they are the 4 of a backward pass that had kept the scores.
_ONCE = {"_dq_": 1 / 3, "_dkv_": 3 / 4}


def _of_the_model(op: Op) -> float:
    """The part of an operation that is the model's, and is not computed for the second time."""
    if _MODEL not in op.names or RECOMPUTED in op.names:
        return 0.0
    if op.name == "pallas_call" and (name := _kernel_name(op)).startswith("splash_"):
        return next((part for phase, part in _ONCE.items() if phase in name), 1.0)
    if op.name.startswith("dot_product_attention") and "_bwd" in op.name:
        return 4 / 5
    return 1.0


def _kernel_name(op: Op) -> str:
    """The name that whoever wrote a Pallas kernel gave it."""
    return str(op.params.get("name") or getattr(op.params.get("name_and_src_info"), "name", ""))


@dataclasses.dataclass
class _Tally:
    """A `Count` in the making."""

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    other: float = 0.0
    by_op: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, name: str, flops: float, moved: float) -> None:
        before = self.by_op.get(name, (0.0, 0.0))
        self.by_op[name] = (before[0] + flops, before[1] + moved)

    def absorb(self, other: "_Tally") -> None:
        for dtype, flops in other.flops.items():
            self.flops[dtype] = self.flops.get(dtype, 0.0) + flops
        self.other += other.other
        for name, (flops, moved) in other.by_op.items():
            self.add(name, flops, moved)
        self.notes |= other.notes

    @property
    def cost(self) -> tuple[float, float]:
        return sum(self.flops.values()), sum(moved for _, moved in self.by_op.values())


def _counted(body: Body, share: Callable[[Op], float]) -> Count:
    tally = _tally(body, 1, share)
    return Count(tally.flops, tally.other, tally.cost[1], tally.by_op, tuple(tally.notes))


def _tally(body: Body, times: float, share: Callable[[Op], float]) -> _Tally:
    """Of so many turns of a body; of each operation the part that `share` says."""
    tally = _Tally()
    moved = traffic.moved(body)
    for item in body.items:
        if isinstance(item, Loop):
            tally.absorb(_of_loop(item, times, share))
        elif part := share(item):
            _add_op(tally, item, times, part, moved.get(item, 0.0))
    return tally


def _of_loop(loop: Loop, times: float, share: Callable[[Op], float]) -> _Tally:
    turns = times * loop.times
    dearest = max((_tally(body, turns, share) for body in loop.bodies), key=lambda one: one.cost)
    if loop.unsure and (len(loop.bodies) == 1 or len({_tally(body, 1, share).cost for body in loop.bodies}) > 1):
        dearest.notes[loop.unsure] = None
    if any(dearest.cost):
        dearest.add(FUSED, 0.0, turns * traffic.handed_on(loop.bodies[0], loop.carried))
    return dearest


def _add_op(tally: _Tally, op: Op, times: float, part: float, moved: float) -> None:
    name = FUSED if traffic.is_fused(op) else op.name
    if products := _products(op):
        flops = times * part * sum(products.values())
        for dtype, one in products.items():
            tally.flops[dtype] = tally.flops.get(dtype, 0.0) + times * part * one
    else:
        largest = max((value.size for value in (op.inputs if traffic.is_reduction(op) else op.outputs)), default=0)
        flops = times * part * largest * (op.name not in _MOVES)
        tally.other += flops
    tally.add(name, flops, times * part * moved)
    if op.name in _OPAQUE:
        tally.notes[f"what {op.name} computes inside is not known, and not counted"] = None


_OPAQUE = ("custom_call", "ffi_call")
_MOVES = frozenset({
    "broadcast_in_dim", "transpose", "slice", "dynamic_slice", "split", "concatenate", "stack", "pad", "rev", "gather",
    "dynamic_update_slice", "scatter", "bitcast_convert_type", "convert_element_type", "iota", "sort",
})  # fmt: skip


def _products(op: Op) -> dict[str, float]:
    """FLOPs by dtype of an operation that is made of matrix products; {} of any other."""
    if op.name == "dot_general":
        return {} if traffic.is_reduction(op) else {_dtype(op): _dot(op)}
    if op.name == "conv_general_dilated":
        return {_dtype(op): _convolution(op)}
    if op.name.startswith("ragged_dot"):
        rows, kernel = op.inputs[:2]
        return {_dtype(op): 2.0 * rows.size * kernel.shape[-1]}
    if op.name.startswith("dot_product_attention"):
        return {op.inputs[0].dtype: _attention(op)}
    if op.name == "pallas_call":
        return _kernel(op)
    return {}


def _dtype(op: Op) -> str:
    """What a product is computed in: its wider operand, and how precisely where that is float32."""
    wider: Value = max(op.inputs[:2], key=lambda value: value.bytes / max(1, value.size))
    asked = str(op.params.get("precision")).lower()
    level = next((level for level in ("highest", "high") if level in asked), "")
    return f"{wider.dtype} {level}" if level and wider.dtype == "float32" else wider.dtype


def _dot(op: Op) -> float:
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2.0 * op.outputs[0].size * math.prod(op.inputs[0].shape[axis] for axis in contracted)


def _convolution(op: Op) -> float:
    """2 x (places of the window that fall on a value, summed over results) x features x channels that each sees."""
    numbers, result = op.params["dimension_numbers"], op.outputs[0].shape
    kernel = op.inputs[1].shape
    found = 2.0 * result[numbers.out_spec[0]] * result[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for i, (out, window) in enumerate(zip(numbers.out_spec[2:], numbers.rhs_spec[2:])):
        found *= _pairs(
            result[out], kernel[window], op.params["window_strides"][i], op.params["padding"][i][0],
            op.params["lhs_dilation"][i], op.params["rhs_dilation"][i],
        )  # fmt: skip
    return found


def _pairs(size: int, window: int, stride: int, before: int, holes: int, spread: int) -> int:
    """Of `size` places of a window along an axis, how often it falls on a value or padding, and not on a hole."""
    if holes == 1:
        return size * window
    return sum((i * stride + j * spread - before) % holes == 0 for i in range(size) for j in range(window))


def _attention(op: Op) -> float:
    """cuDNN's: two products forward; five backward, the scores being computed again."""
    q, k = op.inputs[0], op.inputs[1]
    keys = k.shape[2 if str(op.params.get("layout", "")).endswith("BNTH") or op.params.get("layout") == 1 else 1]
    return (5 if "_bwd" in op.name else 2) * 2.0 * q.size * keys


def _kernel(op: Op) -> dict[str, float]:
    """Of a Pallas kernel: what its author says, or else what it does at each point of its grid."""
    said = op.params.get("cost_estimate")
    if said is not None:
        return {op.outputs[0].dtype: float(said.flops)} if op.outputs else {}
    points = math.prod(side for side in op.params["grid_mapping"].grid if isinstance(side, int))
    return _tally(op.kernel, points, lambda _: 1.0).flops if op.kernel else {}
