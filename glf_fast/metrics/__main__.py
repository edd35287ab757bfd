"""Fréchet distance between two sets of images.

python -m glf_fast.metrics ref fashion-mnist:test --extractor vgg16 --out reference.safetensors

python -m glf_fast.metrics calc samples/ fashion-mnist:test
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from glf_fast import distributed
from glf_fast.command_line import parse, pick_device
from glf_fast.data import SOURCES, SPLITS, as_images, load
from glf_fast.distributed import by_main, unhurried
from glf_fast.errors import UserError, run_command
from glf_fast.metrics.collect import collect
from glf_fast.metrics.extractors import Extractor, extractor
from glf_fast.metrics.reference import dataset_stats, subset
from glf_fast.metrics.score import compare, summary
from glf_fast.metrics.stats import FeatureStats


@dataclass(frozen=True)
class Ref:
    """Save the feature statistics of a set of images, for later comparisons with other sets."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Images: folder, zip, .npy, .npz, or a data set with its split (fashion-mnist:test)."""
    out: Path
    """File to write (.safetensors)."""
    extractor: str = "vgg16"
    """Feature network: tiny, vgg16, vgg16-relu4_3, vgg16-relu3_3, vgg16-relu2_2 or inception."""
    n: int | None = None
    """Number of images to use, drawn at random with a fixed seed; by default all."""
    weights: Path | None = None
    """Local weights file of the extractor."""
    device: str = ""
    """Device to compute on (cpu, cuda, cuda:1); by default a GPU if there is one."""
    image_size: int | None = None
    """Folders, zips and CelebA: resize the central square of each image to this many pixels."""
    skip_unusable: bool = False
    """Folders and zips: leave out files that cannot be read as images."""


@dataclass(frozen=True)
class Calc:
    """Compute the distance of the images A (the samples) from the images B (the reference)."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Samples: images (folder, zip, .npy, .npz, fashion-mnist:test) or statistics (.safetensors by `ref`, .npz of mu and
    sigma)."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Reference, in any of the same forms."""
    extractor: str | None = None
    """Feature network; by default the network of the saved statistics, else vgg16."""
    n: int | None = None
    """Number of images to use of each set that is not saved statistics, drawn at random with a fixed seed; by default all."""
    weights: Path | None = None
    """Local weights file of the extractor."""
    device: str = ""
    """Device to compute on (cpu, cuda, cuda:1); by default a GPU if there is one."""
    image_size: int | None = None
    """Folders, zips and CelebA: resize the central square of each image to this many pixels."""
    skip_unusable: bool = False
    """Folders and zips: leave out files that cannot be read as images."""
    json: bool = False
    """Print the whole result with its protocol as JSON."""


def main() -> None:
    """Parse the command line and run the command."""
    with distributed.launched():
        _run()


def _run() -> None:
    commands: Any = Annotated[Ref, tyro.conf.subcommand("ref")] | Annotated[Calc, tyro.conf.subcommand("calc")]
    command: Ref | Calc = parse(commands, sys.argv[1:], "glf_fast.metrics", description=__doc__)
    if command.n is not None and command.n < 2:
        raise UserError(f"--n {command.n} is too small; a distance needs at least two images")
    if isinstance(command, Ref):
        ref(command)
    else:
        calc(command)


def ref(command: Ref) -> None:
    """Run `ref`: save the statistics of one set."""
    if command.out.suffix != ".safetensors":
        raise UserError(
            f"--out {command.out} does not end in .safetensors, but statistics are saved in this format; choose another name"
        )
    with unhurried():
        network = extractor(command.extractor, device=pick_device(command.device), weights=command.weights)
    stats = from_images(command.source, network, command)
    by_main(_save)(stats, command.out)
    print(f"{command.out}: {stats.n} images, {stats.dim} features of {command.extractor}")


def _save(stats: FeatureStats, out: Path) -> None:
    stats.root()
    stats.save(out)


