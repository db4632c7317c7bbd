"""Where in a computation numbers stop being finite: a function run operation by operation, in order.

JAX names the modules of an operation (Flax enters a scope for each), and writes what a gradient computes as one list of
operations, forward and then backward. So nothing has to be put into a model to look inside, and a `scan` over layers is
simply run layer by layer. Each value that is not finite remembers the operations that it came from: those that made
NaN, or infinity, of what was none. What is masked out later is therefore not accused, nor is the -inf of a mask.

Calls, such as `scan`, are run in one piece first, and looked into only where what comes out is not finite.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from flaxmodels.paths import path_of

_WHOLE = ("shard_map", "pallas_call")  # what is inside sees other shapes, or other memory


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a bad number was made of good ones, or came in from outside.

    Attributes:
      order: counts operations, in the order of computation.
      path: of the module, "blocks[2]/mlp/up", a number in brackets the turn of a loop; or of the argument.
      backward: in the backward pass, where what goes bad is a cotangent.
      operation: JAX's name; "" for an argument.
      source: file and line that called for it, as far as known.
      operands: what the operation was given, a line each.
      made: what came out.
      rows: of the first dimension of what came out, those that are not finite.
    """

    order: int
    path: str
    backward: bool
    operation: str
    source: str
    operands: tuple[str, ...]
    made: str
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array, whether it has NaN or infinities, where these came from, and which operation made it."""

    array: Any
    nan: bool = False
    inf: bool = False
    origins: frozenset[Origin] = frozenset()
    order: int = -1

    @property
    def bad(self) -> bool:
        return self.nan or self.inf


def find(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[list[Origin], dict[str, int]]:
    """Run `function(*arguments.values())`, which returns a pytree.

    Args:
      function: pure, and not yet compiled as one.
      arguments: name -> pytree of arrays.

    Returns:
      (the origins of what is not finite among the results, in the order of computation; path -> order of the operation
      that made it, of each result that is not finite, in that order).
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments.values())
    leaves = jax.tree.leaves_with_path(arguments)
    named = [(path_of(keys), x) for keys, x in leaves]
    # jax.tree sorts the names of a dict, and the function takes them as they stand.
    by_name = {name: [entry for entry in named if entry[0].split("/")[0] == name] for name in arguments}
    values = [_argument(path, x) for name in arguments for path, x in by_name[name]]
    results = _Run().jaxpr(closed.jaxpr, [_looked(x) for x in closed.consts], values, "")
    paths = [path_of(k) for k, _ in jax.tree.leaves_with_path(shapes)]
    bad = sorted((v.order, path, v) for path, v in zip(paths, results, strict=True) if v.bad)
    origins = frozenset[Origin]().union(*(v.origins for _, _, v in bad))
    return sorted(origins, key=lambda o: o.order), {path: order for order, path, _ in bad}


class _Run:
    """One run: counts operations."""

    def __init__(self) -> None:
        self.order = 0

    def jaxpr(self, jaxpr: Any, consts: Sequence[_Value], inputs: Sequence[_Value], stack: str) -> list[_Value]:
        """Run a list of operations; `stack` names where it stands."""
        env: dict[core.Var, _Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
        kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}

        def value(atom: Any) -> _Value:
            return _looked(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            operands = [value(v) for v in eqn.invars]
            for v, found in zip(eqn.outvars, self._equation(eqn, operands, stack), strict=True):
                env[v] = found
            for v in {v for v in eqn.invars if isinstance(v, core.Var)}:
                if last[v] == i and v not in kept:
                    del env[v]
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, operands: list[_Value], stack: str) -> list[_Value]:
        self.order += 1
        order, inner = self.order, _join(stack, str(eqn.source_info.name_stack))
        made = [_looked(x) for x in _bind(eqn, [v.array for v in operands])]
        if not any(v.bad for v in made):
            return [dataclasses.replace(v, order=order) for v in made]
        if not any(v.nan for v in operands) and (into := self._within(eqn, operands, inner)) is not None:
            return into
        return [self._blamed(eqn, operands, v, order, inner) for v in made]

    def _blamed(self, eqn: core.JaxprEqn, operands: list[_Value], made: _Value, order: int, stack: str) -> _Value:
        """`made` with its origins: those of what went in, and this operation where it made worse of it."""
        if not made.bad:
            return dataclasses.replace(made, order=order)
        guilty = [v for v in operands if (v.nan if made.nan and any(o.nan for o in operands) else v.bad)]
        origins = frozenset[Origin]().union(*(v.origins for v in guilty))
        if not guilty or (made.nan and not any(v.nan for v in guilty)):
            path, backward = _place(stack)
            source, given = source_info_util.summarize(eqn.source_info), tuple(_range(v.array) for v in operands)
            made_rows = _bad_rows(made.array)
            name = eqn.primitive.name
            origins |= {Origin(order, path, backward, name, source, given, _range(made.array), made_rows)}
        return dataclasses.replace(made, origins=origins, order=order)

    def _within(self, eqn: core.JaxprEqn, operands: list[_Value], stack: str) -> list[_Value] | None:
        """The results of a call, run operation by operation; None for what is no call."""
        name, params = eqn.primitive.name, eqn.params
        if name in _WHOLE:
            return None
        if name == "scan":
            outer: Any = eqn.outvars
            inner = _opened(params["jaxpr"])[0].outvars
            stacked = sum(len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outer, inner, strict=True))
            return self._scan(params | {"stacked": stacked}, operands, stack)
        if name == "while":
            return self._while(params, operands, stack)
        if name == "cond":
            branch, consts = _opened(params["branches"][int(operands[0].array)])
            return self.jaxpr(branch, [_looked(x) for x in consts], operands[1:], stack)
        for inner in params.values():
            bare, consts = _opened(inner)
            if hasattr(bare, "eqns") and len(bare.invars) == len(operands):
                return self.jaxpr(bare, [_looked(x) for x in consts], operands, stack)
        return None

    def _scan(self, params: dict[str, Any], operands: list[_Value], stack: str) -> list[_Value]:
        body, consts = _opened(params["jaxpr"])
        # What is taken apart by turns, or stacked, has a dimension more outside; how it is counted differs by version.
        rows_in = sum(np.ndim(v.array) > len(inner.aval.shape) for v, inner in zip(operands, body.invars, strict=True))
        carries = len(body.outvars) - params["stacked"]
        first = len(operands) - rows_in - carries
        fixed, carry, xs = operands[:first], operands[first : first + carries], operands[first + carries :]
        turns, whole = range(params["length"]), jax.jit(lambda *xs: jax.core.eval_jaxpr(body, consts, *xs))
        stacked: dict[int, list[_Value]] = {}
        for turn in reversed(turns) if params["reverse"] else turns:
            rows = [dataclasses.replace(_looked(v.array[turn]), origins=v.origins) for v in xs]
            given = [*fixed, *carry, *rows]
            inside = [_looked(x) for x in whole(*(v.array for v in given))]
            if any(v.bad for v in inside):
                inside = self.jaxpr(body, [_looked(x) for x in consts], given, f"{stack}/[{turn}]")
            carry, stacked[turn] = inside[:carries], inside[carries:]
        columns = zip(*(stacked[turn] for turn in turns))
        return [*carry, *(_stacked(list(column)) for column in columns)]

    def _while(self, params: dict[str, Any], operands: list[_Value], stack: str) -> list[_Value]:
        (test, test_consts), (body, consts) = _opened(params["cond_jaxpr"]), _opened(params["body_jaxpr"])
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        tested, fixed, carry = operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :]
        turn = 0
        while bool(jax.core.eval_jaxpr(test, test_consts, *(v.array for v in (*tested, *carry)))[0]):
            carry = self.jaxpr(body, [_looked(x) for x in consts], [*fixed, *carry], f"{stack}/[{turn}]")
            turn += 1
        return carry


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(list of operations, constants), whether the two come in one piece or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _bind(eqn: core.JaxprEqn, arrays: list[Any]) -> Sequence[Any]:
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
    return found if eqn.primitive.multiple_results else [found]


