import io
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

import flaxmodels.data
from flaxmodels.data import image_folder
from flaxmodels.data.split import SKIP
from flaxmodels.registry import UserError

TARGET = "flaxmodels.data.image_folder:image_folder"
RNG = np.random.default_rng(0)


def noise(height=12, width=10, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(noise() if pixels is None else pixels)
    image.save(path, **options)
    return path


def load(path, size=8, **options):
    return flaxmodels.data.load(TARGET, path=str(path), size=size, **options)


def names(split, root):
    """Paths of the images, relative to `root`, in order."""
    return [bytes(path).decode().removeprefix(f"{root}/") for path in split.gather.keywords["path"]]


def read(split, *index):
    return split.gather(split.arrays, np.asarray(index or range(split.size), np.int32))


@pytest.fixture
def folder(tmp_path):
    """Ten cats, five dogs, one of them deeper, one emu."""
    root = tmp_path / "pets"
    for i in range(10):
        write(root / "cat" / f"{i}.{('png', 'bmp', 'webp', 'JPG', 'jpeg')[i % 5]}")
    for i in range(4):
        write(root / "dog" / f"{i}.png")
    write(root / "dog/deeper/still/x.png")
    write(root / "emu/only.png")
    (root / "cat/notes.txt").write_text("not an image")
    (root / "cat/.hidden.png").write_text("not an image")
    (root / ".cache").mkdir()
    (root / "README.md").write_text("about")
    return root


def test_one_folder_a_class(folder):
    source = load(folder)
    assert source.labels == ("cat", "dog", "emu") and source.facts == {"classes": 3}
    assert source.transforms == {"size": 8, "channels": 3}
    train, test = names(source.train, folder), names(source.test, folder)
    assert train == sorted(train) and test == sorted(test) and not set(train) & set(test)
    everything = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix.lower() in image_folder.SUFFIXES]
    assert sorted(train + test + ["cat/.hidden.png"]) == sorted(everything) and len(train + test) == 16
    assert [sum(n.startswith(c) for n in test) for c in source.labels] == [1, 1, 0], "never all of a class"
    rows = read(source.train)
    assert [source.labels[i] for i in rows["label"]] == [name.partition("/")[0] for name in train]
    assert rows["image"].shape == (14, 8, 8, 3) and rows["image"].dtype == np.uint8
    assert source.train.stored == source.train.nbytes == 14 * (8 * 8 * 3 + 4)


