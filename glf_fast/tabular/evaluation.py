"""Evaluation of a fitted density: its log-likelihood beside those of simpler densities, and its calibration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glf_fast.tabular import calibration
from glf_fast.tabular.baselines import Gaussian, KernelDensity
from glf_fast.tabular.columns import encoded
from glf_fast.tabular.density import TableDensity
from glf_fast.tabular.preparation import Prepared

__all__ = ["Evaluation", "Likelihood", "evaluate"]

CENTRES, SCORED = 10_000, 5_000  # rows that a kernel density estimate has, and scores, at most: 50 million distances


@dataclass(frozen=True)
class Likelihood:
    """Mean log-likelihood of rows in nats, its standard error, the number of rows, and how many have no finite one.

    If there are such rows, the mean is −∞ and the error NaN.
    """

    mean: float
    error: float
    rows: int
    lost: int = 0

    @classmethod
    def of(cls, log_prob: np.ndarray) -> Likelihood:
        """From the log-likelihoods (N,) of rows."""
        if lost := int((~np.isfinite(log_prob)).sum()):
            return cls(-math.inf, math.nan, len(log_prob), lost)
        return cls(float(log_prob.mean()), float(log_prob.std() / math.sqrt(len(log_prob))), len(log_prob))


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    likelihoods: by density ("flow", "gaussian", "kde") and split.
    bandwidth: of the kernel density estimate, relative to Silverman's.
    transforms: (n, D + 1), of rows of the test split, see `calibration.pit`.
    shift: by split, mean log-determinant of the columns' maps: what nats of a flow's own loss lack.
    """

    likelihoods: dict[str, dict[str, Likelihood]]
    bandwidth: float
    transforms: np.ndarray
    shift: dict[str, float]

    def notes(self) -> list[str]:
        """Sentences on the likelihoods that are not finite."""
        return [
            f"{found.lost} of {found.rows} {split} rows have no finite log-likelihood ({name}): they are too far out."
            for name, by_split in self.likelihoods.items()
            for split, found in by_split.items()
            if found.lost
        ]

    def table(self, density: TableDensity) -> dict[str, Any]:
        """As JSON; null for what is not finite."""
        names = ["log_prob", *(column.name for column in density.columns)]
        return {
            "log_likelihood": {
                name: {split: _json(found) for split, found in by_split.items()}
                for name, by_split in self.likelihoods.items()
            },
            "kde_bandwidth": self.bandwidth,
            "calibration": {
                "rows": len(self.transforms),
                "distance": [
                    {"of": name, "value": calibration.distance(u)}
                    for name, u in zip(names, self.transforms.T, strict=True)
                ],
            },
        }


def evaluate(density: TableDensity, prepared: Prepared, seed: int) -> Evaluation:
    """Log-likelihoods of all splits in the table's own units, and calibration on the test split.

    The normal distribution and the kernel density estimate are those of unbounded columns, so that bounds help them, too.
    """
    parts, logdets = {}, {}
    for split in prepared.splits:
        values, given = prepared.rows(split)
        z, logdets[split] = encoded(density.columns, values)
        parts[split] = z, encoded(density.context, np.empty((len(z), 0)) if given is None else given)[0]
    gaussian = Gaussian(*parts["train"])
    centres = [part[:CENTRES] for part in parts["train"]]  # the splits are in random order
    kde = KernelDensity(centres[0], centres[1], _first(parts["validation"], 1000))
    found: dict[str, dict[str, Likelihood]] = {"flow": {}, "gaussian": {}, "kde": {}}
    for split, part in parts.items():
        logdet, few = logdets[split], logdets[split][:SCORED]
        found["flow"][split] = Likelihood.of(density.log_prob(*prepared.rows(split)))
        found["gaussian"][split] = Likelihood.of(gaussian.log_prob(*part) + logdet)
        kernels = kde.leave_one_out() if split == "train" else kde.log_prob(*_first(part, SCORED))
        found["kde"][split] = Likelihood.of(kernels + (logdet[:CENTRES] if split == "train" else few))
    transforms = calibration.pit(density, *prepared.rows("test"), seed)
    shift = {split: float(logdet.mean()) for split, logdet in logdets.items()}
    return Evaluation(found, kde.factor_of_silverman, transforms, shift)


def _json(found: Likelihood) -> dict[str, Any]:
    return {**asdict(found), **({"mean": None, "error": None} if found.lost else {})}


def _first(part: tuple[np.ndarray, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    return part[0][:n], part[1][:n]
