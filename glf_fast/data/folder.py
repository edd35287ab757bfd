"""Any folder or zip of images: which files are read, and to which split they belong."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from glf_fast.data.dataset import SPLITS, ImageDataset, split_off_test
from glf_fast.data.pixels import ENDINGS, Unreadable, read_pixels
from glf_fast.errors import UserError
from glf_fast.output import one_line

__all__ = ["load_folder"]

# A file's path below the folder or in the zip, and a function that opens it.
File = tuple[str, Callable[[], BinaryIO]]
_NAMED = 5  # of many files, a message names so many
# Links may lead to one folder on so many paths. Their number doubles with each level of two links, up to 2^40.
_PATHS = 1000


def load_folder(path: Path, split: str, image_size: int | None = None, *, skip_unusable: bool = False) -> ImageDataset:
    """A split of all images below a folder or in a zip, in the order of their names.

    Each image is turned upright (EXIF), laid on white if it is transparent, cropped to its central square and resized to
    `image_size` with Pillow's antialiased LANCZOS filter. Without `image_size` images are neither cropped nor resized, and all
    must have the same size. The images have one channel if all files are grey, else three.

    Sub-folders `train` and `test` are the splits if both exist; otherwise a tenth of a fixed random order is the test split. A
    file belongs to the outermost of them that it is in; a line on stderr counts the files that are in neither.
    Hidden files are ignored; files whose ending is not one of a picture are passed over, and a line on stderr counts them.
    Links are followed. Of an animation, and of several pages, the first is taken, and a line on stderr counts such files.

    Args:
        skip_unusable: leave files out that cannot be read as images; a line on stderr and the policy count them.

    Raises:
        UserError: no images, different sizes, a folder that cannot be read, or, without `skip_unusable`, files that cannot be
            read as images. The message names the first ones of all such files.
    """
    files: list[File] = []
    others: list[File] = []
    for file in _files(path):
        (files if _is_picture(file[0]) else others).append(file)
    if others and split == "train":
        print(f"{path}: {_counted([name for name, _ in others])} passed over: no pictures", file=sys.stderr)
    groups: dict[str, list[File]] = {name: [] for name in (*SPLITS, "")}
    for file in files:
        groups[_split(file[0])].append(file)
    has_splits = all(groups[name] for name in SPLITS)
    if has_splits and groups[""] and split == "train":
        beside = _counted([name for name, _ in groups[""]])
        print(f"{path}: {beside} beside the folders train and test left out", file=sys.stderr)
    chosen = groups[split] if has_splits else files
    if not chosen:
        raise UserError(f"{path} holds no pictures; give a folder or zip of images")
    names, arrays, unusable, several = _read(path, chosen, image_size)
    if unusable and not skip_unusable:
        rest = [file for name in SPLITS if has_splits and name != split for file in groups[name]]
        raise UserError(_complaint(path, {**unusable, **_read(path, rest, image_size).unusable}))
    if unusable and (has_splits or split == "train"):
        of = f" of the {split} split" if has_splits else ""
        print(f"{path}: {_counted(list(unusable))} left out{of}: not usable", file=sys.stderr)
    if several and (has_splits or split == "train"):
        print(f"{path}: of {_counted(several)} the first of several frames or pages is taken", file=sys.stderr)
    if not arrays:
        raise UserError(f"{path} holds no usable pictures for the {split} split; the first one: {_first(unusable)}")
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name, array in zip(names, arrays, strict=True):
        sizes.setdefault(array.shape[:2], []).append(name)
    if len(sizes) > 1:
        rarest = sorted(sizes.items(), key=lambda item: len(item[1]))
        some = "; ".join(f"{width}×{height}: {_counted(same)}" for (height, width), same in rarest[:_NAMED])
        more = "; …" if len(rarest) > _NAMED else ""
        raise UserError(
            f"the images of {path} have {len(sizes)} different sizes: {some}{more}; choose one, to which they are resized "
            "(--data.image-size in training, --image-size elsewhere)"
        )
    grey = all(array.shape[2] == 1 for array in arrays)
    images = torch.from_numpy(
        np.stack([array if grey else np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays])
    )
    images = images.permute(0, 3, 1, 2).contiguous()
    policy = "as they are" if image_size is None else f"central square, LANCZOS to {image_size}"
    if unusable:
        policy += f"; {len(unusable)} unusable files left out"
    if not has_splits:
        places, _ = split_off_test(str(path), torch.arange(len(images)), None, split)
        images, names = images[places], [names[place] for place in places.tolist()]
        policy += "; test: a tenth of a fixed random order"
    return ImageDataset.of(str(path), split, images, None, policy, names)


# -- which files ----------------------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[File]:
    """Every file that is not hidden, sorted by name; nothing is unpacked to disk."""
    if path.is_dir():
        for name in sorted(_below(path)):
            yield name, partial(_open_file, path / name)
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a zip file, or it is damaged ({error})") from error
    for member in sorted(archive.infolist(), key=lambda member: member.filename):
        name = member.filename.replace("\\", "/")  # old zips of Windows
        if PurePosixPath(name).name and not (name.endswith("/") or _hidden(name)):
            yield name, partial(_open_member, archive, member)


def _open_file(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer for ever
        raise Unreadable("a pipe, a socket or a device, not a file")
    return path.open("rb")


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> BinaryIO:
    """A small member in memory, where seeking is fast; of a large one no more is unpacked than its format asks for."""
    return io.BytesIO(archive.read(member)) if member.file_size <= 1 << 26 else archive.open(member)  # type: ignore[return-value]


def _below(folder: Path) -> Iterator[str]:
    """Names of the files below a folder; links are followed, but not into a folder that the path to the link is in.

    The files of a folder to which several links lead are found on each of these paths.

    Raises:
        UserError: a folder that cannot be read, or one to which more than 1,000 paths lead.
    """

    def stop(error: OSError) -> None:
        raise UserError(
            f"the folder {error.filename} cannot be read ({error.strerror}); change its permissions or remove it"
        )

    # The real paths of each folder that is still to be walked, and of the folders on the path to it.
    paths: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    found: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        path = paths.pop(root)
        found[path[-1]] += 1
        if found[path[-1]] > _PATHS:
            raise UserError(
                f"links in {folder} lead to {path[-1]} on more than {_PATHS:,} paths; remove links that lead to each other"
            )
        targets = {name: os.path.realpath(os.path.join(path[-1], name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, real in targets.items() if not any(_contains(real, outer) for outer in path)]
        paths |= {os.path.join(root, name): (*path, targets[name]) for name in folders}
        for name in names:
            inner = Path(root, name).relative_to(folder).as_posix()
            if not _hidden(inner):
                yield inner


def _contains(folder: str, other: str) -> bool:
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def _hidden(name: str) -> bool:
    parts = [part for part in PurePosixPath(name).parts if part != ".."]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _split(name: str) -> str:
    """The split that a file belongs to by the outermost folder of such a name, or ""."""
    return next((part for part in PurePosixPath(name).parts[:-1] if part in SPLITS), "")


def _is_picture(name: str) -> bool:
    """By its ending; a name without one may be a picture's."""
    ending = PurePosixPath(name).suffix.lower()
    return not ending or ending in ENDINGS


