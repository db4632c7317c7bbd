"""The recipes for text: the table of the chatbot, the two stages of SST-2, and the bag of n-grams."""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from flaxmodels import loop
from flaxmodels.config import load_config
from flaxmodels.models.ngrams import NGrams

PHRASES = [(f"a {word} film number {i}", label) for i in range(20) for word, label in (("fine", 1), ("dull", 0))]


def logits(model, table, tokens, segments):
    params = {"ngrams": {"embedding": jnp.asarray(table, jnp.float32)}, "bias": jnp.zeros(model.classes)}
    inputs = {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments)}
    return np.asarray(jax.jit(model.apply)({"params": params}, inputs))


def test_ngrams_are_counted_within_the_text():
    """With all weights at 1, logits are the roots of the numbers of n-grams, whatever padding holds."""
    tokens, segments = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    found = logits(NGrams(classes=1, smallest=2, largest=3, buckets=64), np.ones((64, 1)), tokens, segments)
    # Of 4 tokens 3 + 2, of 2 tokens 1, of 1 token none; over the root of their number.
    np.testing.assert_allclose(found[:, 0], [5**0.5, 1, 0], rtol=1e-6)


def test_equal_ngrams_have_equal_weights_wherever_they_stand():
    tokens = [[7, 8, 9, 1, 1], [2, 2, 7, 8, 9], [9, 8, 7, 1, 1]]
    segments = [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    table = np.random.default_rng(0).normal(size=(2**12, 3))
    first, second, third = logits(NGrams(3, smallest=3, largest=3, buckets=2**12), table, tokens, segments)
    np.testing.assert_array_equal(first, second)
    assert (first != third).all()


@pytest.mark.parametrize("fields", [{"smallest": 0}, {"smallest": 7}, {"buckets": 0}, {"classes": 0}])
def test_fields_are_checked(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        NGrams(**{"classes": 2, **fields})


def test_the_table_of_the_chatbot_fits_its_window():
    rows = list(csv.DictReader((ROOT / "configs" / "chatbot.csv").read_text().splitlines()))
    config = load_config(ROOT / "configs" / "chatbot_gpt2.py")
    assert len(rows) >= 100 and len({row["question"] for row in rows}) == len(rows)
    assert max(len((row["question"] + row["answer"]).encode()) for row in rows) <= config.data.length
    assert all(row["question"].isascii() and row["answer"].isascii() and row["answer"] for row in rows)


def test_the_chatbot_takes_a_folder():
    config = load_config(f"{ROOT}/configs/chatbot_gpt2.py:some/gpt2")
    assert (config.start.workdir, config.data.tokens) == ("some/gpt2", "some/gpt2/tokenizer.json")


@pytest.mark.nightly
def test_classes_start_from_what_guessing_words_has_learned(tmp_path):
    table = tmp_path / "phrases.tsv"
    table.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in PHRASES))
    for stage, start in (("masked", None), ("classes", tmp_path / "masked")):
        config = load_config(f"{ROOT}/configs/sst2_bert.py:{stage}")
        with config.unlocked(), config.ignore_type():
            config.data.update(path=str(table), test_path=str(table), batch_size=8)
            config.train.update(duration=2, eval_every=0)
            config.optim.warmup = 0
            if start:
                config.start.workdir = str(start)
                config.data.tokens = str(start / "tokenizer.json")
        outcome = loop.fit(config, tmp_path / stage, devices=jax.devices()[:1], stream=io.StringIO())
        assert outcome.finished and outcome.step == 2
    assert "eval/accuracy" in outcome.metrics
