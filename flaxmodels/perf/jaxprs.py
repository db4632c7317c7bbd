"""A traced program as a tree of operations and loops: calls are inlined, and loops say how often they turn.

JAX nests a program in many ways: `jit`, `checkpoint`, derivatives of the user's own. Read `flatten`: what remains are
bodies, in which every operation runs equally often.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

# What JAX calls, in the names of operations, that a backward pass computes again (`jax.checkpoint`).
RECOMPUTED = "rematted_computation"
# What gives what it is given, in the same bytes.
_SAME = frozenset({
    "reshape", "squeeze", "expand_dims", "copy", "copy_p", "sharding_constraint", "stop_gradient",
    "optimization_barrier", "name", "pvary", "pcast", "reshard", "layout_constraint", "random_wrap", "random_unwrap",
})  # fmt: skip
# Their computation is a parameter, and no call.
_HIGHER_ORDER = frozenset({"reduce", "reduce_window", "scatter", "sort", "select_and_scatter", "pallas_call"})


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What an operation gives or takes.

    Attributes:
      shape: of the array.
      dtype: its name.
      bytes: of the array.
      least, most: bounds of integers that the program knows, of all elements, for the lengths of loops; else None.
      seen: what this is another view of: the same bytes, perhaps in another shape.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    least: int | None = None
    most: int | None = None
    seen: "Value | None" = None

    @property
    def memory(self) -> "Value":
        """What has the bytes: itself, or what this is a view of."""
        return self.seen or self

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
      name: of its primitive.
      params: of the primitive.
      inputs: literals among them, too.
      outputs: as the primitive gives them.
      names: of the scopes that it was traced in.
      kernel: of a Pallas kernel, what it does on each point of its grid.
    """

    name: str
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    names: str
    kernel: "Body | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """Operations that run equally often, in order."""

    inputs: tuple[Value, ...]
    items: "tuple[Op | Loop, ...]"
    outputs: tuple[Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """Bodies that run another number of times than what is around them.

    Attributes:
      bodies: of which one runs: two or more are the branches of a conditional.
      times: how often; once for each device, where each computes on its own part.
      inputs: from around; one for each input of a body, a stack where the body gets a slice.
      outputs: to what is around, one for each output of a body.
      carried: position of an output of a body -> that of the input which it is the next time.
      unsure: what about `times` is not certain, or "".
    """

    bodies: tuple[Body, ...]
    times: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    carried: dict[int, int]
    unsure: str = ""


def flatten(closed: ClosedJaxpr) -> Body:
    """The tree of a program, without what its results don't depend on."""
    jaxpr = _jaxpr(closed)
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _body(jaxpr, [_value(var.aval) for var in jaxpr.invars], "")


def _value(aval: Any) -> Value:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    if hasattr(aval, "inner_aval"):  # a reference, in a kernel
        return _value(aval.inner_aval)
    return Value(tuple(shape), getattr(dtype, "name", str(dtype)), math.prod(shape) * getattr(dtype, "itemsize", 0))


def _view(value: Value, aval: Any) -> Value:
    return dataclasses.replace(_value(aval), least=value.least, most=value.most, seen=value.memory)


def _literal(literal: Any) -> Value:
    value = dataclasses.replace(_value(literal.aval), bytes=0)
    if not value.size or not np.issubdtype(np.asarray(literal.val).dtype, np.integer):
        return value
    return dataclasses.replace(value, least=int(np.min(literal.val)), most=int(np.max(literal.val)))


def _body(jaxpr: Jaxpr, inputs: Sequence[Value], names: str) -> Body:
    known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    items = tuple(_items(jaxpr, known, names))
    return Body(tuple(inputs), items, tuple(_read(known, var) for var in jaxpr.outvars))


def _read(known: dict[Any, Value], atom: Any) -> Value:
    return _literal(atom) if isinstance(atom, Literal) else known[atom]


def _items(jaxpr: Jaxpr, known: dict[Any, Value], above: str) -> Iterator[Op | Loop]:
    """Of a jaxpr whose inputs are `known`, where all that it computes is put, too."""
    known.update((var, _value(var.aval)) for var in jaxpr.constvars)
    for eqn in jaxpr.eqns:
        name, names = eqn.primitive.name, f"{above}/{eqn.source_info.name_stack}"
        inputs = tuple(_read(known, atom) for atom in eqn.invars)
        called = None if name in _HIGHER_ORDER else _called(eqn)
        if name in _SAME:
            outputs = tuple(_view(value, var.aval) for value, var in zip(inputs, eqn.outvars))
        elif called is not None:
            inner = dict(zip(called.invars, inputs, strict=True))
            yield from _items(called, inner, names)
            outputs = tuple(_read(inner, var) for var in called.outvars)
        else:
            item = _LOOPS[name](eqn, inputs, names) if name in _LOOPS else _op(eqn, inputs, names)
            yield item
            outputs = item.outputs
        known.update(zip(eqn.outvars, outputs))


