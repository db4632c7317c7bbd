"""Augmentation on the device: what makes it random and what does not, how it is distributed, and what it does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from flaxmodels import losses, sharding, step
from flaxmodels.data import augment, augment_images, augment_mixing, randaugment
from flaxmodels.data.augment import AUGMENTATIONS, example_keys, make
from flaxmodels.registry import UserError

FACTS = {"classes": 10}
MIXING = ("cutmix", "mixup")
# To notice any change of anything that is random, all of them do something to nearly every image.
STRONG = {"flip": {"horizontal": 0.5, "vertical": 0.5}, "mixup": {"alpha": 1.0}, "cutout": {"size": 6}}
B, SIDE = 16, 10


def spec(name, **options):
    return {"name": name, **STRONG.get(name, {}), **options}


@functools.cache
def compiled(*specs):
    """(batch, index, step, seed) -> batch; `specs` as tuples of items."""
    chosen = tuple(map(dict, specs))
    return jax.jit(lambda batch, index, step, seed: make(chosen, seed=seed, facts=FACTS)(batch, index, step))


def changed(batch, *specs, index=None, step=0, seed=0):
    index = np.arange(len(batch["weights"]), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    found = compiled(*(tuple(s.items()) for s in specs))(batch, index, np.int32(step), np.uint32(seed))
    return jax.tree.map(np.asarray, found)


def batch_of(images, weights=None):
    count = len(images)
    return {
        "inputs": images,
        "targets": np.arange(count, dtype=np.int32) % 10,
        "weights": np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32),
    }


def noise(count=B, height=SIDE, width=SIDE, channels=3, seed=0):
    return np.random.default_rng(seed).random((count, height, width, channels), np.float32)


def ramps(count, height, width):
    """Images of two channels that say where each pixel was: 0.25 + 0.5 y and 0.25 + 0.5 x, both from 0 to 1."""
    y, x = np.meshgrid(np.linspace(0.25, 0.75, height), np.linspace(0.25, 0.75, width), indexing="ij")
    return np.broadcast_to(np.stack([y, x], -1).astype(np.float32), (count, height, width, 2))


def many(name, images, **options):
    return changed(batch_of(images), {"name": name, **options})["inputs"]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Randomness is of (seed, step, example, place in the list), and of nothing else


# Each by itself takes a compilation: in the fast part some stand for all.
CHAINS = [("crop", "flip", "contrast", "rotate", "cutout"), ("cutmix",)]
EACH = [*CHAINS, *(pytest.param((name,), marks=pytest.mark.slow) for name in AUGMENTATIONS if name != "cutmix")]


@pytest.mark.parametrize("names", EACH, ids="-".join)
def test_randomness_is_of_seed_step_and_example_only(names):
    batch, index, specs = batch_of(noise()), np.arange(100, 100 + B), tuple(map(spec, names))
    run = functools.partial(changed, batch, *specs)
    first = run(index=index, step=5, seed=1)
    assert_same(first, run(index=index, step=5, seed=1))
    for other in (
        run(index=index, step=6, seed=1), run(index=index, step=5, seed=2), run(index=index + 1, step=5, seed=1)
    ):  # fmt: skip
        same = np.all(first["inputs"] == other["inputs"], axis=(1, 2, 3))
        assert np.mean(same) < 0.5
    # Elsewhere in the batch, and with others around it, the same bits. A partner is the example before.
    moved = changed(jax.tree.map(lambda x: np.roll(x, 3, 0), batch), *specs, index=np.roll(index, 3), step=5, seed=1)
    assert_same(first, jax.tree.map(lambda x: np.roll(x, -3, 0), moved))
    mixes = bool(set(names) & set(MIXING))
    if not mixes:
        some, others, place = np.asarray([7, 2, 11]), batch_of(noise(seed=9)), index + 50
        others["inputs"][:3], place[:3] = batch["inputs"][some], index[some]
        found = changed(others, *specs, index=place, step=5, seed=1)["inputs"]
        np.testing.assert_array_equal(found[:3], first["inputs"][some])
        np.testing.assert_array_equal(first["targets"], batch["targets"])
    # And a batch still: nothing out of range, nothing else touched.
    assert first["inputs"].dtype == np.float32 and first["inputs"].shape == batch["inputs"].shape
    assert first["inputs"].min() >= 0 and first["inputs"].max() <= 1
    np.testing.assert_array_equal(first["weights"], batch["weights"])


def on_mesh(mesh, names, images):
    """The result on a mesh, as the train step computes it, and the program."""
    place = sharding.batch_sharding(mesh)
    function = make(tuple(map(spec, names)), seed=3, facts=FACTS)
    arguments = jax.device_put((batch_of(images), np.arange(B, dtype=np.int32)), place)
    program = step.compile_step(
        lambda batch, index: function(batch, index, np.int32(7)),
        *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments),
        mesh=mesh,
    ).compile()
    return jax.tree.map(np.asarray, program(*arguments)), program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("names", EACH, ids="-".join)
@pytest.mark.parametrize("shape", [(10, 10, 3), (13, 7, 2)])
def test_eight_devices_make_the_bits_of_one(names, shape):
    images = noise(B, *shape)
    one, _ = on_mesh(sharding.make_mesh(devices=jax.devices()[:1]), names, images)
    eight, program = on_mesh(sharding.make_mesh(), names, images)
    assert_same(one, eight)
    assert "all-gather" not in program  # each device sees its own images, and at most one more
    assert ("collective-permute" in program) == bool(set(names) & set(MIXING))


@pytest.mark.slow
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_batch_of_any_size_gives_the_same_bits(name):
    """Loops are vectorised, and end in another way for each size."""
    images = noise(64, 13, 7, 3)
    whole = changed(batch_of(images), spec(name))
    for first, count in ((0, 1), (3, 5), (20, 24)):
        batch, rows = batch_of(images), slice(first, first + count)
        part = changed({k: v[rows] for k, v in batch.items()}, spec(name), index=np.arange(64)[rows])
        kept = slice(name in MIXING, None)  # the first has another partner
        assert_same({k: v[kept] for k, v in part.items()}, {k: v[rows][kept] for k, v in whole.items()})


def test_keys_are_all_different_and_not_those_of_the_step():
    keys = [example_keys(seed, np.arange(-1, 50), np.int32(at)) for seed in (0, 1) for at in (0, 1, 2**31 - 1)]
    found = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(found, axis=0)) == len(found) == 6 * 51
    streams = [jax.random.key_data(k) for at in range(50) for k in step.streams(0, at).values()]
    assert len(np.unique(np.concatenate([found, streams]), axis=0)) == len(found) + len(streams)
    assert augment.PURPOSE >= 2**31  # no step is that


def test_each_place_in_the_list_draws_for_itself():
    images = noise(1000, 3, 4, 1)
    found = changed(batch_of(images), *[spec("flip", horizontal=0.5, vertical=0)] * 2)["inputs"]
    turned = np.all(found == images[:, :, ::-1], (1, 2, 3))
    assert np.all(turned | np.all(found == images, (1, 2, 3)))
    assert 0.45 < np.mean(turned) < 0.55  # equal draws would undo each other


def test_they_are_applied_in_order():
    batch = batch_of(np.full((B, SIDE, SIDE, 1), 0.75, np.float32))
    light, dark = (spec("brightness", factor=(by, by)) for by in (2.0, 0.5))
    assert np.all(changed(batch, light, dark)["inputs"] == 0.5)  # clipped to 1 between the two
    assert np.all(changed(batch, dark, light)["inputs"] == 0.75)


def test_without_any_the_batch_is_itself():
    batch = batch_of(noise())
    assert make((), seed=0, facts=FACTS)(batch, np.arange(B), 0) is batch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_images_keep_their_dtype(dtype):
    images = jnp.asarray(noise(), dtype)
    specs = (spec("crop"), spec("contrast"), spec("mixup"))
    found = changed(batch_of(images), *specs)
    assert found["inputs"].dtype == dtype and found["targets"].dtype == np.float32
    near = changed(batch_of(np.asarray(images, np.float32)), *specs)
    np.testing.assert_allclose(np.asarray(found["inputs"], np.float32), near["inputs"], atol=0.02)
    assert_same(found["targets"], near["targets"])


@pytest.mark.slow
def test_one_example_is_no_trouble():
    batch = batch_of(noise(1))
    found = changed(batch, *(spec(name) for name in ("crop", "mixup", "cutmix")))
    np.testing.assert_allclose(found["targets"], np.eye(10)[:1], atol=1e-6)  # its own partner


# Settings that do nothing do exactly nothing


NOTHING = {
    "crop": {"padding": 0},
    "shift": {"fraction": 0.0},
    "flip": {"horizontal": 0.0},
    "rotate": {"degrees": 0.0},
    "zoom": {"factor": (1.0, 1.0)},
    "resized_crop": {"area": (1.0, 1.0), "aspect": (1.0, 1.0)},
    "brightness": {"factor": (1.0, 1.0)},
    "contrast": {"factor": (1.0, 1.0)},
    "saturation": {"factor": (1.0, 1.0)},
    "mixup": {"probability": 0.0},
    "cutmix": {"probability": 0.0},
}


@pytest.mark.parametrize(
    "names", [tuple(NOTHING), *(pytest.param((name,), marks=pytest.mark.slow) for name in NOTHING)], ids="-".join
)
@pytest.mark.slow
def test_nothing_is_exactly_nothing(names):
    batch = batch_of(noise(5, 13, 13))
    found = changed(batch, *({"name": name, **NOTHING[name]} for name in names))
    np.testing.assert_array_equal(found["inputs"], batch["inputs"])
    if set(names) & set(MIXING):
        np.testing.assert_array_equal(found["targets"], np.eye(10)[batch["targets"]])


# Distributions


def offsets(found, height, width):
    """Where the pixel in the middle came from, (B, 2), of moved `ramps`."""
    middle = found[:, height // 2, width // 2]
    return np.rint((middle - 0.25) / 0.5 * (height - 1, width - 1)).astype(int) - (height // 2, width // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "reach"), [("crop", {"padding": 3}, (3, 3)), ("shift", {"fraction": 0.2}, (3, 4))]
)
def test_windows_are_uniform_and_whole(name, options, reach):
    height, width = 15, 20
    found = many(name, ramps(4096, height, width), **options)
    moved = offsets(found, height, width)
    sizes = [2 * r + 1 for r in reach]
    cells = np.ravel_multi_index((moved + reach).T, sizes)  # raises where it is out of reach
    assert scipy.stats.chisquare(np.bincount(cells, minlength=math.prod(sizes))).pvalue > 1e-3
    source = np.pad(ramps(1, height, width)[0], [(r, r) for r in (*reach, 0)])
    for image, (down, right) in zip(found[:50], moved + reach):
        np.testing.assert_array_equal(image, source[down : down + height, right : right + width])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crop", "shift"])
def test_windows_may_reflect(name):
    options = {"padding": 2} if name == "crop" else {"fraction": 0.2}
    source = noise(1, 10, 10, 1)
    found = many(name, np.repeat(source, 64, 0), mode="reflect", **options)
    wide = np.pad(source[0], [(2, 2), (2, 2), (0, 0)], mode="reflect")
    windows = {wide[y : y + 10, x : x + 10].tobytes() for y in range(5) for x in range(5)}
    assert {image.tobytes() for image in found} <= windows and len({image.tobytes() for image in found}) > 15


@pytest.mark.slow
def test_flips_come_at_their_rates():
    images = noise(1, 3, 4, 1)
    found = many("flip", np.repeat(images, 4096, 0), horizontal=0.3, vertical=0.8)
    rates = {
        (across, down): np.mean(np.all(found == images[:, :: -1 if down else 1, :: -1 if across else 1], (1, 2, 3)))
        for across in (0, 1) for down in (0, 1)
    }  # fmt: skip
    for (across, down), rate in rates.items():
        assert abs(rate - (0.3 if across else 0.7) * (0.8 if down else 0.2)) < 0.02
    assert sum(rates.values()) == 1


@pytest.mark.slow
def test_cutout_is_a_square_anywhere():
    found = many("cutout", np.ones((4096, 8, 9, 2), np.float32), size=4, fill=0.5)
    gone = found == 0.5
    assert np.all(gone[..., 0] == gone[..., 1]) and set(np.unique(found)) == {0.5, 1}
    tall, wide = (gone[..., 0].any(axis).sum(-1) for axis in (2, 1))
    assert set(tall) == set(wide) == {2, 3, 4}  # at the border a part is outside
    assert np.all(gone[..., 0].sum((1, 2)) == tall * wide)
    centres = np.stack([gone[:, :, :, 0].any(axis).argmax(-1) for axis in (2, 1)])
    inner = (tall == 4) & (wide == 4)  # centres from 2 to 6 of 0..7, and to 7 of 0..8
    counts = np.bincount(np.ravel_multi_index(centres[:, inner], (5, 6)), minlength=30)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.mean(inner) - 5 / 8 * 6 / 9) < 0.03


def slopes(found):
    """How much further in the image, in pixels, one pixel further in the result is, (B, 4): y of y, y of x, ..."""
    height, width = found.shape[1:3]
    y, x = height // 2, width // 2
    step = np.asarray([0.5 / (height - 1), 0.5 / (width - 1)])
    down, right = ((found[:, y + a, x + b] - found[:, y - a, x - b]) / 2 / step for a, b in ((1, 0), (0, 1)))
    return np.stack([down[:, 0], right[:, 0], down[:, 1], right[:, 1]], -1)


@pytest.mark.slow
def test_angles_are_uniform_in_their_range():
    cosine, sine, back, same = slopes(many("rotate", ramps(4096, 21, 15), degrees=40.0)).T
    np.testing.assert_allclose(cosine, same, atol=1e-5)
    np.testing.assert_allclose(sine, -back, atol=1e-5)
    np.testing.assert_allclose(cosine**2 + sine**2, 1, atol=1e-3)
    angle = np.degrees(np.arctan2(sine, cosine))
    assert scipy.stats.kstest(angle, scipy.stats.uniform(-40, 80).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_zooms_are_uniform_in_their_range():
    yy, yx, xy, xx = slopes(many("zoom", ramps(4096, 21, 15), factor=(0.5, 2.0))).T
    np.testing.assert_allclose(yy, xx, atol=1e-5)
    assert np.abs([yx, xy]).max() < 1e-5
    assert scipy.stats.kstest(1 / yy, scipy.stats.uniform(0.5, 1.5).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_boxes_of_resized_crop():
    height, width = 24, 32
    found = many("resized_crop", ramps(4096, height, width), area=(0.2, 0.5), aspect=(0.8, 1.25))
    yy, yx, xy, xx = slopes(found).T
    assert np.abs([yx, xy]).max() < 1e-5
    area, aspect = yy * xx, xx * width / (yy * height)
    assert scipy.stats.kstest(area, scipy.stats.uniform(0.2, 0.3).cdf).pvalue > 1e-3
    low, high = np.log(0.8), np.log(1.25)
    assert scipy.stats.kstest(np.log(aspect), scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3
    # The box lies in the image, anywhere.
    middle = (found[:, height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1].mean((1, 2)) - 0.25) * 2
    for at, scale, side in ((middle[:, 0], yy, height), (middle[:, 1], xx, width)):
        place = (at * (side - 1) + 0.5 - scale * side / 2) / (side - scale * side)
        assert scipy.stats.kstest(np.clip(place, 0, 1), scipy.stats.uniform(0, 1).cdf).pvalue > 1e-3
        assert abs(np.mean(place) - 0.5) < 0.013  # half a pixel is 0.5 / side


@pytest.mark.slow
def test_a_box_that_fits_nowhere_is_cut_to_the_image():
    found = slopes(many("resized_crop", ramps(16, 16, 16), area=(1.0, 1.0), aspect=(4.0, 4.0)))
    np.testing.assert_allclose(found, np.broadcast_to([0.5, 0, 0, 1], (16, 4)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_uniform_and_do_what_pillow_does(name):
    pixels = np.random.default_rng(0).integers(64, 160, (12, 12, 3), np.uint8)
    found = many(name, np.repeat(pixels[None].astype(np.float32) / 255, 2048, 0), factor=(0.5, 1.5))
    plain, luma = pixels.astype(np.float32) / 255, np.asarray(augment_images.LUMA) / 65536
    mean = np.rint(pixels.mean((0, 1))) / 255
    base = {"brightness": np.zeros(1), "contrast": [[mean @ luma]], "saturation": (plain @ luma)[..., None]}[name]
    away = (plain - base).reshape(-1)
    factor = ((found - np.asarray(base)).reshape(2048, -1) @ away) / (away @ away)
    assert scipy.stats.kstest(factor, scipy.stats.uniform(0.5, 1).cdf).pvalue > 1e-3
    pillow = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    for image, by in zip(found[:20], factor.tolist()):
        expected = np.asarray(pillow[name](Image.fromarray(pixels)).enhance(by))
        assert np.abs(image * 255 - expected).max() < 2.1  # Pillow rounds twice


# Interpolation


@pytest.mark.parametrize("numbers", [(1, 0, 0, 1, 0, 0), (0.75, 0.25, -0.5, 1.125, 1.5, -2.25), (0, 1, -1, 0, 0, 3)])
def test_affine_is_that_of_scipy(numbers):
    yy, yx, xy, xx, down, right = numbers
    image = noise(1, 9, 12, 2)[0]
    y, x = np.meshgrid(np.arange(9) - 4.0, np.arange(12) - 5.5, indexing="ij")
    at = [yy * y + yx * x - down + 4.0, xy * y + xx * x - right + 5.5]
    expected = np.stack([
        scipy.ndimage.map_coordinates(np.pad(image[..., c], 9), [a + 9 for a in at], order=1) for c in range(2)
    ], -1)  # fmt: skip
    found = jax.jit(augment_images.affine)(image, *map(np.float32, numbers))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_a_resized_box_is_that_of_scipy():
    images = np.concatenate([ramps(8, 11, 14), noise(8, 11, 14, 1)], -1)
    found = many("resized_crop", images)
    for image, result in zip(images, found):
        at = [(result[..., axis] - 0.25) * 2 * (side - 1) for axis, side in enumerate((11, 14))]
        expected = scipy.ndimage.map_coordinates(image[..., 2], at, order=1, mode="nearest")
        np.testing.assert_allclose(result[..., 2], expected, atol=1e-4)


def test_a_quarter_turn_moves_pixels_only():
    image = noise(1, 8, 8)[0]
    turned = jax.jit(augment_images.affine)(image, *map(np.float32, (0, 1, -1, 0)))
    assert np.array_equal(turned, np.rot90(image)) or np.array_equal(turned, np.rot90(image, -1))


# mixup and cutmix


def shares(found):
    """How much of itself, and of the example before, each of `batch_of` has in its targets."""
    own = np.arange(len(found)) % 10
    return found[np.arange(len(found)), own], found[np.arange(len(found)), np.roll(own, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_the_draws_are_beta(alpha):
    keys = example_keys(0, np.arange(20_000), 0)
    found = np.asarray(jax.jit(jax.vmap(lambda key: augment_mixing.symmetric_beta(key, alpha)))(keys), np.float64)
    exact = scipy.stats.beta(alpha, alpha)
    assert found.min() >= 0 and found.max() <= 1
    # Kolmogorov and Smirnov's distance, but for the ends: there float32 rounds to 0 and 1.
    points = np.linspace(1e-3, 1 - 1e-3, 999)
    below = np.searchsorted(np.sort(found), points) / len(found)
    assert np.abs(below - exact.cdf(points)).max() < 1.95 / np.sqrt(len(found))
    for power in (1, 2, 3, 4):
        np.testing.assert_allclose(np.mean(found**power), exact.moment(power), atol=0.01)


@pytest.mark.slow
def test_extreme_alphas_are_finite():
    keys = example_keys(0, np.arange(2000), 0)
    for alpha, width in ((0.001, 0.5), (1000.0, 0.011)):
        found = np.asarray(jax.jit(jax.vmap(lambda key, a=alpha: augment_mixing.symmetric_beta(key, a)))(keys))
        assert np.all(np.isfinite(found)) and abs(np.std(found) - width) < 0.01 and abs(np.mean(found) - 0.5) < 0.03


def test_mixup_mixes_images_and_targets_alike():
    batch = batch_of(noise(2000, 4, 4))
    found = changed(batch, {"name": "mixup", "alpha": 0.4})
    own, other = shares(found["targets"])
    np.testing.assert_allclose(own + other, 1, atol=1e-6)
    np.testing.assert_allclose(found["targets"].sum(-1), 1, atol=1e-6)
    share = own[:, None, None, None]
    expected = share * batch["inputs"] + (1 - share) * np.roll(batch["inputs"], 1, 0)
    np.testing.assert_allclose(found["inputs"], expected, atol=1e-6)
    assert scipy.stats.kstest(own, scipy.stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_cutmix_replaces_a_box_and_its_share_of_the_target():
    side, count = 16, 4000
    batch = batch_of((np.arange(count, dtype=np.float32)[:, None, None, None] / count) * np.ones((1, side, side, 1)))
    batch["inputs"] = batch["inputs"].astype(np.float32)
    found = changed(batch, {"name": "cutmix", "alpha": 1.0})
    before = np.roll(batch["inputs"], 1, 0)
    boxed = found["inputs"] == before
    assert np.all(boxed | (found["inputs"] == batch["inputs"]))
    tall, wide = (boxed[..., 0].any(axis).sum(-1) for axis in (2, 1))
    assert np.all(boxed.sum((1, 2, 3)) == tall * wide)
    own, other = shares(found["targets"])
    np.testing.assert_allclose(other, boxed.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(own + other, 1, atol=1e-6)
    # Against a simulation of the paper's box: its centre anywhere, what is outside lost.
    rng = np.random.default_rng(0)
    size = np.rint(np.sqrt(rng.random(200_000)) * side)
    inside = np.ones(200_000)
    for _ in range(2):
        start = rng.integers(0, side, 200_000) - size // 2
        inside *= np.minimum(start + size, side) - np.maximum(start, 0)
    np.testing.assert_allclose(np.mean(other), np.mean(inside) / side**2, atol=0.01)
    np.testing.assert_allclose(np.std(other), np.std(inside) / side**2, atol=0.01)


@pytest.mark.parametrize("name", ["cutmix", pytest.param("mixup", marks=pytest.mark.slow)])
def test_padding_is_never_mixed_in(name):
    weights = np.ones(B)
    weights[[3, 4, B - 1]] = 0
    batch = batch_of(noise(), weights)
    found = changed(batch, spec(name))
    for kept in (4, 5, 0):  # those after padding
        np.testing.assert_array_equal(found["inputs"][kept], batch["inputs"][kept])
        np.testing.assert_array_equal(found["targets"][kept], np.eye(10)[kept])
    assert np.all(np.isfinite(found["inputs"]))
    own, _ = shares(found["targets"])
    assert np.mean(own < 1) > 0.5
    np.testing.assert_array_equal(found["weights"], weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXING)
def test_a_share_of_the_examples_is_mixed(name):
    own, _ = shares(changed(batch_of(noise(4000, 4, 4, 1)), spec(name, alpha=50.0, probability=0.25))["targets"])
    assert abs(np.mean(own < 1) - 0.25) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("names", [("mixup", "cutmix"), ("cutmix", "mixup")])
def test_what_is_mixed_can_be_mixed_again(names):
    batch = batch_of(noise())
    once, twice = changed(batch, spec(names[0])), changed(batch, *map(spec, names))
    np.testing.assert_allclose(twice["targets"].sum(-1), 1, atol=1e-6)
    assert np.max(np.count_nonzero(once["targets"], -1)) == 2 and np.max(np.count_nonzero(twice["targets"], -1)) == 3


@pytest.mark.slow
def test_float_targets_are_mixed_as_they_are():
    batch = {**batch_of(noise()), "targets": np.arange(B, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)}
    found = changed(batch, {"name": "mixup", "alpha": 1.0})["targets"]
    classes = shares(changed(batch_of(noise()), {"name": "mixup", "alpha": 1.0})["targets"])[0][:, None]
    expected = classes * batch["targets"] + (1 - classes) * np.roll(batch["targets"], 1, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_mixed_targets_train():
    batch = batch_of(noise())
    augmented = make((spec("crop", padding=2), spec("mixup")), seed=0, facts=FACTS)

    def loss(weights):
        mixed = augmented(batch, np.arange(B), np.int32(0))
        outputs = mixed["inputs"].reshape(B, -1) @ weights
        return losses.softmax_cross_entropy(outputs, mixed, label_smoothing=0.1)["loss"][0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(np.zeros((SIDE * SIDE * 3, 10), np.float32))
    np.testing.assert_allclose(value, B * np.log(10), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


# randaugment


def pixels(seed=0):
    """Smooth, of different range in each channel, as photographs are."""
    rng = np.random.default_rng(seed)
    rough = scipy.ndimage.gaussian_filter(rng.random((16, 16, 3)), (2, 2, 0))
    scaled = (rough - rough.min((0, 1))) / np.ptp(rough, (0, 1))
    return (40 + scaled * [180, 120, 60]).astype(np.uint8)


PILLOW = {
    "identity": (lambda image, s: image, 0),
    "autocontrast": (lambda image, s: ImageOps.autocontrast(image), 1.5),
    "brightness": (lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s), 1.5),
    "contrast": (lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s), 2.1),
    "saturation": (lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s), 2.1),
    "sharpness": (lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s), 2.1),
    "posterize": (lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))), 0.01),
    "solarize": (lambda image, s: ImageOps.solarize(image, int(255 * (1 - abs(s))) + 1), 0.01),
}


@pytest.mark.parametrize("name", PILLOW)
def test_colours_change_as_in_pillow(name):
    reference, tolerance = PILLOW[name]
    operation = jax.jit(randaugment.COLOURS[name])
    for strength in (-0.9, 0.3, 0.5, 1.0):
        found = np.asarray(operation(pixels().astype(np.float32) / np.float32(255), np.float32(strength)))
        expected = np.asarray(reference(Image.fromarray(pixels()), strength), np.float32)
        assert np.abs(found * 255 - expected).max() <= tolerance, strength


def test_equalize_makes_the_histogram_flat():
    equalize = jax.jit(randaugment.COLOURS["equalize"])
    image = noise(1, 64, 64, 2)[0] ** 3
    image[..., 1] = 0.3  # of a single value: stays
    found = np.asarray(equalize(image, 0.0))
    levels = np.round(image[..., 0] * 255)
    darker = (levels.ravel()[None] < levels.ravel()[:, None]).sum(-1).reshape(64, 64)
    np.testing.assert_allclose(found[..., 0], darker / darker.max(), atol=1e-6)
    np.testing.assert_array_equal(found[..., 1], image[..., 1])
    by_pillow = np.asarray(ImageOps.equalize(Image.fromarray(levels.astype(np.uint8))), np.float32)
    assert (
        np.abs(found[..., 0] * 255 - by_pillow).mean() < 6
        and np.corrcoef(found[..., 0].flat, by_pillow.flat)[0, 1] > 0.99
    )


def test_places_change_as_they_should():
    found = {name: np.asarray(f(0.5, 20, 40), np.float64) for name, f in randaugment.PLACES.items()}
    turn = np.cos(np.radians(15)), np.sin(np.radians(15))
    np.testing.assert_allclose(found["rotate"], (turn[0], turn[1], -turn[1], turn[0], 0, 0), atol=1e-6)
    np.testing.assert_allclose(found["shear_x"], (1, 0, 0.15, 1, 0, 0))
    np.testing.assert_allclose(found["shear_y"], (1, 0.15, 0, 1, 0, 0))
    np.testing.assert_allclose(found["shift_x"], (1, 0, 0, 1, 0, 9))
    np.testing.assert_allclose(found["shift_y"], (1, 0, 0, 1, 4.5, 0))


@pytest.mark.slow
def test_operations_are_drawn_alike_and_go_either_way(monkeypatch):
    """Each operation writes down what it was given."""
    writes = {str(i): lambda image, s, i=i: jnp.full_like(image, (i + 0.5 * (s > 0)) / 10) for i in range(4)}
    writes["strength"] = lambda image, s: jnp.full_like(image, 0.5 + jnp.abs(s) / 10)
    monkeypatch.setattr(randaugment, "COLOURS", {"identity": lambda image, s: image, **writes})
    monkeypatch.setattr(randaugment, "PLACES", {"shift": lambda s, height, width: (1, 0, 0, 1, 0, jnp.sign(s))})
    images = np.zeros((7000, 1, 3, 1), np.float32)
    images[:, 0, 1] = 1
    function = make(({"name": "randaugment", "count": 1, "magnitude": 4},), seed=0, facts={})
    found = np.asarray(jax.jit(function)(batch_of(images), np.arange(7000), 0)["inputs"]).reshape(7000, 3)
    codes = [(0, 1, 0), (1, 0, 0), (0, 0, 1), *[(i / 10,) * 3 for i in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)], (0.54,) * 3]
    counts = np.asarray([np.all(np.abs(found - code) < 1e-6, -1).sum() for code in codes])
    assert counts.sum() == 7000
    assert scipy.stats.chisquare(counts, np.asarray([2, *[1] * 10, 2]) * 500).pvalue > 1e-3


@pytest.mark.slow
def test_each_round_draws_again():
    images = np.repeat(noise(1, 12, 12), 64, 0)
    one, two, three = (many("randaugment", images, count=count) for count in (1, 2, 3))
    distinct = [len({image.tobytes() for image in found}) for found in (one, two, three)]
    assert distinct[0] <= 14 * 2 < distinct[1] < distinct[2]


# What is refused

LIST = r'expected a list of dicts, each with a "name", such as \({"name": "flip"},\)'


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (({"name": "flipp"},), r"data.augment\[0\].name='flipp' does not exist. Did you mean 'flip'"),
        (({"name": "crop"}, {"name": "crop", "paddin": 4}), r"data.augment\[1\].paddin=4: unknown key. Did you mean"),
        (({"name": "crop", "padding": -1},), r"data.augment\[0\].padding=-1 is out of range"),
        (({"name": "crop", "padding": 1.5},), r"data.augment\[0\].padding=1.5 has the wrong type: expected an integer"),
        (({"name": "crop", "mode": "mirror"},), r"mode='mirror' has the wrong type: .*'zeros', 'reflect'"),
        (({"name": "flip", "horizontal": 1.5},), r"horizontal=1.5 is out of range.*between 0 and 1"),
        (({"name": "rotate", "degrees": 200.0},), r"degrees=200.0 is out of range.*between 0 and 180"),
        (({"name": "zoom", "factor": (0.0, 1.0)},), r"factor=\(0.0, 1.0\) is out of range.*between 0.1 and 10"),
        (({"name": "zoom", "factor": 2.0},), r"factor=2.0 has the wrong type"),
        (({"name": "mixup", "alpha": 0.0},), r"alpha=0.0 is out of range"),
        (({"name": "mixup", "classes": 9},), r"data.augment\[0\].classes=9, but the data have 10: leave it out"),
        (({"name": "mixup", "batch": 9},), r"data.augment\[0\].batch=9: unknown key"),
        (({"name": "crop", "image": 9},), r"data.augment\[0\].image=9: unknown key"),
        (({"name": "randaugment", "count": 0},), r"count=0 is out of range"),
        (({"padding": 4},), rf"data.augment\[0\]={{'padding': 4}}: {LIST}. There are: brightness"),
        (("flip",), rf"data.augment\[0\]='flip': {LIST}. There are: brightness"),
        ("flip", rf"data.augment='flip' has the wrong type: {LIST}"),
        ({"name": "flip"}, rf"data.augment={{'name': 'flip'}} has the wrong type: {LIST}"),
        (None, rf"data.augment=None has the wrong type: {LIST}"),
    ],
)  # fmt: skip
def test_make_refuses(specs, message):
    with pytest.raises(UserError, match=message):
        make(specs, seed=0, facts=FACTS)


TOKENS = {"inputs": np.zeros((B, 8), np.int32), "targets": np.zeros((B, 8), np.int32), "weights": np.ones((B, 8))}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (np.zeros((B, 8), np.int32), r"int32 \(16, 8\)"),
        (np.zeros((B, 8, 8), np.float32), r"float32 \(16, 8, 8\)"),
        (np.zeros((B, 8, 8, 1), np.uint8), r"uint8 \(16, 8, 8, 1\)"),
        ({"tokens": np.zeros((B, 8), np.int32)}, r"{'tokens': 'int32 \(16, 8\)'}"),
    ],
)
def test_what_is_no_image_is_refused(name, inputs, said):
    function = make(({"name": name},), seed=0, facts=FACTS)
    with pytest.raises(UserError, match=f"data.augment has '{name}', which is for images: .* The inputs are {said}"):
        jax.eval_shape(function, {**TOKENS, "inputs": inputs}, np.arange(B), np.int32(0))


@pytest.mark.parametrize("name", MIXING)
def test_targets_that_can_not_be_mixed_are_refused(name):
    images = noise()
    function = make(({"name": name},), seed=0, facts={})
    with pytest.raises(UserError, match=f"'{name}', but the data do not say how many classes there are: set 'classes'"):
        jax.eval_shape(function, batch_of(images), np.arange(B), np.int32(0))
    for part in ({"targets": np.zeros((B, 8), np.int32)}, {"weights": np.ones((B, 8))}):
        with pytest.raises(UserError, match=f"'{name}', which is for one target an example"):
            jax.eval_shape(function, {**batch_of(images), **part}, np.arange(B), np.int32(0))
    given = make(({"name": name, "classes": 12},), seed=0, facts={})
    assert jax.eval_shape(given, batch_of(images), np.arange(B), np.int32(0))["targets"].shape == (B, 12)


@pytest.mark.parametrize(("name", "options"), [("crop", {"padding": SIDE}), ("shift", {"fraction": 1.0})])
def test_reflections_of_more_than_the_image_are_refused(name, options):
    function = make(({"name": name, "mode": "reflect", **options},), seed=0, facts={})
    with pytest.raises(UserError, match=f"'{name}' with mode='reflect' and 10 pixels of padding: .* 10 x 10"):
        jax.eval_shape(function, batch_of(noise()), np.arange(B), np.int32(0))


@pytest.mark.parametrize(("height", "width"), [(SIDE, 8), (8, SIDE)])
def test_a_cutout_of_more_than_the_image_is_refused(height, width):
    images = noise(2, height, width)
    function = make(({"name": "cutout", "size": 9},), seed=0, facts={})
    with pytest.raises(UserError, match=f"'cutout' with size=9, .* {height} x {width}, .* a size of at most 8"):
        jax.eval_shape(function, batch_of(images), np.arange(2), np.int32(0))
    fits = make(({"name": "cutout", "size": 8},), seed=0, facts={})
    assert jax.eval_shape(fits, batch_of(images), np.arange(2), np.int32(0))["inputs"].shape == images.shape


def test_your_own(tmp_path, monkeypatch):
    (tmp_path / "my_augmentations.py").write_text(
        "import jax\n"
        "from flaxmodels.data.augment import per_image\n"
        "@per_image\n"
        "def noise(image, key, *, scale: float = 0.1, classes: int = 0):\n"
        "    return image + classes + scale * jax.random.normal(key, image.shape)\n"
        "def forgets(batch, keys):\n"
        "    return {'inputs': batch['inputs'][:, 1:], 'targets': batch['targets'], 'weights': batch['weights']}\n"
        "def returns_images(batch, keys):\n"
        "    return batch['inputs']\n"
        "def tokens(batch, keys):\n"
        "    return {**batch, 'inputs': batch['inputs'] + 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = batch_of(noise())
    found = changed(batch, {"name": "my_augmentations:noise", "scale": 0.5})["inputs"]
    assert found.dtype == np.float32 and abs(np.std(found - batch["inputs"]) - 0.5) < 0.02
    assert abs(np.mean(found - batch["inputs"]) - 10) < 0.05  # `classes`, which the data know
    index = np.arange(B)
    for name, message in (
        ("forgets", r"float32 \(16, 9, 10, 3\).*float32 \(16, 10, 10, 3\)"),
        ("returns_images", "Dyn|Jax"),
    ):
        with pytest.raises(UserError, match=rf"data.augment\[0\] returned .*{message}"):
            jax.eval_shape(make(({"name": f"my_augmentations:{name}"},), seed=0, facts={}), batch, index, np.int32(0))
    with pytest.raises(UserError, match=r"data.augment\[0\].scale='much' has the wrong type"):
        make(({"name": "my_augmentations:noise", "scale": "much"},), seed=0, facts={})
    plain = make(({"name": "my_augmentations:tokens"},), seed=0, facts={})
    assert np.all(np.asarray(jax.jit(plain)(TOKENS, index, np.int32(0))["inputs"]) == 1)


def test_lists_of_a_config_are_taken():
    listed = [{"name": "brightness", "factor": [0.5, 2.0]}]
    (function,) = augment.bound(listed, AUGMENTATIONS, "data.augment", augment.PROVIDED, {})
    assert function.keywords == {"factor": (0.5, 2.0)} and function.func is augment_images.brightness
    assert jax.eval_shape(make(listed, seed=0, facts={}), batch_of(noise()), np.arange(B), np.int32(0))
