"""What a user says of a run: the file, the flags over it, and what is refused."""

from pathlib import Path

import pytest

from tpu import keys, settings
from tpu.settings import Settings, UserError

SAID = {"name": "a", "project": "p", "zone": "us-west4-a", "type": "v5litepod-16"}


def written(tmp_path, text):
    file = tmp_path / "own.toml"
    file.write_text(text)
    return file


def test_all_of_a_file_is_read(tmp_path):
    file = written(
        tmp_path,
        """
        name = "digits"
        project = "my-project"
        zone = ["us-west4-a", "us-west1-c"]
        type = "v5litepod-16"
        capacity = "on_demand"
        slices = 2
        bucket = "gs://b"
        max_hours = 2
        max_cost = 1.5
        command = "python train.py --config='a b.py'"
        install = ["-e", "."]
        prices = "own.toml"
        labels = { team = "x", cost = "y" }
        tags = "one,two"
        internal_ips = true
        ssh_flags = "--internal-ip --ssh-flag=-v"
        """,
    )
    assert settings.load(file, {}) == Settings(
        name="digits",
        project="my-project",
        zones=("us-west4-a", "us-west1-c"),
        type="v5litepod-16",
        capacity="on demand",
        slices=2,
        bucket="gs://b",
        max_hours=2.0,
        max_cost=1.5,
        command=("python", "train.py", "--config=a b.py"),
        install=("-e", "."),
        prices=Path("own.toml"),
        labels=("team=x", "cost=y"),
        tags=("one", "two"),
        internal_ips=True,
        ssh_flags=("--internal-ip", "--ssh-flag=-v"),
    )


def test_a_flag_counts_before_the_file_and_one_that_is_not_given_does_not(tmp_path):
    file = written(tmp_path, "name = 'a'\nproject = 'p'\nzone = 'us-west4-a'\ntype = 'v4-8'\nmax_hours = 2")
    s = settings.load(file, {"zone": "us-west4-b,us-west4-a,us-west4-b", "max_hours": "0.5", "type": None, "every": 3})
    assert (s.zones, s.max_hours, s.type) == (("us-west4-b", "us-west4-a"), 0.5, "v4-8")


def test_the_file_of_the_folder_is_taken_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.load(None, SAID).bucket is None
    (tmp_path / "tpu.toml").write_text("bucket = 'gs://b'")
    assert settings.load(None, SAID).bucket == "gs://b"


@pytest.mark.parametrize("key", ["name", "project", "zone", "type"])
def test_what_is_missing_is_named(key):
    with pytest.raises(UserError, match=f"--{key} is missing"):
        settings.load(None, {**SAID, key: None})
    if key != "name":
        assert settings.load(None, {**SAID, key: None}, needs=()).name == "a"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "Big", "a small letter"),
        ("name", "a" * 51, "at most 49"),
        ("name", "a;b", "a small letter"),
        ("name", "a-", "a small letter"),
        ("project", "p$(x)", "the id of a project"),
        ("zone", "us-west4", "a region and a letter"),
        ("zone", "us-west4-a,,", "names with commas"),
        ("zone", [], "names with commas"),
        ("type", "v4 8", "an accelerator type"),
        ("capacity", "spto", "Did you mean 'spot'"),
        ("slices", "1.5", "a whole number"),
        ("slices", "0", "a number above 0"),
        ("max_hours", "nan", "a number above 0"),
        ("max_hours", True, "a number above 0"),
        ("max_cost", "-1", "a number above 0"),
        ("bucket", "gs://", "gs://NAME"),
        ("bucket", "relative/folder", "a folder from / on"),
        ("command", "python 'x", "as a shell reads them"),
        ("command", [], "words, such as"),
        ("command", [1], "words, such as"),
        ("install", "", "words, such as"),
        ("prices", "", "a path"),
        ("labels", "Team", "KEY=VALUE"),
        ("internal_ips", "yes", "true or false"),
        ("network", "a b", "the name of a network"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key, value, said):
    with pytest.raises(UserError) as error:
        settings.load(None, {**SAID, key: value})
    assert said in str(error.value) and str(error.value).startswith(f"--{key}=")


def test_an_unknown_key_of_the_file_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'max_hour'\. Did you mean 'max_hours'"):
        settings.load(written(tmp_path, "max_hour = 1"), SAID)


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml"):
        settings.load(tmp_path / "none.toml", SAID)
    with pytest.raises(UserError, match=r"own\.toml.*can't be read"):
        settings.load(written(tmp_path, "name = "), SAID)


def test_the_training_is_told_where_it_saves_and_to_start_again():
    s = settings.load(None, {**SAID, "bucket": "gs://b/runs/"})
    assert s.workdir == "gs://b/runs/a"
    assert s.training == (
        "python", "train.py", "--config=configs/digits_mlp.py", "--workdir=gs://b/runs/a", "--max_restarts=20",
        "--config.checkpoint.damaged=pass over",
    )  # fmt: skip


@pytest.mark.parametrize("words", [("--workdir=/w", "--max_restarts=3"), ("--workdir", "/w", "--max_restarts", "3")])
def test_what_the_user_says_of_the_training_counts(words):
    s = settings.load(None, {**SAID, "command": ["python", "t.py", *words, "--config.checkpoint.damaged=refuse"]})
    assert s.workdir == "/w"
    assert s.training == s.command


def test_a_run_without_a_bucket_has_no_workdir():
    with pytest.raises(UserError, match="--bucket=gs://"):
        _ = settings.load(None, SAID).workdir


def test_every_key_is_a_field_of_settings_and_every_field_a_key():
    assert {key.field or name for name, key in keys.KEYS.items()} == set(Settings.__dataclass_fields__)


def test_the_defaults_are_values_that_would_be_accepted():
    """The keys' own checks accept what `Settings` starts from."""
    s = Settings(**{"name": "a"})
    for name, key in keys.KEYS.items():
        value = getattr(s, key.field or name)
        if name in ("name", "capacity", "slices", "idle_minutes", "queue_hours", "zone_patience", "command", "install"):
            assert key.read(name, value) == value
    assert keys.KEYS["state"].read("state", str(s.state)) == s.state
