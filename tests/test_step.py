"""The train step: small, pure, and the same for every kind of model."""

import ast
import dataclasses
import io
import tokenize
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import losses, metrics, optim, sharding, step
from flaxmodels import state as states
from flaxmodels.models import build

B, D, C = 16, 5, 3


def batch(rows=B, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "inputs": generator.normal(size=(rows, D)).astype(np.float32),
        "targets": generator.integers(0, C, rows, np.int32),
        "weights": np.ones(rows, np.float32),
    }


class Setup:
    """What a job would hold: a state, a step, and its pieces."""

    def __init__(self, model, inputs=None, name="sgd", rate=0.1, seed=0, loss=None, **options):
        inputs = batch()["inputs"] if inputs is None else inputs
        self.tx, self.schedule = optim.make(name, learning_rate=rate, total_steps=100, **options)
        self.apply, self.loss = step.make_apply(model), loss or losses.make()[0]
        self.gradient = step.make_gradient(self.apply, self.loss)
        self.state = jax.jit(lambda: states.create(model, self.tx, inputs, seed))()
        self.update = partial(step.train_step, gradient=self.gradient, tx=self.tx, schedule=self.schedule, seed=seed)
        self.step = jax.jit(self.update)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# its shape


def test_the_step_stays_flat():
    """At most 16 lines of code and no branch. A feature enters as a transform, a loss or a wrapper; see the module."""
    text = Path(step.__file__).read_text()
    (function,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "train_step")
    branches = (
        ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.Match, ast.BoolOp, ast.comprehension, ast.Assert,
    )  # fmt: skip
    assert not [ast.unparse(node) for node in ast.walk(function) if isinstance(node, branches)]
    first = function.body[1].lineno if ast.get_docstring(function) else function.body[0].lineno
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    body = [line for line in lines if first <= line <= function.end_lineno]
    signature = [line for line in lines if function.lineno <= line < function.body[0].lineno]
    assert body and len(body) + len(signature) <= 18 and len(body) <= 16


# what it does


@pytest.fixture(scope="module")
def mlp():
    return Setup(build("mlp", classes=C, hidden=(8,)))


def test_it_learns():
    setup, data = (
        Setup(build("mlp", classes=2, hidden=(8,)), np.zeros((4, 2), np.float32), "adam", rate=0.05),
        {
            "inputs": np.asarray([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32),
            "targets": np.asarray([0, 1, 1, 0]),  # XOR: a linear model can't
            "weights": np.ones(4, np.float32),
        },
    )
    many = jax.jit(lambda state: jax.lax.scan(lambda s, _: setup.update(s, data), state, None, 300))
    after, found = many(setup.state)
    loss = np.asarray(found["loss"][0] / found["loss"][1])
    assert loss[0] > 0.5 and loss[-1] < 0.1
    assert found["accuracy"][0][-1] == 4 and after.step == 300


def test_it_counts_reports_and_touches_nothing_else(mlp):
    after, found = mlp.step(mlp.state, batch())
    assert after.step == 1 and after.step.dtype == jnp.int32 and after.extra == {}
    assert set(found) == {"loss", "accuracy", "grad_norm", "learning_rate"}
    assert found["loss"][1] == B and found["learning_rate"] == (np.float32(0.1), 1)
    assert jax.tree.structure(after) == jax.tree.structure(mlp.state)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(), after, mlp.state)


