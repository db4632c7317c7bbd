"""FLOPs and bytes from a jaxpr, against sums that can be done on paper."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flaxmodels import attention, job
from flaxmodels.perf import count, jaxprs, traffic

F = jnp.float32


def of(function, *shapes, dtype=F):
    """Count of a function of arrays of these shapes; a shape may be an array."""
    arguments = [jax.ShapeDtypeStruct(x, dtype) if isinstance(x, tuple) else x for x in shapes]
    return count.count(jax.make_jaxpr(function)(*arguments))


def assembled(family, model=None, **sections):
    """The job of `small.config`, with options of its model."""
    config = small.config(family, **sections)
    return job.assemble(config | {"model": {**config["model"], **(model or {})}})


# FLOPs


def test_a_matrix_product():
    found = of(jnp.matmul, (3, 5), (5, 7))
    assert found.flops == {"float32": 2 * 3 * 5 * 7} and found.other_flops == 0 and found.notes == ()
    assert found.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7) and found.by_op == {"dot_general": (210, 284)}


def test_a_batch_of_products_and_several_contracted_axes():
    assert of(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (2, 3, 4), (2, 4, 5)).total_flops == 2 * 2 * 3 * 4 * 5
    assert of(lambda a, b: jnp.einsum("ikl,klj->ij", a, b), (3, 4, 5), (4, 5, 6)).total_flops == 2 * 3 * 6 * 20


def test_the_dtype_of_a_product_is_that_of_its_operands_and_its_precision():
    assert of(jnp.matmul, (4, 4), (4, 4), dtype=jnp.bfloat16).flops == {"bfloat16": 128}
    wide = functools.partial(jnp.matmul, preferred_element_type=F)
    assert of(wide, (4, 4), (4, 4), dtype=jnp.bfloat16).flops == {"bfloat16": 128}
    for precision in ("highest", "high"):
        found = of(functools.partial(jnp.matmul, precision=precision), (4, 4), (4, 4))
        assert found.flops == {f"float32 {precision}": 128}


def test_an_inner_product_is_a_reduction():
    found = of(jnp.vdot, (100,), (100,))
    assert found.flops == {} and found.other_flops == 100 and found.bytes == 804


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 4)])
def test_a_convolution_and_its_gradients_cost_three_times_the_textbook_formula(stride, dilation, groups):
    """Padding counts, the holes that the gradient of a strided convolution has do not."""
    B, H, C, D, k = 2, 8, 4, 12, 3

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", rhs_dilation=(dilation, dilation), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    shapes = (B, H, H, C), (k, k, C // groups, D)
    textbook = 2 * B * (H // stride) ** 2 * k * k * C // groups * D
    assert of(convolve, *shapes).flops == {"float32": textbook}
    both = jax.grad(lambda x, kernel: (convolve(x, kernel) ** 2).sum(), (0, 1))
    assert of(both, *shapes).flops == {"float32": 3 * textbook}


def test_a_scan_counts_as_often_as_it_turns_and_one_in_another_multiplies():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0], None

    assert of(lambda x, w: jax.lax.scan(inner, x, w)[0], (2, 4), (5, 4, 4)).total_flops == 15 * 2 * 2 * 4 * 4


def test_a_fori_loop_whose_length_is_known():
    def loop(x, flag):
        most = jnp.where(flag[0] > 0, 7, 2)  # as long as the longest of both
        return jax.lax.fori_loop(2, most, lambda _, x: x @ x, x)

    found = of(loop, (4, 4), (1,))
    assert found.total_flops == 5 * 128 and "longest" in found.notes[0]


def test_a_loop_whose_length_is_told_at_run_time_counts_once():
    loop = functools.partial(jax.lax.fori_loop, 0, body_fun=lambda _, x: x @ x)
    found = of(lambda n, x: loop(n, init_val=x), jnp.int32(9), (4, 4))
    assert found.total_flops == 128 and "one turn" in found.notes[0]
    whole = of(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), (4, 4))
    assert whole.total_flops == 128 and "one turn" in whole.notes[0]


def test_a_loop_that_does_not_count_by_one_is_not_guessed():
    def by_two(x):
        return jax.lax.while_loop(lambda c: c[0] < 8, lambda c: (c[0] + 2, c[1] @ c[1]), (0, x))[1]

    def with_moving_end(x):
        return jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - 1, c[2] @ c[2]), (0, 8, x))[2]

    def backwards(x):
        return jax.lax.while_loop(lambda c: c[0] < 8, lambda c: (c[0] - 1, c[1] @ c[1]), (0, x))[1]

    assert [of(f, (4, 4)).total_flops for f in (by_two, with_moving_end, backwards)] == [128] * 3


def test_of_a_conditional_the_dearest_branch():
    branches = (lambda x: x, lambda x: x @ x @ x, lambda x: x @ x)
    found = of(lambda i, x: jax.lax.switch(i, branches, x), jnp.int32(0), (4, 4))
    assert found.total_flops == 256 and "costs most" in found.notes[0]


def test_what_has_no_effect_is_not_counted():
    def useless(x):
        x @ x
        return jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] @ c[1]), None), (x, x), None, length=3)[0][0]

    assert of(useless, (4, 4)).flops == {}


def test_calls_are_looked_into():
    @jax.custom_vjp
    def square(x):
        return jax.jit(jnp.matmul)(x, x)

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x @ x,))
    assert of(square, (4, 4)).total_flops == 128
    assert of(jax.grad(lambda x: jax.checkpoint(square)(x).sum()), (4, 4)).total_flops == 3 * 128 - 128
    relu = jax.custom_jvp(lambda x: x @ x)
    relu.defjvp(lambda x, t: (relu(*x), t[0]))
    assert of(relu, (4, 4)).total_flops == 128


def test_work_of_each_device_counts_for_all():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    with jax.set_mesh(mesh):
        assert of(split, (8, 3), (3, 5)).total_flops == 2 * 8 * 3 * 5
        twice = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
        assert of(twice, (8, 3), (3, 5)).total_flops == 8 * 2 * 8 * 3 * 5


@pytest.mark.slow
def test_a_pallas_kernel_costs_its_grid_times_its_body_or_what_its_author_says():
    from jax.experimental import pallas as pl

    def body(x, y, out):
        out[...] = x[...] @ y[...]

    block, whole = pl.BlockSpec((2, 4), lambda i: (i, 0)), pl.BlockSpec((4, 4), lambda i: (0, 0))
    call = functools.partial(
        pl.pallas_call, body, out_shape=jax.ShapeDtypeStruct((6, 4), F), grid=(3,), in_specs=[block, whole],
        out_specs=block,
    )  # fmt: skip
    found = of(call(), (6, 4), (4, 4))
    assert found.flops == {"float32": 2 * 6 * 4 * 4} and found.bytes == 4 * (24 + 16 + 24)
    said = call(cost_estimate=pl.CostEstimate(flops=1000, bytes_accessed=0, transcendentals=0))
    assert of(said, (6, 4), (4, 4)).flops == {"float32": 1000}


def test_cudnn_attention_counts_as_the_products_that_it_stands_for():
    """Two forward; backward five, of which four are the model's."""
    q, k = (2, 6, 4, 8), (2, 10, 4, 8)
    product = 2 * 2 * 6 * 10 * 4 * 8
    values = [jaxprs.Value(x, "bfloat16", 2 * math.prod(x)) for x in (q, k, k)]
    names = f"/{count._MODEL}/jvp"
    forward, backward = (
        jaxprs.Op(f"dot_product_attention_{way}_wrapper", {"layout": 0}, tuple(values), (values[0],), names)
        for way in ("fwd", "bwd")
    )
    assert count._products(forward) == {"bfloat16": 2 * product} and count._of_the_model(forward) == 1
    assert count._products(backward) == {"bfloat16": 5 * product} and count._of_the_model(backward) == 4 / 5


