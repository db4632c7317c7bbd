"""Texts in tables: which columns make which task, what is held out, and the real sets with one line each."""

import json

import jax
import numpy as np
import pytest
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import held_out, tables
from flaxmodels.registry import UserError


def load(function, **options):
    """As a config does: the name of a function, and options that are checked."""
    return flaxmodels.data.load(f"flaxmodels.data.tables:{function}", **options)


def write(tmp_path, rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def every(split):
    index = np.arange(split.size, dtype=np.int32)
    return jax.tree.map(np.asarray, split.prepare(split.gather(split.arrays, index), index))


def texts(source, split):
    """The documents of a split of padded windows."""
    inputs = every(split)["inputs"]
    return [source.tokenizer.decode(t[s > 0]) for t, s in zip(inputs["tokens"], inputs["segments"])]


REVIEWS = [{"text": f"review {i}", "label": "good" if i % 3 else "bad"} for i in range(60)]


# Real data


def test_sst2_with_one_line():
    folder = shared_data("sst2")
    source = load("tsv", path=f"{folder}/train.tsv", test_path=f"{folder}/test.tsv", text="sentence", label="label")
    assert (source.train.size, source.test.size) == (60_614, 872)
    assert source.facts == {"vocab_size": 257, "max_length": 128, "classes": 2} and source.labels == ("0", "1")
    for split, name in ((source.train, "train"), (source.test, "test")):
        lines = (folder / f"{name}.tsv").read_text().split("\n")[1:-1]
        row = split.prepare(split.gather({}, np.array([0, split.size - 1], np.int32)), np.array([0, -1], np.int32))
        sentence, label = lines[0].split("\t")
        expected = [*sentence.encode(), 256]
        assert np.asarray(row["inputs"]["tokens"])[0].tolist() == expected + [0] * (128 - len(expected))
        assert row["targets"].tolist() == [int(label), int(lines[-1].split("\t")[1])]
        assert np.asarray(row["weights"]).tolist() == [1, 0]


def test_rt_polarity_with_one_line():
    folder = shared_data("rt_polarity")
    source = load("lines", path=f"{folder}/rt-polarity.*", label="file", encoding="latin-1")
    assert source.train.size + source.test.size == 5_331 * 2 and source.labels == ("neg", "pos")
    for split in (source.train, source.test):
        assert np.bincount(split.gather.keywords["columns"]["label"]).tolist() == [split.size // 2] * 2
    assert source.test.size == 2 * round(5_331 * 0.1)


# Tasks


def test_text_and_label_are_a_classification(tmp_path):
    source = load("jsonl", path=write(tmp_path, REVIEWS), text="text", label="label", length=16)
    assert source.facts == {"vocab_size": 257, "max_length": 16, "classes": 2}
    assert source.labels == ("bad", "good") and source.token_bytes is None and source.tokens_per_example == 16
    assert source.transforms == {"windows": "padded", "length": 16}
    short = load("jsonl", path=write(tmp_path, REVIEWS), text="text", label="label", length=9)
    assert short.transforms == {"windows": "padded", "length": 9, "texts cut": "50 of 60"}, "review 10 and an end: 10"
    seen = {}
    for split in (source.train, source.test):
        seen |= dict(zip(texts(source, split), every(split)["targets"].tolist(), strict=True))
    assert seen == {row["text"]: int(row["label"] == "good") for row in REVIEWS}


def test_text_alone_is_a_language_model(tmp_path):
    path = write(tmp_path, REVIEWS)
    sources = {
        kind: load("jsonl", path=path, text="text", windows=kind, length=16) for kind in (None, "contiguous", "padded")
    }
    sizes = [len(row["text"]) for row in REVIEWS]
    for kind, source in sources.items():
        total = sum(every(split)["weights"].sum() for split in (source.train, source.test))
        joined = 2 * -1 + sum(sizes) + 60  # each of the splits but its first token
        assert total == (joined if kind == "contiguous" else sum(sizes))
        assert source.facts == {"vocab_size": 257, "max_length": 16} and len(source.token_bytes) == 257
    assert sources[None].transforms == {"windows": "packed", "length": 16}
    assert sources[None].train.size < sources["padded"].train.size


@pytest.mark.parametrize("kind", [None, "padded"])
def test_prompt_and_completion_are_a_language_model_of_completions(tmp_path, kind):
    rows = [{"p": f"{i}+{i}=", "c": f"{2 * i}"} for i in range(50)]
    source = load("jsonl", path=write(tmp_path, rows), prompt="p", completion="c", windows=kind, length=24)
    found = []
    for split in (source.train, source.test):
        batch = every(split)
        for row in range(split.size):
            kept = batch["targets"][row][batch["weights"][row] == 1]
            found += source.tokenizer.decode(np.where(kept == 256, ord("|"), kept)).split("|")[:-1]
    assert sorted(found) == sorted(row["c"] for row in rows)
    assert source.transforms["windows"] == kind or kind is None


def test_completions_are_encoded_by_themselves(tmp_path):
    """A BPE token must not lie half in the prompt."""
    rows = [{"p": "ab" * (1 + i % 3), "c": "ab" * 2} for i in range(50)]
    options = {"path": write(tmp_path, rows), "test_path": write(tmp_path, rows, "b"), "prompt": "p", "completion": "c"}
    source = load("jsonl", **options, windows="padded", length=24, tokens="bpe", vocab_size=260)
    batch = every(source.train)
    for row in range(source.train.size):
        kept = batch["targets"][row][batch["weights"][row] == 1]
        assert kept[-1] == source.tokenizer.end and source.tokenizer.decode(kept) == "abab"


# Labels


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([2, 0, 1], ("0", "1", "2"), [2, 0, 1]),
        (["10", "9", "9"], ("9", "10"), [1, 0, 0]),
        ([1, -1, 1], ("-1", "1"), [1, 0, 1]),
        (["b", "a", "B"], ("B", "a", "b"), [2, 1, 0]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
    ],
)
def test_numbers_stay_and_names_are_sorted(tmp_path, labels, names, numbers):
    path = write(tmp_path, [{"t": "x", "l": label} for label in labels])
    source = load("jsonl", path=path, test_path=path, text="t", label="l")
    assert source.labels == names and source.facts["classes"] == len(names)
    assert every(source.train)["targets"].tolist() == every(source.test)["targets"].tolist() == numbers


def test_a_label_of_the_test_that_is_not_learned_is_named(tmp_path):
    path = write(tmp_path, REVIEWS)
    test = write(tmp_path, [REVIEWS[0], {"text": "x", "label": "godo"}], "test.jsonl")
    with pytest.raises(UserError, match=r"test\.jsonl:2: the label 'godo' is in no example.*Did you mean 'good'"):
        load("jsonl", path=path, test_path=test, text="text", label="label")


# What is held out


def test_classes_are_held_out_in_proportion(tmp_path):
    source = load("jsonl", path=write(tmp_path, REVIEWS), text="text", label="label", validation=0.25)
    assert np.bincount(every(source.test)["targets"]).tolist() == [5, 10]
    again = load("jsonl", path=write(tmp_path, REVIEWS), text="text", label="label", validation=0.25)
    assert texts(again, again.test) == texts(source, source.test)


def test_equal_texts_stand_on_one_side(tmp_path):
    rows = [{"text": f"text {i % 40}"} for i in range(400)]
    source = load("jsonl", path=write(tmp_path, rows), text="text", windows="padded", validation=0.3)
    shuffled = load("jsonl", path=write(tmp_path, rows[::-1][:390], "b"), text="text", windows="padded", validation=0.3)
    test = set(texts(source, source.test))
    assert (
        test
        == {row["text"] for row in rows if held_out.by_content(row["text"], 0.3)}
        == set(texts(shuffled, shuffled.test))
    )
    assert not test & set(texts(source, source.train)) and source.train.size + source.test.size == 400


def test_equal_texts_with_labels_stand_on_one_side(tmp_path):
    """Of the texts that differ, the same part of each class is held out, and the copies of those."""
    rows = [{"text": f"text {i % 40}", "label": "good" if i % 40 < 30 else "bad"} for i in range(400)]
    source = load("jsonl", path=write(tmp_path, rows), text="text", label="label", validation=0.2)
    train, test = (texts(source, split) for split in (source.train, source.test))
    assert not set(train) & set(test) and len(train) + len(test) == 400
    assert np.bincount(every(source.test)["targets"]).tolist() == [2 * 10, 6 * 10]
    again = load("jsonl", path=write(tmp_path, rows), text="text", label="label", validation=0.2)
    assert texts(again, again.test) == test
    distinct = load("jsonl", path=write(tmp_path, rows[:40]), text="text", label="label", validation=0.2)
    assert set(texts(distinct, distinct.test)) == set(test)


def test_a_text_with_two_labels_stays_where_the_rarer_one_is_learned(tmp_path):
    rows = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(40)]
    for i in range(40):
        path = write(tmp_path, [*rows, {"text": f"text {i}", "label": "odd"}])
        source = load("jsonl", path=path, text="text", label="label", validation=0.5)
        assert source.labels == ("bad", "good", "odd") and 2 in every(source.train)["targets"]
        assert not set(texts(source, source.train)) & set(texts(source, source.test))


