"""Names to callables, and keyword arguments checked against their signatures.

Every section of a config is a call: `model` calls a module class, `optim` calls `optim.make`, and so on. So the
signature *is* the schema: a default lives once, there; an unknown key, a wrong type or a value out of range is a
`UserError` that names the value, says what was expected, and what to do. This module knows nothing of any section.

Read `bind` first; `accepts` is the type check it uses.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any


class UserError(ValueError):
    """Bad input: shown without a traceback, and the process leaves with exit code 2."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The closed interval a number must lie in; `Annotated[float, Range(0, 1)]` in a signature."""

    low: float = 0
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}" if self.low > -math.inf else "of either sign"
        return f"between {self.low:.10g} and {self.high:.10g}"


# What a signature says about a number. Without a word, a number must be finite and not negative.
Positive = typing.Annotated[int, Range(1)]
Fraction = typing.Annotated[float, Range(0, 1)]
Signed = typing.Annotated[float, Range(-math.inf)]
# A number of optimizer steps. A config may also say "5 epochs", "2e6 tokens", "10%": see durations.py.
# Its upper end is that of the step counter in the train state, 32 bits: a longer run can't be meant.
LONGEST = 2**31 - 1
Steps = typing.Annotated[int, Range(0, LONGEST), "duration"]
Seed = typing.Annotated[int, Range(0, 2**32 - 1)]
MOST_NAMES = 24


def suggest(name: object, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest one, and all there are, up to `MOST_NAMES`."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return (
        f"Did you mean {near[0]!r}? " if near else ""
    ) + f"There are: {', '.join(known[:MOST_NAMES]) or 'none'}{more}."


def pick(table: Mapping[str, Any], name: str, where: str) -> Any:
    """Look `name` up in `table`; `"package.module:attribute"` names anything importable instead.

    Args:
      table: name -> object, or -> a `"module:attribute"` string, imported only when it is picked.
      name: a key of `table`, or `"package.module:attribute"`.
      where: the config key that holds the name, for the message.

    Raises:
      UserError: the name is unknown, or what it names can't be imported.
    """
    if not isinstance(name, str):
        raise UserError(f"{where}={name!r} must be a name. {suggest(name, table)}")
    found = table.get(name, name if ":" in name else None)
    if found is None:
        raise UserError(
            f'{where}={name!r} does not exist. {suggest(name, table)} Your own is named "package.module:attribute".'
        )
    return _import(found, where) if isinstance(found, str) else found


def _import(target: str, where: str) -> Any:
    module, _, attribute = target.partition(":")
    if not module or module.startswith("."):
        raise UserError(f'{where}={target!r} names no module: your own is named "package.module:attribute".')
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the module is there; something that it imports is not
        raise UserError(
            f"{where}={target!r}: there is no module {error.name!r}. "
            "Is its folder on PYTHONPATH, or the package installed?"
        ) from error
    if not hasattr(found, attribute):
        public = [n for n in vars(found) if not n.startswith("_")]
        raise UserError(f"{where}={target!r}: module {module!r} has no {attribute!r}. {suggest(attribute, public)}")
    return getattr(found, attribute)


