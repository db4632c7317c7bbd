"""A folder of prepared tokens: what is in it, and how all of it is verified.

manifest.json        what there is; without it, the folder is not finished, and is refused
tokenizer.json       see `tokenizer.py`
train-00000.tokens   tokens, little-endian, 1, 2 or 4 bytes each; all shards of a split but its last have one length
train-00000.crc      a CRC-32, as little-endian uint32, for each `BLOCK` bytes of the file of tokens
train-00000.ends     for each document that ends in this shard, the place in the split after its last token, int64
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels import registry
from flaxmodels.data import tokenizer
from flaxmodels.data.split import fingerprint
from flaxmodels.registry import UserError

VERSION = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
SPLITS = ("train", "test")
# Bytes that one checksum is for. A shard holds whole blocks, so a split is one row of them.
BLOCK = 4096


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder. UserError where there is none, or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["version"] != VERSION:
            raise UserError(f"{folder / MANIFEST} has format {manifest['version']!r}: expected {VERSION}.")
        if manifest["fingerprint"] != fingerprint_of(manifest):
            raise ValueError("its fingerprint is another")
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / PROGRESS).exists():
            raise UserError(f"{folder}: prepare was not finished: run the same command again.") from error
        near = [manifest.parent.name for manifest in folder.parent.glob(f"*/{MANIFEST}")]
        raise UserError(
            f"data.path={str(folder)!r} is not a folder of prepared tokens: there is no {MANIFEST}. Make one with "
            f"flaxmodels prepare --to=FOLDER. {registry.suggest(folder.name, near)}"
        ) from error
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} can't be read: {error.strerror}.") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}. Prepare the folder again.") from error
    return dict(manifest)


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """The fingerprint of the content: of the tokens, where documents end, and the tokenizer, however it was made."""
    shards = {
        split: [[shard[key] for key in ("tokens", "documents", "sha256")] for shard in manifest["splits"][split]]
        for split in SPLITS
    }
    return fingerprint({"tokenizer": manifest["tokenizer"], "dtype": manifest["dtype"], "splits": shards})


def read_ends(folder: Path, manifest: Mapping[str, Any], split: str) -> np.ndarray:
    """(D,) int64, the place after the last token of each document of a split. UserError where they are damaged."""
    parts = [np.zeros(0, np.int64)]
    for shard in manifest["splits"][split]:
        file = folder / f"{shard['name']}.ends"
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != shard["sha256"][".ends"]:
            raise UserError(
                f"{file} is damaged or missing: it says where documents end. Prepare the folder again, or read it with "
                "data.windows='contiguous', which does not ask."
            )
        parts.append(np.frombuffer(content, "<i8").astype(np.int64))
    return np.concatenate(parts)


def verify(folder: str | Path) -> list[str]:
    """Read all of a prepared folder, and compare it with its manifest.

    Returns:
      What is wrong, a sentence for each file; empty where all is as it was written.

    Raises:
      UserError: the folder is not finished, or its manifest is damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    expected = {
        f"{shard['name']}{suffix}": sha256
        for split in SPLITS
        for shard in manifest["splits"][split]
        for suffix, sha256 in shard["sha256"].items()
    }
    wrong = []
    for name, sha256 in {tokenizer.FILE: manifest["tokenizer_sha256"], **expected}.items():
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    wrong.append(f"{folder / name} is damaged: its sha256 is not that in {MANIFEST}.")
        except OSError as error:
            wrong.append(f"{folder / name} can't be read: {error.strerror}.")
    return wrong