@pytest.mark.slow
def test_splash_attention_counts_as_the_products_that_it_stands_for():
    """Two forward; backward seven in two kernels, of which four are the model's. What the mask hides counts."""
    shape = (2, 256, 2, 128)

    def loss(q, k, v):
        with jax.named_scope(count._MODEL):
            return attention.splash(q, k, v, interpret=True).sum()

    arrays = [jax.ShapeDtypeStruct(shape, F)] * 3
    closed = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays)
    product = 2 * math.prod(shape) * shape[1]
    assert count.count(closed).total_flops == 9 * product
    assert count._counted(jaxprs.flatten(closed), count._of_the_model).total_flops == 6 * product


# Bytes: n is those of one array of 8 x 128 float32.

n = 4 * 8 * 128
X = (8, 128)


def moved(function, *shapes, **options):
    return of(function, *shapes, **options).bytes


def test_a_chain_of_elementwise_operations_reads_and_writes_once():
    assert moved(lambda x: jnp.sin(jnp.cos(x) + 1) * 2, X) == 2 * n
    assert moved(lambda x, y: x * y + x, X, X) == 3 * n


def test_what_follows_a_product_right_away_costs_nothing_but_what_it_reads():
    w = (128, 128)
    bare = moved(jnp.matmul, X, w)
    assert moved(lambda x, w: jax.nn.relu(x @ w), X, w) == bare
    assert moved(lambda x, w, r: jnp.tanh(x @ w) + r, X, w, X) == bare + n
    assert moved(lambda x, w: (x @ w, jnp.tanh(x @ w)), X, w) >= bare + n


