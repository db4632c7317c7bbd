import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import order
from flaxmodels.data.text import Vocabulary, window_split
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
    assert source.vocabulary.characters == tuple(sorted(set(text)))
    assert source.tokens_per_example == 8
    assert source.token_bytes == tuple(len(c.encode()) for c in sorted(set(text)))
    train, test = (s.arrays["tokens"] for s in (source.train, source.test))
    assert train.dtype == np.uint8
    assert source.vocabulary.decode(train) + source.vocabulary.decode(test) == text
    assert len(test) == round(len(text) * 0.1)


def test_bytes(tmp_path):
    text = SENTENCE * 20
    source = flaxmodels.data.load("text", path=write(tmp_path, text), tokens="bytes", length=8)
    assert source.facts == {"vocab_size": 256, "max_length": 8} and source.token_bytes == (1,) * 256
    train, test = (s.arrays["tokens"] for s in (source.train, source.test))
    assert train.tobytes() + test.tobytes() == text.encode()
    assert source.vocabulary.decode(test) == text[-round(len(text) * 0.1) :], "the cut is between characters"


def test_line_ends_and_globs_are_read_as_they_are(tmp_path):
    write(tmp_path, "one\r\ntwo\n" * 10, "b.txt")
    write(tmp_path, "zero\n" * 10, "a.txt")
    write(tmp_path, "not this", "c.md")
    source = flaxmodels.data.load("text", path=str(tmp_path / "*.txt"), tokens="bytes", length=4)
    read = source.train.arrays["tokens"].tobytes() + source.test.arrays["tokens"].tobytes()
    assert read == b"zero\n" * 10 + b"one\r\ntwo\n" * 10


def test_vocabulary_round_trip_and_dtypes():
    for size, dtype in ((256, np.uint8), (257, np.uint16), (65_537, np.int32)):
        points = [c for c in range(size + 2048) if not 0xD800 <= c < 0xE000][:size]
        vocabulary = Vocabulary(tuple(map(chr, points)))
        ids = vocabulary.encode(chr(points[-1]) + "a")
        assert ids.dtype == dtype and ids.tolist() == [size - 1, 97]
        assert vocabulary.decode(ids) == chr(points[-1]) + "a"
    assert Vocabulary(None).decode(Vocabulary(None).encode(SENTENCE)) == SENTENCE
    assert Vocabulary(("a",)).encode("").shape == (0,)


@pytest.mark.parametrize("unknown", ["z", "!", "é", "🎉", "\ud800"])
def test_unknown_character_is_named(unknown):
    with pytest.raises(UserError, match=r"position 2\) is not among the 3 .*tokens=bytes") as error:
        Vocabulary(("a", "b", "c")).encode("ab" + unknown + "c")
    assert repr(unknown) in str(error.value)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "0 characters to train on"),
        (b"ab" * 30, {"length": 60}, r"54 characters to train on.*data\.length=60"),
        (b"ab" * 500, {"validation": 0.001}, r"holds out 1 characters"),
        (b"ab" * 500, {"validation": 0.0}, r"holds out 0 characters"),
        (b"ab" * 500, {"validation": 1.0}, "0 characters to train on"),
        (b"ab" * 500, {"validation": 1.5}, r"data\.validation=1\.5 is out of range"),
        (b"ab" * 500, {"length": 0}, r"data\.length=0 is out of range"),
        (b"ab" * 500, {"tokens": "words"}, "expected one of 'bytes', 'characters'"),
        (b"fine\nfine\nna\xefve" * 9, {}, r"is not UTF-8: byte 0xef at offset 12, line 3.*iconv"),
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


def test_pydocs():
    source = flaxmodels.data.load("pydocs", length=32)
    text = source.vocabulary.decode(source.train.arrays["tokens"])
    assert len(text) > 100_000 and "assignment" in text
    assert every(source.test)["weights"].sum() == len(source.test.arrays["tokens"]) - 1


def test_real_tiny_shakespeare(tmp_path):
    folder = shared_data("tiny_shakespeare")
    source = flaxmodels.data.load("tiny_shakespeare", manual_dir=str(folder), data_dir=str(tmp_path))
    parts = [source.vocabulary.decode(s.arrays["tokens"]) for s in (source.train, source.test)]
    assert "".join(parts) == (folder / "input.txt").read_text()
    assert source.facts == {"vocab_size": 65, "max_length": 64}
    assert every(source.train)["weights"].sum() == len(parts[0]) - 1
    assert source.fingerprint == "c85e0edbd3056eb2"
