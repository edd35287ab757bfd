"""CelebA, aligned and cropped: the central 160 × 160 pixels, resized; decoded once and cached as one array."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from glf_fast.data.dataset import ImageDataset
from glf_fast.data.routes import File, Mirror
from glf_fast.data.source import Files, Source
from glf_fast.files import atomic_write, one_at_a_time

__all__ = ["CELEBA"]

ARCHIVE, PARTITION = "img_align_celeba.zip", "list_eval_partition.txt"
# The partition file numbers 0 train, 1 valid, 2 test. Validation images are left out, as in arXiv:1905.10485.
NUMBER = {"train": "0", "test": "2"}
# The splits follow each other in the archive; the first image of each, by the number that is its name.
FIRST = {"train": 1, "test": 182_638}
CROP = 160


def read_celeba(files: Files, split: str, image_size: int | None) -> ImageDataset:
    """uint8 (162770 or 19962, 3, S, S), S = `image_size`, 64 by default.

    The images are the central 160 × 160 of the 218 × 178 pixels, as Lucic et al. (arXiv:1711.10337) crop them, resized with
    Pillow's antialiased bilinear filter. Fréchet distances of different crops cannot be compared. Decoding takes minutes and
    happens once; the array is cached (2.0 GB for 64 pixels) and mapped into memory afterwards.
    """
    size = image_size or 64
    policy = f"central {CROP} × {CROP}, antialiased bilinear to {size}"
    hashes = {file.name: file.digest.removeprefix("md5:") for file in sorted(files.source.files, key=lambda f: f.name)}
    key = hashlib.sha256(f"{hashes} {policy}".encode()).hexdigest()[:16]
    decoded = files.source.cache / f"{split}-{size}-{key}.npy"
    if not decoded.is_file():
        archive, partition = files.path(ARCHIVE), files.path(PARTITION)
        with one_at_a_time(decoded.parent):
            if not decoded.is_file():  # which another process may have decoded meanwhile
                _decode(archive, _members(partition, split), size, decoded)
    images = torch.from_numpy(np.load(decoded, mmap_mode="c", allow_pickle=False))
    names = [f"{FIRST[split] + place:06d}.jpg" for place in range(len(images))]
    return ImageDataset.of("celeba", split, images, None, policy, names)


def _members(partition: Path, split: str) -> list[str]:
    rows = (line.split() for line in partition.read_text(encoding="utf-8").splitlines())
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


CELEBA = Source(
    name="celeba",
    title="CelebA, aligned: faces, 64 × 64 by default, colour",
    licence="for non-commercial research",
    citation="Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild, arXiv:1411.7766",
    kind="images",
    shape=(3, 64, 64),
    splits={"train": 162_770, "test": 19_962},
    read=read_celeba,
    files=(
        File(PARTITION, "md5:d32c9cbf5e040fd4025c592c306e6668", limit=10_000_000),
        File(ARCHIVE, "md5:00d2c5bc6d35e252742224ab0c1e8fcb", limit=2_000_000_000),
    ),
    routes=(
        # The authors' own store, which limits downloads by the day.
        Mirror(
            "https://drive.usercontent.google.com/download?export=download&confirm=t&id=",
            {ARCHIVE: "0B7EVK8r0v71pZjFTYXZWM3FlRnM", PARTITION: "0B7EVK8r0v71pY0NSMzRuSXJEVkk"},
        ),
    ),
    by_hand=(
        f"Download {ARCHIVE} and {PARTITION} from the authors' page (search for 'Large-scale CelebFaces Attributes')"
    ),
    resizes=True,
)
