"""Scores of a model: of its samples, and of its reconstructions and its likelihood if the model has them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast import data, distributed, metrics, seeds
from glf_fast.errors import UserError
from glf_fast.images import to_float, to_uint8
from glf_fast.metrics import Extractor
from glf_fast.models import GenerativeModel, HasLikelihood, Reconstructs
from glf_fast.training.pictures import draw

__all__ = [
    "bits_per_dim",
    "evaluate",
    "evaluate_mode",
    "has_scores",
    "likelihood",
    "likelihood_line",
    "load_extractors",
    "other_likelihood",
    "reconstructions",
    "table",
]

_CHUNK = 500


def evaluate(
    model: GenerativeModel,
    train: data.ImageDataset,
    test: data.ImageDataset,
    extractors: Sequence[Extractor],
    *,
    n: int,
    seed: int = 0,
    temperature: float = 1.0,
    mode: str = "",
    about: dict[str, Any] | None = None,
    scores: Sequence[str] = metrics.USUAL,
) -> list[dict[str, Any]]:
    """Score n samples, and the reconstructions of up to n test images, against the test images, with each extractor.

    Several processes (`distributed`) divide the images among themselves, and all get the scores.

    Args:
        mode: one of the model's sampling modes, or "".
        about: description of the checkpoint, to be recorded.
        scores: names of `metrics.SCORES`; those of `metrics.USUAL` are always computed.

    Returns:
        Per extractor {"settings": …, "checkpoint": about, "samples": score, "reconstructions": score or None, "likelihood":
        result of `likelihood`}, JSON-ready; a score is a result of `metrics.score`. The first one has further scores of the
        samples, if there are any, as "battery", a result of `metrics.battery`.

    Raises:
        UserError: fewer than two samples or images, or a sampling mode that the model does not have.
    """
    sampling = {"temperature": temperature, "mode": mode}
    samples = draw(model, n, seed=seed, temperature=temperature, mode=mode, divided=True)
    density = likelihood(model, test, n, seed=seed)
    references = [metrics.reference(train, test, extractor, n=n) for extractor in extractors]
    drawn = metrics.collect_all(samples, extractors, divided=True)
    decoded: Sequence[metrics.FeatureStats | None] = [None] * len(extractors)
    if isinstance(model, Reconstructs):
        decoded = metrics.collect_all(reconstructions(model, test.images, n), extractors, divided=True)
    shared: dict[str, Any] = {"checkpoint": about or {}}
    results: list[dict[str, Any]] = []
    for extractor, reference, of_samples, of_rebuilt in zip(extractors, references, drawn, decoded, strict=True):
        rebuilt = None
        if of_rebuilt is not None:
            given = {"images": "test", **shared}
            rebuilt = metrics.score_statistics(of_rebuilt, reference, sampling=given)
        scored = metrics.score_statistics(of_samples, reference, seed=seed, sampling=sampling | shared)
        results.append(
            {
                "settings": {"extractor": extractor.name, "n": n, "seed": seed, **sampling},
                **shared,
                "samples": scored,
                "reconstructions": rebuilt,
                "likelihood": density,
            }
        )
    if more := [name for name in scores if name not in metrics.USUAL]:
        stats = (
            {e.name: s for e, s in zip(extractors, found, strict=True)}
            for found in (drawn, [r.test for r in references], [r.train for r in references])
        )
        results[0]["battery"] = _battery(more, extractors, n, samples, train, test, *stats, seed=seed)
    return results


def _battery(
    scores: Sequence[str],
    extractors: Sequence[Extractor],
    n: int,
    samples: Tensor,
    train: data.ImageDataset,
    test: data.ImageDataset,
    *stats: dict[str, metrics.FeatureStats],
    seed: int,
) -> list[dict[str, Any]]:
    """`metrics.battery` of n samples, of which each process has its part; `stats` are of samples, test and training images."""
    device = extractors[0].device
    lengths = [len(part) for part in distributed.parts(n, _CHUNK)]
    half = next(iter(stats[2].values())).n
    images = [distributed.joined(samples, lengths), metrics.subset(test.images, n), metrics.subset(train.images, half)]
    drawn, held_out, real = (
        metrics.ImageSet(of, x[: metrics.KEPT_IMAGES].to(device)) for of, x in zip(stats, images, strict=True)
    )
    return metrics.battery(scores, extractors, drawn, held_out, real, train.images, seed=seed)


def evaluate_mode(
    model: GenerativeModel,
    train: data.ImageDataset,
    test: data.ImageDataset,
    extractors: Sequence[Extractor],
    scores: Sequence[dict[str, Any]],
    mode: str,
) -> list[dict[str, Any]]:
    """`scores`, a result of `evaluate` with the same model, data and extractors, for samples of another sampling mode.

    Reconstructions and likelihood do not depend on the mode, so they are not computed again. The battery is left out.
    """
    n, seed, temperature = (scores[0]["settings"][key] for key in ("n", "seed", "temperature"))
    samples = draw(model, n, seed=seed, temperature=temperature, mode=mode, divided=True)
    results = []
    for extractor, score in zip(extractors, scores, strict=True):
        sampling = {"temperature": temperature, "mode": mode, "checkpoint": score["checkpoint"]}
        reference = metrics.reference(train, test, extractor, n=n)
        scored = metrics.score(samples, reference, extractor, seed=seed, sampling=sampling)
        kept = {name: value for name, value in score.items() if name != "battery"}
        results.append(kept | {"settings": score["settings"] | {"mode": mode}, "samples": scored})
    return results


def has_scores(scores: Sequence[dict[str, Any]], names: Sequence[str]) -> bool:
    """Whether results of `evaluate` have values of all scores of these names; the usual ones they always have."""
    numbers = [number for score in scores for number in score.get("battery", ())]
    found = {number["score"] for number in numbers if number["value"] is not None}
    return set(names) <= found | set(metrics.USUAL)


def reconstructions(model: Reconstructs, test_images: Tensor, n: int) -> Iterator[Tensor]:
    """Batches of uint8 reconstructions of n uint8 test images, the same images as in `metrics.reference`, or of this process's
    part of them.

    The images come in another random order than in `metrics.reference`. KID compares blocks of images pairwise, and is unbiased
    only if the two blocks of a pair share no images.
    """
    assert isinstance(model, GenerativeModel)
    device, images = next(model.parameters()).device, metrics.subset(test_images, n)
    own = distributed.parts(len(images), _CHUNK)[distributed.rank()]
    for batch in images.roll(len(images) // 2, 0)[own.start : own.stop].split(_CHUNK) if own else ():
        yield to_uint8(model.reconstruct(to_float(batch.to(device))))


def likelihood(model: GenerativeModel, test: data.ImageDataset, n: int, *, seed: int = 0) -> dict[str, Any] | None:
    """Bits per dimension of up to n test images under the model (lower is better); None for a model without likelihood.

    A model's density p is continuous and pixels have 256 levels, so each level k becomes (k + u) / 256 with u uniform in [0,
    1). The mean of −log₂ p / D + 8 is then an upper bound of the bits per dimension that p needs to code the images (Theis et
    al., arXiv:1511.01844, section 3.1). Beside it stands the median: a flow may need millions of bits for a single image
    (docs/traps.md), of which the mean is then made.
    """
    if not isinstance(model, HasLikelihood):
        return None
    every = bits_per_dim(model, test, n, seed=seed)
    mean, error = every.mean().item(), every.std().item() / math.sqrt(len(every))
    median = every.median().item()
    finite = math.isfinite(mean)  # JSON has no infinities
    return {
        "metric": "bits per dimension",
        "value": mean if finite else None,
        "interval": [mean - 1.96 * error, mean + 1.96 * error] if finite else None,
        "median": median if math.isfinite(median) else None,
        "what": model.words.likelihood,
        "n": len(every),
    }


def bits_per_dim(model: HasLikelihood, test: data.ImageDataset, n: int, *, seed: int = 0) -> Tensor:
    """Bits per dimension (N,) of each of up to n test images, see `likelihood`."""
    assert isinstance(model, GenerativeModel)
    device, images = next(model.parameters()).device, metrics.subset(test.images, n)
    bits = [torch.empty(0, dtype=torch.float64, device=device)]
    parts = distributed.parts(len(images), _CHUNK)
    own = parts[distributed.rank()]
    for i, batch in enumerate(images[own.start : own.stop].split(_CHUNK) if own else (), own.start // _CHUNK):
        noise = seeds.generator(seed, "likelihood", i, device=device)
        levels = batch.to(device).float()
        x = (levels + torch.rand(levels.shape, generator=noise, device=device)) / 256
        bits.append(8 - model.log_likelihood(x, noise).double() / (math.log(2) * x[0].numel()))
    return distributed.joined(torch.cat(bits), [len(part) for part in parts])


def other_likelihood(
    model: GenerativeModel, test: data.ImageDataset, other: data.ImageDataset, n: int, *, seed: int = 0
) -> str:
    """A line about the bits per dimension of another data set: how often one of its images needs more than a test image.

    Where the share is near a half or below, the likelihood does not tell the sets apart, as it happens to flows on pixels
    (Nalisnick et al., arXiv:1810.09136).

    Raises:
        UserError: a model without likelihood, or images of another shape.
    """
    if not isinstance(model, HasLikelihood):
        raise UserError(f"{model.words.title} has no likelihood, so --other-data cannot be scored")
    if other.shape != model.shape:
        raise UserError(f"{other.name} has images of shape {other.shape}; --other-data must have {model.shape}")
    ours, theirs = (bits_per_dim(model, images, n, seed=seed) for images in (test, other))
    below = torch.searchsorted(ours.sort().values, theirs)
    equal = torch.searchsorted(ours.sort().values, theirs, right=True) - below
    share = ((below + equal / 2).mean() / len(ours)).item()
    return (
        f"{other.name}: {theirs.mean().item():.3f} bits per dimension ({test.name}: {ours.mean().item():.3f}); "
        f"an image of it needs more bits than a test image with probability {share:.3f}"
    )


def load_extractors(names: Sequence[str], device: Any, *, all_needed: bool = False) -> list[Extractor]:
    """The extractors called `names`, or "tiny" if none of them has weights.

    Extractors without weights are left out, with a line on stderr.

    Raises:
        UserError: an unknown name; with `all_needed` also weights that can be neither found nor fetched.
    """
    loaded = []
    for name in names:
        found, problem = [], "another process does not find its weights"
        with distributed.unhurried():
            try:
                found = [metrics.extractor(name, device=device)]
            except (UserError, OSError) as error:
                if all_needed or name not in metrics.names():
                    raise
                problem = str(error)
        if distributed.highest(not found) == [0]:
            loaded += found
        else:
            print(f"no scores with {name}: {problem}", file=sys.stderr)
    return loaded or [metrics.extractor("tiny", device=device)]


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Scores as a table of text, one line for each score, with the distances between real images, and the battery's table."""
    floors_of = ("train/test", "train/train")
    head = ("", "samples", "95 %", "KID", "precision", "recall", "reconstructions", *floors_of, "images")
    rows = [head]
    densities: dict[str, None] = {}
    for score in scores:
        samples, floors, rebuilt = score["samples"], score["samples"]["floors"], score["reconstructions"]
        interval, kid = samples["interval"], samples["kid"]
        if density := score["likelihood"]:
            densities[likelihood_line(density)] = None  # the same for all extractors
        rows.append(
            (
                samples["metric"] + _special(score["settings"]),
                f"{samples['value']:.2f}",
                f"{interval[0]:.2f} … {interval[1]:.2f}" if interval else "",
                f"{kid['mean']:.4f}" if kid else "",
                *("" if samples[key] is None else f"{samples[key]:.3f}" for key in ("precision", "recall")),
                f"{rebuilt['value']:.2f}" if rebuilt else "",
                *(f"{floors[key]:.2f}" for key in floors_of),
                str(score["settings"]["n"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    batteries = [f"\n{metrics.table(score['battery'])}" for score in scores if score.get("battery")]
    return "\n".join([*lines, *densities, *batteries])


def _special(settings: dict[str, Any]) -> str:
    """The settings of sampling that are not the usual ones, in brackets."""
    usual = {"mode": "", "temperature": 1, "seed": 0}
    special = {name: settings[name] for name, value in usual.items() if settings[name] != value}
    return (
        f" ({', '.join(str(v) if name == 'mode' else f'{name} {v}' for name, v in special.items())})" if special else ""
    )


def likelihood_line(density: dict[str, Any]) -> str:
    """A result of `likelihood` as a line of text."""
    median = density.get("median")  # version 0.1.0 had none
    of_median = "" if median is None else f", median {median:.3f}"
    if density["value"] is None:
        return f"{density['metric']}: not finite{of_median}"
    low, high = density["interval"]
    return f"{density['metric']}: {density['value']:.3f} (95 %: {low:.3f} … {high:.3f}){of_median}, {density['what']}"
