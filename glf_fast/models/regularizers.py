"""Regularisers of the decoders of deterministic autoencoders (arXiv:1903.12436)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glf_fast.models.whole_batch import noise_like

__all__ = ["decode_with_penalty", "squared_weights"]


def squared_weights(decoder: nn.Module) -> Tensor:
    """‖θ_D‖², a scalar, over the weights of convolutions and dense layers."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    weights = [layer.weight for layer in decoder.modules() if isinstance(layer, layers)]
    return torch.stack([weight.square().sum() for weight in weights]).sum()


# torch.compile cannot differentiate what it has compiled a second time.
@torch._disable_dynamo
def decode_with_penalty(
    decode: Callable[[Tensor], Tensor], z: Tensor, generator: torch.Generator | None, form: str
) -> tuple[Tensor, Tensor]:
    """D(z) (B, …) of codes z (B, D), and the gradient penalty, a scalar with a graph of its own.

    Args:
        form: "jacobian" estimates ‖∂D(z)/∂z‖² as ‖∇_z Σ v·D(z)‖² with v ~ N(0, I); "released" is ‖∇_z Σ D(z)²‖².
        generator: source of v, on z's device; the global one if None.
    """
    with torch.enable_grad():
        z = z if z.requires_grad else z.requires_grad_()
        x_hat = decode(z)
        weights = x_hat if form == "released" else noise_like(x_hat, generator)
        [gradient] = torch.autograd.grad((weights * x_hat).sum(), z, create_graph=True)
        return x_hat, gradient.square().sum(1).mean()
