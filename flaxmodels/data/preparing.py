"""`flaxmodels prepare`: text to tokens on disk, once, in constant memory, and resumable.

The text is read twice to learn about it (its size, and a tokenizer), and once more to be encoded. After each shard, a
file says how far that came; the same command goes on from there, and ends with the same bytes. Read `prepare` first.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from flaxmodels.data import corpus, prepare_display, token_folder, token_writer, tokenizer
from flaxmodels.data.corpus import Corpus, Survey
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.token_folder import BLOCK, MANIFEST, PROGRESS, SPLITS, VERSION
from flaxmodels.data.token_writer import Writer
from flaxmodels.data.vocabularies import dtype, width
from flaxmodels.registry import UserError

SHARD = 2**26  # tokens
# Characters encoded together.
_BATCH = 2**22
# What is being done, how much of that (in bytes), of how much in all, and how many tokens were made.
Progress = Callable[[str, int, int, int], None]


def prepare_source(
    name: str, options: Mapping[str, Any], to: str | Path, stream: TextIO, shard_size: int = SHARD
) -> dict[str, Any]:
    """Prepare what a data section of a config means, and show how far it is.

    Args:
      name: the source: "text", "lines", "csv", "tsv", "jsonl" or "parquet".
      options: of that source. Those that say how windows are made are for later, and not looked at.
      to: the folder to write; made where it is not there.
      stream: where progress is shown: a bar in a terminal, lines in a pipe.
      shard_size: tokens in a shard, a multiple of `BLOCK`.

    Returns:
      The manifest.

    Raises:
      UserError: see `prepare`.
    """
    texts, said = corpus.from_options(name, options)
    said["name"] = name
    with prepare_display.shown(stream) as (progress, say):
        return prepare(Path(to).expanduser(), texts, said, progress=progress, say=say, shard_size=shard_size)


def prepare(
    folder: Path,
    texts: Corpus,
    options: Mapping[str, Any],
    *,
    progress: Progress,
    say: Callable[[str], None],
    shard_size: int = SHARD,
) -> dict[str, Any]:
    """Write the tokens of a corpus into a folder, or go on where an earlier call was stopped.

    Args:
      folder: where. Empty, missing, or of an earlier call with the same arguments.
      texts: what is read.
      options: what it was read with: "path", "test_path", "tokens", "vocab_size", and any others, ready for JSON.
      progress: called now and then.
      say: called with a line of text when something is known.
      shard_size: tokens in a shard.

    Returns:
      The manifest.

    Raises:
      UserError: the text is wrong, the folder is another's, or can't be written; or the disk is full. The same call
        goes on when that is mended.
    """
    if shard_size < BLOCK or shard_size % BLOCK:
        raise UserError(f"A shard of {shard_size} tokens has no whole blocks: expected a multiple of {BLOCK}.")
    try:
        with _only_process(folder):
            return _prepare(folder, texts, options, progress, say, shard_size)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} can't be written: {error.strerror}. When that is mended, run the same command "
            "again: it goes on after the last shard."
        ) from error


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Make the folder, and hold its lock; the system frees that when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder} is being prepared by another process. Wait for it, or choose another.") from error
    finally:
        os.close(descriptor)


def _prepare(
    folder: Path, texts: Corpus, options: Mapping[str, Any], progress: Progress, say: Callable[[str], None], size: int
) -> dict[str, Any]:
    state = _begin(folder, options, size, progress)
    if "fingerprint" in state:
        _clear(folder)
        say(f"{folder} is prepared already: {_spell(state)}. Nothing to do.")
        return state
    if "survey" in state:
        say(f"going on in {folder}, after {_spell(_manifest(state))}")
    else:
        total = sum(file["bytes"] for file in state["inputs"])
        state["survey"] = dataclasses.asdict(texts.survey(_adding("counting", progress, total)))
    survey = Survey(**state["survey"])
    documents = texts.hold_out != "tail" or survey.texts > 1
    if (folder / tokenizer.FILE).exists():
        made = tokenizer.load(folder)
    else:
        made = _learn(texts, options, survey, documents, progress)
        _save(folder / PROGRESS, state)
        token_writer.write(folder / tokenizer.FILE, tokenizer.dump(made).encode())
    say(f"{survey.texts} texts, {survey.characters} characters; {made.size} tokens in the vocabulary")
    _encode(folder, texts, survey, made, made.end if documents else None, state, progress)
    manifest = _manifest(state)
    for split, shards in manifest["splits"].items():
        if (count := sum(shard["tokens"] for shard in shards)) < 2:
            raise UserError(f"{count} tokens in the {split} split: expected two or more. Use more text, or validation.")
    manifest["dtype"], manifest["vocab_size"] = dtype(made.size).newbyteorder("<").str, made.size
    manifest["tokenizer"] = made.fingerprint
    manifest["tokenizer_sha256"] = hashlib.sha256((folder / tokenizer.FILE).read_bytes()).hexdigest()
    manifest["fingerprint"] = token_folder.fingerprint_of(manifest)
    _save(folder / MANIFEST, manifest)
    _clear(folder)
    say(f"{folder} is prepared: {_spell(manifest)}; fingerprint {manifest['fingerprint']}")
    return manifest


def _begin(folder: Path, options: Mapping[str, Any], shard_size: int, progress: Progress) -> dict[str, Any]:
    """The manifest or the state that an earlier call left, if it was the same call; or the state of a new one."""
    found = next((folder / name for name in (MANIFEST, PROGRESS) if (folder / name).exists()), None)
    if found is None and (others := sorted(f.name for f in folder.iterdir() if f.suffix != ".part")):
        raise UserError(f"{folder} is not empty: it has {others[0]!r}. Choose a folder of its own with --to=FOLDER.")
    asked = {**options, "tokens": _tokens(options["tokens"], options["vocab_size"])}
    files = corpus.inputs(options)
    fresh = {
        "version": VERSION,
        "shard_size": shard_size,
        "options": {key: value for key, value in asked.items() if key not in corpus.PATHS},
        "inputs": corpus.describe(files, _adding("reading", progress, sum(size for _, size in files))),
        "splits": {split: {"shards": [], "piece": 0, "before": 0} for split in SPLITS},
    }
    if found is None:
        return fresh
    state: dict[str, Any] = token_folder.read_manifest(folder) if found.name == MANIFEST else _read_progress(found)
    for key in ("version", "shard_size", "options", "inputs"):
        _compare(folder, state.get(key), fresh[key], key)
    return state


def _tokens(tokens: str, vocab_size: int | None) -> str:
    """What `tokens` means, wherever the file is that it may name. UserError before work begins, and not after it."""
    if tokens not in tokenizer.KINDS:
        return f"those of a file, {tokenizer.load(tokens).fingerprint}"
    tokenizer.check_size(tokens, vocab_size)
    return tokens


def _read_progress(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
        if not {"survey", "splits"} <= set(state):
            raise ValueError("entries are missing")
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


def _learn(texts: Corpus, options: Mapping[str, Any], survey: Survey, documents: bool, progress: Progress) -> Tokenizer:
    tokens, add = options["tokens"], _adding("learning", progress, survey.nbytes)

    def learned() -> Iterator[str]:
        for piece in texts.pieces(survey):
            add(width(piece.text))
            if piece.split == "train" or tokens == "characters":
                yield piece.text

    return tokenizer.make(tokens, learned, vocab_size=options["vocab_size"], documents=documents)


def _encode(
    folder: Path,
    texts: Corpus,
    survey: Survey,
    made: Tokenizer,
    end: int | None,
    state: dict[str, Any],
    progress: Progress,
) -> None:
    add = _adding("encoding", progress, survey.nbytes)
    writers = {
        split: Writer(
            folder, split, dtype(made.size), end, state["shard_size"], done, lambda: _save(folder / PROGRESS, state)
        )
        for split, done in state["splits"].items()
    }
    batch: list[tuple[int, corpus.Piece]] = []

    def flush() -> None:
        found = tokenizer.encode_many(made, [piece.text for _, piece in batch])
        for (number, piece), ids in zip(batch, found):
            writers[piece.split].append(number, ids, piece.closed)
            add(width(piece.text), len(ids))
        batch.clear()

    try:
        waiting = 0
        for number, piece in enumerate(texts.pieces(survey)):
            if number < writers[piece.split].first:
                add(width(piece.text))
                continue
            batch.append((number, piece))
            waiting += len(piece.text)
            if waiting >= _BATCH:
                flush()
                waiting = 0
        flush()
        for writer in writers.values():
            writer.finish(survey.pieces)
    finally:
        for writer in writers.values():
            writer.close()


def _manifest(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the state: all but where to go on."""
    splits = {split: done["shards"] for split, done in state["splits"].items()}
    return {**{key: state[key] for key in ("version", "shard_size", "options", "inputs", "survey")}, "splits": splits}


def _save(file: Path, content: Mapping[str, Any]) -> None:
    token_writer.write(file, json.dumps(content, indent=1).encode())


def _clear(folder: Path) -> None:
    """Remove what a call that was stopped left."""
    for file in (folder / PROGRESS, *folder.glob("*.part")):
        file.unlink(missing_ok=True)


def _adding(what: str, progress: Progress, total: int) -> Callable[..., None]:
    """A function to be told of more bytes, and tokens."""
    done, tokens = 0, 0

    def add(nbytes: int, count: int = 0) -> None:
        nonlocal done, tokens
        done, tokens = done + nbytes, tokens + count
        progress(what, done, total, tokens)

    return add


def _spell(manifest: Mapping[str, Any]) -> str:
    counts = []
    for split, shards in manifest["splits"].items():
        tokens, texts = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
        counts.append(f"{split} {tokens} tokens of {texts} texts")
    return ", ".join(counts)
