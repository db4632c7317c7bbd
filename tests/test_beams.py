"""Beam search: what a search through all texts finds, and what `transformers` finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import sharding
from flaxmodels.data.vocabularies import Characters
from flaxmodels.inference.generate import Generator
from flaxmodels.inference.loading import load
from flaxmodels.inference.sampling import Sampling
from flaxmodels.models.transformer import Transformer

MODEL = Transformer(vocab_size=5, layers=1, width=8, heads=2, max_length=8)
LETTERS = Characters(("a", "b", "c", "d", "e"))
END = 4
PROMPTS = ([1, 2], [3], [0, 0, 3, 3])


def generator(beams, texts=2):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), jnp.float32), shapes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Generator(MODEL, params, batch=beams * texts, mesh=mesh, tokenizer=LETTERS, ends=(END,), chunk=4)


LOGS = jax.jit(lambda params, ids: jax.nn.log_softmax(MODEL.apply({"params": params}, ids)))


def best_of_all(params, prompt, count, penalty):
    """The best of all texts with up to `count` new tokens: those that end, and those as long as they may be."""
    bodies = [b for size in range(count) for b in itertools.product(range(END), repeat=size)]
    texts = [(*body, END) for body in bodies] + list(itertools.product(range(END), repeat=count))
    padded = np.zeros((len(texts), MODEL.max_length), np.int32)
    for row, text in zip(padded, texts):
        row[: len(prompt) + len(text)] = (*prompt, *text)
    logs = np.asarray(LOGS(params, padded))
    scores = []
    for row, text in enumerate(texts):
        each = [logs[row, len(prompt) - 1 + i, token] for i, token in enumerate(text)]
        scores.append(sum(each) / len(text) ** penalty)
    return tuple(i for i in texts[int(np.argmax(scores))] if i != END)


@pytest.mark.slow
def test_with_enough_beams_it_finds_the_best_of_all_texts():
    """4 x 4 x 4 hypotheses are all that three tokens can be. More texts than go at once."""
    searching, count = generator(64), 3
    for penalty in (0.0, 1.0, 3.0):
        found = searching.complete(PROMPTS, Sampling(beams=64, length_penalty=penalty), count)
        for piece, prompt in zip(found, PROMPTS):
            assert piece.tokens == best_of_all(searching.params, prompt, count, penalty)
            assert piece.text == LETTERS.decode(piece.tokens)
            assert piece.ended == ("length" if len(piece.tokens) == count else "end")


@pytest.mark.nightly
def test_as_transformers_does(tmp_path):
    """Greedy, with a penalty, and by beams, on a directory of Hugging Face; with an id that ends texts."""
    reason = "what ours is held against"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    sizes = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, eos_token_id=7, bos_token_id=None, pad_token_id=7)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loaded = load(tmp_path, mesh=mesh)
    assert loaded.ends == (7,) and loaded.tokenizer is None
    ours = Generator(loaded.model, loaded.params, batch=8, mesh=mesh, ends=loaded.ends)
    asked = {
        Sampling(temperature=0): {},
        Sampling(temperature=0, repetition_penalty=1.3): {"repetition_penalty": 1.3},
        Sampling(beams=4): {"num_beams": 4},
        Sampling(beams=4, length_penalty=-1.0): {"num_beams": 4, "length_penalty": -1.0},
        Sampling(beams=3, length_penalty=2.0): {"num_beams": 3, "length_penalty": 2.0},
    }
    prompts = [[1, 2, 3], [9, 30, 4, 4, 20], [11], [25, 26]]
    ended = set()
    for sampling, options in asked.items():
        for found, prompt in zip(ours.complete(prompts, sampling, 24), prompts):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                options |= {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
                made = theirs.generate(ids, **options)[0, len(prompt) :].tolist()
            assert list(found.tokens) == (made[: made.index(7)] if 7 in made else made)
            ended.add(found.ended)
    assert ended == {"end", "length"}
