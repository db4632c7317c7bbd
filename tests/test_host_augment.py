"""Augmentation on the host: of which randomness, in which order, what it does, and what it refuses."""

import concurrent.futures
import multiprocessing

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from flaxmodels.data import host_augment, order
from flaxmodels.data.host_augment import AUGMENTATIONS, apply, make
from flaxmodels.data.split import SKIP
from flaxmodels.registry import UserError


def rows_of(images):
    return {"image": images, "label": np.arange(len(images), dtype=np.int32)}


def noise(count=8, height=9, width=12, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def changed(images, *specs, index=None, step=0, seed=0):
    index = np.arange(len(images), dtype=np.int32) if index is None else index
    return apply(make(specs), rows_of(images), seed, step, index)["image"]


def ramps(count, height, width, factor=5):
    """Images of two channels that say where each pixel was: `factor` times its row, and its column."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.broadcast_to(factor * np.stack([y, x], -1).astype(np.uint8), (count, height, width, 2))


def draw(example, rng, *, scale: float = 1.0):
    return {**example, "label": np.asarray(rng.integers(0, 2**31 * scale), np.int32)}


def write(example, rng):
    example["image"][:] = 0
    return example


def shorten(example, rng):
    return {**example, "image": example["image"][1:]}


def widen(example, rng):
    return {**example, "image": example["image"] / 2}


def add(example, rng):
    return {**example, "mask": example["image"]}


def forget(example, rng):
    return example["image"]


OWN = {"name": f"{__name__}:draw"}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_randomness_is_of_seed_step_and_example_only(name):
    images, index, options = noise(64), np.arange(64) + 100, {"name": name}
    first = changed(images, options, index=index, step=5, seed=1)
    assert first.dtype == np.uint8 and first.shape == images.shape
    np.testing.assert_array_equal(first, changed(images, options, index=index, step=5, seed=1))
    for place in ({"step": 6, "seed": 1}, {"step": 5, "seed": 2}, {"step": 5, "seed": 1, "index": index + 1}):
        other = changed(images, options, **{"index": index, **place})
        assert np.mean(np.all(first == other, (1, 2, 3))) < 0.7
    some = np.asarray([40, 3, 17])
    np.testing.assert_array_equal(changed(images[some], options, index=index[some], step=5, seed=1), first[some])


def test_each_example_has_the_generator_of_its_key():
    index = np.asarray([7, 2**31 - 1, 0])
    found = apply(make([OWN]), rows_of(noise(3)), 2**32 - 1, 2**31 - 1, index)["label"]
    keys = [np.asarray([(2**32 - 1) + 2**32, (2**31 - 1) * 2**32 + i], np.uint64) for i in index.tolist()]
    expected = [np.random.Generator(np.random.Philox(key=key)).integers(0, 2**31) for key in keys]
    np.testing.assert_array_equal(found, expected)


def test_draws_are_all_different_and_not_those_of_the_order():
    index = np.arange(200)
    labels = [
        apply(make([OWN]), rows_of(noise(200, 1, 1, 1)), seed, at, index)["label"] for seed in (0, 1) for at in (0, 1)
    ]
    assert len(np.unique(labels)) > 795
    assert not np.array_equal(np.argsort(labels[0], kind="stable"), order.permutation(0, 0, 200))


def test_functions_share_the_generator_and_come_in_order():
    rows = rows_of(noise())
    index = np.arange(8)
    once, twice = (apply(make([OWN] * n), rows, 0, 0, index)["label"] for n in (1, 2))
    assert not np.any(once == twice)
    last = apply(make([OWN, {"name": f"{__name__}:write"}, {"name": "crop", "padding": 0}]), rows, 0, 0, index)
    assert not np.any(last["image"])
    np.testing.assert_array_equal(last["label"], once)


def test_rows_stay_as_they_were_and_padding_and_what_is_skipped_too():
    images = noise()
    rows = {**rows_of(images.copy()), SKIP: np.asarray([False, True] + [False] * 6)}
    index = np.asarray([0, 1, 2, -1, 4, 5, 6, -1])
    found = apply(make([{"name": f"{__name__}:write"}]), rows, 0, 0, index)
    np.testing.assert_array_equal(rows["image"], images)
    np.testing.assert_array_equal(found["image"][[1, 3, 7]], images[[1, 3, 7]])
    assert not np.any(found["image"][[0, 2, 4, 5, 6]])
    np.testing.assert_array_equal(found[SKIP], rows[SKIP])
    rows["image"].setflags(write=False)  # such as a mapped file
    np.testing.assert_array_equal(
        apply(make([{"name": f"{__name__}:write"}]), rows, 0, 0, index)["image"], found["image"]
    )


def test_without_any_rows_are_themselves():
    rows = rows_of(noise())
    assert apply(make(()), rows, 0, 0, np.arange(8)) is rows


def work(step):
    functions = make([{"name": name} for name in AUGMENTATIONS])
    return apply(functions, rows_of(noise()), 3, step, np.arange(8))["image"]


def test_threads_make_the_same():
    alone = [work(step) for step in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(work, range(40))):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_another_process_makes_the_same():
    functions = make([{"name": name} for name in AUGMENTATIONS])  # travels
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(apply, functions, rows_of(noise()), 3, 11, np.arange(8)).result(timeout=120)
    np.testing.assert_array_equal(there["image"], work(11))


# What ours do


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("crop", {"padding": 0}),
        ("flip", {"horizontal": 0.0}),
        ("resized_crop", {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}),
    ],
)
def test_nothing_is_exactly_nothing(name, options):
    images = noise(8, 11, 11)
    np.testing.assert_array_equal(changed(images, {"name": name, **options}), images)


def test_flips_come_at_their_rates():
    images = np.repeat(noise(1, 3, 4, 1), 4000, 0)
    found = changed(images, {"name": "flip", "horizontal": 0.3, "vertical": 0.8})
    total = 0.0
    for across in (0, 1):
        for down in (0, 1):
            rate = np.mean(np.all(found == images[:, :: -1 if down else 1, :: -1 if across else 1], (1, 2, 3)))
            assert abs(rate - (0.3 if across else 0.7) * (0.8 if down else 0.2)) < 0.02
            total += rate
    assert total == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_crops_are_uniform(mode):
    image = noise(1, 6, 7, 2)
    found = changed(np.repeat(image, 4000, 0), {"name": "crop", "padding": 2, "mode": mode})
    wide = np.pad(image[0], [(2, 2), (2, 2), (0, 0)], mode="reflect" if mode == "reflect" else "constant")
    windows = [wide[y : y + 6, x : x + 7].tobytes() for y in range(5) for x in range(5)]
    counts = np.bincount([windows.index(image.tobytes()) for image in found], minlength=25)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_boxes_of_resized_crop():
    height, width = 30, 40
    found = changed(ramps(3000, height, width), {"name": "resized_crop", "area": (0.2, 0.5), "aspect": (0.8, 1.25)})
    found = found.astype(float) / 5
    tall = (found[:, -4, width // 2, 0] - found[:, 3, width // 2, 0]) / (height - 7) * height
    wide = (found[:, height // 2, -4, 1] - found[:, height // 2, 3, 1]) / (width - 7) * width
    assert scipy.stats.kstest(tall * wide / (height * width), scipy.stats.uniform(0.2, 0.3).cdf).statistic < 0.04
    low, high = np.log(0.8), np.log(1.25)
    assert scipy.stats.kstest(np.log(wide / tall), scipy.stats.uniform(low, high - low).cdf).statistic < 0.04
    for axis, long, side in ((0, tall, height), (1, wide, width)):
        middle = found[..., axis].mean((1, 2)) + 0.5
        place = (middle - long / 2) / (side - long)
        assert scipy.stats.kstest(np.clip(place, 0, 1), scipy.stats.uniform(0, 1).cdf).statistic < 0.04


@pytest.mark.parametrize(("aspect", "full"), [(4.0, 1), (0.25, 0)])
def test_a_box_that_fits_nowhere_is_cut_to_the_image(aspect, full):
    images = ramps(8, 16, 16)
    found = changed(images, {"name": "resized_crop", "area": (1.0, 1.0), "aspect": (aspect, aspect)}).astype(int)
    assert np.abs(found[..., full] - images[..., full]).max() <= 1  # the long side: as long as the image
    ends = found[:, 4, 4, 1 - full], found[:, 12, 12, 1 - full]
    assert set((ends[1] - ends[0]).tolist()) <= {19, 20, 21}  # the other half as long


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_resized_box_is_bilinear(channels):
    smooth = scipy.ndimage.gaussian_filter(noise(4, 20, 24, channels).astype(float), (0, 4, 4, 0)).astype(np.uint8)
    spec = {"name": "resized_crop", "area": (0.3, 0.6)}
    places = changed(ramps(4, 20, 24, 10), spec).astype(float) / 10
    for image, result, place in zip(smooth, changed(smooth, spec), places):
        for channel in range(channels):
            expected = scipy.ndimage.map_coordinates(
                image[..., channel].astype(float), [place[..., 0], place[..., 1]], order=1
            )
            inner = np.abs(result[..., channel] - expected)[1:-1, 1:-1]
            assert inner.max() < 4


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_inputs_of_bytes_are_images(name):
    """As `arrays` has them."""
    images = noise()
    rows = {"inputs": images, "targets": np.arange(8)}
    found = apply(make(({"name": name},)), rows, 0, 3, np.arange(8))
    np.testing.assert_array_equal(found["inputs"], changed(images, {"name": name}, step=3))
    assert sorted(found) == ["inputs", "targets"] and not np.array_equal(found["inputs"], images)
    both = apply(make(({"name": name},)), {"image": images, "inputs": images}, 0, 3, np.arange(8))
    np.testing.assert_array_equal(both["inputs"], images, "beside an image they are something else")


# What is refused


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            ({"name": "rotate"},),
            r"data.host_augment\[0\].name='rotate' does not exist. There are: crop, flip, resized_",
        ),
        (({"name": "flip", "rng": 1},), r"data.host_augment\[0\].rng=1: unknown key"),
        (({"name": "flip"}, {"name": "crop", "padding": "2"}), r"host_augment\[1\].padding='2' has the wrong type"),
        (({**OWN, "scale": -1.0},), r"data.host_augment\[0\].scale=-1.0 is out of range"),
        (({},), r"data.host_augment\[0\]={}: expected a list of dicts, each with a \"name\".* There are: crop, "),
        ("flip", r"data.host_augment='flip' .*expected a list of dicts.* such as \({\"name\": \"flip\"},\)"),
    ],
)
def test_make_refuses(specs, message):
    with pytest.raises(UserError, match=message):
        make(specs)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(
    "rows",
    [
        {"tokens": np.zeros((2, 5), np.int32)},
        {"image": np.zeros((2, 5, 5), np.uint8)},
        {"inputs": np.zeros((2, 5, 5), np.uint8)},
        {"inputs": np.zeros((2, 5, 5, 3), np.float32)},
    ],
)
def test_what_is_no_image_is_refused(name, rows):
    with pytest.raises(
        UserError,
        match=rf"{name!r}, which is for an entry 'image' .* has '(tokens|image|inputs)' (int32|uint8|float32) \(5",
    ):
        apply(make(({"name": name},)), rows, 0, 0, np.arange(2))


def test_a_box_of_floats_is_refused():
    with pytest.raises(
        UserError, match=r"'resized_crop', which is for images of uint8: .*float32 \(4, 4, 3\). Use the"
    ):
        changed(np.zeros((1, 4, 4, 3), np.float32), {"name": "resized_crop"})


def test_a_reflection_of_more_than_the_image_is_refused():
    with pytest.raises(UserError, match=r"'crop' with mode='reflect' and 9 pixels of padding: .* 9 x 12"):
        changed(noise(), {"name": "crop", "padding": 9, "mode": "reflect"})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (shorten, r"\(8, 12, 3\)"),
        (widen, "float64"),
        (add, "'mask'"),
        (forget, "ndarray"),
    ],
)
def test_what_would_change_the_batch_is_refused(function, message):
    specs = [{"name": "flip"}, {"name": f"{__name__}:{function.__name__}"}]
    with pytest.raises(UserError, match=rf"data.host_augment\[1\] returned .*{message}.*must stay what they were"):
        changed(noise(), *specs)


def test_the_purpose_is_in_the_key():
    assert 0 < host_augment.PURPOSE < 2**32
