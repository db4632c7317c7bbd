import functools
import importlib.util
import io
import json
import pickle
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxmodels.data import builders, prepared, tfds_sets
from flaxmodels.data.split import SKIP
from flaxmodels.data.tfds_source import tfds as source
from flaxmodels.registry import UserError, bind

SIZES = {"train": 90, "test": 20}


def prepare(folder, name, features, generate, sizes=None, shards=3, supervised=("image", "label")):
    """Prepare a data set in `folder`; TFDS forgets the code that did it."""
    import tensorflow_datasets as tfds

    class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features(tfds.features)),
                supervised_keys=supervised,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(s, n) for s, n in (sizes or SIZES).items()}

        def _generate_examples(self, split, count):
            for i in range(count):
                yield i, generate(split, i)

    Base.name = name
    tfds.disable_progress_bar()
    builder = Base(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
    )
    return Path(builder.data_path)


def plain_features(features):
    return {
        "image": features.Tensor(shape=(4, 3, 1), dtype=np.uint8, encoding="bytes"),
        "label": features.ClassLabel(names=["cat", "dog", "owl"]),
        "more": {
            "value": features.Scalar(np.float32),
            "count": np.int64,
            "at": features.Tensor(shape=(2,), dtype=np.float32),
        },
        "words": features.Text(),
        "ragged": features.Sequence(np.int64),
        "wide": features.Tensor(shape=(5,), dtype=np.int32),
    }


