"""`flaxmodels prepare`: text to tokens on disk, once, in constant memory, and resumable.

The text is read twice to learn about it (its size, and a tokenizer), and once more to be encoded. After each shard, a
file says how far that came; the same command goes on from there, and ends with the same bytes. A signal stops it soon,
whatever it is at. Read `prepare` first.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from flaxmodels.data import corpus, prepare_display, prepare_state, token_folder, token_writer, tokenizer
from flaxmodels.data.corpus import Corpus, Survey, counted
from flaxmodels.data.prepare_state import Progress
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.token_folder import BLOCK, MANIFEST, PROGRESS
from flaxmodels.data.token_writer import Writer
from flaxmodels.data.vocabularies import dtype, width
from flaxmodels.registry import UserError
from flaxmodels.runtime.signals import Stop

SHARD = 2**26  # tokens
# Characters encoded together.
_BATCH = 2**22
# Seconds between two looks at a tokenizer that learns; and those it has to end when it is no longer wanted.
_LOOK, _LEAVE = 0.1, 2.0


class StoppedError(Exception):
    """SIGINT or SIGTERM came. What was written stays, and the same call goes on from there.

    Attributes:
      signal: which one; a command leaves with 128 + its number.
    """

    def __init__(self, number: signal.Signals, said: str) -> None:
        super().__init__(f"{number.name}: {said}")
        self.signal = number


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
      StoppedError: SIGINT or SIGTERM came. A second one ends the process at once.
    """
    texts, said = corpus.from_options(name, options)
    said["name"] = name
    folder = Path(to).expanduser()
    with Stop() as stop, prepare_display.shown(stream) as (progress, say):

        def looking(what: str, done: int, total: int, tokens: int) -> None:
            if stop.signal is not None:
                raise StoppedError(stop.signal, _spell_stop(folder, what))
            progress(what, done, total, tokens)

        return prepare(folder, texts, said, progress=looking, say=say, shard_size=shard_size)


def _spell_stop(folder: Path, what: str) -> str:
    if not (folder / PROGRESS).exists():
        return f"stopped while {what}, with nothing written yet; the same command starts again."
    shards = counted(sum(1 for _ in folder.glob("*.tokens")), "shard")
    return f"stopped while {what}, with {shards} written; the same command goes on from there."


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
      progress: called all the time, by the thread of the caller; an error that it raises ends the call.
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
    state = prepare_state.begin(folder, options, size, progress)
    if "fingerprint" in state:
        _clear(folder)
        say(f"{folder} is prepared already: {_spell(state)}. Nothing to do.")
        return state
    if "survey" in state:
        say(f"going on in {folder}, after {_spell(prepare_state.manifest(state))}")
    else:
        total = sum(file["bytes"] for file in state["inputs"])
        state["survey"] = dataclasses.asdict(texts.survey(prepare_state.adding("counting", progress, total)))
        progress("counting", total, total, 0)  # files have more bytes than their texts, or fewer
    survey = Survey(**state["survey"])
    documents = texts.hold_out != "tail" or survey.texts > 1
    if (folder / tokenizer.FILE).exists():
        made = tokenizer.load(folder)
    else:
        made = _learn(texts, options, survey, documents, progress)
        prepare_state.save(folder / PROGRESS, state)
        token_writer.write(folder / tokenizer.FILE, tokenizer.dump(made).encode())
    counts = f"{counted(survey.texts, 'text')}, {counted(survey.characters, 'character')}"
    say(f"{counts}; {counted(made.size, 'token')} in the vocabulary")
    _encode(folder, texts, survey, made, made.end if documents else None, state, progress)
    manifest = prepare_state.manifest(state)
    for split, shards in manifest["splits"].items():
        if (count := sum(shard["tokens"] for shard in shards)) < 2:
            raise UserError(
                f"{counted(count, 'token')} in the {split} split: expected two or more. Use more text, or validation."
            )
    manifest["dtype"], manifest["vocab_size"] = dtype(made.size).newbyteorder("<").str, made.size
    manifest["tokenizer"] = made.fingerprint
    manifest["tokenizer_sha256"] = hashlib.sha256((folder / tokenizer.FILE).read_bytes()).hexdigest()
    manifest["fingerprint"] = token_folder.fingerprint_of(manifest)
    prepare_state.save(folder / MANIFEST, manifest)
    _clear(folder)
    say(f"{folder} is prepared: {_spell(manifest)}; fingerprint {manifest['fingerprint']}")
    return manifest


def _learn(texts: Corpus, options: Mapping[str, Any], survey: Survey, documents: bool, progress: Progress) -> Tokenizer:
    """Make the tokenizer in a thread: a library may learn for minutes, in which its thread hears of no signal."""
    tokens, size, read, left = options["tokens"], options["vocab_size"], 0, threading.Event()
    if tokens == "bytes" or tokens not in tokenizer.KINDS:
        return tokenizer.make(tokens, list, vocab_size=size, documents=documents)
    made: concurrent.futures.Future[Tokenizer] = concurrent.futures.Future()

    def learned() -> Iterator[str]:
        nonlocal read
        for piece in texts.pieces(survey):
            if left.is_set():
                raise RuntimeError("the tokenizer is no longer wanted")
            read += width(piece.text)
            if piece.split == "train" or tokens == "characters":
                yield piece.text

    def learn() -> None:
        try:
            made.set_result(tokenizer.make(tokens, learned, vocab_size=size, documents=documents))
        except BaseException as error:  # raised again where it is waited for
            made.set_exception(error)

    threading.Thread(target=learn, name="learning", daemon=True).start()
    try:
        while not made.done():
            progress("learning", read, survey.nbytes, 0)
            concurrent.futures.wait([made], _LOOK)
        progress("learning", read, survey.nbytes, 0)
    finally:
        left.set()
        concurrent.futures.wait([made], _LEAVE)
    return made.result()


def _encode(
    folder: Path,
    texts: Corpus,
    survey: Survey,
    made: Tokenizer,
    end: int | None,
    state: dict[str, Any],
    progress: Progress,
) -> None:
    add = prepare_state.adding("encoding", progress, survey.nbytes)
    writers = {
        split: Writer(
            folder,
            split,
            dtype(made.size),
            end,
            state["shard_size"],
            done,
            lambda: prepare_state.save(folder / PROGRESS, state),
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


def _clear(folder: Path) -> None:
    """Remove what a call that was stopped left."""
    for file in (folder / PROGRESS, *folder.glob("*.part")):
        file.unlink(missing_ok=True)


def _spell(manifest: Mapping[str, Any]) -> str:
    counts = []
    for split, shards in manifest["splits"].items():
        tokens, texts = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
        counts.append(f"{split} {counted(tokens, 'token')} of {counted(texts, 'text')}")
    return ", ".join(counts)