@pytest.mark.parametrize(
    ("rows", "label", "message"),
    [
        ([{"t": f"text {i}", "l": f"{i / 7}"} for i in range(40)], "l", "They have 40 different labels: is what"),
        ([{"t": "the prompt", "l": "ab"[i % 2]} for i in range(40)], "l", "holds out 0; .*All are equal"),
        ([{"t": "the prompt"}] * 40, None, "All are equal, and equal texts stay together"),
        ([{"t": "alone"}], None, r"of 1 example leaves . to train on and holds out .; both need one\. Change it"),
    ],
)
def test_why_nothing_can_be_held_out(tmp_path, rows, label, message):
    with pytest.raises(UserError, match=rf"data\.path='.*a\.jsonl': data\.validation=0\.1 {message}|{message}"):
        load("jsonl", path=write(tmp_path, rows), text="t", label=label)


@pytest.mark.parametrize(
    ("validation", "message"), [(0.0, "leaves 60 to train on and holds out 0"), (1.0, "leaves 0 to")]
)
def test_an_empty_split_is_named(tmp_path, validation, message):
    with pytest.raises(UserError, match=rf"data\.validation={validation:g} of 60 examples {message}.*data\.test_path"):
        load("jsonl", path=write(tmp_path, REVIEWS), text="text", validation=validation)


