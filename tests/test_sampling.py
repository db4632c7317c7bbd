"""The choice of the next token: what the options leave, and that draws follow from (seed, request, place) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels.inference import sampling
from flaxmodels.inference.sampling import Sampling
from flaxmodels.registry import UserError

SHARES = [0.05, 0.4, 0.0, 0.25, 0.2, 0.1]  # in no order, and one that can't be


def logits_of(shares, rows=1):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.tile(shares, (rows, 1))), jnp.float32)


LEFT = jax.jit(sampling.left)
PICK = jax.jit(sampling.pick)
ALL = {"top_k": 1000, "top_p": 2, "min_p": 1e-30}  # each leaves all, so that one program does all tests


def left(logits, **options):
    """(B, V) bool, the tokens that the options leave."""
    return np.isfinite(LEFT(logits, {name: np.float32(options.get(name, of)) for name, of in ALL.items()}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 100}, {0, 1, 3, 4, 5}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.84}, {1, 3, 4}),
        ({"top_p": 0.96}, {0, 1, 3, 4, 5}),
        ({"min_p": 0.3}, {1, 3, 4}),
        ({"min_p": 1.0}, {1}),
        # Each applies to what the ones before it leave, as shares of what is left: 0.4 of 0.85 is 0.47.
        ({"top_k": 3, "top_p": 0.46}, {1}),
        ({"top_k": 3, "top_p": 0.48}, {1, 3}),
        ({"top_k": 4, "min_p": 0.3}, {1, 3, 4}),
    ],
)
def test_what_is_left(options, expected):
    assert set(np.flatnonzero(left(logits_of(SHARES), **options)).tolist()) == expected


def test_equal_logits_stay_together():
    assert left(logits_of([0.3, 0.2, 0.2, 0.3, 0.0, 0.0]), top_k=3).tolist() == [[True] * 4 + [False] * 2]
    low = [-2.0] * 3
    assert left(jnp.array([[0.0, -0.0, -1.0, *low]]), top_k=2).tolist() == [[True, True, *[False] * 4]]


def test_the_threshold_is_that_of_a_sorted_vocabulary():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 301)), jnp.float32)
    for k in (1, 7, 300):
        np.testing.assert_array_equal(left(logits, top_k=k), logits >= np.sort(logits, -1)[:, -k, None])
    shares = np.exp(np.asarray(logits, np.float64))
    shares /= shares.sum(-1, keepdims=True)
    for p in (0.1, 0.5, 0.9):
        kept = left(logits, top_p=p)
        for row in range(4):
            order = np.argsort(-shares[row])
            count = int(np.searchsorted(np.cumsum(shares[row][order]), p)) + 1
            assert set(np.flatnonzero(kept[row])) == set(order[:count].tolist())


def test_temperature_comes_before_what_shares_decide():
    """At temperature 1/2 shares are squared: 0.16 of 0.2750 is 0.58."""
    places = jnp.arange(64)
    for temperature, expected in ((1.0, {1, 3}), (0.5, {1})):
        told = {**sampling.numbers(Sampling(top_p=0.57)), "temperature": np.float32(temperature)}
        assert set(PICK(logits_of(SHARES, 64), told, places * 0, places).tolist()) == expected


@pytest.mark.slow
def test_draws_have_the_frequencies_of_their_shares():
    count = 20000
    told, rows = sampling.numbers(Sampling(seed=3)), jnp.arange(count)
    drawn = PICK(logits_of(SHARES, count), told, rows * 0, rows)
    found = np.bincount(drawn, minlength=6) / count
    # Four standard deviations of a share of so many draws.
    np.testing.assert_allclose(found, SHARES, atol=4 * 0.5 / count**0.5)
    assert not found[2]


def test_a_draw_follows_from_seed_request_and_place_alone():
    logits = np.random.default_rng(1).normal(0, 1, (4, 1000)).astype(np.float32)
    request, place, order = np.array([4, 4, 5, 9]), np.array([7, 8, 7, 7]), np.array([2, 0, 3, 1])
    told = sampling.numbers(Sampling(seed=5))
    drawn = np.asarray(PICK(logits, told, request, place))
    np.testing.assert_array_equal(PICK(logits[order], told, request[order], place[order]), drawn[order])
    same, again = np.zeros_like(logits), sampling.numbers(Sampling(seed=6))
    assert len({int(i) for of in (told, again) for i in PICK(same, of, request, place)}) == 8


def test_the_likeliest_token():
    logits = jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    told = sampling.numbers(Sampling(temperature=0))
    assert told == {}
    assert PICK(logits, told, jnp.arange(2), jnp.arange(2)).tolist() == [1, 0]


def test_the_penalty_makes_what_was_said_less_likely():
    told = sampling.numbers(Sampling(temperature=0, repetition_penalty=2.0))
    logits, seen = jnp.array([[3.0, 2.0, -1.0, -1.5]]), jnp.array([[True, False, True, False]])
    np.testing.assert_allclose(sampling.penalised(logits, told["repetition_penalty"], seen), [[1.5, 2.0, -2.0, -1.5]])
    assert PICK(logits, told, jnp.arange(1), jnp.arange(1), seen).tolist() == [1]


def test_numbers_say_what_is_done_so_that_other_numbers_need_no_other_program():
    def kind(**options):
        return jax.tree.structure(sampling.numbers(Sampling(**options)))

    assert kind(temperature=0.7, top_k=5) == kind(temperature=1.3, top_k=50, seed=8)
    assert kind(top_p=0.9) != kind(top_k=5) != kind()
    assert kind(beams=4) == kind(temperature=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0 leaves no token"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": 1.5}, "expected an integer"),
        ({"beams": 0}, "beams=0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"temperature": 0, "top_k": 5}, "top_k=5: temperature=0 takes the likeliest"),
        ({"beams": 2, "min_p": 0.1}, "min_p=0.1: beams=2 searches"),
        ({"beams": 2, "temperature": 0.5}, "temperature=0.5: beams=2 searches"),
        ({"beams": 2, "repetition_penalty": 1.1}, "beams=2 searches"),
    ],
)
def test_what_can_not_be_is_said(options, said):
    with pytest.raises(UserError, match=said):
        Sampling(**options)


def test_the_likeliest_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).integers(0, 4, (50, 7)).astype(np.float32)  # with ties
    logits[0] = -np.inf  # where nothing is left, a token all the same
    np.testing.assert_array_equal(sampling._likeliest(jnp.asarray(logits)), logits.argmax(-1))