def _looked(x: Any) -> _Value:
    """Look whether an array has NaN or infinities. Waits for it."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return _Value(x)
    nan, inf = (bool(found) for found in jax.device_get(_kinds(x)))
    return _Value(x, nan, inf)


@jax.jit
def _kinds(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.any(jnp.isnan(x)), jnp.any(jnp.isinf(x))


def _argument(path: str, x: Any) -> _Value:
    value = _looked(x)
    origin = Origin(0, path, False, "", "", (), _range(x), _bad_rows(x)) if value.bad else None
    return dataclasses.replace(value, origins=frozenset([origin] if origin else []))


def _stacked(column: list[_Value]) -> _Value:
    array = jnp.stack([v.array for v in column])
    origins = frozenset[Origin]().union(*(v.origins for v in column))
    first = min((v.order for v in column if v.bad), default=column[-1].order)
    return _Value(array, any(v.nan for v in column), any(v.inf for v in column), origins, first)


def _join(stack: str, name: str) -> str:
    return "/".join(part for part in (stack, name) if part)


_WRAPPED = re.compile(r"^\w+\((.*)\)$")


def _place(stack: str) -> tuple[str, bool]:
    """(path of the module, whether in the backward pass) of "transpose(jvp(Net))/[2]/blocks/mlp"."""
    parts, turns = list[str](), list[str]()
    backward = "transpose(" in stack and "rematted_computation" not in stack
    for part in stack.split("/"):
        while match := _WRAPPED.match(part):
            part = match[1]
        if part.startswith("["):
            turns.append(part)
        elif part and part not in ("rematted_computation", "checkpoint"):
            parts.append(part + "".join(turns))
            turns = []
    # The root module is named by its class; parameters are below it, without that name.
    return "/".join(parts[1:] or parts) + "".join(turns), backward


def _range(x: Any) -> str:
    """An array in words: dtype, shape, the range of what is finite, and how much is not."""
    x = jnp.asarray(x) if isinstance(x, int | float | np.generic) else x
    what = f"{x.dtype}{list(x.shape)}" if x.shape else str(x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.inexact) or not x.size:
        return what
    low, high, nans, infs = (found.item() for found in jax.device_get(_extremes(x)))
    said = f"{low:.4g} to {high:.4g}" if low <= high else "nothing finite"
    bad = [f"{count:,} {name}" for count, name in ((nans, "NaN"), (infs, "infinite")) if count]
    return f"{what}: {said}" + (f", {' and '.join(bad)}" if bad else "")


@jax.jit
def _extremes(x: jax.Array) -> tuple[jax.Array, ...]:
    fine, x = jnp.isfinite(x), jnp.abs(x) if jnp.iscomplexobj(x) else x
    low, high = (jnp.where(fine, x, edge).astype(jnp.float32) for edge in (jnp.inf, -jnp.inf))
    return jnp.min(low), jnp.max(high), jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x))


def _bad_rows(x: Any) -> tuple[int, ...]:
    if not getattr(x, "shape", ()):
        return ()
    rows = np.asarray(~jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1))
    return tuple(np.flatnonzero(rows).tolist())
