import pickle
import random
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from flaxmodels.data import records as records_module
from flaxmodels.data.records import Field, Records, columns
from flaxmodels.registry import UserError


def write(path, content, group=1):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), f"group_size:{group}")
    for record in content:
        writer.write(record)
    writer.close()
    return str(path)


def made(count, seed=0):
    """Records of different lengths, each with its number in it."""
    rng = random.Random(seed)
    return [b"%d:" % i + rng.randbytes(rng.randrange(40, 200)) for i in range(count)]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 30, 1 and 19 records; (files, lengths, all their records)."""
    content = made(50)
    parts = [content[:30], content[30:31], content[31:]]
    files = tuple(write(tmp_path / f"shard-{i}", part) for i, part in enumerate(parts))
    return files, tuple(map(len, parts)), content


def test_reads_in_the_order_asked_for(shards):
    files, lengths, content = shards
    reader = Records(files, lengths)
    assert reader.size == 50
    rng = np.random.default_rng(0)
    for batch in (1, 7, 50, 400):
        index = rng.integers(0, 50, batch).astype(np.int32)
        assert reader.read(index) == [content[i] for i in index]
    assert reader.read(np.arange(50)) == content
    assert reader.read(np.zeros(0, np.int32)) == []


def test_where(shards):
    files, lengths, _ = shards
    reader = Records(files, lengths)
    assert [reader.where(n) for n in (0, 29, 30, 31, 49)] == [
        (files[0], 0),
        (files[0], 29),
        (files[1], 0),
        (files[2], 0),
        (files[2], 18),
    ]


def test_pickled_without_open_files(shards):
    files, lengths, content = shards
    reader = Records(files, lengths, "skip")
    reader.read(np.arange(50))
    packed = pickle.dumps(reader)
    assert len(packed) < 2000
    again = pickle.loads(packed)
    assert again == reader and again.read(np.arange(50)) == content


def flip(file, position, mask=0x10):
    content = bytearray(Path(file).read_bytes())
    content[position] ^= mask
    Path(file).write_bytes(content)


def inside(file, record):
    """A position in a file within the record; records here are stored as they are, as they can't be compressed."""
    return Path(file).read_bytes().index(record[-30:]) + 5


def test_a_corrupt_record_is_named(shards):
    files, lengths, content = shards
    flip(files[2], inside(files[2], content[35]))
    reader = Records(files, lengths)
    assert reader.read(np.array([34, 36])) == [content[34], content[36]], "others are as they were"
    with pytest.raises(UserError, match=r"shard-2: record 4 \(number 35 of all\) can't be read: .*hash mismatch"):
        reader.read(np.array([3, 36, 35, 40]))


def test_corrupt_records_are_skipped_in_their_place(shards):
    files, lengths, content = shards
    bad = {3, 11, 12, 30, 49}
    for number in bad:
        file, _ = Records(files, lengths).where(number)
        flip(file, inside(file, content[number]))
    expected = [None if i in bad else record for i, record in enumerate(content)]
    reader = Records(files, lengths, "skip")
    index = np.random.default_rng(1).permutation(50)
    for _ in range(2):
        assert reader.read(index) == [expected[i] for i in index]


def lose(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:40_000])


def cut_one_byte(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def replace(file):
    file.write_bytes(random.Random(0).randbytes(200_000))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lose, "the file is missing"),
        (cut, "ArrayRecord file should be at least"),
        (cut_one_byte, "Invalid Riegeli"),
        (empty, "ArrayRecord file should be at least"),
        (replace, "Corrupted Riegeli"),
    ],
)
def test_a_shard_that_is_missing_or_damaged_as_a_whole(shards, harm, why):
    files, lengths, content = shards
    harm(Path(files[0]))
    with pytest.raises(UserError, match=rf"shard-0: record 17 \(number 17 of all\) can't be read: {why}"):
        Records(files, lengths).read(np.array([40, 17, 3]))
    assert Records(files, lengths).read(np.array([30, 31])) == content[30:32], "nobody asked for the others"
    assert Records(files, lengths, "skip").read(np.arange(50)) == [None] * 30 + content[30:]


@pytest.mark.parametrize("count", [0, 20, 45])
def test_another_number_of_records_than_expected(shards, tmp_path, count):
    files, lengths, content = shards
    other = made(count, seed=0)
    files = (write(tmp_path / "other", other), *files[1:])
    with pytest.raises(UserError, match=rf"other: record 2 .*the file has {count} records, expected 30"):
        Records(files, lengths).read(np.array([2]))
    there = min(count, 30)
    expected = [r[: r.index(b":")] for r in content[:there]]
    found = Records(files, lengths, "skip").read(np.arange(50))
    assert [r[: r.index(b":")] for r in found[:there]] == expected
    assert found[there:] == [None] * (30 - there) + content[30:]


