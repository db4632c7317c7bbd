"""`flaxmodels checkpoint`: what is shown, compared, averaged and deleted is what is on disk, and nothing else is."""

import contextlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import shelf, stored, tensors
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.cli.checkpoint import checkpoint
from flaxmodels.fitting import Leaf
from flaxmodels.registry import UserError
from flaxmodels.runtime.lock import workdir_lock
from flaxmodels.state import TrainState

RATES = {2: 0.1, 4: 0.1, 6: 0.2}
METRICS = {2: 0.5, 4: 0.25, 6: 0.75}


def state(step):
    params = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) + step, "bias": np.full(3, 0.1, jnp.bfloat16)}
    extra = {"batch_stats": {"mean": np.full(3, step, np.float32)}}
    average = {"kernel": params["kernel"] / 2, "bias": params["bias"]}
    opt_state = ({"count": np.int32(step), "mu": params}, {"parameters_average": average})
    return TrainState(np.int32(step), params, extra, opt_state)


def save(workdir, steps, facts=None, **meta):
    with contextlib.closing(Checkpoints(workdir / "checkpoints", every_seconds=0.0, keep=9)) as checkpoints:
        for step in steps:
            config = {"train.metric": "eval/loss", "train.mode": "min", "optim.learning_rate": RATES[step]}
            told = {"memory": {"best": 1}, "data": {"seed": 0}, "config": config, **meta}
            parent = {"parent": step - 2 or None, "git": {"revision": "ab" * 20, "dirty": True}, "time": 1e9 + step}
            checkpoints.save(state(step), step, told, METRICS[step], facts={**parent, **(facts or {})})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("shelf") / "run"
    save(workdir, RATES)
    (workdir / "config.json").write_text("{}")
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def said(capsys):
    """said("list", ...) -> (exit code, lines on stdout)."""

    def call(*words):
        code = checkpoint(list(map(str, words)))
        return code, capsys.readouterr().out.splitlines()

    return call


def damage(workdir, step):
    files = (file for file in (workdir / f"checkpoints/{step}/params").rglob("*") if file.is_file())
    file = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.relative_to(workdir / f"checkpoints/{step}").as_posix()


def test_list(made, said):
    code, lines = said("list", f"--workdir={made}")
    assert code == 0 and lines[0] == f"checkpoints of {made}"
    assert lines[1].split() == ["step", "saved", "size", "eval/loss", "state", "parent", "git"]
    words = [line.split() for line in lines[2:5]]
    assert [row[0] for row in words] == ["2", "4", "6"] and ["best" in row for row in words] == [False, True, False]
    assert words[1][5:] == ["0.2500", "best", "committed", "2", "abababab" + "a+"]
    code, lines = said("list", f"--workdir={made}", "--verify", "--json")
    rows = [json.loads(line) for line in lines]
    assert [row["state"] for row in rows] == ["whole"] * 3 and [row["metric"] for row in rows] == [0.5, 0.25, 0.75]
    assert rows[0]["parent"] is None and rows[2]["saved"] == 1e9 + 6 and all(row["bytes"] > 1000 for row in rows)


def test_what_is_not_committed_or_moved_aside_is_said(workdir, said):
    (workdir / "checkpoints/6/MANIFEST.json").unlink()
    shutil.move(workdir / "checkpoints/2", workdir / "checkpoints/damaged/2")
    code, lines = said("list", f"--workdir={workdir}")
    assert code == 0 and "not committed" in lines[3] and lines[-1].startswith("aside: damaged/2, ")
    assert shelf.find(workdir, "latest").step == 4
    with pytest.raises(UserError, match=r"step 6 is not in .*: the nearest is 4. There are: 4."):
        said("inspect", f"--workdir={workdir}", 6)


def test_the_best_is_that_of_the_run_s_mode(workdir):
    assert shelf.find(workdir, "best").step == 4
    facts = {"watched": 0.5, "meta": {"config": {"train.mode": "max"}}}
    two = [shelf.Entry(step, workdir, True, 0.0, 0, {**facts, "watched": step / 8}) for step in (2, 4)]
    assert shelf.best(two).step == 4
    assert shelf.best([]) is None


def test_inspect(made, said):
    code, lines = said("inspect", f"--workdir={made}", "2")
    assert code == 0 and lines[0] == f"step 2 of '{made}'"
    kernels = [line.split()[1:] for line in lines[lines.index("params: arrays") :] if line.startswith("  kernel ")]
    assert kernels == [["(2,", "3)", "float32", "24", "B"], ["4.500", "1.708", "2.000", "7.000", "0"]]
    assert any(line.split() == ["git", "revision", "ab" * 20] for line in lines)
    rows = [json.loads(line) for line in said("inspect", f"--workdir={made}", "--json")[1]]
    assert rows[0]["kind"] == "facts" and rows[0]["step"] == 6 and rows[0]["meta"]["data"] == {"seed": 0}
    paths = {row["path"]: row for row in rows[1:]}
    assert set(paths) == set(stored.tree(made / "checkpoints/6"))
    assert paths["params/bias"]["dtype"] == "bfloat16" and paths["params/bias"]["mean"] == 0.10009765625
    assert paths["opt_state/0/count"]["mean"] == 6.0 and paths["opt_state/0/count"]["bytes"] == 4


