"""The pictures that users bring, good and bad."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from glf_fast.errors import UserError
from glf_fast.exploring.uploads import MOST_BYTES, fitted, read_upload


def png(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def claims(width: int, height: int) -> bytes:
    """A PNG file of a hundred bytes that says it has so many pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 6, 3), np.uint8)
    assert (
        fitted(read_upload(png(Image.fromarray(pixels))), (3, 10, 6)) == torch.tensor(pixels).permute(2, 0, 1)
    ).all()
    grey = pixels[..., 0]
    assert (fitted(read_upload(png(Image.fromarray(grey))), (1, 10, 6))[0] == torch.tensor(grey)).all()


def test_channels_and_sizes_become_those_of_the_model() -> None:
    grey = Image.new("L", (50, 30), 77)
    assert fitted(read_upload(png(grey)), (3, 8, 8)).tolist() == torch.full((3, 8, 8), 77).tolist()
    red = Image.new("RGB", (30, 50), (255, 0, 0))
    assert fitted(read_upload(png(red)), (1, 8, 8)).unique().tolist() == [76]
    transparent = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    assert fitted(read_upload(png(transparent)), (3, 4, 4)).unique().tolist() == [255]
    sides = Image.new("RGB", (90, 30), "black")  # only the middle is kept
    sides.paste("white", (30, 0, 60, 30))
    assert fitted(read_upload(png(sides)), (1, 6, 6)).min() > 200
    turned = Image.new("L", (20, 10), 0)
    turned.paste(255, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: the left half comes to the top
    upright = fitted(read_upload(png(turned, format="JPEG", exif=exif, quality=95)), (1, 20, 10))
    assert upright[0, :9].min() > 200 and upright[0, 11:].max() < 50


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_usual_formats_are_read(kind: str) -> None:
    assert fitted(read_upload(png(Image.new("RGB", (16, 16), "white"), format=kind)), (1, 8, 8)).min() > 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this file is empty"),
        (b"hello, I am a text file", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture that can be read"),
        (bytes(MOST_BYTES + 1), "more than 20 MB"),
        (claims(10_000, 10_000), "10000 × 10000 pixels; at most 50 million"),
        (claims(100_000, 100_000), "pixels"),
        (png(Image.new("RGB", (64, 64)))[:-40], "cannot be read"),
        (png(Image.new("F", (8, 8)), format="TIFF"), "cannot be read"),
    ],
)
def test_other_files_are_refused_in_words(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_upload(content)
    assert "\n" not in str(error.value)
