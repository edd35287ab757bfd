"""Baselines of a density: a normal distribution and a kernel density estimate, fitted to the same rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["Gaussian", "KernelDensity"]


class _Whitened:
    """Rows (context, values) as L⁻¹(row − mean) for their covariance L Lᵀ: the first C numbers depend on the context alone."""

    def __init__(self, z: np.ndarray, context: np.ndarray) -> None:
        rows = self._rows(z, context)
        self.n, self.given = len(rows), context.shape[1]
        self.mean = rows.mean(0)
        covariance = torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
        # Columns that determine each other have a covariance without inverse.
        self.factor = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(len(covariance)))
        self.log_volume = float(self.factor.diagonal()[self.given :].log().sum())

    def _rows(self, z: np.ndarray, context: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([context, z], 1)).double()

    def _white(self, z: np.ndarray, context: np.ndarray) -> Tensor:
        rows = self._rows(z, context) - self.mean
        return torch.linalg.solve_triangular(self.factor, rows.T, upper=False).T.contiguous()


class Gaussian(_Whitened):
    """The normal distribution of mean and full covariance of z (N, D) and context (N, C), conditioned on the context."""

    def log_prob(self, z: np.ndarray, context: np.ndarray) -> np.ndarray:
        """log p(z | context), (M,) in nats."""
        own = self._white(z, context)[:, self.given :]
        return (-0.5 * (own.square() + math.log(2 * math.pi)).sum(1) - self.log_volume).numpy()


class KernelDensity(_Whitened):
    """A Gaussian kernel density estimate of whitened rows: p(z | context) = p(z, context) / p(context).

    The bandwidth is Silverman's, times that of eight factors which gives validation rows the highest likelihood.

    Args:
        z, context: (N, D), (N, C), rows to estimate from.    validation: others, to choose the bandwidth by.
    """

    FACTORS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4)
    CHUNK = 256

    def __init__(self, z: np.ndarray, context: np.ndarray, validation: tuple[np.ndarray, np.ndarray]) -> None:
        super().__init__(z, context)
        self.centres = self._white(z, context)
        dim = self.centres.shape[1]
        self.silverman = (self.n * (dim + 2) / 4) ** (-1 / (dim + 4))
        likelihoods = self._log_probs(self._white(*validation), [self.silverman * factor for factor in self.FACTORS])
        self.factor_of_silverman = self.FACTORS[int(likelihoods.mean(1).argmax())]

    def log_prob(self, z: np.ndarray, context: np.ndarray) -> np.ndarray:
        """log p(z | context), (M,) in nats."""
        return self._log_probs(self._white(z, context), [self.silverman * self.factor_of_silverman])[0].numpy()

    def leave_one_out(self) -> np.ndarray:
        """log p (N,) of each of its own rows without this row."""
        return self._log_probs(self.centres, [self.silverman * self.factor_of_silverman], own=True)[0].numpy()

    def _log_probs(self, white: Tensor, widths: list[float], own: bool = False) -> Tensor:
        found, c = [], self.given
        for start in range(0, len(white), self.CHUNK):
            rows = white[start : start + self.CHUNK]
            squares = [torch.cdist(rows, self.centres).square()]
            squares += [torch.cdist(rows[:, :c], self.centres[:, :c]).square()] if c else []
            if own:
                index = torch.arange(len(rows))
                for square in squares:
                    square[index, index + start] = math.inf
            dim, n = rows.shape[1] - c, self.n - own
            found.append(
                torch.stack(
                    [
                        torch.logsumexp(-squares[0] / (2 * h * h), 1)
                        - (torch.logsumexp(-squares[1] / (2 * h * h), 1) if c else math.log(n))
                        - dim * math.log(h * math.sqrt(2 * math.pi))
                        for h in widths
                    ]
                )
            )
        return torch.cat(found, 1) - self.log_volume
