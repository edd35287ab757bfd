"""Fréchet distance and other scores of a set of images in comparison with another set.

python -m glf_fast.metrics ref fashion-mnist:test --extractor vgg16 --out reference.safetensors

python -m glf_fast.metrics calc samples/ fashion-mnist:test

python -m glf_fast.metrics calc samples/ fashion-mnist:test --scores fd,kid,is,prd,pr,dc,msssim,critic,modes,nearest
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from glf_fast import distributed
from glf_fast.command_line import parse, pick_device
from glf_fast.data import SOURCES, SPLITS, ImageDataset, as_images, load
from glf_fast.distributed import by_main, unhurried
from glf_fast.errors import UserError, run_command
from glf_fast.metrics.battery import KEPT_IMAGES, battery, table
from glf_fast.metrics.collect import collect_all
from glf_fast.metrics.extractors import CLASSIFIERS, Extractor, extractor
from glf_fast.metrics.reference import dataset_stats, subset
from glf_fast.metrics.score import compare, summary
from glf_fast.metrics.score_table import SCORES, ImageSet, check_scores, named_scores
from glf_fast.metrics.stats import FeatureStats


@dataclass(frozen=True)
class Ref:
    """Save the feature statistics of a set of images, for later comparisons with other sets."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Images: folder, zip, .npy, .npz, or a data set with its split (fashion-mnist:test)."""
    out: Path
    """File to write (.safetensors)."""
    extractor: str = "vgg16"
    """Feature network: tiny, vgg16, vgg16-relu4_3, vgg16-relu3_3, vgg16-relu2_2, inception, tiny-mnist or tiny-cifar10."""
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
    """Score the images A (the samples) in comparison with the images B (the reference)."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Samples: images (folder, zip, .npy, .npz, fashion-mnist:test) or statistics (.safetensors by `ref`, .npz of mu and
    sigma)."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Reference, in any of the same forms."""
    scores: str = ""
    """Scores, separated by commas: fd, kid, pr, is, prd, dc, msssim, critic, modes, nearest (docs/scores.md), as a table; by
    default fd, kid and pr in a line."""
    extractor: str | None = None
    """Feature network; by default the network of the saved statistics, else vgg16."""
    classifier: str | None = None
    """Network of the scores is and modes: tiny, tiny-mnist, inception or tiny-cifar10; by default the extractor if it
    classifies, else tiny."""
    classifier_weights: Path | None = None
    """Local weights file of the classifier, if it is not the extractor."""
    train: str | None = None
    """With --scores: the training images, in the forms of images, for the score nearest and the column of real images; by
    default the training split where B is the test split of a data set."""
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
    stats = from_images(command.source, [network], command).stats[network.name]
    by_main(_save)(stats, command.out)
    print(f"{command.out}: {stats.n} images, {stats.dim} features of {command.extractor}")


def _save(stats: FeatureStats, out: Path) -> None:
    stats.root()
    stats.save(out)


def calc(command: Calc) -> None:
    """Run `calc`: print the distance of two sets, or the table of their scores."""
    names = named_scores(command.scores)
    if message := check_scores(names, CLASSIFIERS):
        raise UserError(f"--scores: {message}")
    for option in ("classifier", "classifier_weights", "train"):
        if getattr(command, option) is not None and not names:
            raise UserError(f"--{option.replace('_', '-')} has no effect without --scores")
    given = [from_statistics(source) for source in (command.a, command.b)]  # finds errors in files before the long work
    known = [stats.extractor["name"] for stats in given if stats is not None and stats.extractor is not None]
    if None not in given:
        for option in ("extractor", "n", "weights", "device", "image_size", "skip_unusable"):
            if getattr(command, option) not in (None, "", False):
                name = option.replace("_", "-")
                raise UserError(f"{command.a} and {command.b} are saved statistics already; leave --{name} out")
    extractors = []
    if names or None in given:
        extractors = _extractors(command, names, (known or ["vgg16"])[0])
        for stats in given:
            if stats is not None:
                stats.check_comparable(FeatureStats(extractors[0].dim, extractor=extractors[0].identity))
    a, b = (
        _of_statistics(stats, extractors, source) if stats is not None else from_images(source, extractors, command)
        for stats, source in zip(given, (command.a, command.b), strict=True)
    )
    first, reference = (next(iter(images.stats.values())) for images in (a, b))
    numbers = []
    if names:
        train, training = _training(command, extractors, first.n)
        numbers = battery(names, extractors, a, b, train, training)
    result = {}
    if command.json or not names:
        result = by_main(compare)(first, reference)
        result["protocol"]["samples"] = first.source
    if command.json:
        print(json.dumps(result | ({"battery": numbers} if names else {}), indent=2, allow_nan=False))
    elif names:
        print(f"{command.a} ({first.n:,} images) in comparison with {command.b} ({reference.n:,} images)\n")
        print(table(numbers))
        print("\n" + "\n".join(dict.fromkeys(f"{n['score']}: {n['protocol']}" for n in numbers if n["protocol"])))
    else:
        print(summary(result))
        for note in result["notes"]:
            print(f"note: {note}")


