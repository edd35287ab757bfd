"""Attributes of images, such as CelebA's: for each image and attribute yes or no, from a text file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset
from glf_fast.errors import UserError, did_you_mean

__all__ = ["attribute_names", "load_attribute"]

_VALUES = {"1": True, "true": True, "yes": True, "0": False, "-1": False, "false": False, "no": False}
_NAMED = 3  # of many images, a message names so many


def attribute_names(path: Path) -> tuple[str, ...]:
    """Names of the attributes in a file, see `load_attribute`; raises UserError for a file in another form."""
    return tuple(_table(path)[0])


def load_attribute(path: Path, name: str, dataset: ImageDataset) -> Tensor:
    """Whether each image of a data set has the attribute called `name`: bool (N,).

    The file is a CSV with a header: its first column identifies the image, and the others are attributes with values 1 and 0,
    or 1 and -1, true and false, yes and no. Or it is separated by spaces with the number of images in front, as CelebA's
    list_attr_celeba.txt. An image is identified by the name of its file, relative to the folder or zip, or, if the data set has
    no files, by its place: in the user's array if both splits are parts of it, else in its split, counted from 0. Rows of other
    images are left out.

    Raises:
        UserError: a file in another form, an attribute that it does not have, or an image that it lacks or has twice.
    """
    names, rows = _table(path)
    if name not in names:
        raise UserError(
            f"{path} has no attribute {name!r}; {did_you_mean(name, names)}its attributes are {', '.join(names)}"
        )
    column = 1 + names.index(name)
    wanted = dataset.names or tuple(map(str, range(len(dataset))))
    places = {key: place for place, key in enumerate(wanted)}
    found: list[bool | None] = [None] * len(wanted)
    for line, row in rows:
        if (place := places.get(row[0].strip())) is None:
            continue
        if len(row) != 1 + len(names):
            raise UserError(f"{path}, line {line}: {len(row) - 1} values for {len(names)} attributes")
        if found[place] is not None:
            raise UserError(f"{path}, line {line}: a second row for {row[0].strip()}")
        found[place] = _VALUES.get(row[column].strip().lower())
        if found[place] is None:
            raise UserError(f"{path}, line {line}: {name} = {row[column]!r} must be 1, or 0 or -1")
    if missing := [key for key, value in zip(wanted, found, strict=True) if value is None]:
        some = ", ".join(missing[:_NAMED]) + ", …" * (len(missing) > _NAMED)
        example = f", but for {rows[0][1][0]!r}" if rows and len(missing) == len(wanted) else ""
        raise UserError(
            f"{path} has no row for {len(missing)} of the {len(wanted)} {dataset.split} images of {dataset.name} "
            f"({some}){example}; its first column must hold these names"
        )
    return torch.tensor(found, dtype=torch.bool)


def _table(path: Path) -> tuple[list[str], list[tuple[int, Sequence[str]]]]:
    """Names of the attributes, and the rows with the numbers of their lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8") from error
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].strip().isdecimal():
        names, rows = lines[1].split(), [(i, line.split()) for i, line in enumerate(lines[2:], 3)]
    else:
        try:
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            names = [name.strip() for name in next(reader, [])[1:]]
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from error
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"{path} needs a line of different names, of the images' column and of one or more attributes, separated by commas"
        )
    return names, [(line, row) for line, row in rows if row]
