"""A trained model, ready for use: from a workdir of ours, or a directory as Hugging Face has them; without the data."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from flaxmodels import basis, hub, models, precision, sharding, shelf, storage, warm
from flaxmodels.data import tokenizer as tokenizers
from flaxmodels.data.split import Tokenizer
from flaxmodels.fitting import PARAMS
from flaxmodels.precision import Float
from flaxmodels.registry import UserError

EXTRA = "extra/"
_PARTS = (PARAMS, EXTRA)
# Where a directory says by which ids its texts end; the first that says so.
_SETTINGS = ("generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, and what is known of it.

    Attributes:
      model: the module.
      params: its parameters, on the mesh.
      extra: its other collections, on the mesh.
      tokenizer: of its text; None where it has none.
      config: what it was made by: dotted key -> value, such as "data.length"; {} where nobody knows.
      step: of its training; 0 where nobody knows.
      where: what it is, for messages.
      ends: ids that end a text.
      chat_template: of conversations, for Jinja; None where there is none.
    """

    model: nn.Module
    params: Any
    extra: Any
    tokenizer: Tokenizer | None
    config: Mapping[str, Any]
    step: int
    where: str
    ends: tuple[int, ...] = ()
    chat_template: str | None = None


def load(
    path: str | Path, which: str | int = "best", *, mesh: Mesh, dtype: Float | None = None, average: bool = True
) -> Loaded:
    """Load a model onto a mesh.

    Args:
      path: a workdir, which may lie in a bucket, or a directory of Hugging Face.
      which: of a workdir's steps: "best", "latest" or a number.
      mesh: where the parameters shall lie, by the built-in rules.
      dtype: of the parameters and the computation; None: parameters as they are stored, and the computation as the
        config has it, which may say "auto".
      average: take the averaged parameters of a workdir, where it has some.

    Raises:
      UserError: there is no such model, or its files are damaged.
    """
    folder = storage.place(path).expanduser()
    if hub.is_directory(folder):
        described = hub.describe(folder)
        made = tokenizers.load(described.tokenizer) if described.tokenizer else None
        model = _model(described.model, described.model.get("dtype"), dtype, "auto", mesh)
        params, extra = _arrays(described, mesh, dtype, average=False)
        ends = _ends(folder, made)
        return Loaded(model, params, extra, made, {}, 0, str(described), ends, described.chat_template)
    entry = shelf.find(folder, which)
    shelf.check(entry)
    meta = entry.meta
    if "model" not in meta:
        raise UserError(
            f"{entry} does not say how large its model is: it was saved by an earlier version. Train it for another "
            "step with this one."
        )
    config = dict(meta.get("config", {}))
    made = _tokenizer(folder, meta.get("data", {}).get("tokenizer"))
    # The model was built for the devices that it was trained on: here it computes as the config asks for on these.
    asked = config.get("precision.compute", "auto")
    model = _model(meta["model"], config.get("model.dtype"), dtype, asked, mesh)
    factors = bool(config.get("lora.rank"))
    params, extra = _arrays(entry, mesh, None if factors else dtype, average=average)
    model, params, extra = basis.merged(model, params, extra, entry, mesh, dtype)
    return Loaded(model, params, extra, made, config, entry.step, str(entry), _ends(folder, made))


def _model(fields: Mapping[str, Any], own: str | None, dtype: Float | None, asked: Any, mesh: Mesh) -> nn.Module:
    """The module, computing in `dtype`; None: in bfloat16 where its `own` field says so, else as `asked`."""
    model = models.build(**fields)
    if "dtype" not in {field.name for field in dataclasses.fields(model)}:
        return model
    policy = precision.policy(compute=asked, platform=mesh.devices.flat[0].platform)
    return model.clone(dtype=dtype or (own if own == "bfloat16" else policy.compute))


def _arrays(store: warm.Store, mesh: Mesh, dtype: Float | None, *, average: bool) -> tuple[Any, Any]:
    """Parameters, averaged ones where there are some, and other collections."""
    saved = warm.tree(store)
    averages = {f"{PARAMS}{path.partition(warm.AVERAGE)[2]}": path for path in saved if warm.AVERAGE in path}
    sources = {path: averages.get(path, path) if average else path for path in saved if path.startswith(_PARTS)}
    bare = {path: path.removeprefix(PARAMS).removeprefix(EXTRA) for path in sources}
    places = {
        old: NamedSharding(mesh, sharding.spec_of(bare[new], saved[new].shape, mesh)) for new, old in sources.items()
    }
    read = warm.sharded(store, places)
    found: dict[str, dict[str, jax.Array]] = {PARAMS: {}, EXTRA: {}}
    for new, old in sources.items():  # one by one, so that both dtypes of all are never there
        kept = dtype or saved[new].dtype if jnp.issubdtype(saved[new].dtype, jnp.floating) else saved[new].dtype
        found[PARAMS if new.startswith(PARAMS) else EXTRA][bare[new]] = read.pop(old).astype(kept)
    params, extra = (unflatten_dict(tree, sep="/") for tree in found.values())
    return params, extra


def _tokenizer(folder: Path, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer that a run wrote to its workdir. UserError where it is another one than that of the checkpoint."""
    file = folder / tokenizers.FILE
    if not file.is_file():
        return None
    made = tokenizers.load(file)
    if fingerprint is not None and made.fingerprint != fingerprint:
        raise UserError(
            f"{file} is not the tokenizer that the checkpoint was trained with, {fingerprint}, but {made.fingerprint}. "
            "Bring that one back."
        )
    return made


def _ends(folder: Path, made: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end a text: as the folder says, else the tokenizer."""
    for name in _SETTINGS:
        try:
            found = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ids = [found] if isinstance(found, int) else found
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return () if made is None or made.end is None else (made.end,)
