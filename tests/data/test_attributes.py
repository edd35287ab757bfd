"""Attributes of images from text files: which image has which, and which files are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glf_fast.data import ImageDataset, as_images, load
from glf_fast.data.attributes import load_attribute
from glf_fast.data.celeba import CELEBA, FIRST
from glf_fast.errors import UserError
from glf_fast.images import save_png


def images(*names: str) -> ImageDataset:
    pixels = torch.zeros(len(names) or 3, 1, 2, 2, dtype=torch.uint8)
    return ImageDataset.of("set", "train", pixels, names=names)


CELEBA_LIST = "3\nBald Smiling\n000002.jpg -1  1\n000003.jpg  1 1\n000001.jpg 1 -1\n"


@pytest.mark.parametrize(
    ("text", "names", "has"),
    [
        (CELEBA_LIST, ("000001.jpg", "000002.jpg"), [False, True]),
        ("image_id,Bald,Smiling\nb.png,1,1\na.png,0,-1\n", ("a.png", "b.png"), [False, True]),
        ('\ufefffile, Smiling\n"sub/a, 1.png",yes\nb.png , No\n\n', ("sub/a, 1.png", "b.png"), [True, False]),
        ("place,Smiling\n0,1\n2,true\n1,FALSE\n7,1\n", (), [True, False, True]),
    ],
)
def test_every_form_of_file(text: str, names: tuple[str, ...], has: list[bool], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert load_attribute(tmp_path / "a.txt", "Smiling", images(*names)).tolist() == has


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CELEBA_LIST,
            r"no row for 3 of the 3 train images of set \(0, 1, 2\), but for '000002.jpg'; its first column must",
        ),
        ("i,Smiling\n0,1\n2,0\n", r"no row for 1 of the 3 train images of set \(1\); its first"),
        ("i,Smilling\n0,1\n", "no attribute 'Smiling'; did you mean 'Smilling'"),
        ("i,Bald,Smiling\n0,1\n", "line 2: 1 values for 2 attributes"),
        ("i,Smiling\n0,1\n1,maybe\n", "line 3: Smiling = 'maybe' must be 1, or 0 or -1"),
        ("i,Smiling\n0,1\n0,1\n", "line 3: a second row for 0"),
        ("i,Smiling,Smiling\n0,1\n", "needs a line of different names"),
        ("i;Smiling\n0;1\n", "separated by commas"),
        ("", "needs a line of different names"),
        ('i,Smiling\n"0,1\n', "is not a CSV file"),
        ("i,Smiling\n\udcff,1\n", "is not a text file in UTF-8"),
    ],
)
def test_refusals(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        load_attribute(tmp_path / "a.csv", "Smiling", images())


def test_images_keep_the_names_of_their_files_and_the_places_in_an_array(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "folder" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / "folder" / f"{i % 2}" / f"{i:02}.png", torch.full((1, 4, 4), i, dtype=torch.uint8))
    np.save(tmp_path / "array.npy", np.arange(20, dtype=np.uint8)[:, None, None] + np.zeros((20, 4, 4), np.uint8))
    for split in ("train", "test"):
        folder, array = (as_images(load(str(tmp_path / name), split)) for name in ("folder", "array.npy"))
        for data, name in ((folder, lambda i: f"{i % 2}/{i:02}.png"), (array, str)):
            assert data.names == tuple(name(i) for i in data.images[:, 0, 0, 0].tolist())
    assert (
        FIRST["test"] + CELEBA.splits["test"] - 1 == 202_599 and FIRST["train"] + CELEBA.splits["train"] < FIRST["test"]
    )