def parameters(functions: Sequence[Callable[..., Any]], provided: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword parameters that `functions` take together, without those `provided` by the caller."""
    found: dict[str, inspect.Parameter] = {}
    for function in functions:
        linen = {"parent", "name"} if hasattr(function, "__linen_is_wrapped") or _is_linen(function) else set()
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise UserError(f"{function!r} takes no options: expected a function, or a class, of Python.") from error
        for name, parameter in signature.parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and name not in linen and name not in provided:
                found.setdefault(name, parameter.replace(annotation=_annotation(function, name, parameter)))
    return found


def _is_linen(function: Any) -> bool:
    return inspect.isclass(function) and any(c.__module__ == "flax.linen.module" for c in function.__mro__)


def _annotation(function: Any, name: str, parameter: inspect.Parameter) -> Any:
    try:
        return typing.get_type_hints(function, include_extras=True).get(name, parameter.annotation)
    except (NameError, TypeError, AttributeError):  # a user's annotation that can't be resolved here checks nothing
        return parameter.annotation


def bind(
    functions: Callable[..., Any] | Sequence[Callable[..., Any]],
    options: Mapping[str, Any],
    *,
    where: str,
    provided: Collection[str] = (),
    optional: Collection[str] = (),
    convert: Callable[[str, str], Any] | None = None,
) -> dict[str, Any]:
    """Check `options` against the signature(s) they will be passed to.

    Args:
      functions: one callable, or several that share the options between them.
      options: keyword arguments from a config.
      where: the config section, for the message: "optim" makes "optim.learning_rate".
      provided: parameters that the caller passes itself; a config can't set them.
      optional: parameters without a default that may be left out all the same.
      convert: turns a duration such as "5 epochs" into steps; called as `convert(text, key)`.

    Returns:
      The options, with lists as tuples, config dicts as dicts, and durations as steps.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type or range.
    """
    known = parameters(functions if isinstance(functions, Sequence) else [functions], provided)
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{where}.{key}={quote(value)}: unknown key. {suggest(key, known)}")
        checked[key] = check(value, known[key].annotation, f"{where}.{key}", convert)
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options and k not in optional]
    if missing:
        raise UserError(
            f"{where}.{missing[0]} is not set. Add it to the config, or --config.{where}.{missing[0]}=VALUE."
        )
    return checked


def check(value: Any, annotation: Any, where: str, convert: Callable[[str, str], Any] | None = None) -> Any:
    """Check one value against one annotation; return it plain (tuples, dicts, steps). Raises UserError."""
    value = plain(value)
    said = _metadata(annotation)
    bounds = next((m for m in said if isinstance(m, Range)), Range())
    is_duration = "duration" in said
    if is_duration and isinstance(value, str) and convert is not None:
        value = convert(value, where)
    elif not (is_duration and isinstance(value, str)) and not accepts(value, annotation):
        raise UserError(f"{where}={quote(value)} has the wrong type: expected {spell(annotation)}.")
    _check_numbers(value, bounds, where)
    return value


def _metadata(annotation: Any) -> tuple[Any, ...]:
    """What `Annotated` says about the numbers of an annotation, also inside of `Positive | None` or a tuple."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return tuple(annotation.__metadata__)
    inside = typing.get_args(annotation) if origin in (typing.Union, types.UnionType, tuple, list, Sequence) else ()
    return next(filter(None, map(_metadata, inside)), ())


def _check_numbers(value: Any, bounds: Range, where: str) -> None:
    for item in _leaves(value):
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        if abs(item) == math.inf or not bounds.low <= item <= bounds.high:  # NaN is in no range
            raise UserError(f"{where}={value!r} is out of range: expected a finite number, {bounds}.")


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, tuple) else [value]


def plain(value: Any) -> Any:
    """Lists to tuples, config dicts to dicts, all the way down."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {str(k): plain(v) for k, v in value.items()}
    return tuple(plain(v) for v in value) if isinstance(value, list | tuple) else value


def accepts(value: Any, annotation: Any) -> bool:
    """Whether a config value fits a parameter's annotation; an annotation this can't judge accepts all."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return accepts(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(accepts(value, a) for a in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (tuple, list, Sequence):
        if not isinstance(value, tuple):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(accepts, value, arguments))
        return all(accepts(v, arguments[0]) for v in value) if arguments else True
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool, tuple, dict):
        return isinstance(value, annotation)
    return value is None if annotation in (None, type(None)) else True


def spell(annotation: Any) -> str:
    """An annotation as a user would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return 'steps or a duration such as "5 epochs"' if "duration" in arguments else spell(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (tuple, list, Sequence):
        inside = "dicts" if arguments[:1] == (dict,) else spell(arguments[0]) if arguments else ""
        return f"a list of {inside}" if inside else "a list"
    if annotation in (None, type(None)):
        return "None"
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", dict: "a dict"}
    return names.get(origin or annotation, str(annotation))


def quote(value: Any) -> str:
    """A value for a message, as `repr` has it; of an array its dtype and shape."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {quote(item)}' for key, item in value.items())}}}"
    if getattr(value, "shape", ()) and hasattr(value, "dtype"):
        return f"<{value.dtype} array {tuple(value.shape)}>"
    return repr(value)


def storable(value: Any) -> Any:
    """A value of a config, or a default, as JSON can hold it: functions, classes and dtypes become names.

    Never an address in memory: what is equal must be stored equal, in every process.
    """
    if isinstance(value, Mapping):
        return {str(k): storable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [storable(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy's
        return value.item()
    name = getattr(value, "__qualname__", None) or getattr(value, "name", None)
    home = getattr(value, "__module__", None) or type(value).__module__
    return f"{home}:{name}" if isinstance(name, str) else f"{type(value).__module__}:{type(value).__qualname__}"
