"""Damaged files: every file of a run, of the cache and of a user's data, and each command that reads it.

The right end is the result of the undamaged file, or one line that names the file. Some bytes carry no checksum: the pixels of
an image or of a .npy, the cells of a table, the digits of settings, scores and logs that people may read and edit. There a
different result cannot be told from an intended one, so that a traceback and several lines alone are wrong (`CHECKED` is
False).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from glf_fast import GLF, evaluate, sample, train
from glf_fast.data import SOURCES, ImageDataset
from glf_fast.data import __main__ as data
from glf_fast.data.routes import File
from glf_fast.metrics import __main__ as metrics
from glf_fast.training.pictures import draw
from tests.faults.children import Ended
from tests.faults.judging import judge, outcomes, run
from tests.faults.verdicts import Outcome, Verdict

# -- damage ---------------------------------------------------------------------------------------------------------------

# Content that is well-formed, or nearly, and not what the file should hold.
OTHERS = (
    b"", b"\0", b"[]\n", b"{}\n", b"null\n", b"3\n", b'"text"\n', b"[[1]]\n", b"NaN\n", b"1e999\n",
    b"{\"format\": 99}\n", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"\xef\xbb\xbf{}",
    b"a = " + b"[" * 100_000, b"\r\n" * 100, b"\x89PNG\r\n\x1a\n", b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01\x00",
    b"\xff" * 8 + b"{}", b"9" * 400, b"9" * 5000,
    *(len(header).to_bytes(8, "little") + header for header in (b"3", b"null", b'"x"', b"[]", b'{"a":3}', b'{"a":null}')),
)  # fmt: skip
# Values that take the place of a number, a string or a name in a text.
VALUES = (
    b"null", b"true", b'"x"', b"[1]", b"{}", b"-1", b"0", b"3", b"1e400", b"-1e400", b"NaN", b"9" * 30, b"9" * 400,
    b"9" * 5000, b"1.5",
    b'""', "\"\\u0000\u202e\"".encode(), b'"\xff"', b"\x1b[31m",
)  # fmt: skip
TOKEN = re.compile(rb'-?\d[\d.eE+-]*|"[^"\n]*"|\b(?:true|false|null|[a-z_]{3,})\b')


def damaged(whole: bytes, chance: random.Random, text: bool, header: bool) -> bytes:
    """The content of a file, damaged in one of many ways; `header`: it is a safetensors file, which begins with JSON."""
    content = bytearray(whole)
    at = chance.randrange(len(whole))
    size = min(len(whole) - at, chance.choice((1, 2, 7, 40, 512, 4096)))
    match chance.randrange(13 if text or header else 9):
        case 0:
            content[at] ^= 1 << chance.randrange(8)
        case 1:
            for _ in range(chance.choice((2, 20, 200))):
                content[chance.randrange(len(whole))] = chance.randrange(256)
        case 2:
            del content[at:]
        case 3:
            content[at : at + size] = bytes(size)
        case 4:
            del content[at : at + size]
        case 5:
            content[at:at] = content[at : at + size]
        case 6:
            content[at:at] = chance.choice((chance.randbytes(size), b"\xff", b"\n", b"\0", b"[" * 100_000))
        case 7:
            content[:] = chance.choice(OTHERS)
        case 8:
            near = min(len(whole) - 1, chance.choice((16, 64, 256)))  # headers stand at the beginning
            content[chance.randrange(near)] = chance.randrange(256)
        case 9 if text:
            content[:] = b"".join(whole.splitlines(keepends=True)[chance.choice((1, 2, 5)) :])
        case _ if text:
            content[:] = _with_another_value(whole, chance)
        case _:
            end = 8 + int.from_bytes(whole[:8], "little")
            values = _with_another_value(whole[8:end], chance)
            content[:] = len(values).to_bytes(8, "little") + values + whole[end:]
    return bytes(content)


def _with_another_value(text: bytes, chance: random.Random) -> bytes:
    token = chance.choice(list(TOKEN.finditer(text)))
    return text[: token.start()] + chance.choice(VALUES) + text[token.end() :]


# -- what reads files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A command that reads a file.

    Attributes:
        file: the file, below the folder of the case.
        copied: what is copied to that folder from the undamaged one.
        module, arguments: the command.
        checked: whether a different result is wrong; see above.
        results: patterns of what the command writes and the result consists of, beside what it prints.
    """

    file: str
    copied: tuple[str, ...]
    module: Any
    arguments: tuple[str, ...]
    checked: bool = True
    results: tuple[str, ...] = ()
    before: Callable[[], None] | None = None
    text: bool = False

    @property
    def kind(self) -> str:
        """The first of KINDS with which the file's name begins."""
        return next(kind for kind in KINDS if self.file.startswith(kind))

    @property
    def row(self) -> str:
        """The row of the table."""
        name = re.sub(r"^.*/", "", self.file) if self.file.startswith("run/") else Path(self.file).suffix or self.file
        return f"{name}, {self.module.__name__.removeprefix('glf_fast.').removesuffix('.__main__')}"