# Tokens and fingerprints


@pytest.mark.parametrize(("tokens", "vocab_size"), [("characters", None), ("words", 50), ("bpe", 300)])
def test_every_kind_of_tokens(tmp_path, tokens, vocab_size):
    rows = [{"t": f"the number {i}"} for i in range(30)]
    test = [{"t": "the numbers: 7, É"}]
    options = {"path": write(tmp_path, rows), "test_path": write(tmp_path, test, "b"), "text": "t", "windows": "padded"}
    source = load("jsonl", **options, tokens=tokens, vocab_size=vocab_size)
    assert texts(source, source.train)[3] == "the number 3"
    assert source.facts["vocab_size"] == source.tokenizer.size
    if tokens == "words":
        assert "numbers" not in source.tokenizer.words
    else:
        assert texts(source, source.test) == ["the numbers: 7, É"]


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def of(rows=REVIEWS, **options):
        return load("jsonl", path=write(tmp_path, rows), **{"text": "text", "label": "label", **options}).fingerprint

    same = of()
    assert same == of(length=16) == of(tokens="bpe", vocab_size=300)
    assert len({same, of(label=None), of(REVIEWS[:-1]), of(validation=0.2)}) == 4
    test_path = write(tmp_path, REVIEWS, "test.jsonl")
    changed = [{"text": "review 0", "label": "good"}, {"text": "review 00", "label": "bad"}, REVIEWS[0]]
    assert len({of([first, *REVIEWS[1:]], test_path=test_path) for first in changed}) == 3


def test_all_formats_give_the_same_source(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = {"jsonl": write(tmp_path, REVIEWS)}
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        paths[kind] = str(tmp_path / kind)
        rows = ["text" + separator + "label", *(r["text"] + separator + r["label"] for r in REVIEWS)]
        (tmp_path / kind).write_text("\n".join(rows))
    paths["parquet"] = str(tmp_path / "parquet")
    parquet.write_table(pyarrow.Table.from_pylist(REVIEWS), paths["parquet"])
    sources = {kind: load(kind, path=path, text="text", label="label") for kind, path in paths.items()}
    assert len({source.fingerprint for source in sources.values()}) == 1
    assert [source.name for source in sources.values()] == list(sources)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.text is not set.*There are: label, text"),
        ({"text": "txt"}, r"no column 'txt'.*Did you mean 'text'"),
        ({"txt": "text"}, r"data\.txt='text': unknown key\. Did you mean 'text'"),
        ({"text": "text", "label": "label", "windows": "packed"}, "with labels each window has one text"),
        ({"prompt": "text", "completion": "label", "windows": "contiguous"}, "would learn the prompts"),
        (
            {"prompt": "text", "completion": "label", "windows": "padded", "length": 7},
            r"a\.jsonl:\d+: the prompt alone has",
        ),
        ({"text": "label", "label": "text", "test_path": "no"}, r"data\.test_path='no': there is no such file"),
        ({"text": "text", "tokens": "bpe"}, r"data\.vocab_size is not set"),
        ({"text": "text", "encoding": "utf-9"}, r"data\.encoding='utf-9' is not known"),
    ],
)
def test_errors_name_the_option(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load("jsonl", path=write(tmp_path, REVIEWS), **options)


def test_one_class_is_no_classification(tmp_path):
    path = write(tmp_path, [{"t": "x", "l": 0}] * 9)
    with pytest.raises(UserError, match=r"a\.jsonl': all 9 labels to train on are '0'"):
        tables.jsonl(path, test_path=path, text="t", label="l")
