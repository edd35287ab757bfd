"""Folders, zips and pictures as people have them: what is read, what is left out and counted, what is refused and named."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glf_fast.data import load, pixels
from glf_fast.errors import UserError

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def png(mode: str = "L", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, n: int = 4) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (path / f"{i}.png").write_bytes(png())
    return path


def sizes(source: Path, **options: bool) -> list[int]:
    return [len(load(str(source), split, **options)) for split in ("train", "test")]


def pgm(levels: np.ndarray, top: int) -> bytes:
    return b"P5 8 8 %d\n" % top + levels.astype(">u2").tobytes()


def tiff_of_12_bits(levels: np.ndarray) -> bytes:
    data = bytes.fromhex("".join(f"{level:03x}" for level in levels.flat))
    fields = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 8, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items()]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + b"".join(entries) + bytes(4) + data


def read(content: bytes, image_size: int | None = None) -> np.ndarray:
    return pixels.read_pixels(io.BytesIO(content), image_size)[0]


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", saved(Image.fromarray(RAMP), "PNG")),
        ("a.tif", saved(Image.fromarray(RAMP), "TIFF")),
        ("a.tif", saved(Image.fromarray(RAMP.astype(">u2")), "TIFF")),
        ("a.tif", tiff_of_12_bits(RAMP // 16)),
        ("a.pgm", pgm(RAMP, 65535)),
        ("a.pgm", pgm(RAMP // 64, 1023)),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-12-bits", "pgm", "pgm-10-bits"],
)
def test_sixteen_bits_become_eight(name: str, content: bytes) -> None:
    assert np.abs(read(content)[:, :, 0].astype(int) - RAMP // 257).max() <= 1


@pytest.mark.parametrize(
    "levels",
    [(RAMP / 65535).astype(np.float32), RAMP.astype(np.int32) * 9, RAMP.astype(np.int32) // 7000],
    ids=["floats", "large", "0 to 9"],
)
def test_levels_without_a_white_are_refused(levels: np.ndarray) -> None:
    image = Image.fromarray(levels)
    with pytest.raises(pixels.Unreadable, match="no defined white"):
        read(saved(image, "TIFF"))


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def exif_of_nonsense() -> bytes:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + saved(Image.new("L", (8, 8)), "JPEG")[2:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bomb(2_000_000, 1_000_000), "2000000 × 1000000 pixels need 29802.3 GiB of memory"),
        (png()[:45], "truncated"),
        (b"nothing", "in no format of pictures"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "in no format of pictures"),
    ],
    ids=["bomb", "cut", "text", "eps"],
)
def test_what_is_no_picture_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(pixels.Unreadable, match=reason):
        read(content)


def test_large_pictures_that_fit_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "LARGE", 1000)
    photo = saved(Image.linear_gradient("L").resize((800, 400)), "JPEG")
    whole, reduced = read(photo), read(photo, 16)
    assert whole.shape == (400, 800, 1) and reduced.shape == (16, 16, 1)
    monkeypatch.setattr(pixels, "_available_memory", lambda: 300_000)  # a quarter of each side is enough for 16 pixels
    assert np.array_equal(read(photo, 16), reduced)
    with pytest.raises(pixels.Unreadable, match="800 × 400 pixels need"):
        read(photo)


def test_all_unusable_files_are_named_together_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "a", 20)
    for i in range(7):
        (source / f"bad{i}.png").write_bytes(b"nothing")
    (source / "gone.png").symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"8 files in .* bad0.png \(in no format.*bad4.png \([^;]*\); and 3 more; remove"
    ):
        load(str(source))
    assert sizes(source, skip_unusable=True) == [18, 2]
    notice = "8 files (bad0.png, bad1.png, bad2.png, bad3.png, bad4.png, …) left out: not usable"
    assert capsys.readouterr().err.count(notice) == 1, "once, not for each split"
    assert "8 unusable files left out" in load(str(source), skip_unusable=True).policy
    clean = load(str(folder(tmp_path / "clean", 20)), skip_unusable=True)
    assert clean.fingerprint == load(str(tmp_path / "clean")).fingerprint


def test_the_unusable_files_of_both_splits_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (folder(tmp_path / split) / f"bad-{split}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"train/bad-train.png.*test/bad-test.png"):
        load(str(tmp_path))


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_of_a_large_member_that_is_no_picture_little_is_unpacked(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {"a.png": png(), "b.png": png()})
    with zipfile.ZipFile(source, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(1 << 27))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"zeros.png in .* \(in no format of pictures\)"):
            load(str(source))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_zips_with_backslashes_have_folders(tmp_path: Path) -> None:
    members = {f"{'train' if i < 40 else 'test'}\\{i}.png": png() for i in range(50)}
    members["train\\.hidden\\x.png"] = b"nothing"
    assert sizes(write_zip(tmp_path / "a.zip", members)) == [40, 10]


def test_files_beside_the_pictures_are_counted_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {f"00000/img{i:08}.png": png() for i in range(20)}
    source = write_zip(tmp_path / "a.zip", {**members, "dataset.json": b"{}", "../up.png": png(), ".": b""})
    assert sizes(source) == [18, 3]
    assert "1 file (dataset.json) passed over: no pictures" in capsys.readouterr().err


def test_one_of_two_members_of_a_name_may_be_left_out(tmp_path: Path) -> None:
    source = write_zip(
        tmp_path / "a.zip", {"a/b.png": b"nothing", "a\\b.png": png(), **{f"{i}.png": png() for i in range(9)}}
    )
    assert len(load(str(source), skip_unusable=True).images) == 9


def test_a_zip_in_an_unknown_method_says_how_to_go_on(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {"a.png": png(), "b.png": png()})
    content = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = 0
        while (start := content.find(signature, start)) >= 0:
            content[start + offset] = 9  # Deflate64, as the explorer of Windows writes large files
            start += 1
    source.write_bytes(content)
    with pytest.raises(UserError, match="unpack the zip with another program"):
        load(str(source))


def header(text: bytes) -> bytes:
    """A .npy file of this header alone."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", header(b"[")),
        ("a.npy", header(b"1" * 5000)),
        ("a.npy", header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }\n")),
        ("a.npz", None),
    ],
    ids=["header", "long-header", "size", "member"],
)
def test_damaged_arrays_are_one_line(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        write_zip(tmp_path / name, {"notes.txt": b"hello"})
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read as plain numpy arrays") as error:
        load(str(tmp_path / name))
    assert len(str(error.value)) < 600


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", 20)
    source = tmp_path / "source"
    source.mkdir()
    (source / "class0").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    assert sizes(source) == [18, 2]


def test_folders_that_link_to_each_other_are_entered_once_on_each_path(tmp_path: Path) -> None:
    """x/l1 and x/l2 lead to y, and y/l1 and y/l2 to x: the pictures of x are at x, y/l1 and y/l2."""
    ring = tmp_path / "ring"
    for here, there in (("x", "y"), ("y", "x")):
        folder(ring / here, 5)
        for link in ("l1", "l2"):
            (ring / here / link).symlink_to(f"../{there}")
    assert sum(sizes(ring)) == 2 * 5 * 3
    outside = tmp_path / "inner" / "source"  # a link to a folder that holds the whole data set leads nowhere new
    folder(outside, 20)
    (outside / "away").symlink_to(folder(tmp_path / "away", 10))
    (tmp_path / "away" / "back").symlink_to(tmp_path / "inner")
    assert sum(sizes(outside)) == 30


def test_links_that_double_at_each_level_are_refused(tmp_path: Path) -> None:
    for level in range(25):
        for link in "ab":
            (tmp_path / f"{level}").mkdir(exist_ok=True)
            (tmp_path / f"{level}" / link).symlink_to(f"../{level + 1}")
    folder(tmp_path / "25", 1)
    with pytest.raises(UserError, match=r"on more than 1,000 paths; remove links that lead to each other"):
        load(str(tmp_path))


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "source")
    folder(source / "secret")
    scandir: Callable[[str], object] = os.scandir

    def refuse(path: str) -> object:  # a superuser may read everything
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"the folder .*secret cannot be read \(Permission denied\)"):
        load(str(source))


