"""CelebA, aligned and cropped: the central 160 × 160 pixels, resized; decoded once and kept as one array."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.fetch import Attempt, check_hash, download, first, published
from glf_fast.files import atomic_write, cache_dir

__all__ = ["load_celeba"]

ARCHIVE, PARTITION = "img_align_celeba.zip", "list_eval_partition.txt"
MD5 = {ARCHIVE: "00d2c5bc6d35e252742224ab0c1e8fcb", PARTITION: "d32c9cbf5e040fd4025c592c306e6668"}
# The authors' own store; it limits downloads by the day.
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
IDS = {ARCHIVE: "0B7EVK8r0v71pZjFTYXZWM3FlRnM", PARTITION: "0B7EVK8r0v71pY0NSMzRuSXJEVkk"}
# The partition file numbers 0 train, 1 valid, 2 test. Validation images are left out, as in the GLF paper's comparison.
NUMBER = {"train": "0", "test": "2"}
CROP = 160


def load_celeba(
    split: str, image_size: int | None = None, data_dir: Path | None = None, download: bool = True
) -> ImageDataset:
    """uint8 (162770 or 19962, 3, S, S), S = `image_size`, 64 by default.

    The central 160 × 160 of the 218 × 178 pixels, as Lucic et al. (arXiv:1711.10337) crop, resized with Pillow's antialiased
    bilinear filter. Fréchet distances of different crops cannot be compared. Decoding takes minutes and happens once; the
    array is kept in the cache (2.0 GB for 64 pixels) and mapped into memory afterwards.
    """
    size = image_size or 64
    policy = f"central {CROP} × {CROP}, antialiased bilinear to {size}"
    key = hashlib.sha256(f"{MD5} {policy}".encode()).hexdigest()[:16]
    decoded = _cache() / f"{split}-{size}-{key}.npy"
    if not decoded.is_file():
        partition, archive = (_find(name, data_dir, download) for name in (PARTITION, ARCHIVE))
        _decode(archive, _members(partition, split), size, decoded)
    images = torch.from_numpy(np.load(decoded, mmap_mode="c", allow_pickle=False))
    return ImageDataset.of("celeba", split, images, None, policy)


def _cache() -> Path:
    return cache_dir() / "data" / "celeba"


def _find(name: str, data_dir: Path | None, online: bool) -> Path:
    return first(
        f"CelebA's {name}",
        _attempts(name, data_dir, online),
        f"Download {ARCHIVE} and {PARTITION} from the authors' page (search for 'Large-scale CelebFaces Attributes') "
        f"into a folder and pass --data-dir FOLDER, or into {_cache()}",
    )


def _attempts(name: str, data_dir: Path | None, online: bool) -> Iterator[Attempt]:
    if data_dir is not None:
        yield Attempt(
            f"--data-dir {data_dir}", lambda: published(Path(data_dir) / name, given_by_user=True, md5=MD5[name])
        )
    target = _cache() / name
    yield Attempt(f"the cache {target.parent}", lambda: published(target, md5=MD5[name]))
    if online:
        url = DRIVE + IDS[name]
        yield Attempt(url, lambda: download(url, target, lambda file: check_hash(file, name, md5=MD5[name])))


def _members(partition: Path, split: str) -> list[str]:
    rows = (line.split() for line in partition.read_text().splitlines())
    return [row[0] for row in rows if len(row) == 2 and row[1] == NUMBER[split]]


def _decode(archive: Path, members: list[str], size: int, target: Path) -> None:
    """Write the split's pixels as one uint8 (N, 3, size, size) array, atomically, without holding it in memory."""
    with zipfile.ZipFile(archive) as images, atomic_write(target) as temporary:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(members), 3, size, size))
        for i, name in enumerate(tqdm(members, f"decoding CelebA to {size} pixels")):
            with Image.open(io.BytesIO(images.read(f"img_align_celeba/{name}"))) as image:
                left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
                # Cropped first: resize(box=…) would let the filter reach over the edge of the box.
                face = image.convert("RGB").crop((left, top, left + CROP, top + CROP))
                pixels[i] = np.asarray(face.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        pixels.flush()
