import io
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from shared_data import shared_data

import flaxmodels.data
from flaxmodels.data import held_out
from flaxmodels.data.builders import idx
from flaxmodels.registry import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5))
Y = np.repeat([0, 1, 2], [40, 15, 5])[RNG.permutation(60)]


def load(train, **options):
    return flaxmodels.data.load("flaxmodels.data.arrays:arrays", train=train, **options)


def rows(split, *names):
    """Each example as a tuple of bytes."""
    return [tuple(split.arrays[name][i].tobytes() for name in names) for i in range(split.size)]


def batch(split, index):
    """The same on the host and in a jitted step."""
    index = np.asarray(index, np.int32)
    host = split.prepare(split.gather(split.arrays, index), index)
    arrays = {name: jnp.asarray(array) for name, array in split.arrays.items()}
    device = jax.jit(lambda a, i: split.prepare(split.gather(a, i), i))(arrays, jnp.asarray(index))
    assert sorted(host) == sorted(device) == ["inputs", "targets", "weights"]
    for name, array in host.items():
        assert array.dtype == device[name].dtype
        np.testing.assert_array_equal(array, device[name])
    assert host["weights"].dtype == np.float32
    return host


# What is held out.


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.25, 0.5, 0.99, 1.0])
def test_of_each_class_the_same_share_is_held_out(fraction):
    labels = np.repeat([3, 7, 8, -1], [100, 30, 2, 1])[np.random.default_rng(1).permutation(133)]
    held = held_out.stratified(labels, fraction)
    assert held.dtype == bool and held.shape == (133,)
    for label, count in ((3, 100), (7, 30), (8, 2), (-1, 1)):
        expected = min(max(round(count * fraction), int(fraction > 0)), count - 1)
        assert held[labels == label].sum() == expected


def test_what_is_held_out_never_changes():
    labels = np.arange(40) % 3
    assert np.flatnonzero(held_out.stratified(labels, 0.2)).tolist() == [2, 10, 17, 24, 27, 30, 34, 37, 38]
    assert (held_out.stratified(labels, 0.2) == held_out.stratified(labels.astype(np.uint8), 0.2)).all()
    assert (held_out.stratified(labels, 0.2) != held_out.stratified(labels, 0.2, seed=1)).any()
    assert held_out.stratified(labels[:0], 0.2).shape == (0,)


def test_documents_are_held_out_by_their_content():
    texts = [f"document {i}" for i in range(10_000)]
    small, large = ([held_out.by_content(text, fraction) for text in texts] for fraction in (0.1, 0.3))
    assert 900 < sum(small) < 1100 and 2850 < sum(large) < 3150
    assert all(b for a, b in zip(small, large) if a)
    assert [i for i, held in enumerate(small) if held][:5] == [40, 44, 59, 70, 81]
    assert held_out.by_content("straße", 0.5) == held_out.by_content("straße".encode(), 0.5)
    assert not any(held_out.by_content(text, 0.0) for text in texts)
    assert all(held_out.by_content(text, 1.0) for text in texts)


# What arrays mean.


def test_no_example_is_lost_or_in_both_splits():
    source = load({"x": X, "y": Y})
    everything = [(x.tobytes(), y.tobytes()) for x, y in zip(X.astype(np.float32), Y.astype(np.int32))]
    train, test = rows(source.train, "inputs", "targets"), rows(source.test, "inputs", "targets")
    assert sorted(train + test) == sorted(everything) and not set(train) & set(test)
    assert [row for row in everything if row in set(train)] == train, "the order of the file"
    assert np.bincount(source.test.arrays["targets"]).tolist() == [4, 2, 1]  # 1.5 is rounded to even, 0.5 up to one
    assert source.facts == {"classes": 3} and source.tokens_per_example == 1
    again = load({"x": X, "y": Y})
    assert again.fingerprint == source.fingerprint
    other = X.copy()
    other[7, 3] += 1
    assert load({"x": other, "y": Y}).fingerprint != source.fingerprint
    assert load({"x": X, "y": Y}, validation=0.2).fingerprint != source.fingerprint


def test_every_kind_of_file_gives_the_same(tmp_path):
    named = {"inputs": X, "targets": Y, "note": np.zeros(3)}
    np.savez(tmp_path / "a.npz", **named)
    np.savez_compressed(tmp_path / "b.NPZ.npz", **named)
    save_file(named, tmp_path / "a.safetensors")
    for name in ("inputs", "targets"):
        np.save(tmp_path / f"{name}.npy", named[name])
    files = {name: str(tmp_path / f"{name}.npy") for name in ("inputs", "targets")}
    given = [str(tmp_path / "a.npz"), str(tmp_path / "b.NPZ.npz"), str(tmp_path / "a.safetensors"), files, named]
    given.append({"inputs": jnp.asarray(X), "targets": Y.tolist()})
    given.append({"inputs": X.astype(">f8"), "targets": Y.astype(">i2").astype(np.uint64)})
    assert len({load(one).fingerprint for one in given}) == 1