def test_statistics_leave_out_what_is_not_finite(tmp_path, monkeypatch):
    values = {"a": np.array([1, np.nan, 3, -np.inf], np.float32), "b": np.array([np.inf], np.float32)}
    monkeypatch.setattr(stored, "tree", lambda _: {path: Leaf(x.shape, "float32") for path, x in values.items()})
    monkeypatch.setattr(stored, "arrays", lambda _, paths: {path: values[path] for path in paths})
    a, b = tensors.statistics(shelf.Entry(1, tmp_path, True, 0.0, 0, {}))
    assert (a.mean, a.std, a.low, a.high, a.non_finite) == (2.0, 1.0, 1.0, 3.0, 2)
    assert b.non_finite == 1 and b.record()["mean"] is None


def test_arrays_are_read_a_portion_at_a_time():
    leaves = {name: Leaf((size,), "float32") for name, size in {"a": 2, "b": 2, "c": 9, "d": 1}.items()}
    assert list(stored.portions(leaves, 16)) == [["a", "b"], ["c"], ["d"]]


def test_verify(workdir, said):
    code, lines = said("verify", f"--workdir={workdir}")
    assert code == 0 and [line[:14] for line in lines] == ["step 2: whole,", "step 4: whole,", "step 6: whole,"]
    file = damage(workdir, 4)
    code, lines = said("verify", f"--workdir={workdir}")
    assert code == 1 and lines[1].startswith("step 4: damaged") and lines[2].startswith(f"  {file} is damaged")
    assert lines[-1].startswith("1 of 3 checkpoints are damaged: ")
    assert said("verify", f"--workdir={workdir}", 6)[0] == 0
    code, (line,) = said("verify", f"--workdir={workdir}", 4, "--json")
    assert code == 1 and json.loads(line)["problems"] == [f"{file} is damaged: its SHA-256 is another one"]


def test_diff(made, said, tmp_path):
    code, lines = said("diff", f"--workdir={made}", 4, "latest")
    assert code == 0 and ["config", "optim.learning_rate", "0.1", "0.2"] in [line.split() for line in lines]
    assert [line.split()[0] for line in lines if "(2, 3)" in line] == [
        "params/kernel", "opt_state/0/mu/kernel", "opt_state/1/parameters_average/kernel",
    ]  # fmt: skip
    assert lines[-1] == "3 of 9 tensors in both are the same, bit for bit"
    save(tmp_path / "other", [4], data={"seed": 1})
    code, lines = said("diff", f"{made}:4", f"{tmp_path / 'other'}:4", "--json")
    assert [json.loads(line) for line in lines] == [{"kind": "data", "name": "seed", "a": 0, "b": 1}]
    with pytest.raises(UserError, match="diff compares two checkpoints, and 1 are named"):
        said("diff", f"--workdir={made}", 4)


def test_distances():
    def apart(a, b):
        return tensors._distance(np.array(a, np.float32), np.array(b, np.float32))

    assert apart([1, np.nan, np.inf], [1, np.nan, np.inf]) == (0, 0)
    assert apart([1, 4], [2, 4]) == (1, 0.25) and apart([np.inf, 1], [np.inf, 2]) == (1, 0.5)
    assert apart([1, np.nan], [1, 2]) == (np.inf, np.inf) and apart([np.inf], [-np.inf]) == (np.inf, np.inf)


def test_what_can_t_be_compared_is_named():
    a = {"x": Leaf((1,), "float32"), "y": Leaf((1,), "float32"), "z": Leaf((1,), "float32")}
    b = {"x": Leaf((1,), "float32"), "y": Leaf((2,), "float32"), "w": Leaf((1,), "int32")}
    assert tensors.unlike(a, b) == [
        "y is (1,) float32 in A, (2,) float32 in B", "z (1,) float32 is in A only", "w (1,) int32 is in B only",
    ]  # fmt: skip


def test_average(made, said, tmp_path):
    to = tmp_path / "average"
    code, lines = said("average", f"--workdir={made}", 2, 4, 6, f"--to={to}")
    assert code == 0 and lines[0].startswith(f"average of 2, 4, 6: step 6 of '{to}'") and "BatchNorm" in lines[1]
    entry = shelf.find(to, "best")
    assert entry.step == 6 and shelf.problems(entry) == [] and (to / "config.json").exists() and entry.metric is None
    assert entry.facts["average of"] == [f"{made}:{step}" for step in (2, 4, 6)]
    assert entry.meta["data"] == {"seed": 0} and entry.meta["memory"] == {}
    assert stored.tree(entry.folder) == stored.tree(made / "checkpoints/6")
    found, newest = (stored.arrays(f, list(stored.tree(f))) for f in (entry.folder, made / "checkpoints/6"))
    kernels = np.stack([state(step).params["kernel"] for step in (2, 4, 6)]).astype(np.float64)
    np.testing.assert_array_equal(found["params/kernel"], kernels.mean(0).astype(np.float32))
    np.testing.assert_array_equal(found["opt_state/1/parameters_average/kernel"], found["params/kernel"] / 2)
    np.testing.assert_array_equal(found["params/bias"], newest["params/bias"])  # of equals, not a bit else
    np.testing.assert_array_equal(found["extra/batch_stats/mean"], np.full(3, 4.0))
    for path in ("opt_state/0/mu/kernel", "opt_state/0/count", "step"):
        np.testing.assert_array_equal(found[path], newest[path])