def test_what_comes_before_a_product_is_fused_if_it_reads_no_more():
    w, bare = (128, 128), moved(jnp.matmul, X, (128, 128))
    assert moved(lambda x, w: jnp.tanh(x) @ w, X, w) == bare
    assert moved(lambda x, y, w: (x + y) @ w, X, X, w) == bare + 3 * n  # another is read; the sum, written and read


def test_a_reduction_takes_in_what_comes_before_it_and_two_of_one_value_read_it_once():
    assert moved(lambda x: (x * x).sum(), X) == n + 4
    assert moved(lambda x: (x.sum(), (x * x).max()), X) == n + 8


def test_a_softmax_reads_its_operand_for_the_maximum_the_sum_and_the_result():
    rows = 4 * 8
    found = moved(lambda x: jax.nn.softmax(x), X)
    assert 4 * n < found <= 4 * n + 8 * rows


def test_adam_reads_four_arrays_and_writes_three():
    def adam(p, g, m, v):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        return p - 0.1 * m / (jnp.sqrt(v) + 1e-8), m, v

    assert moved(adam, X, X, X, X) == 7 * n


def test_an_activation_is_computed_again_from_its_input_and_a_mask_is_kept():
    def step(x, w, v):
        return jax.grad(lambda w: jax.nn.relu(jax.nn.relu(x @ w) @ v).sum())(w)

    found = of(step, X, (128, 128), (128, 128))
    assert found.total_flops == 4 * 2 * 8 * 128 * 128
    assert found.bytes < 4 * (3 * 128 * 128 + 2 * 128 * 128) + 16 * n


def test_a_cast_to_a_narrower_type_is_written_once_for_all_later_products():
    def twice(x, w):
        w = w.astype(jnp.bfloat16)
        return (x @ w) @ w

    arguments = jax.ShapeDtypeStruct(X, jnp.bfloat16), jax.ShapeDtypeStruct((128, 128), F)
    weights = 128 * 128
    found = count.count(jax.make_jaxpr(twice)(*arguments)).bytes
    assert found == (4 + 2 + 2 + 2) * weights + 4 * 2 * 8 * 128


def test_a_gather_reads_rows_and_not_the_table():
    found = of(lambda t, i: jnp.take(t, i, axis=0, mode="clip"), (1000, 128), jnp.zeros(8, jnp.int32))
    assert 2 * n <= found.bytes <= 2 * n + 4 * 8 * 4


def test_rows_that_are_written_into_an_array_in_place_cost_the_rows():
    def stack(rows):
        start = jnp.zeros((5, *X), F)
        return jax.lax.fori_loop(0, 5, lambda i, out: out.at[i].set(jnp.sin(rows[i])), start)

    assert moved(stack, (5, *X)) <= 5 * n + 2 * 5 * n + 200


def test_a_loop_reads_its_slices_once_and_what_it_hands_on_unchanged_is_free():
    def through(x, kept):
        return jax.lax.scan(lambda c, row: ((c[0], c[1] + row), None), (kept, jnp.zeros(X, F)), x)[0]

    assert moved(through, (10, *X), (1000, 1000)) == n + 10 * 3 * n  # zeros; then a row, the sum before and after


def test_what_a_loop_keeps_for_later_is_a_copy():
    kept = moved(lambda x: jax.lax.scan(lambda c, _: (c * 2, c), x, None, length=4), X)
    assert kept == 4 * (2 * n + 2 * n)


def test_a_body_without_loops_is_its_traffic():
    body = jaxprs.flatten(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    assert sum(traffic.moved(body).values()) == 4 * (6 + 12 + 8)


# Whole jobs


def test_an_mlp_costs_six_flops_for_each_weight_and_example_but_the_first_layer_four():
    """Nothing needs the gradient of the data."""
    made = assembled("mlp", dict(hidden=(64, 32)), train=dict(microbatches=2))
    found = count.of_job(made)
    sizes = [math.prod(made.train.example()["inputs"].shape[1:]), 64, 32, 10]
    weights = [a * b for a, b in itertools.pairwise(sizes)]
    assert found.model.flops == {"float32": 16 * (4 * weights[0] + 6 * sum(weights[1:]))} == found.hardware.flops
    assert found.model.bytes < found.hardware.bytes and found.hardware.notes == ()


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(32)(jnp.sin(nn.Dense(32)(x))))


