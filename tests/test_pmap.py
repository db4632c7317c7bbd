"""The page for users of pmap and pjit: its code runs, and says what is true."""

import re

import pytest
from conftest import ROOT

from flaxmodels import cli, registry, sharding, state, step
from flaxmodels.job import Job
from flaxmodels.perf.ways import WAYS

PAGE = (ROOT / "docs" / "pmap.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_every_block_runs(capsys):
    assert len(BLOCKS) >= 7
    names = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/pmap.md", "exec"), names)
    assert "'fsdp'" in capsys.readouterr().out


def test_names_of_this_library_exist():
    """Those in the last column of the table, and the command."""
    for holder, name in ((step, "compile_step"), (state, "init"), (state, "TrainState"), (sharding, "make_mesh")):
        assert f"`{holder.__name__.rpartition('.')[2]}.{name}`" in PAGE and hasattr(holder, name)
    assert "`lower_train` donates" in PAGE and hasattr(Job, "lower_train")
    assert set(WAYS) == {"jit", "shard_map", "pmap"}
    assert "flaxmodels bench step" in PAGE and "step" in cli.measuring.BENCHES
    mesh = registry.parameters([sharding.make_mesh])
    for axis in re.findall(r"mesh = dict\((.*?)\)", PAGE):
        assert {part.split("=")[0].strip() for part in axis.split(",")} <= set(mesh)