def _op(eqn: JaxprEqn, inputs: tuple[Value, ...], names: str) -> Op:
    name, kernel = eqn.primitive.name, None
    if name == "pallas_call":
        jaxpr = eqn.params["jaxpr"]
        kernel = _body(jaxpr, [_value(var.aval) for var in jaxpr.invars], names)
    outputs = tuple(_bounded(_value(var.aval), _cases(name, inputs)) for var in eqn.outvars)
    return Op(name, eqn.params, inputs, outputs, names, kernel)


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    """What a call calls."""
    if eqn.primitive.name in _LOOPS:
        return None
    found = [_jaxpr(value) for value in eqn.params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    same = [x for x in found if len(x.invars) == len(eqn.invars) and len(x.outvars) == len(eqn.outvars)]
    return same[0] if same else None


def _jaxpr(value: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """Versions of JAX differ in which of the two they keep where."""
    return value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _cases(name: str, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """Where the elements of a result come from, if they are among those of its operands."""
    if name in ("select_n", "min", "max", "concatenate"):
        return inputs[name == "select_n" :]
    moved = ("convert_element_type", "broadcast_in_dim", "slice", "dynamic_slice", "transpose")
    return inputs[:1] if name in moved else ()


def _bounded(value: Value, cases: Sequence[Value]) -> Value:
    """With the bounds of the values that it is made of, where they are all known."""
    least, most = ([bound for x in cases if (bound := getattr(x, end)) is not None] for end in ("least", "most"))
    if not cases or len(least) < len(cases):
        return value
    return dataclasses.replace(value, least=min(least), most=max(most))


def _within(jaxpr: Jaxpr, inputs: Sequence[Value], names: str) -> Body:
    """A body whose inputs are those around it, or slices of them."""
    return _body(jaxpr, [_bounded(_value(var.aval), (x,)) for var, x in zip(jaxpr.invars, inputs, strict=True)], names)


def _around(eqn: JaxprEqn, bodies: Sequence[Body], carried: Collection[int] = ()) -> tuple[Value, ...]:
    """Outputs of a loop from those of its bodies, which they are, or stacks of them, but for what is carried."""
    every = zip(*(body.outputs for body in bodies))
    return tuple(
        _bounded(_value(var.aval), () if i in carried else same)
        for i, (var, same) in enumerate(zip(eqn.outvars, every, strict=True))
    )


def _scan(eqn: JaxprEqn, inputs: tuple[Value, ...], names: str) -> Loop:
    jaxpr = _jaxpr(eqn.params["jaxpr"])
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        consts, carries, _ = (len(part) for part in eqn.params["ft_in"].unpack())
    else:
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    carried = {i: consts + i for i in range(carries)}
    known = [_value(var.aval) if i in carried.values() else x for i, (var, x) in enumerate(zip(jaxpr.invars, inputs))]
    body = _within(jaxpr, known, names)
    return Loop((body,), eqn.params["length"], inputs, _around(eqn, (body,), carried), carried)


def _while(eqn: JaxprEqn, inputs: tuple[Value, ...], names: str) -> Loop:
    test, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    jaxpr = _jaxpr(eqn.params["body_jaxpr"])
    body = _body(jaxpr, [_value(var.aval) for var in jaxpr.invars], names)
    carried = {i: consts + i for i in range(len(eqn.outvars))}
    times, unsure = _turns(eqn, inputs)
    return Loop((body,), times, inputs[test:], _around(eqn, (body,), carried), carried, unsure)


def _turns(eqn: JaxprEqn, inputs: tuple[Value, ...]) -> tuple[int, str]:
    """Turns of a loop that counts up to a limit, as `fori_loop` does: (how many at the most, what is not certain)."""
    test, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = _jaxpr(eqn.params["cond_jaxpr"]), _jaxpr(eqn.params["body_jaxpr"])
    unknown = 1, "a loop whose length is not in the program counts as one turn"
    last = cond.eqns[-1] if cond.eqns else None
    if last is None or last.primitive.name != "lt" or last.outvars[0] is not cond.outvars[0] or len(cond.eqns) > 1:
        return unknown
    # Inputs of the condition are its constants and what is carried; those of the loop have the body's between them.
    around = dict(zip(cond.invars, [*inputs[:test], *inputs[test + consts :]]))
    counter, limit = last.invars
    start, end = (_read(around, atom) for atom in (counter, limit))
    if isinstance(counter, Literal) or counter not in cond.invars[test:]:
        return unknown
    at = cond.invars[test:].index(counter)
    if not _counts_by_one(body, body.invars[consts + at], body.outvars[at]):
        return unknown
    if not isinstance(limit, Literal) and limit in cond.invars[test:]:
        fixed = cond.invars[test:].index(limit)
        if body.outvars[fixed] is not body.invars[consts + fixed]:
            return unknown
    if start.least is None or end.most is None:
        return unknown
    exact = start.least == start.most and end.least == end.most
    said = "" if exact else "a loop whose length depends on where or when it runs counts as its longest"
    return max(0, end.most - start.least), said


def _counts_by_one(body: Jaxpr, before: Any, after: Any) -> bool:
    made = next((eqn for eqn in body.eqns if after in eqn.outvars), None)
    if made is None or made.primitive.name != "add" or before not in made.invars:
        return False
    return any(isinstance(atom, Literal) and int(atom.val) == 1 for atom in made.invars)


def _cond(eqn: JaxprEqn, inputs: tuple[Value, ...], names: str) -> Loop:
    bodies = tuple(_within(_jaxpr(branch), inputs[1:], names) for branch in eqn.params["branches"])
    unsure = "of a conditional the branch that costs most is counted"
    return Loop(bodies, 1, inputs[1:], _around(eqn, bodies), {}, unsure)


def _shard_map(eqn: JaxprEqn, inputs: tuple[Value, ...], names: str) -> Loop:
    axes = eqn.params["newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"]  # versions differ
    body = _within(_jaxpr(eqn.params["jaxpr"]), inputs, names)
    devices = math.prod(eqn.params["mesh"].shape[name] for name in axes)
    return Loop((body,), devices, inputs, _around(eqn, (body,)), {})


_LOOPS: dict[str, Callable[[JaxprEqn, tuple[Value, ...], str], Loop]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
