"""From flags to a config, and from a config to its sections."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from flaxmodels import config, sections
from flaxmodels.registry import UserError

GOOD = """
from ml_collections import ConfigDict

def get_config(size="8"):
    config = ConfigDict()
    config.model = dict(name="mlp", hidden=(int(size),))
    config.data = dict(name="digits", batch_size=64)
    config.optim = dict(learning_rate=3e-3)
    config.train = dict(duration="30 epochs")
    return config.lock()
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


def parse(*argv):
    return config.parse(config.train_parser("train.py"), [str(word) for word in argv])


# load_config


def test_a_config_is_what_get_config_returns(good):
    found = config.load_config(good)
    assert isinstance(found, ConfigDict) and found.model.hidden == (8,)


def test_a_text_after_the_file_is_given_to_get_config(good):
    assert config.load_config(f"{good}:32").model.hidden == (32,)


def test_a_plain_dict_will_do(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config(): return {'model': {'name': 'mlp'}}\n")
    found = config.load_config(tmp_path / "plain.py")
    assert isinstance(found.model, ConfigDict) and found.model.name == "mlp"


def test_a_missing_file_names_the_nearest(good):
    with pytest.raises(UserError, match=r"--config='.*goood.py': there is no such file. Did you mean '.*good.py'"):
        config.load_config(good.with_name("goood.py"))


def test_a_missing_folder_lists_the_configs_there_are(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=r"there is no such file.*There are: configs/.*digits_mlp.py"):
        config.load_config("no_folder/digits_mlp.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 1 / 0\n", r"line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    a = 1\n    return a.b\n", r"line 3: AttributeError: .*'b'"),
        ("import json\ndef get_config():\n    return json.loads('{')\n", r"line 3: JSONDecodeError"),  # not json's line
        ("import no_such_package\n", r"line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("a = 1\nb = (\n", r"SyntaxError.*line 2"),
        ("a = 1\n", r"has no function get_config\(\)"),
        ("get_config = 3\n", r"TypeError: 'int' object is not callable"),
        ("def get_config(): return [1]\n", r"get_config\(\) returned list, expected a ConfigDict"),
        ("def get_config(): pass\n", r"get_config\(\) returned NoneType"),
    ],
)
def test_a_config_that_fails_says_where(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=rf"--config='.*bad.py'.*{message}"):
        config.load_config(tmp_path / "bad.py")


def test_a_relative_path_says_the_line_too(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("x = 1\ny = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--config='bad.py', line 2: ZeroDivisionError"):
        config.load_config("bad.py")


def test_a_folder_lists_what_is_in_it(good):
    with pytest.raises(UserError, match=r"that is a folder.*good.py"):
        config.load_config(good.parent)


def test_a_file_that_is_no_python(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="is not a Python file"):
        config.load_config(tmp_path / "config.yaml")


# overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("3", 3), ("-2", -2), ("True", True), ("true", True), ("false", False), ("None", None),
        ("(64, 64)", (64, 64)), ("64,64", (64, 64)), ("[1, 2]", [1, 2]), ("cosine", "cosine"), ("'7'", "7"),
        ("5 epochs", "5 epochs"), ("10%", "10%"), ("pkg.mod:Net", "pkg.mod:Net"), ("a=b", "a=b"), ("inf", float("inf")),
        ("__import__('os')", "__import__('os')"), ("{'a': 1}", {"a": 1}), ("(", "("), ("1_000", 1000), ('""', ""),
    ],
)  # fmt: skip
def test_a_literal_is_read_as_python_and_what_is_none_is_a_string(text, value):
    found = config.literal(text)
    assert found == value and type(found) is type(value)


def test_overrides_change_add_and_replace(good):
    found = parse(
        f"--config={good}", "--config.optim.learning_rate=1", "--config.model.hidden=(4, 5)", "--config.seed", "7",
        "--config.optim.schedule=cosine", "--config.checkpoint.keep=2", "--config.train.duration=5 epochs",
    )  # fmt: skip
    assert found.config.optim.to_dict() == ({"learning_rate": 1, "schedule": "cosine"})
    assert found.config.model.hidden == (4, 5) and found.config.seed == 7 and found.config.checkpoint.keep == 2
    assert found.config.train.duration == "5 epochs"
    assert found.overridden[:3] == ("optim.learning_rate", "model.hidden", "seed")


