"""What `flaxmodels prepare` knows of a folder: where an earlier call stopped, and whether it was the same call."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flaxmodels.data import corpus, token_folder, token_writer, tokenizer
from flaxmodels.data.token_folder import MANIFEST, PROGRESS, SPLITS, VERSION
from flaxmodels.registry import UserError

# What is being done, how much of that (in bytes), of how much in all, and how many tokens were made.
Progress = Callable[[str, int, int, int], None]


def begin(folder: Path, options: Mapping[str, Any], shard_size: int, progress: Progress) -> dict[str, Any]:
    """The manifest or the state that an earlier call left, if it was the same call; or the state of a new one."""
    found = next((folder / name for name in (MANIFEST, PROGRESS) if (folder / name).exists()), None)
    if found is None and (others := sorted(f.name for f in folder.iterdir() if f.suffix != ".part")):
        raise UserError(f"{folder} is not empty: it has {others[0]!r}. Choose a folder of its own with --to=FOLDER.")
    asked = {**options, "tokens": _tokens(options["tokens"], options["vocab_size"])}
    files = corpus.inputs(options)
    call = {
        "version": VERSION,
        "shard_size": shard_size,
        "options": {key: value for key, value in asked.items() if key not in corpus.PATHS},
    }
    state: dict[str, Any] = {**call, "splits": {split: {"shards": [], "piece": 0, "before": 0} for split in SPLITS}}
    if found is not None:
        state = token_folder.read_manifest(folder) if found.name == MANIFEST else _read_progress(found)
    for key, value in call.items():  # before all files are read
        _compare(folder, state.get(key), value, key)
    inputs = corpus.describe(files, adding("reading", progress, sum(size for _, size in files)))
    if found is not None:
        _compare(folder, state.get("inputs"), inputs, "inputs")
    return {**state, "inputs": inputs}


def _tokens(tokens: str, vocab_size: int | None) -> str:
    """What `tokens` means, wherever the file is that it may name. UserError before work begins, and not after it."""
    if tokens not in tokenizer.KINDS:
        return f"those of a file, {tokenizer.load(tokens).fingerprint}"
    tokenizer.check_size(tokens, vocab_size)
    return tokens


def _read_progress(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
        if missing := {"inputs", "options", "survey", "splits"} - set(state):
            raise ValueError(f"{min(missing)} is missing")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}. Remove {file.parent}, and prepare it anew.") from error
    return dict(state)


def _compare(folder: Path, there: Any, asked: Any, key: str) -> None:
    """Refuse to go on with something else, by name."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in {**there, **asked}:
            _compare(folder, there.get(name), asked.get(name), f"{key}.{name}")
    elif isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        for i, (old, new) in enumerate(zip(there, asked)):
            _compare(folder, old, new, f"{key}[{i}]")
    elif there != asked:
        told = [f"{len(side)} files" if isinstance(side, list) else repr(side) for side in (there, asked)]
        raise UserError(
            f"{folder} was made with something else: {key} was {told[0]}, and is {told[1]} now. Choose another "
            "folder, or remove this one."
        )


def manifest(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the state: all but where to go on."""
    splits = {split: done["shards"] for split, done in state["splits"].items()}
    return {**{key: state[key] for key in ("version", "shard_size", "options", "inputs", "survey")}, "splits": splits}


def save(file: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest or a state."""
    token_writer.write(file, json.dumps(content, indent=1).encode())


def adding(what: str, progress: Progress, total: int) -> Callable[..., None]:
    """A function to be told of more bytes, and tokens."""
    done, tokens = 0, 0

    def add(nbytes: int, count: int = 0) -> None:
        nonlocal done, tokens
        done, tokens = done + nbytes, tokens + count
        progress(what, done, total, tokens)

    return add