def _pretrained() -> None:
    model = GLF.from_pretrained(sys.argv[1])
    print(hashlib.sha256(draw(model, 3, seed=0).numpy().tobytes()).hexdigest())


PRETRAINED = SimpleNamespace(__name__="from_pretrained", main=_pretrained)
# Formats of pictures by their endings, with options under which Pillow writes small ones.
PICTURES: dict[str, dict[str, Any]] = {
    "png": {}, "jpg": {}, "gif": {}, "webp": {"lossless": True}, "tif": {"compression": "tiff_lzw"}, "tiff": {},
    "bmp": {}, "tga": {}, "pgm": {}, "ico": {}, "jp2": {}, "pcx": {}, "sgi": {}, "dds": {}, "avif": {},
}  # fmt: skip
TRAINED = (
    "--preset", "smoke", "--data.source", "data.npy", "--batch-size", "16", "--epochs", "2", "--score.samples", "8",
    "--score.every", "1", "--out", "run", "--device", "cpu",
)  # fmt: skip
RUN = ("data.npy", "run", "cache")
# Kinds of files: checkpoints, statistics, a run's other files, weights, a downloaded data set, pictures, and all others.
KINDS = ("run/checkpoints/", "cache/stats/", "run/", "model/", "mnist/", "pictures/", "")


def small_mnist() -> None:
    """Let the name mnist stand for four small files of the same format, with hashes of their own."""
    files = tuple(
        File(name, f"sha256:{hashlib.sha256(content).hexdigest()}", limit=len(content), gzipped=True)
        for name, content in _idx().items()
    )
    SOURCES["mnist"] = dataclasses.replace(SOURCES["mnist"], files=files, routes=())


def _idx() -> dict[str, bytes]:
    chance, contents = np.random.default_rng(0), {}
    for prefix, n in (("train", 30), ("t10k", 20)):
        images = chance.integers(0, 256, (n, 8, 8), dtype=np.uint8).tobytes()
        sizes = b"".join(number.to_bytes(4, "big") for number in (n, 8, 8))
        contents[f"{prefix}-images-idx3-ubyte"] = b"\0\0\x08\x03" + sizes + images
        contents[f"{prefix}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + n.to_bytes(4, "big") + bytes(n)
    return contents


def readers(root: Path) -> list[Reader]:
    """All readers of all files below the undamaged folder; those that take long are fewer."""
    config, log, scores = (f"run/{name}" for name in ("config.toml", "metrics.jsonl", "scores.json"))
    states = [
        f"run/checkpoints/{which}/{name}" for which in ("best", "last") for name in ("checkpoint.json", "config.json")
    ]
    tensors = [f"run/checkpoints/{which}/model.safetensors" for which in ("best", "last")]
    more = "run/checkpoints/last/training.safetensors"
    resumed = ("run/checkpoints/*/*.safetensors",)
    found = [Reader(config, RUN, sample, ("run", "--n", "3", "--out", "s.npy"), results=("s.npy",), text=True)]
    for file in (*states, *tensors):
        options = ("run", "--n", "3", "--out", "s.npy", "--checkpoint", Path(file).parent.name)
        found.append(Reader(file, RUN, sample, options, results=("s.npy",), text=file.endswith("json")))
    for file in (config, *(file for file in (*states, *tensors) if "last" in file), more):
        found.append(Reader(file, RUN, train, TRAINED, results=resumed, text=not file.endswith("tensors")))
    found += [Reader(file, RUN, train, TRAINED, file == log, resumed, text=True) for file in (log, scores)]
    found += [Reader(file, RUN, evaluate, ("run",), file != config, text=True) for file in (config, log, scores)]
    cached = sorted(path.relative_to(root).as_posix() for path in (root / "cache" / "stats").iterdir())
    tiny = ("--extractor", "tiny", "--device", "cpu")
    mnist = ("cache", "other.npy")
    found += [
        Reader(file, mnist, metrics, ("calc", "other.npy", "mnist:test", *tiny), before=_mnist_here)
        for file in cached
        if "mnist" in file
    ]
    found += [
        Reader(file, ("data.npy", file), metrics, ("calc", "data.npy", file, *tiny))
        for file in ("ref.safetensors", "moments.npz")
    ]
    found += [
        Reader(f"mnist/{name}.gz", ("mnist",), data, ("info", "mnist", "--data-dir", "mnist"), before=small_mnist)
        for name in _idx()
    ]
    for file in ("images.zip", "stored.npz", "deflated.npz"):
        found.append(Reader(file, (file,), data, ("info", file)))
    for file in ("data.npy", "table.csv", "table.parquet"):
        found.append(Reader(file, (file,), data, ("info", file), checked=False, text=file.endswith("csv")))
    for folder in sorted(path.name for path in (root / "pictures").iterdir()):
        file = f"pictures/{folder}/0.{folder}"
        found.append(Reader(file, (f"pictures/{folder}",), data, ("info", f"pictures/{folder}"), checked=False))
    for name in ("config.json", "model.safetensors"):
        checked = name != "config.json"
        found.append(Reader(f"model/{name}", ("model",), PRETRAINED, ("model",), checked, text=not checked))
    return found


def _mnist_here() -> None:
    small_mnist()
    SOURCES["mnist"] = dataclasses.replace(SOURCES["mnist"], read=lambda files, split, size: _from_memory(split))


def _from_memory(split: str) -> Any:
    content = _idx()["train-images-idx3-ubyte" if split == "train" else "t10k-images-idx3-ubyte"]
    array = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 8, 8).copy()
    return ImageDataset.of("mnist", split, torch.from_numpy(array))


