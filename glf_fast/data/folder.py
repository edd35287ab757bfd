"""Images of any folder or zip: opened, turned upright, cropped to a square, resized."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from glf_fast.data.dataset import SPLITS, ImageDataset, split_off_test
from glf_fast.errors import UserError

__all__ = ["load_folder"]

# An image that unpacks to more pixels is an attack or a mistake; Pillow's own limit only warns, at 89 million.
MAX_PIXELS = 50_000_000


def load_folder(path: Path, split: str, image_size: int | None = None) -> ImageDataset:
    """A split of all images below a folder or in a zip, in the order of their names.

    Each image is turned upright (EXIF), laid on white if it is transparent, cropped to its central square and resized to
    `image_size` with Pillow's antialiased LANCZOS filter. Without `image_size` images are neither cropped nor resized, and all
    must have the same size. The images have one channel if all files are grey, else three. Sub-folders `train` and `test` are
    the splits if both exist; otherwise a tenth of a fixed random order is the test split. Hidden files are ignored.

    Raises:
        UserError: no images, a file that is not an image, different sizes, an image of more than 50 million pixels.
    """
    files = list(_files(path))
    groups = {name: [f for f in files if name in PurePosixPath(f[0]).parts[:-1]] for name in SPLITS}
    has_splits = all(groups.values())
    chosen = groups[split] if has_splits else files
    if not chosen:
        raise UserError(f"{path} holds no files; a folder or zip of images is needed")
    arrays = [
        _open(path, name, read, image_size) for name, read in tqdm(chosen, "reading images", disable=len(chosen) < 2000)
    ]
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) > 1:
        some = ", ".join(f"{width}×{height}" for height, width in sorted(sizes)[:3])
        raise UserError(f"the images of {path} have {len(sizes)} different sizes ({some} …); give --data.image-size")
    grey = all(array.shape[2] == 1 for array in arrays)
    images = torch.from_numpy(
        np.stack([array if grey else np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays])
    )
    images = images.permute(0, 3, 1, 2).contiguous()
    policy = "as they are" if image_size is None else f"central square, LANCZOS to {image_size}"
    if not has_splits:
        images, _ = split_off_test(images, None, split)
        policy += "; test: a tenth of a fixed random order"
    return ImageDataset.of(str(path), split, images, None, policy)


def _as_pixels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """An opened image as uint8 (H, W, 1 or 3): upright, on white, cropped to its central square, resized."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    if image.mode != "RGB":
        image = image.convert("L")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, reader) of every file that is not hidden, sorted; nothing is unpacked to disk."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and not _hidden(name):
                yield name, file.read_bytes
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a zip file, or it is damaged ({error})") from error
    for name in sorted(archive.namelist()):
        if not name.endswith("/") and not _hidden(name):
            yield name, lambda name=name: archive.read(name)  # type: ignore[misc]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _open(path: Path, name: str, read: Callable[[], bytes], image_size: int | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's hints about odd but readable files
            image = Image.open(io.BytesIO(read()))
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{name} in {path} has {image.width} × {image.height} pixels; the limit is {MAX_PIXELS:,}: "
                    "resize the image or remove it"
                )
            return _as_pixels(image, image_size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        # Pillow's own message contains only the address of the buffer.
        reason = "in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        hidden = PurePosixPath(name).with_name(f".{PurePosixPath(name).name}")
        raise UserError(
            f"{name} in {path} is not a readable image ({reason}); remove it, or rename it to {hidden}, which is ignored"
        ) from error
