"""Densities that are fitted to the codes of a trained autoencoder: ex-post density estimation (arXiv:1903.12436)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.fitting import fit
from glf_fast.flow import CouplingFlow
from glf_fast.models.mixture import fit_mixture, least_variance, log_densities
from glf_fast.settings import POSITIVE, Rule, Settings

__all__ = ["Density", "DensitySettings", "FlowDensity", "Mixture"]


@dataclass(frozen=True)
class DensitySettings(Settings):
    """The density that is fitted to the codes when the autoencoder has been trained."""

    kind: Literal["none", "gaussian", "mixture", "flow"] = "none"
    """Kind of density. none: codes are drawn from N(0, I); gaussian: a normal distribution with full covariance; mixture: of
    normal distributions with full covariances; flow: a coupling flow."""
    components: int = 10
    """For kind mixture: number of normal distributions."""
    steps: int = 8
    """For kind flow: steps of the flow."""
    hidden: tuple[int, ...] = (128, 128)
    """For kind flow: widths of the hidden layers in the couplings' networks."""
    epochs: int = 20
    """For kind flow: passes over the codes."""

    CHOICE: ClassVar[str] = "kind"
    RULES: ClassVar[Mapping[str, Rule]] = {
        "components": POSITIVE,
        "steps": POSITIVE,
        "hidden": (lambda value: len(value) <= 8 and all(n > 0 for n in value), "zero to eight positive widths"),
        "epochs": POSITIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this kind, by name."""
        own = {"mixture": ("components",), "flow": ("steps", "hidden", "epochs")}.get(self.kind, ())
        return {name: value for name, value in vars(self).items() if name in ("kind", *own)}

    def build(self, dim: int) -> Density | None:
        """The density of codes of length `dim`, N(0, I) until it is fitted; None for kind none."""
        if self.kind == "none":
            return None
        if self.kind == "flow":
            return FlowDensity(dim, self)
        return Mixture(dim, self.components if self.kind == "mixture" else 1)


class Density(nn.Module):
    """A density of codes (N, D) with a fit of its own; nothing in it has gradients."""

    def fit(self, codes: Tensor) -> None:
        """Fit to codes (N, D); the same codes give the same density."""
        raise NotImplementedError

    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n codes (n, D).

        Args:
            temperature: factor of the noise.    generator: source of the noise; the global one if None.
        """
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of codes z (N, D): (N,), in nats."""
        raise NotImplementedError


class Mixture(Density):
    """A mixture of normal distributions with full covariances; with one component a normal distribution.

    A temperature is the factor of each component's standard deviations, and does not change the components' weights.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("factors", torch.eye(dim).repeat(components, 1, 1))

    def fit(self, codes: Tensor) -> None:
        """Maximum likelihood by expectation maximisation, see `mixture.fit_mixture`."""
        count = len(self.weights)
        _say(f"fitting {f'a mixture of {count} normal distributions' if count > 1 else 'a normal distribution'}", codes)
        found = fit_mixture(codes, count)
        self.weights.copy_(found.weights)
        self.means.copy_(found.means)
        self.factors.copy_(found.factors)
        print(f"log-likelihood {found.log_likelihood:.3f} nats after {found.iterations} steps", file=sys.stderr)

    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n codes (n, D), see `Density.sample`."""
        if not n:
            return self.means[:0]
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(
            (n, self.means.shape[1]), generator=generator, device=self.means.device, dtype=self.means.dtype
        )
        return self.means[chosen] + temperature * (self.factors[chosen] @ noise[..., None])[..., 0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) (N,) of codes z (N, D), in nats."""
        return log_densities(z, self.weights, self.means, self.factors).logsumexp(1)


class FlowDensity(Density):
    """A coupling flow of codes that are whitened first, by the mean and the covariance of the codes it was fitted to.

    The fit adds noise to the codes, with a millionth of their variance. Without noise, a code that is constant or depends on
    others would have no density, and the flow's likelihood would grow without bound.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, dim: int, settings: DensitySettings) -> None:
        super().__init__()
        self.epochs = settings.epochs
        self.flow = CouplingFlow(dim, steps=settings.steps, hidden=settings.hidden, actnorm=False).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.eye(dim))

    def fit(self, codes: Tensor) -> None:
        """Maximum likelihood by `glf_fast.fit`; the weights with the least loss on a tenth of the codes are kept."""
        _say("fitting a flow", codes)
        _, [mean], [factor], *_ = fit_mixture(codes, 1)
        self.mean.copy_(mean)
        self.factor.copy_(factor)
        noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0), dtype=codes.dtype).to(codes.device)
        x = self._whitened(codes + least_variance(codes) ** 0.5 * noise)
        # A tenth is held out for validation, and a batch must fit into the rest.
        batch_size = min(256, len(x) - math.ceil(0.1 * len(x)))
        with torch.enable_grad():
            self.flow.requires_grad_(True)
            result = fit(self.flow, x, epochs=self.epochs, batch_size=batch_size, lr=2e-3, schedule="cosine", clip=10.0)
            self.flow.requires_grad_(False)
        if result.stopped == "interrupted":  # by Ctrl-C, which `fit` takes for the end of training
            raise KeyboardInterrupt

    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n codes (n, D), see `Density.sample`."""
        return self.mean + self.flow.sample(n, temperature=temperature, generator=generator) @ self.factor.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) (N,) of codes z (N, D), in nats."""
        return self.flow.log_prob(self._whitened(z)) - self.factor.diagonal().log().sum()

    def _whitened(self, z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, (z - self.mean).mT, upper=False).mT.contiguous()


def _say(what: str, codes: Tensor) -> None:
    print(f"{what} to {len(codes):,} codes of length {codes.shape[1]}", file=sys.stderr)
