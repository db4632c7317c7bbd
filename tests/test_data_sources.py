import gzip
import importlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import builders, order, prepared
from flaxmodels.data.split import Source, describe, fingerprint
from flaxmodels.registry import UserError

MNIST_FILES = [f"{p}-ubyte.gz" for s in ("train", "t10k") for p in (f"{s}-images-idx3", f"{s}-labels-idx1")]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS data directory where digits are prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    flaxmodels.data.load("digits", data_dir=str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


def digits(data_dir):
    return flaxmodels.data.load("digits", data_dir=str(data_dir))


def batch_on_host(split, index):
    return split.prepare(split.gather(split.arrays, index), index)


def batch_in_jit(split, index):
    arrays = {name: jnp.asarray(array) for name, array in split.arrays.items()}
    return jax.jit(lambda a, i: split.prepare(split.gather(a, i), i))(arrays, jnp.asarray(index))


def assert_same_batch(split, index):
    host, device = batch_on_host(split, index), batch_in_jit(split, index)
    assert sorted(host) == ["inputs", "targets", "weights"]
    for name, array in host.items():
        assert array.shape[0] == len(index)
        assert array.dtype == device[name].dtype, name
        np.testing.assert_array_equal(array, device[name], err_msg=name)
    assert host["weights"].dtype == np.float32


def counted(split, batch_size):
    total = 0.0
    for b in range(order.eval_batches(batch_size, split.size)):
        total += batch_on_host(split, order.eval_index(b, batch_size, split.size))["weights"].sum()
    return total


def test_digits_are_all_there(data_dir):
    from sklearn.datasets import load_digits

    source, original = digits(data_dir), load_digits()
    image = np.concatenate([source.train.arrays["image"], source.test.arrays["image"]])
    label = np.concatenate([source.train.arrays["label"], source.test.arrays["label"]])
    assert image.shape == (1797, 8, 8, 1) and image.dtype == np.uint8 and label.dtype == np.int32
    ours = sorted((int(y), x.tobytes()) for x, y in zip(image, label))
    theirs = sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(original.images, original.target))
    assert ours == theirs  # so the splits are disjoint, and nothing is lost or repeated
    assert source.facts == {"classes": 10} and source.tokens_per_example == 1
    assert source.labels == tuple("0123456789")


