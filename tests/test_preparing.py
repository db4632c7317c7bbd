import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import (
    corpus,
    held_out,
    preparing,
    tables,
    text,
    token_files,
    token_folder,
    token_writer,
    tokenizer,
)
from flaxmodels.registry import UserError

SHARD = 4096
LINES = [f"Line {i}: {'word ' * (i % 7)}größe {i * i} 🎉!" for i in range(900)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """These folders need not outlive the machine; one test says when all must be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def prepare(name, options, to, stream=None, shard_size=SHARD):
    return preparing.prepare_source(name, options, to, stream or io.StringIO(), shard_size)


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def tokens_of(folder, split):
    files = token_files.open_split(folder, token_folder.read_manifest(folder), split)
    return files.read(np.zeros(1, np.int64), files.size)[0][0]


def ends_of(folder, split):
    return token_folder.read_ends(folder, token_folder.read_manifest(folder), split)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n")
    return {"path": str(path)}


def write_files(folder, kind):
    """The same texts in every format; the options that read them."""
    folder.mkdir()
    path = folder / f"a.{kind}"
    options = {"path": str(path)} if kind in ("text", "lines") else {"path": str(path), "text": "words"}
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": i, "words": line}) + "\n" for i, line in enumerate(LINES)))
    elif kind == "csv":
        path.write_text("n,words\n" + "".join(f'{i},"{line}"\n' for i, line in enumerate(LINES)))
    elif kind == "tsv":
        path.write_text("n\twords\n" + "".join(f"{i}\t{line}\n" for i, line in enumerate(LINES)))
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"words": LINES, "n": list(range(len(LINES)))})
        parquet.write_table(table, path)
    else:
        path.write_text("\n".join(LINES) + "\n")
    return options


@pytest.mark.parametrize(
    ("kind", "tokens", "vocab_size"),
    [
        pytest.param(
            kind, tokens, size, marks=[] if tokens == "bytes" or kind in ("text", "lines") else pytest.mark.slow
        )
        for kind in corpus.SOURCES
        for tokens, size in (("bytes", None), ("characters", None), ("words", 200), ("bpe", 400))
    ],
)
def test_prepared_is_what_the_source_reads(tmp_path, kind, tokens, vocab_size):
    """Tokens, splits and tokenizer are those that the source of the same name makes in memory."""
    options = {**write_files(tmp_path / "in", kind), "tokens": tokens, "vocab_size": vocab_size, "validation": 0.2}
    manifest = prepare(kind, options, tmp_path / "out")
    source = corpus.SOURCES[kind](**options, length=16, windows="contiguous")
    assert tokenizer.load(tmp_path / "out") == source.tokenizer
    assert manifest["vocab_size"] == source.tokenizer.size
    for split in token_folder.SPLITS:
        expected = getattr(source, split).arrays["tokens"]
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), expected)
        ends = ends_of(tmp_path / "out", split)
        assert ends[-1] == len(expected)
        if kind != "text":
            np.testing.assert_array_equal(ends, np.flatnonzero(expected == source.tokenizer.end) + 1)
    assert token_folder.verify(tmp_path / "out") == []


def test_counts_are_those_of_the_lines(tmp_path, lines):
    manifest = prepare("lines", {**lines, "validation": 0.3}, tmp_path / "out")
    held = [held_out.by_content(line, 0.3) for line in LINES]
    for split, chosen in (("train", False), ("test", True)):
        texts = [line.encode() for line, out in zip(LINES, held) if out == chosen]
        shards = manifest["splits"][split]
        assert sum(shard["documents"] for shard in shards) == len(texts)
        assert sum(shard["tokens"] for shard in shards) == sum(len(line) + 1 for line in texts)
        assert {shard["tokens"] for shard in shards[:-1]} == {SHARD} and len(shards) > 1
        joined = b"".join(texts)
        found = tokens_of(tmp_path / "out", split)
        assert found[found < 256].astype(np.uint8).tobytes() == joined
        np.testing.assert_array_equal(ends_of(tmp_path / "out", split), np.cumsum([len(line) + 1 for line in texts]))
    assert manifest["survey"] == {
        "texts": 900, "pieces": 900, "characters": sum(map(len, LINES)), "nbytes": sum(len(x.encode()) for x in LINES),
    }  # fmt: skip


def test_several_files_end_each_and_the_tail_is_held_out(tmp_path):
    texts = ["one\r\n" * 900, "two" * 1000, "", "drei\n" * 500]
    for i, each in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(each.encode())
    options = {"path": str(tmp_path / "*.txt"), "validation": 0.4}
    prepare("text", {**options, "tokens": "bytes"}, tmp_path / "out")
    source = flaxmodels.data.load("text", **options, tokens="bytes", length=16)
    for split in token_folder.SPLITS:
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), getattr(source, split).arrays["tokens"])
    whole = "".join(texts)
    left = len(whole) - round(len(whole) * 0.4)
    assert left == 4500 + 1500
    assert ends_of(tmp_path / "out", "train").tolist() == [4501, 6001], "the second is cut, and has no end there"
    assert ends_of(tmp_path / "out", "test").tolist() == [1501, 1501 + 2501]


def test_texts_that_are_given_are_held_out(tmp_path, lines):
    (tmp_path / "test.txt").write_text("held\nout\n")
    prepare("lines", {**lines, "test_path": str(tmp_path / "test.txt"), "tokens": "characters"}, tmp_path / "out")
    made = tokenizer.load(tmp_path / "out")
    assert made.decode(tokens_of(tmp_path / "out", "test")) == "heldout"
    assert made.decode(tokens_of(tmp_path / "out", "train")) == "".join(LINES)
    assert len(token_folder.read_manifest(tmp_path / "out")["inputs"]) == 2


def test_a_tokenizer_that_is_there(tmp_path, lines):
    made = tokenizer.train("bpe", lambda: LINES, vocab_size=500, documents=True)
    tokenizer.save(made, tmp_path / "mine.json")
    manifest = prepare("lines", {**lines, "tokens": str(tmp_path / "mine.json")}, tmp_path / "out")
    assert manifest["tokenizer"] == made.fingerprint and manifest["vocab_size"] == made.size
    assert manifest["dtype"] == "<u2" and "learning" not in str(manifest)
    prepare("text", {**lines, "tokens": str(tmp_path / "mine.json")}, tmp_path / "text")
    assert made.end not in tokens_of(tmp_path / "text", "test"), "one text alone needs no end"
    assert made.end in tokens_of(tmp_path / "out", "train")
    (tmp_path / "mine.json").rename(tmp_path / "moved.json")
    prepare("lines", {**lines, "tokens": str(tmp_path / "moved.json")}, tmp_path / "out")


def test_it_can_be_trained_on(tmp_path):
    folder = shared_data("tiny_shakespeare")
    prepare("text", {"path": str(folder / "input.txt"), "tokens": "characters"}, tmp_path / "out", shard_size=2**16)
    source = token_files.tokens(str(tmp_path / "out"), length=64)
    memory = flaxmodels.data.load("text", path=str(folder / "input.txt"), length=64)
    index = np.array([0, 5, source.train.size - 1, -1], np.int32)
    for split, expected in ((source.train, memory.train), (source.test, memory.test)):
        assert split.size == expected.size
        index[2] = split.size - 1
        got = split.prepare(split.gather({}, index), index)
        want = expected.prepare(expected.gather(expected.arrays, index), index)
        np.testing.assert_array_equal(got["weights"], want["weights"])
        for name in ("inputs", "targets"):
            real = np.asarray(want["weights"]) == 1
            np.testing.assert_array_equal(np.asarray(got[name])[real], np.asarray(want[name])[real])
    assert source.facts == memory.facts and source.token_bytes == memory.token_bytes


class Stopped(BaseException):
    """As a kill is: nothing catches it."""


def test_stopped_between_any_two_changes_it_goes_on(tmp_path, lines, monkeypatch):
    """The folder changes by renames. Stopped before any of them, the same call ends with the same bytes."""
    options = {**lines, "tokens": "bpe", "vocab_size": 300, "validation": 0.3}
    rename, left = token_writer.rename, 10**6

    def stopping(part):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        rename(part)

    monkeypatch.setattr(token_writer, "rename", stopping)
    prepare("lines", options, tmp_path / "whole", shard_size=2 * SHARD)
    renames, expected = 10**6 - left, content(tmp_path / "whole")
    assert renames > 12
    for before in range(renames):
        folder, left = tmp_path / f"out{before}", before
        with pytest.raises(Stopped):
            prepare("lines", options, folder, shard_size=2 * SHARD)
        with pytest.raises(UserError, match=r"not finished|not a folder of prepared tokens"):
            token_files.tokens(str(folder))
        left = 10**6
        prepare("lines", options, folder, shard_size=2 * SHARD)
        assert content(folder) == expected, f"stopped before change {before}"


def test_stopped_again_and_again_it_comes_to_an_end(tmp_path, lines, monkeypatch):
    """A call that gets as far as one shard and its note is not in vain."""
    commit, calls = token_writer.Shard.commit, 0
    prepare("lines", lines, tmp_path / "whole")
    left = 0

    def stopping(shard):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return commit(shard)

    monkeypatch.setattr(token_writer.Shard, "commit", stopping)
    while not (tmp_path / "out" / "manifest.json").exists():
        calls, left = calls + 1, 1
        with contextlib.suppress(Stopped):
            prepare("lines", lines, tmp_path / "out")
    assert 5 < calls < 20 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, lines, monkeypatch):
    """A file is synced as it is, then renamed, and then its folder is synced: before anything else is renamed."""
    rename, events = token_writer.rename, []

    def renaming(part):
        events.append(part)
        rename(part)

    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    monkeypatch.setattr(token_writer, "rename", renaming)
    prepare("lines", lines, tmp_path / "out")
    renamed = [(i, part) for i, part in enumerate(events) if not isinstance(part, str)]
    assert {part.stem for _, part in renamed} - {"progress.json"} == set(content(tmp_path / "out"))
    for i, part in renamed:
        assert str(part) in events[:i] and events[i + 1] == str(tmp_path / "out")


STOPPED = """
import json, os, sys, time
from flaxmodels.data import corpus, preparing, prepare_display, tokenizer
what, number, name, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
seen, sent = prepare_display._Lines.progress, []
def progress(lines, now, done, total, tokens):
    seen(lines, now, done, total, tokens)
    if now == what and not sent and (now != "encoding" or tokens > 10_000):
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)
prepare_display._Lines.progress = progress
make = tokenizer.make
def slow(*arguments, **options):
    made = make(*arguments, **options)
    while what == "learning" and not sent:  # as a library that learns is, for minutes
        time.sleep(0.01)
    if what == "learning":
        time.sleep(60)
    return made
