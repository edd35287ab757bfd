"""List, describe and fetch data sets and network weights; print grammars.

python -m glf_fast.data list

python -m glf_fast.data info fashion-mnist

python -m glf_fast.data info measurements.csv

python -m glf_fast.data fetch vgg16

python -m glf_fast.data grammar smiles > molecules.grammar
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from glf_fast import distributed
from glf_fast.command_line import parse
from glf_fast.data import CONTENTS, SOURCES, SPLITS, Dataset, Source, TableDataset, TokenDataset, load, weights
from glf_fast.data.fetch import NotFound
from glf_fast.errors import UserError, did_you_mean, run_command
from glf_fast.grammar import EXPRESSIONS, SMILES
from glf_fast.output import one_line

# Titles, licences and citations by name.
ABOUT: dict[str, Source | weights.About] = {**SOURCES, **weights.ABOUT}


# Columns of a table that are described one by one.
COLUMNS = 20


@dataclass(frozen=True)
class List:
    """List the names of all public data sets and weights."""


@dataclass(frozen=True)
class Fetch:
    """Fetch a data set or weights into the cache and verify them."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of a data set or of weights (`list` prints them), or path of your own data."""
    data_dir: Path | None = None
    """Folder in which to look for the files of a data set first; for weights, the path of the file."""
    image_size: int | None = None
    """CelebA, folders and zips: resize the central square to this many pixels."""
    skip_unusable: bool = False
    """Folders and zips: leave out files that cannot be read as images."""


@dataclass(frozen=True)
class Info(Fetch):
    """Print what a data set or weights are and which files are on this machine, without using the network."""


@dataclass(frozen=True)
class Grammar:
    """Print a built-in grammar, to be extended in a file NAME.grammar beside NAME.smi or NAME.txt."""

    name: Annotated[Literal["smiles", "expressions"], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """smiles or expressions."""


def main() -> None:
    """Parse the command line and run the command."""
    distributed.refuse_several()
    commands: Any = (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")]
        | Annotated[Grammar, tyro.conf.subcommand("grammar")]
    )
    command: List | Fetch | Grammar = parse(commands, sys.argv[1:], "glf_fast.data", description=__doc__)
    if isinstance(command, List):
        for name, about in ABOUT.items():
            print(f"{name:14} {about.title}")
    elif isinstance(command, Grammar):
        print({"smiles": SMILES, "expressions": EXPRESSIONS}[command.name].strip())
    else:
        _report(command, online=not isinstance(command, Info))


def _report(command: Fetch, online: bool) -> None:
    about = ABOUT.get(command.name)
    if about is None and not os.path.exists((command.data_dir or Path()) / os.path.expanduser(command.name)):
        hint = did_you_mean(command.name, ABOUT)
        raise UserError(
            f"no data set, weights or path {command.name!r}; {hint}give one of {', '.join(ABOUT)}, or a path of your own data"
        )
    if about is not None:
        print(f"{about.title}\nlicence   {about.licence}\ncitation  {about.citation}")
    if source := SOURCES.get(command.name):
        print(f"items     {source.splits['train']:,} train, {source.splits['test']:,} test")
    try:
        _report_files(command, online)
    except NotFound:
        if online:
            raise
        print(f"not on this machine yet; python -m glf_fast.data fetch {command.name} fetches it")


def _report_files(command: Fetch, online: bool) -> None:
    if command.name in weights.ABOUT:
        if command.image_size is not None or command.skip_unusable:
            raise UserError(f"{command.name} are weights; leave --image-size and --skip-unusable out")
        path = weights.fetch(command.name, path=command.data_dir, download=online)
        print(f"file      {path} ({path.stat().st_size / 1e6:.0f} MB, verified)")
        return
    options: Any = {
        "data_dir": command.data_dir,
        "image_size": command.image_size,
        "skip_unusable": command.skip_unusable,
    }
    train, test = (load(command.name, split, **options, download=online) for split in SPLITS)
    print(f"kind      {CONTENTS[train.kind]}")
    for data in (train, test):
        dtype = str(data.items.dtype).removeprefix("torch.")
        print(f"{data.split:9} {tuple(data.items.shape)} {dtype}, fingerprint {data.fingerprint[:16]}")
    _report_details(train)
    if test.policy:
        print(f"policy    {one_line(test.policy)}")
    source = SOURCES.get(command.name)
    if source is not None and command.data_dir is None and source.cache.is_dir():
        print(f"cache     {source.cache}")


def _report_details(data: Dataset) -> None:
    """Print statistics of the columns of a table, or of the vocabulary and lengths of token sequences."""
    if isinstance(data, TableDataset):
        width = data.shape[0]
        names = data.columns or [str(i + 1) for i in range(width)]
        for name, mean, std in list(zip(names, data.mean.tolist(), data.std.tolist(), strict=True))[:COLUMNS]:
            print(f"column    {one_line(name)}: mean {mean:.4g}, standard deviation {std:.4g}")
        if width > COLUMNS:
            print(f"          … and {width - COLUMNS} more columns")
    elif isinstance(data, TokenDataset):
        lengths = data.lengths
        print(f"tokens    {len(data.vocabulary)} in the vocabulary, {data.vocabulary[data.padding]!r} is padding")
        print(f"lengths   {int(lengths.min())} … {int(lengths.max())}, mean {lengths.double().mean():.1f}")


if __name__ == "__main__":
    run_command(main)