def plain_example(split, i):
    rng = np.random.default_rng([i, split == "train"])
    return {
        "image": rng.integers(0, 256, (4, 3, 1)).astype(np.uint8),
        "label": i % 3,
        "more": {"value": i / 7, "count": i * 100, "at": np.float32([i, -i])},
        "words": "word " * (i % 4),
        "ragged": list(range(i % 3)),
        "wide": np.arange(i, i + 5, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    prepare(folder, "plain", plain_features, plain_example)
    return folder


def load(folder, dataset="plain", **options):
    return source(**bind(source, {"dataset": dataset, "data_dir": str(folder), **options}, where="data"))


def whole(split):
    return split.read().arrays


def expected(split, indices):
    examples = [plain_example(split, i) for i in indices]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def assert_holds(split, name, indices):
    rows = whole(split)
    image, label = expected(name, indices)
    np.testing.assert_array_equal(rows["image"], image)
    np.testing.assert_array_equal(rows["label"], label)
    assert rows["image"].dtype == np.uint8 and rows["label"].dtype == np.int32


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", sorted((tmp_path / "copy/plain/1.0.0").glob("plain-train.array_record*"))


def test_reads_a_folder_without_its_code(folder):
    found = load(folder)
    assert found.name == "plain/1.0.0"
    assert found.facts == {"classes": 3} and found.labels == ("cat", "dog", "owl")
    assert found.transforms == {"inputs": "image", "targets": "label", "shape": [4, 3, 1]}
    assert_holds(found.train, "train", range(90))
    assert_holds(found.test, "test", range(20))
    assert len(set(found.train.gather.keywords["part"].records.files)) == 3


def test_our_own_builders_write_such_sets(tmp_path):
    """What `prepared` decodes at once is what is read here, record by record."""
    arrays = prepared.load(builders.DIGITS, str(tmp_path)).arrays
    found = load(tmp_path, builders.DIGITS.name)
    for split, name in ((found.train, "train"), (found.test, "test")):
        rows = whole(split)
        np.testing.assert_array_equal(rows["image"], arrays[name]["image"])
        np.testing.assert_array_equal(rows["label"], arrays[name]["label"])


def test_a_stored_split_knows_its_bytes(folder):
    for policy in ("raise", "skip"):
        found = load(folder, on_corrupt=policy)
        for split in (found.train, found.test):
            assert not split.arrays and split.stored == split.nbytes == sum(a.nbytes for a in whole(split).values())


def test_rows_become_a_batch(folder):
    split = load(folder).train
    index = np.array([5, -1, 88, 5, 0], np.int32)
    rows = split.gather(split.arrays, index)
    assert set(rows) == {"image", "label"}
    for batch in (split.prepare(rows, index), jax.jit(split.prepare)(rows, index)):
        assert batch["inputs"].shape == (5, 4, 3, 1) and batch["inputs"].dtype == jnp.float32
        assert batch["targets"].dtype == jnp.int32 and batch["weights"].dtype == jnp.float32
        assert np.asarray(batch["weights"]).tolist() == [1, 0, 1, 1, 1]
        image, label = expected("train", [5, 88, 5, 0])
        np.testing.assert_allclose(np.asarray(batch["inputs"])[[0, 2, 3, 4]], image / 255, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(batch["targets"])[[0, 2, 3, 4]], label)
        assert float(np.max(batch["inputs"])) <= 1


@pytest.mark.parametrize(
    ("expression", "indices"),
    [
        ("train[:80%]", range(72)),
        ("train[25:65]", range(25, 65)),
        ("train[80:]+train[:7]", [*range(80, 90), *range(7)]),
        ("train[-3:]", range(87, 90)),
    ],
)
def test_slices(folder, expression, indices):
    found = load(folder, train=expression)
    assert found.train.size == len(indices)
    assert_holds(found.train, "train", indices)
    assert_holds(found.test, "test", range(20))


def test_splits_can_be_added(folder):
    rows = whole(load(folder, train="test[:5]+train[88:]", test="all").train)
    parts = [expected("test", range(5)), expected("train", range(88, 90))]
    np.testing.assert_array_equal(rows["image"], np.concatenate([p[0] for p in parts]))
    assert load(folder, test="all").test.size == 110


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": "trian"}, r"data\.train='trian' .*Unknown split 'trian'.*Did you mean 'train'.*test, train"),
        ({"test": "valid"}, r"data\.test='valid' is no split of plain/1\.0\.0.*There are: test, train"),
        ({"train": "train["}, r"data\.train='train\[' is no split .*Unrecognized split format"),
        ({"train": "train[:900]"}, r"data\.train=.*incompatible with 90 examples"),
        ({"train": "train[:0]"}, r"data\.train='train\[:0\]' .*no examples"),
        ({"inputs": "imgae"}, r"data\.inputs='imgae' is no feature of plain/1\.0\.0\. Did you mean 'image'.*more/at"),
        ({"targets": "more"}, r"data\.targets='more' is no feature"),
        ({"targets": "words"}, r"data\.targets='words' is Text.*data\.name=\"csv\""),
        ({"inputs": "words"}, r"data\.inputs='words' is Text.*data\.name=\"csv\""),
        ({"inputs": "ragged"}, r"data\.inputs='ragged' is Sequence.*fixed shape"),
        ({"inputs": "label"}, r"data\.inputs='label' is ClassLabel"),
        ({"size": 8}, r"data\.size=8 is for images"),
        ({"dataset": "plian"}, r"data\.dataset='plian' is unknown to TFDS.*Did you mean 'plain'"),
        ({"dataset": "plain:2.0.0"}, r"data\.dataset='plain:2\.0\.0' is not what is in .*plain: 1\.0\.0"),
        ({"dataset": "pl ain"}, r"data\.dataset='pl ain' is no name"),
        ({"dataset": "hub:plain"}, r"data\.dataset='hub:plain' is no name"),
        ({"dataset": "mnist:9.9.9"}, r"data\.dataset='mnist:9\.9\.9'.*only: 3\.0\.1"),
        ({"dataset": "emnist/leters"}, r"unknown config 'leters'. Did you mean 'letters'"),
        ({"on_corrupt": "ignore"}, r"data\.on_corrupt='ignore'"),
        ({"data_dir": "gs://bucket"}, "must be a local folder"),
    ],
)
def test_what_is_wrong_is_named(folder, options, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        load(folder, **options)
    assert not (folder / "plian").exists(), "no trace of a wrong name"


def test_known_names_have_the_version_asked_for(folder):
    assert load(folder, "plain:1.0.0").name == load(folder, "plain:1.*.*").name == "plain/1.0.0"


def test_numbers_as_targets(folder):
    """Values to come near to: float32 (B, K), and the fact "classes" is K."""
    for name, column in (
        ("more/value", lambda i: [i / 7]),
        ("more/count", lambda i: [i * 100]),
        ("more/at", lambda i: [i, -i]),
    ):
        found = load(folder, targets=name)
        rows = whole(found.train)
        assert rows["label"].dtype == np.float32 and found.labels == ()
        np.testing.assert_allclose(rows["label"], [column(i) for i in range(90)], rtol=1e-6)
        assert found.facts == {"classes": rows["label"].shape[1]}


def test_numbers_as_inputs(folder):
    """Decoded with the fast way, and by TFDS ("wide": varints of many lengths), as they are."""
    for name, dtype, row in (
        ("more/at", np.float32, lambda i: [i, -i]),
        ("more/count", np.int32, lambda i: [i * 100]),
        ("wide", np.int32, lambda i: list(range(i, i + 5))),
    ):
        split = load(folder, inputs=name).train
        index = np.arange(90, dtype=np.int32)
        batch = split.prepare(split.gather({}, index), index)
        assert batch["inputs"].dtype == dtype
        np.testing.assert_array_equal(batch["inputs"], np.array([row(i) for i in range(90)], dtype))


def by_tfds(found, count):
    """Inputs and labels as TFDS's own decoder gives them."""
    import tensorflow_datasets as tfds

    keywords = found.train.gather.keywords
    builder = tfds.builder_from_directory(keywords["folder"])
    examples = builder.as_data_source("train").__getitems__(list(range(count)))
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def test_the_fast_way_decodes_as_tfds_does(folder, monkeypatch):
    from flaxmodels.data import tfds_features

    image, label = by_tfds(load(folder), 90)
    for fast in (True, False):
        if fast:
            monkeypatch.setattr(tfds_features, "one", None)  # nothing is left to it
        else:
            monkeypatch.undo()
            monkeypatch.setattr(
                tfds_features,
                "columns",
                lambda raw, fields: (
                    {f.key: np.zeros((len(raw), *f.shape), f.dtype) for f in fields},
                    np.zeros(len(raw), bool),
                ),
            )
        rows = whole(load(folder).train)
        np.testing.assert_array_equal(rows["image"], image)
        np.testing.assert_array_equal(rows["label"], label)


# Damage


def flip_record(file, number):
    """Damage one record: each is a chunk of its own, behind a header of 40 bytes that has its size at 8."""
    data, at = bytearray(file.read_bytes()), 64
    for _ in range(number):
        at += 40 + int.from_bytes(data[at + 8 : at + 16], "little")
    data[at + 50] ^= 0x40
    file.write_bytes(data)


def test_a_corrupt_record_is_named_or_skipped(folder, tmp_path):
    copy, files = copied(folder, tmp_path)
    for i in (33, 70):
        flip_record(files[i // 30], i % 30)
    with pytest.raises(UserError, match=r"train\.array_record-00001-of-00003: record 3 \(number 33 of all\)"):
        whole(load(copy).train)
    with pytest.raises(UserError, match=r"array_record-00002-of-00003: record 10 .*on_corrupt"):
        whole(load(copy, train="train[65:75]").train)
    split = load(copy, on_corrupt="skip").train
    rows = whole(split)
    image, label = expected("train", range(90))
    assert np.flatnonzero(rows[SKIP]).tolist() == [33, 70]
    good = ~rows[SKIP]
    np.testing.assert_array_equal(rows["image"][good], image[good])
    np.testing.assert_array_equal(rows["label"][good], label[good])
    assert not rows["image"][~good].any() and not rows["label"][~good].any()
    flip_record(files[0], 0)
    load(copy).train.gather({}, np.array([-1, 5, -1], np.int32))  # nothing is read for padding
    some = split.gather({}, np.array([70, -1, 4, 33], np.int32))
    assert some[SKIP].tolist() == [True, False, False, True], "padding is no skipped example"


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_missing_or_truncated_shard(folder, tmp_path, harm):
    copy, files = copied(folder, tmp_path)
    intact = load(copy)
    if harm == "missing":
        files[1].unlink()
    else:
        files[1].write_bytes(files[1].read_bytes()[:70_000])
    with pytest.raises(UserError, match=r"00001-of-00003: record 0 \(number 30 of all\) can't be read"):
        whole(load(copy).train)
    found = load(copy, on_corrupt="skip")
    assert found.train.size == 90, "so that the order of all others stays what it was"
    rows = whole(found.train)
    assert np.flatnonzero(rows[SKIP]).tolist() == list(range(30, 60))
    np.testing.assert_array_equal(rows["image"][~rows[SKIP]], expected("train", [*range(30), *range(60, 90)])[0])
    assert found.fingerprint != intact.fingerprint


def test_skipped_examples_weigh_nothing_in_a_feed(folder, tmp_path):
    """End to end: `feed` gives them weight 0, and all others what they have without the damage."""
    from flaxmodels import sharding
    from flaxmodels.data import feed

    copy, files = copied(folder, tmp_path)
    flip_record(files[0], 7)
    mesh = sharding.make_mesh()
    batches = {}
    for name, where, policy in (("damaged", copy, "skip"), ("intact", folder, "raise")):
        fed = feed.Feed(load(where, on_corrupt=policy).train, mesh, 32, resident=False)
        batches[name] = [jax.device_get(fed.batch(each, every)) for each, every in fed.evaluation()]
    weights = np.concatenate([b["weights"] for b in batches["damaged"]])
    assert np.flatnonzero(weights[:90] == 0).tolist() == [7] and weights.sum() == 89
    for got, want in zip(batches["damaged"], batches["intact"]):
        keep = got["weights"] > 0
        np.testing.assert_array_equal(got["inputs"][keep], want["inputs"][keep])
        np.testing.assert_array_equal(got["targets"][keep], want["targets"][keep])


def test_gather_is_pickled_and_shared_by_threads(folder):
    split = load(folder, train="train[10:80]+test").train
    packed = pickle.dumps(split.gather)
    assert len(packed) < 4000
    gather = pickle.loads(packed)
    rows, wrong = whole(split), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            index = rng.integers(0, 90, 32).astype(np.int32)
            got = gather({}, index)
            wrong.extend(name for name in got if not np.array_equal(got[name], rows[name][index]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fingerprint(folder, tmp_path):
    base = load(folder).fingerprint
    copy, files = copied(folder, tmp_path)
    assert load(copy).fingerprint == base, "the place does not matter"
    assert load(folder, on_corrupt="skip").fingerprint == base
    others = [load(folder, train=train) for train in ("train[:50%]", "train[1:]", "train[2:]")]
    others += [load(folder, test=test) for test in ("train", "test[:5]")]
    info = copy / "plain/1.0.0/dataset_info.json"
    described = json.loads(info.read_text())
    info.write_text(json.dumps({**described, "description": "other words"}))
    assert load(copy).fingerprint == base
    info.write_text(json.dumps({**described, "version": "1.0.1"}))
    others.append(load(copy))
    described["splits"][0]["numBytes"] = "12345"
    info.write_text(json.dumps(described))
    others.append(load(copy))
    described["splits"][0]["shardLengths"] = ["29", "30", "31"]
    info.write_text(json.dumps(described))
    others.append(load(copy))
    files[0].write_bytes(files[0].read_bytes() + bytes(10))
    others.append(load(copy))
    assert len({base, *(o.fingerprint for o in others)}) == len(others) + 1


# Held out


@pytest.fixture(scope="module")
def one_split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")

    def generate(split, i):
        return {**plain_example(split, i), "label": 2 if i % 10 == 0 else i % 2}

    prepare(folder, "plain", plain_features, generate, {"train": 200})
    prepare(folder, "valid", plain_features, generate, {"train": 40, "validation": 10})
    return folder


def test_validation_is_the_second_choice(one_split):
    found = load(one_split, "valid")
    assert (found.train.size, found.test.size) == (40, 10)


def test_held_out_of_each_class_alike(one_split):
    found, again = load(one_split, validation=0.2), load(one_split, validation=0.2)
    assert (found.train.size, found.test.size) == (160, 40)
    train, test = whole(found.train), whole(found.test)
    assert np.bincount(test["label"]).tolist() == [16, 20, 4]
    both = np.concatenate([train["image"], test["image"]]).reshape(200, -1)
    assert len(np.unique(both, axis=0)) == 200, "each example is on one side"
    np.testing.assert_array_equal(whole(again.test)["image"], test["image"])
    assert again.fingerprint == found.fingerprint != load(one_split, validation=0.3).fingerprint
    order = [int(np.flatnonzero((expected("train", range(200))[0] == i).all((1, 2, 3)))[0]) for i in test["image"]]
    assert order == sorted(order), "in the order of the files"


def test_held_out_of_a_slice_and_without_classes(one_split):
    found = load(one_split, train="train[100:150]", targets="more/value", validation=0.1)
    values = np.concatenate([whole(s)["label"][:, 0] for s in (found.train, found.test)])
    assert found.test.size == 5
    np.testing.assert_allclose(np.sort(values), np.arange(100, 150, dtype=np.float32) / 7, rtol=1e-6)


def test_nothing_held_out_is_refused(one_split):
    with pytest.raises(UserError, match=r"data\.validation=0 .*holds out none.*data\.test"):
        load(one_split, validation=0.0)


def test_held_out_with_damage(one_split, tmp_path):
    copy, files = copied(one_split, tmp_path)
    files[0].unlink()
    with pytest.raises(UserError, match="the file is missing"):
        load(copy)
    found = load(copy, on_corrupt="skip")
    assert found.train.size + found.test.size == 200
    assert sum(int(whole(s)[SKIP].sum()) for s in (found.train, found.test)) == 67


# Images


def picture(seed, height, width, mode="RGB"):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze(), mode)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")

    def prepared(name, shape, make, **image):
        prepare(
            folder,
            name,
            lambda f: {"image": f.Image(shape=shape, **image), "label": f.ClassLabel(num_classes=2)},
            lambda split, i: {"image": make(i), "label": i % 2},
            {"train": 12, "test": 4},
            shards=1,
        )

    prepared("fixed", (6, 5, 3), lambda i: picture(i, 6, 5))
    prepared("alike", (None, None, 1), lambda i: picture(i, 7, 7, "L"))
    prepared("mixed", (None, None, 3), lambda i: picture(i, 10 + i, 20 - i))
    return folder


def test_images(pictures):
    found = load(pictures, "fixed")
    rows = whole(found.train)
    np.testing.assert_array_equal(rows["image"], [np.asarray(picture(i, 6, 5)) for i in range(12)])
    np.testing.assert_array_equal(rows["image"], by_tfds(found, 12)[0])
    assert found.train.stored == sum(a.nbytes for a in rows.values())
    batch = found.train.prepare(rows, np.arange(12))
    np.testing.assert_allclose(batch["inputs"], rows["image"] / 255, rtol=1e-6)


def test_images_of_a_shape_that_only_files_know(pictures):
    found = load(pictures, "alike")
    assert found.transforms["shape"] == [7, 7, 1] and found.train.stored == 12 * (49 + 4)
    np.testing.assert_array_equal(
        whole(found.train)["image"][..., 0], [np.asarray(picture(i, 7, 7, "L")) for i in range(12)]
    )


def test_images_of_many_shapes_need_a_size(pictures):
    found = load(pictures, "mixed")
    with pytest.raises(
        UserError, match=r"'image' has the shape \(11, 19, 3\) in record 1, others \(10, 20, 3\).*data\.size"
    ):
        whole(found.train)
    with pytest.raises(UserError, match=r"data\.size"):
        whole(load(pictures, "mixed", on_corrupt="skip").train)
    sized = load(pictures, "mixed", size=8)
    assert sized.fingerprint == found.fingerprint and sized.transforms["shape"] == [8, 8, 3]
    rows = whole(sized.train)
    assert rows["image"].shape == (12, 8, 8, 3) and sized.train.stored == 12 * (192 + 4)
    side = picture(0, 10, 20).resize((8, 8), Image.Resampling.BICUBIC, box=(5, 0, 15, 10))
    np.testing.assert_array_equal(rows["image"][0], side)
    assert whole(load(pictures, "fixed", size=4).train)["image"].shape == (12, 4, 4, 3)


def test_images_in_other_colours(tmp_path):
    """Files may hold another mode than the set declares: palettes and grey become what it says."""

    def file(i):
        image = picture(i, 6, 6) if i % 3 else picture(i, 6, 6, "L")
        image, content = image.quantize(16) if i % 3 == 1 else image, io.BytesIO()
        image.save(content, "PNG")
        content.seek(0)
        return content

    prepare(
        tmp_path,
        "colours",
        lambda f: {"image": f.Image(shape=(6, 6, 3)), "label": f.ClassLabel(num_classes=2)},
        lambda split, i: {"image": file(i), "label": 0},
        {"train": 6, "test": 3},
    )
    rows = whole(load(tmp_path, "colours").train)
    for i in range(6):
        with Image.open(file(i)) as image:
            np.testing.assert_array_equal(rows["image"][i], np.asarray(image.convert("RGB")))


def test_an_image_that_was_damaged_before_it_was_stored(tmp_path):
    def generate(split, i):
        content = io.BytesIO()
        picture(i, 6, 6).save(content, "PNG")
        return {"image": io.BytesIO(content.getvalue()[: 60 if i in (0, 4) else None]), "label": i % 2}

    prepare(
        tmp_path,
        "broken",
        lambda f: {"image": f.Image(), "label": f.ClassLabel(num_classes=2)},
        generate,
        {"train": 9, "test": 3},
    )
    with pytest.raises(UserError, match=r"record 0 \(number 0 of all\) can't be read: it can't be decoded"):
        whole(load(tmp_path, "broken").train)
    rows = whole(load(tmp_path, "broken", on_corrupt="skip").train)
    assert np.flatnonzero(rows[SKIP]).tolist() == [0, 4] and rows["image"].shape == (9, 6, 6, 3)


def test_a_missing_label_is_refused(tmp_path):
    prepare(
        tmp_path,
        "unlabelled",
        plain_features,
        lambda split, i: {**plain_example(split, i), "label": -1 if split == "test" and i == 3 else 1},
    )
    found = load(tmp_path, "unlabelled")
    whole(found.train)
    with pytest.raises(UserError, match=r"data\.test='test': example 3 has the label -1, .*none of the 3 classes"):
        whole(found.test)


def test_sets_that_do_not_say_what_is_what(tmp_path):
    prepare(tmp_path, "silent", plain_features, plain_example, supervised=None)
    with pytest.raises(
        UserError, match=r"silent/1\.0\.0 does not say which feature is to be data\.inputs.*image, label"
    ):
        load(tmp_path, "silent")
    with pytest.raises(UserError, match=r"which feature is to be data\.targets"):
        load(tmp_path, "silent", inputs="image")
    assert_holds(load(tmp_path, "silent", inputs="image", targets="label").train, "train", range(90))


def test_large_integers_are_refused(tmp_path):
    prepare(
        tmp_path,
        "large",
        lambda f: {"image": np.int64, "label": f.ClassLabel(num_classes=2)},
        lambda split, i: {"image": 2**31 - 1 + (i == 5), "label": 0},
    )
    split = load(tmp_path, "large").train
    assert split.gather({}, np.array([4]))["image"].tolist() == [[2**31 - 1]]
    with pytest.raises(UserError, match=r"'image' holds 2147483648, which does not fit"):
        whole(split)


# Preparing


def test_a_set_in_another_format_says_how_to_convert_it(folder, tmp_path):
    copy, _ = copied(folder, tmp_path)
    info = copy / "plain/1.0.0/dataset_info.json"
    described = json.loads(info.read_text())
    info.write_text(json.dumps({**described, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError) as error:
        load(copy)
    for said in (
        "prepared as tfrecord",
        "data.data_dir",
        "flaxmodels-train[tensorflow]",
        f"tfds convert_format --dataset_version_dir={copy}/plain/1.0.0 --out_file_format=array_record",
    ):
        assert said in str(error.value)
    info.write_text(json.dumps({**described, "fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}))
    assert_holds(load(copy).train, "train", range(90))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata(folder, tmp_path, file):
    copy, _ = copied(folder, tmp_path)
    (copy / "plain/1.0.0" / file).write_text("{half")
    with pytest.raises(UserError, match=r"plain in .* can't be read"):
        load(copy)


@functools.cache
def registered(kind, failure=None, urls=()):
    """A builder that TFDS knows by name, and nobody ran."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        url_infos = {url: checksums.UrlInfo(size=1, checksum="0" * 64, filename=url[-4:]) for url in urls}
        prepared = 0

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(plain_features(tfds.features)),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            if failure is not None:
                raise failure
            for url in urls:
                dl_manager.download(url)
            type(self).prepared += 1
            return {s: self._generate_examples(s, n) for s, n in SIZES.items()}

        def _generate_examples(self, split, count):
            for i in range(count):
                yield i, plain_example(split, i)

    return type(f"FlaxmodelsTest{kind}", (Base,), {"__module__": __name__})


def test_prepares_what_is_not_there_once(tmp_path):
    builder = registered("Ready")
    for _ in range(2):
        found = load(tmp_path, builder.name)
        assert found.name == f"{builder.name}/1.2.0"
        assert_holds(found.train, "train", range(90))
    assert builder.prepared == 1


def test_two_at_once_prepare_once(tmp_path):
    builder, found = registered("Twice"), []
    threads = [threading.Thread(target=lambda: found.append(load(tmp_path, builder.name))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.prepared == 1 and len({f.fingerprint for f in found}) == 1 and len(found) == 3


@pytest.mark.parametrize(
    ("kind", "failure", "said"),
    [
        ("Import", ImportError("No module named 'tensorflow'", name="tensorflow.io"), "the package tensorflow"),
        ("Format", NotImplementedError("TFRECORD"), "the package tensorflow"),
        ("Other", ImportError("No module named 'mwparser'", name="mwparser"), "pip install mwparser"),
        ("Manual", AssertionError("Put archive.zip into manual_dir"), "could not be prepared in .*archive.zip"),
    ],
)
def test_a_builder_that_can_not_run_here(tmp_path, kind, failure, said):
    with pytest.raises(UserError, match=f"flaxmodels_test_{kind.lower()}/1.2.0 .*{said}") as error:
        load(tmp_path, registered(kind, failure).name)
    assert ("flaxmodels-train[tensorflow]" in str(error.value)) == ("tensorflow" in said)
    assert ("array_record" in str(error.value)) == (kind != "Manual")


def test_a_fault_of_a_builder_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load(tmp_path, registered("Fault", ZeroDivisionError("its own")).name)


def test_tensorflow_is_found_behind_other_errors(tmp_path):
    """TFDS wraps errors of threads in errors of its own."""
    outer = RuntimeError("Error while extracting")
    outer.__cause__ = ImportError("No module named 'tensorflow'", name="tensorflow")
    with pytest.raises(UserError, match=r"flaxmodels-train\[tensorflow\]"):
        load(tmp_path, registered("Wrapped", outer).name)


def test_no_network_fails_early_and_says_what_to_fetch(tmp_path):
    urls = tuple(f"http://127.0.0.1:9/{i:04}" for i in range(12))
    name, start = registered("Remote", None, urls).name, time.monotonic()
    with pytest.raises(UserError) as error:
        load(tmp_path, name)
    assert time.monotonic() - start < 60
    for said in ("can't be downloaded: 127.0.0.1:9", "data.manual_dir=FOLDER", "0000  from http", "and 4 more"):
        assert said in str(error.value)
    (tmp_path / "manual").mkdir()
    for i in range(11):
        (tmp_path / "manual" / f"{i:04}").touch()
    with pytest.raises(UserError, match=r"FOLDER:\n  0011  from \S+/0011$"):
        load(tmp_path, name, manual_dir=str(tmp_path / "manual"))
    with pytest.raises(UserError, match=r"data\.manual_dir='.*nowhere' is not a folder"):
        load(tmp_path, name, manual_dir=str(tmp_path / "nowhere"))


def test_a_wrong_archive_is_refused_by_name(tmp_path):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "once").write_bytes(b"something else")
    name = registered("Wrong", None, ("http://127.0.0.1:9/once",)).name
    with pytest.raises(UserError, match=r"manual/once is damaged, or another file:\n  expected sha256 0000"):
        load(tmp_path, name, manual_dir=str(tmp_path / "manual"))


def test_what_we_prepare_ourselves_is_pointed_to(tmp_path):
    said = tfds_sets._needs("mnist/3.0.1", tmp_path, ImportError("x", name="tensorflow"))
    assert 'data.name="mnist"' in said
    assert "data.name" not in tfds_sets._needs("emnist", tmp_path, ImportError("x", name="tensorflow"))


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("tensorflow", "h5py"))),
    reason="TensorFlow is here, or h5py, with which this builder comes as far as its download",
)
def test_a_real_builder_that_imports_tensorflow(tmp_path):
    with pytest.raises(UserError, match=r"iris is not in .* needs the package tensorflow"):
        load(tmp_path, "iris")