tokenizer.make = slow
preparing._LEAVE = 0.1
preparing._BATCH = corpus._READ = 2**10
try:
    preparing.prepare_source(name, options, sys.argv[5], sys.stdout, 4096)
except preparing.StoppedError as error:
    assert time.monotonic() - sent[0] < 30  # where it is to be stopped while it learns, that takes 60
    print(error)
    sys.exit(128 + error.signal)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("reading", "with nothing written yet; the same command starts again"),
        ("counting", "with nothing written yet; the same command starts again"),
        ("learning", "with nothing written yet; the same command starts again"),
        ("encoding", r"with \d+ shards written; the same command goes on from there"),
    ],
)
def test_a_signal_stops_it_soon(tmp_path, run, lines, what, said):
    """Whatever it is at; and the same call ends with the bytes of one that was never stopped."""
    number = signal.SIGINT
    options = {**lines, "tokens": "bpe", "vocab_size": 300}
    done = run("-c", STOPPED, what, int(number), "lines", json.dumps(options), tmp_path / "out", timeout=120)
    assert done.returncode == 128 + number and done.stderr == "", done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"{number.name}: stopped while {what}, {said}\.", last)
    if what == "encoding":
        written = [f.name for f in (tmp_path / "out").glob("*.tokens")]
        assert f"with {len(written)} shards" in last and len(written) > 1
    prepare("lines", options, tmp_path / "out")
    prepare("lines", options, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_error_of_what_is_learned_is_the_error_of_the_call(tmp_path):
    """Although a thread learns."""
    rows = [json.dumps({"t": text}) for text in (*(f"x{i}" for i in range(99)), "\ud800")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="is half of a character"):
        options = {"path": str(tmp_path / "a.jsonl"), "text": "t", "tokens": "bpe", "vocab_size": 300}
        prepare("jsonl", options, tmp_path / "out")
    assert not [thread for thread in threading.enumerate() if thread.name == "learning"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from flaxmodels.data import preparing, token_files, token_folder
from flaxmodels.registry import UserError
path, to, seed, length, whole = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
random.seed(seed)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        options = {"path": path, "tokens": "bpe", "vocab_size": 280, "validation": 0.2}
        with open(os.devnull, "w") as stream:
            preparing.prepare_source("text", options, to, stream, 4096)
        os._exit(0)
    if kills < 15:
        time.sleep(random.uniform(0, length))
        os.kill(child, signal.SIGKILL)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break
    kills += 1
    try:
        token_files.tokens(to)
    except UserError:
        continue
    # The kill came when all was done, but for tidying up.
    if any(file.read_bytes() != Path(to, file.name).read_bytes() for file in Path(whole).iterdir()):
        sys.exit("a folder that is not finished was read")
print(kills)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((shared_data("tiny_shakespeare") / "input.txt").read_text()[:400_000])
    options = {"path": str(path), "tokens": "bpe", "vocab_size": 280, "validation": 0.2}
    prepare("text", options, tmp_path / "whole")
    kills = 0
    for seed in range(3):
        folder = tmp_path / f"out{seed}"
        command = [sys.executable, "-c", KILLED, path, folder, seed, 0.2, tmp_path / "whole"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        kills += int(done.stdout)
        assert content(folder) == content(tmp_path / "whole")
    assert kills >= 10


def half_done(folder, name, options, monkeypatch, shards=2):
    """Stop after some shards."""
    commit = token_writer.Shard.commit
    count = 0

    def stopping(shard):
        nonlocal count
        if count == shards:
            raise Stopped
        count += 1
        return commit(shard)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer.Shard, "commit", stopping)
        with pytest.raises(Stopped):
            prepare(name, options, folder)


def test_it_does_not_start_over(tmp_path, lines, monkeypatch):
    """What is in the shards is not encoded again, and the tokenizer is not trained again."""
    options = {**lines, "tokens": "bpe", "vocab_size": 300}
    half_done(tmp_path / "out", "lines", options, monkeypatch, shards=3)
    first = (tmp_path / "out" / "train-00000.tokens").stat()
    encoded = []
    many = tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda made, texts: encoded.extend(texts) or many(made, texts))
    monkeypatch.setattr(tokenizer, "train", lambda *_, **__: pytest.fail("trained again"))
    stream = io.StringIO()
    prepare("lines", options, tmp_path / "out", stream)
    again = (tmp_path / "out" / "train-00000.tokens").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert 0 < len(encoded) < 600 and "going on in" in stream.getvalue()


def test_what_is_all_in_shards_is_not_encoded_again(tmp_path, lines, monkeypatch):
    def stopping(manifest):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(token_folder, "fingerprint_of", stopping)
        with pytest.raises(Stopped):
            prepare("lines", lines, tmp_path / "out")
    monkeypatch.setattr(tokenizer, "encode_many", lambda made, texts: [pytest.fail("encoded again") for _ in texts])
    prepare("lines", lines, tmp_path / "out")


@pytest.mark.parametrize("finished", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "characters"}, r"options\.tokens was 'bytes', and is 'characters' now"),
        ({"tokens": "words", "vocab_size": 50}, r"options\.\w+ was .*, and is .* now"),
        ({"validation": 0.2}, r"options\.validation was 0\.1, and is 0\.2 now"),
        ({"encoding": "latin-1"}, r"options\.encoding was 'utf-8', and is 'latin-1' now"),
        ("name", r"options\.\w+ was"),
        ("shard_size", r"shard_size was 4096, and is 8192 now"),
        ("content", r"inputs\[0\]\.sha256 was '\w+', and is '\w+' now"),
        ("size", r"inputs\[0\]\.bytes was \d+, and is \d+ now"),
        ("file", r"inputs was 1 files, and is 2 files now"),
        ("moved", ""),
    ],
)
def test_something_else_is_refused_by_name(tmp_path, lines, monkeypatch, change, message, finished):
    options, folder, path = lines, tmp_path / "out", tmp_path / "lines.txt"
    if finished:
        prepare("lines", options, folder)
    else:
        half_done(folder, "lines", options, monkeypatch)
    before, name, shard_size = content(folder), "lines", SHARD
    if isinstance(change, dict):
        options = {**options, **change}
    elif change == "name":
        name, options = "text", {**options, "tokens": "bytes"}
    elif change == "shard_size":
        shard_size = 2 * SHARD
    elif change == "content":
        path.write_bytes(path.read_bytes().replace(b"Line 5", b"line 5"))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"more\n")
    elif change == "file":
        (tmp_path / "more.txt").write_text("more\n")
        options = {"path": (str(path), str(tmp_path / "more.txt"))}
    else:  # the same files elsewhere are the same
        (tmp_path / "elsewhere").mkdir()
        options = {"path": str(path.rename(tmp_path / "elsewhere" / "lines.txt"))}
        prepare(name, options, folder)
        return
    if isinstance(change, dict) or change in ("name", "shard_size"):  # found before all files are read once more
        monkeypatch.setattr(corpus, "describe", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=rf"out was made with something else: {message}.*Choose another"):
        prepare(name, options, folder, shard_size=shard_size)
    assert content(folder) == before