def test_the_gradient_is_of_the_mean(mlp):
    """One step of plain SGD is the gradient of the mean loss over what counts."""
    data = {**batch(), "weights": np.asarray([1, 0] * (B // 2), np.float32)}
    plain = Setup(build("mlp", classes=C, hidden=(8,)), momentum=0.0)

    def mean(params):
        logits = plain.apply(params, {}, data["inputs"], train=False)[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][:, None], 1)[:, 0]
        return -jnp.mean(chosen[::2])

    expected = jax.jit(jax.grad(mean))(plain.state.params)
    after, found = plain.step(plain.state, data)
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose(np.subtract(a, b), 0.1 * np.asarray(g), atol=1e-6),
        plain.state.params, after.params, expected,
    )  # fmt: skip
    np.testing.assert_allclose(found["grad_norm"][0], metrics.norm(expected), rtol=1e-5)


def test_padded_equals_unpadded(mlp):
    data = batch(10)
    padded = {k: np.concatenate([v, np.full((6, *v.shape[1:]), 1, v.dtype)]) for k, v in data.items()}
    padded["weights"][10:] = 0
    one, other = mlp.step(mlp.state, data), mlp.step(mlp.state, padded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one[0], other[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one[1], other[1])


def test_gradients_of_parts_add_up_to_that_of_the_batch(mlp):
    """What lets microbatches, hosts and devices add: the gradient is of the sum."""
    data = {**batch(), "weights": np.arange(B, dtype=np.float32) % 3}
    gradient = jax.jit(lambda data: mlp.gradient(mlp.state.params, {}, data, None)[0])
    parts = [gradient({k: v[rows] for k, v in data.items()}) for rows in (slice(0, 5), slice(5, B))]
    jax.tree.map(lambda whole, a, b: np.testing.assert_allclose(whole, np.add(a, b), atol=2e-6), gradient(data), *parts)


def test_a_batch_in_which_nothing_counts_makes_no_update(mlp):
    after, found = mlp.step(mlp.state, {**batch(), "weights": np.zeros(B, np.float32)})
    equal(after.params, mlp.state.params)
    assert found["loss"] == (0, 0) and found["grad_norm"][0] == 0


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}])
def test_sharded_equals_alone(mlp, axes):
    mesh, data = sharding.make_mesh(**axes), batch()
    model = build("mlp", classes=C, hidden=(256,))
    alone = Setup(model)
    make, abstract = states.init(model, alone.tx, data["inputs"], 0, mesh)
    placed = jax.device_put(data, sharding.batch_sharding(mesh))
    places = (jax.tree.map(lambda x: x.sharding, abstract), sharding.replicated(mesh))
    program = step.compile_step(alone.update, abstract, placed, mesh=mesh, out_shardings=places).compile()
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, program(make(), placed), alone.step(alone.state, data))


# microbatches