@pytest.mark.parametrize("shape", [(9, 4, 6), (9, 4, 6, 3)])
def test_bytes_are_images(shape):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    image.reshape(9, -1)[:, 0] = 255
    source = load({"image": image, "label": np.arange(9)[:, None] % 2}, test={"image": image[:2], "label": [1, 1]})
    assert source.train.arrays["inputs"].dtype == np.uint8, "a quarter of the memory"
    got = batch(source.train, [3, -1, 8])
    assert got["inputs"].shape == (3, 4, 6, 1 if len(shape) == 3 else 3) and got["inputs"].dtype == np.float32
    assert got["inputs"].max() == 1
    np.testing.assert_allclose(got["inputs"][0].ravel(), image[3].ravel() / 255, rtol=1e-6)
    assert got["targets"].tolist()[::2] == [1, 0] and got["targets"].dtype == np.int32
    assert got["weights"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "bool", "int8", "uint16", "int64", ">i2"]
)
def test_other_inputs_are_as_they_are(dtype):
    given = np.arange(24).reshape(8, 3).astype(getattr(ml_dtypes, dtype, dtype))
    split = load({"x": given, "y": Y[:8]}).train
    inputs = batch(split, [0, 1])["inputs"]
    assert split.arrays["inputs"].dtype.isnative
    expected = {
        ">i2": "int32",
        "float64": "float32",
        "bfloat16": "float32",
        "int8": "int32",
        "uint16": "int32",
        "int64": "int32",
    }
    assert inputs.dtype.name == expected.get(dtype, dtype)
    assert inputs[0].tolist() in given.tolist()


def test_tokens():
    tokens = RNG.integers(0, 50, (20, 8)).astype(np.uint16)
    tokens[held_out.stratified(np.zeros(20, int), 0.1), 0] = 59  # not among those to train on
    source = load({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "w": tokens[:, 1:] % 2}, weights="w")
    assert source.facts == {"vocab_size": 60, "max_length": 7} and source.tokens_per_example == 7
    assert source.train.size == 18 and source.train.arrays["inputs"].dtype == np.uint16
    got = batch(source.train, [4, -1])
    assert got["inputs"].dtype == got["targets"].dtype == np.int32
    np.testing.assert_array_equal(got["inputs"][:, 1:], got["targets"][:, :-1])
    np.testing.assert_array_equal(got["weights"], [got["targets"][0] % 2, np.zeros(7)])
    plain = load({"inputs": tokens, "targets": tokens, "w": np.arange(20)}, weights="w")
    np.testing.assert_array_equal(batch(plain.train, [0, 1])["weights"], [[0] * 8, [1] * 8])


def test_values_and_weights():
    value = RNG.normal(size=60)
    source = load({"x": X, "y": value, "w": np.arange(60)}, weights="w", targets="y")
    got = batch(source.train, [1, -1, 30])
    assert got["targets"].shape == (3, 1) and got["targets"].dtype == np.float32
    at = [value.astype(np.float32).tolist().index(v) for v in got["targets"][::2, 0]]
    assert got["weights"].tolist() == [at[0], 0, at[1]]
    assert source.facts == {"classes": 1} and source.test.size == 6
    assert load({"x": X, "y": RNG.normal(size=(60, 4))}).facts == {"classes": 4}
    assert load({"x": X, "y": RNG.normal(size=(60, 4, 4))}).facts == {}


def one_hot(dtype=np.float64):
    return np.eye(3, dtype=dtype)[Y]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (RNG.dirichlet(np.ones(1000), 60).astype(np.float16), "probabilities"),
        (one_hot(np.float32), "probabilities"),
        (RNG.dirichlet(np.ones(4), (60, 5)), "probabilities"),
        (Y.astype(float), "numbers"),  # classes as pandas may give them
        (np.ones(60), "numbers"),
        (np.ones((60, 1)), "numbers"),
        (RNG.normal(size=(60, 3)), "numbers"),
        (one_hot() * 2, "numbers"),
        (np.add(one_hot(), [0.1, -0.05, -0.05]), "numbers"),  # the sums are 1
    ],
)
def test_what_floats_are_is_said(targets, expected):
    assert load({"x": X, "y": targets}).transforms == {"values": expected}


