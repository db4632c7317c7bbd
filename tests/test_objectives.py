"""Objectives on text: what is hidden, what is predicted, and that only (seed, step, example) decides on it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import ADAM, evaluate, means, train

import flaxmodels.data
from flaxmodels import job, sharding
from flaxmodels.data import augment, objective_masked, objectives, tokenizer, words
from flaxmodels.data import objective_spans as spans
from flaxmodels.data.split import Source, Split
from flaxmodels.registry import UserError

LINES = [f"number {i} and {i * i} are here" for i in range(60)]


@functools.cache
def keys(count, seed=0):
    return augment.example_keys(seed, np.arange(count), 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("\n".join(LINES))
    return str(file)


def load(path, **options):
    return flaxmodels.data.load(**{"name": "lines", "path": path, "length": 24, **options})


def looked(source):
    """(index, step, seed) -> a batch of training, and index -> one of an evaluation; compiled once for a size."""
    drawn = jax.jit(
        lambda rows, index, step, seed: augment.make((), seed=seed, facts=source.facts, draw=source.draw)(
            source.train.prepare(rows, index), index, step
        )
    )
    fixed = jax.jit(source.test.prepare)

    def training(index, step=0, seed=0):
        index = np.asarray(index, np.int32)
        rows = source.train.gather(source.train.arrays, index)
        return jax.device_get(drawn(rows, index, np.int32(step), np.uint32(seed)))

    def evaluation(index):
        index = np.asarray(index, np.int32)
        return jax.device_get(fixed(source.test.gather(source.test.arrays, index), index))

    return training, evaluation


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def row(batch, number):
    return jax.tree.map(lambda x: x[number], batch)


# Masked


TOKENS, ORDINARY, HIDDEN = 40, np.arange(3, 50, dtype=np.int32), 1


def masked(tokens, candidates, **options):
    given = {"rate": 0.25, "shares": (0.8, 0.1), "edges": None, **options}
    choose = functools.partial(objective_masked._masked_row, ordinary=ORDINARY, mask_id=HIDDEN, **given)
    segments = np.ones_like(tokens)
    return map(np.asarray, jax.jit(jax.vmap(choose))(tokens, segments, candidates, keys(len(tokens))))


def test_masked_hides_and_keeps_in_their_shares():
    tokens = np.random.default_rng(0).integers(3, 50, (400, TOKENS)).astype(np.int32)
    counts = np.arange(400) % 41
    tokens[np.arange(TOKENS) >= counts[:, None]] = 2  # special, or padding
    seen, chosen = masked(tokens, tokens > 2)
    assert not chosen[tokens == 2].any() and (seen == tokens)[~chosen].all()
    np.testing.assert_array_equal(chosen.sum(1), np.where(counts, np.maximum(1, np.rint(0.25 * counts)), 0))
    hidden, kept = (seen == HIDDEN)[chosen], (seen == tokens)[chosen]
    n = chosen.sum()
    assert abs(hidden.mean() - 0.8) < 4 * (0.16 / n) ** 0.5
    assert abs(kept.mean() - (0.1 + 0.1 / 47)) < 4 * (0.09 / n) ** 0.5
    drawn = seen[chosen][~hidden & ~kept]
    assert set(drawn) <= set(ORDINARY.tolist()) and len(set(drawn.tolist())) > 40
    places = chosen[counts >= 20, :20].mean(0)
    assert places.min() > 0.12 and places.max() < 0.38, "anywhere"


@pytest.mark.slow
def test_whole_words_are_masked_whole():
    begins, ends = np.zeros(50, bool), np.zeros(50, bool)
    begins[[10, 11]], ends[12] = True, True  # 10 a a | 12 | 11 a 12 | a ...
    tokens = np.tile(np.array([10, 3, 4, 12, 11, 5, 12, 6, 7, 10], np.int32), (200, 1))
    word = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    _, chosen = masked(tokens, np.ones_like(tokens, bool), edges=(begins, ends), rate=0.3, shares=(1.0, 0.0))
    for number in range(4):
        of_word = chosen[:, word == number]
        assert (of_word.all(1) == of_word.any(1)).all() and 0 < of_word.all(1).sum() < 200
        assert (of_word[:, 0] != chosen[:, word == (number + 1) % 4][:, 0]).any(), "each by itself"
    assert (chosen.sum(1) >= 3).all() and (chosen.sum(1) <= 3 + 3).all()


def test_edges_of_words():
    def texts(made, text):
        begins, ends = words.edges(made)
        ids, found = made.encode(text).tolist(), []
        for before, now in zip([None, *ids], ids):
            if before is None or begins[now] or ends[before]:
                found.append([])
            found[-1].append(now)
        return [made.decode(np.array(word)) for word in found]

    for kind, size in (("bytes", None), ("characters", None), ("words", 20)):
        made = tokenizer.train(kind, lambda: ["ab  cd\ne"], vocab_size=size)
        expected = ["ab", " ", " ", "cd", "\n", "e"] if kind != "words" else [" ab", " cd", "\n", " e"]
        assert [word.strip(" ") or word for word in texts(made, "ab  cd\ne")] == [w.strip(" ") or w for w in expected]
    assert [w.any() for w in words.edges(tokenizer.train("bytes", list))] == [True, True]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"type": "WordPiece", "vocab": {"play": 0, "##ing": 1, "a": 2}}, ([1, 0, 1], [0, 0, 0])),
        ({"type": "BPE", "vocab": {"\u0120a": 0, "b": 1, "\u010a": 2}, "merges": []}, ([1, 0, 1], [0, 0, 1])),
        ({"type": "Unigram", "vocab": [["\u2581a", -1.0], ["b", -2.0], ["\u2581", -3.0]]}, ([1, 0, 1], [0, 0, 1])),
    ],
    ids=["WordPiece", "BPE", "Unigram"],
)
def test_edges_of_words_by_the_names_of_tokens(model, expected):
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    unknown = {"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    model |= {"WordPiece": unknown, "Unigram": {"unk_id": 1}}.get(model["type"], {})
    empty = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    made = tokenizer.BytePairs(json.dumps({"version": "1.0", "model": model, "decoder": decoder, **empty}))
    assert [edge.astype(int).tolist() for edge in words.edges(made)] == list(expected)


# Spans


def test_numbers_of_spans_are_those_of_t5():
    assert spans.counts(512, 0.15, 3.0) == (77, 26) and spans.counts(2, 0.15, 3.0) == (1, 1)
    assert spans.counts(1, 0.15, 3.0) == spans.counts(0, 0.5, 3.0) == (0, 0)
    assert spans.counts(10, 0.9, 1.0) == (9, 2), "a token between two spans"
    for length in range(5, 80):
        most = spans.raw_length(length, 0.3, 2.0)
        used = [n + 2 * spans.counts(n, 0.3, 2.0)[1] + 1 for n in (most, most + 1)]
        assert used[0] <= length < used[1]


SENTINELS, END = np.arange(100, 110, dtype=np.int32), 99


def undone(sequence):
    """The text that a sequence was made of, and its spans."""
    end = sequence.index(END)
    left, right = sequence[:end], sequence[end + 1 : sequence.index(END, end + 1)]
    parts, spanned = {}, None
    for token in right:
        if token >= 100:
            spanned = parts.setdefault(token, [])
        else:
            spanned.append(token)
    text = [t for token in left for t in (parts[token] if token >= 100 else [token])]
    return text, list(parts.values()), [token for token in left if token >= 100]


@pytest.mark.slow
def test_spans_can_be_put_back():
    length, rate, mean = 40, 0.3, 2.0
    most = spans.raw_length(length, rate, mean)
    sizes = np.arange(240, dtype=np.int32) % (most + 1)
    tokens = np.tile(np.arange(1, length + 1, dtype=np.int32), (240, 1))
    corrupt = functools.partial(spans.corrupt, rate=rate, mean=mean, sentinels=SENTINELS, end=END)
    sequences, firsts, totals = map(np.asarray, jax.jit(jax.vmap(corrupt))(tokens, sizes, keys(240)))
    seen = set()
    for sequence, first, total, size in zip(sequences, firsts, totals, sizes):
        if size < 2:
            assert first == total == 0 and not sequence.any()
            continue
        cut, parts = spans.counts(int(size), rate, mean)
        text, found, left = undone(sequence.tolist())
        assert text == list(range(1, size + 1))
        assert left == SENTINELS[:parts].tolist() and len(found) == parts and sum(map(len, found)) == cut
        assert (first, total) == (size - cut + parts + 1, size + 2 * parts + 2)
        assert sequence[first - 1] == sequence[total - 1] == END and not sequence[total:].any()
        seen |= {tuple(span) for span in found} if size == most else set()
    assert {len(span) for span in seen} >= {1, 2, 3} and len(seen) > 15


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["contiguous", pytest.param("padded", marks=pytest.mark.nightly)])
def test_denoise_learns_what_was_cut_out(path, windows):
    source = load(path, objective={"name": "denoise", "bidirectional": True}, windows=windows)
    assert source.facts == {"vocab_size": 258, "max_length": 24} and source.tokens_per_example == 24
    assert source.transforms["length"] == spans.raw_length(24, 0.15, 3.0) == 21 and source.token_bytes is None
    batch = looked(source)[0]([0, 1, 2, -1], 5)
    plain = looked(load(path, windows=windows, length=21))[0]([0, 1, 2, -1])["inputs"]
    plain = plain["tokens"] if windows == "padded" else plain
    sentinel, newline = source.tokenizer.special["<extra_id_0>"], source.tokenizer.end
    for number in range(3):
        one = row(batch, number)
        inputs, size = one["inputs"], int(one["inputs"]["segments"].sum())
        assert np.array_equal(inputs["tokens"][1:size], one["targets"][: size - 1])
        sequence = [*inputs["tokens"][:size].tolist(), int(one["targets"][size - 1])]
        at = len(sequence) - 2 - sequence[-2::-1].index(sentinel)  # where the second half begins
        left, right = sequence[: at - 1], sequence[at + 1 : -1]
        assert sequence[at - 1] == sequence[-1] == newline
        place = left.index(sentinel)
        assert left[:place] + right + left[place + 1 :] == [t for t in plain[number].tolist() if t]
        assert inputs["prefix"].tolist() == [1] * at + [0] * (24 - at)
        assert np.flatnonzero(one["weights"]).tolist() == list(range(at - 1, size)), "from the sentinel to the end"
    assert not batch["weights"][3].any() and not batch["inputs"]["segments"][3].any()


# Prefixes


@pytest.mark.slow
def test_prefixes_of_prompts_are_the_prompts(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps({"p": "x" * (1 + i % 3), "c": "y" * (1 + i % 2)}) + "\n" for i in range(40)))
    options = dict(path=str(file), test_path=str(file), prompt="p", completion="c", length=16)
    source = flaxmodels.data.load("jsonl", objective={"name": "prefix"}, **options)
    training, evaluation = looked(source)
    batch = training(range(source.train.size), 3)
    inputs = batch["inputs"]
    real = inputs["segments"] > 0
    assert np.array_equal(inputs["prefix"][real], inputs["tokens"][real] == ord("x"))
    assert not inputs["prefix"][~real].any() and same(batch, evaluation(range(source.train.size))), "nothing is drawn"
    plain = flaxmodels.data.load("jsonl", **options)
    assert same(batch["weights"], looked(plain)[1](range(plain.train.size))["weights"])
    assert source.token_bytes == plain.token_bytes


@pytest.mark.slow
def test_prefixes_of_texts_are_cut_anywhere(path):
    source = load(path, objective={"name": "prefix"}, length=64)
    index = np.arange(source.train.size)
    batch = looked(source)[0](index)
    segments, positions, shown = (batch["inputs"][k] for k in ("segments", "positions", "prefix"))
    cuts = []
    for place in range(len(index)):
        for number in range(1, segments[place].max() + 1):
            here = segments[place] == number
            cut = int(shown[place, here].sum())
            assert 1 <= cut <= here.sum() and (shown[place, here] == (positions[place, here] < cut)).all()
            assert (batch["weights"][place][here] == (positions[place, here] >= cut - 1)).all()
            cuts.append((cut - 1) / here.sum())
    assert not shown[segments == 0].any() and not batch["weights"][segments == 0].any()
    assert len(set(cuts)) > len(cuts) / 2 and abs(np.mean(cuts) - 0.47) < 0.12


# What decides


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "prefix", pytest.param("denoise", marks=pytest.mark.nightly)])
def test_only_seed_step_and_example_decide(path, name):
    source = load(path, objective={"name": name}, windows="contiguous", length=16)
    training, evaluation = looked(source)
    one = row(training([7, 2, 5, 1, 0, 3, 4, 6], 3), 0)
    assert same(one, row(training([1, 3, 7, 0, 2, 8, 9, 4], 3), 2))
    assert not same(one, row(training([7] * 8, 4), 0)) and not same(one, row(training([7] * 8, 3, seed=1), 0))
    assert same(training([7] * 8, 3), jax.tree.map(lambda x: np.stack([x] * 8), one)), "in its place or another"
    assert same(row(evaluation([1, 0]), 0), row(evaluation([0, 1]), 1)), "an evaluation draws what it drew"
    # Eight devices draw what one does.
    index = np.arange(8, dtype=np.int32)
    rows = source.train.gather(source.train.arrays, index)
    where = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()))
    drawn = jax.jit(
        lambda rows, index: augment.make((), seed=0, facts=source.facts, draw=source.draw)(
            source.train.prepare(rows, index), index, np.int32(3)
        )
    )
    assert same(training(index, 3), jax.device_get(drawn(*jax.device_put((rows, index), where))))


@pytest.mark.slow
def test_masked_facts_and_tokens(path):
    plain, source = load(path), load(path, objective={"name": "masked"})
    assert plain.facts == {"vocab_size": 257, "max_length": 24} and plain.draw is None
    assert source.facts == {"vocab_size": 258, "max_length": 24, "causal": False, "mask_token": 257}
    assert source.tokenizer.special == {"[MASK]": 257} and source.fingerprint == plain.fingerprint
    assert source.transforms == {**plain.transforms, "objective": {"name": "masked"}}
    batch, before = looked(source)[1]([0, 1, -1]), looked(plain)[1]([0, 1, -1])
    real, tokens = batch["inputs"]["segments"] > 0, before["inputs"]["tokens"]
    assert np.array_equal(batch["targets"][:2], tokens[:2]) and not real[2].any() and not batch["weights"][2].any()
    candidates = real & (tokens != plain.tokenizer.end)
    assert np.array_equal(batch["weights"].sum(1), np.maximum(1, np.rint(0.15 * candidates.sum(1))) * candidates.any(1))
    assert (batch["weights"][~candidates] == 0).all()


@pytest.mark.slow
def test_the_last_window_has_no_tokens_after_the_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefghij" * 7)
    source = flaxmodels.data.load("text", objective={"name": "masked"}, path=str(file), length=16, validation=0.2)
    last = row(looked(source)[0]([source.train.size - 1]), 0)
    count = 56 - 16 * (source.train.size - 1)
    assert last["inputs"]["segments"].tolist() == [1] * count + [0] * (16 - count)
    assert not last["weights"][count:].any() and last["weights"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": {"rate": 0.1}}, r"has no name\. There are: denoise, masked, prefix"),
        ({"objective": {"name": "mask"}}, r"data\.objective\.name='mask' does not exist\. Did you mean 'masked'"),
        ({"objective": {"name": "masked", "rat": 1}}, r"data\.objective\.rat=1: unknown key\. Did you mean 'rate'"),
        ({"objective": {"name": "masked", "rate": 0.0}}, r"data\.objective\.rate=0\.0 is out of range"),
        ({"objective": {"name": "masked", "mask": 0.8, "random": 0.3}}, r"mask=0\.8 and random=0\.3 are parts of"),
        ({"objective": {"name": "denoise"}}, r"data\.windows='packed': with .*one text"),
        ({"objective": {"name": "denoise"}, "length": 4, "windows": "padded"}, r"data\.length=4 has no room"),
        ({"objective": {"name": "masked"}, "name": "synthetic_tokens", "path": None}, r"text alone: .* have no text"),
        (
            {"objective": {"name": "denoise"}, "name": "digits", "path": None, "length": None},
            r"the option data\.length",
        ),
    ],
)
def test_errors_name_the_option(path, options, message):
    given = {key: value for key, value in {"name": "lines", "path": path, "length": 24, **options}.items() if value}
    with pytest.raises(UserError, match=message):
        flaxmodels.data.load(**given)


def test_an_objective_does_not_go_with_labels_or_prompts(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a,b\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    with pytest.raises(UserError, match="learned from text alone: these data have labels"):
        flaxmodels.data.load("csv", objective={"name": "masked"}, path=str(file), text="a", label="b")
    with pytest.raises(UserError, match="have prompts, for which 'prefix' is the objective"):
        flaxmodels.data.load("csv", objective={"name": "masked"}, path=str(file), prompt="a", completion="b")


def halves(text):
    """An objective of one's own: the second half of each window is learned."""

    def lay(batch):
        batch["weights"] *= jnp.arange(batch["weights"].shape[1])[None] >= batch["weights"].shape[1] // 2
        return batch

    return objectives.Objective(text.load(), lay, lambda batch, keys: batch)