def test_average_refuses(workdir, said, tmp_path):
    def refused(*words, match, to=tmp_path / "to"):
        with pytest.raises(UserError, match=match):
            said("average", f"--workdir={workdir}", *words, f"--to={to}")

    refused(2, match="at least two different steps")
    refused(2, "2", match="at least two different steps")
    refused(2, 4, match="is there already: name a new folder", to=workdir)
    refused(2, 5, match=r"step 5 is not in .*: the nearest is 4")
    with workdir_lock(workdir):
        refused(2, 4, match="belongs to another running process: pid")
    damage(workdir, 4)
    refused(2, 4, match=r"step 4 of .* is damaged: params/")
    assert not (tmp_path / "to").exists()


def steps(workdir):
    return [entry.step for entry in shelf.entries(workdir)]


def test_prune_says_and_then_does(workdir, said):
    command = ("prune", f"--workdir={workdir}", "--keep=1", "--keep_best=1")
    code, lines = said(*command)
    assert code == 0 and [line.split()[:2] for line in lines[2:5]] == [["2", "delete"], ["4", "keep"], ["6", "keep"]]
    assert lines[-1].startswith("would delete 1 of 3 folders") and steps(workdir) == [2, 4, 6]
    with workdir_lock(workdir):
        assert said(*command)[0] == 0  # to look harms no run
        with pytest.raises(UserError, match="belongs to another running process: pid"):
            said(*command, "--yes")
    code, lines = said(*command, "--yes")
    assert lines[-1].startswith("deleted 1 of 3 folders") and steps(workdir) == [4, 6]
    assert sorted(file.name for file in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    assert said(*command, "--yes")[1][-1] == "deleted nothing: all of them stay"


def test_prune_never_trusts_a_damaged_step(workdir, said):
    damage(workdir, 6)
    assert said("prune", f"--workdir={workdir}", "--keep=1", "--yes")[0] == 0
    assert steps(workdir) == [4, 6]  # 4 is the newest whole one; 6 is left to look at
    (workdir / "checkpoints/damaged/1").mkdir(parents=True)
    (workdir / "checkpoints/8").mkdir()
    lines = said("prune", f"--workdir={workdir}", "--damaged", "--yes")[1]
    assert "was never committed" in "".join(lines) and steps(workdir) == [4]
    assert not list((workdir / "checkpoints").glob("d*/*"))


def test_prune_of_damaged_ones_keeps_all_others(workdir, said):
    damage(workdir, 2)
    assert said("prune", f"--workdir={workdir}", "--damaged", "--yes")[0] == 0 and steps(workdir) == [4, 6]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "say first what to do, as in `flaxmodels checkpoint list --workdir=DIR`"),
        (["--workdir=x"], "say first what to do"),
        (["lst"], "'lst': there is no such action. Did you mean 'list'?"),
        (["list"], "--workdir is not set"),
        (["list", "--workdir=none"], "--workdir='none' is not there: expected the workdir of a run"),
        (["list", "--workdir=WORKDIR/checkpoints"], "has no checkpoints: expected the workdir of a run"),
        (["list", "--workdir=WORKDIR", "--verfy"], "'--verfy' is not a flag. Did you mean '--verify'?"),
        (["inspect", "--workdir=WORKDIR", "3"], "the nearest is "),
        (["inspect", "--workdir=WORKDIR", "lastest"], "'lastest' is no step of .* Did you mean 'latest'?"),
        (["diff", "none:2", "WORKDIR:2"], "workdir='none' is not there"),
        (["prune", "--workdir=WORKDIR"], "prune: say what stays, with --keep=N"),
        (["average", "--workdir=WORKDIR", "--to=x"], "at least two different steps"),
    ],
)  # fmt: skip
def test_bad_words(made, words, match):
    with pytest.raises(UserError, match=match.replace("?", r"\?")):
        checkpoint([word.replace("WORKDIR", str(made)) for word in words])


def test_an_empty_workdir_is_one(tmp_path, said):
    (tmp_path / "checkpoints").mkdir()
    assert said("list", f"--workdir={tmp_path}") == (0, [f"{tmp_path} has no checkpoints yet"])
    assert said("verify", f"--workdir={tmp_path}") == (0, [f"{tmp_path} has no checkpoints yet"])
    with pytest.raises(UserError, match="has no step that was saved to its end"):
        said("inspect", f"--workdir={tmp_path}")


def test_help(said):
    code, lines = said("--help")
    assert code == 0 and any("checkpoint prune --help" in line for line in lines)
