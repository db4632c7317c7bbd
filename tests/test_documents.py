"""Windows over documents. Token i of a corpus is mostly the number i, so that a batch says where all in it is from."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_data import shared_data

from flaxmodels.data import documents, reading, tables
from flaxmodels.data.documents import Documents, windows
from flaxmodels.data.packing import pack
from flaxmodels.data.split import SKIP
from flaxmodels.data.tokenizer import train
from flaxmodels.registry import UserError

LENGTH = 8
SIZES = np.array([3, 1, 30, 9, 8, 2, 2, 17, 5, 0, 40, 4, 9, 1])


def corpus(sizes=SIZES, **options):
    return Documents(np.arange(np.sum(sizes), dtype=np.uint16), np.cumsum(sizes), **options)


def owner(tokens, sizes=SIZES):
    """The document of each token."""
    return np.repeat(np.arange(len(sizes)), sizes)[tokens]


def every(split):
    index = np.arange(split.size, dtype=np.int32)
    return jax.tree.map(np.asarray, split.prepare(split.gather(split.arrays, index), index))


@dataclasses.dataclass(frozen=True)
class Disk:
    """Tokens as `token_files` has them: zeros past the end, and every token from `bad` on is damaged."""

    tokens: np.ndarray
    bad: int = 2**62

    @property
    def dtype(self):
        return self.tokens.dtype

    @property
    def size(self):
        return len(self.tokens)

    def read(self, start, count):
        at = start[:, None] + np.arange(count)
        found = np.where(at < self.size, self.tokens[np.minimum(at, self.size - 1)], 0).astype(self.dtype)
        return found, start + count <= self.bad


@dataclasses.dataclass(frozen=True)
class Endless:
    """More tokens than int32 can count; token i is i % 251."""

    size: int = 6_000_000_001
    dtype: np.dtype = dataclasses.field(default=np.dtype(np.uint8))

    def read(self, start, count):
        at = start[:, None] + np.arange(count)
        return np.where(at < self.size, at % 251, 0).astype(np.uint8), np.ones(len(start), bool)


# Packing


def best_fit_decreasing(sizes, capacity):
    """By the book: one item after the other, each by a look at every bin."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in bins if sum(b) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return sorted(map(sum, bins))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [1, 7, 20])
def test_pack_is_best_fit_decreasing(seed, capacity):
    sizes = np.random.default_rng(seed).integers(1, capacity + 1, 60)
    bins = pack(sizes, capacity)
    assert sorted(np.bincount(bins, sizes).tolist()) == best_fit_decreasing(sizes.tolist(), capacity)


def test_pack_of_nothing():
    assert pack(np.zeros(0, np.int32), 8).shape == (0,)


@pytest.mark.slow
def test_a_million_documents_leave_little_padding():
    sizes = np.random.default_rng(0).integers(1, 2000, 10**6)
    split = windows(Documents(Endless(), np.cumsum(sizes)), "packed", 1024)
    assert split.size * 1024 < 1.01 * (sizes - 1).sum()


# Packed windows


@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_every_token_but_the_first_of_a_document_is_a_target_once(length):
    batch = every(windows(corpus(), "packed", length))
    targets = np.sort(batch["targets"][batch["weights"] == 1])
    starts = np.cumsum(SIZES) - SIZES
    np.testing.assert_array_equal(targets, np.setdiff1d(np.arange(SIZES.sum()), starts))


def test_a_segment_is_one_piece_of_one_document():
    batch = every(windows(corpus(), "packed", LENGTH))
    tokens, segments, positions = (batch["inputs"][name] for name in ("tokens", "segments", "positions"))
    assert tokens.dtype == segments.dtype == positions.dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["weights"], (segments > 0).astype(np.float32))
    for row in range(len(tokens)):
        numbers = segments[row][segments[row] > 0]
        assert np.array_equal(np.unique(numbers), np.arange(1, numbers.max() + 1)) and (np.diff(numbers) >= 0).all()
        assert (segments[row][len(numbers) :] == 0).all(), "padding is at the end"
        for number in range(1, numbers.max() + 1):
            here = segments[row] == number
            assert len(set(owner(tokens[row, here]))) == 1
            np.testing.assert_array_equal(positions[row, here], np.arange(here.sum()))
            np.testing.assert_array_equal(tokens[row, here], tokens[row, here][0] + np.arange(here.sum()))
            np.testing.assert_array_equal(batch["targets"][row, here], tokens[row, here] + 1)
            assert owner(tokens[row, here][0]) == owner(batch["targets"][row, here][-1])


