"""How likely a text is: each target once, with what stands before it; and which choice is the most likely."""

import json
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import registry, sharding
from flaxmodels.cli import scoring as cli
from flaxmodels.cli import trained
from flaxmodels.data.reading import Record
from flaxmodels.data.vocabularies import Bytes, Characters
from flaxmodels.inference import choice, scoring
from flaxmodels.inference.scoring import Span
from flaxmodels.models.classifier import TextClassifier
from flaxmodels.models.transformer import Transformer

LETTERS = Characters(tuple("abcdefghijklmnopqrst"))


class Bag(nn.Module):
    """A causal model that compiles in no time: what comes next depends on all that was there, and how long ago."""

    vocab_size: int
    max_length: int = 32

    @nn.compact
    def __call__(self, tokens):
        assert tokens.shape[1] <= self.max_length
        ago = np.subtract.outer(np.arange(tokens.shape[1]), np.arange(tokens.shape[1]))
        faded = np.where(ago >= 0, 0.8 ** np.abs(ago), 0).astype(np.float32)
        seen = jnp.einsum("ts,bsv->btv", faded, jax.nn.one_hot(tokens, self.vocab_size))
        return seen @ self.param("kernel", nn.initializers.normal(1.0), (self.vocab_size, self.vocab_size))


MODEL = Bag(20)


def mesh(**axes):
    return sharding.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])


ONE = mesh(data=1)
HERE = dict(mesh=ONE, batch=4)  # rows of one shape: there is one program to compile


def placed(params, where=ONE):
    return jax.device_put(params, sharding.shard_tree(params, where))


@pytest.fixture(scope="module")
def params():
    return placed({"kernel": np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)})


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 20, count)


def plain(params, tokens, place, context):
    """-log p of one token after so many before it, and whether it is the most probable; in plain NumPy."""
    seen = np.zeros(20)
    for i in range(context):
        seen[tokens[place - 1 - i]] += 0.8**i
    logits = seen @ np.asarray(params["kernel"], np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[place]]), (
        int(logits.argmax()) == tokens[place]
    )


@pytest.mark.parametrize(
    "size, silent, length, stride",
    [(2, 1, 8, 4), (9, 1, 8, 8), (10, 1, 8, 8), (40, 1, 8, 3), (41, 1, 8, 1), (17, 5, 8, 4), (40, 30, 8, 8)],
)
def test_windows_count_each_target_once(size, silent, length, stride):
    seen, before = [], {}
    for first, last, loud in scoring.windows(size, silent, length, stride):
        assert 0 <= first < last < size and last - first <= length and first < loud <= last
        seen += range(loud, last + 1)
        before |= {target: target - first for target in range(loud, last + 1)}
    assert seen == list(range(silent, size))
    assert all(before[target] >= min(target, length - stride + 1) for target in seen)


@pytest.mark.parametrize("stride", [3, 8, None])
def test_scores_are_those_of_one_token_after_the_other(params, stride):
    """Texts of several lengths together, with a batch that does not come out even, against each target alone."""
    spans = [Span(ids(size, size)) for size in (2, 7, 30, 8, 9)] + [Span(ids(20), 15)]
    found = scoring.scores(MODEL, params, {}, spans, mesh=ONE, length=8, stride=stride, batch=3)
    for span, score in zip(spans, found):
        places = [
            (place, place - first)
            for first, last, loud in scoring.windows(len(span.ids), span.silent, 8, stride or 4)
            for place in range(loud, last + 1)
        ]
        wanted = [plain(params, span.ids, place, context) for place, context in places]
        assert score.tokens == len(span.ids) - span.silent == len(wanted)
        assert score.nll == pytest.approx(math.fsum(nll for nll, _ in wanted), rel=1e-5)
        assert score.hits == sum(hit for _, hit in wanted)


def test_no_row_is_longer_than_the_model_can_see(params):
    spans = [Span(ids(20))]
    found = scoring.scores(Bag(20, max_length=24), params, {}, spans, mesh=ONE)
    same(found, scoring.scores(MODEL, params, {}, spans, **HERE))


def same(found, wanted):
    assert [score.nll for score in found] == pytest.approx([score.nll for score in wanted], rel=1e-5)
    assert [(score.hits, score.tokens) for score in found] == [(score.hits, score.tokens) for score in wanted]


