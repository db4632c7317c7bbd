"""Bytes that a program reads from memory and writes to it, by a model of how XLA fuses operations.

XLA's own figure takes a loop's body once, and there is none before a program is compiled. The model:

* Operations element by element, and those that only move elements (slices, broadcasts, transposes, selections,
  concatenations), are *fused*: into what takes their result, else into what gives their operand. Alone, they touch
  memory for nothing but what the group of them reads and what others take from it.
* All others are *kernels*: matrix products, convolutions, reductions, gathers, scatters, sorts, random bits. One
  reads its operands; its result is written if anything but fused operations right after it takes it.
* Kernels depend on each other: the longest chain of them before an operation is its *stage*. Fused operations of one
  stage read a value once, however many of them take it; a kernel each time, but reductions of one stage share, too.
* What a fused operation gives is written for a later stage, or for a kernel, unless what it was made from is no more
  to read, but for an eighth: then it is computed again (an activation, a softmax from its rows' maxima and sums).
* Rows that are written into an array that is in memory (`x.at[i].set`, caches, stacked results) cost the rows.
* A loop reads and writes in each turn what its body does; what it hands on unchanged costs nothing.

So it is near the least that a compiler could do; caches larger than the arrays, as CPUs have, need less still.
"""

import dataclasses

from flaxmodels.perf.jaxprs import Body, Loop, Op, Value

# Kernels by name. Whatever else has operands larger than its results, or results larger than its operands, is one, too.
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
_REDUCTIONS = ("reduce_", "arg", "cum", "reduce")
_ROWS = frozenset({"dynamic_update_slice", "scatter"})
_PARTS = frozenset({"slice", "dynamic_slice", "split"})
_OTHERS = frozenset({
    "gather", "sort", "top_k", "random_bits", "threefry2x32", "rng_bit_generator", "fft", "cholesky", "pallas_call",
    "triangular_solve", "lu", "eigh", "qr", "svd", "householder_product", "custom_call", "ffi_call",
    "select_and_scatter", "select_and_scatter_add", "select_and_gather_add", "psum", "psum2", "psum_invariant",
    "all_gather", "all_gather_invariant", "all_to_all", "ppermute", "reduce_scatter", "psum_scatter", "pmax", "pmin",
})  # fmt: skip


# So much more than a value itself may what it is made of be, to compute it again.
_MORE = 9 / 8


def is_reduction(op: Op) -> bool:
    """Whether an operation adds up, or finds the largest of, elements of its operand: an inner product, too."""
    if op.name == "dot_general":
        return sum(len(axes) for axes, _ in op.params["dimension_numbers"]) == op.inputs[0].ndim == op.inputs[1].ndim
    return op.name.startswith(_REDUCTIONS) and op.name not in _OTHERS and op.name != "reduce_precision"


def is_fused(op: Op) -> bool:
    """Whether an operation goes element by element, or only moves elements."""
    rows = op.name in _ROWS or op.name.startswith("scatter")
    return not (op.name in _PRODUCTS or op.name in _OTHERS or rows or is_reduction(op) or op.kernel)


@dataclasses.dataclass
class _State:
    """Of one value.

    Attributes:
      stage: kernels before it, one after the other.
      made_of: what it is computed from when it is needed -> bytes to read; None for what is in memory.
      by: that gives it; None for what was there before.
      fresh: a kernel's, which nothing has asked to be written.
    """

    stage: int = 0
    made_of: dict[Value, int] | None = None
    by: Op | None = None
    fresh: bool = False


def moved(body: Body) -> dict[Op, float]:
    """Bytes that one turn of a body reads and writes, by operation; what is inside of its loops left out."""
    return {op: size for op, size in _Traffic(body).bytes.items() if op is not None}


