import hashlib
import json
import os
import pickle
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flaxmodels.data import documents, token_files, token_folder, tokenizer
from flaxmodels.data.split import SKIP
from flaxmodels.data.token_folder import BLOCK
from flaxmodels.data.token_writer import Writer
from flaxmodels.registry import UserError

SHARD = 2 * BLOCK


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What is read here need not outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_folder(folder, tokens, ends, shard_size=SHARD, size=300):
    """A prepared folder with the same tokens in both splits; `tokens` (N,), `ends` (D,), of a vocabulary of `size`."""
    folder.mkdir(exist_ok=True)
    made = tokenizer.Words(tuple(map(str, range(size))))
    splits = {}
    for split in token_folder.SPLITS:
        state = {"shards": [], "piece": 0, "before": 0}
        writer = Writer(folder, split, tokens.dtype, None, shard_size, state, lambda: None)
        for i, text in enumerate(np.split(tokens, ends[:-1])):
            writer.append(i, text, True)
        writer.finish(len(ends))
        splits[split] = state["shards"]
    tokenizer.save(made, folder / tokenizer.FILE)
    manifest = {
        "version": token_folder.VERSION,
        "shard_size": shard_size,
        "splits": splits,
        "dtype": tokens.dtype.newbyteorder("<").str,
        "tokenizer": made.fingerprint,
        "tokenizer_sha256": hashlib.sha256((folder / tokenizer.FILE).read_bytes()).hexdigest(),
    }
    manifest["fingerprint"] = token_folder.fingerprint_of(manifest)
    (folder / token_folder.MANIFEST).write_text(json.dumps(manifest))
    return folder


def some_tokens(count, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 250, count).astype(dtype)


def some_ends(count, seed=0):
    inside = np.random.default_rng(seed).choice(np.arange(1, count), count // 50, replace=False)
    return np.append(np.sort(inside), count)


@pytest.fixture
def folder(tmp_path):
    count = 5 * SHARD + 1234
    return write_folder(tmp_path / "tokens", some_tokens(count), some_ends(count))


def opened(folder, on_corrupt="raise", split="train"):
    return token_files.open_split(folder, token_folder.read_manifest(folder), split, on_corrupt)


def sliced(tokens, start, count):
    padded = np.concatenate([tokens, np.zeros(count, tokens.dtype)])
    return np.stack([padded[min(s, len(tokens)) :][:count] for s in start])


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [pytest.param(np.uint8, marks=SLOW), np.uint16, pytest.param(np.uint32, marks=SLOW)])
@pytest.mark.parametrize("count", [1, 65, 3 * SHARD])
@pytest.mark.parametrize("total", [1, 100, SHARD, SHARD + 1, 3 * SHARD, 4 * SHARD + 77])
def test_reads_what_was_written(tmp_path, dtype, count, total):
    tokens = some_tokens(total, dtype)
    files = opened(write_folder(tmp_path / "t", tokens, np.array([total])))
    assert files.dtype == dtype and files.size == total and files.nbytes == tokens.nbytes
    random = np.random.default_rng(1).integers(0, total, 50)
    edges = [e + d for e in (0, BLOCK, SHARD, 2 * SHARD, total) for d in (-count, -1, 0, 1) if e + d >= 0]
    start = np.concatenate([random, edges, [total + 5, total + 10**7]]).astype(np.int64)
    found, ok = files.read(start, count)
    np.testing.assert_array_equal(found, sliced(tokens, start, count))
    assert found.dtype == dtype and ok.dtype == bool and ok.all() and ok.shape == start.shape
    assert files.read(start[:0], count)[0].shape == (0, count)


def count_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_reads_in_parts_and_with_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(token_files, "_CHUNK", 3 * BLOCK)
    monkeypatch.setattr(token_files, "_OPEN", 2)
    tokens, files = some_tokens(5 * SHARD + 1234), opened(folder)
    before = count_files()
    start = np.random.default_rng(1).integers(0, len(tokens), 300)
    np.testing.assert_array_equal(files.read(start, 65)[0], sliced(tokens, start, 65))
    assert count_files() == before + 2
    del files
    assert count_files() == before, "closed with what opened them"


