"""Images that a user brings: checked, and brought to the size and the channels of a model, in memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from glf_fast.data.pixels import FORMATS, Unreadable, read_pixels
from glf_fast.errors import UserError

__all__ = ["MOST_BYTES", "fitted", "read_upload"]

MOST_BYTES = 20 * 2**20
_MOST_PIXELS = 50_000_000


def read_upload(content: bytes) -> Image.Image:
    """The picture in the bytes of a file, of mode L or RGB: upright, and on white where it is transparent.

    Raises:
        UserError: more than 20 MB or 50 million pixels, no picture, or a damaged one.
    """
    if not content:
        raise UserError("this file is empty; choose a picture (PNG, JPEG, …)")
    if len(content) > MOST_BYTES:
        raise UserError(f"this file has more than {MOST_BYTES >> 20} MB; choose a smaller picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's hints about many pixels, and about odd but readable files
            width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise UserError("this picture has too many pixels; choose a smaller one") from None
    except Exception:  # Pillow's decoders raise whatever they run into
        raise UserError(
            "this file is not a picture that can be read; choose a PNG, JPEG, GIF, WEBP, TIFF or BMP"
        ) from None
    if width * height > _MOST_PIXELS:
        raise UserError(
            f"this picture has {width} × {height} pixels; at most {_MOST_PIXELS // 10**6} million can be taken"
        )
    try:
        pixels, _ = read_pixels(io.BytesIO(content))
    except Unreadable as error:
        raise UserError(f"this picture cannot be read ({error}); choose another one") from None
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def fitted(picture: Image.Image, shape: Sequence[int]) -> Tensor:
    """A picture as uint8 (C, H, W) of this shape: cropped at the longer sides, resized, made grey or given three channels."""
    channels, height, width = shape
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1).contiguous()