@pytest.mark.slow
def test_an_objective_of_ones_own(path):
    source = load(path, objective={"name": "test_objectives:halves"}, windows="contiguous")
    for batch in looked(source)[0]([0]), looked(source)[1]([0]):
        assert batch["weights"].tolist() == [[0.0] * 12 + [1.0] * 12]


@pytest.mark.slow
def test_a_mixture_has_one_objective(path):
    part = {"name": "lines", "path": path, "length": 24, "windows": "padded"}
    sources = ({**part, "weight": 1}, {**part, "weight": 3})
    source = flaxmodels.data.load("mixture", objective={"name": "masked"}, sources=sources)
    assert source.facts["mask_token"] == 257 and (looked(source)[0]([0, 60])["weights"].sum(1) > 0).all()
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.objective=.*unknown key"):
        flaxmodels.data.load("mixture", sources=({**part, "weight": 1, "objective": {"name": "masked"}}, sources[1]))


# In a job


def learning(path, objective, **model):
    data = dict(name="lines", path=path, length=24, objective=objective, windows="padded", batch_size=8, validation=0.2)
    fields = dict(name="transformer", layers=1, width=16, heads=2, **model)
    return dict(model=fields, data=data, optim=ADAM, train=dict(duration=5, log_every=1), seed=3)