def test_a_mesh_changes_nothing(params):
    spans = [Span(ids(size, size)) for size in (5, 40, 9, 33)]
    where = mesh(data=4, fsdp=2)
    spread = scoring.scores(MODEL, placed(params, where), {}, spans, mesh=where)
    same(spread, scoring.scores(MODEL, params, {}, spans, **HERE))


@pytest.mark.slow
def test_a_transformer_scores_the_same_in_parts():
    """On a mesh with heads, MLP and vocabulary split; and with its head left to the loss."""
    model = Transformer(vocab_size=20, layers=1, width=16, heads=2, max_length=32)
    made = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    spans = [Span(ids(size, size)) for size in (25, 40)]
    alone = scoring.scores(model, placed(made), {}, spans, mesh=ONE)
    where = mesh(data=2, fsdp=2, tensor=2)
    same(scoring.scores(model.clone(split_head=True), placed(made, where), {}, spans, mesh=where), alone)


def test_what_is_known_of_a_model_that_knows_nothing():
    """Each bit of a byte costs a bit; the first character is not predicted, and its bytes do not count."""
    texts = [Record("h\u00e9llo", last=False), Record(" world" * 9), Record("x"), Record("yz")]
    nothing = placed({"kernel": np.zeros((256, 256), np.float32)})
    found = scoring.measure(Bag(256), nothing, {}, Bytes(), texts, **HERE)
    assert (found.documents, found.tokens, found.nbytes) == (3, 60, 60)
    assert found.means["loss"] == pytest.approx(math.log(256), rel=1e-5)
    assert found.means["bits_per_byte"] == pytest.approx(8, rel=1e-5) and round(found.means["perplexity"]) == 256
    letters = Characters(("h", "l", "o", "\u00e9"))
    found = scoring.measure(Bag(256), nothing, {}, letters, [Record("\u00e9h\u00e9l")], **HERE)
    begun = scoring.measure(Bag(256), nothing, {}, letters, [Record("\u00e9h\u00e9l")], **HERE, begin=[2])
    assert (begun.tokens, begun.nbytes) == (4, 6)
    assert (found.tokens, found.nbytes) == (3, 4) and found.means["bits_per_byte"] == pytest.approx(3 * 8 / 4, rel=1e-5)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(length=33), "length=33 is out of range: expected 1 to the model's max_length=32"),
        (dict(length=8, stride=9), "stride=9 is out of range"),
        (dict(mesh=mesh(data=8), batch=12), "batch=12 does not divide"),
    ],
)
def test_what_can_not_be_scored_is_said(params, options, said):
    with pytest.raises(registry.UserError, match=said):
        scoring.scores(MODEL, params, {}, [Span(ids(9))], **{"mesh": ONE, **options})


def test_other_models_and_numbers_are_refused(params):
    classes = TextClassifier(vocab_size=20, classes=2)
    for model in (nn.Dense(4), classes, Transformer(vocab_size=20, causal=False)):
        with pytest.raises(registry.UserError, match=f"{type(model).__name__} can't be asked"):
            scoring.scores(model, {}, {}, [Span(ids(9))], mesh=ONE)
    broken = placed({"kernel": np.full((20, 20), np.nan, np.float32)})
    with pytest.raises(registry.UserError, match="not finite"):
        scoring.scores(MODEL, broken, {}, [Span(ids(9))], **HERE)
    with pytest.raises(registry.UserError, match="no text has a token to predict: 1 "):
        scoring.measure(MODEL, params, {}, LETTERS, [Record("a")], mesh=ONE)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_questions_are_read(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"question": "abc", "choices": ["d", "e"], "answer": 1, "subject": "letters"},
        {"question": "abc", "choices": ["d", "e", "f"], "answer": "f"},
        {"question": "", "choices": ["0", "1"], "answer": "0"},
        {"question": "abc", "choices": ["d", "e"]},
    )
    assert [found.answer for found in choice.read(path)] == [1, 2, 0, None]