class _Traffic:
    """Goes through a body in order, and decides for each value whether it is written."""

    def __init__(self, body: Body) -> None:
        self.bytes: dict[Op | None, float] = {}  # None: of what was there before
        self._states: dict[Value, _State] = {value.memory: _State() for value in body.inputs}
        self._read: dict[tuple[int, Value], int] = {}
        for item in body.items:
            if isinstance(item, Loop):
                self._loop(item)
            elif is_fused(item):
                self._fuse(item)
            else:
                self._run(item)
        for value in body.outputs:
            self._write(value)

    def _of(self, value: Value) -> _State:
        return self._states.setdefault(value.memory, _State(made_of={}))  # a literal, or what is made of nothing

    def _add(self, op: Op | None, size: float) -> None:
        self.bytes[op] = self.bytes.get(op, 0) + size

    def _sources(self, value: Value, stage: int) -> dict[Value, int]:
        """What an operation of this stage reads for a value."""
        state = self._of(value)
        if state.made_of is not None and state.stage < stage and sum(state.made_of.values()) > _MORE * value.bytes:
            self._write(value)
        return {value.memory: value.bytes} if state.made_of is None else state.made_of

    def _write(self, value: Value) -> None:
        """See that a value is in memory."""
        state = self._of(value)
        if state.made_of is not None:
            made_of, state.made_of = state.made_of, None
            for source, size in made_of.items():
                self._fused_read(state.by, source, size, state.stage)
            self._add(state.by, value.bytes)
        elif state.fresh:
            state.fresh = False
            self._add(state.by, value.bytes)

    def _fused_read(self, op: Op | None, source: Value, size: int, stage: int) -> None:
        """By operations of one stage, together; for nothing what a kernel right before gives them."""
        state = self._of(source)
        if state.by is not None and state.stage == stage and not is_fused(state.by):
            return
        self._write(source)
        before = self._read.get((stage, source), 0)
        if size > before:
            self._read[stage, source] = size
            self._add(op, size - before)

    def _fuse(self, op: Op) -> None:
        stage = max((self._of(value).stage for value in op.inputs), default=0)
        made_of: dict[Value, int] = {}
        for value in op.inputs:
            for source, size in self._sources(value, stage).items():
                made_of[source] = max(size, made_of.get(source, 0))
        for output in op.outputs:
            share = min(1.0, output.bytes / max(1, op.inputs[0].bytes)) if op.name in _PARTS else 1.0
            sizes = {source: int(size * share) for source, size in made_of.items()}
            self._states[output] = _State(stage, sizes, op)

    def _run(self, op: Op) -> None:
        stage = max((self._of(value).stage for value in op.inputs), default=0)
        rows = op.name == "dynamic_update_slice" or op.name.startswith("scatter")
        written = 0
        for i, value in enumerate(op.inputs):
            if rows and i == 0:
                written = self._update(op, value)
            elif op.name == "gather" and i == 0:
                self._write(value)
                self._add(op, op.outputs[0].bytes)
            else:
                self._operand(op, value, stage)
        for output in op.outputs:
            self._states[output] = _State(stage + 1, None, op, fresh=not rows)
        self._add(op, written)

    def _operand(self, op: Op, value: Value, stage: int) -> None:
        sources = self._sources(value, stage)
        if not is_reduction(op) and sum(sources.values()) > _MORE * value.bytes:
            self._write(value)
            sources = {value.memory: value.bytes}
        for source, size in sources.items():
            self._write(source)
            if not is_reduction(op):
                self._add(op, size)
            elif size > (before := self._read.get((stage, source), 0)):
                self._read[stage, source] = size
                self._add(op, size - before)

    def _update(self, op: Op, value: Value) -> int:
        """Bytes to write rows into a value, once that is there; to add to them, they are read first."""
        self._write(value)
        scatters = op.name.startswith("scatter")
        update = op.inputs[2 if scatters else 1].bytes
        return update * (2 if scatters and op.name != "scatter" else 1)

    def _loop(self, loop: Loop) -> None:
        stage = max((self._of(value).stage for value in loop.inputs), default=0)
        for value in loop.inputs:
            if value.shape:
                self._write(value)
        self._states.update((output, _State(stage + 1)) for output in loop.outputs)


def handed_on(body: Body, carried: dict[int, int]) -> float:
    """Bytes that one turn of a loop copies only to keep them: what it stacks without having computed it.

    Args:
      body: of the loop.
      carried: as in `jaxprs.Loop`.
    """
    stacked = [value for i, value in enumerate(body.outputs) if i not in carried]
    inputs = {value.memory for value in body.inputs}
    return 2.0 * sum(value.bytes for value in stacked if value.memory in inputs)
