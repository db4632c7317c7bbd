"""Arrays of your own, from .npz, .safetensors or .npy files, or from Python. All of them are read into memory.

`named_arrays.py` reads; here it is decided what the arrays mean, and checked that they can mean it.
"""

import dataclasses
import functools
from typing import Any, Literal, NoReturn

import jax.numpy as jnp
import numpy as np

from flaxmodels.data import held_out, images, named_arrays
from flaxmodels.data.split import Batch, Rows, Source, Split, describe, fingerprint, gather_rows
from flaxmodels.registry import Fraction, UserError

# What inputs and targets are usually called.
_TEST = (("x_test", "y_test"),)
_PAIRS = (
    ("inputs", "targets"),
    ("x", "y"),
    ("X", "y"),
    ("image", "label"),
    ("images", "labels"),
    ("x_train", "y_train"),
)
Kind = Literal["classes", "tokens", "values"]


def arrays(
    train: str | dict,
    test: str | dict | None = None,
    inputs: str | None = None,
    targets: str | None = None,
    weights: str | None = None,
    validation: Fraction = 0.1,
) -> Source:
    """Your own arrays, one row an example.

    What the targets are says what is learned:
      integers (N,) or (N, 1): classes, numbered from 0; the fact "classes" is the largest of `train`, plus 1.
      integers (N, T), with inputs of the same shape: tokens; the facts are "vocab_size" and "max_length".
      floats: values. (N,) become (N, 1); of (N, K) the fact "classes", the width of what a model gives, is K. The
        transform "values" says whether they are "probabilities", each row of at least two from 0 on and with the sum 1
        (within 0.001), or else "numbers". Classes written as floats are numbers, too: only integers are classes.

    Inputs of bytes with rank 3 or 4 are images, (N, H, W) or (N, H, W, C), scaled to 0..1. All others are as they are:
    64-bit numbers become 32-bit ones, and integers of any size arrive as int32.

    Args:
      train: an .npz or a .safetensors file; or a dict of names to .npy files or, from Python, to arrays.
      test: the same, to evaluate on. None takes "x_test" and "y_test" where they lie beside "x_train" and "y_train", as
        in the files of Keras; else a part of `train` is held out.
      inputs: name of the array. None takes the first pair that is there, of inputs and targets, x and y, X and y,
        image and label, images and labels, x_train and y_train.
      targets: name of the array; None as for `inputs`.
      weights: name of an array (N,), or (N, T) for tokens, of numbers from 0 on that say how much an example counts; 1
        in a `test` that has none of that name.
      validation: the part of `train` that is held out where there is no test, of each class the same share.

    Raises:
      UserError: a file or an array is missing, or damaged; arrays differ in length; a split is empty; a label is
        negative, not an integer, or not one of the classes; a value is not finite, or does not fit into 32 bits.
    """
    chosen = _choose(train, "data.train", _PAIRS, inputs, targets)
    known = _read(train, "data.train", chosen, weights)
    if test is not None:
        other = _choose(test, "data.test", (*_TEST, *_PAIRS), inputs, targets)
        there = weights if weights in named_arrays.names(test, "data.test") else None
        facts, unseen = _facts(known), _read(test, "data.test", other, there)
    elif chosen == _PAIRS[-1] and set(_TEST[0]) <= set(named_arrays.names(train, "data.train")):
        facts, unseen = _facts(known), _read(train, "data.train", _TEST[0], None)
    else:
        facts = _facts(known)
        known, unseen = _cut(known, validation)
    _check_alike(known, unseen, facts)
    parts = {"train": known, "test": unseen}
    return Source(
        "arrays",
        _split(known),
        _split(unseen),
        facts=facts,
        fingerprint=fingerprint({f"{s}/{n}": describe(a) for s, p in parts.items() for n, a in p.arrays.items()}),
        tokens_per_example=facts.get("max_length", 1),
        transforms={"values": _values(known, unseen)} if known.kind == "values" else {},
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """The arrays of one split, as they are kept: "inputs", "targets" and, if given, "weights"."""

    arrays: dict[str, np.ndarray]
    kind: Kind
    where: str

    @property
    def ids(self) -> dict[str, np.ndarray]:
        """Those arrays that are numbers of classes or of tokens."""
        names = {"classes": ("targets",), "tokens": ("inputs", "targets"), "values": ()}[self.kind]
        return {name: self.arrays[name] for name in names}

    @property
    def form(self) -> str:
        """What both splits must have in common."""
        inputs, targets = self.arrays["inputs"], self.arrays["targets"]
        dtype = "int32" if _is(inputs, np.integer) and not _is_image(inputs) else inputs.dtype.name
        return f"inputs (N, {_listed(inputs)}) {dtype} and targets (N, {_listed(targets)}) that are {self.kind}"


def _listed(array: np.ndarray) -> str:
    return ", ".join(map(str, array.shape[1:]))


def _choose(
    given: named_arrays.Arrays,
    where: str,
    pairs: tuple[tuple[str, str], ...],
    inputs: str | None,
    targets: str | None,
) -> tuple[str, str]:
    """The names of inputs and targets in `given`."""
    there = named_arrays.names(given, where)
    candidates = [(inputs or first, targets or second) for first, second in pairs]
    for pair in candidates:
        if set(pair) <= set(there):
            return pair
    for name in (inputs, targets):  # `read` says of a name that was given what there is instead
        if name is not None:
            named_arrays.read(given, (name,), where)
    raise UserError(
        f"{where} has the arrays {', '.join(map(repr, there)) or 'of nothing'}: which are inputs and targets? "
        "Set --config.data.inputs=NAME and --config.data.targets=NAME."
    )


def _read(given: named_arrays.Arrays, where: str, names: tuple[str, str], weights: str | None) -> _Part:
    """The arrays of one split, checked."""
    wanted = names if weights is None else (*names, weights)
    raw = named_arrays.read(given, wanted, where)
    found = {name: _numbers(array, f"{where}: {name!r}") for name, array in raw.items()}
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise UserError(f"{where}: arrays differ in length: {said} rows. Each row is one example.")
    if not lengths[names[0]]:
        raise UserError(f"{where}: {names[0]!r} has no rows: at least one example is needed.")
    inputs = found[names[0]]
    if inputs.dtype == np.uint8 and inputs.ndim == 3:
        inputs = inputs[..., None]
    targets, kind = _targets(found[names[1]], inputs, f"{where}: {names[1]!r}")
    part = {"inputs": inputs, "targets": targets}
    if weights is not None:
        part["weights"] = _weights(found[weights], targets.shape if kind == "tokens" else targets.shape[:1], weights)
    return _Part(part, kind, where)


def _is(array: np.ndarray, kind: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, kind))  # JAX's, which knows bfloat16 too


