"""The user's images in arrays, folders and zips: what is read, and how the rest is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glf_fast.data import load
from glf_fast.errors import UserError

RNG = np.random.default_rng(0)


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
    assert train.kind == "images"
    assert train.images.shape == expected
    assert len(test) == 2


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
        (lambda p: np.save(p, np.array([object()]), allow_pickle=True), "pickled objects are never loaded"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01"), "cannot be read as plain numpy arrays"),
        (lambda p: np.save(p, np.zeros((1, 8, 8), np.uint8)), r"a.npy holds 1 item\(s\); at least two are needed"),
    ],
)
def test_bad_npy(tmp_path: Path, save, message: str) -> None:
    save(tmp_path / "a.npy")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.npy"))


def test_bad_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(UserError, match="holds a, b; name the arrays 'train' and 'test'"):
        load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", train=np.zeros((3, 4, 4), np.uint8), train_labels=np.zeros(2))
    with pytest.raises(UserError, match="3 items but 2 labels"):
        load(str(tmp_path / "b.npz"))
    with pytest.raises(UserError, match="holds train, train_labels but no array 'test'; add this array, or rename"):
        load(str(tmp_path / "b.npz"), "test")
    np.savez(tmp_path / "c.npz", train=np.zeros((2, 4, 4), np.uint8), y_train=[0.5, 1.0])
    with pytest.raises(UserError, match=r"\(y_train\) holds float64 that are not class numbers"):
        load(str(tmp_path / "c.npz"))


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
    with pytest.raises(UserError, match="holds no pictures"):
        load(str(tmp_path / "empty"))
    folder = write_images(tmp_path / "text")
    write_images(folder / "sub")
    (folder / "sub" / "notes.png").write_text("hello")
    with pytest.raises(
        UserError,
        match=r"sub/notes.png in .* \(in no format of pictures\); .* hide it \(sub/\.notes.png\), or have it left",
    ):
        load(str(folder))
    folder = write_images(tmp_path / "sizes")
    Image.new("L", (9, 9)).save(folder / "odd.png")
    with pytest.raises(
        UserError,
        match=r"2 different sizes: 9×9: 1 file \(odd.png\); 8×8: .*; choose one.*--data.image-size in training",
    ):
        load(str(folder))
    folder = write_images(tmp_path / "cut")
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"000.png in .* is not a readable image"):
        load(str(folder))
    (tmp_path / "a.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="is not a zip file, or it is damaged"):
        load(str(tmp_path / "a.zip"))