def test_the_last_of_two_holds(good):
    assert parse(f"--config={good}", "--config.seed=1", "--config.seed=2").config.seed == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.model.name.x=1", r"--config.model.name.x=1: model.name is a value, not a section"),
        ("--config.optim.learning_rate.a.b=1", r"optim.learning_rate is a value, not a section"),
        ("--config.=1", r"'--config.=1' names no key"),
        ("--config.optim..x=1", r"names no key"),
        ("--config.seed=", r"'--config.seed=' has no value: expected --config.seed=VALUE"),
        ("--config.seed", r"'--config.seed' has no value"),
        ("--workdirr=x", r"'--workdirr=x' is not a flag. Did you mean '--workdir'"),
        ("--work=x", r"'--work=x' is not a flag"),  # no abbreviations
        ("stray", r"'stray' is not a flag. There are: "),
    ],
)
def test_bad_flags(good, word, message):
    with pytest.raises(UserError, match=message):
        parse(f"--config={good}", word)


def test_the_workdir_is_named_after_the_config(good):
    assert parse(f"--config={good}").workdir == Path("runs/good")
    assert parse(f"--config={good}:16").workdir == Path("runs/good")
    assert parse("--config", good, "--workdir=/tmp/x").workdir == Path("/tmp/x")


def test_flags_are_kept(good):
    assert parse(f"--config={good}", "--allow_config_change").arguments.allow_config_change
    assert not parse(f"--config={good}").arguments.allow_config_change


# sections


def checked(given, convert=lambda text, key: text):
    return sections.check(given, convert)


def given(**changes):
    base = {
        "model": {"name": "mlp"}, "data": {"name": "digits", "batch_size": 64}, "optim": {"learning_rate": 0.1},
        "train": {"duration": "30 epochs"},
    }  # fmt: skip
    return base | {
        key: base.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()
    }


def test_a_checked_config_is_plain_and_has_every_section():
    found = checked(ConfigDict(given(model={"hidden": [4]})))
    assert set(found) == {*sections.SECTIONS, "seed"} and found["seed"] == 0
    assert found["model"] == {"name": "mlp", "hidden": (4,)} and type(found["model"]) is dict
    assert checked(found) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modle": {}},
            r"modle=\{\}: unknown section. Did you mean 'model'\? There are: checkpoint, data, guard",
        ),
        ({"optim": 3}, r"optim=3 has the wrong type: expected a section"),
        ({"seed": -1}, r"seed=-1 is out of range"),
        ({"seed": "x"}, r"seed='x' has the wrong type: expected an integer"),
        ({"optim": {"learning_rat": 1}}, r"optim.learning_rat=1: unknown key. Did you mean 'learning_rate'"),
        ({"optim": {"final": 0.1}}, r"optim.final=0.1: unknown key"),  # constant has no end; cosine does
        ({"optim": {"total_steps": 5}}, r"optim.total_steps=5: unknown key"),
        ({"optim": {"name": "adm"}}, r"optim.name='adm' does not exist. Did you mean 'adam'"),
        ({"optim": {"average": 1.5}}, r"optim.average=1.5 is out of range"),
        ({"model": {"name": "mpl"}}, r"model.name='mpl' does not exist. Did you mean 'mlp'"),
        ({"model": {"features": (3,)}}, r"model.features=\(3,\): unknown key"),
        ({"data": {"eval_batch_size": 0}}, r"data.eval_batch_size=0 is out of range: .* 1 and"),
        ({"data": {"placement": "gpu"}}, r"data.placement='gpu' has the wrong type: expected one of 'auto'"),
        ({"loss": {"outputs": 1}}, r"loss.outputs=1: unknown key"),
        ({"mesh": {"data": 0}}, r"mesh.data=0 is out of range"),
        ({"mesh": {"devices": 1}}, r"mesh.devices=1: unknown key"),
        ({"train": {"duration": 1.5}}, r"train.duration=1.5 has the wrong type: expected steps or a duration"),
        ({"train": {"mode": "least"}}, r"expected one of 'min', 'max'"),
        ({"sharding": {"rules": "x"}}, r"sharding.rules='x' has the wrong type"),
        ({"checkpoint": {"directory": "x"}}, r"checkpoint.directory='x': unknown key"),
    ],
)
def test_check_names_what_is_wrong(changes, message):
    with pytest.raises(UserError, match=message):
        checked(given(**changes))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("model", r"model.name is not set. There are: bert, bert_classifier"),
        ("data", r"data.name is not set. There are: arrays, cifar10"),
        ("optim", r"optim.learning_rate is not set. Add it to the config, or --config.optim.learning_rate=VALUE"),
        ("train", r"train.duration is not set"),
    ],
)
def test_check_names_what_is_missing(section, message):
    with pytest.raises(UserError, match=message):
        checked({key: value for key, value in given().items() if key != section})


