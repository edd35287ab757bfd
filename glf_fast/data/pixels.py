"""Image files as pixels: opened, turned upright, laid on white, cropped to a square, resized."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

__all__ = ["ENDINGS", "FORMATS", "Unreadable", "read_pixels"]

# Formats of pictures. Pillow knows more, and hands some of those to other programs (EPS to Ghostscript). The pictures in an
# ICNS file may have more pixels than it says: 200 kB needed 1.7 GiB of memory.
FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "TGA", "PPM", "ICO", "JPEG2000", "PCX", "SGI", "DDS",
    "AVIF",
)  # fmt: skip
ENDINGS = frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)

# JPEG files of more pixels are decoded at a fraction of their size, where that is enough.
LARGE = 50_000_000
# Decoding, turning and converting hold up to four copies of four bytes a pixel.
BYTES_PER_PIXEL = 16


class Unreadable(Exception):
    """A file is no image that can be used; the message says why."""


def read_pixels(file: BinaryIO, image_size: int | None = None) -> tuple[np.ndarray, bool]:
    """The pixels of an open image file, uint8 (H, W, 1 or 3), and whether they are the first of several frames or pages.

    The pixels are turned upright (EXIF), laid on white where they are transparent, and grey if the file is.

    Grey levels of 16 bits are scaled to 8. With `image_size` the central square is resized with Pillow's antialiased LANCZOS
    filter.

    Raises:
        Unreadable: no picture, a damaged one, one without a defined range (floating point), or one that needs more memory
            than there is.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is the same on every machine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's hints about odd but readable files
            image: Image.Image = Image.open(file, formats=FORMATS)
            if image_size is not None and image.width * image.height > LARGE:
                shrink = max(1, min(image.size) // (2 * image_size))
                image.draft(image.mode, (image.width // shrink, image.height // shrink))  # does nothing but for JPEG
            needed, available = BYTES_PER_PIXEL * image.width * image.height, _available_memory()
            if needed > available:
                raise Unreadable(
                    f"its {image.width} × {image.height} pixels need {needed / 2**30:.1f} GiB of memory, and there are "
                    f"{available / 2**30:.1f}"
                )
            return _as_pixels(image, image_size), _has_more(image)
    except Unreadable:
        raise
    except UnidentifiedImageError:  # Pillow's own message names the buffer that it was given, by its address
        raise Unreadable("in no format of pictures") from None
    except Exception as error:  # Pillow's decoders raise whatever they run into, struct.error and RuntimeError among it
        raise Unreadable(str(error) or type(error).__name__) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _has_more(image: Image.Image) -> bool:
    """Whether an image is an animation, or has further pages; a second frame that is damaged does not count."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _as_pixels(image: Image.Image, image_size: int | None) -> np.ndarray:
    if image.format == "TIFF" and image.mode == "I":  # other formats, and I;16 of TIFF, have at most 16 bits
        raise Unreadable(
            "32-bit or signed levels have no defined white; save such images with 16 bits or as uint8 .npy"
        )
    # Pillow scales the levels of all other formats with 9 to 16 bits to 16; it gives those of a TIFF with 12 bits as they are.
    bits = image.tag_v2.get(258, (16,))[0] if isinstance(image, TiffImageFile) else 16
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), bits))
    elif image.mode == "F":
        raise Unreadable("floating-point levels have no defined white; save such images as uint8 .npy")
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    if image.mode != "RGB":
        image = image.convert("L")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _eight_bits(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels of 0 … 2^bits − 1 (9 to 16 bits) as uint8."""
    low, high, white = int(levels.min()), int(levels.max()), 2**bits - 1
    if low < 0 or high > white:
        raise Unreadable(f"integer levels of {low} … {high} have no defined white; save such images as uint8 .npy")
    return (levels.astype(np.int64) * 255 // white).astype(np.uint8)


def _available_memory() -> int:
    """Bytes of memory that can be had without swapping; those of the machine where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 2**33