def _is_image(inputs: np.ndarray) -> bool:
    return inputs.dtype == np.uint8 and inputs.ndim == 4


def _numbers(array: np.ndarray, what: str) -> np.ndarray:
    """As bool, float16, float32, or integers of 8, 16 or 32 bits that fit into int32, in this machine's byte order."""
    if array.ndim == 0:
        raise UserError(f"{what} is a single value: expected one row an example.")
    if array.dtype == np.bool_:
        return array
    if _is(array, np.floating):
        with np.errstate(over="ignore"):
            small = array.astype(np.float16 if array.dtype == np.float16 else np.float32, copy=False)
        if (bad := ~np.isfinite(small)).any():
            _refuse(array, bad, what, f"not finite {small.dtype.name} numbers")
        return small
    if not _is(array, np.integer):
        raise UserError(f"{what} has the dtype {array.dtype}: expected numbers. Number words and classes from 0 on.")
    kept = array.dtype.kind in "iu" and (array.dtype.itemsize <= 2 or array.dtype == np.int32)
    limits = np.iinfo(np.int32)
    if not kept and (bad := (array < limits.min) | (array > limits.max)).any():
        _refuse(array, bad, what, "too large for int32")
    return array.astype(array.dtype.newbyteorder("=") if kept else np.int32, copy=False)


def _refuse(array: np.ndarray, bad: np.ndarray, what: str, reason: str) -> NoReturn:
    """Raise UserError for the entries of `array` that are `bad`: how many, and the first."""
    place = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    count, examples = int(bad.sum()), int(bad.reshape(len(bad), -1).any(axis=1).sum())
    at = f", at {list(place[1:])}" if place[1:] else ""
    raise UserError(
        f"{what}: {count} of its values, in {examples} of {len(array)} examples, are {reason}. "
        f"The first is {array[place]}, in example {place[0]}{at}."
    )


