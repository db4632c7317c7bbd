"""The finite guard: what a bad step leaves, how the host lets go, and what it decides."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from flaxmodels import guard, metrics, optim, watch
from flaxmodels.guard import GOOD, HELD, NOT_FINITE, SPIKE, Guard
from flaxmodels.job import assemble
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.state import TrainState
from flaxmodels.step import repeated, train_step
from flaxmodels.watch import RollBack, RolledBackError, Trip, Watch

TX = optax.trace(decay=0.9)
FINITE, OFF = Guard(), Guard(finite=False)
MOVED = jax.jit(guard.moved)


@functools.cache
def step_of(options=FINITE):
    """A step whose batch says what comes out: its loss, its gradient and its statistics."""

    def gradient(params, extra, batch, rngs):
        return {"w": batch["grad"]}, {"stats": batch["stats"]}, {"loss": (batch["loss"], jnp.float32(1))}

    bare = functools.partial(train_step, gradient=gradient, tx=TX, schedule=lambda step: 0.1, seed=0)
    return jax.jit(guard.guarded(bare, options))


@functools.cache
def fresh(options=FINITE):
    """A state on the host: what is made there needs no compiling."""
    params = {"w": jnp.ones(3)}
    made = guard.init_of(TX, options).init(params)
    return jax.device_get(TrainState(jnp.int32(0), params, {"stats": jnp.zeros(2)}, made))


def batch(loss=1.0, grad=0.5, stats=0.25):
    return {
        "loss": np.float32(loss), "grad": np.full(3, grad, np.float32), "stats": np.full(2, stats, np.float32)
    }  # fmt: skip


def code(found):
    return int(found["bad"][0])


@pytest.mark.parametrize(
    "bad",
    [
        dict(loss=np.nan), dict(loss=np.inf), dict(loss=-np.inf), dict(grad=np.nan), dict(grad=-np.inf),
        dict(loss=np.nan, grad=np.nan, stats=np.nan), dict(grad=1e30),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_step_changes_nothing_and_holds_the_state(bad):
    step = step_of()
    state, _ = step(fresh(), batch())
    after, found = step(state, batch(**bad))
    assert code(found) == NOT_FINITE
    assert small.bits(after.replace(opt_state=after.opt_state.inner)) == small.bits(
        state.replace(opt_state=state.opt_state.inner)
    )
    assert int(after.opt_state.held) == NOT_FINITE
    for later in (batch(), batch(loss=np.nan)):
        later_state, found = step(after, later)
        assert code(found) == HELD and small.bits(later_state) == small.bits(after)


def test_one_value_of_many_is_enough():
    grads = batch() | {"grad": np.array([0.5, 0.5, np.nan], np.float32)}
    assert code(step_of()(fresh(), grads)[1]) == NOT_FINITE


def test_a_good_step_has_the_bits_of_the_bare_one():
    state = other = fresh()
    for i in range(5):
        state, found = step_of()(state, batch(loss=2.0 - 0.1 * i, grad=0.3 * i))
        other, bare = step_of(OFF)(other, batch(loss=2.0 - 0.1 * i, grad=0.3 * i))
        assert code(found) == GOOD and "bad" not in bare
    assert small.bits(state) == small.bits(other)


def test_let_go_the_run_goes_on_as_if_the_batch_had_not_been():
    step, state, other = step_of(), fresh(), fresh()
    for loss in (1.0, 2.0, np.nan, np.nan, 3.0):
        state, found = step(state, batch(loss=loss, grad=loss))
        if code(found):
            assert int(state.opt_state.held) == NOT_FINITE
            state = MOVED(state, int(state.step) + 1, 0)
    for loss in (1.0, 2.0, 3.0):
        other, _ = step(other, batch(loss=loss, grad=loss))
    assert int(state.step) == 5 and int(state.opt_state.skipped) == 2
    assert small.bits((state.params, state.extra, state.opt_state.inner)) == small.bits(
        (other.params, other.extra, other.opt_state.inner)
    )


def test_streaks_are_counted():
    state = fresh()
    for at, to, streak in ((0, 1, 1), (1, 2, 2), (2, 3, 3), (5, 6, 1), (6, 9, 2)):
        state = MOVED(state.replace(step=np.int32(at)), to, 0)
        assert int(state.opt_state.streak) == streak
    assert int(state.opt_state.skipped) == 7


def test_many_steps_in_one_dispatch():
    """Those after the bad one are made, and change nothing; also those of the next dispatch, whatever it is fed."""
    state = fresh()

    def packed(state, item):
        state, found = step_of()(state, item[0])
        return state, metrics.pack({name: found[name] for name in ("bad", "loss")})

    program = jax.jit(repeated(packed, 4))
    each = {name: np.broadcast_to(x, (4, *x.shape)) for name, x in batch().items()}
    each["loss"] = np.array([1.0, np.nan, 1.0, 1.0], np.float32)
    feed = {"count": np.int32(4), "first": np.int32(0), "each": each, "every": {}}
    after, rows = program(state, feed)
    assert np.asarray(rows)[:, 0, 0].tolist() == [GOOD, NOT_FINITE, HELD, HELD] and int(after.step) == 1
    later, rows = program(after, feed | {"first": np.int32(4)})
    assert np.asarray(rows)[:, 0, 0].tolist() == [HELD] * 4 and small.bits(later) == small.bits(after)


SPIKES = Guard(spikes="skip", window=8)


def spiky(losses, options=SPIKES):
    """The codes of steps with these losses, each let go, and the last state."""
    step, state, codes = step_of(options), fresh(options), []
    for loss in losses:
        state, found = step(state, batch(loss=loss))
        codes.append(code(found))
        state = MOVED(state, int(state.step) + 1, 0) if codes[-1] else state
    return codes, state


def test_a_spike_is_found_once_the_window_is_full():
    usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98]
    codes, _ = spiky([*usual[:5], 1e4])
    assert codes == [GOOD] * 6
    codes, state = spiky([*usual, 1.01, 1e4, 1.0, np.nan, 3.0, 1.03])
    assert codes == [GOOD] * 9 + [SPIKE, GOOD, NOT_FINITE, SPIKE, GOOD]
    # The window holds good losses only, of step i at i % 8.
    np.testing.assert_allclose(state.opt_state.losses, [1.01, 1.1, 1.0, 1.05, 0.95, 1.03, 1.02, 0.98])
    np.testing.assert_allclose(state.opt_state.level, np.mean(usual), rtol=1e-6)


def test_what_is_no_spike():
    """A rise that is little beside what there was to learn; and one more of the jumps that there have been."""
    start = [2.0] * 8
    assert set(spiky([*start, *[1e-3] * 8, 0.1])[0]) == {GOOD}  # 6 deviations of nothing are nothing
    assert spiky([*start, *[1e-3] * 8, 0.3])[0][-1] == SPIKE
    assert set(spiky([*start, *[1e-3] * 7, 0.3, *[1e-3] * 4, 1.2])[0][16:]) == {GOOD}


def test_the_window_is_part_of_the_state_and_its_size_of_the_options():
    assert fresh(SPIKES).opt_state.losses.shape == (8,)
    assert jax.tree.structure(fresh(SPIKES)) == jax.tree.structure(fresh(OFF))


def test_what_may_be_saved():
    state = fresh()
    state = state.replace(opt_state=state.opt_state._replace(inner=(state.opt_state.inner, np.float32(np.inf))))
    assert all(map(bool, guard.sound(state).values()))  # the window begins infinite; so may a scalar of the optimizer
    poisoned = {
        "params/w": state.replace(params={"w": np.array([1.0, np.inf, 1.0])}),
        "extra/stats": state.replace(extra={"stats": np.array([np.nan, 1.0])}),
        "opt_state/1": state.replace(opt_state=state.opt_state._replace(inner=(np.int32(0), np.float32(np.nan)))),
    }
    for path, bad in poisoned.items():
        assert [name for name, fine in guard.sound(bad).items() if not fine] == [path]


@pytest.fixture(scope="module")
def sharded():
    """A job over fsdp, with an average of the parameters."""
    config = small.config("mlp", mesh=dict(fsdp=4, data=2), optim=dict(average=0.9), guard=dict(spikes="skip"))
    return assemble(config, jax.devices()[:8])


def test_on_a_mesh(sharded):
    """The optimizer's state lies as it did; the guard's own is whole everywhere; and all of it is donated."""
    own = sharded.abstract.opt_state._replace(inner=())
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(own))
    specs = [x.sharding.spec for x in jax.tree.leaves(sharded.abstract.opt_state.inner)]
    assert any("fsdp" in str(spec) for spec in specs)
    average = optim.parameters_average(sharded.abstract.opt_state, sharded.abstract.params)
    assert jax.tree.structure(average) == jax.tree.structure(sharded.abstract.params)
    text = sharded.lower_train()[0].as_text()
    leaves = jax.tree.leaves(sharded.abstract)
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == len(leaves)


@pytest.mark.slow
def test_letting_go_and_checking_on_a_mesh(sharded):
    move, check = guard.mover(sharded.abstract, sharded.mesh), guard.checker(sharded.abstract, sharded.mesh)
    state = sharded.fresh()
    assert check(state) == []
    state = move(state, 7, 2)
    assert (int(state.step), int(state.opt_state.rollbacks), int(state.opt_state.skipped)) == (7, 2, 7)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, sharded.abstract)
    path = "params/hidden_0/kernel"
    state.params["hidden_0"]["kernel"] = state.params["hidden_0"]["kernel"].at[0, 0].set(jnp.nan)
    assert check(state) == [path]


NAMES = ["accuracy", "bad", "grad_norm", "loss"]


def row(bad=GOOD, loss=1.0, norm=2.0):
    return [[0.5, 1.0], [bad, 1.0], [norm, 1.0], [loss * 4, 4.0]]


def make(options=FINITE, rollbacks=(), state=None, capsules=()):
    return Watch(options, NAMES, rollbacks, state or fresh(), capsules)


def test_a_watch_sees_what_is_bad():
    looking = make()
    assert looking.see(0, row(loss=1.5)) is None and list(looking.history) == [(0, 1.5, 2.0)]
    trip = looking.see(1, row(NOT_FINITE, np.nan, np.inf))
    assert (trip.step, trip.code) == (1, NOT_FINITE) and np.isnan(trip.loss) and trip.grad_norm == np.inf
    assert trip.said == "batch 1 is not finite: loss nan, gradient norm inf"
    assert make().see(1, row(SPIKE, 9.0)).said == "batch 1 is a spike: loss 9"
    assert looking.see(2, row(SPIKE, 9.0)).said == "batch 2 is a spike: loss 9, after 1.5 on average"
    with pytest.raises(FaultError, match="the bad step before it was not seen"):
        looking.see(3, row(HELD))


def test_it_skips_until_there_are_too_many_in_a_row(tmp_path):
    looking = make(Guard(max_bad_steps=3), capsules=[4])
    for step in (3, 4, 6, 7):
        trip = looking.see(step, row(NOT_FINITE, np.nan))
        assert looking.decide(trip, tmp_path) == step + 1
        looking.moved(step, step + 1)
    assert looking.skipped == 4 and looking.wants_capsule(8) and not looking.wants_capsule(4)
    last = looking.see(8, row(NOT_FINITE, np.nan))
    said = f"(?s)batch 8 is not finite.*3 bad steps in a row, 6 to 8,.*flaxmodels replay {tmp_path}/capsules/8"
    with pytest.raises(FaultError, match=said):
        looking.decide(last, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_streak_goes_on_after_a_resume(tmp_path):
    state = fresh()
    for step in (3, 4):
        state = MOVED(state.replace(step=np.int32(step)), step + 1, 0)
    looking = make(Guard(max_bad_steps=3), state=state)
    with pytest.raises(FaultError, match="3 to 5"):
        looking.decide(looking.see(5, row(NOT_FINITE, np.nan)), tmp_path)


def test_capsules_are_few():
    looking = make(Guard(capsules=2), capsules=[1])
    assert [looking.wants_capsule(step) for step in (1, 5, 5, 6)] == [False, True, False, False]
    assert not make(Guard(capsules=0)).wants_capsule(1)


BACK = Guard(spikes="roll back", back=100)


def test_it_rolls_back_and_leaves_out_the_batches_from_there(tmp_path):
    looking = make(BACK)
    with pytest.raises(RolledBackError) as going:
        looking.decide(looking.see(412, row(SPIKE, 99.0)), tmp_path)
    assert going.value.first == 312
    assert watch.read(tmp_path) == (RollBack(312, 413, 99.0),)
    assert [path.name for path in tmp_path.iterdir()] == [watch.FILE]
    looking = make(BACK, watch.read(tmp_path))
    assert looking.limit(200, 1000) == 312 and looking.limit(312, 1000) == 1000
    assert [looking.jump(step) for step in (311, 312, 400, 412, 413)] == [311, 413, 413, 413, 413]
    # A spike soon after: the state 100 steps before it is that of step 312.
    with pytest.raises(RolledBackError) as going:
        looking.decide(looking.see(420, row(SPIKE, 98.0)), tmp_path)
    assert going.value.first == 312 and make(BACK, watch.read(tmp_path)).jump(312) == 421
    # What is not finite is left out by itself.
    assert looking.decide(looking.see(430, row(NOT_FINITE, np.nan)), tmp_path) == 431


def test_a_roll_back_goes_to_the_start_at_the_most(tmp_path):
    looking = make(BACK)
    with pytest.raises(RolledBackError) as going:
        looking.decide(Trip(40, SPIKE, 9.0, 1.0, "a spike"), tmp_path)
    assert going.value.first == 0


def at(step, rollbacks):
    state = fresh()
    return state.replace(step=np.int32(step), opt_state=state.opt_state._replace(rollbacks=np.int32(rollbacks)))


def test_checkpoints_from_before_a_roll_back_are_stale():
    """A run that was killed after it had written one down, and before it went back."""
    past = (RollBack(300, 400, 9.0), RollBack(250, 450, 9.0))
    assert watch.stale(at(440, 0), past) == 250
    assert watch.stale(at(440, 1), past) == 250
    assert watch.stale(at(440, 2), past) is None
    assert watch.stale(at(250, 0), past) is None and watch.stale(at(280, 0), past) == 250


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rollbacks": [{"first": 5, "stop": 5, "loss": "0x1p+0"}]}', '{"rollbacks": 3}']
)
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / watch.FILE).write_text(text)
    with pytest.raises(UserError, match=r"interventions\.json can't be read"):
        watch.read(tmp_path)


def test_a_record_is_exact(tmp_path):
    past = (RollBack(3, 9, 0.1 + 0.2), RollBack(10, 11, float("inf")))
    watch.write(tmp_path, past)
    assert watch.read(tmp_path) == past and json.loads((tmp_path / watch.FILE).read_text())


@pytest.mark.parametrize(
    ("key", "value"), [("window", 7), ("window", 1024), ("spikes", "on"), ("sigma", 0.5), ("max_bad_steps", 0)]
)
def test_options_are_checked(key, value):
    with pytest.raises(UserError, match=f"guard.{key}="):
        assemble(small.config("mlp", guard={key: value}), jax.devices()[:1])


def test_every_option_is_described():
    for field in dataclasses.fields(Guard):
        assert f"\n  {field.name}: " in inspect.getdoc(Guard)