def test_batches(folder):
    split = load(folder, channels=1).train
    index = np.array([3, -1, 0], np.int32)
    rows = read(split, 3, -1, 0)
    assert sorted(rows) == ["image", "label"] and rows["image"].shape == (3, 8, 8, 1)
    batch = split.prepare(rows, index)
    assert batch["inputs"].dtype == np.float32 and batch["inputs"].max() <= 1 and batch["inputs"].max() > 0.5
    assert batch["targets"].dtype == np.int32 and batch["weights"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(rows["image"][0], read(split, 3)["image"][0])
    elsewhere = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(read(elsewhere)["image"], read(split)["image"])


def test_read_into_memory_it_is_the_same(folder):
    stored = load(folder).train
    memory = stored.read()
    assert not memory.stored and memory.nbytes == stored.nbytes
    for name, rows in read(stored, 5, 0, 13).items():
        np.testing.assert_array_equal(rows, read(memory, 5, 0, 13)[name])


def test_it_is_the_same_wherever_it_lies(folder, tmp_path):
    source = load(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "z")
    again = load(moved)
    assert again.fingerprint == source.fingerprint
    assert names(again.train, moved) == names(source.train, folder)
    (moved / "dog/0.png").rename(moved / "dog/zero.png")
    assert load(moved).fingerprint != source.fingerprint
    assert load(folder, validation=0.5).fingerprint != source.fingerprint


def test_the_fingerprint_is_of_the_content_where_that_is_small(folder, monkeypatch):
    source, path = load(folder), folder / "dog/0.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    assert load(folder).fingerprint != source.fingerprint
    monkeypatch.setattr(image_folder, "HASHED", 1000)
    large = load(folder).fingerprint
    path.write_bytes(content)
    assert load(folder).fingerprint == large != source.fingerprint
    path.write_bytes(content + b"x")
    assert load(folder).fingerprint != large


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_splits_as_folders(tmp_path, name):
    for part, count in (("train", 3), (name, 2)):
        for i in range(count):
            write(tmp_path / part / "a" / f"{i}.png")
            write(tmp_path / part / "b" / f"{i}.png")
    source = load(tmp_path)
    assert (source.train.size, source.test.size, source.labels) == (6, 4, ("a", "b"))
    assert names(source.test, tmp_path) == [f"{name}/{c}/{i}.png" for c in "ab" for i in range(2)]
    shutil.rmtree(tmp_path / name / "a")
    assert read(load(tmp_path).test)["label"].tolist() == [1, 1], "a number means the same class in both"
    write(tmp_path / name / "c" / "0.png")
    with pytest.raises(UserError, match=rf"{name} has the class 'c', which .*train has not.*There are: a, b"):
        load(tmp_path)


def test_test_path(folder, tmp_path):
    shutil.copytree(folder / "dog", tmp_path / "more/dog")
    source = load(folder, test_path=str(tmp_path / "more"))
    assert (source.train.size, source.test.size) == (16, 5)
    assert read(source.test)["label"].tolist() == [1] * 5
    split = shutil.copytree(folder, tmp_path / "both" / "train").parent
    assert load(split, validation=0.5).train.size == 16 - 5 - 2 - 0, "held out, with no folder to evaluate on"
    for name in ("val", "test"):
        shutil.copytree(folder, split / name)
    with pytest.raises(
        UserError, match=r"test and .*val: which is to evaluate on\? Set --config\.data\.test_path=.*test"
    ):
        load(split)
    assert load(split, test_path=str(split / "val")).test.size == 16


def test_a_class_may_be_called_train(tmp_path):
    for i in range(3):
        write(tmp_path / "train" / f"{i}.png")
        write(tmp_path / "car" / f"{i}.png")
    assert load(tmp_path).labels == ("car", "train")
    shutil.rmtree(tmp_path / "train")
    write(tmp_path / "train/steam/0.png")
    with pytest.raises(UserError, match=r"has 'train', with folders in it, and 'car': classes, or splits\?.*test_path"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda root: shutil.rmtree(root), r"data\.path=.*pets' does not exist"),
        (lambda root: (shutil.rmtree(root), root.write_text("")), r"pets' is a file, not a folder"),
        (lambda root: (shutil.rmtree(root), root.mkdir()), r"pets has no folders in it: expected one a class"),
        (lambda root: (root / "fox").mkdir(), r"pets/fox has no images: expected files that end in \.bmp, .*Remove"),
        (lambda root: write(root / "b.png"), r"pets/b\.png is in no class: expected images in .*pets/CLASS/"),
        (lambda root: (root / "dog/9.png").symlink_to("nowhere.png"), r"dog/9\.png can't be read: No such file"),
        (
            lambda root: [shutil.rmtree(root / c) for c in ("cat", "dog")],
            r"pets has the class 'emu' only: .*at least two",
        ),
        (
            lambda root: (shutil.rmtree(root / "cat"), [(root / "dog" / f"{i}.png").unlink() for i in range(4)]),
            r"of the 2 images in .*holds out none",
        ),
    ],
)
def test_folders_that_are_no_data(folder, make, why):
    make(folder)
    with pytest.raises(UserError, match=why):
        load(folder)


def test_splits_without_classes(tmp_path):
    write(tmp_path / "train/0.png")
    write(tmp_path / "test/0.png")
    with pytest.raises(UserError, match=r"train/0\.png is in no class: expected images in .*train/CLASS/"):
        load(tmp_path)


