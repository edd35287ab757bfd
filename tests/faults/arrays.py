"""Arrays of images in .npy and .npz files, with shapes, types, labels and headers of all kinds."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.collections_of_files import SPLITS, Source


def arrays(place: Path, chance: random.Random) -> Source:
    """A .npy or .npz of images, with shapes, types and labels of all kinds."""
    values = np.random.default_rng(chance.randrange(2**32))
    n = chance.choice((1, 2, 3, 5, 10, 11, 30))
    shape = chance.choice(((n, 8, 8), (n, 8, 8, 1), (n, 8, 8, 3), (n, 3, 8, 8), (n, 1, 8, 8)))
    pixels = values.integers(0, 256, shape, dtype=np.uint8)
    seen = pixels[..., None] if pixels.ndim == 3 else pixels.transpose(0, 2, 3, 1) if shape[1] in (1, 3) else pixels
    if chance.random() < 0.4:
        return _single(place, chance, pixels, seen)
    source = Source("src.npz", policy="array x")
    source.arrays = {"": seen}
    named: dict[str, Any] = {"x": pixels}
    label = "labels"
    if chance.random() < 0.4:
        other = values.integers(0, 256, (chance.choice((1, 4)), *shape[1:]), dtype=np.uint8)
        both = (
            seen,
            other[..., None] if other.ndim == 3 else other.transpose(0, 2, 3, 1) if shape[1] in (1, 3) else other,
        )
        names = chance.choice((("train", "test"), ("x_train", "x_test"), ("train_images", "test_images")))
        named = dict(zip(names, (pixels, other), strict=True))
        source.arrays, label = dict(zip(SPLITS, both, strict=True)), chance.choice(("train_labels", "y_train"))
        source.policy = f"array {names[0].replace('train', '{}')}"
        if chance.random() < 0.2:
            del named[names[1]]
            source.refused = True
    if chance.random() < 0.6:
        named[label], good = chance.choice(_labels(n))
        if not good:
            source.refused = True
    if chance.random() < 0.1:
        named["x"] = np.array([{"a": 1}], object)  # a pickle
        source.refused = True
    save = chance.choice((np.savez, np.savez_compressed))
    save(place / source.path, **named)
    if chance.random() < 0.1:
        with zipfile.ZipFile(place / source.path, "a") as archive:
            archive.writestr(chance.choice(("notes.txt", "x.npy/", "a\n\x1b[31m.npy")), b"no array")
        source.refused = None
    return source


def _labels(n: int) -> list[tuple[np.ndarray, bool]]:
    """Labels of many kinds, and whether they are class numbers."""
    return [
        (np.arange(n), True),
        (np.zeros(n, np.uint8), True),
        (np.zeros(n, bool), True),
        (np.ones(n), True),
        (np.zeros((n, 1), np.int64), True),
        (np.arange(n).astype(">i4"), True),
        (np.zeros(n + 1, np.int64), False),
        (np.zeros((n, 10), np.int64), False),
        (np.full(n, 0.5), False),
        (np.full(n, np.nan), False),
        (np.full(n, np.inf), False),
        (np.full(n, 1e300), False),
        (np.full(n, 2**64 - 1, np.uint64), False),
        (np.full(n, 1j), False),
        (np.array(["cat"] * n), False),
        (np.array([b"cat"] * n), False),
        (np.zeros(n, "M8[s]"), False),
        (np.zeros(n, [("a", "i4"), ("b", "f4")]), False),
    ]


def _single(place: Path, chance: random.Random, pixels: np.ndarray, seen: np.ndarray) -> Source:
    source = Source("src.npy", policy="array images", arrays={"": seen})
    path = place / source.path
    match chance.randrange(8):
        case 0 | 1:
            np.save(path, pixels)
        case 2:
            np.save(path, np.asfortranarray(pixels))
        case 3:
            wrong: Any = chance.choice(
                (
                    pixels / 255, pixels.astype(np.int64), pixels > 9, pixels.astype(complex), pixels[0, 0, 0],
                    pixels[:, :, :0], pixels[None, None], np.zeros((4, 8, 8, 2), np.uint8),
                    np.zeros((0, 8, 8), np.uint8), np.array("text"), np.zeros((3, 8, 8), [("a", "u1")]),
                    np.zeros((3, 8, 8), "M8[s]"), np.array([], np.uint8),
                )
            )  # fmt: skip
            np.save(path, wrong)
            source.refused = True
        case 4:
            np.save(path, np.array([pixels, None], object), allow_pickle=True)
            source.refused = True
        case 5:  # 2-D: rows of a table
            np.save(path, pixels.reshape(len(pixels), -1) / 255)
            source.refused = None
        case 6:
            with path.open("wb") as file:
                np.lib.format.write_array(file, pixels, version=chance.choice(((1, 0), (2, 0), (3, 0))))
        case _:
            header = chance.choice(
                (
                    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,)}",
                    "{'descr': '|O', 'shape': (1,)}", "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8)}",
                    "[", "{" * 9000, "('" + "a" * 20000,
                    "{'descr': '|V8', 'fortran_order': False, 'shape': (2, 8, 8)}", "__import__('os').system('id')",
                    "", "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (2,)}", "{'descr': 5}", "1" * 5000,
                    "\x1b[31m\n", "{'descr': '|u1', 'fortran_order': 3, 'shape': (2, 8, 8)}",
                    "{'descr': '|u1', 'shape': True}", "\\xff(",
                )
            ).encode("latin-1")  # fmt: skip
            path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header + pixels.tobytes())
            source.refused = None if b"u1" in header else True
    return source