def test_what_the_system_refuses_is_never_skipped(shards):
    files, lengths, _ = shards
    Path(files[0]).unlink()
    Path(files[0]).mkdir()
    with pytest.raises(UserError, match=r"shard-0 can't be read: Is a directory"):
        Records(files, lengths, "skip").read(np.array([2]))


def test_a_mended_file_is_read_in_the_same_process(shards):
    files, lengths, content = shards
    good = Path(files[0]).read_bytes()
    flip(files[0], inside(files[0], content[5]))
    reader = Records(files, lengths)
    with pytest.raises(UserError, match="record 5"):
        reader.read(np.arange(50))
    Path(files[0]).unlink()
    Path(files[0]).write_bytes(good)
    assert reader.read(np.arange(50)) == content


@pytest.mark.parametrize(("group", "trials"), [(1, 250), (8, 50)])
def test_every_flipped_bit_is_found_or_harmless(tmp_path, group, trials):
    """Files, each with one bit flipped: what comes back is right, or nothing does, and "raise" says so."""
    content = made(120)
    good = Path(write(tmp_path / "good", content, group)).read_bytes()
    used = [i for i, byte in enumerate(good) if byte]  # most of a small file is padding
    headers = [i for start in range(0, len(good), 65536) for i in range(start, start + 24)]  # of Riegeli's blocks
    rng, found = random.Random(group), 0
    for trial in range(trials):
        position = rng.choice((used, used, headers, range(len(good)), used[-300:])[trial % 5])
        file = tmp_path / f"bad-{trial}"
        file.write_bytes(good)
        flip(file, position, 1 << rng.randrange(8))
        got = Records((str(file),), (120,), "skip").read(np.arange(120))
        lost = [i for i, record in enumerate(got) if record is None]
        assert all(record is None or record == right for record, right in zip(got, content)), position
        if lost:
            found += 1
            with pytest.raises(UserError, match=rf"bad-{trial}: record {lost[0]} "):
                Records((str(file),), (120,)).read(np.arange(120))
        else:
            assert Records((str(file),), (120,)).read(np.arange(120)) == content
        file.unlink()
    assert found > 0.6 * trials


def test_threads_share_it(shards):
    """Also where some records are damaged: the error of one thread is nothing to the others."""
    files, lengths, content = shards
    bad = {3, 35}
    for number in bad:
        file, _ = Records(files, lengths).where(number)
        flip(file, inside(file, content[number]))
    expected = [None if i in bad else record for i, record in enumerate(content)]
    reader, wrong = Records(files, lengths, "skip"), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            index = rng.integers(0, 50, 40)
            if reader.read(index) != [expected[i] for i in index]:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_open_files_are_bounded(tmp_path, monkeypatch):
    content = made(40)
    files = tuple(write(tmp_path / f"s{i}", [record]) for i, record in enumerate(content))
    reader = Records(files, (1,) * 40)
    records_module._reader.cache_clear()
    few = records_module.functools.lru_cache(maxsize=3)(records_module._reader.__wrapped__)
    monkeypatch.setattr(records_module, "_reader", few)
    for _ in range(2):
        assert reader.read(np.arange(40)) == content
        links = [str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir()]
        assert sum(link in files for link in links) <= 3


def test_half_of_the_granted_descriptors(monkeypatch):
    for granted, expected in ((1024, 512), (1, 1), (resource.RLIM_INFINITY, 2**14), (2**20, 2**14)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, granted=granted: (granted, granted))
        assert records_module._most_open() == expected
    monkeypatch.undo()
    assert records_module._reader.cache_info().maxsize == records_module._most_open()


# `columns`


def example(**features):
    """A serialised tf.train.Example: bytes, floats or ints by the type of the values."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for key, values in features.items():
        feature = message.features.feature[key]
        values = [values] if isinstance(values, bytes | int | float) else values
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(feature, kind).value.extend(values)
    return message.SerializeToString()


FIELDS = (
    Field("image", "bytes", "|u1", (3, 2)),
    Field("vector", "float", "<f4", (2,)),
    Field("label", "int", "<i8", ()),
)


def drawn(rng, **more):
    image = rng.integers(0, 256, 6).astype(np.uint8)
    vector = rng.normal(size=2).astype(np.float32)
    label = int(rng.choice([0, 1, 9, 127, 128, 300, 2**31, 2**62, -1, -(2**63)]))
    return (image.reshape(3, 2), vector, label), example(
        image=image.tobytes(), vector=vector.tolist(), label=label, **more
    )


def assert_columns(values, expected):
    for place, (image, vector, label) in enumerate(expected):
        np.testing.assert_array_equal(values["image"][place], image)
        np.testing.assert_array_equal(values["vector"][place], vector)
        assert values["label"][place] == label


def test_columns_are_the_values():
    rng = np.random.default_rng(0)
    expected, content = zip(*(drawn(rng) for _ in range(300)))
    values, decoded = columns(content, FIELDS)
    assert decoded.all() and values["label"].dtype == np.int64 and values["image"].dtype == np.uint8
    assert_columns(values, expected)


def test_columns_leave_out_what_nobody_asked_for():
    """Other features may hold anything, of any length."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(200):
        more = {"id": rng.bytes(int(rng.integers(4, 7))), "box": rng.normal(size=4).tolist()}
        pairs.append(drawn(rng, **(more if i % 3 else {"boxes": [int(b) for b in rng.integers(0, 2**40, i % 5 + 1)]})))
    expected, content = zip(*pairs)
    values, decoded = columns(content, FIELDS)
    assert decoded.mean() > 0.9, "layouts are few"
    assert_columns({k: v[decoded] for k, v in values.items()}, [e for e, d in zip(expected, decoded) if d])


