import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import order, tokenizer
from flaxmodels.data.documents import window_split
from flaxmodels.registry import UserError

SENTENCE = "Größe: 3 µm, ¿no? 日本 🎉. "


def every(split):
    index = np.arange(split.size, dtype=np.int32)
    return split.prepare(split.gather(split.arrays, index), index)


def write(tmp_path, content, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("count", [2, 8, 9, 10, 17, 18, 100])
def test_windows_cover_every_target_once(count):
    tokens = np.arange(count, dtype=np.uint8)
    split = window_split(tokens, 8)
    batch = every(split)
    real = batch["weights"] == 1
    assert batch["targets"][real].tolist() == list(range(1, count))
    assert batch["inputs"][real].tolist() == list(range(count - 1))
    assert batch["weights"].sum() == count - 1
    assert (batch["weights"].sum(1) > 0).all(), "no window is padding alone"


def test_eval_counts_every_target_once_with_padded_batches():
    split = window_split(np.arange(100, dtype=np.uint8), 8)
    total = 0.0
    for b in range(order.eval_batches(5, split.size)):
        index = order.eval_index(b, 5, split.size)
        total += split.prepare(split.gather(split.arrays, index), index)["weights"].sum()
    assert total == 99


def test_padding_example_weighs_nothing():
    split = window_split(np.arange(100, dtype=np.uint8), 8)
    index = np.array([-1, 2], np.int32)
    batch = split.prepare(split.gather(split.arrays, index), index)
    assert batch["weights"].sum(1).tolist() == [0, 8]


def test_same_batch_on_host_and_in_jit():
    split = window_split((np.arange(1000) * 7 % 300).astype(np.uint16), 16)
    index = np.array([5, -1, 62, 0], np.int32)
    host = split.prepare(split.gather(split.arrays, index), index)
    arrays = {"tokens": jnp.asarray(split.arrays["tokens"])}
    device = jax.jit(lambda a, i: split.prepare(split.gather(a, i), i))(arrays, jnp.asarray(index))
    for name, dtype in (("inputs", np.int32), ("targets", np.int32), ("weights", np.float32)):
        assert host[name].shape == (4, 16) and host[name].dtype == device[name].dtype == dtype
        np.testing.assert_array_equal(host[name], device[name])


def test_characters(tmp_path):
    text = SENTENCE * 20
    source = flaxmodels.data.load("text", path=write(tmp_path, text), length=8)
    assert source.facts == {"vocab_size": len(set(text)), "max_length": 8}
    assert source.tokenizer.characters == tuple(sorted(set(text)))
    assert source.tokens_per_example == 8
    assert source.token_bytes == tuple(len(c.encode()) for c in sorted(set(text)))
    train, test = (s.arrays["tokens"] for s in (source.train, source.test))
    assert train.dtype == np.uint8
    assert source.tokenizer.decode(train) + source.tokenizer.decode(test) == text
    assert len(test) == round(len(text) * 0.1)


def test_bytes(tmp_path):
    text = SENTENCE * 20
    source = flaxmodels.data.load("text", path=write(tmp_path, text), tokens="bytes", length=8)
    assert source.facts == {"vocab_size": 256, "max_length": 8} and source.token_bytes == (1,) * 256
    train, test = (s.arrays["tokens"] for s in (source.train, source.test))
    assert train.tobytes() + test.tobytes() == text.encode()
    assert source.tokenizer.decode(test) == text[-round(len(text) * 0.1) :], "the cut is between characters"


def read(split):
    """All tokens of a split in memory, once."""
    return split.arrays["tokens"]


def test_files_are_read_as_they_are_and_each_ends_with_a_token(tmp_path):
    write(tmp_path, "one\r\ntwo\n" * 10, "b.txt")
    write(tmp_path, "zero\n" * 10, "a.txt")
    write(tmp_path, "not this", "c.md")
    source = flaxmodels.data.load("text", path=str(tmp_path / "*.txt"), tokens="bytes", length=4)
    tokens = np.concatenate([read(source.train), read(source.test)])
    end = source.tokenizer.end
    assert source.facts["vocab_size"] == 257 and end == 256
    assert tokens.tolist() == [*b"zero\n" * 10, end, *b"one\r\ntwo\n" * 10, end]
    assert len(read(source.test)) == 14 + 1, "a tenth of the characters, cut in the middle of the last file"


@pytest.mark.parametrize("windows", ["packed", "padded"])
def test_no_window_reaches_over_the_end_of_a_file(tmp_path, windows):
    for name, letter in (("a", "x"), ("b", "y"), ("c", "z")):
        write(tmp_path, letter * 20, name)
    source = flaxmodels.data.load("text", path=str(tmp_path / "*"), tokens="bytes", length=32, windows=windows)
    batch = every(source.train)
    tokens, segments = (np.asarray(batch["inputs"][name]) for name in ("tokens", "segments"))
    assert source.transforms == {"windows": windows, "length": 32}
    assert batch["weights"].sum() == 20 + 20 + 20 - 6 - 1
    for row in range(len(tokens)):
        for segment in set(segments[row]) - {0}:
            assert len(set(tokens[row, segments[row] == segment])) == 1


def test_texts_that_are_cut_are_counted(tmp_path):
    for name, size in (("a", 8), ("b", 9), ("c", 90)):
        write(tmp_path, "x" * size, name)
    options = {"path": str(tmp_path / "*"), "tokens": "bytes", "length": 8, "validation": 0.5}
    assert flaxmodels.data.load("text", **options, windows="padded").transforms == {
        "windows": "padded", "length": 8, "texts cut": "3 of 4",
    }, "9 and its end, and two parts of 90"  # fmt: skip
    assert "texts cut" not in flaxmodels.data.load("text", **options, windows="packed").transforms


def test_a_mark_of_the_byte_order_is_no_text(tmp_path):
    plain, marked = (flaxmodels.data.load("text", path=write(tmp_path, mark + "ab" * 99)) for mark in ("", "\ufeff"))
    assert marked.tokenizer == plain.tokenizer and marked.fingerprint == plain.fingerprint


@pytest.mark.parametrize(("tokens", "vocab_size"), [("words", 12), ("bpe", 300)])
def test_words_and_bpe_are_learned_from_the_training_split(tmp_path, tokens, vocab_size):
    path = write(tmp_path, "the cat sat on the mat . " * 40 + "zebra " * 15)
    source = flaxmodels.data.load("text", path=path, tokens=tokens, vocab_size=vocab_size, length=8)
    assert source.facts["vocab_size"] == source.tokenizer.size <= vocab_size
    assert "the cat sat" in source.tokenizer.decode(read(source.train))
    if tokens == "words":
        assert "zebra" not in source.tokenizer.words
        assert set(read(source.test)) <= {0, *range(source.tokenizer.size)} and 0 in read(source.test)
    else:
        assert source.tokenizer.decode(read(source.test)).endswith("mat . " + "zebra " * 15)


def test_a_tokenizer_of_a_file(tmp_path):
    path = write(tmp_path, SENTENCE * 20)
    learned = flaxmodels.data.load("text", path=path, tokens="bpe", vocab_size=300, length=8)
    tokenizer.save(learned.tokenizer, tmp_path / "tokenizer.json")
    loaded = flaxmodels.data.load("text", path=path, tokens=str(tmp_path / "tokenizer.json"), length=8)
    np.testing.assert_array_equal(read(loaded.train), read(learned.train))
    assert loaded.tokenizer.fingerprint == learned.tokenizer.fingerprint
    assert loaded.fingerprint == learned.fingerprint


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, r"data\.path: .*a\.txt is empty"),
        (b"ab" * 30, {"length": 60}, r"54 characters to train on.*data\.length=60"),
        (b"ab" * 500, {"validation": 0.001}, r"holds out 1 characters"),
        (b"ab" * 500, {"validation": 0.0}, r"holds out 0 characters"),
        (b"ab" * 500, {"validation": 1.0}, "0 characters to train on"),
        (b"ab" * 500, {"validation": 1.5}, r"data\.validation=1\.5 is out of range"),
        (b"ab" * 500, {"length": 0}, r"data\.length=0 is out of range"),
        (b"ab" * 500, {"tokens": "words"}, r"data\.vocab_size is not set"),
        (b"ab" * 500, {"tokens": "word"}, r"data\.tokens='word' is neither.*Did you mean 'words'"),
        (b"ab" * 500, {"windows": "parked"}, "expected one of 'contiguous', 'packed', 'padded'"),
        (b"fine\nfine\nna\xefve" * 9, {}, r"a\.txt:3 is not utf-8: byte 0xef at offset 12.*latin-1.*iconv"),
    ],
)
def test_errors_name_the_value(tmp_path, content, options, message):
    with pytest.raises(UserError, match=message):
        flaxmodels.data.load("text", path=write(tmp_path, content), **options)


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.txt", "", "/"])
def test_missing_files_are_named(path):
    with pytest.raises(UserError, match=rf"data\.path='{path.replace('*', '.')}'"):
        flaxmodels.data.load("text", path=path)


