"""A new run from parts of another one's checkpoint: each array is where it was asked for, and none without a word."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from flaxmodels import fitting, loop, resume, shelf, stored, warm
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.fitting import Leaf
from flaxmodels.job import assemble
from flaxmodels.paths import path_of
from flaxmodels.registry import UserError
from flaxmodels.state import TrainState
from flaxmodels.warm import Origin

F32, BF16 = "float32", "bfloat16"
SAVED = {
    "params/body/kernel": Leaf((4, 8), F32),
    "params/head/kernel": Leaf((8, 10), F32),
    "extra/batch_stats/mean": Leaf((8,), F32),
    "opt_state/0/mu/body/kernel": Leaf((4, 8), F32),
    "opt_state/1/parameters_average/body/kernel": Leaf((4, 8), F32),
    "opt_state/1/parameters_average/head/kernel": Leaf((8, 10), F32),
    "step": Leaf((), "int32"),
}
PLAIN = {path: leaf for path, leaf in SAVED.items() if "average" not in path}


def choose(wanted=PLAIN, **options):
    return warm.choose(Origin(workdir="runs/a", **options), SAVED, wanted)


def test_parameters_only():
    choice = choose()
    assert choice.sources == {path: path for path in PLAIN if path.startswith("params/")}
    assert choice.fresh == () and set(choice.unused) == set(SAVED) - set(choice.sources) - {"step"}


def test_a_sub_tree_and_what_is_new_in_it():
    choice = choose(only="^(params|extra)/", fresh=("/head/",))
    assert list(choice.sources) == ["params/body/kernel", "extra/batch_stats/mean"]
    assert choice.fresh == ("params/head/kernel",) and "params/head/kernel" in choice.unused
    assert list(choose(only="body").sources) == ["params/body/kernel", "opt_state/0/mu/body/kernel"]


def test_the_step_is_never_taken():
    assert "step" not in choose(only=".").sources and "step" not in choose(only=".").unused


def test_rules_rename_in_their_order():
    wanted = {"params/trunk/weight": Leaf((4, 8), F32)}
    rename = ((r"^params/body/", "params/trunk/"), (r"^(params/trunk)/kernel$", r"\1/weight"))
    assert choose(wanted, rename=rename).sources == {"params/trunk/weight": "params/body/kernel"}


def test_averaged_parameters():
    choice = choose(average=True)
    assert choice.averaged
    assert choice.sources == {
        f"params/{n}": f"opt_state/1/parameters_average/{n}" for n in ("body/kernel", "head/kernel")
    }
    assert set(choice.unused) == {"extra/batch_stats/mean", "opt_state/0/mu/body/kernel"}
    bare = warm.choose(Origin(workdir="a", average=True), PLAIN, PLAIN)
    assert not bare.averaged and bare.sources["params/body/kernel"] == "params/body/kernel"
    renamed = choose({"params/b/kernel": Leaf((4, 8), F32)}, average=True, rename=(("body", "b"),))
    assert renamed.sources == {"params/b/kernel": "opt_state/1/parameters_average/body/kernel"}


def test_all_that_is_not_covered_is_listed():
    wanted = PLAIN | {"params/new/kernel": Leaf((3, 3), F32), "params/body/kernel": Leaf((4, 8), BF16)}
    wanted |= {"params/tail/kernel": Leaf((8, 10), F32)}
    del wanted["params/head/kernel"]
    with pytest.raises(UserError) as raised:
        choose(wanted)
    assert str(raised.value).splitlines()[:4] == [
        "this run can't start from the store: 3 differences",
        "  params/head/kernel was probably renamed to params/tail/kernel, both (8, 10) float32",
        "  params/new/kernel is missing: wanted (3, 3) float32",
        "  params/body/kernel was (4, 8) float32, is (4, 8) bfloat16; start.cast does not name it",
    ]
    choice = choose(wanted, fresh=("/new/",), cast=("body",), rename=(("head", "tail"),))
    assert choice.sources == {"params/body/kernel": "params/body/kernel", "params/tail/kernel": "params/head/kernel"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(only="^parms/"), "start.only='^parms/' matches nothing of this model"),
        (dict(fresh=("haed",)), "start.fresh: 'haed' matches nothing that start.only selects"),
        (dict(fresh=("batch_stats",)), "start.fresh: 'batch_stats' matches nothing that start.only selects"),
        (dict(rename=(("bdoy", "b"),)), "start.rename: 'bdoy' matches nothing of the store"),
        (dict(rename=(("kernel", "w"),)), "params/body/w was probably renamed to params/body/kernel"),
        (dict(rename=(("head", "body"),)), "start.rename makes 'params/body/kernel' of both 'params/body/kernel' and"),
        (dict(cast=("haed",)), "start.cast: 'haed' matches no path"),
    ],
)
def test_rules_that_do_nothing_or_too_much_are_refused(options, said):
    with pytest.raises(UserError) as raised:
        choose(**options)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(workdir="a", only="("), "start.only: '(' is no regular expression"),
        (dict(workdir="a", fresh=("*",)), "start.fresh: '*' is no regular expression"),
        (dict(workdir="a", rename=(("(a", "b"),)), "start.rename: '(a' is no regular expression"),
        (dict(workdir="a", rename=(("a", r"\1"),)), r"start.rename: '\\1' does not go with 'a'"),
        (dict(fresh=("a",)), "start.fresh is set, but start.workdir is not"),
    ],
)
def test_bad_options_are_said_before_anything_is_read(options, said):
    with pytest.raises(UserError) as raised:
        Origin(**options)
    assert said in str(raised.value)


class Small:
    """A run's own state, of a few numbers: its abstract tree over a mesh, how it is made, its optimizer's `init`."""

    def __init__(self, mesh, dtype=jnp.float32):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def fresh():
            params = {"body": jnp.full((8, 2), 7.0, dtype), "head": jnp.full((8,), 9.0, dtype)}
            return TrainState(jnp.zeros((), jnp.int32), params, {}, self.init(params))

        shapes = jax.eval_shape(fresh)
        places = jax.tree.map(lambda x: place if x.ndim else whole, shapes)
        self.abstract = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places)
        self.fresh = jax.jit(fresh, out_shardings=places)

    def init(self, params):
        return {"mu": jax.tree.map(jnp.zeros_like, params), "average": jax.tree.map(jnp.array, params)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one step of {"trunk": 0..15 / 3, "head": ...}."""
    workdir = tmp_path_factory.mktemp("run")
    params = {"trunk": np.arange(16, dtype=np.float32).reshape(8, 2) / 3, "head": np.arange(8, dtype=np.float32) * 1e5}
    with contextlib.closing(Checkpoints(workdir / "checkpoints", every_seconds=0.0)) as checkpoints:
        state = TrainState(np.int32(4), params, {}, {"mu": params, "average": params})
        checkpoints.save(state, 4, {"memory": {}, "data": {}, "config": {}}, facts={"parent": None})
    return workdir, params


