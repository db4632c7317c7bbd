"""Tokens on disk, read block by block: `TokenFiles`, and the source `tokens`. The format is that of `token_folder.py`.

A block is checked whenever it is read: so damage is found in constant memory, and a start does not read all there is.
"""

import array
import dataclasses
import functools
import itertools
import os
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxmodels.data import documents, tokenizer
from flaxmodels.data.split import Source
from flaxmodels.data.token_folder import BLOCK, SPLITS, read_ends, read_manifest
from flaxmodels.registry import Positive, UserError

# Bytes read into memory at a time, and files kept open.
_CHUNK, _OPEN = 2**22, 256


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """The tokens of one split, on disk: it looks like a flat array, and takes no memory.

    It may be read from several threads, and pickled.

    Attributes:
      folder: where the shards are.
      shards: their names, without the suffix.
      shard_size: tokens in each of them but the last; whole blocks.
      size: tokens in all of them.
      dtype: of a token.
      on_corrupt: what `read` does with a block that is damaged or missing: an error, or windows that are not ok.
    """

    folder: str
    shards: tuple[str, ...]
    shard_size: int
    size: int
    dtype: np.dtype[Any]
    on_corrupt: Literal["raise", "skip"] = "raise"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFiles, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def nbytes(self) -> int:
        """Bytes on disk, without checksums."""
        return self.size * self.dtype.itemsize

    def read(self, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Read windows.

        Args:
          start: (B,) int64, the places of their first tokens; each at least 0.
          count: tokens in each, at least 1.

        Returns:
          (B, count) tokens, zeros past the end; and (B,) bool, False where a block is damaged: zeros, too.

        Raises:
          UserError: a block is damaged or missing, and `on_corrupt` is "raise".
        """
        start = np.asarray(start, np.int64)
        found, ok = np.zeros((len(start), count), self.dtype), np.ones(len(start), bool)
        step = max(1, _CHUNK // (count * self.dtype.itemsize + BLOCK))
        for at in range(0, len(start), step):
            part = slice(at, at + step)
            self._read(start[part], found[part], ok[part])
        return found, ok

    def _read(self, start: np.ndarray, found: np.ndarray, ok: np.ndarray) -> None:
        count, itemsize = found.shape[1], self.dtype.itemsize
        there = np.clip(self.size - start, 0, count)
        first = start * itemsize // BLOCK
        touched = np.where(there > 0, (start + there) * itemsize - 1, first * BLOCK - 1) // BLOCK - first + 1
        nth = np.arange(touched.max(initial=0))
        # Each block once, however many windows touch it; those of a window stand side by side.
        blocks = np.unique((first[:, None] + nth)[nth < touched[:, None]])
        content, sound = self._blocks(blocks, count * itemsize)
        at = np.searchsorted(blocks, first)
        views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, self.dtype), count)
        found[:] = views[np.minimum((at - first) * (BLOCK // itemsize) + start, len(views) - 1)]
        failed = np.concatenate([[0], np.cumsum(~sound)])
        ok[:] = failed[at + touched] == failed[at]
        if (there < count).any() or not ok.all():
            found[(np.arange(count) >= there[:, None]) | ~ok[:, None]] = 0

    def _blocks(self, blocks: np.ndarray, room: int) -> tuple[bytes, np.ndarray]:
        """The content of blocks, (K,) ascending, side by side, and `room` bytes more; and which are sound, (K,)."""
        in_shard = self.shard_size * self.dtype.itemsize // BLOCK
        cuts = np.flatnonzero((np.diff(blocks) != 1) | (blocks[1:] % in_shard == 0)) + 1
        runs = np.concatenate([[0], cuts, [len(blocks)]]).tolist() if len(blocks) else [0]
        parts, sound = [], np.ones(len(blocks), bool)
        for begin, end in itertools.pairwise(runs):
            shard, block = divmod(int(blocks[begin]), in_shard)
            size = min((end - begin) * BLOCK, self.nbytes - int(blocks[begin]) * BLOCK)
            part = self._files.read(shard, block * BLOCK, size)
            for i in range(end - begin):
                piece = part if end - begin == 1 else part[i * BLOCK : (i + 1) * BLOCK]
                cut_off = len(part) < size and len(piece) < BLOCK
                if cut_off or zlib.crc32(piece) != self._files.checksum(shard, block + i):
                    sound[begin + i] = False
                    self._refuse(shard, block + i)
            parts.append(part.ljust((end - begin) * BLOCK, b"\0"))
        return b"".join([*parts, bytes(room)]), sound

    def _refuse(self, shard: int, block: int) -> None:
        if self.on_corrupt == "raise":
            file, each = Path(self.folder) / f"{self.shards[shard]}.tokens", BLOCK // self.dtype.itemsize
            raise UserError(
                f"{file}: block {block} (bytes {block * BLOCK} to {(block + 1) * BLOCK - 1}, tokens from "
                f"{shard * self.shard_size + block * each} on) is damaged or missing: it is not what its checksum in "
                f"{file.stem}.crc says. Prepare the folder again, or leave such windows out: data.on_corrupt='skip'."
            )

    @functools.cached_property
    def _files(self) -> "_Files":
        return _Files([str(Path(self.folder) / name) for name in self.shards])


class _Files:
    """The files of a split, opened in this process when they are first read. Some of them may be missing."""

    def __init__(self, paths: list[str]) -> None:
        self._paths, self._lock = paths, threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._checksums: dict[int, Sequence[int]] = {}
        weakref.finalize(self, _close, self._descriptors)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the tokens of a shard; fewer where it is cut off, none where it is missing."""
        try:
            if (descriptor := self._descriptors.get(shard)) is not None:
                return os.pread(descriptor, size, offset)
            with self._lock:
                if shard not in self._descriptors and len(self._descriptors) < _OPEN:
                    self._descriptors[shard] = os.open(f"{self._paths[shard]}.tokens", os.O_RDONLY)
            if shard in self._descriptors:
                return os.pread(self._descriptors[shard], size, offset)
            with Path(f"{self._paths[shard]}.tokens").open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError:  # not there, or a sector that the disk can't read
            return b""

    def checksum(self, shard: int, block: int) -> int:
        """The checksum that a block must have; -1, which none has, where it is missing."""
        table = self._checksums.get(shard)
        if table is None:
            try:
                content = Path(f"{self._paths[shard]}.crc").read_bytes()
            except OSError:
                content = b""
            found = np.frombuffer(content[: len(content) // 4 * 4], "<u4")
            table = self._checksums[shard] = array.array("I", found.astype(np.uintc).tobytes())
        return table[block] if block < len(table) else -1


def _close(descriptors: Mapping[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def tokens(
    path: str,
    length: Positive = 64,
    windows: Literal["contiguous", "packed"] = "contiguous",
    on_corrupt: Literal["raise", "skip"] = "raise",
) -> Source:
    """Text that `flaxmodels prepare` turned into tokens, read from disk in constant memory.

    Args:
      path: the folder.
      length: tokens in a context window.
      windows: "contiguous": documents are one long text; "packed": attention and loss never cross from one to another.
      on_corrupt: what to do about a block that is damaged or missing: an error, or windows without weight.

    Raises:
      UserError: no such folder, not finished, damaged, or too short for `length`.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    found = tokenizer.load(folder)
    if found.fingerprint != manifest["tokenizer"]:
        raise UserError(f"{folder / tokenizer.FILE} is not the one that the tokens were made with. Prepare them again.")
    splits = {}
    for split in SPLITS:
        files = open_split(folder, manifest, split, on_corrupt)
        least = length + 1 if split == "train" else 2
        if files.size < least:
            raise UserError(
                f"data.path={path!r}: {files.size} tokens in the {split} split make no window of data.length={length} "
                "and a token to predict. Use a smaller length, or prepare more text."
            )
        if windows == "contiguous" and files.size // length >= 2**31:
            raise UserError(
                f"data.path={path!r}: {files.size} tokens make too many windows of data.length={length}: expected "
                f"fewer than 2**31. Use at least data.length={files.size // (2**31 - 1) + 1}."
            )
        ends = np.array([files.size]) if windows == "contiguous" else read_ends(folder, manifest, split)
        splits[split] = documents.windows(documents.Documents(files, ends), windows, length)
    return Source(
        "tokens",
        splits["train"],
        splits["test"],
        facts={"vocab_size": found.size, "max_length": length},
        fingerprint=manifest["fingerprint"],
        tokens_per_example=length,
        token_bytes=found.token_bytes,
        transforms={"length": length, "windows": windows},
        tokenizer=found,
    )


def open_split(
    folder: Path, manifest: Mapping[str, Any], split: str, on_corrupt: Literal["raise", "skip"] = "raise"
) -> TokenFiles:
    """The tokens of a split. UserError where a file is missing or of another size; with "skip", where all are."""
    shards, dtype = manifest["splits"][split], np.dtype(manifest["dtype"])
    for shard in shards if on_corrupt == "raise" else ():
        size = shard["tokens"] * dtype.itemsize
        for suffix, expected in ((".tokens", size), (".crc", -(-size // BLOCK) * 4)):
            file = folder / f"{shard['name']}{suffix}"
            there = file.stat().st_size if file.is_file() else None
            if there != expected:
                said = "is missing" if there is None else f"has {there} bytes: expected {expected}"
                raise UserError(
                    f"{file} {said}. Prepare the folder again, or leave what is missing out: data.on_corrupt='skip'."
                )
    names = tuple(shard["name"] for shard in shards)
    if on_corrupt == "skip" and not any(
        _there(folder / f"{name}.tokens") and _there(folder / f"{name}.crc") for name in names
    ):
        raise UserError(
            f"{folder} has none of the {len(names)} shards of its {split} split: there is nothing that could be left "
            "in. Copy or prepare the folder again."
        )
    total = sum(shard["tokens"] for shard in shards)
    return TokenFiles(str(folder.absolute()), names, manifest["shard_size"], total, dtype, on_corrupt)


def _there(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
