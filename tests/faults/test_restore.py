"""F22, F23, F27 to F30: what does not fit is refused by name, before an array is read; what fits has the same bits."""

import contextlib
import hashlib
import json
import re
import types

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import test_processes
from harness import T2x4

from flaxmodels import data, fitting, resume, shelf
from flaxmodels.checkpoint import Checkpoints, versions
from flaxmodels.config import load_config
from flaxmodels.data import order, tokenizer
from flaxmodels.data.vocabularies import Words
from flaxmodels.job import assemble
from flaxmodels.registry import UserError
from flaxmodels.state import TrainState
from flaxmodels.warm import Origin

slow = pytest.mark.slow
IDENTITY = {
    "source": "digits", "options": [], "content": "5bcf92e291c64c36", "examples": 1433, "test examples": 364,
    "transforms": {}, "tokenizer": None, "labels": [], "augment": [], "host_augment": [], "global batch": 16, "seed": 0,
    "order version": 1,
}  # fmt: skip


class Stored:
    """As much of `Checkpoints` as a resume asks for: one step, and its meta."""

    def __init__(self, **meta):
        self.found = {"memory": {"best": 0.5, "evaluated": 2}, "data": IDENTITY, "versions": versions(), **meta}

    def good(self):
        return 2

    def meta(self, step):
        return self.found

    def restore(self, step, abstract):
        return "state"


def standing_in(**identity):
    """As much of a `Job` as a resume asks for."""
    source = types.SimpleNamespace(name=IDENTITY["source"])
    return types.SimpleNamespace(
        identity={**IDENTITY, **identity}, total_steps=9, source=source, abstract=None, origin=Origin()
    )


def test_f22_each_field_in_turn(figures):
    """Another value for any of them alone is refused by its name; allowed, it is said in the log."""
    assert resume.start(standing_in(), Stored())[2] == ()
    for name, value in IDENTITY.items():
        changed = standing_in(**{name: "another" if isinstance(value, str | None) else [value]})
        with pytest.raises(UserError, match=rf"data 'digits' is not what .*: {name} was .*, is .* --allow_data_change"):
            resume.start(changed, Stored())
        state, memory, notes = resume.start(changed, Stored(), allow_data_change=True)
        assert state == "state" and len(notes) == 1 and notes[0].startswith(f"going on with other data: {name} was ")
        assert (memory.best is None) == (name in resume.EVALUATED)
    figures("F22", injected=len(IDENTITY), refused=len(IDENTITY))


def changes(tmp_path):
    """(field, config before, config after): what a user may come to change between two runs, on real data."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat and the dog lay on the log " * 40)
    tokenizer.save(Words(("<unk>", "cat", "dog", "the", "on")), tmp_path / "one.json")
    tokenizer.save(Words(("<unk>", "dog", "cat", "the", "on")), tmp_path / "two.json")
    images, text = small.config("mlp"), small.config("transformer")
    text["data"] = dict(
        name="text", path=str(folder / "*.txt"), batch_size=8, length=8, tokens=str(tmp_path / "one.json")
    )

    def other(config, section="data", **options):
        return {**config, section: {**config[section], **options}}

    own = other(images, name="small:stored_images")
    yield "seed", images, {**images, "seed": 1}
    yield "examples", images, other(images, examples=512)
    yield "test examples", images, other(images, test_examples=128)
    yield "content", images, other(images, seed=3)
    yield "global batch", images, other(images, batch_size=32)
    yield "augment", images, other(images, augment=(dict(name="flip"),))
    yield "host_augment", own, other(own, host_augment=(dict(name="flip"),))
    yield "source", images, other(images, name="small:stored_images")
    yield "options", own, other(own, unreadable=(5,))
    yield "tokenizer", text, other(text, tokens=str(tmp_path / "two.json"))
    yield "transforms", text, other(text, windows="packed")


@slow
def test_f22_on_real_data(tmp_path, figures):
    count = 0
    for name, before, after in changes(tmp_path):
        old, new = assemble(before, jax.devices()[:1]), assemble(after, jax.devices()[:1])
        stored = Stored(data=json.loads(json.dumps(old.identity)))  # as it comes back from a file
        assert resume.data_changes(old, stored.found) == "", name
        with pytest.raises(UserError, match=rf"[ ;]{name} was "):
            resume.start(new, stored)
        count += 1
    figures("F22", injected=count, refused=count)


def test_f22_of_what_older_versions_did_not_store():
    """A field that they did not know is no change; a checkpoint that says nothing of its data is not taken for one."""
    old = {name: value for name, value in IDENTITY.items() if name != "host_augment"}
    assert resume.start(standing_in(), Stored(data=old))[2] == ()
    with pytest.raises(UserError, match="source was None"):
        resume.start(standing_in(), Stored(data={}))


def test_f23_other_versions_are_warned_of(figures):
    found = {**versions(), "jax": "0.4.1", "gone": "1.0"}
    (note,) = resume.start(standing_in(), Stored(versions=found))[2]
    assert note.startswith("warning: other versions than those that the checkpoint was saved with: ")
    assert f"jax was 0.4.1, is {jax.__version__}" in note and "gone was 1.0, is not there" in note
    figures("F23", injected=1, warned=1)


# SHA-256 of the ids of the first 100 batches of 16, seed 7. Where one changes, every run that was begun before would go
# on with other batches than it would have had: raise `order.ORDER_VERSION` with it, and take the new numbers down here.
GOLDEN = {
    "one source": ((1000, ()), "c9fbbf79fbbd13c4"),
    "a mixture": ((1000, ((700, 250), (300, 750))), "4245a42d5cbc72bf"),
    "a source that is too large to sort": ((order.SORTED + 7, ()), "ec8982e470a5bfb9"),
}


def test_f23_the_order_of_the_first_100_batches_is_golden(figures):
    assert order.ORDER_VERSION == 1
    for name, ((size, mixture), golden) in GOLDEN.items():
        ids = order.train_indices(7, 0, 100, 16, size, mixture)
        assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16] == golden, name
    figures("F23", golden_orders=len(GOLDEN))


def state(**params):
    """A train state of a few arrays; the optimizer's moments mirror the parameters."""
    tree = {"head": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) + 0.1, "bias": np.ones(4, np.float32)}}
    tree = {name: leaf for name, leaf in {**tree, **params}.items() if leaf is not None}
    return TrainState(np.int32(3), tree, {}, ({"count": np.int32(300), "mu": tree},))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """stored(cast) -> the checkpoints of a workdir with `state()` at step 3."""
    folder = tmp_path_factory.mktemp("stored")
    with contextlib.closing(Checkpoints(folder, every_seconds=0.0)) as made:
        made.save(state(), 3, {})
    return lambda cast=(): Checkpoints(folder, read_only=True, cast=cast)