def test_a_finished_folder_says_so(tmp_path, lines):
    first = prepare("lines", lines, tmp_path / "out")
    (tmp_path / "out" / "progress.json").write_text("{}")  # as if killed after the manifest
    before, stream = content(tmp_path / "out"), io.StringIO()
    assert prepare("lines", lines, tmp_path / "out", stream) == first
    assert re.search(r"is prepared already: train \d+ tokens of \d+ texts, test .*Nothing to do", stream.getvalue())
    (tmp_path / "a.txt").write_text("word " * 900)
    prepare("text", {"path": str(tmp_path / "a.txt"), "tokens": "bytes"}, tmp_path / "one", stream)
    assert "1 text, 4500 characters" in stream.getvalue() and "4050 tokens of 1 text," in stream.getvalue()
    before.pop("progress.json")
    assert content(tmp_path / "out") == before


def test_no_space_left(tmp_path, lines, monkeypatch):
    fsync, left = os.fsync, 9

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"can't be written: No space left on device\. .*run the same command again"
        ):
            prepare("lines", lines, tmp_path / "out")
    with pytest.raises(UserError, match="prepare was not finished"):
        token_files.tokens(str(tmp_path / "out"))
    prepare("lines", lines, tmp_path / "out")
    prepare("lines", lines, tmp_path / "other")
    assert content(tmp_path / "out") == content(tmp_path / "other")