def test_a_relative_path_may_be_one_below_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "images", 20)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no data set or path 'images' in .*elsewhere"):
        load("images")
    assert len(load("images", data_dir=tmp_path)) == 18


def moving(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def test_of_several_frames_and_pages_the_first_is_taken_and_they_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "a", 8)
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        (source / f"moving.{kind.lower()}").write_bytes(moving(kind))
    assert sizes(source) == [10, 2]
    assert capsys.readouterr().err == (
        f"{source}: of 4 files (moving.gif, moving.png, moving.tiff, moving.webp) the first of several frames or pages is "
        "taken\n"
    )
    (tmp_path / "b").mkdir()
    for name in "abcd":
        (tmp_path / "b" / f"{name}.tiff").write_bytes(moving("TIFF"))
    assert (load(str(tmp_path / "b")).images == 10).all()


def test_files_belong_to_the_outermost_split_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, n in (("train", 6), ("train/test", 4), ("test/train", 3), ("val", 2), ("plane", 1)):
        folder(tmp_path / "a" / name, n)
    assert sizes(tmp_path / "a") == [10, 3]
    left_out = "3 files (plane/0.png, val/0.png, val/1.png) beside the folders train and test left out"
    assert capsys.readouterr().err == f"{tmp_path / 'a'}: {left_out}\n"


def test_names_of_files_are_told_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "a")
    (source / "new\nline\x1b[31m.txt").write_bytes(b"")
    assert sizes(source) == [3, 1]
    assert r"1 file (new line\u001b[31m.txt) passed over" in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    os.mkfifo(source / "pipe.png")
    with pytest.raises(UserError, match=r"pipe.png in .* \(a pipe, a socket or a device, not a file\)"):
        load(str(source))


@pytest.mark.parametrize(
    "labels", [np.full(4, np.inf), np.full(4, 1e300), np.full(4, 2**64 - 1, np.uint64), np.full(4, 1j)]
)
def test_labels_that_are_no_class_numbers_are_refused(labels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(UserError, match="that are not class numbers"):
        load(str(tmp_path / "a.npz"))