def abstract(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def refused(stored, wanted, cast=()):
    with pytest.raises(UserError) as raised:
        stored(cast).restore(3, abstract(wanted))
    said = str(raised.value)
    assert said.startswith("checkpoint 3 in ") and "can't be restored into this model and optimizer: " in said
    assert "Go back to the config that it was trained with, or choose another --workdir" in said
    return said.splitlines()[1:-1]


K, B = np.zeros((3, 4), np.float32), np.zeros(4, np.float32)
KINDS = {
    "missing": (state(new=B), ["params/new is missing: wanted (4,) float32"]),
    "extra": (state(head={"kernel": K}), ["params/head/bias is not wanted: saved (4,) float32"]),
    "renamed": (
        state(head=None, heads={"kernel": K, "bias": B}),
        [f"params/head/{n} was probably renamed to params/heads/{n}, both {s} float32"
         for n, s in (("bias", "(4,)"), ("kernel", "(3, 4)"))],
    ),
    "shape": (
        state(head={"kernel": np.zeros((3, 5), np.float32), "bias": B}),
        ["params/head/kernel was (3, 4) float32, is (3, 5) float32"],
    ),
    "transposed": (
        state(head={"kernel": np.zeros((4, 3), np.float32), "bias": B}),
        ["params/head/kernel was (3, 4) float32, is (4, 3) float32"],
    ),
    "rank": (
        state(head={"kernel": K, "bias": np.zeros((1, 4), np.float32)}),
        ["params/head/bias was (4,) float32, is (1, 4) float32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_f27_each_kind(stored, figures, kind):
    wanted, expected = KINDS[kind]
    lines = [line.strip() for line in refused(stored, wanted)]
    mirrored = [line.replace("params/", "opt_state/0/mu/") for line in expected]
    assert sorted(lines) == sorted([*expected, *mirrored])  # all of them, in one message
    figures("F27", injected=1, rejected=1)


def test_f27_many_at_once(stored):
    lines = refused(stored, state(**{f"layer_{i:02}": B for i in range(30)}, head=None))
    assert len(lines) == fitting.LISTED + 1 and lines[-1] == "  and 44 more"  # 60 are missing, 4 are too many


def cast(tree, old, new):
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)


@pytest.mark.parametrize(
    ("old", "new", "castable"),
    [("float32", "bfloat16", True), ("float32", "float16", True), ("int32", "float32", False), ("int32", "int8", False),
     ("int32", "int16", False), ("int32", "uint32", False), ("float32", "int32", False)],
)  # fmt: skip
def test_f28_each_kind(stored, figures, old, new, castable):
    """Bare Orbax restores 300 as int8 44, without a word."""
    wanted = cast(state(), np.dtype(old), jnp.dtype(new))
    lines = refused(stored, wanted)
    assert len(lines) == sum(x.dtype == np.dtype(old) for x in jax.tree.leaves(state()))
    assert all(re.search(rf" was \S.* {old}, is \S.* {new}; checkpoint.cast ", line) for line in lines)
    assert len(refused(stored, wanted, ("^params/head/kernel$",))) == len(lines) - castable
    if castable:
        found = stored((".",)).restore(3, abstract(wanted))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    else:
        assert refused(stored, wanted, (".",)) == lines  # there is no name by which one could ask for it
    figures("F28", injected=1, rejected=1)


def digests(tree):
    return [hashlib.sha256(data).hexdigest() for data in small.bits(tree)]


def save(workdir, job, step=harness.STEPS):
    """A checkpoint of a state in which no two numbers of an array are alike, as the loop would save it."""
    random = np.random.default_rng(0)

    def some(x):
        values = random.permutation(x.size).reshape(x.shape) / max(x.size, 1)
        return jax.device_put(values.astype(x.dtype) * 0.1 if x.ndim else np.asarray(step, x.dtype), x.sharding)

    made = jax.tree.map(some, job.abstract)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", every_seconds=0.0)) as checkpoints:
        checkpoints.save(made, step, resume.meta(job, resume.Memory(), {}), facts=resume.facts(job, {}, None))
    return made


@slow
def test_f29_another_mesh_or_number_of_processes(tmp_path, figures):
    """Saved on 8 devices; gathered from 1, from 2 processes of 4, and from other axes, it has the same bits."""
    config = load_config(harness.TINY).to_dict()

    def on(devices, **mesh):
        return assemble({**config, "mesh": mesh}, jax.devices()[:devices])

    expected = digests(save(tmp_path / "run", on(8, data=1, fsdp=8)))
    read = Checkpoints(tmp_path / "run/checkpoints", read_only=True)
    jobs = {"one device": on(1), "other axes": on(8, data=2, fsdp=2, tensor=2)}
    states = {name: read.restore(harness.STEPS, job.abstract) for name, job in jobs.items()}
    assert [digests(state) for state in states.values()] == [expected] * 2
    losses = [small.evaluate(job, states[name])[0]["loss"] for name, job in jobs.items()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batches = [digests([jax.jit(j.train.batch)(*j.train.train_at(j.seed, n)) for n in range(3)]) for j in jobs.values()]
    gather = tmp_path / "gather.py"
    gather.write_text(test_processes.GATHER)
    axes = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    with harness.start(tmp_path / "run", T2x4, *axes, program=(gather,)) as group:
        assert set(group.wait(120)) == {0}, group
        found = json.loads(re.search(r"\{.*\}", group.output(0))[0])  # gloo prints too
    assert found["state"] == expected and [found["batches"]] * 2 == batches
    figures("F29", topologies=3, differing_bits=0, largest_relative_difference_of_loss=abs(losses[0] / losses[1] - 1))


def text_config(folder, words, **sections):
    """A language model over the tokenizer of a file."""
    tokenizer.save(Words(("<unk>", *words)), folder / "tokenizer.json")
    (folder / "a.txt").write_text("the cat sat on the mat and the dog sat on the cat " * 40)
    data = dict(name="text", path=str(folder / "a.txt"), length=8, batch_size=8, tokens=str(folder / "tokenizer.json"))
    return {**small.config("transformer"), "data": data, **sections}


@slow
def test_f30_another_tokenizer_of_the_same_size(tmp_path, figures):
    """Refused at resume, and where a new run starts from the old one; its fingerprint is in the checkpoint."""
    first = assemble(text_config(tmp_path, ("cat", "dog", "the", "sat")), jax.devices()[:1])
    size = (tmp_path / "tokenizer.json").stat().st_size
    save(tmp_path / "run", first, step=2)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", read_only=True)
    facts = shelf.find(tmp_path / "run", 2).facts
    assert facts["tokenizer"] == first.identity["tokenizer"] == facts["meta"]["data"]["tokenizer"] is not None
    assert resume.start(first, checkpoints)[2] == ()
    start = dict(workdir=str(tmp_path / "run"))
    other = assemble(text_config(tmp_path, ("dog", "cat", "the", "sat"), start=start), jax.devices()[:1])
    assert (tmp_path / "tokenizer.json").stat().st_size == size
    with pytest.raises(
        UserError, match=r"data 'text' is not what the workdir was trained on: .*tokenizer was '\w+', is"
    ):
        resume.start(other, checkpoints)
    new = Checkpoints(tmp_path / "new", read_only=True)
    with pytest.raises(UserError, match=r"start.workdir: step 2 of .* another vocabulary: tokenizer was '\w+', is"):
        resume.start(other, new)
    state, memory, notes = resume.start(other, new, allow_data_change=True)
    assert "going on with another vocabulary: tokenizer was" in notes[-1] and memory.origin.endswith("run:2")
    assert int(state.step) == 0
    figures("F30", injected=2, refused=2)


def test_f30_another_label_map(tmp_path, figures):
    """The same texts, and the same numbers of classes, which stand for other names."""

    def content(*names):
        rows = [f"text number {i % 7} {i},{names[i % 2]}" for i in range(60)]
        (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
        found = data.load(
            name="csv", path=str(tmp_path / "a.csv"), text="text", label="label", tokens="bytes", validation=0.2
        )
        assert found.labels == names and found.facts["classes"] == 2
        return found.fingerprint

    stored = Stored(data={**IDENTITY, "content": content("cat", "dog")})
    assert resume.start(standing_in(content=content("cat", "dog")), stored)[2] == ()
    with pytest.raises(UserError, match="is not what the workdir was trained on: content was"):
        resume.start(standing_in(content=content("cow", "dog")), stored)
    figures("F30", injected=1, refused=1)
