"""Our builders, run on small archives made here in the format of the real ones."""

import gzip
import importlib
import io
import tarfile

import numpy as np
import pytest

import flaxmodels.data
from flaxmodels.data import builders
from flaxmodels.data.builders import cifar10, idx
from flaxmodels.registry import UserError


@pytest.fixture
def archives(monkeypatch, tmp_path):
    """Put archives into a manual_dir, with their checksums in the table of a builder, in place of the real ones."""
    from tensorflow_datasets.core.download import checksums

    def put(name, contents):
        builder = importlib.import_module(f"flaxmodels.data.builders.{name}").Builder
        folder, table = tmp_path / name, {}
        folder.mkdir()
        for url in builder.URLS:
            file = folder / builder.url_infos[url].filename
            file.write_bytes(contents[file.name])
            table[url] = checksums.compute_url_info(file)
        monkeypatch.setattr(builder, "url_infos", table)
        return folder

    return put


def idx_archives(rng, splits):
    """The four archives with random content, and split -> images and labels."""
    arrays, contents = {}, {}
    for split, (prefix, size) in splits.items():
        image = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        label = np.arange(size, dtype=np.uint8)[::-1] % 10
        arrays[split] = image[..., None], label
        for part, array in (("images-idx3", image), ("labels-idx1", label)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            contents[f"{prefix}-{part}-ubyte.gz"] = gzip.compress(header + array.tobytes(), mtime=0)
    return arrays, contents


def tar_archive(members):
    """A .tar.gz of name -> content."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


def cifar_members(rng, examples):
    """Name -> records; every byte of the images random."""
    names = [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    members = {"cifar-10-batches-bin/readme.html": b"read me"}
    for name in reversed(names):  # the order in the archive means nothing
        records = rng.integers(0, 256, (examples, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        members[name] = records.tobytes()
    return members


def load_images(name, manual_dir, data_dir):
    function = f"flaxmodels.data.images:{name}"
    return flaxmodels.data.load(function, manual_dir=manual_dir and str(manual_dir), data_dir=str(data_dir))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("fashion_mnist", ("T-shirt/top", "Trouser", "Ankle boot")),
        ("kmnist", ("o", "ki", "wo")),
    ],
)
def test_sets_in_the_format_of_mnist(archives, monkeypatch, tmp_path, name, labels):
    monkeypatch.setattr(idx, "SPLITS", {"train": ("train", 60), "test": ("t10k", 10)})
    arrays, contents = idx_archives(np.random.default_rng(0), idx.SPLITS)
    folder = archives(name, contents)
    source = load_images(name, folder, tmp_path / "tfds")
    assert source.labels[:2] + source.labels[-1:] == labels and len(source.labels) == source.facts["classes"] == 10
    for split, (image, label) in arrays.items():
        found = getattr(source, split).arrays
        np.testing.assert_array_equal(found["image"], image)
        np.testing.assert_array_equal(found["label"], label)
        assert found["label"].dtype == np.int32
    assert load_images(name, None, tmp_path / "tfds").fingerprint == source.fingerprint
    file = folder / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{name}/t10k-labels-idx1-ubyte\.gz is damaged, or another file"):
        load_images(name, folder, tmp_path / "again")


def test_cifar10(archives, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10, "EXAMPLES", 12)
    members = cifar_members(np.random.default_rng(0), 12)
    folder = archives("cifar10", {"cifar-10-binary.tar.gz": tar_archive(members)})
    source = load_images("cifar10", folder, tmp_path / "tfds")
    assert (source.train.size, source.test.size, source.facts) == (60, 12, {"classes": 10})
    assert source.labels[0] == "airplane" and source.labels[9] == "truck" and len(source.labels) == 10
    for split, number, file in (
        ("train", 0, "data_batch_1"),
        ("train", 29, "data_batch_3"),
        ("test", 11, "test_batch"),
    ):
        record = members[f"cifar-10-batches-bin/{file}.bin"][number % 12 * 3073 :][:3073]
        rows = getattr(source, split).arrays
        assert rows["label"][number] == record[0]
        for (y, x), channel in (((0, 0), 0), ((0, 5), 1), ((31, 7), 2)):
            assert rows["image"][number, y, x, channel] == record[1 + channel * 1024 + y * 32 + x]
    assert load_images("cifar10", None, tmp_path / "tfds").fingerprint == source.fingerprint
    archive = folder / "cifar-10-binary.tar.gz"
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"cifar10/cifar-10-binary\.tar\.gz is damaged, or another file"):
        load_images("cifar10", folder, tmp_path / "again")


def test_tar_archives_of_another_kind_are_refused(tmp_path):
    archive, files = tmp_path / "x.tar.gz", {"train": ("a.bin", "b.bin"), "test": ("c.bin",)}
    good = {name: bytes(2 * 3073) for name in ("a.bin", "b.bin", "c.bin")}
    archive.write_bytes(tar_archive(good))
    assert {s: i.shape for s, (i, _) in cifar10.read(archive, files, 2).items()} == {
        "train": (4, 32, 32, 3),
        "test": (2, 32, 32, 3),
    }
    fewer = {name: good[name] for name in ("a.bin", "c.bin")}
    for bad, why in (
        (tar_archive(fewer), r"x\.tar\.gz lacks b\.bin: expected the binary"),
        (tar_archive(good | {"b.bin": bytes(3073)}), r"b\.bin is not a file of 6146 bytes"),
        (tar_archive(good | {"b.bin": bytes(3073) + b"\x0a" + bytes(3072)}), r"record 1 of b\.bin has the label 10"),
        (tar_archive(good)[:-30], r"x\.tar\.gz (lacks c\.bin|is not a whole)"),
        (b"hello", r"x\.tar\.gz is not a whole \.tar\.gz archive"),
        (b"", r"x\.tar\.gz is not a whole \.tar\.gz archive"),
    ):
        archive.write_bytes(bad)
        with pytest.raises(UserError, match=why):
            cifar10.read(archive, files, 2)


@pytest.mark.parametrize(
    ("name", "files", "size"),
    [
        ("fashion_mnist", idx.urls("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"), 30.9),
        ("kmnist", idx.urls("http://codh.rois.ac.jp/kmnist/dataset/kmnist/"), 21.2),
        ("cifar10", ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",), 170.1),
    ],
)
def test_where_the_archives_are(tmp_path, monkeypatch, name, files, size):
    """As in TFDS's own table of checksums, byte for byte."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(builders, "unreachable", lambda url: "no network")
    with pytest.raises(UserError) as error:
        load_images(name, None, tmp_path)
    assert [line.split(" from ")[1] for line in str(error.value).splitlines() if " from " in line] == list(files)
    builder = importlib.import_module(f"flaxmodels.data.builders.{name}").Builder
    table = tfds.core.download.checksums.load_url_infos(tfds.core.tfds_path() / f"url_checksums/{name}.txt")
    assert {url: builder.url_infos[url] for url in files} == {url: table[url] for url in files}
    assert sum(builder.url_infos[url].size for url in files) == pytest.approx(size * 1e6, rel=0.01)


def test_idx_of_another_kind_is_refused():
    good = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])
    assert idx.parse(gzip.compress(good), (3,), "x").tolist() == [7, 8, 9]
    for bad in (good[:-1], good + b"\0", b"\1" + good[1:], good.replace(b"\3", b"\4")):
        with pytest.raises(UserError, match="x is not an IDX file"):
            idx.parse(gzip.compress(bad), (3,), "x")
