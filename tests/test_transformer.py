"""The transformer: what must be true of it whatever its weights are."""

import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from flaxmodels import attention, sharding
from flaxmodels.job import assemble
from flaxmodels.models import build
from flaxmodels.models.blocks import mark, rotate
from flaxmodels.models.transformer import Transformer
from flaxmodels.registry import UserError

SIZES = {"vocab_size": 16, "layers": 2, "width": 16, "heads": 4, "max_length": 8}
LLAMA = Transformer(**SIZES, kv_heads=2)
GPT2 = Transformer(**SIZES, norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True)
BOTH = pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
TOKENS = jnp.arange(16).reshape(2, 8) * 3 % 16
REMAT = ("dots", "nothing", "offload")


def random_params(model, seed=0):
    """Every parameter drawn anew, so that no bias is zero and no scale is one."""
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)


def run(model, params, tokens=TOKENS, **options):
    return jax.jit(lambda params, tokens: model.apply(params, tokens, **options))(params, tokens)


def names(params):
    return {"/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


# What it computes


def reference(model, params, tokens):
    """The same model in the plainest terms: one sequence, a loop over layers, heads and places."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    heads, kv_heads = model.heads, model.kv_heads or model.heads
    T, H = len(tokens), model.width // heads

    def norm(x, p):
        if model.norm == "rms":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def dense(x, p, axes=1):
        return np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)

    def turn(x, t):  # a pair is a complex number
        z = (x[: H // 2] + 1j * x[H // 2 :]) * np.exp(1j * t * model.rope_base ** (-2 * np.arange(H // 2) / H))
        return np.concatenate([z.real, z.imag]) if model.positions == "rope" else x

    def attention(x, p):
        q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
        y = np.zeros((T, heads, H))
        for n in range(heads):
            m = n // (heads // kv_heads)
            for t in range(T):
                scores = [turn(q[t, n], t) @ turn(k[s, m], s) / np.sqrt(H) for s in range(t + 1)]
                shares = np.exp(scores) / np.exp(scores).sum()
                y[t, n] = shares @ v[: t + 1, m]
        return dense(y, p["out"], axes=2)

    def mlp(x, p):
        up = dense(x, p["up"])
        if model.mlp == "swiglu":
            gate = dense(x, p["gate"])
            return dense(gate / (1 + np.exp(-gate)) * up, p["down"])
        return dense(0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))), p["down"])

    x = params["embed"]["embedding"][tokens]
    if model.positions == "learned":
        x = x + params["embed_positions"]["embedding"][:T]
    for layer in range(model.layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        x = x + attention(norm(x, p["norm_attention"]), p["attention"])
        x = x + mlp(norm(x, p["norm_mlp"]), p["mlp"])
    x = norm(x, params["norm"])
    return x @ (params["embed"]["embedding"].T if model.tied_head else params["head"]["kernel"])


@BOTH
def test_scan_over_layers_equals_a_plain_loop(model):
    params = random_params(model)
    logits = run(model, params)
    expected = np.stack([reference(model, params, tokens) for tokens in np.asarray(TOKENS)])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_unrolling_the_loop_changes_nothing():
    params = random_params(LLAMA)
    unrolled = run(LLAMA.clone(unroll=2), params)
    np.testing.assert_allclose(unrolled, run(LLAMA, params), rtol=1e-5, atol=1e-5)


def touched(model, params, inputs):
    """(T, T) bool: whether output t depends on input s, where input s is the token s."""

    def outputs(embedding):  # the head must not be the embedding here
        inner = {**params["params"], "embed": {"embedding": embedding}}
        if model.tied_head:
            inner["head"] = {"kernel": params["params"]["embed"]["embedding"].T}
        return model.clone(tied_head=False).apply({"params": inner}, inputs)[0, :, :3].sum(-1)

    jacobian_TxVxD = jax.jit(jax.jacrev(outputs))(params["params"]["embed"]["embedding"])
    return (jacobian_TxVxD[:, :8] != 0).any(-1)


@BOTH
def test_no_output_depends_on_a_later_input(model):
    found = touched(model, random_params(model), jnp.arange(8)[None])
    np.testing.assert_array_equal(found, np.tri(8, dtype=bool))


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    params = random_params(LLAMA)
    attention = params["params"]["blocks"]["attention"]
    repeated = {n: {"kernel": jnp.repeat(attention[n]["kernel"], 2, axis=2)} for n in ("key", "value")}
    blocks = {**params["params"]["blocks"], "attention": {**attention, **repeated}}
    full = LLAMA.clone(kv_heads=None)
    expected = run(full, {"params": {**params["params"], "blocks": blocks}})
    np.testing.assert_allclose(run(LLAMA, params), expected, rtol=1e-5, atol=1e-5)


def test_rotated_scores_depend_on_the_distance_only():
    q_H, k_H = jax.random.normal(jax.random.key(0), (2, 8))
    q_TxH, k_TxH = (rotate(jnp.tile(x, (1, 16, 1, 1)), 100.0)[0, :, 0] for x in (q_H, k_H))
    scores = np.asarray(q_TxH @ k_TxH.T)
    for distance in range(-15, 16):
        np.testing.assert_allclose(np.diagonal(scores, distance), np.diagonal(scores, distance)[0], atol=1e-5)
    assert np.ptp(scores[0]) > 0.1  # and do depend on it


def test_rotation_keeps_lengths_and_dtype_and_leaves_the_first_place():
    x = jax.random.normal(jax.random.key(0), (2, 16, 3, 8))
    np.testing.assert_allclose(jnp.linalg.norm(rotate(x, 1e4), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotate(x, 1e4)[:, 0], x[:, 0])
    assert rotate(x.astype(jnp.bfloat16), 1e4).dtype == jnp.bfloat16


def test_rotation_tells_far_places_apart_in_bfloat16():
    x = jnp.ones((1, 512, 1, 2), jnp.bfloat16)
    turned = rotate(x, 1e4)[0, :, 0].astype(jnp.float32)
    angles = np.arange(512) + np.pi / 4
    np.testing.assert_allclose(turned, np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], -1), atol=0.01)


# Several documents in a row

SEGMENTS = np.array([1, 1, 1, 2, 2, 3, 0, 0])
POSITIONS = np.array([0, 1, 2, 0, 1, 0, 0, 1])


def packed(tokens, segments=SEGMENTS, positions=POSITIONS):
    return {
        "tokens": jnp.asarray(tokens),
        "segments": jnp.broadcast_to(segments, tokens.shape),
        "positions": jnp.broadcast_to(positions, tokens.shape),
    }


@BOTH
@pytest.mark.slow
def test_packed_documents_are_those_alone(model):
    params = random_params(model)
    logits = run(model, params, packed(TOKENS))
    for segment in range(4):
        here = np.equal(SEGMENTS, segment)
        np.testing.assert_allclose(logits[:, here], run(model, params, TOKENS[:, here]), rtol=1e-5, atol=1e-5)


@BOTH
def test_no_gradient_crosses_from_one_document_to_another_or_to_padding(model):
    found = touched(model, random_params(model), packed(np.arange(8)[None]))
    same = SEGMENTS[:, None] == SEGMENTS[None]
    np.testing.assert_array_equal(found, np.tri(8, dtype=bool) & same)


@BOTH
def test_one_document_in_a_row_is_the_plain_row(model):
    params = random_params(model)
    whole = packed(TOKENS, np.ones(8, np.int32), np.arange(8))
    np.testing.assert_allclose(run(model, params, whole), run(model, params), rtol=1e-6, atol=1e-6)


@BOTH
def test_positions_are_those_that_are_given(model):
    params = random_params(model)
    moved = run(model, params, packed(TOKENS, np.ones(8, np.int32), np.array([0, 1, 2, 3, 4, 5, 6, 0])))
    difference = np.abs(moved - run(model, params)).max((0, 2))
    assert difference[:7].max() < 1e-5 and difference[7] > 0.01


def test_rotation_by_positions_is_that_of_the_places():
    x = jax.random.normal(jax.random.key(0), (1, 16, 3, 8))
    order = np.array([[3, 0, 15, 7]])
    turned = rotate(x[:, order[0]], 1e4, jnp.asarray(order))
    np.testing.assert_allclose(turned, rotate(x, 1e4)[:, order[0]], rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_alone_is_finite():
    zeros = np.zeros((1, 8), np.int32)
    inputs = packed(zeros, zeros, zeros)
    gradients = jax.jit(jax.grad(lambda params: LLAMA.apply(params, inputs).sum()))(random_params(LLAMA))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


# Numbers and names


def test_logits_and_parameters_stay_float32_when_the_compute_is_bfloat16():
    low, params = LLAMA.clone(dtype="bfloat16"), random_params(LLAMA)
    rough, exact = run(low, params), run(LLAMA, params)
    dtypes = {x.dtype for x in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), TOKENS))}
    assert rough.dtype == exact.dtype == jnp.float32
    assert dtypes == {jnp.dtype("float32")}
    np.testing.assert_allclose(rough, exact, atol=0.03 * np.abs(exact).max())
    assert not np.array_equal(rough, exact)


def test_parameters_have_these_names_and_shapes():
    assert names(random_params(LLAMA)) == {
        "params/embed/embedding": (16, 16),
        "params/blocks/norm_attention/scale": (2, 16),
        "params/blocks/attention/query/kernel": (2, 16, 4, 4),
        "params/blocks/attention/key/kernel": (2, 16, 2, 4),
        "params/blocks/attention/value/kernel": (2, 16, 2, 4),
        "params/blocks/attention/out/kernel": (2, 4, 4, 16),
        "params/blocks/norm_mlp/scale": (2, 16),
        "params/blocks/mlp/up/kernel": (2, 16, 64),
        "params/blocks/mlp/gate/kernel": (2, 16, 64),
        "params/blocks/mlp/down/kernel": (2, 64, 16),
        "params/norm/scale": (16,),
        "params/head/kernel": (16, 16),
    }


def test_a_tied_head_has_no_parameter():
    assert "params/head/kernel" not in names(random_params(GPT2))
    assert not any("head" in name for name in names(random_params(LLAMA.clone(tied_head=True))))


@pytest.mark.parametrize(("fields", "width"), [({}, 384), ({"mlp": "gelu"}, 512), ({"mlp_width": 40}, 40)])
def test_the_mlp_has_its_width(fields, width):
    model = Transformer(16, layers=1, width=128, **fields)
    assert names(random_params(model))["params/blocks/mlp/up/kernel"] == (1, 128, width)


def test_initial_weights_have_their_scale_and_differ_between_layers():
    model = Transformer(256, layers=8, width=64, heads=2)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    blocks = params["blocks"]
    for kernel in (params["embed"]["embedding"], params["head"]["kernel"], blocks["attention"]["query"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    for kernel in (blocks["attention"]["out"]["kernel"], blocks["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02 / 4, rtol=0.05)  # sqrt(2 * 8) = 4
    first, second = blocks["mlp"]["up"]["kernel"][:2]
    assert not np.array_equal(first, second)


def test_the_program_does_not_grow_with_depth():
    def size(layers):
        model = LLAMA.clone(layers=layers, dropout=0.1, remat="dots")
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)

        def loss(params):
            return model.apply(params, TOKENS, train=True, rngs={"dropout": jax.random.key(0)}).sum()

        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert size(48) == size(4) > 100


# Memory


@BOTH
def test_a_split_head_is_what_the_logits_are_the_product_of(model):
    params, halves = random_params(model), model.clone(split_head=True)
    parts = run(halves, params)
    assert {name: x.shape for name, x in parts.items()} == {"features": (2, 8, 16), "kernel": (16, 16)}
    np.testing.assert_allclose(parts["features"] @ parts["kernel"], run(model, params), rtol=1e-5, atol=1e-5)
    low = jax.eval_shape(halves.clone(dtype="bfloat16").apply, params, TOKENS)
    assert {x.dtype for x in low.values()} == {jnp.dtype("bfloat16")}


def test_no_way_to_save_memory_changes_a_parameter():
    models = [LLAMA, LLAMA.clone(split_head=True), LLAMA.clone(remat="dots")]
    first, *rest = jax.jit(lambda key: [model.init(key, TOKENS) for model in models])(jax.random.key(0))
    for other in rest:
        jax.tree.map(np.testing.assert_array_equal, other, first)


def lower_gradient(remat, **fields):
    """(value, gradient) of a model with dropout, lowered, and its parameters."""
    model, tokens = LLAMA.clone(**fields, dropout=0.1, remat=remat), jnp.tile(TOKENS, (8, 1))

    def loss(params):
        logits = model.apply(params, tokens, train=True, rngs={"dropout": jax.random.key(0)})
        return jax.nn.log_softmax(logits)[..., 0].sum()

    params = random_params(model)
    return jax.jit(jax.value_and_grad(loss)).lower(params), params


@pytest.mark.slow
def test_remat_saves_memory_and_changes_nothing():
    found, memory = {}, {}
    for remat in ("none", *REMAT):
        lowered, params = lower_gradient(remat, layers=3)
        program = lowered.compile()
        found[remat], memory[remat] = program(params), program.memory_analysis().temp_size_in_bytes
    for remat in REMAT:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[remat], found["none"])
    assert memory["nothing"] < 0.9 * memory["dots"] < 0.8 * memory["none"], memory


@pytest.mark.parametrize(("fields", "kept"), [({"layers": 3}, False), ({"layers": 3, "unroll": 3}, True)])
def test_where_no_loop_parts_the_passes_the_compiler_may_not_merge_them(fields, kept):
    assert ("optimization_barrier" in lower_gradient("nothing", **fields)[0].as_text()) == kept


# Dropout


def test_dropout_is_off_unless_training():
    params = random_params(LLAMA)
    noisy = LLAMA.clone(dropout=0.5)
    np.testing.assert_array_equal(run(noisy, params), run(LLAMA, params))
    draw = jax.jit(lambda seed: noisy.apply(params, TOKENS, train=True, rngs={"dropout": jax.random.key(seed)}))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


def only(model, branch):
    """Parameters by which one residual branch gives 1, the others 0, and the logits are what the last norm gives."""
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    inner = params["params"]
    part = inner["blocks"]["attention"]["out"] if branch == "attention" else inner["blocks"]["mlp"]["down"]
    name, part = ("embedding", inner["embed"]) if branch == "embed" else ("bias", part)
    part[name] = jnp.ones_like(part[name])
    inner["norm"]["scale"] = jnp.ones_like(inner["norm"]["scale"])
    inner["head"]["kernel"] = jnp.eye(model.width)
    return params


@pytest.mark.parametrize("branch", ["embed", "attention", "mlp"])
@pytest.mark.slow
def test_each_dropout_has_its_rate(branch):
    rate = 0.3
    model = LLAMA.clone(layers=1, width=128, vocab_size=128, use_bias=True, dropout=rate)
    logits = run(model, only(model, branch), train=True, rngs={"dropout": jax.random.key(0)})
    assert abs((logits == 0).mean() - rate) < 4 * (rate * (1 - rate) / logits.size) ** 0.5  # four standard deviations


def test_layers_drop_different_places():
    model = LLAMA.clone(width=128, vocab_size=128, use_bias=True, dropout=0.5)
    logits = run(model, only(model, "mlp"), train=True, rngs={"dropout": jax.random.key(0)})
    both = logits[0, 0] / logits[0, 0].max()  # kept by both layers: 1; by one: 1/2; by none: 0
    assert set(np.unique(np.round(both, 3))) == {0, 0.5, 1}


# On a mesh


def on_mesh(f, params, tokens, **axes):
    """Lower, compile and run `f` on 8 devices under the rules: (lowered, compiled, outputs, mesh)."""
    mesh = sharding.make_mesh(**axes or {"data": 4, "tensor": 2})
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
        lowered = jax.jit(f).lower(params, tokens)
        compiled = lowered.compile()
        return lowered, compiled, compiled(params, tokens), mesh


@pytest.mark.slow
def test_a_mesh_with_rules_changes_the_layout_and_nothing_else():
    model = LLAMA.clone(kv_heads=1, norm="layer", use_bias=True)  # one kv head on two devices, too
    params, tokens = random_params(model), jnp.tile(TOKENS, (4, 1))

    def loss(params, tokens):
        logits = model.apply(params, tokens)
        return jax.nn.log_softmax(logits)[..., 0].mean(), logits

    step = jax.value_and_grad(loss, has_aux=True)
    plain = jax.jit(step).lower(params, tokens)
    assert "sharding_constraint" not in plain.as_text()
    (_, expected), gradients = plain.compile()(params, tokens)
    lowered, _, ((_, logits), sharded), mesh = on_mesh(step, params, tokens)
    assert lowered.as_text().count("sharding_constraint") > 8
    layout = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    assert logits.sharding.is_equivalent_to(layout, 3)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), sharded, gradients)


@pytest.mark.parametrize("kernel", ["xla", pytest.param("ring", marks=pytest.mark.slow)])
def test_of_a_split_length_keys_and_values_travel_and_nothing_else(kernel):
    model, params, tokens = LLAMA.clone(attention=kernel), random_params(LLAMA), jnp.tile(TOKENS, (2, 1))
    _, compiled, logits, mesh = on_mesh(model.apply, params, packed(tokens), data=2, sequence=4)
    np.testing.assert_allclose(logits, run(LLAMA, params, packed(tokens)), rtol=1e-4, atol=1e-5)
    assert logits.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("data", "sequence")), 3)
    collectives = r"= f32\[(\S+)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    # Of 4 examples and 8 places a device computes 2 of each; there are 2 heads of keys of size 4.
    travels = {"xla": ("2,8,2,4", "all-gather"), "ring": ("2,2,2,4", "collective-permute")}[kernel]
    assert set(re.findall(collectives, compiled.as_text())) == {travels}


def test_packed_documents_on_a_mesh():
    params, inputs = random_params(LLAMA), packed(jnp.tile(TOKENS, (4, 1)))
    *_, logits, _ = on_mesh(lambda params, inputs: LLAMA.apply(params, inputs), params, inputs)
    np.testing.assert_allclose(logits, run(LLAMA, params, inputs), rtol=1e-4, atol=1e-5)


def losses(devices, mesh, **fields):
    config = small.config("transformer", mesh=mesh)
    config["model"] |= fields
    _, packed_metrics, names = small.train(assemble(config, jax.devices()[:devices]))
    found = small.means(packed_metrics, names)
    return np.stack([found["loss"], found["grad_norm"]])


@pytest.mark.slow
def test_a_split_length_trains_as_one_device_does():
    found = losses(8, {"data": 2, "sequence": 4}, attention="ring", remat="dots")
    np.testing.assert_allclose(found, losses(1, {"data": 1}), rtol=2e-5)


@pytest.mark.slow
def test_splash_attention_and_offloading_compile_for_tpus(monkeypatch):
    pytest.importorskip("libtpu", reason="needs libtpu, of the extra `tpu`")
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    devices = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
    mesh = sharding.make_mesh(data=2, sequence=2, tensor=2, devices=devices)
    fields = {"layers": 2, "width": 256, "heads": 4, "kv_heads": 1, "max_length": 256, "dtype": "bfloat16"}
    model = Transformer(256, **fields, remat="offload")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    tokens = jax.ShapeDtypeStruct((4, 256), "int32", sharding=split)
    inputs = dict.fromkeys(("tokens", "segments", "positions"), tokens)
    assert model.chosen(mesh, inputs) == ("attention: splash (TPU, length 256, head size 64, sequence=2)",)

    def loss(params, inputs):
        return jax.nn.log_softmax(model.apply(params, inputs, train=True))[..., 0].mean()

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        compiled = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, and two backward
    assert compiled.memory_analysis().host_temp_size_in_bytes > 0


# Which attention


def test_the_model_says_which_attention_it_has():
    mesh, tokens = sharding.make_mesh(), jax.ShapeDtypeStruct((8, 8), "int32")
    line = "attention: xla (CPU, length 8, head size 4)"
    assert LLAMA.chosen(mesh, tokens) == LLAMA.chosen(mesh, packed(TOKENS)) == (line,)
    ring = LLAMA.clone(attention="ring").chosen(sharding.make_mesh(data=1, sequence=8), tokens)
    assert ring == ("attention: ring (CPU, length 8, head size 4, sequence=8)",)


def test_what_is_said_is_what_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(attention, "ring", lambda q, *_, **options: used.append(options) or q)
    model = LLAMA.clone(attention="ring")
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert not used  # parameters need no kernel
    jax.eval_shape(model.apply, params, packed(TOKENS))
    assert used[0]["segments"].shape == (2, 8)
    monkeypatch.setattr(attention, "RING_FROM", 2)
    with jax.set_mesh(sharding.make_mesh(data=2, sequence=4)):
        jax.eval_shape(LLAMA.clone(kv_heads=4).apply, random_params(LLAMA.clone(kv_heads=4)), TOKENS)
    assert used[-1]["segments"] is None and len(used) > 1


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_kernel_that_can_not_run_here_is_refused(kernel):
    model = LLAMA.clone(attention=kernel)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=rf'attention="{kernel}" needs .* cpu.*Use attention="auto"'):
        jax.eval_shape(model.apply, params, TOKENS)
    with pytest.raises(ValueError, match=kernel):
        model.chosen(sharding.make_mesh(), TOKENS)


def test_offloading_needs_the_memory_for_it():
    model = LLAMA.clone(remat="offload")
    assert model.chosen(sharding.make_mesh(), TOKENS)
    device = SimpleNamespace(device_kind="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    mesh = SimpleNamespace(devices=np.array([device]))
    with pytest.raises(ValueError, match=r"\"pinned_host\", and abacus has \['device'\]. Use remat=\"dots\""):
        model.chosen(mesh, TOKENS)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, r"model: width=128 must be a multiple of heads=3"),
        ({"kv_heads": 3}, r"model: kv_heads=3 must divide heads=4"),
        ({"width": 12}, r"model: width / heads = 3 must be even.*positions=\"learned\""),
        ({"layers": 0}, r"model: layers=0 must be at least 1"),
        ({"kv_heads": 0}, r"model: kv_heads=0 must be at least 1"),
        ({"dropout": 1}, r"model: dropout=1 must be in \[0, 1\)"),
        ({"kv_heads": 2.0}, r"model.kv_heads=2.0 has the wrong type: expected an integer or None"),
        (
            {"remat": "all"},
            r"model.remat='all' has the wrong type: expected one of 'none', 'dots', 'nothing', 'offload'",
        ),
        ({"norm": "batch"}, r"model.norm='batch' has the wrong type: expected one of 'rms', 'layer'"),
    ],
)
def test_build_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        build("transformer", vocab_size=16, **fields)


def test_an_odd_head_is_fine_without_rotation():
    assert build("transformer", vocab_size=16, width=12, positions="learned").heads == 4


@pytest.mark.parametrize("shape", [(2, 9), (8,)])
def test_too_long_an_input_names_both_lengths(shape):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]},.*at most max_length=8"):
        LLAMA.init(jax.random.key(0), jnp.zeros(shape, jnp.int32))


def test_inputs_that_are_no_tokens_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 8\) and float32: expected integers"):
        LLAMA.init(jax.random.key(0), jnp.zeros((2, 8)))


def test_other_inputs_are_named():
    with pytest.raises(ValueError, match=r"keys \['image', 'tokens'\]: expected tokens, segments, positions"):
        LLAMA.init(jax.random.key(0), {"tokens": TOKENS, "image": TOKENS})


def test_a_token_outside_the_vocabulary_is_not_clamped():
    assert jnp.isnan(run(LLAMA, random_params(LLAMA), TOKENS.at[0, 0].set(16))[0, 0]).all()


@pytest.mark.parametrize(("size", "split"), [(64, True), (65, False)])
def test_what_a_mesh_does_not_divide_stays_whole(size, split):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
        lowered = jax.jit(lambda x: mark(x, "vocab", "embed")).lower(jnp.zeros((size, 4)))
    constraint = next(line for line in lowered.as_text().splitlines() if "sharding_constraint" in line)
    assert ('"tensor"' in constraint) == split, constraint
