"""What a query of attention sees: masks, windows, prefixes, and a cache of keys and values."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import attention, masked
from flaxmodels.attention import Case, pick

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
PREFIX = np.array([[1, 1, 0, 0, 1, 0, 0, 0]])


def seen(causal=True, window=0, segments=None, prefix=None, T=8):
    """The rules one by one: (T, T) bool."""
    found = np.zeros((T, T), bool)
    for t, s in itertools.product(range(T), range(T)):
        ahead = s > t and causal and not (prefix is not None and prefix[0, s])
        old = bool(window) and t - s >= window
        other = segments is not None and segments[0, t] != segments[0, s]
        found[t, s] = not (ahead or old or other)
    return found


def reference(q, k, v, mask, scale=None, softcap=0.0):
    """One example, heads one by one, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        shares = np.exp(scores) * mask
        out[:, n] = shares / shares.sum(-1, keepdims=True) @ v[:, n // group]
    return out


def arrays(T=8, N=4, K=2, H=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, T, n, H)).astype(np.float32) for n in (N, K, K)]


def test_a_mask_says_what_the_rules_say():
    ways = itertools.product([True, False], [0, 3], [None, SEGMENTS], [None, PREFIX])
    rules = [dict(zip(("causal", "window", "segments", "prefix"), way, strict=True)) for way in ways]
    found = jax.jit(lambda: [masked.visible(8, **each)[0] for each in rules])()
    for each, mask in zip(rules, found, strict=True):
        np.testing.assert_array_equal(mask, seen(**each), err_msg=str(each))


RULES = [
    {"window": 3},
    {"window": 3, "segments": SEGMENTS},
    {"causal": False, "segments": SEGMENTS},
    {"prefix": PREFIX, "segments": SEGMENTS},
    {"prefix": PREFIX, "window": 3},
    {"scale": 0.1},
    {"softcap": 0.7, "window": 3, "segments": SEGMENTS, "scale": 2.0},
    {"softcap": 0.7, "prefix": PREFIX},
]


@pytest.mark.slow
def test_attention_sees_what_the_mask_says():
    q, k, v = (jnp.asarray(x) for x in arrays())

    def run(rules):
        return attention.run("xla", q, k, v, **{key: jnp.asarray(x) if np.ndim(x) else x for key, x in rules.items()})

    outputs = jax.jit(lambda: [run(each) for each in RULES])()
    for rules, found in zip(RULES, outputs, strict=True):
        numbers = {key: rules[key] for key in ("scale", "softcap") if key in rules}
        mask = seen(**{key: rules[key] for key in rules if key not in numbers})
        expected = reference(q[0], k[0], v[0], mask, **numbers)
        np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-5, err_msg=str(rules))