def part(number, content):
    return bytes([number * 8 + 2, len(content)]) + content


def with_label(record, label_list):
    """The example with one more feature "label": an int64 list, serialised."""
    return part(1, record[2:] + part(1, part(1, b"label") + part(2, part(3, label_list))))


def test_columns_leave_to_others_what_is_written_otherwise():
    rng = np.random.default_rng(0)
    (image, vector, _), _ = drawn(rng)
    plain = {"image": image.tobytes(), "vector": vector.tolist()}
    good = example(**plain, label=5)
    assert columns([with_label(example(**plain), part(1, bytes([5])))], FIELDS)[1].all()
    odd = [
        None,
        b"",
        b"no example at all",
        example(**plain),
        example(**plain, label=[5, 6]),
        example(**plain, label=5.0),
        example(**{**plain, "image": b"12345"}, label=5),
        example(**{**plain, "image": [b"123456", b"1"]}, label=5),
        example(**{**plain, "vector": [1.0, 2.0, 3.0]}, label=5),
        with_label(example(**plain), bytes([8, 5])),  # its values one by one, as protobuf allows
        with_label(good, part(1, bytes([6]))),  # twice: the later one counts
        good + good,
        good[:-1],
        good[:40],
    ]
    values, decoded = columns([good, *odd, good], FIELDS)
    assert decoded.tolist() == [True, *[False] * len(odd), True]
    for place in range(1, len(odd) + 1):
        assert all((values[name][place] == 0).all() for name in values)
    assert_columns({k: v[decoded] for k, v in values.items()}, [(image, vector, 5)] * 2)


def test_a_number_that_does_not_fit_is_left_to_others():
    fields = (Field("label", "int", "|u1", ()), Field("other", "int", "|i1", ()), Field("box", "float", "<f4", (1,)))
    pairs = ((200, 1), (300, 2), (255, 127), (-1, 3), (201, 128), (202, -128))
    values, decoded = columns([example(label=a, other=b, box=0.5) for a, b in pairs], fields)
    assert decoded.tolist() == [True, False, True, False, False, True]
    assert values["label"].tolist() == [200, 0, 255, 0, 0, 202]
    assert values["other"].tolist() == [1, 0, 127, 0, 0, -128]
    assert values["box"].ravel().tolist() == [0.5, 0, 0.5, 0, 0, 0.5]


def test_columns_agree_with_protobuf_on_damaged_examples():
    """Whatever bytes change: what is said to be decoded is what protobuf decodes."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    rng = np.random.default_rng(0)
    _, content = zip(*(drawn(rng) for _ in range(40)))
    damaged = []
    for trial in range(3000):
        record = bytearray(content[trial % 40])
        for _ in range(int(rng.integers(1, 4))):
            record[rng.integers(0, len(record))] = rng.choice(
                [0, 1, 2, 8, 10, 18, 26, 127, 128, 255, rng.integers(256)]
            )
        damaged.append(bytes(record))
    some = [columns([record], FIELDS) for record in damaged]
    decoded = np.array([one[0] for _, one in some])
    assert 0.1 < decoded.mean() < 0.9
    together, also = columns(damaged, FIELDS)
    assert not (also & ~decoded).any()
    for place in np.flatnonzero(decoded):
        try:
            feature = tf_example_pb2.Example.FromString(damaged[place]).features.feature
        except DecodeError:
            pytest.fail(f"protobuf refuses {damaged[place]!r}")
        for values, row in ((some[place][0], 0), (together, place) if also[place] else (some[place][0], 0)):
            assert list(feature["image"].bytes_list.value) == [values["image"][row].tobytes()]
            np.testing.assert_array_equal(np.float32(feature["vector"].float_list.value), values["vector"][row])
            assert list(feature["label"].int64_list.value) == [values["label"][row]]
