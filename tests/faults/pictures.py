"""Pictures of many formats and modes with known pixels, files that are none, and names that people and attackers give them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDE = 8

# Parts of names, as bytes, because a file system takes any but "/" and zero.
ODD_NAMES = (
    b"", b"new\nline", b"\x1b[31mred\x1b]0;title\x07", "\u202egnp".encode(), b"\xff\xfe",
    "\N{GRINNING FACE}".encode(), b" lead", b"trail ", b"-rf", b"--device", b"%s%d{}", b"a'b\"c", b"$HOME`id`",
    b"x" * 180, b"back\\slash", b"#?*", b"a:b", b"\t", b"\x7f", "e\u0301".encode(), "\u2028".encode(), b"\r",
    b"error: x", b"con", b"~root", "\ufeff".encode(), b"~", b"a" * 20 + b"\n" * 20,
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A file that is a square picture, or no usable one.

    Attributes:
        pixels: what it shows, (H, W, C); None: three channels of unknown values.
        bad: whether it is no usable picture.
    """

    ending: str
    content: bytes
    pixels: np.ndarray | None = None
    bad: bool = False
    side: int = SIDE


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(chance: random.Random, side: int = SIDE) -> Item:
    """A picture of any format and mode."""
    values = np.random.default_rng(chance.randrange(2**32))
    grey = values.integers(0, 256, (side, side), dtype=np.uint8)
    colour = values.integers(0, 256, (side, side, 3), dtype=np.uint8)
    wide = values.integers(0, 65536, (side, side), dtype=np.uint16)
    image = Image.fromarray(grey)
    match chance.randrange(16):
        case 0:
            return Item(chance.choice((".png", ".PNG", "")), saved(image, "PNG"), grey[:, :, None])
        case 1:
            ending, kind = chance.choice(
                ((".png", "PNG"), (".bmp", "BMP"), (".tif", "TIFF"), (".ppm", "PPM"), (".tga", "TGA"))
            )
            return Item(ending, saved(Image.fromarray(colour), kind), colour)
        case 2:
            ending, kind = chance.choice(((".pgm", "PPM"), (".tiff", "TIFF"), (".tga", "TGA"), (".bmp", "BMP")))
            return Item(ending, saved(image, kind), grey[:, :, None])
        case 3:
            ending, kind = chance.choice(((".png", "PNG"), (".tif", "TIFF")))
            return Item(ending, saved(Image.fromarray(wide), kind), (wide // 257).astype(np.uint8)[:, :, None])
        case 4:
            content = saved(Image.fromarray(wide.astype(">u2")), "TIFF")
            return Item(".tif", content, (wide // 257).astype(np.uint8)[:, :, None])
        case 5:
            content = b"P5 %d %d 65535\n" % (side, side) + wide.astype(">u2").tobytes()
            return Item(".pgm", content, (wide // 257).astype(np.uint8)[:, :, None])
        case 6:
            bits = image.point(lambda level: 255 * (level > 127)).convert("1")
            return Item(".png", saved(bits, "PNG"), np.where(grey > 127, np.uint8(255), np.uint8(0))[:, :, None])
        case 7:
            clear = Image.fromarray(np.dstack([colour, np.zeros_like(grey)]))
            return Item(".png", saved(clear, "PNG"), np.full_like(colour, 255))
        case 8:
            opaque = Image.fromarray(np.dstack([colour, np.full_like(grey, 255)]))
            ending, kind = chance.choice(((".png", "PNG"), (".tga", "TGA"), (".tif", "TIFF")))
            return Item(ending, saved(opaque, kind), colour)
        case 9:
            frames = [Image.new("RGB", (side, side), level) for level in ("red", "blue", "lime")]
            ending, kind = chance.choice(((".gif", "GIF"), (".tif", "TIFF"), (".png", "PNG")))
            first = np.broadcast_to(np.array([255, 0, 0], np.uint8), (side, side, 3))
            return Item(ending, saved(frames[0], kind, save_all=True, append_images=frames[1:]), first)
        case 10:
            return Item(".webp", saved(Image.fromarray(colour), "WEBP", lossless=True), colour)
        case 11:
            ending, kind = chance.choice(((".jpg", "JPEG"), (".jpeg", "JPEG"), (".jp2", "JPEG2000"), (".webp", "WEBP")))
            return Item(ending, saved(Image.fromarray(colour), kind), side=side)
        case 12:
            return Item(".jpg", saved(Image.fromarray(colour).convert("CMYK"), "JPEG"), side=side)
        case 13:
            return Item(".png", saved(Image.fromarray(colour).quantize(16), "PNG"), side=side)
        case 14:
            wrong = chance.choice((".jpg", ".gif", ".bmp", ""))  # the content decides, not the ending
            return Item(wrong, saved(image, "PNG"), grey[:, :, None])
        case _:
            return Item(".pgm", saved(Image.fromarray(wide), "PPM"), (wide // 257).astype(np.uint8)[:, :, None])


def no_picture(chance: random.Random) -> Item:
    """A file with the ending of a picture that is no usable one."""
    whole = saved(Image.effect_noise((64, 64), 50), "PNG")
    match chance.randrange(9):
        case 0:
            content = b""
        case 1:
            content = b"no picture\n"
        case 2:
            content = whole[: len(whole) // 2]
        case 3:
            content = bomb(chance.choice((10**6, 2**31 - 1)), 10**6)
        case 4:
            content = saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
        case 5:
            content = saved(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF")
        case 6:
            content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n"
        case 7:
            content = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
        case _:
            content = whole[:20] + bytes(30) + whole[50:]
    return Item(chance.choice((".png", ".jpg", ".tif", "")), content, bad=True)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