def calc(command: Calc) -> None:
    """Run `calc`: print the distance of two sets."""
    given = [from_statistics(source) for source in (command.a, command.b)]  # finds errors in files before the long work
    network: Extractor | None = None
    if None not in given:
        for option in ("extractor", "n", "weights", "device", "image_size", "skip_unusable"):
            if getattr(command, option) not in (None, "", False):
                name = option.replace("_", "-")
                raise UserError(f"{command.a} and {command.b} are saved statistics already; leave --{name} out")
    else:
        known = [stats.extractor["name"] for stats in given if stats is not None and stats.extractor is not None]
        name = command.extractor or (known or ["vgg16"])[0]
        with unhurried():
            network = extractor(name, device=pick_device(command.device), weights=command.weights)
        for stats in given:
            if stats is not None:
                stats.check_comparable(FeatureStats(network.dim, extractor=network.identity))
    a, b = (
        stats if stats is not None else from_images(source, network, command)
        for stats, source in zip(given, (command.a, command.b), strict=True)
    )
    result = by_main(compare)(a, b)
    result["protocol"]["samples"] = a.source
    if command.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print(summary(result))
        for note in result["notes"]:
            print(f"note: {note}")


def from_statistics(source: str) -> FeatureStats | None:
    """Saved statistics, or None if the source holds images."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return FeatureStats.load(path)
    if path.suffix == ".npz" and path.is_file():
        try:
            with path.open("rb") as opened:
                file = np.load(opened, allow_pickle=False)
                if isinstance(file, np.ndarray):
                    raise UserError(f"by its content this is a .npy, one array; rename it to {path.stem}.npy")
                if {"mu", "sigma"} <= set(file.files):
                    mean, cov = _real(file["mu"]), _real(file["sigma"])
                    # The file does not say from how many images; a large n avoids the special path for few samples.
                    return FeatureStats.from_moments(mean, cov, n=2**40, source={"name": source, "n": "unknown"})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except Exception as error:  # numpy and zipfile raise whatever they run into
            raise UserError(
                f"{source} holds neither readable statistics nor images ({str(error)[:200]}); write it again"
            ) from error
    return None


def _real(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise UserError(f"mu and sigma must be real numbers; got {array.dtype}")
    return torch.from_numpy(array.astype(np.float64))


def _options(source: str, command: Ref | Calc) -> dict[str, Any]:
    """The options of loading that are for this source; an option that is for no source of the command is given to all."""
    sources = [command.a, command.b] if isinstance(command, Calc) else [source]

    def takes(source: str, option: str) -> bool:
        data_set = SOURCES.get(source.rpartition(":")[0])
        resizes = option == "image_size" and data_set is not None and data_set.resizes
        return resizes or Path(source).is_dir() or Path(source).suffix.lower() == ".zip"

    return {
        option: getattr(command, option)
        for option in ("image_size", "skip_unusable")
        if takes(source, option) or not any(takes(other, option) for other in sources)
    }


def from_images(source: str, network: Extractor | None, command: Ref | Calc) -> FeatureStats:
    """Statistics of a data set's split (cached) or of all images at a path."""
    assert network is not None
    options = _options(source, command)
    if Path(source).exists():
        # `load` splits a tenth off for testing; the distance is about all images.
        with unhurried():
            parts = [as_images(load(source, split, **options)) for split in SPLITS]
        shapes = [tuple(part.images.shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise UserError(f"the images of {source} have different shapes, {shapes[0]} and {shapes[1]}")
        images = torch.cat([part.images for part in parts])
        total = len(images) if command.n is None else command.n
        origin: dict[str, Any] = {
            "name": source,
            "fingerprints": [part.fingerprint for part in parts],
            "policies": [part.policy for part in parts],
        }
        stats = collect(subset(images, total), network, source=origin)
        stats.source["n"] = stats.n
        return stats
    name, _, split = source.rpartition(":")
    if split not in SPLITS:
        raise UserError(
            f"{source!r} is neither a file nor a folder nor a data set with its split; a data set is written "
            "NAME:SPLIT, such as fashion-mnist:test"
        )
    with unhurried():
        dataset = as_images(load(name, split, **options))
    return dataset_stats(dataset, network, n=command.n)


if __name__ == "__main__":
    run_command(main)