def test_reads_in_threads_and_after_pickling(folder):
    tokens, files = some_tokens(5 * SHARD + 1234), opened(folder)
    parts = [np.random.default_rng(i).integers(0, len(tokens), 200) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for start, (found, ok) in zip(parts, pool.map(lambda start: files.read(start, 33), parts)):
            np.testing.assert_array_equal(found, sliced(tokens, start, 33))
            assert ok.all()
    again = pickle.loads(pickle.dumps(files))
    assert again == files and "_files" not in vars(again)
    np.testing.assert_array_equal(again.read(parts[0], 33)[0], sliced(tokens, parts[0], 33))


def damage(file, place=None, size=None):
    content = bytearray(file.read_bytes())
    if place is not None:
        content[place] ^= 1 << place % 8
    file.write_bytes(content[:size])


START = np.arange(0, 5 * SHARD + 1234, 50)


@pytest.mark.parametrize(
    ("name", "harm", "lost"),
    [
        ("train-00002.tokens", lambda f: damage(f, 5000), (2 * SHARD + BLOCK // 2, 2 * SHARD + BLOCK)),
        ("train-00002.tokens", lambda f: damage(f, 0), (2 * SHARD, 2 * SHARD + BLOCK // 2)),
        ("train-00005.tokens", lambda f: damage(f, -1), (5 * SHARD, 5 * SHARD + 1234)),
        ("train-00002.crc", lambda f: damage(f, 5), (2 * SHARD + BLOCK // 2, 2 * SHARD + BLOCK)),
        ("train-00002.crc", lambda f: damage(f, size=9), (2 * SHARD + BLOCK, 3 * SHARD)),
        ("train-00002.crc", lambda f: f.unlink(), (2 * SHARD, 3 * SHARD)),
        ("train-00002.tokens", lambda f: damage(f, size=BLOCK + 1), (2 * SHARD + BLOCK // 2, 3 * SHARD)),
        ("train-00002.tokens", lambda f: damage(f, size=0), (2 * SHARD, 3 * SHARD)),
        ("train-00002.tokens", lambda f: f.unlink(), (2 * SHARD, 3 * SHARD)),
        ("train-00005.tokens", lambda f: f.unlink(), (5 * SHARD, 5 * SHARD + 1234)),
    ],
)
@pytest.mark.parametrize("late", [False, pytest.param(True, marks=SLOW)])
def test_damage_is_named_or_left_out(folder, name, harm, lost, late):
    tokens, file = some_tokens(5 * SHARD + 1234), folder / name
    size = file.stat().st_size
    strict = opened(folder)
    if late:
        strict.read(START[:1], 65)  # files may be open, or not
    harm(file)
    resized = not file.exists() or file.stat().st_size != size
    first, stop = lost
    touched = (first - 65 < START) & (stop > START)
    with pytest.raises(UserError, match=rf"{name.partition('.')[0]}\.tokens: block \d+ .*tokens from {first} on\)"):
        strict.read(START, 65)
    found, ok = strict.read(START[~touched], 65)
    np.testing.assert_array_equal(found, sliced(tokens, START[~touched], 65))
    found, ok = opened(folder, "skip").read(START, 65)
    np.testing.assert_array_equal(ok, ~touched)
    np.testing.assert_array_equal(found[ok], sliced(tokens, START[ok], 65))
    assert not found[~ok].any()
    assert token_folder.verify(folder)[0].startswith(str(file)) and len(token_folder.verify(folder)) == 1
    if resized:
        with pytest.raises(UserError, match=rf"{name} (is missing|has \d+ bytes: expected \d+)\. .*on_corrupt='skip'"):
            opened(folder)


@pytest.mark.parametrize("name", ["*.tokens", "*.crc"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_which_nothing_is_there_is_refused(folder, split, name):
    """To leave out what is missing would leave nothing."""
    files = sorted(folder.glob(split + name))
    for file in files[1:]:
        file.unlink()
    token_files.tokens(str(folder), on_corrupt="skip")
    for harm in (lambda f: damage(f, size=0), lambda f: f.unlink()):
        harm(files[0])
        with pytest.raises(UserError, match=rf"has none of the 6 shards of its {split} split"):
            token_files.tokens(str(folder), on_corrupt="skip")


def test_every_flipped_bit_is_found(tmp_path):
    folder = write_folder(tmp_path / "t", some_tokens(300, np.uint8), np.array([300]))
    file = folder / "train-00000.tokens"
    whole = file.read_bytes()
    for place in range(0, 300, 7):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            assert not opened(folder, "skip").read(np.array([0]), 10)[1][0]
    file.write_bytes(whole)
    assert token_folder.verify(folder) == [] and opened(folder, "skip").read(np.array([0]), 10)[1][0]


def test_ends_are_checked(folder):
    manifest = token_folder.read_manifest(folder)
    np.testing.assert_array_equal(token_folder.read_ends(folder, manifest, "train"), some_ends(5 * SHARD + 1234))
    token_files.tokens(str(folder), windows="packed")
    for harm in (lambda f: damage(f, 9), lambda f: damage(f, size=8), lambda f: f.unlink()):
        harm(folder / "train-00001.ends")
        with pytest.raises(UserError, match=r"train-00001\.ends is damaged or missing.*windows='contiguous'"):
            token_files.tokens(str(folder), windows="packed")
        assert len(token_folder.verify(folder)) == 1
        token_files.tokens(str(folder))


def test_ends_at_the_ends_of_shards(tmp_path):
    """A document may end where a shard does, start a shard, or span several."""
    total = 4 * SHARD
    for ends in ([SHARD, total], [SHARD - 1, SHARD, SHARD + 1, total], [total], [3 * SHARD, total - 1, total]):
        folder = write_folder(tmp_path / f"t{len(ends)}{ends[0]}", some_tokens(total), np.array(ends))
        manifest = token_folder.read_manifest(folder)
        assert token_folder.read_ends(folder, manifest, "train").tolist() == ends
        assert [shard["tokens"] for shard in manifest["splits"]["train"]] == [SHARD] * 4


def all_rows(split, arrays):
    index = np.arange(split.size, dtype=np.int32)
    return split.prepare(split.gather(arrays, index), index)


@pytest.mark.parametrize("windows", ["contiguous", "packed"])
def test_the_source_gives_the_windows_of_memory(folder, windows):
    count = 5 * SHARD + 1234
    source = token_files.tokens(str(folder), length=64, windows=windows)
    memory = documents.windows(documents.Documents(some_tokens(count), some_ends(count)), windows, 64)
    for split in (source.train, source.test):
        assert split.size == memory.size and split.stored and not split.arrays
        got, expected = all_rows(split, {}), all_rows(memory, memory.arrays)
        real = np.asarray(expected["weights"]) == 1
        np.testing.assert_array_equal(got["weights"], expected["weights"])
        np.testing.assert_array_equal(np.asarray(got["targets"])[real], np.asarray(expected["targets"])[real])
        inputs = [b["inputs"] if windows == "contiguous" else b["inputs"]["tokens"] for b in (got, expected)]
        np.testing.assert_array_equal(np.asarray(inputs[0])[real], np.asarray(inputs[1])[real])
    assert source.facts == {"vocab_size": 300, "max_length": 64} and source.tokens_per_example == 64
    assert source.transforms == {"length": 64, "windows": windows} and len(source.token_bytes) == 300
    assert source.fingerprint == token_folder.read_manifest(folder)["fingerprint"]
    assert source.tokenizer == tokenizer.load(folder)


def test_a_damaged_block_weighs_nothing_and_moves_nothing(folder):
    sound = all_rows(token_files.tokens(str(folder), length=64).train, {})
    damage(folder / "train-00002.tokens", 0)
    split = token_files.tokens(str(folder), length=64, on_corrupt="skip").train
    rows = split.gather({}, np.arange(split.size, dtype=np.int32))
    skipped = rows.pop(SKIP)
    assert 32 <= skipped.sum() <= 34, "a block of 2048 tokens, in windows of 64"
    found = split.prepare(rows, np.arange(split.size, dtype=np.int32))
    np.testing.assert_array_equal(np.asarray(found["targets"])[~skipped], np.asarray(sound["targets"])[~skipped])


def test_fingerprint_is_that_of_the_content(tmp_path):
    tokens, ends = some_tokens(3 * SHARD), some_ends(3 * SHARD)
    first = token_files.tokens(str(write_folder(tmp_path / "a", tokens, ends)))
    again = token_files.tokens(str(write_folder(tmp_path / "b", tokens, ends)))
    assert first.fingerprint == again.fingerprint
    changed = tokens.copy()
    changed[-1] ^= 1
    others = [
        write_folder(tmp_path / "c", changed, ends),
        write_folder(tmp_path / "d", tokens, ends[1:]),
        write_folder(tmp_path / "e", tokens, ends, size=301),
    ]
    assert len({token_files.tokens(str(f)).fingerprint for f in others} | {first.fingerprint}) == 4


def test_folders_that_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match=r"is not a folder of prepared tokens.*Did you mean 'tokens'"):
        token_files.tokens(str(tmp_path / "token"))
    (folder / "manifest.json").rename(folder / "kept")
    (folder / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="prepare was not finished: run the same command again"):
        token_files.tokens(str(folder))
    manifest = json.loads((folder / "kept").read_text())
    for content, message in [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged: 'version'"),
        (json.dumps({**manifest, "version": 2}), "has format 2: expected 1"),
        (json.dumps({**manifest, "fingerprint": "0"}), "is damaged: its fingerprint is another"),
        (json.dumps({**manifest, "dtype": "|u1"}), "is damaged: its fingerprint is another"),
    ]:
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=rf"manifest\.json {message}"):
            token_files.tokens(str(folder))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tokenizer.save(tokenizer.Bytes(), folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the one that the tokens were made with"):
        token_files.tokens(str(folder))


def test_too_few_tokens_for_a_window(tmp_path):
    folder = write_folder(tmp_path / "t", some_tokens(64), np.array([64]))
    token_files.tokens(str(folder), length=63)
    with pytest.raises(UserError, match=r"64 tokens in the train split make no window of data\.length=64"):
        token_files.tokens(str(folder), length=64)


def test_more_tokens_than_int32_counts(tmp_path):
    """Files with holes: 2**31 tokens and some, of which the disk holds the last ones only."""
    folder, total = tmp_path / "t", 2**31 + BLOCK + 10
    write_folder(folder, some_tokens(total % BLOCK, np.uint8), np.array([total % BLOCK]), shard_size=2**32)
    tail = (folder / "train-00000.tokens").read_bytes()
    with (folder / "train-00000.tokens").open("wb") as file:
        file.seek(total - len(tail))
        file.write(tail)
    sums = np.full(-(-total // BLOCK), zlib.crc32(bytes(BLOCK)), "<u4")
    sums[-1] = zlib.crc32(tail)
    (folder / "train-00000.crc").write_bytes(sums.tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][0]["tokens"] = total
    manifest["fingerprint"] = token_folder.fingerprint_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    source = token_files.tokens(str(folder), length=2)
    last = source.train.gather({}, np.array([source.train.size - 1, 0], np.int32))
    assert last["tokens"][0, :2].tolist() == list(tail[-2:]) and not last["tokens"][1].any()
    with pytest.raises(UserError, match=r"too many windows of data\.length=1: .*Use at least data\.length=2"):
        token_files.tokens(str(folder), length=1)


READ_ALL = """
import sys
import numpy as np
from flaxmodels.data import token_files
files = token_files.tokens(sys.argv[1], length=64).train.gather.keywords["tokens"]
rows = np.random.default_rng(0).permutation(files.size // 64)
for start in range(0, len(rows), 1024):
    files.read(rows[start : start + 1024] * np.int64(64), 65)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(tmp_path):
    peaks = []
    for megabytes in (4, 100):
        folder = write_folder(
            tmp_path / str(megabytes), some_tokens(megabytes << 19), np.array([megabytes << 19]), 2**24
        )
        done = subprocess.run([sys.executable, "-c", READ_ALL, str(folder)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) >> 10)
    # The order itself takes 16 bytes a window while it is made, here 12 MiB.
    assert peaks[1] - peaks[0] < 20, f"{peaks} MiB"