def mesh(devices):
    return jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])


def test_arrays_lie_where_they_were_asked_for_on_any_mesh(run):
    workdir, params = run
    for devices in (1, 4):
        new = Small(mesh(devices))
        origin = Origin(workdir=str(workdir), step=4, rename=(("/trunk", "/body"),), fresh=("head",))
        begun = warm.begin(origin, warm.find(origin), new.fresh, new.abstract, new.init)
        state = begun.state
        np.testing.assert_array_equal(state.params["body"], params["trunk"])
        np.testing.assert_array_equal(state.params["head"], np.full(8, 9.0, np.float32))
        np.testing.assert_array_equal(state.opt_state["average"]["body"], params["trunk"])  # remembers no other ones
        assert not state.opt_state["mu"]["body"].any() and int(state.step) == 0
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, new.abstract)
        assert begun.origin == f"{workdir}:4"
        assert begun.notes == (
            f"start: 1 arrays from step 4 of '{workdir}': params/body",
            "start: newly initialised by start.fresh: params/head",
            "start: not used of what is stored there: params/head, opt_state/average/head, opt_state/average/trunk, "
            "opt_state/mu/head, opt_state/mu/trunk",
        )
        pointers = [
            x.unsafe_buffer_pointer() for x in jax.tree.leaves(jax.tree.map(lambda x: x.addressable_data(0), state))
        ]
        assert len(set(pointers)) == len(pointers)  # nothing would be donated twice


@pytest.mark.slow
def test_optimizer_state_too_where_it_is_asked_for(run):
    workdir, params = run
    new = Small(mesh(2))
    origin = Origin(workdir=str(workdir), only="^(params|opt_state/mu)/", rename=(("/trunk", "/body"),))
    state = warm.begin(origin, warm.find(origin), new.fresh, new.abstract, new.init).state
    np.testing.assert_array_equal(state.opt_state["mu"]["head"], params["head"])
    np.testing.assert_array_equal(state.opt_state["average"]["head"], params["head"])