def test_digits_are_stratified(data_dir):
    source = digits(data_dir)
    train, test = (np.bincount(s.arrays["label"], minlength=10) for s in (source.train, source.test))
    np.testing.assert_array_equal(test, -(-(train + test) // 5))  # a fifth, rounded up


def test_digits_keep_their_order(data_dir):
    """The order of scikit-learn, not that of a hash inside TFDS: data order must not depend on TFDS's version."""
    from sklearn.datasets import load_digits

    held = np.zeros(1797, bool)
    for value in range(10):
        held[np.flatnonzero(load_digits().target == value)[::5]] = True
    np.testing.assert_array_equal(digits(data_dir).train.arrays["label"], load_digits().target[~held])


def test_image_batch(data_dir):
    split = digits(data_dir).train
    batch = batch_on_host(split, np.array([3, -1, 0], np.int32))
    assert batch["inputs"].shape == (3, 8, 8, 1) and batch["inputs"].dtype == np.float32
    np.testing.assert_array_equal(batch["inputs"][0] * 16, split.arrays["image"][3])
    assert batch["weights"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(batch["inputs"][1], batch["inputs"][2])  # padding is row 0
    assert batch["targets"][0] == split.arrays["label"][3]


def test_same_batch_on_host_and_in_jit(data_dir):
    index = np.array([0, 354, 17, -1, 200, -1], np.int32)
    assert_same_batch(digits(data_dir).test, index)
    for name in ("synthetic_images", "synthetic_tokens"):
        assert_same_batch(flaxmodels.data.load(name, examples=40, test_examples=33).test, index.clip(-1, 32))


@pytest.mark.parametrize("batch_size", [7, 364, 400])
def test_eval_counts_the_split(data_dir, batch_size):
    split = digits(data_dir).test
    assert counted(split, batch_size) == split.size == 364


def test_fingerprint_is_of_the_content(data_dir, tmp_path):
    source = digits(data_dir)
    splits = {"train": source.train, "test": source.test}
    described = {f"{s}/{n}": describe(a) for s, split in splits.items() for n, a in split.arrays.items()}
    assert source.fingerprint == fingerprint(described) == "ba652f8e10805ce8"
    described["train/label"] = describe(source.train.arrays["label"][::-1])
    assert fingerprint(described) != source.fingerprint


def test_cached_start_does_not_import_tfds(data_dir):
    code = (
        "import sys, flaxmodels.data\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"flaxmodels.data.load('digits', data_dir={str(data_dir)!r})\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_two_processes_prepare_at_once(data_dir, tmp_path):
    code = f"import flaxmodels.data as d; print(d.load('digits', data_dir={str(tmp_path)!r}).fingerprint)"
    command = [sys.executable, "-W", "error", "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [p.communicate(timeout=120) for p in processes]
    assert outputs == [(digits(data_dir).fingerprint + "\n", "")] * 2, "and no noise from TFDS"


@pytest.mark.parametrize("damage", ["cut off", "empty", "other shape", "other dtype", "gone"])
def test_arrays_that_are_not_what_was_written_are_made_again(data_dir, tmp_path, damage):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    label = tmp_path / "flaxmodels_digits/1.0.0/flaxmodels_arrays_v1/train/label.npy"
    if damage in ("cut off", "empty"):
        label.write_bytes(label.read_bytes()[: 500 if damage == "cut off" else 0])
    elif damage == "gone":
        label.unlink()
    else:
        array = np.load(label)
        np.save(label, array[:-1] if damage == "other shape" else array.astype(np.int64))
    assert digits(tmp_path).train.arrays["label"].dtype == np.int32
    np.testing.assert_array_equal(np.load(label), digits(data_dir).train.arrays["label"])


def test_damaged_records_are_named(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "flaxmodels_digits/1.0.0/flaxmodels_arrays_v1")
    next((tmp_path / "flaxmodels_digits/1.0.0").glob("*train.array_record*")).unlink()
    with pytest.raises(UserError, match=r"flaxmodels_digits/1\.0\.0 is damaged.*Remove the folder"):
        digits(tmp_path)


def test_data_dir_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written.*data\.data_dir=FOLDER"):
        digits(tmp_path / "file" / "tfds")
    with pytest.raises(UserError, match="must be a local folder"):
        digits("gs://bucket/tfds")


def test_data_dir_is_that_of_tfds(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert prepared.data_root(None) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert str(prepared.data_root(None)) == tfds.core.constants.get_default_data_dir()


@pytest.mark.slow
def test_real_mnist(tmp_path):
    folder = shared_data("mnist")
    start = time.monotonic()
    source = flaxmodels.data.load("mnist", manual_dir=str(folder), data_dir=str(tmp_path))
    assert time.monotonic() - start < 300  # 6 s on two idle cores
    assert (source.train.size, source.test.size) == (60_000, 10_000)
    label = source.train.arrays["label"]
    assert np.bincount(label).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.test.arrays["label"][:5].tolist() == [7, 2, 1, 0, 4]
    for name, split in (("train", source.train), ("t10k", source.test)):
        pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        assert split.arrays["image"].tobytes() == pixels
    batch = batch_on_host(source.test, np.arange(1000, dtype=np.int32))
    assert batch["inputs"].min() == 0 and batch["inputs"].max() == 1
    assert flaxmodels.data.load("mnist", data_dir=str(tmp_path)).fingerprint == source.fingerprint == "986d925e7fabed23"


def test_one_flipped_byte_is_refused_by_name(tmp_path):
    folder = shared_data("mnist")
    for name in MNIST_FILES:
        shutil.copyfile(folder / name, tmp_path / name)
    content = bytearray((tmp_path / MNIST_FILES[2]).read_bytes())
    content[100_000] ^= 1
    (tmp_path / MNIST_FILES[2]).write_bytes(content)
    with pytest.raises(UserError) as error:
        flaxmodels.data.load("mnist", manual_dir=str(tmp_path), data_dir=str(tmp_path / "tfds"))
    assert str(tmp_path / MNIST_FILES[2]) in str(error.value)
    assert "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6" in str(error.value)
    assert "fetch it again" in str(error.value)
    assert not list((tmp_path / "tfds/flaxmodels_mnist").glob("*[0-9]*")), "nothing half prepared stays"


def test_missing_file_in_manual_dir_is_named(tmp_path):
    for name in MNIST_FILES[:3]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"lacks {MNIST_FILES[3]}\."):
        flaxmodels.data.load("mnist", manual_dir=str(tmp_path), data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.manual_dir=.*nowhere.* is not a folder"):
        flaxmodels.data.load("mnist", manual_dir=str(tmp_path / "nowhere"), data_dir=str(tmp_path))


def test_no_network_fails_fast_and_says_what_to_fetch(tmp_path, no_network):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        flaxmodels.data.load("mnist", data_dir=str(tmp_path))
    assert time.monotonic() - start < 60
    message = str(error.value)
    assert "Network is unreachable" in message and "--config.data.manual_dir=FOLDER" in message
    for name in MNIST_FILES:
        assert f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}" in message


def test_no_answer_is_not_waited_for(monkeypatch):
    """A name server that does not answer: looking a name up has no timeout of its own."""

    over, answered = threading.Event(), []

    def hang(*args, **kwargs):
        over.wait(60)
        answered.append(True)
        raise TimeoutError  # in a thread that outlives this test: another error would surface in some other one

    monkeypatch.setattr(socket, "create_connection", hang)
    assert "no answer" in builders.unreachable("https://example.invalid/x", seconds=0.1)
    assert not answered
    over.set()


def test_files_in_the_download_cache_need_no_network(tmp_path, no_network):
    """TFDS's own cache, as its own download leaves it, and a damaged file in it, which TFDS would not notice."""
    from tensorflow_datasets.core.download import checksums, resource

    file = shared_data("tiny_shakespeare") / "input.txt"
    (url,) = importlib.import_module(builders.TINY_SHAKESPEARE.module).Builder.URLS
    info = checksums.compute_url_info(file)
    cached = tmp_path / "downloads" / "flaxmodels_tiny_shakespeare" / resource.get_dl_fname(url, info.checksum)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x" + file.read_bytes()[1:])
    resource.write_info_file(url, cached, "flaxmodels_tiny_shakespeare", "input.txt", info)
    with pytest.raises(UserError, match=r"is damaged"):
        flaxmodels.data.load("tiny_shakespeare", data_dir=str(tmp_path))
    shutil.copyfile(file, cached)
    assert flaxmodels.data.load("tiny_shakespeare", data_dir=str(tmp_path)).facts["vocab_size"] == 65


def test_unknown_names_and_options():
    with pytest.raises(UserError, match=r"Did you mean 'digits'\?"):
        flaxmodels.data.load("digit")
    with pytest.raises(UserError, match=r"data\.batch=3: unknown key"):
        flaxmodels.data.load("digits", batch=3)
    with pytest.raises(UserError, match=r"data\.side=0 is out of range"):
        flaxmodels.data.load("synthetic_images", side=0)


def test_own_source(monkeypatch, tmp_path):
    (tmp_path / "own_data.py").write_text(
        "from flaxmodels.data.synthetic import synthetic_images\n"
        "def mine(many: int = 5):\n    return synthetic_images(examples=many)\n"
        "def wrong():\n    return {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = flaxmodels.data.load("own_data:mine", many=20)
    assert isinstance(source, Source) and source.train.size == 20
    with pytest.raises(UserError, match=r"'own_data:wrong' returned dict: expected a flaxmodels\.data\.Source"):
        flaxmodels.data.load("own_data:wrong")


def test_synthetic_images_are_learnable_and_fixed():
    source = flaxmodels.data.load("synthetic_images")
    train, test = (batch_on_host(s, np.arange(s.size, dtype=np.int32)) for s in (source.train, source.test))
    means = np.stack([train["inputs"][train["targets"] == c].mean(0) for c in range(10)])
    distance = ((test["inputs"][:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test["targets"]).mean() > 0.99
    assert source.fingerprint == flaxmodels.data.load("synthetic_images").fingerprint == "5bcf92e291c64c36"
    assert source.fingerprint != flaxmodels.data.load("synthetic_images", seed=1).fingerprint


def test_synthetic_tokens_are_learnable_and_fixed():
    source = flaxmodels.data.load("synthetic_tokens", vocab_size=64, length=16)
    assert (source.train.size, source.test.size, source.tokens_per_example) == (1024, 128, 16)
    batch = batch_on_host(source.train, np.arange(1024, dtype=np.int32))
    assert batch["weights"].all()
    assert 0.7 < (batch["targets"] == (batch["inputs"] + 1) % 64).mean() < 0.8
    assert batch["inputs"].min() == 0 and batch["inputs"].max() == 63
    assert source.fingerprint == "e3225ed909e9f2b0"
