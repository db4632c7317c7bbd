"""Durations become steps."""

import pytest

from flaxmodels.durations import LONGEST, Clock, parse
from flaxmodels.registry import UserError

CLOCK = Clock(batch_size=64, epoch_size=1797, tokens_per_example=128, total_steps=1000)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0 steps", 0), ("1 step", 1), ("2000 steps", 2000), ("2000steps", 2000), ("  7  STEPS ", 7), ("1.2 steps", 2),
        ("1_000 steps", 1000), ("+3 steps", 3), ("1e3 steps", 1000), ("1E3 steps", 1000), ("1.5e+3 steps", 1500),
        ("1e-3 steps", 1), (".5 steps", 1), ("5. steps", 5),
        ("1 epoch", 29), ("5 epochs", 141), ("5epochs", 141), ("0.5 epochs", 15), ("64 epochs", 1797),
        ("1 example", 1), ("64 examples", 1), ("65 examples", 2), ("6.4e5 examples", 10_000),
        ("8192 tokens", 1), ("8193 tokens", 2), ("1 token", 1), ("8.192e9 tokens", 1_000_000),
        ("10%", 100), ("10 %", 100), ("0.1%", 1), ("100%", 1000), ("150%", 1500), ("0%", 0), ("33.33%", 334),
    ],
)  # fmt: skip
def test_every_unit_rounds_up_to_steps(text, steps):
    found = CLOCK.steps(text, "train.duration")
    assert found == steps
    assert type(found) is int


@pytest.mark.parametrize("batch_size", [1, 3, 7, 60, 91, 93, 99, 128, 1000])
@pytest.mark.parametrize("steps", [1, 29, 10**6 + 1, 10**8 + 7])
def test_a_whole_number_of_steps_comes_out_whole(batch_size, steps):
    clock = Clock(batch_size, epoch_size=10 * batch_size, tokens_per_example=512, total_steps=100 * batch_size)
    assert clock.steps(f"{steps * batch_size} examples", "x") == steps
    assert clock.steps(f"{steps * batch_size * 512} tokens", "x") == steps
    assert clock.steps(f"{10 * (steps % 100)} epochs", "x") == 100 * (steps % 100)
    assert clock.steps(f"{steps % 100}%", "x") == batch_size * (steps % 100)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "5", "5 parsecs", "steps", "five steps", "-1 steps", "-0.1%", "nan steps", "inf epochs", "-inf steps",
        "1e400 steps", "5 steps 3", "5 5 steps", "1.2.3 steps", "1e steps", "e5 steps", "--5 steps", "5-3 steps",
        "_ steps", "5 steps\nx", "%", "% 5", "5%%", "5 stepss", "0x10 steps", "5 ms", "١٢ eons",
    ],
)  # fmt: skip
def test_what_is_no_duration_is_named_and_the_remedy_shown(text):
    with pytest.raises(UserError, match=r"^train.duration=.* is not a duration: expected .*\"5 epochs\""):
        CLOCK.steps(text, "train.duration")


@pytest.mark.parametrize("text", ["3e9 steps", "1e300 steps", "1e308 epochs", "1e307 %", "9e18 tokens", "1e9 epochs"])
def test_a_run_that_no_counter_can_hold_is_refused(text):
    with pytest.raises(UserError, match=rf"train.duration='{text}' is .* steps, over the limit of {LONGEST}"):
        CLOCK.steps(text, "train.duration")


def test_the_longest_run():
    assert CLOCK.steps(f"{LONGEST} steps", "x") == LONGEST
    with pytest.raises(UserError, match="over the limit"):
        CLOCK.steps(f"{LONGEST + 1} steps", "x")


def test_a_share_needs_a_run():
    with pytest.raises(UserError, match=r"train.duration='10%': a share needs a run.*use steps or epochs"):
        Clock(64, 1797).steps("10%", "train.duration")


def test_an_example_is_one_token_where_it_is_no_sequence():
    assert Clock(64, 1797).steps("640 tokens", "x") == Clock(64, 1797).steps("640 examples", "x") == 10


def test_parse_splits():
    assert parse("5 epoch", "x") == (5.0, "epochs")
    assert parse("10%", "x") == (10.0, "%")