def test_folders_that_can_not_be_used(tmp_path, lines):
    with pytest.raises(UserError, match=r"can't be written: Not a directory"):
        prepare("lines", lines, f"{lines['path']}/out")
    with pytest.raises(UserError, match=r"can't be written: File exists"):
        prepare("lines", lines, lines["path"])
    with pytest.raises(UserError, match=r"is not empty: it has 'lines\.txt'"):
        prepare("lines", lines, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["lines.txt"]
    folder = tmp_path / "out"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is being prepared by another process"):
        prepare("lines", lines, folder)
    os.close(descriptor)
    prepare("lines", lines, folder)
    (folder / "manifest.json").rename(folder / "progress.json")
    with pytest.raises(UserError, match=r"progress\.json is damaged"):
        (folder / "progress.json").write_text("[1, 2")
        prepare("lines", lines, folder)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("csvv", {}, "data.name='csvv' can't be prepared. Did you mean 'csv'"),
        ("mnist", {}, "data.name='mnist' can't be prepared"),
        ("lines", {"vocab_sise": 5}, "data.vocab_sise=5: unknown key. Did you mean 'vocab_size'"),
        ("lines", {"validation": 2.0}, "data.validation=2.0 is out of range"),
        ("lines", {"label": "file"}, "data.label='file': only texts can be prepared"),
        ("csv", {"prompt": "a", "completion": "b"}, "data.prompt='a': only texts can be prepared"),
        ("csv", {"text": "a", "label": "b"}, "data.label='b': only texts can be prepared"),
        ("lines", {"tokens": "bpe"}, "data.vocab_size is not set"),
        ("lines", {"tokens": "bite"}, "data.tokens='bite' is neither"),
        ("lines", {"validation": 0.0}, "data.validation=0 of 900 texts holds out 0"),
        ("text", {"validation": 1.0}, r"data.validation=1 of \d+ characters holds out \d+"),
        ("csv", {"text": "wrong"}, "no column 'wrong'"),
        ("lines", {"path": "nowhere.txt"}, "data.path='nowhere.txt': there is no such file"),
    ],
)
def test_wrong_options_leave_nothing(tmp_path, lines, name, options, message):
    with pytest.raises(UserError, match=message):
        prepare(name, {**lines, **options}, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not content(tmp_path / "out")


def test_empty_files_are_refused_and_mended(tmp_path):
    path = tmp_path / "a.txt"
    for name, wrong in (("lines", ""), ("text", ""), ("lines", "\n\n"), ("lines", "one\n")):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"is empty|holds out"):
            prepare(name, {"path": str(path)}, tmp_path / "out")
        assert content(tmp_path / "out") == {}
    path.write_text("\n".join(LINES))
    prepare("lines", {"path": str(path)}, tmp_path / "out")
    with pytest.raises(UserError, match="A shard of 4097 tokens has no whole blocks"):
        prepare("lines", {"path": str(path)}, tmp_path / "other", shard_size=4097)


