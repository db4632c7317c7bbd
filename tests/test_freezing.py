"""Frozen parameters: nothing changes them, and no work is done for gradients that nobody uses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict

from flaxmodels import freezing, losses, optim, step
from flaxmodels.job import assemble

LOWER = (("^layer_[01]/", {"freeze": True}),)


class Stack(nn.Module):
    """Three linear maps of different shapes, so that a product's operands tell which one it is."""

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((5, 7, 3)):
            x = jnp.tanh(nn.Dense(width, name=f"layer_{i}")(x))
        return x


@pytest.fixture(scope="module")
def parts():
    """(apply, loss, parameters, batch) of `Stack`."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(8, 4)).astype(np.float32)
    batch = {"inputs": inputs, "targets": np.arange(8) % 3, "weights": np.ones(8, np.float32)}
    shapes = jax.eval_shape(Stack().init, jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
    return step.make_apply(Stack()), losses.make()[0], params, batch


def gradient_of(parts, rules=(), number=1):
    apply, loss, _, _ = parts

    def make(apply):
        return step.accumulated(step.make_gradient(apply, loss), number)

    return freezing.freezing(make, apply, optim.frozen(rules)) if rules else make(apply)


def products(jaxpr):
    """How many matrix products a program makes, in its loops, too."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))]
    inner = [getattr(value, "jaxpr", value) for value in inner]
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(products(value) for value in inner if hasattr(value, "eqns"))


def test_the_first_rule_that_is_found_decides():
    frozen = optim.frozen((("head", {"freeze": False}), ("kernel", {"freeze": True}), ("bias", {"learning_rate": 2.0})))
    assert [frozen(path) for path in ("head/kernel", "body/kernel", "body/bias", "body/scale")] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.slow
def test_gradients_of_the_others_are_the_same_and_of_frozen_ones_zero(parts):
    params, batch = parts[2:]
    tables = ((), LOWER, (("bias", {"freeze": True}),))
    both = jax.jit(lambda *given: [gradient_of(parts, rules, number=2)(*given) for rules in tables])
    (whole, _, told), *others = both(params, {}, batch, {})
    for rules, (found, _, said) in zip(tables[1:], others):
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for path, x in flatten_dict(found, sep="/").items():
            expected = flatten_dict(whole, sep="/")[path]
            assert not np.any(x) if optim.frozen(rules)(path) else np.array_equal(x, expected), path
        assert jax.tree.all(jax.tree.map(np.array_equal, told, said))


def test_products_for_their_gradients_are_left_out(parts):
    """Of three maps: 3 forward, 3 for the kernels' gradients, 2 to go down. Above two frozen ones: 3, and 1."""
    params, batch = parts[2:]

    def count(rules, number=1):
        return products(jax.make_jaxpr(gradient_of(parts, rules, number))(params, {}, batch, {}).jaxpr)

    assert count(()) == 8 and count(LOWER) == 4
    # Frozen above what trains, the way down must be gone all the same.
    assert count((("layer_[12]", {"freeze": True}),)) == 6
    assert count(((".", {"freeze": True}),)) == 3
    assert count(LOWER, 2) == 8  # the first microbatch, and the body of the loop


def test_a_sum_over_microbatches_holds_no_zeros_for_them(parts):
    params, batch = parts[2:]

    def carried(rules):
        jaxpr = jax.make_jaxpr(gradient_of(parts, rules, 2))(params, {}, batch, {}).jaxpr
        (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("while", "scan")]
        return [tuple(var.aval.shape) for var in loop.outvars]

    assert (5, 7) in carried(()) and (5, 7) not in carried(LOWER) and (7, 3) in carried(LOWER)


def test_a_split_tree_is_joined():
    tree = {"a": np.ones(2), "b": {"c": np.zeros(3), "d": np.ones(())}}
    one, other = freezing.split(tree, lambda path: path == "b/c")
    assert list(flatten_dict(one, sep="/").values())[1] is None and len(jax.tree.leaves(other)) == 1
    joined = freezing.joined(one, other)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, joined, tree))


@pytest.mark.slow
def test_a_job_trains_the_others_as_if_all_gradients_were_there(monkeypatch):
    """As the optimizer does alone, which throws the gradients of frozen parameters away at the end."""
    rules = (("^hidden_0/", {"freeze": True}),)
    options = small.config("mlp", optim=dict(rules=rules, clip_norm=0.05), train=dict(microbatches=2))
    job = assemble(options)
    state, packed, names = small.train(job, 3)
    first = flatten_dict(job.fresh().params, sep="/")
    for path, x in flatten_dict(state.params, sep="/").items():
        assert np.array_equal(x, first[path]) == optim.frozen(rules)(path), path
    monkeypatch.setattr(freezing, "freezing", lambda make, apply, frozen: make(apply))
    other, wasted, _ = small.train(assemble(options), 3)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(*(small.means(rows, names)["loss"] for rows in (packed, wasted)), rtol=1e-6)
    norms = [small.means(rows, names)["grad_norm"] for rows in (packed, wasted)]
    assert (norms[0] < norms[1]).all()  # it is the norm of what trains