def test_a_causal_model_is_refused_for_masks(path):
    with pytest.raises(UserError, match=r"model\.causal=True contradicts data\.objective, which needs causal=False"):
        job.assemble(learning(path, {"name": "masked"}, causal=True))


@pytest.mark.parametrize("objective", [None, {"name": "prefix"}, {"name": "denoise", "bidirectional": True}])
def test_a_model_that_sees_both_sides_is_refused_for_next_tokens(path, objective):
    said = r"model\.name='transformer' sees the tokens on both sides .*set --config\.data\.objective\.name=masked"
    with pytest.raises(UserError, match=said):
        job.assemble(learning(path, objective, causal=False))
    with pytest.raises(UserError, match=r"model\.name='bert' sees the tokens on both sides"):
        job.assemble(learning(path, objective) | dict(model=dict(name="bert", layers=1, width=16, heads=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [{"name": "masked"}, pytest.param({"name": "denoise", "bidirectional": True}, marks=pytest.mark.nightly)],
    ids=lambda objective: objective["name"],
)
def test_objectives_are_learned_the_same_on_any_mesh(path, objective):
    found = []
    for devices in (8, 1):
        made = job.assemble(learning(path, objective), devices=jax.devices()[:devices])
        assert made.model.causal == (objective["name"] != "masked")
        state, packed, names = train(made)
        found.append(means(packed, names)["loss"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    measured, count = evaluate(made, state)
    test = made.source.test
    index = np.arange(test.size, dtype=np.int32)
    assert count == test.prepare(test.gather(test.arrays, index), index)["weights"].sum()
    assert found[0][-1] < found[0][0] and measured["loss"] < found[0][0]


def test_a_source_without_windows_is_named():
    def bare():
        split = Split(1, {"a": np.zeros(1)}, lambda arrays, index: {}, lambda rows, index: {})
        return Source("bare", split, split, {}, "")

    with pytest.raises(UserError, match="have no text"):
        objectives.apply({"name": "prefix"}, bare, None)