def test_a_cast_rounds_and_never_overflows_in_silence(run):
    workdir, params = run
    rules = dict(workdir=str(workdir), rename=(("/trunk", "/body"),), cast=("^params/",))
    new = Small(mesh(2), jnp.bfloat16)
    state = warm.begin(Origin(**rules), warm.find(Origin(**rules)), new.fresh, new.abstract, new.init).state
    assert state.params["body"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.params["body"], params["trunk"].astype(jnp.bfloat16))
    new = Small(mesh(2), jnp.float16)
    with pytest.raises(UserError, match=r"start.cast: too large for float16: params/head \(7 values\)"):
        warm.begin(Origin(**rules), warm.find(Origin(**rules)), new.fresh, new.abstract, new.init)


def test_what_is_damaged_or_not_there_is_not_read(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"step 5 is not in .*: the nearest is 4"):
        warm.find(Origin(workdir=str(workdir), step=5))
    with pytest.raises(UserError, match=r"start.workdir=.* is not there"):
        warm.find(Origin(workdir=str(tmp_path / "none")))
    file = max((workdir / "checkpoints/4/params").rglob("*"), key=lambda f: f.stat().st_size * f.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"start.workdir: step 4 of .* is damaged: params/.* Choose another start.step"):
        warm.find(Origin(workdir=str(workdir)))


def test_many_paths_are_shown_as_groups():
    paths = [f"params/blocks/{name}/{leaf}" for name in "abcdefgh" for leaf in ("kernel", "bias")]
    assert warm._brief(paths) == "params/blocks (16)"
    assert warm._brief(["params/a", "params/b"]) == "params/a, params/b"


@pytest.mark.slow
def test_a_run_starts_from_another_and_goes_on_by_itself(tmp_path):
    """Fine-tuning on other data: the body of one run with a new head; killed and resumed, it looks at its own step."""
    base = assemble(small.config("mlp", optim=dict(average=0.9)))
    with contextlib.closing(Checkpoints(tmp_path / "base/checkpoints")) as checkpoints:
        old = jax.tree.map(lambda x: x + 1, base.fresh())
        average = optax.tree.set(old.opt_state, parameters_average=jax.tree.map(lambda x: x + 1, old.params))
        checkpoints.save(old.replace(opt_state=average), 6, resume.meta(base, resume.Memory(), {}))
    tune = small.config(
        "mlp", data=dict(seed=5, classes=7), train=dict(duration=4), checkpoint=dict(every=2), mesh=dict(fsdp=8),
        start=dict(workdir=str(tmp_path / "base"), step="latest", fresh=("head",), average=True),
    )  # fmt: skip
    job = assemble(tune)
    with contextlib.closing(Checkpoints(tmp_path / "x", read_only=True)) as none:
        state, memory, notes = resume.start(job, none)
    source = shelf.find(tmp_path / "base", "latest")
    saved = stored.arrays(source.folder, list(stored.tree(source.folder)))
    taken, new = 0, fitting.leaves(job.abstract)
    for keys, x in jax.tree.leaves_with_path({"params": state.params}):
        path = path_of(keys)
        average = next(old for old in saved if old.endswith(f"{warm.AVERAGE}{path.removeprefix('params/')}"))
        taken += (same := "head" not in path)
        assert not same or (np.array_equal(x, saved[average]) and not np.array_equal(x, saved[path])), path
    fresh = job.fresh()
    assert taken and taken < len(new) and small.bits(state.params["head"]) == small.bits(fresh.params["head"])
    assert memory.origin == f"{tmp_path / 'base'}:6" and len(notes) == 3 and "averaged parameters" in notes[0]

    loop.fit(tune, tmp_path / "tuned")
    first, last = shelf.entries(tmp_path / "tuned")
    assert first.facts["parent"] == memory.origin and last.facts["parent"] == first.step == 2
    whole = (tmp_path / "tuned/metrics.jsonl").read_text()
    shelf.throw_away(tmp_path / "tuned", [last])
    del tune["start"]  # a resumed run needs the other workdir no more
    loop.fit(tune, tmp_path / "tuned")
    again = (tmp_path / "tuned/metrics.jsonl").read_text()
    lines = [
        [{k: v for k, v in json.loads(line).items() if "perf/" not in k} for line in t.splitlines()]
        for t in (whole, again)
    ]
    assert lines[0] == lines[1]
    assert shelf.find(tmp_path / "tuned", 4).meta["memory"]["origin"] == memory.origin
