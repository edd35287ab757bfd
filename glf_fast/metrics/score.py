"""Scores of models: distance, interval, KID, precision, recall and floors (distances between real images), with protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from glf_fast.distributed import by_main
from glf_fast.metrics.collect import collect
from glf_fast.metrics.estimates import GROUPS
from glf_fast.metrics.extractors import Extractor, label
from glf_fast.metrics.frechet import frechet_distance, jackknife_interval
from glf_fast.metrics.kid import kid
from glf_fast.metrics.precision_recall import NEIGHBOURS, precision_recall
from glf_fast.metrics.reference import Reference
from glf_fast.metrics.stats import FeatureStats

__all__ = ["USUAL", "compare", "score", "score_statistics", "summary"]

# The scores of which a result consists. `battery` has further ones.
USUAL = ("fd", "kid", "pr")


def score(
    samples: Tensor | Iterable[Tensor],
    reference: Reference,
    extractor: Extractor,
    *,
    seed: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score generated (or reconstructed) images against real ones; the result is JSON-ready.

    Args:
        samples: uint8 (N, C, H, W), N ≥ 2, or an iterable of such batches. The batch sizes do not change the result. Of several
            processes (`distributed`), the images of this one: all have the score of the images of all.
        reference: result of `reference()` with the same extractor.
        seed: seed of the samples, to be recorded.
        sampling: other settings of the samples (temperature, EMA, checkpoint …), JSON-ready, to be recorded.

    Raises:
        UserError: float images, fewer than two images, another extractor than the reference's, NaN features.
    """
    return score_statistics(collect(samples, extractor, divided=True), reference, seed=seed, sampling=sampling)


def score_statistics(
    samples: FeatureStats,
    reference: Reference,
    *,
    seed: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of `score` from the statistics of the samples of all processes."""
    result = by_main(compare)(samples, reference.test)
    result["floors"] = dict(reference.floors)
    n, samples_n = reference.protocol["floors"]["train/test"][0], result["protocol"]["n"]
    if n != samples_n:
        result["notes"].append(
            f"the floors (distances between real images) are for {n} images, but this score is for {samples_n} images; "
            "fewer images give larger distances"
        )
    result["protocol"] |= {**reference.protocol, "seed": seed, "sampling": dict(sampling or {})}
    return result


def compare(samples: FeatureStats, reference: FeatureStats) -> dict[str, Any]:
    """Distance between two statistics, JSON-ready.

    Interval, KID, precision and recall are None if the features for them were not kept.
    """
    notes = []
    value = frechet_distance(samples, reference)
    if samples.n <= samples.dim:
        path = (
            "by the exact path" if samples.complete else "with fewer exact digits, because not all features were kept"
        )
        notes.append(
            f"{samples.n} samples for {samples.dim} features: the distance is computed {path}, and is biased upwards; "
            "compare it only with distances of equally many samples"
        )
    interval = kernel = precision = recall = None
    if samples.complete and samples.n >= 2 * GROUPS:
        interval = list(jackknife_interval(samples, reference))
    kept = min(len(samples.kept), len(reference.kept))
    if kept >= 4:  # as many as a KID of two blocks needs, and more than the neighbours
        kernel = kid(samples, reference)._asdict()
        precision, recall, *_ = precision_recall(samples, reference)
    return {
        "metric": label(samples.extractor if reference.extractor else None),
        "value": value,
        "interval": interval,
        "kid": kernel,
        "precision": precision,
        "recall": recall,
        "protocol": {
            "extractor": samples.extractor,
            "reference": reference.source,
            "n": samples.source.get("n", samples.n),
            "image_shape": samples.source.get("image_shape"),
            "quantisation": "uint8",
            "precision and recall": f"manifolds of {NEIGHBOURS} nearest neighbours, {kept} features of either set",
            "interval": f"95 %, delete-a-group jackknife over {GROUPS} groups of the samples",
        },
        "notes": notes,
    }


def summary(result: Mapping[str, Any]) -> str:
    """A line to print: value, interval, KID, precision and recall, floors."""
    text = f"{result['metric']} {result['value']:.2f}"
    if result["interval"]:
        low, high = result["interval"]
        text += f" (95 %: {low:.2f} … {high:.2f})"
    if result["kid"]:
        text += f", KID {result['kid']['mean']:.4f} ± {result['kid']['std']:.4f}"
    if result["precision"] is not None:
        text += f", precision {result['precision']:.3f}, recall {result['recall']:.3f}"
    if floors := result.get("floors"):
        text += "; floors: " + ", ".join(f"{name} {value:.2f}" for name, value in floors.items())
    return text
