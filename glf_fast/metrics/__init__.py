"""Scores of generated images: Fréchet distances (FID among them), KID, precision and recall, and a battery of others.

    extractor = metrics.extractor("vgg16")
    reference = metrics.reference(data.load("fashion-mnist", "train"), data.load("fashion-mnist", "test"), extractor)
    result = metrics.score(samples, reference, extractor, seed=0)       # samples: uint8 (N, C, H, W)
    print(metrics.summary(result))

Two scores are comparable only if their protocols agree. Every result contains its protocol.
"""

from __future__ import annotations

from glf_fast.metrics.battery import KEPT_IMAGES, battery, shown, shown_interval, table
from glf_fast.metrics.collect import collect, collect_all
from glf_fast.metrics.critic import critic_distance
from glf_fast.metrics.density_coverage import DensityCoverage, density_coverage
from glf_fast.metrics.estimates import Estimate
from glf_fast.metrics.extractors import CLASSIFIERS, UNPUBLISHED, Extractor, extractor, names
from glf_fast.metrics.frechet import frechet_distance, jackknife_interval
from glf_fast.metrics.inception_score import inception_score
from glf_fast.metrics.kid import KID, kid
from glf_fast.metrics.modes import ModeCounts, mode_counts
from glf_fast.metrics.ms_ssim import diversity, ms_ssim
from glf_fast.metrics.nearest import Nearest, Proximity, nearest, proximity
from glf_fast.metrics.prd import PRD, prd
from glf_fast.metrics.precision_recall import PrecisionRecall, precision_recall
from glf_fast.metrics.reference import Reference, dataset_stats, reference, subset
from glf_fast.metrics.score import USUAL, compare, score, score_statistics, summary
from glf_fast.metrics.score_table import SCORES, ImageSet, check_scores, named_scores
from glf_fast.metrics.stats import FeatureStats

__all__ = [
    "CLASSIFIERS",
    "KEPT_IMAGES",
    "KID",
    "PRD",
    "SCORES",
    "UNPUBLISHED",
    "USUAL",
    "DensityCoverage",
    "Estimate",
    "Extractor",
    "FeatureStats",
    "ImageSet",
    "ModeCounts",
    "Nearest",
    "PrecisionRecall",
    "Proximity",
    "Reference",
    "battery",
    "check_scores",
    "collect",
    "collect_all",
    "compare",
    "critic_distance",
    "dataset_stats",
    "density_coverage",
    "diversity",
    "extractor",
    "frechet_distance",
    "inception_score",
    "jackknife_interval",
    "kid",
    "mode_counts",
    "ms_ssim",
    "named_scores",
    "names",
    "nearest",
    "prd",
    "precision_recall",
    "proximity",
    "reference",
    "score",
    "score_statistics",
    "shown",
    "shown_interval",
    "subset",
    "summary",
    "table",
]