def test_too_few_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 20)
    with pytest.raises(UserError, match="1 token in the test split: expected two or more"):
        options = {"path": str(tmp_path / "a.txt"), "tokens": "words", "vocab_size": 9, "validation": 0.05}
        prepare("text", options, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_shown(tmp_path, lines, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    options = {**lines, "tokens": "words", "vocab_size": 99}
    pipe, terminal = io.StringIO(), Terminal()
    manifest = prepare("lines", options, tmp_path / "pipe", pipe)
    said = pipe.getvalue().splitlines()
    for at in ("reading", "counting", "learning", "encoding"):  # each to its end
        *_, last = [line for line in said if line.startswith(at)]
        assert (found := re.fullmatch(at + r" +([\d.]+ [KMGT]?i?B) of ([\d.]+ [KMGT]?i?B).*", last)), said
        assert found[1] == found[2]
    assert "\x1b" not in pipe.getvalue()
    assert any("900 texts" in line and "99 tokens in the vocabulary" in line for line in said)
    assert said[-1].endswith(f"fingerprint {manifest['fingerprint']}")
    prepare("lines", options, tmp_path / "terminal", terminal)
    assert "\x1b[" in terminal.getvalue() and manifest["fingerprint"] in terminal.getvalue()


def test_every_source_of_text_can_be_prepared():
    assert set(corpus.SOURCES) <= set(flaxmodels.data.SOURCES) | {"lines", "csv", "tsv", "jsonl", "parquet"}
    assert corpus.SOURCES["text"] is text.text and corpus.SOURCES["csv"] is tables.csv


def test_the_manifest_says_what_there_is(tmp_path, lines):
    prepare("lines", lines, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["train", "test"]
    names = {
        f"{shard['name']}{suffix}"
        for shards in manifest["splits"].values()
        for shard in shards
        for suffix in shard["sha256"]
    }
    assert set(content(tmp_path / "out")) == {"manifest.json", "tokenizer.json", *names}
    for shards in manifest["splits"].values():
        for shard in shards:
            for suffix, sha256 in shard["sha256"].items():
                found = (tmp_path / "out" / f"{shard['name']}{suffix}").read_bytes()
                assert hashlib.sha256(found).hexdigest() == sha256
    source = (tmp_path / "lines.txt").read_bytes()
    assert manifest["inputs"] == [
        {"file": "lines.txt", "bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
    ]
    assert manifest["options"]["tokens"] == "bytes" and manifest["options"]["name"] == "lines"
    assert str(tmp_path) not in json.dumps(manifest), "the folder may move"


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path, number):
    (tmp_path / "a.txt").write_text("".join(f"{i} some words to be encoded\n" for i in range(600_000)))
    sections = {"model": {"name": "transformer"}, "optim": {"name": "adam", "learning_rate": 0.1}}
    data = {"name": "text", "path": str(tmp_path / "a.txt"), "tokens": "words", "vocab_size": 999, "batch_size": 8}
    config = {**sections, "train": {"duration": 1}, "data": data}
    (tmp_path / "mine.py").write_text(f"def get_config():\n    return {config!r}\n")
    command = [sys.executable, "-m", "flaxmodels", "prepare", f"--config={tmp_path / 'mine.py'}"]
    command.append(f"--to={tmp_path / 'out'}")
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout:
            if line.startswith("encoding"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in err, (out, err)
    assert f"{number.name}: stopped while encoding" in out + err
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = subprocess.run(command, timeout=120, **options)
    assert done.returncode == 0 and "is prepared" in done.stdout, done.stderr
