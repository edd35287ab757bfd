"""Flows for pocoMC (https://pocomc.readthedocs.io), which it needs: `accelerate(pocomc.Sampler(…))`."""

from __future__ import annotations

import math
import sys

import pocomc
import torch
from pocomc.flow import Flow as PocoFlow
from pocomc.tools import torch_double_to_float
from torch import Tensor, nn

from glf_fast.fitting import fit
from glf_fast.integrations.whole_zuko import batch_size_of, coupling_flow, integer, stacked, whole

__all__ = ["FusedFlow", "accelerate", "coupling_flow"]


def accelerate(sampler: pocomc.Sampler) -> pocomc.Sampler:
    """Put a `FusedFlow` in place of the flow of a sampler, and return the sampler. Nothing else of it changes.

    Args:
        sampler: the sampler, before or after `run`, with `flow="nsf6"` (pocoMC's default), another of its names, a flow of
            zuko, or a `coupling_flow`.

    Raises:
        TypeError: not a sampler of pocoMC.
        ConversionError: a flow that cannot be replaced as a whole, with the reason.
    """
    if not isinstance(sampler, pocomc.Sampler):
        raise TypeError(f"sampler must be a pocomc.Sampler; got {type(sampler).__name__}")
    if not isinstance(sampler.flow, FusedFlow):
        sampler.flow = FusedFlow(sampler.n_dim, sampler.flow.flow)
    return sampler


class FusedFlow(PocoFlow):
    """pocoMC's `Flow`, the same flow with the same weights, as one flow of glf_fast, whose training runs in C++.

    Args:
        n_dim: number of dimensions.
        flow: name of a flow of pocoMC, or a flow of zuko, which is changed in place.
    """

    def __init__(self, n_dim: int, flow: str | nn.Module = "nsf3") -> None:
        super().__init__(n_dim, flow)
        self._whole = whole(self.flow)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise u (B, D) of x (B, D), and log|det ∂u/∂x| (B,)."""
        return self._whole(torch_double_to_float(x))

    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) of noise u (B, D), and log|det ∂x/∂u| (B,)."""
        return self._whole.inverse(torch_double_to_float(u))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,)."""
        return self._whole.log_prob(torch_double_to_float(x))

    def sample(self, size: int = 1) -> tuple[Tensor, Tensor]:
        """Samples (size, D), and log p of each (size,), in one pass."""
        return self._whole.distribution().rsample_and_log_prob((size,))

    def fit(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        validation_split: float = 0.0,
        epochs: int = 1000,
        batch_size: int = 1000,
        patience: int = 20,
        learning_rate: float = 1e-3,
        weight_decay: float = 0,
        laplace_scale: float | None = None,
        gaussian_scale: float | None = None,
        annealing: bool = True,
        noise: float | None = None,
        shuffle: bool = True,
        clip_grad_norm: float = 1.0,
        verbose: int = 0,
    ) -> dict[str, list[float]]:
        """Fit the flow to samples x (N, D) by maximum likelihood, as pocoMC's `Flow.fit`, with the arguments of that.

        With the settings of pocoMC's sampler the steps run in C++. The batches of an epoch are then of one size, at most
        `batch_size`, weights are scaled over all rows, not in each batch, and the flow always ends with its best weights.
        `annealing`, `noise`, `laplace_scale`, `gaussian_scale`, no shuffling, or training without validation leave the loop to
        pocoMC.

        Raises:
            ValueError: arguments out of their ranges, NaN or infinity in the samples.
            FloatingPointError: the loss is not finite; the flow is as it was before that step.
        """
        by_pocomc = (
            annealing or noise is not None or not shuffle or laplace_scale is not None or gaussian_scale is not None
        )
        if by_pocomc or not 0 < validation_split < 1:
            return super().fit(
                x, weights, validation_split, epochs, batch_size, patience, learning_rate, weight_decay, laplace_scale,
                gaussian_scale, annealing, noise, shuffle, clip_grad_norm, verbose,
            )  # fmt: skip
        x = torch_double_to_float(x)
        # pocoMC's `validation_split` is the share that is trained on.
        validation = 1 - validation_split
        rows = len(x) - max(1, round(validation * len(x)))
        batch_size = batch_size_of(rows, batch_size)
        # pocoMC's losses are sums, or with weights 1000 times the mean; to the mean belong gradients as much shorter.
        factor = batch_size if weights is None else 1000.0
        result = fit(
            stacked(self._whole), x, epochs=integer(epochs), batch_size=batch_size, lr=learning_rate, weight_decay=weight_decay,
            clip=None if clip_grad_norm == math.inf else clip_grad_norm / factor,
            weights=None if weights is None else torch_double_to_float(weights),
            validation=validation, patience=max(1, int(1.5 * patience)), seed=int(torch.randint(2**31, ())), progress=False,
        )  # fmt: skip
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        if verbose:
            best = min(result.validation_loss)
            print(f"{len(result.training_loss)} epochs, best loss {best:.2f} in {result.best_epoch}", file=sys.stderr)
        return {"loss": result.training_loss, "val_loss": result.validation_loss}
