"""Folders and zips of pictures with contents that are known, and all that people and attackers leave beside them."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import random
import stat
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from tests.faults.pictures import ODD_NAMES, Item, no_picture, picture

SPLITS = ("train", "test")


@dataclass
class Source:
    """A source, and what is known of it.

    Attributes:
        files: the files that are read, by the names by which they are sorted, and their names with "/" between folders.
        path: the source, below the folder of the case.
        refused: whether it must be refused; None: open.
        arrays: the splits as arrays (N, H, W, C), if the source is no collection of files.
    """

    path: str
    files: dict[str, tuple[str, Item]] = field(default_factory=dict)
    refused: bool | None = False
    arrays: dict[str, np.ndarray] | None = None
    policy: str = "as they are"
    before: Callable[[], None] | None = None

    def expected(self, skip: bool) -> dict[str, tuple[tuple[int, ...], str]] | None:
        """The shape and the fingerprint of each split, "" if it is not known; None if the source must be refused."""
        splits, exact, policies = self._splits(skip)
        if not splits:
            return None
        if splits.keys() != set(SPLITS):
            [(name, whole)] = splits.items()
            if len(whole) < 2:
                return None
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
            cut = len(whole) - -(-len(whole) // 10)
            splits = {"train": whole[sorted(order[:cut])], "test": whole[sorted(order[cut:])]}
            policies = dict.fromkeys(SPLITS, f"{policies[name]}; test: a tenth of a fixed random order")
            exact = dict.fromkeys(SPLITS, exact[name])
        found = {}
        for split, array in splits.items():
            pixels = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
            digest = hashlib.sha256(f"{pixels.shape} {policies[split]}".encode() + pixels.tobytes()).hexdigest()
            found[split] = (pixels.shape, digest[:16] if exact[split] else "")
        return found

    def _splits(self, skip: bool) -> tuple[dict[str, np.ndarray], dict[str, bool], dict[str, str]]:
        """The images of each split, or of "" if there are none; whether they are known; and their policies."""
        if self.arrays is not None:
            return (
                self.arrays,
                dict.fromkeys(self.arrays, True),
                {name: self.policy.format(name) for name in self.arrays},
            )
        outer = {
            key: next((part for part in PurePosixPath(name).parts[:-1] if part in SPLITS), "")
            for key, (name, _) in self.files.items()
        }
        names = SPLITS if set(SPLITS) <= set(outer.values()) else ("",)
        splits, exact, policies = {}, {}, {}
        for split in names:
            items = [self.files[key][1] for key in sorted(self.files) if not split or outer[key] == split]
            usable = [item for item in items if not item.bad]
            out = len(items) - len(usable)
            pixels = [
                np.zeros((item.side, item.side, 3), np.uint8) if item.pixels is None else item.pixels for item in usable
            ]
            if not usable or (out and not skip) or len({array.shape[:2] for array in pixels}) > 1:
                return {}, {}, {}
            channels = max(array.shape[2] for array in pixels)
            splits[split] = np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in pixels])
            exact[split] = all(item.pixels is not None for item in usable)
            policies[split] = self.policy + f"; {out} unusable files left out" * bool(out)
        return splits, exact, policies


# -- folders --------------------------------------------------------------------------------------------------------------


def folder(place: Path, chance: random.Random) -> Source:
    """A folder with pictures and all that people and attackers leave beside them."""
    source = Source(os.fsdecode(b"src" + chance.choice((b"", chance.choice(ODD_NAMES)))))
    root = place / source.path
    root.mkdir()
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    folders = _folders(chance)
    for number in range(chance.choice((0, 1, 2, 3, 5, 9, 12))):
        _add(source, root, _name(chance, folders, number), picture(chance))
    for number in range(100, 100 + chance.choice((0, 0, 1, 2))):
        where = _name(chance, folders, number)
        match chance.randrange(14):
            case 0:
                _add(source, root, where, no_picture(chance))
            case 1:
                _add(source, root, where, picture(chance, side=chance.choice((1, 12))))
            case 2:  # hidden
                parent, name = os.path.split(where)
                _write(root / parent / f".{name}.png", b"hidden")
                _write(root / ".hidden" / f"{number}.png", b"hidden")
                _write(root / "__MACOSX" / f"{number}.png", b"hidden")
            case 3:  # no pictures, by their endings
                for ending in (".txt", ".json", ".csv", ".mp4", ".db", ".zip"):
                    _write(root / f"{where}{ending}", b"{}")
            case 4:  # a link to a picture
                item = picture(chance)
                _write(elsewhere / f"{number}{item.ending}", item.content)
                _link(source, root, f"{where}{item.ending}", elsewhere / f"{number}{item.ending}", item)
            case 5:  # a link to a folder
                item = picture(chance)
                name = f"{number}{item.ending}"
                _write(elsewhere / f"f{number}" / name, item.content)
                (root / where).parent.mkdir(parents=True, exist_ok=True)
                (root / where).symlink_to(elsewhere / f"f{number}")
                source.files[f"{where}/{name}"] = (f"{where}/{name}", item)
            case 6:  # a loop
                (root / where).parent.mkdir(parents=True, exist_ok=True)
                (root / where).symlink_to(chance.choice((root, (root / where).parent, Path("."))))
            case 7:  # links to nothing, to themselves, and to what never ends
                to = chance.choice(("nowhere", Path(where).name + ".png", "/dev/zero", "/dev/null", "/proc/self/mem"))
                _link(source, root, f"{where}.png", Path(to), Item("", b"", bad=True))
            case 8:  # a pipe, which nobody writes into
                (root / where).parent.mkdir(parents=True, exist_ok=True)
                os.mkfifo(root / f"{where}.png")
                source.files[f"{where}.png"] = (f"{where}.png", Item("", b"", bad=True))
            case 9:
                _write(root / f"{where}d" / "x.png", b"")
                (root / f"{where}d").chmod(0)
                source.before, source.refused = _as_anyone, True
            case 10:
                _add(source, root, where, picture(chance))
                name = list(source.files)[-1]
                (root / name).chmod(0)
                source.files[name] = (name, Item("", b"", bad=True))
                source.before = _as_anyone
            case 11:
                (root / f"{where}.png").mkdir(parents=True)  # a folder with the name of a picture
            case 12:
                deep = "/".join(["d" * 50] * 20)
                _add(source, root, f"{deep}/{number}", picture(chance))
            case _:
                (root / where).parent.mkdir(parents=True, exist_ok=True)
    return source


def _folders(chance: random.Random) -> list[str]:
    """Names of folders, below each other."""
    kinds = (
        [""],
        ["", "a", "b/c"],
        ["train", "test"],
        ["train/cat", "test/cat", "val"],
        ["Train", "Test"],
        ["train", "val"],
    )
    more = (
        ["plane", "train", "ship"],
        ["train/test", "test/train", ""],
        ["x/train", "x/test"],
        ["train", "train/train"],
    )
    odd = [os.fsdecode(name) for name in chance.sample(ODD_NAMES[1:], 2)]
    return list(chance.choice((*kinds, *more, odd)))


def _name(chance: random.Random, folders: Sequence[str], number: int) -> str:
    odd = os.fsdecode(chance.choice(ODD_NAMES)) if chance.random() < 0.3 else ""
    name = f"{number:03}{odd}" if chance.random() < 0.5 else f"{odd}{number:03}"
    parent = chance.choice(folders)
    return f"{parent}/{name}" if parent else name


def _add(source: Source, root: Path, name: str, item: Item) -> None:
    full = f"{name}{item.ending}"
    if not item.ending and PurePosixPath(full).suffix:
        full = full.replace(".", "_")
    _write(root / full, item.content)
    source.files[full] = (full, item)


def _link(source: Source, root: Path, name: str, to: Path, item: Item) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(to)
    source.files[name] = (name, item)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _as_anyone() -> None:
    """Drop a superuser's right to read everything, in this process."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, nothing)