@pytest.mark.slow
def test_eight_microbatches_of_unequal_weight_are_the_batch():
    """Sums and counts add up: loss and gradient of a transformer in float32, with most tokens of some examples out."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, (B, 17), np.int32)
    weights = (np.arange(16) < generator.integers(0, 17, B)[:, None]).astype(np.float32)
    data = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    assert len(set(weights.reshape(2, 8, 16).sum((0, 2)))) > 3  # of each microbatch
    setup = Setup(build("transformer", vocab_size=64, layers=2, width=32, heads=2, max_length=16), data["inputs"])
    (one, _, found), (eight, _, summed) = (
        jax.jit(gradient)(setup.state.params, {}, data, step.streams(0, 0))
        for gradient in (setup.gradient, step.accumulated(setup.gradient, 8))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), summed, found)
    off = jax.tree.map(lambda a, b: float(metrics.norm(a - b) / metrics.norm(b)), eight, one)
    assert max(jax.tree.leaves(off)) < 1e-6, off


@pytest.mark.slow
def test_a_transformer_with_a_split_head_trains_as_with_logits():
    tokens = np.random.default_rng(0).integers(0, 96, (4, 17), np.int32)
    data = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 16), np.float32)}
    fields = dict(vocab_size=96, layers=2, width=32, heads=2, max_length=16, tied_head=True)
    plain = Setup(build("transformer", **fields), data["inputs"])
    loss, tested = losses.make(chunks=4, metrics=("accuracy", "perplexity"))
    split = Setup(build("transformer", **fields, split_head=True), data["inputs"], loss=loss)
    equal(plain.state, split.state)
    (grads, _, found), (expected, _, _) = (
        jax.jit(setup.gradient)(plain.state.params, {}, data, step.streams(0, 0)) for setup in (split, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected)
    evaluated = jax.jit(partial(step.eval_step, apply=split.apply, loss=tested))(plain.state.params, {}, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), evaluated, found)


# several steps a dispatch

MOST = 4


@pytest.fixture(scope="module")
def many():
    setup = Setup(build("mlp", classes=C, hidden=(8,), dropout=0.3), name="adamw")
    each = [batch(seed=i) for i in range(8)]

    def one(state, item):
        state, found = setup.update(state, item[0])
        return state, metrics.pack(found) + item[1]["zero"]

    program = jax.jit(step.repeated(one, MOST))

    def dispatch(state, first, count):
        """Steps first, first + 1, ...; what is beyond `count` is garbage that must not matter."""
        rows = [each[first + i] if i < count else jax.tree.map(lambda x: x * 0 - 1, each[0]) for i in range(MOST)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
        numbers = {"count": np.int32(count), "first": np.int32(first)}
        return program(state, {**numbers, "each": stacked, "every": {"zero": np.float32(0)}})

    return setup, each, dispatch, program


@pytest.mark.parametrize("cuts", [(1,) * 8, (3, 1, 4), (2, 2, 2, 2), (1, 3, 3, 1)])
def test_steps_have_the_same_bits_however_they_are_cut_into_dispatches(many, cuts):
    setup, _, dispatch, program = many

    def trained(cuts):
        state, outputs, first = setup.state, [], 0
        for count in cuts:
            state, found = dispatch(state, first, count)
            outputs.append(np.asarray(found)[:count])
            assert not np.any(np.asarray(found)[count:])
            first += count
        return state, np.concatenate(outputs)

    (state, outputs), (whole, expected) = trained(cuts), trained((4, 4))
    equal(state, whole)
    np.testing.assert_array_equal(outputs, expected)
    assert state.step == 8 and outputs.shape == (8, 4, 2)
    assert program._cache_size() == 1


def test_several_steps_are_what_single_ones_make(many):
    setup, each, dispatch, _ = many
    state, outputs = dispatch(setup.state, 0, 3)
    alone = setup.state
    for i in range(3):
        alone, found = setup.step(alone, each[i])
        np.testing.assert_allclose(outputs[i], metrics.pack(found), rtol=2e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, alone)


def test_no_step_is_no_change(many):
    setup, _, dispatch, _ = many
    state, outputs = dispatch(setup.state, 0, 0)
    equal(state, setup.state)
    assert not np.any(outputs)


def test_one_step_a_dispatch_is_the_bare_step(mlp):
    one = step.repeated(lambda state, item: mlp.update(state, item[0]), 1)
    feed = {"count": np.int32(1), "first": np.int32(0), "each": jax.tree.map(lambda x: x[None], batch()), "every": {}}
    assert "while" not in jax.jit(one).lower(mlp.state, feed).as_text()
    (state, outputs), (alone, found) = jax.jit(one)(mlp.state, feed), mlp.step(mlp.state, batch())
    equal(state, alone)
    equal(outputs, jax.tree.map(lambda x: np.asarray(x)[None], found))


# the compiled step


@pytest.fixture(scope="module")
def compiled():
    mesh, model = sharding.make_mesh(fsdp=4), build("mlp", classes=C, hidden=(256,))
    setup = Setup(model, name="adamw", average=0.9)
    make, abstract = states.init(model, setup.tx, batch()["inputs"], 0, mesh)
    placed = jax.device_put(batch(), sharding.batch_sharding(mesh))
    places = (jax.tree.map(lambda x: x.sharding, abstract), sharding.replicated(mesh))
    lowered = step.compile_step(setup.update, abstract, placed, mesh=mesh, out_shardings=places, donate=(0,))
    return mesh, make, abstract, placed, lowered.compile()


def test_donation_is_real(compiled):
    _, make, _, placed, program = compiled
    state = make()
    program(state, placed)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(placed))


def test_what_comes_out_goes_in_again(compiled):
    _, make, abstract, placed, program = compiled
    state, _ = program(make(), placed)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim) or pytest.fail(str(s)), state, abstract)
    state, _ = program(state, placed)
    assert state.step == 2


def test_a_program_refuses_another_shape_dtype_sharding_or_tree(compiled):
    mesh, make, _, placed, program = compiled
    split = sharding.batch_sharding(mesh)
    wrong = {
        "shape": jax.device_put(batch(8), split),
        "dtype": {**placed, "weights": jax.device_put(np.ones(B, np.int32), split)},
        "sharding": jax.device_put(batch(), sharding.replicated(mesh)),
        "tree": {**placed, "more": placed["weights"]},
    }
    state = make()
    for name, data in wrong.items():
        with pytest.raises((TypeError, ValueError)):
            program(state, data)
            pytest.fail(f"took another {name}")
    program(state, placed)  # nothing was donated by the calls that failed


def test_what_a_program_would_have_to_be_compiled_again_for_is_named(compiled):
    """The array by its path, what it was, and what it is; no further ones; and nothing is donated."""
    mesh, make, _, placed, program = compiled
    split, state = sharding.batch_sharding(mesh), make()
    run = step.strict(program, ("state", "batch"))
    elsewhere = jax.device_put(state.params["hidden_0"]["kernel"], jax.devices()[3])
    moved = dataclasses.replace(
        state, params={**state.params, "hidden_0": {**state.params["hidden_0"], "kernel": elsewhere}}
    )
    cases = {
        "batch/inputs was float32[16, 5], is float32[8, 5]": (state, jax.device_put(batch(8), split)),
        "batch/weights was float32[16], is int32[16]": (
            state, {**placed, "weights": jax.device_put(np.ones(B, np.int32), split)},
        ),
        "batch/inputs, float32[16, 5], was P(('data', 'fsdp'),) on a mesh of data=2, fsdp=4, is P() on": (
            state, jax.device_put(batch(), sharding.replicated(mesh)),
        ),
        "batch/more is new: float32[16]": (state, {**placed, "more": placed["weights"]}),
        "batch/targets is missing, was int32[16]": (state, {k: v for k, v in placed.items() if k != "targets"}),
        "batch/inputs is no array, but of type str": (state, {**placed, "inputs": "x"}),
        "argument 2 is new: int32[]": (state, placed, 1),
        "state/params/hidden_0/kernel, float32[5, 256], was P(None, 'fsdp') on a mesh of": (moved, placed),
    }  # fmt: skip
    for words, arguments in cases.items():
        with pytest.raises(step.RecompileError) as caught:
            run(*arguments)
        lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
        assert any(line.startswith(words) for line in lines), (words, lines)
        assert len(lines) == (3 if "[8, 5]" in words or "is P()" in words else 1), lines
    assert "on cpu:3" in lines[0]
    after, _ = run(state, placed)
    assert after.step == 1


def test_an_error_of_another_kind_passes_through():
    class Program:
        args_info = input_shardings = ((np.float32(1),), {})

        def __call__(self, x):
            raise ValueError("of something else")

    with pytest.raises(ValueError, match="of something else"):
        step.strict(Program())(np.float32(2))


def test_only_shapes_are_needed_to_lower():
    mesh = sharding.make_mesh()
    where = sharding.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct((8, 2**40), np.float32, sharding=where)  # no machine has this memory
    assert "2199023255552x" not in step.compile_step(lambda x: x.shape[1] * 0.5, shape, mesh=mesh).as_text()


# randomness


def test_dropout_differs_from_step_to_step_and_is_the_same_for_the_same_step():
    setup, data = Setup(build("mlp", classes=C, hidden=(64,), dropout=0.5)), batch()
    gradient = jax.jit(lambda i: setup.gradient(setup.state.params, {}, data, step.streams(0, i))[0])
    equal(gradient(3), gradient(3))
    assert differ(gradient(3), gradient(4))
    equal(setup.step(setup.state, data), setup.step(setup.state, data))


def test_streams_differ_by_purpose_step_and_seed():
    keys = [
        tuple(np.asarray(jax.random.key_data(key)).tolist())
        for seed in (0, 1)
        for i in (0, 1, 2)
        for key in step.streams(seed, i).values()
    ]
    assert len(set(keys)) == 12
    assert set(step.streams(0, 0)) == {"dropout", "params"}


def test_evaluation_is_not_random():
    setup, data = Setup(build("mlp", classes=C, hidden=(64,), dropout=0.5)), batch()
    evaluate = jax.jit(partial(step.eval_step, apply=setup.apply, loss=setup.loss))
    found = evaluate(setup.state.params, {}, data)
    without = Setup(build("mlp", classes=C, hidden=(64,)))
    np.testing.assert_allclose(found["loss"][0], without.step(setup.state, data)[1]["loss"][0], rtol=1e-6)


def test_initial_parameters_depend_on_the_seed_alone():
    model = build("mlp", classes=C, hidden=(8,))
    few, more, other = Setup(model, np.zeros((1, D), np.float32)), Setup(model), Setup(model, seed=1)
    equal(few.state, more.state)
    assert differ(few.state.params, other.state.params)


# models of many kinds


class Untold(nn.Module):
    """A user's module that knows nothing of training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(C)(x)