def _extractors(command: Calc, names: Sequence[str], default: str) -> list[Extractor]:
    """The feature network, and the classifier if the scores need another network for it."""
    chosen = [command.extractor or default]
    if any(SCORES[name].needs == "classes" for name in names):
        chosen.append(command.classifier or (chosen[0] if chosen[0] in CLASSIFIERS else "tiny"))
        if chosen[1] not in CLASSIFIERS:
            raise UserError(f"--classifier {chosen[1]} does not classify; the classifiers are {', '.join(CLASSIFIERS)}")
    elif command.classifier:
        raise UserError(f"--classifier {command.classifier} has no effect; it is for the scores is and modes")
    if command.classifier_weights and len(set(chosen)) == 1:
        raise UserError("--classifier-weights has no effect, because no other network than the extractor is used")
    weights = {chosen[-1]: command.classifier_weights} | {chosen[0]: command.weights}
    with unhurried():
        device = pick_device(command.device)
        return [extractor(name, device=device, weights=weights[name]) for name in dict.fromkeys(chosen)]


def _of_statistics(stats: FeatureStats, extractors: Sequence[Extractor], source: str) -> ImageSet:
    """Saved statistics as a set of images, of which nothing else is known."""
    if len(extractors) > 1:
        raise UserError(
            f"{source} holds features of {extractors[0].name}, not of the classifier {extractors[1].name}; give the images, or "
            f"statistics by --extractor {extractors[1].name}"
        )
    return ImageSet({extractors[0].name if extractors else "": stats})


def _training(command: Calc, extractors: Sequence[Extractor], n: int) -> tuple[ImageSet | None, Tensor | None]:
    """Training images for the anchors, equally many as samples or half of them all, and all training images."""
    name, _, split = command.b.rpartition(":")
    source = command.train or (f"{name}:train" if split == "test" and not Path(command.b).exists() else None)
    if source is None:
        return None, None
    loaded = _load(source, command)
    return _collected(loaded, extractors, min(n, max(2, len(loaded.images) // 2))), loaded.images


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
    sources = [command.a, command.b, command.train or command.b] if isinstance(command, Calc) else [source]

    def takes(source: str, option: str) -> bool:
        data_set = SOURCES.get(source.rpartition(":")[0])
        resizes = option == "image_size" and data_set is not None and data_set.resizes
        return resizes or Path(source).is_dir() or Path(source).suffix.lower() == ".zip"

    return {
        option: getattr(command, option)
        for option in ("image_size", "skip_unusable")
        if takes(source, option) or not any(takes(other, option) for other in sources)
    }


@dataclass(frozen=True)
class _Loaded:
    """All images of a source, with the data set of which they are a split, or else their origin."""

    images: Tensor
    dataset: ImageDataset | None
    origin: dict[str, Any]


def from_images(source: str, extractors: Sequence[Extractor], command: Ref | Calc) -> ImageSet:
    """The images of a data set's split, or all images at a path, with their statistics."""
    return _collected(_load(source, command), extractors, command.n)


def _collected(loaded: _Loaded, extractors: Sequence[Extractor], n: int | None) -> ImageSet:
    """n of the images, by default all, with their statistics; those of a data set are cached."""
    images = subset(loaded.images, len(loaded.images) if n is None else n)
    if loaded.dataset is not None:
        found = [dataset_stats(loaded.dataset, network, n=n) for network in extractors]
    else:
        found = collect_all(images, extractors, source=loaded.origin)
        for stats in found:
            stats.source["n"] = stats.n
    names = [network.name for network in extractors]
    return ImageSet(dict(zip(names, found, strict=True)), images[:KEPT_IMAGES].to(extractors[0].device))


def _load(source: str, command: Ref | Calc) -> _Loaded:
    """All images of a source."""
    options = _options(source, command)
    if Path(source).exists():
        # `load` splits a tenth off for testing; the distance is about all images.
        with unhurried():
            parts = [as_images(load(source, split, **options)) for split in SPLITS]
        shapes = [tuple(part.images.shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise UserError(f"the images of {source} have different shapes, {shapes[0]} and {shapes[1]}")
        origin: dict[str, Any] = {
            "name": source,
            "fingerprints": [part.fingerprint for part in parts],
            "policies": [part.policy for part in parts],
        }
        return _Loaded(torch.cat([part.images for part in parts]), None, origin)
    name, _, split = source.rpartition(":")
    if split not in SPLITS:
        raise UserError(
            f"{source!r} is neither a file nor a folder nor a data set with its split; a data set is written "
            "NAME:SPLIT, such as fashion-mnist:test"
        )
    with unhurried():
        dataset = as_images(load(name, split, **options))
    return _Loaded(dataset.images, dataset, {})


if __name__ == "__main__":
    run_command(main)
