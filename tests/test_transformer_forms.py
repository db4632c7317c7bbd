"""The switches of the transformer: each computes what its source says, and none lets a token see what it must not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import attention, sharding
from flaxmodels.inference import cache
from flaxmodels.models import build, expand
from flaxmodels.models.bert import Bert
from flaxmodels.models.blocks import MLP, rotate
from flaxmodels.models.transformer import Transformer, stack, unstack
from flaxmodels.registry import UserError

SIZES = {"vocab_size": 16, "layers": 2, "width": 16, "heads": 4, "max_length": 8}
GEMMA = Transformer(
    **SIZES, kv_heads=2, head_size=6, windows=(3, 0), softcap=2.0, query_scale=0.3, head_softcap=3.0, mlp="geglu",
    embed_scale=True, norm_plus_one=True, post_norms=True, tied_head=True, norm_eps=1e-3,
)  # fmt: skip
QWEN = Transformer(**SIZES, kv_heads=2, head_size=8, qk_norm=True, qkv_bias=True, rope_scaling=(8.0, 1.0, 4.0, 30.0))
BERT = Bert(**SIZES, norm_eps=1e-3)
FORMS = pytest.mark.parametrize("model", [GEMMA, QWEN, BERT], ids=["gemma", "qwen", "bert"])
TOKENS = jnp.arange(16).reshape(2, 8) * 3 % 16
SEGMENTS = np.array([1, 1, 1, 1, 2, 2, 0, 0])
POSITIONS = np.array([0, 1, 2, 3, 0, 1, 0, 1])


def random_params(model, seed=0):
    """Every parameter drawn anew, so that no bias is zero and no scale is one."""
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params)


def run(model, params, inputs=TOKENS):
    return jax.jit(model.apply)(params, inputs)


# What it computes


def reference(model, params, tokens, types):
    """The same model in the plainest terms: one sequence, a loop over layers, heads and places."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    T, heads, H = len(tokens), model.heads, model.head_size or model.width // model.heads
    kv_heads = model.kv_heads or heads

    def norm(x, p, kind=model.norm):
        if kind == "rms":
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps)
            return x * (p["scale"] + model.norm_plus_one)
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.norm_eps) * p["scale"] + p["bias"]

    def dense(x, p, axes=1):
        return np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)

    def slowed(turns, factor, low, high, length):  # a pair's angle from one place to the next
        wavelength = 2 * np.pi / turns
        if wavelength < length / high:
            return turns
        if wavelength > length / low:
            return turns / factor
        share = (length / wavelength - low) / (high - low)
        return (1 - share) * turns / factor + share * turns

    def turn(x, t):
        angles = model.rope_base ** (-2 * np.arange(H // 2) / H)
        if model.rope_scaling is not None:
            angles = np.array([slowed(angle, *model.rope_scaling) for angle in angles])
        z = (x[: H // 2] + 1j * x[H // 2 :]) * np.exp(1j * t * angles)
        return np.concatenate([z.real, z.imag]) if model.positions == "rope" else x

    def attend(x, p, window):
        q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
        if model.qk_norm:
            q, k = norm(q, p["query_norm"], "rms"), norm(k, p["key_norm"], "rms")
        y = np.zeros((T, heads, H))
        for n in range(heads):
            m = n // (heads // kv_heads)
            for t in range(T):
                seen = [s for s in range(t + 1 if model.causal else T) if not window or t - s < window]
                scores = np.array([turn(q[t, n], t) @ turn(k[s, m], s) for s in seen])
                scores *= H**-0.5 if model.query_scale is None else model.query_scale
                if model.softcap:
                    scores = model.softcap * np.tanh(scores / model.softcap)
                shares = np.exp(scores) / np.exp(scores).sum()
                y[t, n] = shares @ v[seen, m]
        return dense(y, p["out"], axes=2)

    def gelu(x):
        if model.mlp == "gelu_exact":
            return np.asarray(jax.scipy.stats.norm.cdf(x.astype(np.float32)), np.float64) * x
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(x, p):
        up = dense(x, p["up"])
        if model.mlp == "swiglu":
            gate = dense(x, p["gate"])
            return dense(gate / (1 + np.exp(-gate)) * up, p["down"])
        return dense(gelu(dense(x, p["gate"])) * up if model.mlp == "geglu" else gelu(up), p["down"])

    x = params["embed"]["embedding"][tokens] * (model.width**0.5 if model.embed_scale else 1)
    if model.positions == "learned":
        x = x + params["embed_positions"]["embedding"][:T]
    if model.types:
        x = x + params["embed_types"]["embedding"][types]
    if model.embed_norm:
        x = norm(x, params["embed_norm"])
    for layer in range(model.layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        window = model.windows[layer % len(model.windows)]
        for name, branch in (("attention", lambda x, p, w=window: attend(x, p, w)), ("mlp", mlp)):
            y = branch(norm(x, p[f"norm_{name}"]) if model.norm_place == "pre" else x, p[name])
            if model.post_norms:
                y = norm(y, p[f"norm_{name}_out"])
            x = x + y if model.norm_place == "pre" else norm(x + y, p[f"norm_{name}"])
    if model.norm_place == "pre":
        x = norm(x, params["norm"])
    if isinstance(model, Bert):
        x = norm(gelu(dense(x, params["transform"])), params["transform_norm"])
    logits = x @ (params["embed"]["embedding"].T if model.tied_head else params["head"]["kernel"])
    logits += params["head"]["bias"] if model.head_bias else 0
    return model.head_softcap * np.tanh(logits / model.head_softcap) if model.head_softcap else logits


@FORMS
@pytest.mark.slow
def test_a_switch_computes_what_its_source_says(model):
    params, types = random_params(model), np.arange(8) % 2
    given = {"tokens": TOKENS, "types": jnp.tile(types, (2, 1))} if model.types else TOKENS
    expected = np.stack([reference(model, params, tokens, types) for tokens in np.asarray(TOKENS)])
    np.testing.assert_allclose(run(model, params, given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("model", [GEMMA, BERT], ids=["gemma", "bert"])
def test_blocks_of_their_own_compute_what_stacked_ones_do(model):
    params = random_params(model)
    apart = {"params": unstack(params["params"])}
    alone = model.clone(stacked=False)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(alone.init, jax.random.key(0), TOKENS))
    assert shapes == jax.tree.map(jnp.shape, apart)
    np.testing.assert_allclose(run(alone, apart), run(model, params), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, stack(apart["params"]), params["params"])


def test_blocks_of_their_own_keep_the_order_of_more_than_ten():
    params = {"blocks": {"x": np.arange(24).reshape(12, 2)}, "norm": {"scale": np.ones(2)}}
    apart = unstack(params)
    assert list(apart) == ["norm", *(f"blocks_{i}" for i in range(12))]
    np.testing.assert_array_equal(stack(apart)["blocks"]["x"], params["blocks"]["x"])


@pytest.mark.nightly
@pytest.mark.parametrize("model", [GEMMA, BERT], ids=["gemma", "bert"])
def test_a_low_precision_is_near(model):
    if model.head_softcap:
        model = model.clone(head_softcap=0.0)
    params = random_params(model)
    exact, rough = run(model, params), run(model.clone(dtype="bfloat16"), params)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())


def test_each_mlp_has_its_activation():
    x = jnp.asarray([[[-1.0, 0.5, 2.0]]])
    eye = {"kernel": jnp.eye(3)}
    params = {"params": {"up": {"kernel": 3 * jnp.eye(3)}, "gate": eye, "down": eye}}
    plain = {"params": {"up": eye, "down": eye}}

    def run(kind, params):
        return MLP(width=3, kind=kind, use_bias=False, out_init=nn.initializers.ones, dtype="float32").apply(params, x)

    gated, alone = ("swiglu", "geglu"), ("gelu", "gelu_exact")
    found = jax.jit(lambda: [run(kind, params) for kind in gated] + [run(kind, plain) for kind in alone])()
    silu, tanh, exact = np.array([  # of -1, 1/2 and 2
        [-0.26894143, 0.31122967, 1.76159416], [-0.15880801, 0.34571401, 1.95459769],
        [-0.15865526, 0.34573123, 1.95449974],
    ])  # fmt: skip
    expected = [silu * 3 * np.array([-1, 0.5, 2]), tanh * 3 * np.array([-1, 0.5, 2]), tanh, exact]
    np.testing.assert_allclose(np.stack(found)[:, 0, 0], expected, rtol=3e-6)


def test_stretched_positions_turn_slower_where_they_turn_seldom():
    x = np.ones((1, 2, 1, 8), np.float32)
    frequencies = 100.0 ** (-np.arange(0, 8, 2) / 8)

    def turned(**options):
        found = np.asarray(jax.jit(lambda: rotate(x, 100.0, **options))())[0, 1, 0]
        return np.angle((found[:4] + 1j * found[4:]) / (1 + 1j))

    np.testing.assert_allclose(turned(), frequencies, rtol=1e-5)
    length = 2 * np.pi * 10  # so that pairs turn 10, 3.2, 1 and 0.3 times
    found = turned(scaling=(4.0, 1.0, 5.0, length)) / frequencies
    share = (10**0.5 - 1) / 4
    np.testing.assert_allclose(found, [1, share + (1 - share) / 4, 1 / 4, 1 / 4], rtol=1e-4)


# What it must not see


def rows(**more):
    """A row of two documents and padding, with as many examples as 8 devices want."""
    given = {"tokens": np.arange(8), "segments": SEGMENTS, "positions": POSITIONS, **more}
    return {name: jnp.tile(jnp.asarray(x), (4, 1)) for name, x in given.items()}


def touched(model, inputs, mesh=None):
    """(T, T) bool: whether output t of the first example depends on input s, where input s is the token s."""
    params = random_params(model)["params"]

    def outputs(embedding):  # the head must not be the embedding here
        inner = {**params, "embed": {"embedding": embedding}}
        if model.tied_head:
            inner["head"] = {**params.get("head", {}), "kernel": params["embed"]["embedding"].T}
        return model.clone(tied_head=False).apply({"params": inner}, inputs)[0, :, :3].sum(-1)

    if mesh is None:
        jacobian_TxVxD = jax.jit(jax.jacrev(outputs))(params["embed"]["embedding"])
    else:
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
            jacobian_TxVxD = jax.jit(jax.jacrev(outputs))(params["embed"]["embedding"])
    return (np.asarray(jacobian_TxVxD)[:, :8] != 0).any(-1)


def reach(*masks):
    """What outputs see through layers with such masks."""
    found = np.eye(8, dtype=bool)
    for mask in masks:
        found = (mask.astype(int) @ found) > 0
    return found


AHEAD = np.arange(8)[:, None] - np.arange(8)[None]
SAME = SEGMENTS[:, None] == SEGMENTS[None]
CAUSAL = (AHEAD >= 0) & SAME
PREFIX = np.array([1, 1, 0, 0, 1, 0, 0, 0])
SEEN = {
    "gemma": (GEMMA, rows(), reach(CAUSAL & (AHEAD < 3), CAUSAL)),
    "qwen": (QWEN.clone(windows=(2,)), rows(), reach(CAUSAL & (AHEAD < 2), CAUSAL & (AHEAD < 2))),
    "bert": (BERT, rows(types=POSITIONS % 2), SAME),
    "prefix": (QWEN, rows(prefix=PREFIX), reach(*2 * [CAUSAL | (SAME & (PREFIX == 1)[None])])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "bert", "prefix", pytest.param("qwen", marks=pytest.mark.nightly)])
def test_no_gradient_comes_from_the_future_from_padding_or_from_other_documents(name):
    model, inputs, seen = SEEN[name]
    assert not seen.all()
    np.testing.assert_array_equal(touched(model, inputs), seen)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SEEN)
def test_nor_does_one_on_eight_devices(name):
    model, inputs, seen = SEEN[name]
    np.testing.assert_array_equal(touched(model, inputs, sharding.make_mesh(data=4, tensor=2)), seen)


@pytest.mark.slow
def test_nor_does_one_where_all_switches_meet_on_eight_devices():
    model, inputs, seen = SEEN["gemma"]
    np.testing.assert_array_equal(touched(model, inputs, sharding.make_mesh(data=2, fsdp=2, tensor=2)), seen)


# A cache


def empty(model, B, S):
    return cache.empty(cache.abstract(model, B, S, sharding.make_mesh(devices=jax.devices()[:1])))


CACHED = {
    "gemma": GEMMA,
    "apart": GEMMA.clone(stacked=False),
    "gpt2": Transformer(**SIZES, norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["apart", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma", "gpt2"))]
)
def test_a_cache_computes_what_whole_rows_do(name):
    """Prompts of 4 and 2 tokens, then one after the other; in a ring of 8 slots."""
    model = CACHED[name]
    params = random_params(model.clone(stacked=True))
    expected = run(model.clone(stacked=True), params)
    params = params if model.stacked else {"params": unstack(params["params"])}
    step = jax.jit(lambda kept, given: model.apply(params, given, cache=kept))
    kept, at = empty(model, 2, 8), [0, 0]
    for sizes in ((4, 2), (1, 1), (1, 4), (2, 0)):  # padded to one shape, so that it compiles once
        positions = np.array([[*range(i, i + n), *[-1] * (4 - n)] for i, n in zip(at, sizes, strict=True)])
        tokens = np.take_along_axis(np.asarray(TOKENS), positions.clip(0), axis=1)
        logits, kept = step(kept, {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(positions)})
        for i, n in enumerate(sizes):
            np.testing.assert_allclose(logits[i, :n], expected[i, at[i] : at[i] + n], rtol=1e-5, atol=1e-5)
        assert np.isfinite(logits).all()
        at = [i + n for i, n in zip(at, sizes, strict=True)]
    assert at == [8, 7]
    np.testing.assert_array_equal(kept["places"], [range(8), [*range(7), -1]])


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (GEMMA, TOKENS, r"keys \['tokens'\]: expected tokens, positions, as a cache asks for"),
        (GEMMA, {"tokens": TOKENS, "positions": TOKENS, "segments": TOKENS}, r"as a cache asks for"),
        (BERT, {"tokens": TOKENS, "positions": TOKENS}, r"a cache .* needs causal=True"),
        (GEMMA, {"tokens": TOKENS, "positions": TOKENS, "prefix": TOKENS}, r"inputs without a prefix"),
    ],
)
def test_what_a_cache_can_not_hold_is_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.apply({}, inputs, cache={"places": jnp.zeros((2, 8), jnp.int32)}))


# Heads, and what is refused


@pytest.mark.nightly
def test_a_split_head_holds_the_bias():
    params = random_params(BERT)
    parts = run(BERT.clone(split_head=True), params)
    assert {name: x.shape for name, x in parts.items()} == {"features": (2, 8, 17), "kernel": (17, 16)}
    np.testing.assert_allclose(parts["features"] @ parts["kernel"], run(BERT, params), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_parameters_of_switches_have_these_names():
    def names(model):
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        return {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)}

    assert names(GEMMA) - names(Transformer(**SIZES, tied_head=True)) == {
        "blocks/norm_attention_out/scale", "blocks/norm_mlp_out/scale",
    }  # fmt: skip
    qkv = {f"blocks/attention/{name}/bias" for name in ("query", "key", "value")}
    norms = {f"blocks/attention/{name}_norm/scale" for name in ("query", "key")}
    assert names(QWEN) - names(Transformer(**SIZES)) == qkv | norms
    gpt2 = Transformer(**SIZES, norm="layer", positions="learned", mlp="gelu", tied_head=True, use_bias=True)
    assert names(gpt2) - names(BERT) == {"norm/scale", "norm/bias"}
    assert names(BERT) - names(gpt2) == {
        "embed_types/embedding", "embed_norm/scale", "embed_norm/bias", "transform/kernel", "transform/bias",
        "transform_norm/scale", "transform_norm/bias", "head/bias",
    }  # fmt: skip


def test_what_is_seen_decides_the_kernel():
    mesh, inputs = sharding.make_mesh(data=1, sequence=8), rows()
    with pytest.raises(ValueError, match="here is a window and a softcap"):
        GEMMA.clone(attention="ring").chosen(mesh, inputs)
    with pytest.raises(ValueError, match="here is a prefix"):
        QWEN.clone(attention="ring").chosen(mesh, rows(prefix=PREFIX))
    assert QWEN.clone(attention="ring").chosen(mesh, inputs)[0].startswith("attention: ring")
    assert BERT.chosen(mesh, inputs) == ("attention: xla (CPU, length 8, head size 4, sequence=8)",)


def test_a_kernel_is_told_what_the_model_says(monkeypatch):
    told = []
    monkeypatch.setattr(attention, "run", lambda kernel, q, *_, **options: told.append(options) or q)
    inputs = rows()
    jax.eval_shape(GEMMA.apply, jax.eval_shape(GEMMA.init, jax.random.key(0), inputs), inputs)
    assert [options["window"] for options in told[:2]] == [0, 3]  # each of both branches is traced
    assert {(options["softcap"], options["scale"], options["causal"]) for options in told} == {(2.0, 0.3, True)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": ()}, r"model: windows=\(\) must be of at least one number"),
        ({"windows": (4, -1)}, r"windows=\(4, -1\)"),
        ({"windows": (4,), "causal": False}, r"model: windows=\(4,\) look back: they need causal=True"),
        ({"norm_plus_one": True, "norm": "layer"}, r"norm_plus_one=True is of RMS norms, and norm='layer'"),
        ({"norm_place": "post", "post_norms": True}, r"post_norms=True adds norms"),
        ({"rope_scaling": (8.0, 4.0, 1.0, 8192.0)}, r"rope_scaling=.* must be \(factor, low, high, length\)"),
        ({"rope_scaling": (8.0, 1.0)}, r"model.rope_scaling=\(8.0, 1.0\) has the wrong type"),
        ({"rope_base": 0.0}, r"model: rope_base=0.0 must be over 0"),
        ({"head_size": 5}, r"model: head_size = 5 must be even"),
        ({"head_size": 0}, r"model: head_size=0 must be at least 1"),
        ({"split_head": True, "head_softcap": 30.0}, r"head_softcap=30.0 is of logits, which split_head=True"),
        ({"mlp": "relu"}, r"model.mlp='relu' has the wrong type: expected one of 'swiglu', 'geglu', 'gelu'"),
    ],
)
def test_build_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        build("transformer", vocab_size=16, **fields)


def test_a_head_need_not_be_a_share_of_the_width():
    assert build("transformer", vocab_size=16, width=10, heads=4, head_size=6).head_size == 6


def test_inputs_that_the_model_has_no_use_for_are_named():
    with pytest.raises(ValueError, match=r"\['tokens', 'types'\]: expected tokens, segments, positions, and perhaps"):
        jax.eval_shape(GEMMA.init, jax.random.key(0), {"tokens": TOKENS, "types": TOKENS})
    with pytest.raises(ValueError, match=r"\['segments', 'tokens'\]"):
        jax.eval_shape(GEMMA.init, jax.random.key(0), {"tokens": TOKENS, "segments": TOKENS})


def test_a_name_that_is_no_preset_names_the_nearest():
    assert expand({"name": "mlp", "classes": 2}) == {"name": "mlp", "classes": 2}
    assert expand({"name": "my.net:Net"}) == {"name": "my.net:Net"}
    with pytest.raises(UserError, match=r"model.name='gpt_2' does not exist. Did you mean 'gpt2'\?"):
        expand({"name": "gpt_2"})
