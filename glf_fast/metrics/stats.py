"""FeatureStats: mean and covariance of features, streamed, merged, reduced over processes, saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glf_fast.errors import UserError
from glf_fast.files import save_tensors
from glf_fast.metrics.linalg import eigh

__all__ = ["FeatureStats"]

# The key of the metadata in a saved file. The checksum of the first format left the header out.
_FORMAT, _OLD = "glf_fast.FeatureStats 2", "glf_fast.FeatureStats 1"


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode() + bytes(tensors[key].flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _check_covariance(cov: Tensor) -> None:
    """Raise UserError unless the matrix is symmetric and has no eigenvalue below zero, to the rounding of float32."""
    largest = cov.abs().max().item()
    if (cov - cov.T).abs().max().item() > 1e-4 * largest:
        raise UserError("the covariance is not symmetric; compute it again from the images")
    lowest = torch.linalg.eigvalsh((cov + cov.T) / 2)[0].item()
    if lowest < -1e-4 * largest:
        raise UserError(f"the covariance has the negative eigenvalue {lowest:.3g}; compute it again from the images")


class FeatureStats:
    """Count n, mean (dim,) and centred second moment M2 = Σ (x−mean)(x−mean)ᵀ (dim, dim) of a stream of features, in float64.

    Batches and whole statistics are merged by Chan, Golub & LeVeque (1983), equation 2.1. Features are centred before they are
    squared, so features with a large mean lose no digits.

    Args:
        dim: length of one feature vector.
        keep: number of features to keep (the first ones, in float32). The exact distance of few samples, KID and the jackknife
            need them; they take 4·keep·dim bytes.
        extractor: identity of the extractor of the features, JSON-ready; statistics of different extractors cannot be merged.
        source: origin of the features for the protocol, JSON-ready; it is not compared.
        device: device of the moments; it must support float64.
    """

    def __init__(
        self,
        dim: int,
        *,
        keep: int = 0,
        extractor: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dim < 1 or keep < 0:
            raise ValueError(f"FeatureStats needs dim ≥ 1 and keep ≥ 0, got dim={dim}, keep={keep}")
        self.dim = dim
        self.keep = keep
        self.extractor = dict(extractor) if extractor is not None else None
        self.source = dict(source or {})
        self.n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._kept: list[Tensor] = []
        self._root: Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor, n: int, **options: Any) -> FeatureStats:
        """Statistics from a known mean (dim,), covariance (dim, dim) with divisor n−1, and count n ≥ 2.

        Raises:
            ValueError: other shapes or counts; NaN or infinite values; a matrix that is no covariance, because it is not
                symmetric or has negative eigenvalues, both beyond the rounding of float32.
        """
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or n < 2:
            raise ValueError(
                "from_moments needs a mean (d,), a covariance (d, d) and n ≥ 2, "
                f"got {tuple(mean.shape)}, {tuple(cov.shape)} and n={n}"
            )
        stats = cls(len(mean), device=mean.device, **options)
        stats.n = n
        stats._mean = mean.double()
        stats._m2 = cov.double() * (n - 1)
        stats._require_finite()
        _check_covariance(cov.double())
        return stats

    # -- moments --------------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Mean (dim,), float64. Raises UserError before the second feature, as `cov` does."""
        self._require_two()
        return self._mean

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (dim, dim), float64."""
        self._require_two()
        return self._m2 / (self.n - 1)

    @property
    def kept(self) -> Tensor:
        """The first `keep` features (≤ keep, dim), float32, in the order of their arrival; merged features are appended."""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0] if self._kept else self._mean.new_zeros((0, self.dim), dtype=torch.float32)

    @property
    def complete(self) -> bool:
        """Whether all features were kept."""
        return self.n == sum(map(len, self._kept))

    def factor(self) -> Tensor:
        """A matrix F (rows, dim) with FᵀF = cov: from the features when n ≤ dim and all are kept, else `root`."""
        if self.n <= self.dim and self.complete:
            return (self.kept.double() - self.mean) / (self.n - 1) ** 0.5
        return self.root()

    def root(self) -> Tensor:
        """R = diag(√w)·Vᵀ (dim, dim) of cov = V·diag(w)·Vᵀ, with negative w set to 0. Costs O(dim³) once; `save` stores R."""
        if self._root is None:
            w, v = eigh(self.cov)
            self._root = w.clamp(min=0).sqrt()[:, None] * v.T
        return self._root

    # -- updates --------------------------------------------------------------------------------------------------------

    def update(self, features: Tensor) -> None:
        """Add features (B, dim), B ≥ 0, of any floating dtype and device.

        Raises:
            ValueError: wrong shape (one-dimensional features included), not floating point, NaN or infinite values.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (batch, {self.dim}), got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        x = features.detach().to(self._mean.device, torch.float64)
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x)).any(1).nonzero()[0])
            raise UserError(
                f"features contain NaN or infinity (first in row {row} of this batch, after {self.n} finite features); "
                "check the images and the extractor's weights"
            )
        if len(x):
            mean = x.mean(0)
            centred = x - mean
            self._merge(len(x), mean, centred.T @ centred, features.detach().to(self._mean.device, torch.float32))

    def merge(self, other: FeatureStats) -> None:
        """Add the features of `other`. Raises UserError if the extractors or dimensions differ."""
        self.check_comparable(other)
        if other.n:
            move = self._mean.device
            self._merge(other.n, other._mean.to(move), other._m2.to(move), other.kept.to(move))
            if not other.complete:
                # Some features of `other` are missing, so features that come later must not be kept as "the first".
                self.keep = min(self.keep, len(self.kept))

    def without(self, part: FeatureStats) -> FeatureStats:
        """Statistics of the features without those of `part` (the inverse of merge); no features are kept."""
        n = self.n - part.n
        rest = FeatureStats(self.dim, extractor=self.extractor, source=self.source, device=self._mean.device)
        rest.n = n
        rest._mean = (self.n * self._mean - part.n * part._mean) / n
        shift = part._mean - rest._mean
        rest._m2 = self._m2 - part._m2 - (n * part.n / self.n) * torch.outer(shift, shift)
        return rest

    def _merge(self, n: int, mean: Tensor, m2: Tensor, kept: Tensor) -> None:
        total = self.n + n
        shift = mean - self._mean
        self._m2 = self._m2 + m2 + (self.n * n / total) * torch.outer(shift, shift)
        self._mean = self._mean + shift * (n / total)
        room = self.keep - sum(map(len, self._kept))
        if room > 0:
            self._kept.append(kept[:room].clone())
        self.n = total
        self._root = None

    def all_reduce(self) -> None:
        """Merge the statistics of all processes of `torch.distributed`, in the order of ranks; all end with the same numbers.

        This is a collective call that each rank must make. Without an initialised process group nothing happens. Kept features
        are gathered in the order of ranks; a rank may have none.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.n, self._mean.cpu(), self._m2.cpu(), self.kept.cpu(), self.extractor))
        total = FeatureStats(
            self.dim, keep=self.keep, extractor=self.extractor, source=self.source, device=self._mean.device
        )
        for n, mean, m2, kept, extractor in parts:
            other = FeatureStats(len(mean), extractor=extractor)
            other.n, other._mean, other._m2, other._kept = n, mean, m2, [kept]
            total.merge(other)
        self.__dict__.update(total.__dict__)

    # -- checks ---------------------------------------------------------------------------------------------------------

    def _require_two(self) -> None:
        if self.n < 2:
            raise UserError(f"a covariance needs at least two feature vectors, got {self.n}; give more images")

    def _require_finite(self) -> None:
        if not bool(self._mean.isfinite().all() and self._m2.isfinite().all()):
            raise UserError("the mean or the covariance contains NaN or infinity; compute them again from the images")

    def check_comparable(self, other: FeatureStats) -> None:
        """Raise UserError unless both have the same dimension and, where both name one, the same extractor."""
        if self.extractor is not None and other.extractor is not None and self.extractor != other.extractor:
            keys = sorted(self.extractor.keys() | other.extractor.keys())
            differing = [key for key in keys if self.extractor.get(key) != other.extractor.get(key)]
            pairs = ", ".join(
                f"{key} {self.extractor.get(key)!r} and {other.extractor.get(key)!r}" for key in differing
            )
            raise UserError(
                f"features of different extractors cannot be compared: {pairs}; compute both with the same extractor"
            )
        if self.dim != other.dim:
            raise UserError(
                f"features of different lengths cannot be compared: {self.dim} and {other.dim}; use one extractor"
            )

    # -- files ----------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write a safetensors file (moments, kept features, root if known; JSON metadata), atomically."""
        tensors = {"mean": self.mean, "m2": self._m2, "kept": self.kept}
        if self._root is not None:
            tensors["root"] = self._root
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        header: dict[str, Any] = {
            "n": self.n,
            "keep": self.keep,
            "extractor": self.extractor,
            "source": self.source,
        }
        header["sha256"] = _digest(header, tensors)
        # One key, because safetensors writes several in random order and the same statistics should be the same file.
        save_tensors(path, tensors, {_FORMAT: json.dumps(header)})

    @classmethod
    def load(cls, path: Path | str) -> FeatureStats:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: no file at `path`.
            UserError: the file is damaged, or does not hold feature statistics.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no statistics at {path}; compute them with: python -m glf_fast.metrics ref SOURCE --out {path}"
            )
        damaged = f"{path} is damaged or holds no feature statistics; delete it and compute it again with `ref`"
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if _OLD in metadata:
                raise UserError(
                    f"{path} was written by version 0.1.0, with an incomplete checksum; compute it again with `ref`"
                )
            header = json.loads(metadata[_FORMAT])
            if not isinstance(header, dict):
                raise ValueError(f"the header must be an object, got {header!r}")
            if header.pop("sha256") != _digest(header, tensors):
                raise UserError(f"{path} is damaged: its checksum differs; delete it and compute it again with `ref`")
            stats = cls(
                len(tensors["mean"]), keep=header["keep"], extractor=header["extractor"], source=header["source"]
            )
            stats.n = header["n"]
            stats._mean, stats._m2, stats._kept = tensors["mean"], tensors["m2"], [tensors["kept"]]
        except UserError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            raise UserError(damaged) from error
        stats._root = tensors.get("root")
        try:
            stats._require_finite()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return stats

    def __repr__(self) -> str:
        name = self.extractor.get("name") if self.extractor else None
        return f"FeatureStats(dim={self.dim}, n={self.n}, kept={sum(map(len, self._kept))}, extractor={name!r})"