def prepare(root: Path) -> None:
    """Write a file of each kind, with a finished run among them."""
    (root / "cache").mkdir(parents=True)
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(root / "data.npy", pixels)
    np.save(root / "other.npy", chance.integers(0, 200, (40, 8, 8), dtype=np.uint8))
    np.savez(root / "stored.npz", train=pixels[:50], test=pixels[50:], train_labels=np.arange(50))
    np.savez_compressed(root / "deflated.npz", images=pixels, labels=np.arange(60))
    np.savez(root / "moments.npz", mu=np.zeros(128), sigma=np.eye(128))
    rows = chance.normal(size=(30, 4)).astype(np.float32)
    lines = [",".join(map(str, row)) for row in rows.tolist()]
    (root / "table.csv").write_text("\n".join(["a,b,c,d", *lines]) + "\n")
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: rows[:, i] for i, name in enumerate("abcd")}), root / "table.parquet")
    (root / "mnist").mkdir()
    for name, content in _idx().items():
        (root / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, image in enumerate(pixels[:12]):
            archive.writestr(f"{i}.png", _picture(image, "png"))
    for ending in PICTURES:
        if ending not in ("avif", "webp", "jp2") or features.check({"jp2": "jpg_2000"}.get(ending, ending)):
            folder = root / "pictures" / ending
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.{ending}").write_bytes(_picture(np.kron(pixels[i], np.ones((4, 4), np.uint8)), ending))
    for ended in (
        run(train, *TRAINED, place=root),
        run(metrics, "ref", "other.npy", "--extractor", "tiny", "--out", "ref.safetensors", place=root),
        run(metrics, "calc", "other.npy", "mnist:test", "--extractor", "tiny", place=root, before=_mnist_here),
        run(SimpleNamespace(__name__="save", main=_save), place=root),
    ):
        assert ended.status == 0, ended.err
    shutil.rmtree(root / "run" / "tensorboard")


def _save() -> None:
    GLF.from_pretrained("run/checkpoints/best").save_pretrained("model")


def _picture(pixels: np.ndarray, ending: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert("RGB") if ending in ("dds", "ico", "avif") else image
    image.save(buffer, Image.registered_extensions()[f".{ending}"], **PICTURES[ending])
    return buffer.getvalue()


# -- the campaign ---------------------------------------------------------------------------------------------------------


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Damage one file of `count` at a time, and run a command that reads it."""
    root, place = folder / "whole", folder / "case"
    prepare(root)
    everything = [reader for reader in readers(root) if (root / reader.file).is_file()]
    kinds = [[reader for reader in everything if reader.kind == kind] for kind in KINDS]
    right: dict[str, tuple[str, ...]] = {}

    def result(reader: Reader, ended: Ended) -> tuple[str, ...]:
        files = sorted(path for pattern in reader.results for path in place.glob(pattern))
        return ended.out, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)

    def begin(reader: Reader) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in reader.copied:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if (root / name).is_dir():
                shutil.copytree(root / name, place / name)
            else:
                shutil.copyfile(root / name, place / name)

    def one(number: int) -> tuple[str, Verdict, str]:
        chance = random.Random(f"{seed} {number}")
        # The first numbers of a seed go round the kinds of files, so that a small sample has each.
        among = kinds[number] if number < len(kinds) else everything
        reader = chance.choice(among)
        if (key := f"{reader.row} {reader.file} {reader.arguments}") not in right:
            begin(reader)
            ended = run(reader.module, *reader.arguments, place=place, before=reader.before)
            assert ended.status == 0, f"{reader}: {ended.err}"
            right[key] = result(reader, ended)
        begin(reader)
        whole = (place / reader.file).read_bytes()
        (place / reader.file).write_bytes(damaged(whole, chance, reader.text, reader.file.endswith(".safetensors")))
        ended = run(reader.module, *reader.arguments, place=place, before=reader.before)
        # A damaged name in a zip is another name, perhaps that of no picture, as the command says.
        said = reader.file.endswith(".zip") and "passed over" in ended.err
        equal = not reader.checked or said or result(reader, ended) == right[key]
        verdict, detail = judge(ended, equal=equal, named=Path(reader.file).name)
        return reader.row, verdict, f"{reader.file}: {detail}" if detail else ""

    yield from outcomes("damaged", count, seed, one)
