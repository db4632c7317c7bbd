"""How a folder of prepared tokens is written: shard after shard, each of them whole, or not there.

Read `Writer` first. The files of a shard are listed in `token_folder.py`.
"""

import array
import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels.data.token_folder import BLOCK


class Writer:
    """The tokens of one split, into shards of one length, from where an earlier writer stopped.

    Args:
      folder: where.
      split: its name.
      dtype: of a token.
      end: the token after each text; None for none.
      shard_size: tokens in a shard.
      state: {"shards": what `Shard.commit` gave, "piece": the first piece that is not in them whole, "before": how many
        tokens were before it}. It is kept up to date.
      committed: called after each shard.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype[Any],
        end: int | None,
        shard_size: int,
        state: dict[str, Any],
        committed: Callable[[], None],
    ) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype.newbyteorder("<")
        self._end = np.array([] if end is None else [end], self._dtype)
        self._shard_size, self._state, self._committed = shard_size, state, committed
        self._written = sum(shard["tokens"] for shard in state["shards"])
        self._shard: Shard | None = None
        self.first, self._total = state["piece"], state["before"]

    def append(self, piece: int, ids: np.ndarray, closed: bool) -> None:
        """Add the tokens of a piece of a text, from `first` on; `closed` where the text ends with it."""
        ids = np.concatenate([ids.astype(self._dtype, copy=False), self._end[: int(closed)]])
        before, self._total = self._total, self._total + len(ids)
        ids = ids[max(0, self._written - before) :]
        while len(ids):
            # A full shard waits for the next token: until then, the text before it may still end there.
            if self._shard is not None and self._shard.tokens == self._shard_size:
                self._commit(piece, before)
            if self._shard is None:
                self._shard = Shard(self._folder, f"{self._split}-{len(self._state['shards']):05d}")
            room = self._shard_size - self._shard.tokens
            self._shard.append(ids[:room])
            ids = ids[room:]
        if closed:
            self._note_end()

    def _note_end(self) -> None:
        if self._shard is not None and (not self._shard.ends or self._shard.ends[-1] != self._total):
            self._shard.ends.append(self._total)

    def finish(self, pieces: int) -> None:
        """Write the last shard, after that many pieces. A text that was cut ends there, too."""
        if self._shard is not None:
            self._note_end()
            self._commit(pieces, self._total)

    def _commit(self, piece: int, before: int) -> None:
        assert self._shard is not None
        self._state["shards"].append(self._shard.commit())
        self._state.update(piece=piece, before=before)
        self._shard = None
        self._committed()

    def close(self) -> None:
        """Give up what is not committed."""
        if self._shard is not None:
            self._shard.close()


class Shard:
    """A shard that is being written. Its files have other names until `commit`.

    Args:
      folder: where.
      name: of the files, without the suffix.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.tokens = 0
        self.ends = array.array("q")
        self._file = (folder / f"{name}.tokens.part").open("wb")
        self._hash, self._checksums, self._rest = hashlib.sha256(), array.array("I"), b""

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens (N,), of a little-endian dtype."""
        self.tokens += len(tokens)
        content = self._rest + tokens.tobytes()
        whole = len(content) - len(content) % BLOCK
        self._rest = content[whole:]
        self._write(content[:whole])

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._checksums.extend(zlib.crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))

    def commit(self) -> dict[str, Any]:
        """Make the files durable, and give them their names; what the manifest says about them."""
        self._write(self._rest)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        checksums, ends = np.array(self._checksums, "<u4").tobytes(), np.array(self.ends, "<i8").tobytes()
        write(self.folder / f"{self.name}.crc", checksums)
        write(self.folder / f"{self.name}.ends", ends)
        rename(self.folder / f"{self.name}.tokens.part")
        sha256 = {".crc": hashlib.sha256(checksums).hexdigest(), ".ends": hashlib.sha256(ends).hexdigest()}
        sha256[".tokens"] = self._hash.hexdigest()
        return {"name": self.name, "tokens": self.tokens, "documents": len(self.ends), "sha256": sha256}

    def close(self) -> None:
        """Give up: what was not committed has no name that a reader looks at."""
        with contextlib.suppress(OSError):  # of a full disk, once more
            self._file.close()


def write(path: Path, content: bytes) -> None:
    """Write a file that is there whole, or not at all, whenever the machine stops."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(part)


def rename(part: Path) -> None:
    """Take the ".part" off a name, durably."""
    part.rename(part.with_suffix(""))
    descriptor = os.open(part.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
