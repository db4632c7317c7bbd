"""Between directories of Hugging Face and workdirs of ours: `adopt` makes one of the other, `release` the other way."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from flaxmodels import registry, sharding, shelf, storage, stored
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.data import tokenizer as tokenizers
from flaxmodels.data.byte_pairs import BytePairs
from flaxmodels.data.split import Tokenizer
from flaxmodels.fitting import PARAMS
from flaxmodels.hub import reading, writing
from flaxmodels.hub.directory import SETTINGS, TOKENIZER_CONFIG, Described
from flaxmodels.precision import Float
from flaxmodels.registry import UserError
from flaxmodels.shelf import Entry
from flaxmodels.state import TrainState

# In the path of the average that an optimizer keeps of a parameter.
_AVERAGE = "/parameters_average/"


def adopt(described: Described, to: Path, mesh: Mesh, dtype: Float | None = None) -> tuple[Entry, dict[str, Any]]:
    """Make a workdir with one checkpoint, of step 0, of a directory.

    Args:
      described: of `describe`.
      to: new, or empty.
      mesh: over which the parameters lie meanwhile.
      dtype: of the parameters; None: as they are stored.

    Returns:
      (the checkpoint, its config: dotted key -> value).

    Raises:
      UserError: `to` is there, or a number is too large for `dtype`.
    """
    writing.new(to)
    params = {}
    for path, place in described.places.items():
        name = path.removeprefix(PARAMS)
        where = NamedSharding(mesh, sharding.spec_of(name, place.leaf.shape, mesh))
        params[name] = reading.array(path, place, where, dtype or place.leaf.dtype)
    made = tokenizers.load(described.tokenizer) if described.tokenizer else None
    config = {f"model.{name}": registry.storable(value) for name, value in described.model.items()}
    meta = {
        "memory": {}, "config": config, "model": registry.storable(described.model),
        "data": {"tokenizer": made and made.fingerprint},
    }  # fmt: skip
    facts = {"time": time.time(), "parent": str(described.folder), "architecture": described.architecture}
    state = TrainState(jnp.zeros((), jnp.int32), unflatten_dict(params, sep="/"), {}, ())
    with contextlib.closing(Checkpoints(to / shelf.CHECKPOINTS, every_seconds=0.0)) as checkpoints:
        checkpoints.save(state, 0, meta, facts=facts)
    if described.tokenizer is not None and made is not None:
        tokenizers.save(made, to / tokenizers.FILE)
    for name in SETTINGS:
        if (file := described.folder / name).is_file():
            storage.copy(file, to / name)
    return shelf.find(to, 0), config


def release(
    entry: Entry, to: Path, *, params: Any = None, dtype: Float | None = None, shard_bytes: int = writing.SHARD
) -> tuple[list[Path], str]:
    """Write a checkpoint as a directory; of its parameters the averaged ones, where the run kept an average.

    Args:
      entry: of a workdir; its files are verified.
      to: new, or empty.
      params: to write instead of those that are stored, such as those with the factors of LoRA in them.
      dtype: of the tensors; None: as they are stored.
      shard_bytes: the most bytes of a file of weights.

    Returns:
      (the files, which parameters they hold, in words).

    Raises:
      UserError: the checkpoint is damaged, has other collections than parameters, or `write` refuses it.
    """
    shelf.check(entry)
    if "model" not in entry.meta:
        raise UserError(f"{entry} does not say how large its model is: an earlier version saved it. Train one step on.")
    model, made = entry.meta["model"], _tokenizer(entry.workdir)
    end = {} if made is None or made.end is None else {"eos_token_id": made.end}
    options: dict[str, Any] = {"extra": end, "dtype": dtype, "shard_bytes": shard_bytes}
    options["tokenizer"] = None if made is None else tokenizers.dump(made)
    if params is not None:
        return writing.write(to, model, params, **options) + _settings(entry.workdir, to, made), "merged parameters"
    saved = stored.tree(entry.folder)
    if others := [path for path in saved if path.startswith("extra/")]:
        raise UserError(f"{entry} has more than parameters, such as {others[0]}: no architecture there has such.")
    averages = {PARAMS + path.partition(_AVERAGE)[2]: path for path in saved if _AVERAGE in path}
    names = {path: averages.get(path, path) for path in saved if path.startswith(PARAMS)}
    files = writing.write_fetched(
        to, model, {path: saved[name] for path, name in names.items()},
        lambda path: stored.arrays(entry.folder, [names[path]])[names[path]], **options,
    )  # fmt: skip
    return files + _settings(entry.workdir, to, made), "averaged parameters" if averages else "parameters"


def _tokenizer(workdir: Path) -> Tokenizer | None:
    file = workdir / tokenizers.FILE
    return tokenizers.load(file) if file.is_file() else None


def _settings(workdir: Path, to: Path, made: Tokenizer | None) -> list[Path]:
    """Copies of what a workdir says of its tokenizer and of generation; the least of it where it says nothing."""
    there = [name for name in SETTINGS if (workdir / name).is_file()]
    for name in there:
        storage.copy(workdir / name, to / name)
    if isinstance(made, BytePairs) and TOKENIZER_CONFIG not in there:  # else its class would be guessed
        names = {i: name for name, i in made.special.items()}
        said = {"bos_token": made.begin, "eos_token": made.end}
        content = {"tokenizer_class": "PreTrainedTokenizerFast"}
        content |= {key: names[i] for key, i in said.items() if i in names}
        (to / TOKENIZER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        there.append(TOKENIZER_CONFIG)
    return [to / name for name in there]
