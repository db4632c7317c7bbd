"""What tpu/README.md says is so: settings, prices, links, examples. That its commands run is tested elsewhere."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tpu import machines, settings, verbs

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "tpu/README.md").read_text()
SHELL = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))


def test_settings_it_shows_are_those_of_the_file():
    (shown,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert tomllib.loads(shown) == tomllib.loads((ROOT / "tpu/tpu.toml").read_text())


def test_prices_and_their_date():
    s = settings.load(ROOT / "tpu/tpu.toml", {})
    machine, prices = machines.of(s.type), tomllib.loads(machines.PRICES.read_text())
    price = machines.price(machine, s.capacity)
    assert f"{price * machine.chips:.2f} USD an hour ({machine.chips} chips of {machine.chip} on spot" in README
    assert prices[machine.chip]["source"].rpartition(", ")[2] in README
    assert f"At {s.max_cost:g} USD, or {s.max_hours:g} hours, it lets the run save" in README
    dates = {str(table["date"]) for table in prices.values()}
    assert set(re.findall(r"\d{4}-\d\d-\d\d", README)) == dates


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / "tpu" / target).exists(), target
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= titles


def test_every_verb_is_shown_and_every_setting_exists():
    shown = {shlex.split(line)[2] for line in SHELL.splitlines() if line.startswith("python tpu/launch.py")}
    assert shown == set(verbs.VERBS)
    assert SHELL.count("\n", 0, SHELL.index("tpu/launch.py up")) == 10  # from nothing to a finished run


@pytest.mark.parametrize(("verb", "example"), [("gke", "gke/jobset.yaml"), ("slurm", "slurm/job.sbatch")])
def test_examples_are_what_its_commands_write(verb, example, tmp_path, monkeypatch, capsys):
    (line,) = (line for line in SHELL.splitlines() if line.startswith(f"python tpu/launch.py {verb} "))
    words = shlex.split(line)[2:]
    monkeypatch.chdir(ROOT)
    assert verbs.main([*words[: words.index("--")], "--dry_run", *words[words.index("--") :]]) == 0
    assert capsys.readouterr().out == (ROOT / "tpu" / example).read_text()
