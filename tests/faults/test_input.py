"""F26: wrong keys, types and ranges are refused by the user's command before anything is compiled.

The messages, one by one, are in tests/test_bad_input.py. Here every key of every config of ours gets every kind of
wrong value; so a key that is added without a range, or with an annotation that checks nothing, fails here.
"""

import itertools
import math
import random
import shutil

import harness
import jax
import pytest

import train
from flaxmodels import config, sections
from flaxmodels.runtime import exits

nightly = pytest.mark.nightly
WRONG = ("abc", -5, math.nan, math.inf, (1, "a"), True, {"a": 1}, None, 1.5)
# Where a text is a name, a path or a regular expression: it is looked up when the data or the model are known.
TEXTS = ("start.workdir", "start.only", "start.step", "optim.decay_mask", "train.metric", "data.data_dir")
CONFIGS = {"tiny": harness.TINY, **{name: harness.ROOT / f"configs/{name}.py" for name in ("digits_mlp", "digits_cnn")}}


def right(key, value, wrong):
    """Whether one of `WRONG` may stand where `value` does, by hand: not by the code that is tested."""
    if wrong is None:
        return value is None or key in ("optim.average", "optim.weight_decay", "optim.clip_norm")
    if isinstance(wrong, bool):
        return isinstance(value, bool) or key == "model.qkv_bias"
    if isinstance(wrong, str):
        return key in TEXTS
    optional = ("optim.weight_decay", "optim.clip_norm", "model.query_scale")  # numbers, None by default
    return wrong == 1.5 and (isinstance(value, float) or key in optional)


def injections(file):
    """(dotted key, value as one would write it) of all that must be refused."""
    rows = sections.resolved(config.load_config(file))
    for (key, value, _), wrong in itertools.product(rows, WRONG):
        if not right(key, value, wrong):
            yield key, repr(wrong)
    for key, _, _ in rows:
        section, _, name = key.rpartition(".")
        other = name[0] + name[2:3] + name[1:2] + name[3:]  # two letters in the other order
        if other != name and len(name) > 3:
            yield ".".join(filter(None, (section, other))), "1"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(config file, key, text): what is wrong with how the command of training ends; "" where it is right."""

    def compiles(*_):
        raise RuntimeError("it compiles")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)

    def call(file, key, text):
        argv = [f"--config={file}", f"--workdir={tmp_path / 'run'}", f"--config.{key}={text}"]
        try:
            code = exits.reported(lambda: train.main(argv), debug=False)
        except RuntimeError as error:
            shutil.rmtree(tmp_path / "run")
            return f"{key}={text}: {error}"
        said = capsys.readouterr().err
        last = key.rpartition(".")[2]
        wrong = {
            f"exit code {code}": code != exits.BAD_INPUT,
            "a traceback": "Traceback" in said,
            "the key is not named": last not in said,
            "it does not say what was expected": not any(
                word in said
                for word in ("expected", "Did you mean", "There are", "must be", "is not set", "is not: say")
            ),
            "something is left": (tmp_path / "run").exists(),
        }
        return "; ".join(name for name, found in wrong.items() if found) and f"{key}={text}: {wrong} {said[-500:]}"

    return call


@pytest.mark.parametrize(
    ("name", "most"), [("tiny", 60), *(pytest.param(name, 10**9, marks=nightly) for name in CONFIGS)]
)
def test_f26_what_a_key_can_not_be_is_refused_before_anything_is_compiled(refused, figures, name, most):
    (seed,) = harness.seeds(1, given=26)
    found = list(injections(CONFIGS[name]))
    chosen = random.Random(seed).sample(found, min(most, len(found)))
    assert len(found) > 500
    bad = list(filter(None, (refused(CONFIGS[name], key, text) for key, text in chosen)))
    figures("F26", injected=len(chosen), detected=len(chosen) - len(bad))
    assert not bad, "\n".join(bad[:5])


NAMED = {
    "optim.lrr=1": ("optim.lrr=1: unknown key",),
    "optim.learning_rat=1": ("Did you mean 'learning_rate'?",),
    "optim.learning_rate=abc": ("optim.learning_rate='abc' has the wrong type: expected a number",),
    "train.duration=-5": ("train.duration=-5 is out of range", "between 0 and"),
    "optim.learning_rate=nan": ("optim.learning_rate=nan is out of range: expected a finite number",),
    "sharding.rules=(1,'a')": ("sharding.rules", "1 is no rule"),
}


@pytest.mark.parametrize("word", NAMED)
def test_f26_the_message_names_key_value_and_what_is_allowed(tmp_path, capsys, word):
    argv = [f"--config={harness.TINY}", f"--workdir={tmp_path / 'run'}", f"--config.{word}"]
    assert exits.reported(lambda: train.main(argv), debug=False) == exits.BAD_INPUT
    said = capsys.readouterr().err
    assert all(part in said for part in NAMED[word]), said


@nightly
def test_f26_by_a_process_of_its_own(tmp_path, figures):
    """With a list of mixed types, which the library of configs takes."""
    flag = "--config.model.hidden=(8,'a')"
    with harness.start(tmp_path / "run", harness.T1, flag, config=CONFIGS["digits_mlp"]) as group:
        assert group.wait(120) == [exits.BAD_INPUT], str(group)
        assert "model.hidden=(8, 'a') has the wrong type: expected a list of an integer" in group.output()
        assert "compiled" not in group.output() and not (tmp_path / "run").exists()
    figures("F26", injected=1, detected=1)