# -- reading --------------------------------------------------------------------------------------------------------------


class _Pictures(NamedTuple):
    """Names and pixels of usable files, the reasons of all others by name, and the names of those with several frames."""

    names: list[str]
    arrays: list[np.ndarray]
    unusable: dict[str, str]
    several: list[str]


def _read(path: Path, files: Sequence[File], image_size: int | None) -> _Pictures:
    found = _Pictures([], [], {}, [])
    for name, open_file in tqdm(files, "reading images", disable=len(files) < 2000):
        try:
            with open_file() as file:
                pixels, more = read_pixels(file, image_size)
            found.names.append(name)
            found.arrays.append(pixels)
            found.several.extend([name] * more)
        except Unreadable as error:
            found.unusable[name] = str(error)
        except NotImplementedError as error:  # how zipfile reports a method that it does not know
            found.unusable[name] = f"{error}: unpack the zip with another program, and give the folder"
        except Exception as error:  # of reading: permissions, a link to nothing, damaged zips of many kinds
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            found.unusable[name] = reason[:200]
    return found


def _complaint(path: Path, unusable: dict[str, str]) -> str:
    where = "--data.skip-unusable in training, --skip-unusable elsewhere"
    if len(unusable) == 1:
        name = next(iter(unusable))
        hidden = PurePosixPath(name).with_name(f".{PurePosixPath(name).name}")
        return (
            f"{name} in {path} is not a readable image ({unusable[name]}); remove it, hide it ({hidden}), or have it left out "
            f"({where})"
        )
    named = "; ".join(f"{name} ({reason})" for name, reason in list(unusable.items())[:_NAMED])
    more = f"; and {len(unusable) - _NAMED} more" if len(unusable) > _NAMED else ""
    some = f"{len(unusable)} files in {path} are not readable images"
    return f"{some}: {named}{more}; remove them, or have them left out ({where})"


def _first(unusable: dict[str, str]) -> str:
    name, reason = next(iter(unusable.items()))
    return f"{name} ({reason})"


def _counted(names: Sequence[str]) -> str:
    """A number of files, with the first names."""
    some = ", ".join(map(one_line, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} file{'s' * (len(names) > 1)} ({some})"
