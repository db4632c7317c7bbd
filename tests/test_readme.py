"""What the README says is true: its example runs, its commands exist, its table names every config."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_example_is_short_and_runs(run, tmp_path):
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 25
    script = tmp_path / "mine.py"
    script.write_text(example.replace("runs/my_net", str(tmp_path / "my_net")))
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 0.95


def test_two_commands():
    shell = "\n".join(blocks("bash"))
    assert re.search(r"^python3 -m venv .venv && .*train.py --config=configs/digits_mlp.py$", shell, flags=re.MULTILINE)
    assert re.search(r"^.*\.venv/bin/python -m pytest$", shell, flags=re.MULTILINE)


def test_table_names_every_config_and_files_exist():
    for path in (ROOT / "configs").glob("*.py"):
        assert f"`{path.stem}`" in README, path
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