class Again(nn.Module):
    """A user's own module that computes again in its backward pass."""

    classes: int
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="a")(x.reshape(x.shape[0], -1))
        block = nn.remat(Twice) if self.remat else Twice
        return nn.Dense(self.classes, name="c")(block(name="b")(x))


@pytest.mark.slow
def test_what_is_computed_again_is_the_hardwares_and_not_the_models():
    made = job.assemble(small.config("mlp", optim=dict(name="muon")) | dict(model=dict(name="test_count:Again")))
    plain = dataclasses.replace(made, model=Again(10, remat=False))
    again, once = count.of_job(made), count.of_job(plain)
    assert again.model.total_flops == once.model.total_flops
    assert once.hardware.total_flops > once.model.total_flops  # muon's products are no model's
    assert again.hardware.total_flops - once.hardware.total_flops == 2 * 2 * 16 * 32 * 32


@pytest.mark.slow
def test_a_dispatch_of_several_steps_counts_as_one():
    one, many = (count.of_job(assembled("mlp", train=dict(steps_per_dispatch=steps))) for steps in (1, 16))
    assert one == many


def textbook(layers, width, mlp, vocabulary, length, batch):
    """6 FLOPs for each weight of a product and token, and 12 x layers x length x width for each token's attention."""
    weights = layers * (4 * width**2 + mlp * width) + vocabulary * width
    return batch * length * (6 * weights + 12 * layers * length * width)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "train"),
    [
        (dict(), dict()),
        (dict(unroll=2), dict(microbatches=2)),
        (dict(remat="nothing"), dict()),
        (dict(remat="dots", unroll=2), dict()),
    ],
)
def test_a_transformer_costs_what_textbooks_say(options, train):
    """https://arxiv.org/abs/2001.08361, sec. 2.1: with a loop over layers or without, whatever is computed again."""
    shape = dict(layers=2, width=32, heads=2, dropout=0.1, mlp="gelu")
    made = assembled("transformer", shape | options, train=train)
    found, inputs = count.of_job(made), made.train.example()["inputs"]
    expected = textbook(2, 32, 8 * 32, made.model.vocab_size, inputs.shape[1], 16)
    assert found.model.total_flops == pytest.approx(expected, rel=0.01)
    forward = 2 * inputs.size * 2 * (12 * 32**2 + 2 * inputs.shape[1] * 32)  # of the blocks
    more = found.hardware.total_flops - found.model.total_flops
    if options.get("remat") == "nothing":  # all but the last product of a block, which nothing asks for
        assert 0.6 * forward < more <= forward
    elif options.get("remat") == "dots":  # the scores have a batch axis
        assert more == pytest.approx(2 * inputs.size * 2 * 2 * inputs.shape[1] * 32, rel=0.01)
    else:
        assert more == 0


@pytest.mark.slow
def test_a_convolutional_net_costs_what_textbooks_say():
    made = assembled("cnn")
    inputs = made.train.example()["inputs"]
    B, H, W, C = inputs.shape
    conv = [2 * B * H * W * 9 * C * 8, 2 * B * (H // 2) * (W // 2) * 9 * 8 * 16]
    dense = [2 * B * (H // 4) * (W // 4) * 16 * 64, 2 * B * 64 * 10]
    expected = 2 * conv[0] + 3 * (conv[1] + sum(dense))
    assert count.of_job(made).model.total_flops == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_ring_attention_on_a_mesh_costs_what_attention_does():
    shape = dict(layers=1, width=32, heads=2)
    made = {
        kernel: assembled("transformer", shape | dict(attention=kernel), mesh=mesh)
        for kernel, mesh in (("xla", dict(data=8)), ("ring", dict(data=2, sequence=4)))
    }
    plain, ring = (count.of_job(one) for one in made.values())
    inputs = made["xla"].train.example()["inputs"]
    product = 2 * inputs.size * inputs.shape[1] * 32
    assert plain.hardware.total_flops == plain.model.total_flops
    assert ring.hardware.total_flops == plain.hardware.total_flops + product  # the scores, in the backward pass
    assert ring.model.total_flops == plain.model.total_flops
    assert "longest" in ring.hardware.notes[0]