class Pair(nn.Module):
    """Inputs that are a dict."""

    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dense(C)(inputs["left"]) + nn.Dense(C)(inputs["deep"]["right"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(C)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


def test_a_module_without_train_works():
    setup, data = Setup(Untold()), batch()
    after, found = setup.step(setup.state, data)
    assert differ(after.params, setup.state.params)
    tested = jax.jit(partial(step.eval_step, apply=setup.apply, loss=setup.loss))(setup.state.params, {}, data)
    np.testing.assert_allclose(tested["loss"][0], found["loss"][0], rtol=1e-6)


def test_a_module_that_insists_on_train_works():
    class Insists(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(C)(nn.Dropout(0.5, deterministic=not train)(x))

    setup = Setup(Insists())
    assert setup.step(setup.state, batch())[0].step == 1


def test_inputs_may_be_a_dict():
    data = batch()
    data["inputs"] = {"left": data["inputs"], "deep": {"right": data["inputs"][:, :2]}}
    setup = Setup(Pair(), data["inputs"])
    after, found = setup.step(setup.state, data)
    assert all(differ(a, b) for a, b in zip(after.params.values(), setup.state.params.values()))
    assert found["loss"][1] == B


def test_batch_statistics_move_in_training_and_stay_in_evaluation():
    setup, data = Setup(Normed()), batch()
    assert set(setup.state.extra) == {"batch_stats"}
    after, _ = setup.step(setup.state, data)
    mean = after.extra["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.5 * data["inputs"].mean(0), atol=1e-6)
    outputs, extra = jax.jit(partial(setup.apply, train=False))(after.params, after.extra, data["inputs"])
    assert extra == {} and outputs.shape == (B, C)
    alone = setup.apply(after.params, after.extra, data["inputs"][:1], train=False)[0]
    np.testing.assert_allclose(outputs[:1], alone, atol=1e-5)  # rows do not see each other


def test_a_user_loss_of_one_metric_is_enough():
    def loss(outputs, batch):
        return {"loss": metrics.weighted(jnp.sum(outputs, -1), batch["weights"])}

    setup = Setup(Untold(), loss=loss)
    assert set(setup.step(setup.state, batch())[1]) == {"loss", "grad_norm", "learning_rate"}


def test_bfloat16_parameters_keep_their_dtype():
    class Low(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(C, param_dtype=jnp.bfloat16)(x)

    setup = Setup(Low(), name="adamw", weight_decay=0.1, average=0.9)
    after, found = setup.step(setup.state, batch())
    jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail(f"{a.dtype} {b.dtype}"), after, setup.state)
    assert found["loss"][0].dtype == jnp.float32