def test_fingerprint_knows_the_characters(tmp_path):
    """Two texts with equal token ids and other letters are other data."""
    first = flaxmodels.data.load("text", path=write(tmp_path, "ab" * 500))
    again = flaxmodels.data.load("text", path=write(tmp_path, "ab" * 500, "again.txt"))
    other = flaxmodels.data.load("text", path=write(tmp_path, "xy" * 500, "other.txt"))
    np.testing.assert_array_equal(first.train.arrays["tokens"], other.train.arrays["tokens"])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_content_has_the_same_fingerprint_whatever_its_tokens_are(tmp_path):
    paths = [write(tmp_path, SENTENCE * 20), str(tmp_path / "*.txt")]
    write(tmp_path, "b" * 100, "b.txt")
    for path in paths:
        options = ({"tokens": "bytes"}, {"tokens": "bpe", "vocab_size": 300}, {"tokens": "words", "vocab_size": 9})
        sources = [flaxmodels.data.load("text", path=path, length=8, **o) for o in options]
        assert len({s.fingerprint for s in sources}) == 1
        assert len({s.tokenizer.fingerprint for s in sources}) == 3


def test_fingerprint_knows_where_files_end(tmp_path):
    for folder, files in (("one", ("ab" * 50, "cd" * 50)), ("two", ("ab" * 49, "ab" + "cd" * 50))):
        (tmp_path / folder).mkdir()
        for name, content in zip("ab", files):
            write(tmp_path / folder, content, name)
    first, other = (flaxmodels.data.load("text", path=str(tmp_path / f / "*")) for f in ("one", "two"))
    assert first.fingerprint != other.fingerprint


def test_pydocs():
    source = flaxmodels.data.load("pydocs", length=32)
    text = source.tokenizer.decode(source.train.arrays["tokens"])
    assert len(text) > 100_000 and "assignment" in text
    assert every(source.test)["weights"].sum() == len(source.test.arrays["tokens"]) - 1


def test_real_tiny_shakespeare(tmp_path):
    folder = shared_data("tiny_shakespeare")
    source = flaxmodels.data.load("tiny_shakespeare", manual_dir=str(folder), data_dir=str(tmp_path))
    parts = [source.tokenizer.decode(s.arrays["tokens"]) for s in (source.train, source.test)]
    assert "".join(parts) == (folder / "input.txt").read_text()
    assert source.facts == {"vocab_size": 65, "max_length": 64}
    assert every(source.train)["weights"].sum() == len(parts[0]) - 1
    assert source.fingerprint == "c85e0edbd3056eb2"


def test_latin_1_is_read_when_it_is_said(tmp_path):
    path = write(tmp_path, "naïve\n".encode("latin-1") * 20)
    source = flaxmodels.data.load("text", path=path, encoding="latin-1", length=4)
    assert "ï" in source.tokenizer.characters
