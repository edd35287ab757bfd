"""`python -m glf_fast.data fetch|info NAME`: fetch a data set or weights, or say what they are and where they lie."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from glf_fast.command_line import parse
from glf_fast.data import SPLITS, load, weights
from glf_fast.data.fetch import NotFound
from glf_fast.data.idx import FASHION_MNIST, MNIST
from glf_fast.errors import UserError, run_command
from glf_fast.files import cache_dir

ABOUT = {
    **{s.name: (s.title, s.licence, s.citation) for s in (FASHION_MNIST, MNIST)},
    "cifar10": (
        "CIFAR-10: 50,000 + 10,000 photographs in ten classes, 32 × 32, colour",
        "none stated; for research",
        "Krizhevsky: Learning Multiple Layers of Features from Tiny Images (2009)",
    ),
    "celeba": (
        "CelebA, aligned: 162,770 + 19,962 faces, 64 × 64 by default, colour",
        "for non-commercial research",
        "Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild, arXiv:1411.7766",
    ),
    "digits": (
        "scikit-learn's digits: 1,617 + 180 handwritten digits, 8 × 8, grey",
        "BSD-3-Clause (scikit-learn); UCI's data CC BY 4.0",
        "Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI (1998)",
    ),
    "vgg16": (
        "VGG16's convolutions, trained on ImageNet",
        "BSD-3-Clause (torchvision)",
        "Simonyan, Zisserman, arXiv:1409.1556",
    ),
    "inception": (
        "The Inception network of 2015-12-05 that FID is defined by",
        "Apache-2.0",
        "Szegedy et al., arXiv:1512.00567; Heusel et al., arXiv:1706.08500",
    ),
}


@dataclass(frozen=True)
class Fetch:
    """Fetch a data set or weights into the cache, and verify them."""

    name: Annotated[str, tyro.conf.Positional]
    """A data set, `vgg16` or `inception`."""
    data_dir: Path | None = None
    """Folder to look in first (for weights: the file)."""
    image_size: int | None = None
    """CelebA, folders and zips: resize the central square to this."""


@dataclass(frozen=True)
class Info(Fetch):
    """Say what a data set or weights are and what is here of them, without the network."""


def _report(command: Fetch, online: bool) -> None:
    about = ABOUT.get(command.name)
    for key, value in zip(("", "licence   ", "citation  "), about or (), strict=False):
        print(f"{key}{value}")
    try:
        _report_files(command, online)
    except NotFound:
        if online:
            raise
        print(f"not here yet; python -m glf_fast.data fetch {command.name}")


def _report_files(command: Fetch, online: bool) -> None:
    if command.name in weights.NAMES:
        path = weights.fetch(command.name, path=command.data_dir, download=online)
        print(f"file      {path} ({path.stat().st_size / 1e6:.0f} MB, verified)")
        return
    for split in SPLITS:
        data = load(command.name, split, data_dir=command.data_dir, image_size=command.image_size, download=online)
        print(f"{split:9} {tuple(data.images.shape)} uint8, fingerprint {data.fingerprint[:16]}")
        if data.policy and split == "test":
            print(f"policy    {data.policy}")
    kept = cache_dir() / "data" / command.name
    if command.data_dir is None and kept.is_dir():
        print(f"cache     {kept}")


def main() -> None:
    """Parse the command line and do what it says."""
    commands: Any = Annotated[Fetch, tyro.conf.subcommand("fetch")] | Annotated[Info, tyro.conf.subcommand("info")]
    command: Fetch = parse(commands, sys.argv[1:], "glf_fast.data", description=__doc__)
    if command.name not in ABOUT and not Path(command.name).exists():
        raise UserError(
            f"nothing is called {command.name!r}; there are {', '.join(ABOUT)}, and paths of your own images"
        )
    _report(command, online=not isinstance(command, Info))


if __name__ == "__main__":
    run_command(main)