def test_floats_of_all_rows_say_what_they_are():
    for at in (int(np.argmax(held_out.stratified(np.zeros(60, int), 0.1))), 0):
        off = one_hot()
        off[at] *= 1.002
        assert load({"x": X, "y": off}).transforms == {"values": "numbers"}
        off[at] /= 1.0015
        assert load({"x": X, "y": off}).transforms == {"values": "probabilities"}
    assert load({"x": X, "y": one_hot()}, test={"x": X, "y": one_hot() * 2}).transforms == {"values": "numbers"}
    assert load({"x": X, "y": Y}).transforms == {}, "classes"


def test_which_arrays(tmp_path):
    keras = {"x_train": X[:50], "y_train": Y[:50], "x_test": X[50:], "y_test": Y[50:]}
    np.savez(tmp_path / "keras.npz", **keras)
    source = load(str(tmp_path / "keras.npz"))
    assert (source.train.size, source.test.size) == (50, 10)
    np.testing.assert_array_equal(source.test.arrays["targets"], Y[50:])
    apart = load({"x": X[:50], "y": Y[:50]}, test={"x_test": X[50:], "y_test": Y[50:]})
    assert apart.fingerprint == source.fingerprint
    weighted = load(keras | {"w": np.ones(50)}, weights="w")
    assert "weights" in weighted.train.arrays and "weights" not in weighted.test.arrays
    both = {"x": X, "y": Y, "a": X * 2, "b": 1 - Y // 2}
    np.testing.assert_array_equal(load(both, targets="b", test=both).train.arrays["inputs"], X.astype(np.float32))
    assert load(both, inputs="a", targets="b").facts == {"classes": 2}
    with pytest.raises(UserError, match=r"data\.train has the arrays 'a', 'b': which are inputs .*data\.inputs=NAME"):
        load({"a": X, "b": Y})
    with pytest.raises(UserError, match=r"data\.train has no array 'z'\. There are: a, b, x, y"):
        load(both, inputs="z", targets="b")
    with pytest.raises(UserError, match=r"data\.train has no array 'weigths'\. Did you mean 'weights'"):
        load(both | {"weights": Y}, weights="weigths")


def test_tests_are_read_from_another_file():
    source = load({"x": X, "y": Y}, test={"x": X[:3], "y": Y[:3]})
    assert (source.train.size, source.test.size) == (60, 3)
    for test, why in (
        (
            {"x": X[:3], "y": [0, 3, 9]},
            r"data\.test: targets: 2 of its values.*not in 0\.\.2.*The first is 3, in example 1",
        ),
        ({"x": X[:3], "y": [0, 0, -1]}, r"data\.test: targets: 1 of .*The first is -1, in example 2"),
        ({"x": X[:3], "y": [0.0, 1.0, 1.5]}, r"splits differ.*that are classes.*float32.*that are values"),
        ({"x": X[:3, :4], "y": Y[:3]}, r"inputs \(N, 5\) float32 .*inputs \(N, 4\) float32"),
        ({"x": X[:0], "y": Y[:0]}, r"data\.test: 'x' has no rows"),
    ):
        with pytest.raises(UserError, match=why):
            load({"x": X, "y": Y}, test=test)


def changed(array, at, value):
    array = np.array(array)
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"x": X, "y": Y[:-1]}, r"differ in length: 'x' has 60, 'y' has 59 rows"),
        ({"x": X[:0], "y": Y[:0]}, r"'x' has no rows"),
        ({"x": X[:1], "y": Y[:1]}, r"data\.validation=0\.1 of 1 examples holds out none"),
        ({"x": X, "y": changed(Y, 7, -1)}, r"targets: 1 of its values.*negative.*The first is -1, in example 7"),
        ({"x": changed(X, ([4, 4, 9], [1, 2, 0]), np.nan), "y": Y},
         r"'x': 3 of its values, in 2 of 60 examples, are not finite.*The first is nan, in example 4, at \[1\]"),
        ({"x": changed(X, (2, 0), 1e300), "y": Y}, r"not finite float32 numbers. The first is 1e\+300, in example 2"),
        ({"x": X, "y": changed(Y, 5, 2**40)}, r"'y': 1 .*too large for int32. The first is 10995\d+, in example 5"),
        ({"x": X, "y": Y.astype(str)}, r"'y' has the dtype <U21: expected numbers"),
        ({"x": X.astype(complex), "y": Y}, r"'x' has the dtype complex128"),
        ({"x": X, "y": np.array(3)}, r"'y' is a single value"),
        ({"x": X, "y": np.eye(3, dtype=int)[Y]}, r"'y' has integers of shape \(60, 3\).*\(N,\) for classes.*or floats"),
        ({"x": [[1], [1, 2]], "y": [0, 1]}, r"data\.train\.x is not an array"),
        ({}, r"the arrays of nothing"),
    ],
)  # fmt: skip
def test_bad_arrays(named, why):
    with pytest.raises(UserError, match=why):
        load(named)


