"""Generation: what the model itself would choose, whatever else is computed at the same time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import sharding
from flaxmodels.data.vocabularies import Bytes, Characters
from flaxmodels.inference import decoding, sampling
from flaxmodels.inference.generate import Generator, prompt_ids
from flaxmodels.inference.sampling import Sampling
from flaxmodels.models.transformer import Transformer
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

MODEL = Transformer(vocab_size=64, layers=1, width=16, heads=2, max_length=32, windows=(12,))
WHOLE = MODEL.clone(windows=(0,), positions="learned")
PROMPTS = [[1, 2, 3], [5] * 9, [7, 8], list(range(20, 37)), [4, 4, 4]]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)
LETTERS = Characters(tuple(map(chr, range(48, 108))))  # fewer than the model knows


def random_params(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 1, x.shape), jnp.float32), shapes)


@functools.cache
def generator(model=MODEL, batch=3, axes=(), **options):
    """One for all tests: what it has compiled it keeps."""
    mesh = sharding.make_mesh(**dict(axes or (("data", 1),)), devices=jax.devices()[: 8 if axes else 1])
    params = random_params(model)
    params = jax.device_put(params, sharding.shard_tree(params, mesh))
    return Generator(model, params, batch=batch, mesh=mesh, tokenizer=LETTERS, chunk=8, steps=8, **options)


@functools.cache
def logits_after(model):
    """(ids) -> logits (V,) of the next token, without a cache; for up to 64 ids."""
    params, longest = random_params(model), model.clone(max_length=64) if model.positions == "rope" else model
    apply = jax.jit(lambda ids: longest.apply({"params": params}, ids))

    def after(ids):
        padded = np.zeros((1, longest.max_length), np.int32)
        padded[0, : len(ids)] = ids
        return apply(padded)[0, len(ids) - 1]

    return after


def alone(model, prompt, count, told=None, number=0):
    """The tokens that a request gets, in the plainest way: the whole text anew for each."""
    ids = list(prompt)
    for _ in range(count):
        seen = np.zeros((1, model.vocab_size), bool)
        seen[0, ids] = True
        logits = np.where(np.arange(64) < LETTERS.size, logits_after(model)(ids), -np.inf)[None]
        ids.append(int(PICK(logits, told or {}, np.array([number]), np.array([len(ids)]), seen)[0]))
    return tuple(ids[len(prompt) :])


PICK = jax.jit(sampling.pick)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_as_without_a_cache(asked):
    """More prompts than rows, of unequal length, longer than a piece and than the window, which is the whole ring."""
    found = generator().complete(PROMPTS, asked, 14)
    for i, prompt in enumerate(PROMPTS):
        assert found[i].tokens == alone(MODEL, prompt, 14, sampling.numbers(asked), i)
        assert (found[i].request, found[i].ended, found[i].text) == (i, "length", LETTERS.decode(found[i].tokens))


@pytest.mark.slow
def test_a_request_is_the_same_alone_and_among_others():
    """The first three have rows of their own from the start; alone they have the first."""
    among = generator().complete(PROMPTS[:3], DRAWN, 20)
    assert generator().complete(PROMPTS[:1], DRAWN, 20)[0] == among[0]
    for i in (1, 2):
        others = [[9]] * i
        assert generator().complete([*others, PROMPTS[i]], DRAWN, 20)[i] == among[i]
    seeded = dataclasses.replace(DRAWN, seed=4)
    another = generator().complete(PROMPTS[:1], seeded, 20)[0]
    assert another.tokens != among[0].tokens
    same = generator().complete([PROMPTS[0]] * 2, seeded, 20)
    assert same[0] == another and same[1].tokens != another.tokens


@pytest.mark.nightly
def test_on_eight_devices_as_on_one():
    mesh = (("data", 2), ("fsdp", 2), ("tensor", 2))
    expected = generator().complete(PROMPTS, DRAWN, 14)
    assert generator(batch=4, axes=mesh).complete(PROMPTS, DRAWN, 14) == expected


@pytest.mark.slow
def test_a_full_context_goes_on_from_its_newer_half():
    """A text may be longer than what the model has positions for; each token sees what the rule says."""
    prompt, count, length = [1, 2, 3], 60, WHOLE.max_length
    ids, begin = list(prompt), 0
    for _ in range(count):
        if len(ids) - begin > length:
            begin = len(ids) - length // 2
        ids.append(int(np.argmax(logits_after(WHOLE)(ids[begin:])[: LETTERS.size])))
    found = generator(WHOLE, batch=2).complete([prompt, [5] * length], GREEDY, count)
    assert found[0].tokens == tuple(ids[len(prompt) :])
    assert found[1].ended == "length" and len(found[1].tokens) == count


@pytest.mark.slow
def test_pieces_and_ends():
    """An id that ends a text, a stop string, and the length; the pieces make up the whole."""
    whole = generator().complete(PROMPTS, GREEDY, 12)
    end = whole[0].tokens[5]
    at = [piece.tokens.index(end) if end in piece.tokens else None for piece in whole]
    ended = generator(ends=(end,)).complete(PROMPTS, GREEDY, 12)
    for i, piece in enumerate(ended):
        assert piece.tokens == whole[i].tokens[: at[i]] and piece.ended == ("length" if at[i] is None else "end")
    stop = whole[1].text[3:6]
    pieces = list(generator().stream(PROMPTS, GREEDY, 12, [stop]))
    for i in range(len(PROMPTS)):
        mine = [piece for piece in pieces if piece.request == i]
        text = whole[i].text
        assert "".join(piece.text for piece in mine) == (text[: text.index(stop)] if stop in text else text)
        assert [bool(piece.ended) for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].ended == ("stop" if stop in text else "length")
    assert pieces[0].tokens and not pieces[0].ended  # the first token comes before all others are made


@pytest.mark.slow
def test_nan_is_said():
    plain = generator()
    kept, plain.params = plain.params, jax.tree.map(lambda x: x * jnp.nan, plain.params)
    with pytest.raises(FaultError, match="request 0: the model gives NaN after 3 tokens"):
        plain.complete(PROMPTS[:1], GREEDY, 4)
    plain.params = kept


def test_rows_write_until_they_have_nothing_left_to_do():
    """A model that counts; its cache counts what a row feeds that is not padding."""

    def logits(params, extra, cache, tokens, positions, last):
        found = jax.nn.one_hot((tokens[:, 0] + 1) % 6, 6).at[:, 5].set(jnp.where(tokens[:, 0] == 4, jnp.nan, 0.0))
        return found, cache + (positions[:, 0] >= 0)

    tokens, left = np.array([0, 2, 0, 1, 0]), np.array([5, 0, 2, 5, 5])
    zeros = np.zeros(5, np.int32)
    rows = {"token": tokens, "position": zeros + 3, "place": zeros, "request": zeros, "left": left}
    going = np.array([True, True, True, True, False])
    run = functools.partial(decoding.write, logits=logits, ends=(3,), most=6)
    write = jax.jit(run)
    fed, after, _, made = write({}, {}, zeros, rows, None, going, np.int32(6), {})
    assert made.tolist() == [[1, 2, 3, -1, -1, -1], [-1] * 6, [1, 2, -1, -1, -1, -1], [2, 3, -1, -1, -1, -1], [-1] * 6]
    assert fed.tolist() == [3, 0, 2, 2, 0] and after["position"].tolist() == [6, 3, 5, 5, 3]
    assert not after["left"].any()
    fed, after, _, made = write({}, {}, zeros, {**rows, "token": zeros + 4}, None, going, np.int32(1), {})
    assert made[:, 0].tolist() == [decoding.BROKEN, -1, decoding.BROKEN, decoding.BROKEN, -1]
    assert (made[:, 1:] == decoding.NOTHING).all() and after["left"].tolist() == [0, 0, 0, 0, 0]


def test_prompts_begin_as_the_model_was_trained():
    assert prompt_ids(Bytes(), "ab") == [97, 98]
    assert prompt_ids(Bytes(documents=True), "") == [256]
    with pytest.raises(UserError, match="prompt is empty"):
        prompt_ids(Bytes(), "")


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[]], {}, "prompt 0 has no token"),
        ([[1], [1] * 33], {}, "prompt 1 has 33 tokens; the model sees 32 at once"),
        ([[1] * 30], {"sampling": Sampling(beams=2)}, "has 30 tokens and is to get 5 .*, or ask for fewer tokens"),
        ([[1, 64]], {}, "has the id 64: the model knows those from 0 to 63"),
        ([[-1]], {}, "has the id -1"),
        ([[1]], {"most": 0}, "0 tokens to make"),
        ([[1]], {"stops": ["a", ""]}, "a stop string is empty"),
        ([[1]], {"sampling": Sampling(beams=4)}, "beams=4 needs a batch of as many rows, and it is 3"),
    ],
)
def test_what_can_not_be_is_said_before_anything_is_computed(prompts, options, said):
    with pytest.raises(UserError, match=said):
        generator().stream(prompts, **{"sampling": GREEDY, "most": 5, **options})


def test_sizes_must_fit_the_model():
    bare = Generator(MODEL, {}, mesh=sharding.make_mesh())
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        bare.stream([[1]], GREEDY, 5, ["a"])
    for options, said in (
        ({"length": 33}, "max_length=32"),
        ({"tokenizer": Bytes()}, "256 tokens, the model knows 64"),
    ):
        with pytest.raises(UserError, match=said):
            Generator(MODEL, {}, mesh=sharding.make_mesh(), **options)
