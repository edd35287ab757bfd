"""Scores of generated images: Fréchet distances (FID among them), KID, precision and recall, on features of several networks.

    extractor = metrics.extractor("vgg16")
    reference = metrics.reference(data.load("fashion-mnist", "train"), data.load("fashion-mnist", "test"), extractor)
    result = metrics.score(samples, reference, extractor, seed=0)       # samples: uint8 (N, C, H, W)
    print(metrics.summary(result))

Two scores are comparable only if their protocols agree. Every result contains its protocol.
"""

from __future__ import annotations

from glf_fast.metrics.collect import collect
from glf_fast.metrics.extractors import Extractor, extractor, names
from glf_fast.metrics.frechet import frechet_distance, jackknife_interval
from glf_fast.metrics.kid import KID, kid
from glf_fast.metrics.precision_recall import PrecisionRecall, precision_recall
from glf_fast.metrics.reference import Reference, dataset_stats, reference, subset
from glf_fast.metrics.score import compare, score, summary
from glf_fast.metrics.stats import FeatureStats

__all__ = [
    "KID",
    "Extractor",
    "FeatureStats",
    "PrecisionRecall",
    "Reference",
    "collect",
    "compare",
    "dataset_stats",
    "extractor",
    "frechet_distance",
    "jackknife_interval",
    "kid",
    "names",
    "precision_recall",
    "reference",
    "score",
    "subset",
    "summary",
]