@pytest.mark.slow
def test_a_soft_cap_bounds_scores():
    q, k, _ = arrays()
    v = np.tile(np.eye(8, dtype=np.float32)[None, :, None], (1, 1, 2, 1))  # so that results are shares
    open_to_all = np.ones((1, 8, 8), bool)
    assert np.max(masked.attend(1000 * q, k, v[..., :4], open_to_all)) > 0.999  # one key takes all
    capped = masked.attend(1000 * q, k, v[..., :4], open_to_all, softcap=0.5)
    shares = 1 / (1 + 7 * np.exp([1, -1]))  # scores are all between -1/2 and 1/2
    assert shares[0] < np.min(capped) and np.max(capped) < shares[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        {"window": 100, "segments": True, "softcap": 2.0},
        pytest.param({"causal": False, "scale": 0.5}, marks=pytest.mark.nightly),
    ],
    ids=lambda rules: "-".join(rules),
)
def test_splash_sees_the_same(rules):
    q, k, v = arrays(T=256, H=16)
    if rules.get("segments"):
        rules = {**rules, "segments": jnp.asarray(np.arange(256)[None] // 150)}
    expected = attention.run("xla", q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), **rules)
    found = attention.splash(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), **rules, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


TPU = Case((8, 1024, 8, 128), 8, "bfloat16", packed=False, platform="tpu", axes={})


@pytest.mark.parametrize(
    ("kernel", "fields", "message"),
    [
        ("ring", {"window": 64}, r'"ring" is for plain causal attention, and here is a window'),
        ("ring", {"causal": False, "softcap": 50.0}, r"here is a softcap and no causal mask"),
        ("ring", {"prefix": True}, r"here is a prefix"),
        ("splash", {"prefix": True}, r'"splash" has no mask for a prefix'),
        ("cudnn", {"platform": "gpu", "softcap": 50.0}, r'"cudnn" can\'t cap scores'),
    ],
)
def test_a_kernel_says_what_it_can_not_see(kernel, fields, message):
    with pytest.raises(ValueError, match=message):
        pick(kernel, Case(**{**vars(TPU), **fields}))


def test_auto_takes_a_kernel_that_can():
    windowed = Case(**{**vars(TPU), "window": 64, "softcap": 50.0, "causal": True})
    assert pick("auto", windowed)[0] == "splash"
    assert pick("auto", Case(**{**vars(TPU), "prefix": True}))[0] == "xla"
    split = Case(**{**vars(TPU), "shape": (1, 2**15, 8, 128), "axes": {"sequence": 8}})
    assert pick("auto", split)[0] == "ring" and pick("auto", Case(**{**vars(split), "window": 64}))[0] == "splash"


# A cache


def empty(S, B=2, K=2, H=4):
    blocks = {name: np.zeros((B, K, S, H), np.float32) for name in ("key", "value")}
    return {"places": np.full((B, S), -1, np.int32), "blocks": blocks}


@functools.partial(jax.jit, static_argnames=("window", "scale", "softcap"))
def call(cache, q, k, v, positions, **rules):
    out = attention.cached(q, k, v, slots=cache["blocks"], places=cache["places"], positions=positions, **rules)
    return out, attention.store(cache, {"key": k, "value": v}, positions)


def feed(cache, arrays, positions, T=5, **rules):
    """One call with tokens at `positions` of each example, padded to T, so that it compiles once; results of these."""
    places = np.array([[*some, *[-1] * (T - len(some))] for some in positions], np.int32)
    parts = [np.take_along_axis(x, places[:, :, None, None].clip(0), axis=1) for x in arrays]
    out, cache = call(cache, *parts, places, **rules)
    return [x[: len(some)] for x, some in zip(np.asarray(out), positions, strict=True)], cache


def two():
    """Queries, keys and values of two examples, of 8 tokens each."""
    return [np.concatenate(pair) for pair in zip(arrays(), arrays(seed=1), strict=True)]


def expected(x, **rules):
    numbers = {key: rules[key] for key in ("scale", "softcap") if key in rules}
    mask = seen(window=rules.get("window", 0))
    return [reference(q, k, v, mask, **numbers) for q, k, v in zip(*x, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("S", "rules"),
    [(8, {}), (8, {"window": 3, "softcap": 0.7, "scale": 0.3}), (3, {"window": 3})],
    ids=["whole", "window", "ring"],
)
def test_a_cache_is_attention_to_all_before(S, rules):
    x, cache = two(), empty(S)
    wanted = expected(x, **rules)
    at = [0, 0]
    # Four at once are more than the smaller ring has slots; one alone goes another way.
    for T, sizes in ((5, (2, 1)), (1, (1, 1)), (5, (4, 0)), (1, (0, 1)), (1, (1, 1)), (5, (0, 3))):
        positions = [range(start, start + size) for start, size in zip(at, sizes, strict=True)]
        found, cache = feed(cache, x, positions, T, **rules)
        for i, places in enumerate(positions):
            np.testing.assert_allclose(found[i], wanted[i][list(places)], rtol=2e-5, atol=2e-5)
        at = [start + size for start, size in zip(at, sizes, strict=True)]
    assert at == [8, 7]


@pytest.mark.slow
def test_a_token_goes_to_its_slot_and_padding_nowhere():
    _, k, v = x = two()
    cache = feed(empty(8), x, [[1, 2, 3, 4, 5], [0]])[1]
    cache = feed(cache, x, [[6, 7], [1, 2]])[1]
    np.testing.assert_array_equal(cache["places"], [[-1, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, *[-1] * 5]])
    np.testing.assert_array_equal(cache["blocks"]["key"][0, :, 1:], k[0, 1:].swapaxes(0, 1))
    np.testing.assert_array_equal(cache["blocks"]["value"][1, :, :3], v[1, :3].swapaxes(0, 1))
    assert not np.any(cache["blocks"]["key"][0, :, 0]) and not np.any(cache["blocks"]["value"][1, :, 3:])


@pytest.mark.slow
def test_a_token_that_comes_again_takes_the_place_of_what_was_there():
    q, k, v = x = two()
    cache = feed(empty(8), (q, k + 1, v - 1), [range(5), range(5)])[1]
    cache = feed(cache, x, [range(3), []])[1]  # from the start again: what was later is not seen
    cache = feed(cache, x, [[], range(4)])[1]
    found, _ = feed(cache, x, [[3, 4], [4]])
    for i, places in enumerate(([3, 4], [4])):
        np.testing.assert_allclose(found[i], expected(x)[i][places], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_of_more_tokens_than_slots_the_last_stay():
    x = two()
    cache = feed(empty(3), x, [range(5), [6, 7]])[1]
    np.testing.assert_array_equal(cache["places"], [[3, 4, 2], [6, 7, -1]])
    np.testing.assert_array_equal(cache["blocks"]["key"][0], x[1][0, [3, 4, 2]].swapaxes(0, 1))


@pytest.mark.nightly
def test_stacked_layers_store_as_each_alone():
    added = {name: np.arange(48.0, dtype=np.float32).reshape(2, 2, 6, 2, 1) for name in ("key", "value")}
    positions = np.array([[0, 1, 2, 3, 4, 5], [7, -1, 8, -1, -1, -1]], np.int32)
    alone = empty(4, H=1)
    stacked = {**alone, "blocks": {name: np.stack([x, x]) for name, x in alone["blocks"].items()}}
    both = jax.jit(attention.store)(stacked, added, positions)
    apart = {**alone, "blocks": (alone["blocks"], alone["blocks"])}
    each = jax.jit(attention.store)(apart, tuple({n: x[i] for n, x in added.items()} for i in range(2)), positions)
    for i in range(2):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), both["blocks"], each["blocks"][i])
    np.testing.assert_array_equal(both["places"], [[4, 5, 2, 3], [8, -1, -1, 7]])