def test_bad_weights():
    named = {"x": X, "y": Y}
    for w, why in (
        (np.zeros(60), "all weights of a split are 0"),
        (np.ones((60, 2)), r"shape \(60, 2\): expected \(60,\)"),
        (changed(np.ones(60), 3, -0.5), r"1 of its values.*negative\. The first is -0\.5, in example 3"),
        (changed(np.ones(60), 3, np.nan), r"not finite"),
    ):
        with pytest.raises(UserError, match=why):
            load(named | {"w": w}, weights="w")


def test_weights_of_the_test_set():
    named = {"x": X, "y": Y, "w": np.arange(60)}
    own, none = load(named, test=named, weights="w").test, load(named, test={"x": X, "y": Y}, weights="w").test
    assert batch(own, [7, -1])["weights"].tolist() == [7, 0] and batch(none, [7, -1])["weights"].tolist() == [1, 0]


def test_nothing_held_out():
    with pytest.raises(UserError, match=r"data\.validation=0 of 60 examples holds out none.*Set data\.test"):
        load({"x": X, "y": Y}, validation=0.0)
    with pytest.raises(UserError, match=r"of a class that has two"):
        load({"x": X[:3], "y": [0, 1, 2]})


def test_missing_and_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", x=X, y=Y)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "data.csv").write_text("a,b")
    for given, why in (
        ("nine.npz", r"there is no such file. In its folder: Did you mean 'mine\.npz'"),
        ("nowhere/mine.npz", r"there is no such file. Paths are taken from"),
        (".", r"is a folder: expected \.npz or \.safetensors"),
        ("data.csv", r"expected an \.npz or a \.safetensors file, or \{"),
        ("text.npz", r"text\.npz is not a whole \.npz file"),
        ({"x": "text.npy", "y": Y}, r"text\.npy is not an \.npy file"),
        ({"x": "mine.npz", "y": Y}, r"data\.train\.x=.*expected an \.npy file"),
    ):
        with pytest.raises(UserError, match=why):
            load(given)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "npy"])
def test_damaged_files_are_named(tmp_path, kind):
    path = tmp_path / f"mine.{kind}"
    if kind == "npz":
        np.savez(path, x=X, y=Y)
    elif kind == "npy":
        np.save(path, X)
    else:
        save_file({"x": X, "y": Y}, path)
    given = {"x": str(path), "y": Y} if kind == "npy" else str(path)
    content = path.read_bytes()
    load(given)
    for length in (len(content) - 40, 90, 7, 0):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"mine\.{kind}"):
            load(given)
    if kind == "npz":
        path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
        with pytest.raises(UserError, match=r"mine\.npz: the array 'x' is damaged: Bad CRC-32"):
            load(given)


def test_numbers_that_numpy_has_not(tmp_path):
    save_file({"x": np.zeros((4, 2), ml_dtypes.float8_e5m2), "y": np.arange(4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: 'x' is of F8_E5M2, which NumPy has not\. Write it as F32"):
        load(str(tmp_path / "a.safetensors"))


def test_nothing_is_unpickled(tmp_path):
    objects = np.array([{"a": 1}] * 60, dtype=object)
    np.savez(tmp_path / "mine.npz", x=X, y=objects)
    with pytest.raises(UserError, match=r"mine\.npz: the array 'y' holds Python objects.*refused"):
        load(str(tmp_path / "mine.npz"))
    np.save(tmp_path / "y.npy", objects)
    with pytest.raises(UserError, match=r"y\.npy holds Python objects.*refused"):
        load({"x": X, "y": str(tmp_path / "y.npy")})
    content = io.BytesIO()
    np.lib.format.write_array(content, X)
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("x.npy", content.getvalue())
        archive.writestr("y", b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match=r"raw\.npz: 'y' is not an array"):
        load(str(tmp_path / "raw.npz"))


def test_mnist_as_keras_has_it(tmp_path):
    folder, arrays = shared_data("mnist"), {}
    for ours, theirs, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        for name, part, shape in (("x", "images-idx3", (size, 28, 28)), ("y", "labels-idx1", (size,))):
            archive = folder / f"{theirs}-{part}-ubyte.gz"
            arrays[f"{name}_{ours}"] = idx.parse(archive.read_bytes(), shape, archive.name)
    np.savez(tmp_path / "mnist.npz", **arrays)
    source = load(str(tmp_path / "mnist.npz"))
    assert (source.train.size, source.test.size, source.facts) == (60_000, 10_000, {"classes": 10})
    assert batch(source.test, [0, 1, -1])["inputs"].shape == (3, 28, 28, 1)
