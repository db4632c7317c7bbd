"""Samples of a run: texts at each evaluation that change nothing of it, and that a resumed run writes alike."""

import io
import json
import signal
import types

import jax
import numpy as np
import pytest
import small

from flaxmodels import loop, registry, run, sections, sharding
from flaxmodels.data import chat, tokenizer
from flaxmodels.data.reading import Record
from flaxmodels.data.vocabularies import Bytes
from flaxmodels.inference import samples, scoring
from flaxmodels.inference.generate import Generator
from flaxmodels.inference.sampling import Sampling
from flaxmodels.models.mlp import MLP
from flaxmodels.models.transformer import Transformer
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.signals import Stop
from flaxmodels.writers import Writers

PROMPTS = ("the ", "fox")
BYTES = Bytes()


def rows(workdir):
    file = workdir / "samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(workdir, start, steps, text="a\nb"):
    stream = io.StringIO()
    with Writers(workdir, total_steps=9, start_step=start, examples_per_step=1, stream=stream) as writers:
        for step in steps:
            writers.samples(step, [{"prompt": prompt, "text": text} for prompt in PROMPTS])
    return stream.getvalue()


def test_each_step_is_written_once_whenever_it_was_interrupted(tmp_path):
    """What came after the step that is restored is made again, and so is that one where it was not saved as made."""
    said = write(tmp_path, 0, [2, 4, 6])
    assert 'sample 0: "the a\\nb"\n' in said and 'sample 1: "foxa\\nb"\n' in said
    whole = rows(tmp_path)
    assert [row["step"] for row in whole] == [2, 2, 4, 4, 6, 6]
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 8, "pro')  # torn by a kill
    for start, steps in ((4, [6]), (4, [4, 6]), (0, [2, 4, 6])):
        write(tmp_path, start, steps)
        assert rows(tmp_path) == whole
    write(tmp_path, 2, [6])  # it evaluates less often from here on
    assert [row["step"] for row in rows(tmp_path)] == [2, 2, 6, 6]


def test_a_run_without_samples_has_no_file(tmp_path):
    write(tmp_path, 0, [])
    assert not (tmp_path / "samples.jsonl").exists()


def test_text_that_no_terminal_can_show(tmp_path):
    assert '"the ?"' in write(tmp_path, 0, [1], "\udc80") and rows(tmp_path)[0]["text"] == "\udc80"


def job(model=None, tokenizer=BYTES, **options):
    """What `make` looks at of a job."""
    model = model or Transformer(vocab_size=256, layers=1, width=8, heads=1, max_length=8)
    return types.SimpleNamespace(
        config={"samples": options, "data": {}}, source=types.SimpleNamespace(name="text", tokenizer=tokenizer),
        model=model, mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        abstract=types.SimpleNamespace(params={}, extra={}),
    )  # fmt: skip


@pytest.mark.parametrize(
    "made, said",
    [
        (dict(tokens=5), "samples.tokens is set, but samples.prompts is not"),
        (dict(prompts=("a",), tokenizer=None), "data 'text' has no tokenizer"),
        (dict(prompts=("a",), model=MLP(classes=2)), "MLP can't generate"),
        (dict(prompts=("a", "")), "the prompt is empty"),
        (dict(prompts=("123456789",)), "prompt 0 has 9 tokens"),
        (dict(prompts=("a",), temperature=0.0, top_k=3), "sampling.top_k=3"),
    ],
)
def test_what_can_not_be_written_is_said_before_anything_is_computed(made, said):
    with pytest.raises(registry.UserError, match=said):
        samples.make(job(**made))


def test_a_search_has_room_for_its_hypotheses():
    assert samples.make(job(prompts=("a",), beams=3, tokens=5)) is not None