def test_options_of_what_is_picked_are_taken():
    found = checked(given(optim={"name": "sgd", "momentum": 0.5, "schedule": "cosine", "final": 0.1}))
    assert found["optim"]["momentum"] == 0.5 and found["optim"]["final"] == 0.1


def test_durations_are_converted_with_their_keys():
    asked = {}
    found = checked(given(optim={"warmup": "10%"}), lambda text, key: asked.setdefault(key, text) and 17)
    assert asked == {"optim.warmup": "10%", "train.duration": "30 epochs"}
    assert found["optim"]["warmup"] == 17 == found["train"]["duration"]


def test_resolved_says_where_every_value_comes_from():
    rows = {
        key: (value, origin)
        for key, value, origin in sections.resolved(
            given(model={"hidden": [4]}), ("optim.learning_rate", "model.hidden")
        )
    }
    assert rows["seed"] == (0, "default")
    assert rows["model.hidden"] == ((4,), "command line")
    assert rows["model.name"] == ("mlp", "config")
    assert rows["model.activation"] == ("relu", "default")
    assert rows["model.classes"] == (None, "from the data")
    assert rows["optim.learning_rate"] == (0.1, "command line")
    assert rows["optim.name"] == ("adamw", "default") and rows["optim.b1"] == (0.9, "default")
    assert rows["train.duration"] == ("30 epochs", "config") and rows["train.log_every"] == (100, "default")
    assert {key.partition(".")[0] for key in rows} == {*sections.SECTIONS, "seed"}
    assert not {"optim.total_steps", "loss.batch", "mesh.devices"} & set(rows)


def test_resolved_gives_what_can_be_given_again():
    """Every key that `resolved` lists with a value is one that `check` takes."""
    again = {}
    for key, value, origin in sections.resolved(given()):
        section, _, name = key.partition(".")
        if origin != "from the data" and name:
            again.setdefault(section, {})[name] = value
    assert set(checked(again)) == {*sections.SECTIONS, "seed"}


def test_resolved_refuses_what_check_does():
    with pytest.raises(UserError, match="unknown section"):
        sections.resolved(given(modle={}))
    with pytest.raises(UserError, match="is not a duration"):
        sections.resolved(given(train={"duration": "30 parsecs"}))


def test_the_data_section_is_split():
    ours, theirs = sections.split_data({"name": "digits", "batch_size": 64, "data_dir": "/x"})
    assert (ours["batch_size"], ours["eval_batch_size"], ours["placement"]) == (64, 64, "auto")
    assert theirs == {"name": "digits", "data_dir": "/x"}


def test_an_axis_may_be_said_where_the_config_leaves_the_mesh_to_us(good):
    changed = ConfigDict({"mesh": "auto"})
    config.override(changed, "mesh.fsdp", "2")
    assert changed.to_dict() == {"mesh": {"fsdp": 2}}
