"""A trained model, loaded for use: from a workdir, without the data, and at the terminal."""

import argparse
import io
import json
import shutil

import jax
import numpy as np
import pytest

from flaxmodels import loop, sharding
from flaxmodels.cli.generate import _prompts, generate
from flaxmodels.data import chat, tokenizer
from flaxmodels.data.vocabularies import Bytes
from flaxmodels.inference import weights
from flaxmodels.inference.generate import Generator, prompt_ids
from flaxmodels.inference.loading import Loaded, load
from flaxmodels.inference.sampling import Sampling
from flaxmodels.registry import UserError

TEXT = "the quick brown fox jumps over the lazy dog; " * 20
ONE = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir of a run of a few steps, its last state); its text is gone."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fox.txt").write_text(TEXT)
    config = {
        "model": {"name": "transformer", "layers": 1, "width": 16, "heads": 2},
        "data": {"name": "text", "path": str(folder / "fox.txt"), "length": 16, "batch_size": 8},
        "optim": {"learning_rate": 0.02, "average": 0.5},
        "train": {"duration": 4, "eval_every": 2},
        "checkpoint": {"keep": 2},
        "mesh": {"data": 1},
    }
    outcome = loop.fit(config, folder / "run", devices=jax.devices()[:1], stream=io.StringIO())
    (folder / "fox.txt").unlink()
    return folder / "run", outcome.state


@pytest.mark.slow
def test_a_workdir_without_its_data(trained):
    workdir, state = trained
    latest = load(workdir, "latest", mesh=ONE)
    assert (latest.step, latest.where, latest.ends) == (4, f"step 4 of {str(workdir)!r}", ())
    assert (latest.model.vocab_size, latest.model.max_length, latest.model.width) == (len(set(TEXT)), 16, 16)
    assert latest.tokenizer.decode(latest.tokenizer.encode("the fox")) == "the fox"
    assert latest.config["data.length"] == 16
    average = [x for keys, x in jax.tree.leaves_with_path(state.opt_state) if "parameters_average" in str(keys)]
    for found, expected in zip(jax.tree.leaves(latest.params), average, strict=True):
        np.testing.assert_array_equal(found, expected)
    plain = load(workdir, 4, mesh=ONE, average=False)
    jax.tree.map(np.testing.assert_array_equal, plain.params, state.params)
    lower = load(workdir, "latest", mesh=sharding.make_mesh(tensor=2), dtype="bfloat16")
    assert lower.model.dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(lower.params)} == {"bfloat16"}
    kernel = lower.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2


@pytest.mark.slow
def test_at_the_terminal(trained, capsys, monkeypatch, tmp_path):
    """Texts one after the other, and what was done of them; more tokens than the model has positions."""
    workdir, _ = trained
    loaded = load(workdir, mesh=ONE)
    model, params = weights.prepare(loaded.model, loaded.params)
    prompts = ["the fox", "jumps", "lazy "]
    ids = [prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    generator = Generator(model, params, batch=2, mesh=ONE, tokenizer=loaded.tokenizer)
    expected = generator.complete(ids, Sampling(temperature=0.8, seed=1), 30, ["q"])
    (tmp_path / "prompts.txt").write_text("jumps\n\nlazy \n")
    asked = ["--prompt=the fox", f"--file={tmp_path / 'prompts.txt'}", "--tokens=30", "--temperature=0.8", "--seed=1"]
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: ONE)
    assert generate([f"--workdir={workdir}", *asked, "--stop=q", "--batch=2"]) == 0
    said, told = capsys.readouterr()
    assert said == "".join(f"{prompt}{piece.text}\n" for prompt, piece in zip(prompts, expected))
    assert f"{loaded.where}: {sum(len(piece.tokens) for piece in expected)} tokens in " in told
    assert generate([f"--workdir={workdir}", *asked, "--stop=q", "--batch=2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["text"] for row in rows] == [piece.text for piece in expected]


@pytest.mark.slow
def test_what_is_damaged_or_missing_is_said(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(UserError, match="the nearest is 4"):
        load(workdir, 7, mesh=ONE)
    with pytest.raises(UserError, match="no prompt"):
        generate([f"--workdir={workdir}"])
    with pytest.raises(UserError, match="--file='nowhere' can't be read"):
        generate([f"--workdir={workdir}", "--file=nowhere"])
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    other = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**other, "characters": other["characters"][:-1]}))
    with pytest.raises(UserError, match="is not the tokenizer that the checkpoint was trained with"):
        load(copy, mesh=ONE)
    (copy / "tokenizer.json").unlink()
    assert load(copy, mesh=ONE).tokenizer is None
    next((copy / "checkpoints" / "4").rglob("manifest.ocdbt")).write_bytes(b"other")
    with pytest.raises(UserError, match="is damaged"):
        load(copy, "latest", mesh=ONE)


def test_one_model_must_be_named(tmp_path):
    with pytest.raises(UserError, match="name one model"):
        generate(["--prompt=a"])
    with pytest.raises(UserError, match="'--prompts=a' is not a flag"):
        generate([f"--workdir={tmp_path}", "--prompts=a"])
    with pytest.raises(UserError, match="temperature=-1"):
        generate([f"--workdir={tmp_path}", "--prompt=a", "--temperature=-1"])


def test_messages_are_put_in_the_words_that_the_model_knows(tmp_path):
    made = tokenizer.extended(Bytes(documents=True), chat.TEMPLATES["chatml"].marks)
    loaded = Loaded(None, {}, {}, made, {}, 0, "", ends=(7,))
    asked = argparse.Namespace(chat=True, template=None, workdir=tmp_path, source=None)
    (ids,), ends = _prompts(loaded, made, ["hi"], asked)
    begin, end = (made.special[name] for name in ("<|im_start|>", "<|im_end|>"))
    user, answer = (list(text.encode()) for text in ("user\nhi", "assistant\n"))
    assert ids == [begin, *user, end, ord("\n"), begin, *answer]
    assert ends == (end, made.end, 7)
    asked.chat = False
    assert _prompts(loaded, made, ["hi"], asked) == ([[104, 105]], (7,))
