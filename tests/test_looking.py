"""What is shown is what the step sees."""

import numpy as np
import pytest
import small
from PIL import Image

from flaxmodels import cli, data, looking
from flaxmodels.data.split import Source, Split, gather_rows
from flaxmodels.job import assemble
from flaxmodels.registry import UserError


@pytest.fixture
def command(tmp_path, capsys):
    """Run a verb on a config file of these sections: (exit code, what it printed)."""

    def call(verb, *arguments, **sections):
        file = tmp_path / "mine.py"
        file.write_text(f"def get_config():\n    return {small.config('mlp', **sections)!r}\n")
        code = cli.main([verb, f"--config={file}", f"--workdir={tmp_path / 'run'}", *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.mark.slow
def test_a_future_batch_is_the_one_that_the_step_gets():
    options = {"augment": ({"name": "flip"}, {"name": "mixup"}), "batch_size": 16}
    job = assemble(small.config("mlp", data=options))
    step = 37
    shown = looking.batch_at(job, step)
    plan = [(step, 1)]
    (feed,) = job.train.dispatches(job.seed, plan, 1)
    each = {"index": feed["each"]["index"][step - int(feed["first"])]}
    expected = job.augment(job.train.batch(each, feed["every"]), each["index"], np.int32(step))
    np.testing.assert_array_equal(shown.index, each["index"])
    np.testing.assert_allclose(shown.inputs, expected["inputs"], atol=1e-6)
    np.testing.assert_allclose(shown.targets, expected["targets"], atol=1e-6)
    assert shown.targets.shape == (16, 10), "soft, by mixup"


def test_picture_shows_each_image_with_label_and_id(command, tmp_path):
    code, said = command("batch", "--step=5", f"--to={tmp_path / 'new' / 'a.png'}", "--examples=9")
    assert code == 0 and "train batch of step 5, epoch 0.08: 16 examples" in said and "a.png" in said
    job = assemble(small.config("mlp"))
    shown = looking.batch_at(job, 5)
    assert f"ids: {' '.join(map(str, shown.index[:9]))}\n" in said
    image = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("L")).astype(float) / 255
    cell = (72 + 6, 72 + 28 + 6)
    assert image.shape == (3 * cell[1] + 6, 3 * cell[0] + 6)
    for place in range(9):
        left, top = 6 + place % 3 * cell[0], 6 + place // 3 * cell[1]
        tile = image[top : top + 72, left : left + 72].reshape(8, 9, 8, 9).mean((1, 3))
        np.testing.assert_allclose(tile, shown.inputs[place, ..., 0], atol=1 / 255)
        assert image[top + 73 : top + 100, left : left + 72].min() < 0.5, "a caption"


def test_last_batch_of_an_evaluation_shows_its_padding(command):
    code, said = command("batch", "--split=test", "--step=2", data={"test_examples": 40, "eval_batch_size": 16})
    assert code == 0 and "test batch of step 2: 16 examples" in said and "-1 -1 -1" in said
    code, said = command("batch", "--split=test", "--step=3", data={"test_examples": 40, "eval_batch_size": 16})
    assert code == 2 and "--step=3: an evaluation has 3 batches, numbered from 0" in said
    with pytest.raises(SystemExit, match="2"):
        command("batch", "--step=-3")
    code, said = command("batch", "--to=/proc/a.png")
    assert code == 2 and "--to='/proc/a.png' can't be written" in said


class Letters:
    size, end, token_bytes, fingerprint = 26, None, (1,) * 26, "letters"
    begin, special = None, {"?": 25}

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8) - ord("a")

    def decode(self, ids):
        return "".join(chr(ord("a") + int(i)) if i < 26 else "\n" for i in ids)


def windows(tokens, segments, weights, targets=None):
    shown = looking.Shown(
        np.array([7], np.int32),
        np.zeros(1, bool),
        {"tokens": np.array([tokens]), "segments": np.array([segments])},
        np.array([[*tokens[1:], 0]]) if targets is None else np.array([targets]),
        np.array([weights], np.float32),
    )
    return list(looking.windows(shown, Letters(), ("no", "yes")))


def test_boundaries_masks_and_padding_are_marked():
    # Two documents and padding. The weight at t is that of the token at t + 1: "cd" is a prompt, without loss.
    lines = windows([0, 1, 2, 3, 4, 26, 0, 0], [1, 1, 2, 2, 2, 2, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0])
    assert lines[1:] == ["\n#7  row 0  3 of 8 tokens count", "ab‖{cd}e\\n⌁2"]


def test_tokens_that_are_predicted_in_their_own_places_are_marked_there():
    lines = windows([0, 25, 2, 25, 25], [1] * 5, [0, 1, 0, 1, 0], targets=[0, 1, 2, 3, 4])
    assert lines[1:] == ["\n#7  row 0  2 of 5 tokens count", "{a}?{c}?{?}"]


def test_a_window_with_a_label():
    lines = windows([0, 1, 2], [1, 1, 0], 1.0, targets=1)
    assert lines[1:] == ["\n#7  row 0  label yes  2 of 3 tokens count", "ab⌁1"]


def test_text_is_shown_decoded():
    job = assemble(small.config("transformer", data={"name": "pydocs", "batch_size": 16}))
    shown = looking.batch_at(job, 3)
    lines = list(looking.windows(shown, job.source.tokenizer, most=16))
    assert len(lines) == 33
    for place, (head, text) in enumerate(zip(lines[1::2], lines[2::2])):
        assert head.startswith(f"\n#{shown.index[place]}  row {place}  64 of 64 tokens count")
        assert text == job.source.tokenizer.decode(shown.inputs[place]).replace("\n", "\\n")


def source(labels=()) -> Source:
    """Ten images of class 0, thirty of class 1."""
    label = np.repeat(np.int32([0, 1]), [10, 30])
    arrays = {"image": np.zeros((40, 2, 2, 1), np.uint8), "label": label}
    base = data.load("synthetic_images", examples=8, test_examples=8, side=2)
    split = Split(40, arrays, gather_rows, base.train.prepare)
    return Source("mine", split, split, {"classes": 3}, "f00d", labels=labels)


def test_class_balance(monkeypatch):
    lines = list(looking._split_lines("train", source().train, source(("cat", "dog", "cow"))))
    assert lines[0] == "train  40 examples"
    assert [line.split() for line in lines[1:]] == [["cat", "10", "█" * 13], ["dog", "30", "█" * 40], ["cow", "0"]]
    monkeypatch.setattr(looking, "SAMPLE", 20)
    lines = list(looking._split_lines("train", source().train, source()))
    assert lines[0] == "train  40 examples (20 looked at)"
    assert [line.split()[:2] for line in lines[1:]] == [["0", "5"], ["1", "15"], ["2", "0"]]


def test_data_says_what_a_resumed_run_must_share(command):
    code, said = command("data", data={"examples": 50, "test_examples": 10})
    assert code == 0
    job = assemble(small.config("mlp", data={"examples": 50, "test_examples": 10}))
    for name, value in job.identity.items():
        assert any(line.split() == [*name.split(), *str(value).split()] for line in said.splitlines()), name
    assert "train  50 examples" in said and "test  10 examples" in said and "3.125 steps an epoch" in said
    with pytest.raises(UserError, match="is not a verb"):
        cli._verb(["dat"])