def test_what_is_evaluated_on_may_be_of_one_class_but_not_what_is_trained_on(folder, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(folder / "dog", one / "dog")
    assert load(folder, test_path=str(one)).test.size == 5
    with pytest.raises(UserError, match=r"one has the class 'dog' only: expected at least two"):
        load(one, test_path=str(folder))


def test_other_images_are_counted(folder, tmp_path):
    source = load(folder)
    assert "left out" not in source.transforms
    for name in ("cat/a.GIF", "cat/b.tif", "dog/deeper/c.heic", "emu/d.avif", "emu/.e.gif", "f.gif"):
        (folder / name).write_bytes(gif())
    again = load(folder)
    assert again.transforms == {"size": 8, "channels": 3, "left out": 4}
    assert (again.facts, again.fingerprint) == (source.facts, source.fingerprint)
    (tmp_path / "more/cat").mkdir(parents=True)
    for name in ("0.png", "1.tiff"):
        shutil.copy(folder / "dog/0.png", tmp_path / "more/cat" / name)
    assert load(folder, test_path=str(tmp_path / "more")).transforms["left out"] == 5
    (folder / "fox").mkdir()
    (folder / "fox/0.gif").write_bytes(gif())
    with pytest.raises(UserError, match=r"fox has no images: expected files that end in \.bmp"):
        load(folder)


def test_links_are_not_followed_in_circles(folder):
    (folder / "dog/again").symlink_to(folder)
    (folder / "fox").symlink_to(folder / "dog")
    source = load(folder)
    assert source.labels == ("cat", "dog", "emu", "fox") and source.train.size + source.test.size == 21


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        bits = bytes([content[len(content) // 2] ^ 1])
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello",
                "cut": content[: len(content) * 2 // 3],
                "flipped": content[: len(content) // 2] + bits + content[len(content) // 2 + 1 :],
                "other": gif(),
            }[how]
        )


def gif():
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "GIF")
    return content.getvalue()


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        *((s, h) for s in ("png", "jpg", "webp", "bmp") for h in ("gone", "empty", "text", "cut", "other")),
        ("png", "flipped"),  # the others have no checksums: only the fingerprint sees it
    ],
)
def test_damaged_images(tmp_path, suffix, how):
    for i in range(6):
        write(tmp_path / "a" / f"{i}.{suffix}", noise(40, 40), **({"compress_level": 0} if suffix == "png" else {}))
    write(tmp_path / "b/0.png")
    options = {"test_path": str(tmp_path)}
    whole = read(load(tmp_path, **options).train)
    strict, lenient = (load(tmp_path, on_corrupt=p, **options).train for p in ("raise", "skip"))
    damage(tmp_path / "a" / f"5.{suffix}", how)
    with pytest.raises(
        UserError, match=rf"a/5\.{suffix} is no image that can be decoded: .*data\.on_corrupt=skip"
    ) as said:
        read(strict, 0, 5)
    assert " 0x" not in str(said.value)
    assert ("decoded: not BMP, JPEG, PNG or WebP. " in str(said.value)) == (how in ("empty", "text", "other"))
    rows = read(lenient, 4, 5, -1, 0)
    assert rows[SKIP].dtype == bool and rows[SKIP].tolist() == [False, True, False, False]
    assert not rows["image"][1].any() and rows["label"].shape == (4,)
    np.testing.assert_array_equal(rows["image"][[0, 3]], whole["image"][[4, 0]])
    read(strict, 0, 1, 2, 3, 4, -1)


def decode(path, size=8, channels=3):
    return image_folder.decode(str(path), size, channels)


def test_no_flipped_bit_of_a_png_changes_pixels_unseen(tmp_path):
    smooth = Image.fromarray(noise(4, 4)).resize((32, 32), Image.Resampling.BICUBIC)
    path = write(tmp_path / "a.png", smooth)
    content, pixels, refused = path.read_bytes(), decode(path), 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            np.testing.assert_array_equal(decode(path), pixels)
        except AssertionError:
            raise
        except Exception:
            refused += 1
    assert refused > 0.97 * len(content), "all but the end of the file, which means nothing"


def test_scaled_to_cover_then_cropped_around_the_centre(tmp_path):
    wide = noise(20, 60)
    covering = Image.fromarray(wide).resize((24, 8), Image.Resampling.BICUBIC)
    square = decode(write(tmp_path / "wide.png", wide))
    np.testing.assert_array_equal(square, np.asarray(covering)[:, 8:16])
    high = decode(write(tmp_path / "high.png", wide.transpose(1, 0, 2)))
    np.testing.assert_array_equal(high, square.transpose(1, 0, 2))
    pixels = noise(8, 8)
    np.testing.assert_array_equal(decode(write(tmp_path / "same.png", pixels)), pixels)
    assert decode(write(tmp_path / "small.png", noise(3, 2)), 16).shape == (16, 16, 3)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(decode(write(tmp_path / "stripes.png", stripes)).astype(int) - 128).max() <= 8, "antialiased"


def test_a_large_photograph_loses_no_more_than_scaling_takes(tmp_path):
    smooth = np.asarray(Image.fromarray(noise(38, 50)).resize((1024, 768), Image.Resampling.BICUBIC))
    path = write(tmp_path / "a.jpg", smooth, quality=92)
    with Image.open(path) as whole:
        exact = whole.resize((64, 64), Image.Resampling.BICUBIC, box=(128, 0, 896, 768))
    assert abs(decode(path, 64).astype(int) - np.asarray(exact)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_upright(tmp_path, orientation):
    upright = Image.fromarray(np.kron([[0, 80], [160, 255]], np.ones((16, 16))).astype(np.uint8))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    taken = upright.transpose(turn[orientation]) if orientation in turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png", "webp"):
        path = write(tmp_path / f"a.{suffix}", taken.convert("RGB"), exif=exif, quality=95)
        corners = decode(path, 8, 1)[::7, ::7, 0].astype(int)
        assert abs(corners - [[0, 80], [160, 255]]).max() <= 8, suffix


def test_every_mode_becomes_colour_and_grey(tmp_path):
    grey = np.full((8, 8), 100, np.uint8)
    colour = np.full((8, 8, 3), [100, 100, 100], np.uint8)
    alpha = np.concatenate([colour, np.full((8, 8, 1), 255, np.uint8)], axis=2)
    alpha[:, :4, 3] = 0  # the left half can't be seen
    half = np.where(np.arange(8) < 4, 255, 100)[None, :, None]
    palette = Image.fromarray(colour).quantize(4)
    seen = Image.fromarray(alpha)
    cases = {
        "L": (Image.fromarray(grey), 100),
        "RGB": (Image.fromarray(colour), 100),
        "P": (palette, 100),
        "RGBA": (seen, half),
        "LA": (seen.convert("LA"), half),
        "I;16": (Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), 100),
        "1": (Image.fromarray(grey > 50), 255),
    }
    for mode, (image, expected) in cases.items():
        assert image.mode == mode
        path = write(tmp_path / f"{mode}.png", image)
        for channels in (1, 3):
            pixels = decode(path, 8, channels)
            assert pixels.shape == (8, 8, channels) and (pixels == expected).all(), (mode, channels)
    see_through = write(tmp_path / "p.png", palette, transparency=int(np.asarray(palette)[0, 0]))
    assert (decode(see_through) == 255).all(), "what is transparent is white"
    cmyk = write(tmp_path / "cmyk.jpg", Image.fromarray(colour).convert("CMYK"), quality=95)
    assert abs(decode(cmyk).astype(int) - 100).max() <= 3


def test_options():
    with pytest.raises(UserError, match=r"data\.size is not set"):
        flaxmodels.data.load(TARGET, path=".")
    with pytest.raises(UserError, match=r"data\.channels=2 has the wrong type: expected one of 1, 3"):
        load(".", channels=2)
    with pytest.raises(UserError, match=r"data\.on_corrupt='ignore' .*expected one of 'raise', 'skip'"):
        load(".", on_corrupt="ignore")