def _targets(array: np.ndarray, inputs: np.ndarray, what: str) -> tuple[np.ndarray, Kind]:
    """Targets as int32 (N,) or (N, T), or float32; and what they are."""
    if _is(array, np.floating):
        values = array.astype(np.float32, copy=False)
        return (values[:, None] if values.ndim == 1 else values), "values"
    array = array.astype(np.int32, copy=False)
    if array.ndim == 2 and array.shape == inputs.shape and _is(inputs, np.integer):
        return array, "tokens"
    if array.shape in ((len(array),), (len(array), 1)):
        return array.reshape(-1), "classes"
    raise UserError(
        f"{what} has integers of shape {array.shape}, inputs are {inputs.dtype} {inputs.shape}: expected (N,) for "
        "classes; (N, T) for tokens, with integers of the same shape as inputs; or floats for values of any shape."
    )


def _weights(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if array.shape not in (shape, shape[:1]):
        raise UserError(f"data.weights={name!r} has the shape {array.shape}: expected {shape} or {shape[:1]}.")
    array = array.astype(np.float32)
    if (bad := array < 0).any():
        _refuse(array, bad, f"data.weights={name!r}", "negative")
    return array


def _cut(whole: _Part, validation: float) -> tuple[_Part, _Part]:
    """A part to train on, and a part held out, each in the order of the whole."""
    targets = whole.arrays["targets"]
    held = held_out.stratified(targets if whole.kind == "classes" else np.zeros(len(targets), np.int32), validation)
    if not held.any():
        raise UserError(
            f"data.validation={validation:g} of {len(held)} examples holds out none: at least one is needed to "
            "evaluate on, of a class that has two. Set data.test, or give more."
        )
    known, unseen = (
        dataclasses.replace(whole, arrays={name: array[rows] for name, array in whole.arrays.items()})
        for rows in (~held, held)
    )
    return known, unseen


def _facts(known: _Part) -> dict[str, int]:
    """What the data to train on, all of them, know about themselves."""
    targets = known.arrays["targets"]
    if known.kind == "values":
        return {"classes": targets.shape[1]} if targets.ndim == 2 else {}
    size = 1 + max(int(array.max()) for array in known.ids.values())
    for name, array in known.ids.items():
        if (bad := array < 0).any():
            _refuse(array, bad, f"{known.where}: {name}", "negative; numbers of classes and of tokens start at 0")
    return {"vocab_size": size, "max_length": targets.shape[1]} if known.kind == "tokens" else {"classes": size}


def _values(*parts: _Part) -> Literal["numbers", "probabilities"]:
    """What float targets are, of which no dtype or shape tells."""
    for part in parts:
        targets = part.arrays["targets"]
        sums = targets.sum(axis=-1, dtype=np.float64)
        if targets.shape[-1] < 2 or targets.min() < 0 or np.abs(sums - 1).max() > 1e-3:
            return "numbers"
    return "probabilities"


def _check_alike(known: _Part, unseen: _Part, facts: dict[str, int]) -> None:
    if known.form != unseen.form:
        raise UserError(f"The splits differ. To train on: {known.form}. To evaluate on: {unseen.form}.")
    for part in (known, unseen):
        if "weights" in part.arrays and not part.arrays["weights"].any():
            raise UserError(f"{part.where}: all weights of a split are 0, so that no example of it would count.")
    for name, array in unseen.ids.items():
        size = facts.get("vocab_size", facts.get("classes", 0))
        if (bad := (array < 0) | (array >= size)).any():
            _refuse(array, bad, f"{unseen.where}: {name}", f"not in 0..{size - 1}, as those to train on are")


def _split(part: _Part) -> Split:
    prepare = functools.partial(_prepare, image=_is_image(part.arrays["inputs"]), tokens=part.kind == "tokens")
    return Split(len(part.arrays["targets"]), part.arrays, gather_rows, prepare)


def _prepare(rows: Rows, index: Any, image: bool, tokens: bool) -> Batch:
    """Inputs (B, ...) float or int32; targets (B,), (B, T) int32 or (B, ...) float32; weights (B,) or (B, T)."""
    inputs, targets = rows["inputs"], rows["targets"]
    if image:
        inputs = images.scaled(inputs)
    elif _is(inputs, np.integer):
        inputs = inputs.astype(np.int32)
    weights = (index >= 0).astype(np.float32)
    if tokens:
        weights = weights[:, None] * np.ones(targets.shape, np.float32)
    if (given := rows.get("weights")) is not None:
        weights = weights * (given[:, None] if given.ndim < weights.ndim else given)
    return {"inputs": inputs, "targets": targets, "weights": weights}