def test_windows_depend_on_the_lengths_only():
    first = windows(corpus(), "packed", LENGTH)
    other = windows(
        dataclasses.replace(corpus(), tokens=np.arange(SIZES.sum())[::-1].astype(np.uint16)), "packed", LENGTH
    )
    seen = every(other)["inputs"]
    np.testing.assert_array_equal(seen["segments"], every(first)["inputs"]["segments"])
    real = seen["segments"] > 0
    np.testing.assert_array_equal(SIZES.sum() - 1 - seen["tokens"][real], every(first)["inputs"]["tokens"][real])


def test_windows_stand_in_the_order_of_their_first_tokens():
    tokens = every(windows(corpus(), "packed", LENGTH))["inputs"]["tokens"]
    assert (np.diff(tokens[:, 0]) > 0).all()


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_prompts_have_no_loss(kind):
    sizes, prompts = np.array([6, 9, 4, 20, 3]), np.array([3, 2, 1, 15, 2], np.int32)
    length = LENGTH if kind == "packed" else 32
    batch = every(windows(corpus(sizes, prompts=prompts), kind, length))
    starts = np.cumsum(sizes) - sizes
    expected = [s + i for s, n, p in zip(starts, sizes, prompts) for i in range(p, n)]
    assert sorted(batch["targets"][batch["weights"] == 1].tolist()) == expected
    first = batch["inputs"]["segments"] > 0
    assert (batch["weights"] <= first).all() and (batch["weights"] < first).any()
    assert (batch["weights"].sum(1) > 0).all(), "no window is prompt alone"


# Padded windows


def test_padded_is_one_document_a_window():
    sizes = np.array([3, 2, 30, 9, 8])
    split = windows(corpus(sizes), "padded", LENGTH)
    batch = every(split)
    assert split.size == 5
    np.testing.assert_array_equal(batch["weights"].sum(1), [2, 1, 8, 8, 7])
    np.testing.assert_array_equal(batch["inputs"]["segments"], batch["weights"])
    np.testing.assert_array_equal(batch["inputs"]["tokens"][:, 0], np.cumsum(sizes) - sizes)
    np.testing.assert_array_equal(batch["inputs"]["tokens"][1], [3, *[0] * 7])
    np.testing.assert_array_equal(batch["inputs"]["positions"][2], np.arange(8))
    real = batch["weights"] == 1
    np.testing.assert_array_equal(batch["targets"][real], batch["inputs"]["tokens"][real] + 1)
    assert documents.transforms([corpus(sizes)], "padded", LENGTH)["texts cut"] == f"1 of {len(sizes)}"


def test_padded_with_labels_has_a_target_a_document():
    sizes, labels = np.array([3, 2, 30, 9, 8]), np.array([0, 2, 1, 1, 0], np.int32)
    found = corpus(sizes, labels=labels)
    batch = every(windows(found, "padded", LENGTH))
    np.testing.assert_array_equal(batch["targets"], labels)
    assert batch["targets"].dtype == np.int32 and batch["weights"].dtype == np.float32
    np.testing.assert_array_equal(batch["weights"], np.ones(5))
    np.testing.assert_array_equal(batch["inputs"]["segments"].sum(1), [3, 2, 8, 8, 8])
    np.testing.assert_array_equal(batch["inputs"]["tokens"][0], [0, 1, 2, 0, 0, 0, 0, 0])
    assert documents.transforms([found], "padded", LENGTH)["texts cut"] == f"2 of {len(found.ends)}"


# All kinds


@pytest.mark.parametrize("kind", ["contiguous", "packed", "padded"])
def test_a_split_without_a_target_is_refused(kind):
    alone = corpus(np.array([1] * (kind != "contiguous") + [0, 1]))
    with pytest.raises(UserError, match=r"nothing to predict: no document has two tokens\. Use more text"):
        windows(alone, kind, LENGTH)
    if kind != "contiguous":
        with pytest.raises(UserError, match="nothing to predict"):
            windows(corpus(np.array([1, 1]), prompts=np.zeros(2, np.int32)), kind, LENGTH)
    windows(corpus(np.array([1, 2])), kind, LENGTH)
    if kind == "padded":
        windows(dataclasses.replace(alone, labels=np.zeros(3, np.int32)), kind, LENGTH)


def of_each_kind(tokens):
    labels = np.arange(len(SIZES), dtype=np.int32)
    prompts = np.minimum(SIZES, 1).astype(np.int32)
    plain = Documents(tokens, np.cumsum(SIZES))
    return {
        "contiguous": windows(plain, "contiguous", LENGTH),
        "packed": windows(plain, "packed", LENGTH),
        "packed with prompts": windows(dataclasses.replace(plain, prompts=prompts), "packed", LENGTH),
        "padded": windows(plain, "padded", LENGTH),
        "padded with labels": windows(dataclasses.replace(plain, labels=labels), "padded", LENGTH),
    }


KINDS = pytest.mark.parametrize("kind", ["contiguous", "packed", "packed with prompts", "padded", "padded with labels"])