# -- zips -----------------------------------------------------------------------------------------------------------------


def zipped(place: Path, chance: random.Random) -> Source:
    """A zip as other programs and attackers write it."""
    source = Source("src.zip")
    folders = _folders(chance)
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    patches: list[tuple[bytes, str]] = []
    buffer = io.BytesIO()
    if chance.random() < 0.1:
        buffer.write(b"#!/bin/sh\n" * 20)  # as of archives that unpack themselves
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = chance.choice((b"", b"comment", b"\x1b[31m\n"))

        def add(name: str, item: Item, seen: str | None = None) -> None:
            info = zipfile.ZipInfo(name)
            info.filename, info.compress_type = name, chance.choice(methods)
            archive.writestr(info, item.content)
            source.files[name] = (name if seen is None else seen, item)

        for number in range(chance.choice((0, 1, 2, 3, 5, 9))):
            item, name = picture(chance), _member(chance, folders, number)
            add(f"{name}{item.ending}", item)
        for number in range(100, 100 + chance.choice((0, 0, 1, 2))):
            item, name = picture(chance), _member(chance, folders, number)
            full = f"{name}{item.ending}"
            match chance.randrange(12):
                case 0:
                    item = no_picture(chance)
                    add(f"{name}{item.ending}", item)
                case 1:  # paths that lead out of a folder, were it unpacked
                    add(chance.choice(("../", "../../", "/", "//", "/etc/", "a/../")) + full, item)
                case 2:
                    windows = chance.choice(("", "C:\\")) + full.replace("/", "\\")
                    add(windows, item, windows.replace("\\", "/"))
                case 3:
                    for hidden in (
                        f".{number}.png",
                        f"a/.b/{number}.png",
                        f"__MACOSX/._{number}.png",
                        f"a\\.b\\{number}.png",
                    ):
                        archive.writestr(hidden, b"hidden")
                case 4:
                    for other in ("dataset.json", "notes.txt", "inner.zip", "new\nline\x1b[31m.txt"):
                        archive.writestr(f"{number}/{other}", b"{}")
                case 5:  # folders, and a member without a name
                    for empty in (f"{number}.png/", f"{number}/", "."):
                        archive.writestr(empty, b"")
                case 6:
                    add(full, Item(item.ending, item.content, bad=True))
                    patches.append((b"method", full))
                case 7:
                    add(full, Item(item.ending, item.content, bad=True))
                    patches.append((b"locked", full))
                case 8:
                    add(full, Item(item.ending, item.content, bad=True))
                    patches.append((b"crc", full))
                case 9:  # a link, as zip writes it
                    info = zipfile.ZipInfo(f"{name}.png")
                    info.external_attr = (stat.S_IFLNK | 0o777) << 16
                    archive.writestr(info, "/etc/passwd")
                    source.files[f"{name}.png"] = (f"{name}.png", Item("", b"", bad=True))
                case 10:
                    zeros = Item(".png", bytes(chance.choice((1 << 20, 1 << 24))), bad=True)
                    info = zipfile.ZipInfo(f"{name}.png")
                    info.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(info, zeros.content)
                    source.files[f"{name}.png"] = (f"{name}.png", zeros)
                case _:
                    add(full, picture(chance, side=12))
    content = bytearray(buffer.getvalue())
    for kind, name in patches:
        _patch(content, kind, name)
    if chance.random() < 0.05:
        cut = chance.randrange(len(content))
        source.refused = True if cut < len(content) - 8 else None  # a comment may be shorter than it says
        del content[cut:]
    (place / source.path).write_bytes(content)
    return source


def _member(chance: random.Random, folders: Sequence[str], number: int) -> str:
    """A name that a zip can hold, and that says the same with any separator."""
    name = _name(chance, folders, number).encode("utf-8", "replace").decode().replace("\\", "-")
    return name.replace("\0", "")


def _patch(content: bytearray, kind: bytes, name: str) -> None:
    """Change the fields of a member in both of its headers: an unknown method, a lock, another checksum."""
    encoded = name.encode()
    for signature, flags, method, crc, start in ((b"PK\x03\x04", 6, 8, 14, 30), (b"PK\x01\x02", 8, 10, 16, 46)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            if bytes(content[at + start : at + start + len(encoded)]) == encoded:
                if kind == b"method":
                    content[at + method : at + method + 2] = struct.pack("<H", 9)
                elif kind == b"locked":
                    content[at + flags] |= 1
                else:
                    content[at + crc] ^= 0xFF