def test_prompts_are_put_as_the_data_are():
    made = tokenizer.extended(BYTES, chat.TEMPLATES["chatml"].marks)
    data = {"messages": "m", "template": "chatml", "tokens": "bytes"}
    (ids,), ends = samples._read(["hi"], data, made)
    start, end = made.special["<|im_start|>"], made.special["<|im_end|>"]
    assert ids == [start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"] and end in ends
    assert samples._read(["hi"], {"text": "m"}, made) == ([[*b"hi"]], None)
    begun = tokenizer.extended(BYTES, ["[CLS]"])
    assert samples._read(["hi"], {"text": "m", "begin": True}, begun) == ([[begun.begin, *b"hi"]], None)


def test_the_section_is_checked():
    assert samples.make(job()) is None
    for options, said in (
        (dict(prompt="a"), "samples.prompt='a': unknown key"),
        (dict(top_p=2.0), "samples.top_p=2.0"),
    ):
        with pytest.raises(registry.UserError, match=said):
            sections.check(small.config("mlp", samples=options), lambda text, where: text)


def config(tmp_path, **asked):
    file = tmp_path / "fox.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return dict(
        model=dict(name="transformer", layers=1, width=16, heads=2, dropout=0.1),
        data=dict(name="text", path=str(file), batch_size=8, length=16),
        optim=dict(name="adam", learning_rate=1e-2, average=0.9),
        train=dict(duration=6, eval_every=2, log_every=2),
        checkpoint=dict(every=3),
        samples=asked,
    )  # fmt: skip


def fit(config, workdir):
    return loop.fit(config, workdir, devices=jax.devices()[:1], stream=io.StringIO())


def metrics(workdir):
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]


class Asked(Stop):
    """Stands in for a signal."""

    def __bool__(self):
        return self.signal is not None


@pytest.mark.slow
def test_samples_change_nothing_and_resume_exactly(tmp_path, monkeypatch):
    """The run is that without them, bit for bit; stopped and resumed, it writes the same; and it is the model's."""
    asked = dict(prompts=PROMPTS, tokens=12, temperature=0.7, seed=3)
    whole, bare = fit(config(tmp_path, **asked), tmp_path / "whole"), fit(config(tmp_path), tmp_path / "bare")
    assert small.bits(bare.state) == small.bits(whole.state)
    assert metrics(tmp_path / "bare") == metrics(tmp_path / "whole")
    assert not rows(tmp_path / "bare")
    wanted = rows(tmp_path / "whole")
    assert [(row["step"], row["prompt"]) for row in wanted] == [(step, p) for step in (2, 4, 6) for p in PROMPTS]

    stop, evaluations, evaluate = Asked(), [], run.evaluate

    def stopped(*arguments):
        evaluations.append(arguments)
        stop.signal = signal.SIGTERM if len(evaluations) == 2 else None
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stop", lambda end: stop)
        patch.setattr(run, "evaluate", stopped)
        assert fit(config(tmp_path, **asked), tmp_path / "stopped").exit_code == 143
    assert rows(tmp_path / "stopped") == wanted[:2]  # step 4 is saved, and not yet evaluated
    fit(config(tmp_path, **asked), tmp_path / "stopped")
    assert rows(tmp_path / "stopped") == wanted

    made = loop.assemble(config(tmp_path, **asked), jax.devices()[:1])
    params = run.optim.parameters_average(whole.state.opt_state, whole.state.params)
    generator = Generator(made.model, params, mesh=made.mesh, tokenizer=made.source.tokenizer, batch=2)
    prompts = [made.source.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = generator.complete(prompts, Sampling(temperature=0.7, seed=3), 12)
    assert [one.text for one in found] == [row["text"] for row in wanted[-2:]]
    # Windows side by side, as the evaluation split has them.
    held_out = (tmp_path / "fox.txt").read_text()[-135:]
    scored = scoring.measure(
        made.model, params, {}, made.source.tokenizer, [Record(held_out)], mesh=made.mesh, length=16, stride=16
    )
    assert scored.means["loss"] == pytest.approx(whole.metrics["eval/loss"], rel=1e-5)
    assert scored.means["accuracy"] == pytest.approx(whole.metrics["eval/accuracy"], rel=1e-5)


@pytest.mark.slow
def test_a_model_that_diverged_has_no_samples_and_goes_on(tmp_path, monkeypatch):
    def broken(params, extra):
        raise FaultError("request 0: the model gives NaN after 3 tokens.")

    monkeypatch.setattr(samples, "make", lambda job: broken)
    stream = io.StringIO()
    done = loop.fit(config(tmp_path), tmp_path / "w", devices=jax.devices()[:1], stream=stream)
    assert done.finished and np.isfinite(done.metrics["eval/loss"])
    assert stream.getvalue().count("warning: no samples at step") == 3