@KINDS
def test_disk_memory_and_jit_give_the_same_batch(kind):
    tokens = np.arange(SIZES.sum(), dtype=np.uint16)
    if kind == "contiguous":  # what stands past the end, without weight, is another thing in memory
        tokens = np.concatenate([tokens, tokens])[: 16 * LENGTH + 1]
    memory, disk = (of_each_kind(t)[kind] for t in (tokens, Disk(tokens)))
    index = np.array([2, -1, memory.size - 1, 0], np.int32)
    rows = memory.gather(memory.arrays, index)
    expected = jax.tree.map(np.asarray, memory.prepare(rows, index))
    assert disk.stored and not disk.arrays and memory.size == disk.size
    assert np.sum(expected["weights"][1]) == 0
    resident = pickle.loads(pickle.dumps(disk)).read()
    assert not resident.stored
    assert resident.nbytes == disk.stored
    for split in (disk, resident):
        rows = split.gather(split.arrays, index)
        assert not rows.pop(SKIP).any()
        jax.tree.map(np.testing.assert_array_equal, split.prepare(rows, index), expected)
    found = jax.jit(lambda rows, index: resident.prepare(rows, index))(rows, jnp.asarray(index))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)


@KINDS
def test_rows_that_cant_be_read_say_so(kind):
    split = of_each_kind(Disk(np.arange(SIZES.sum(), dtype=np.uint16), bad=60))[kind]
    skip = split.gather({}, np.arange(split.size, dtype=np.int32))[SKIP]
    assert skip.shape == (split.size,) and skip.dtype == bool
    assert skip.any() and not skip.all()
    alone = [split.gather({}, np.array([i], np.int32))[SKIP].item() for i in range(split.size)]
    assert alone == skip.tolist(), "whatever else is in the batch"


def test_contiguous_windows_know_no_documents():
    batch = every(windows(corpus(), "contiguous", LENGTH))
    assert batch["targets"][batch["weights"] == 1].tolist() == list(range(1, SIZES.sum()))
    assert batch["inputs"].shape == (-(-(SIZES.sum() - 1) // LENGTH), LENGTH)


def test_positions_past_int32_are_read():
    corpus = Endless()
    split = windows(Documents(corpus, np.array([corpus.size])), "contiguous", 64)
    assert split.size == -(-(corpus.size - 1) // 64)
    index = np.array([split.size - 1, 0, 40_000_000], np.int32)
    rows = split.gather({}, index)
    rows.pop(SKIP)
    batch = split.prepare(rows, index)
    position = index.astype(np.int64)[:, None] * 64 + np.arange(64)
    np.testing.assert_array_equal(batch["weights"], position + 1 < corpus.size)
    real = np.asarray(batch["weights"]) == 1
    np.testing.assert_array_equal(np.asarray(batch["targets"])[real], ((position + 1) % 251)[real])
    np.testing.assert_array_equal(np.asarray(batch["inputs"])[real], (position % 251)[real])


def test_encode_closes_the_texts_that_are_asked_for():
    made = train("bytes", lambda: (), documents=True)
    tokens, places = documents.encode(made, ["ab", "", "c"], np.array([True, False, True]))
    assert tokens.tolist() == [97, 98, 256, 99, 256] and places.tolist() == [3, 3, 5]
    assert tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        (corpus(labels=np.zeros(14, np.int32)), "packed", r"data\.windows='packed': with labels.*windows='padded'"),
        (corpus(prompts=np.ones(14, np.int32)), "contiguous", "would learn the prompts"),
        (
            corpus(np.array([4, 20]), prompts=np.array([1, 9], np.int32)),
            "padded",
            r"b:7: the prompt alone has 9 tokens",
        ),
        (Documents(Endless(), np.array([Endless().size])), "contiguous", r"too many.*Raise data\.length"),
        (corpus(np.array([1, 0, 1])), "packed", "no document has two tokens"),
    ],
)
def test_what_windows_refuse(found, kind, message):
    with pytest.raises(UserError, match=message):
        windows(found, kind, 2 if isinstance(found.tokens, Endless) else LENGTH, where=["a:3", "b:7"])


@pytest.mark.parametrize(
    ("name", "most"), [pytest.param("rt_polarity", 0.01, marks=pytest.mark.slow), ("tiny_shakespeare", 0.005)]
)
def test_little_of_real_lines_is_padding(name, most):
    path = shared_data(name) / ("input.txt" if name == "tiny_shakespeare" else "rt-polarity.*")
    source = tables.lines(str(path), encoding="latin-1")
    texts = [record.text for record in reading.read("lines", str(path), encoding="latin-1")]
    real = sum(every(split)["weights"].sum() for split in (source.train, source.test))
    assert real == sum(len(text.encode()) for text in texts)  # with its end, a text of n bytes has n targets
    assert 1 - real / (128 * (source.train.size + source.test.size)) < most