@pytest.mark.parametrize(
    "row, said",
    [
        ("{", "is no JSON"),
        ([1], 'expected {"question"'),
        ({"question": 1, "choices": ["a", "b"]}, "question=1 is of type int"),
        ({"question": "a", "choices": ["b"]}, "expected two or more"),
        ({"question": "a", "choices": ["b", "b"]}, "expected two or more"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer=2 is none of the 2 choices"),
        ({"question": "a", "choices": ["b", "c"], "answer": "d"}, "answer='d' is none"),
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "answer=True is none"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, said):
    path = write(tmp_path / "q.jsonl", {"question": "a", "choices": ["b", "c"]}, row)
    with pytest.raises(registry.UserError, match=r"q\.jsonl:2") as caught:
        choice.read(path)
    assert said in str(caught.value)


def test_choices_are_compared_by_their_own_tokens(params):
    """Against the sum over each choice, by the plain way; the question itself does not count."""
    asked = choice.Question("abcabc", ("d", "efgh", "mm"), 1)
    (found,) = choice.choose(MODEL, params, {}, LETTERS, [asked], **HERE, template="{question}{choice}")
    for text, likelihood in zip(asked.choices, found.likelihoods):
        tokens = LETTERS.encode(asked.question + text)
        wanted = [plain(params, tokens, place, place)[0] for place in range(6, len(tokens))]
        assert likelihood == pytest.approx(-math.fsum(wanted), rel=1e-5)
    lengths = np.array([1, 4, 2])
    assert found.picks["raw"] == int(np.argmax(found.likelihoods)) and not found.cut
    assert found.picks["per_token"] == found.picks["per_byte"] == int(np.argmax(found.likelihoods / lengths))
    assert choice.accuracy([asked], [found])["chance"] == pytest.approx(1 / 3)


def test_a_long_question_loses_its_begin_and_not_the_choice(params):
    long = choice.Question("abcdefghij" * 4, ("kl", "m"), 0)
    (found,) = choice.choose(MODEL, params, {}, LETTERS, [long], **HERE, template="{question}{choice}")
    tokens = LETTERS.encode((long.question + "kl")[-33:])  # 32 inputs, and what the last of them predicts
    wanted = math.fsum(plain(params, tokens, place, place)[0] for place in (31, 32))
    assert found.cut == 9 and found.likelihoods[0] == pytest.approx(-wanted, rel=1e-5)
    longer = [choice.Question("a", ("k" * 33, "m"))]
    with pytest.raises(registry.UserError, match=r"the choice 'k+'\.\.\. has 33 tokens, and the model sees 32"):
        choice.choose(MODEL, params, {}, LETTERS, longer, **HERE, template="{question}{choice}")


class Merging:
    """One token for each letter, but for "ab", which is "t"."""

    end, begin, token_bytes = None, None, (1,) * 19 + (2,)

    def encode(self, text):
        return LETTERS.encode(text.replace("ab", "t"))


def test_a_token_that_reaches_into_the_choice_is_of_the_choice(params):
    """Behind "ca", "b" makes another token of "a": that one counts, and what is before it stands before."""
    asked = [choice.Question("ca", ("bd", "d"))]
    (found,) = choice.choose(MODEL, params, {}, Merging(), asked, **HERE, template="{question}{choice}")
    for text, first, likelihood in zip(("ctd", "cad"), (1, 2), found.likelihoods):
        tokens = LETTERS.encode(text)
        wanted = math.fsum(plain(params, tokens, place, place)[0] for place in range(first, 3))
        assert likelihood == pytest.approx(-wanted, rel=1e-5)


def test_the_length_of_a_choice_is_in_tokens_or_bytes():
    asked = choice.Question("", ("\u00e9\u00e9\u00e9\u00e9", "abc"))
    found = choice._chosen(asked, [scoring.Score(3.0, 0, 1), scoring.Score(4.0, 0, 4)], 0)
    assert found.picks == {"raw": 0, "per_token": 1, "per_byte": 0}


def test_choices_with_nothing_before_them(params):
    """The token that ends documents stands before them; where there is none, that is said."""
    asked = [choice.Question("", ("ab", "ba"), 0)]
    with pytest.raises(registry.UserError, match="nothing stands before the choice 'ab'"):
        choice.choose(MODEL, params, {}, LETTERS, asked, **HERE, template="{question}{choice}")
    ending = Characters(LETTERS.characters[:19], documents=True)
    (found,) = choice.choose(MODEL, params, {}, ending, asked, **HERE, template="{question}{choice}")
    (begun,) = choice.choose(MODEL, params, {}, LETTERS, asked, **HERE, template="{question}{choice}", begin=[19])
    assert begun == found
    assert found.likelihoods[0] == pytest.approx(
        -math.fsum(plain(params, np.array([19, 0, 1]), place, place)[0] for place in (1, 2)), rel=1e-5
    )
    with pytest.raises(registry.UserError, match=r"expected \{choice\} at its end"):
        choice.choose(MODEL, params, {}, LETTERS, asked, **HERE, template="{choice} {question}")


def test_accuracy_counts_the_questions_with_an_answer():
    def chosen(raw, other):
        return choice.Chosen((0.0, 0.0), {"raw": raw, "per_token": other, "per_byte": other}, 0)

    asked = [choice.Question("", ("a", "b"), answer) for answer in (0, 1, 1, None)]
    found = choice.accuracy(asked, [chosen(0, 1), chosen(1, 1), chosen(0, 1), chosen(0, 0)])
    assert found == {"raw": 2 / 3, "per_token": 2 / 3, "per_byte": 2 / 3, "chance": 0.5}
    assert math.isnan(choice.accuracy(asked[3:], [chosen(0, 0)])["raw"])


@pytest.fixture
def ask(params, monkeypatch, capsys):
    """Run a verb on `MODEL`; returns what it printed."""

    def asked(verb, *flags):
        made = types.SimpleNamespace(model=MODEL, params=params, extra={}, config={}, where="a model")
        monkeypatch.setattr(trained, "load", lambda asked: (made, LETTERS, ONE))
        assert verb([*flags, "--workdir=w", "--batch=4"]) == 0
        return capsys.readouterr().out

    return asked


def test_score_reads_texts_and_columns(ask, params, tmp_path):
    (tmp_path / "t.txt").write_text("abcabcabc")
    rows = write(tmp_path / "t.jsonl", {"text": "abcabcabc", "other": "aa"}, {"text": "b", "other": "ab"})
    (found,) = scoring.scores(MODEL, params, {}, [Span(LETTERS.encode("abcabcabc"))], **HERE)
    whole = json.loads(ask(cli.score, f"--data={tmp_path / 't.txt'}", "--json"))
    assert whole["nll"] == pytest.approx(found.nll) and whole["loss"] == pytest.approx(found.nll / 8)
    assert json.loads(ask(cli.score, f"--data={rows}", "--json")) == {**whole, "documents": 2}
    assert json.loads(ask(cli.score, f"--data={rows}", "--column=other", "--json"))["tokens"] == 2
    shown = ask(cli.score, f"--data={tmp_path / 't.txt'}", "--stride=1")
    assert shown.startswith("a model: 8 tokens, 8 bytes, texts: 1\n") and "perplexity" in shown
    with pytest.raises(registry.UserError, match="several kinds, jsonl, text"):
        ask(cli.score, f"--data={rows}", f"--data={tmp_path / 't.txt'}")


def test_choose_shows_accuracy_or_what_it_chose(ask, tmp_path):
    asked, template = {"question": "abc", "choices": ["d", "e"]}, "--template={question}{choice}"
    path = write(tmp_path / "q.jsonl", asked)
    number = json.loads(ask(cli.choose, f"--data={path}", "--json", template))["picks"]["raw"]
    assert ask(cli.choose, f"--data={path}", template).splitlines()[1] == f"{path}:1: {asked['choices'][number]}"
    path = write(tmp_path / "q.jsonl", {**asked, "answer": number}, {**asked, "answer": 1 - number})
    shown = ask(cli.choose, f"--data={path}", template)
    assert "2 questions, 2 of them with an answer" in shown
    assert [line.split()[-1] for line in shown.splitlines()[1:]] == ["0.5"] * 4


@pytest.mark.parametrize("flags, said", [([], "name one model"), (["--workdir=w", "--from=f"], "name one model")])
def test_one_model_is_named(flags, said):
    with pytest.raises(registry.UserError, match=said):
        cli.score([*flags, "--data=t"])
    with pytest.raises(registry.UserError, match=r"'--sride=3' is not a flag. Did you mean '--stride'"):
        cli.score(["--data=t", "--sride=3", "--workdir=w"])
