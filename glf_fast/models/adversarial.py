"""Losses of adversarial models, and the base class of those that have no encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from glf_fast.models.autoencoder import check_image_shape
from glf_fast.models.dcgan_networks import DCGANEncoder, InfoGANDiscriminator, Norm
from glf_fast.models.latent import DecoderModel, LatentSettings, decoder
from glf_fast.models.whole_batch import noise_like

__all__ = [
    "ADVICE",
    "GAN",
    "AdversarialSettings",
    "accuracy",
    "critic_losses",
    "discrimination",
    "discriminator",
    "frozen",
    "gradient_penalty",
    "prior",
]

# `Words.advice` of models with a discriminator.
ADVICE = (
    "a discriminator has won where its accuracy is near 1 and gradient norms grow: lower its learning rate first "
    "(--discriminator-optimizer.lr)"
)


@dataclass(frozen=True)
class AdversarialSettings(LatentSettings):
    """A model with a discriminator of images."""

    latent_dim: int = 64
    """Length of a code, the dimension of the latent space."""
    networks: Literal["dcgan", "infogan"] = "dcgan"
    """Generator, encoder and discriminator. dcgan: convolutions alone, down to at least 4 × 4 pixels; infogan: two convolutions
    and a dense layer."""


def discriminator(shape: Sequence[int], settings: LatentSettings, norm: Norm = "batch") -> nn.Module:
    """The discriminator of images of these settings: images (B, C, H, W) in [0, 1] → logits (B, 1)."""
    if settings.networks == "dcgan":
        return DCGANEncoder(shape, 1, settings.width, norm)
    return InfoGANDiscriminator(shape, settings.width, settings.hidden, norm)


# -- losses ---------------------------------------------------------------------------------------------------------------


def discrimination(real: Tensor, *fakes: Tensor) -> Tensor:
    """−E log D(x) − Σ E log(1 − D(y)), a scalar, from the logits of x and of each kind of y; D is the sigmoid of a logit."""
    return softplus(-real).mean() + torch.stack([softplus(fake).mean() for fake in fakes]).sum()


def accuracy(real: Tensor, *fakes: Tensor) -> Tensor:
    """The share of logits that have the right sign, real and fake items weighted equally: 1 if the discriminator has won."""
    with torch.no_grad():
        wrong = torch.stack([(fake > 0).to(fake.dtype).mean() for fake in fakes]).mean()
        return 0.5 * ((real > 0).to(real.dtype).mean() + 1 - wrong)


def critic_losses(
    critic: nn.Module, x: Tensor, fakes: Sequence[Tensor], weight: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The loss of WGAN-GP (Gulrajani et al., arXiv:1704.00028, algorithm 1), summed over kinds of fakes y.

        E f(y) − E f(x) + λ·E (‖∇f(x̃)‖ − 1)²,        x̃ = ε·x + (1 − ε)·y,  ε ~ U(0, 1)

    Args:
        critic: f, images → (B, 1).    x: images (B, C, H, W).    fakes: a batch of B images of each kind.
        weight: λ.    generator: source of ε.

    Returns:
        distance: E f(x) − E f(y), the estimate of the Wasserstein distance, and penalty: E (‖∇f‖ − 1)², both as means over
        the kinds; discriminator_loss: the sum.
    """
    real = critic(x).mean()
    distances = torch.stack([real - critic(y).mean() for y in fakes])
    penalties = torch.stack([gradient_penalty(critic, x, y, generator) for y in fakes])
    return {
        "discriminator_loss": (weight * penalties - distances).sum(),
        "distance": distances.detach().mean(),
        "penalty": penalties.detach().mean(),
    }


# torch.compile cannot differentiate what it has compiled a second time.
@torch._disable_dynamo
def gradient_penalty(critic: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """E (‖∇f(x̃)‖ − 1)² at x̃ = ε·x + (1 − ε)·y with ε ~ U(0, 1) for each pair of images, a scalar with a graph."""
    epsilon = noise_like(x[:, :1, :1, :1], generator, torch.rand)
    with torch.enable_grad():
        between = torch.lerp(y.detach(), x, epsilon).requires_grad_()
        [gradient] = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def frozen(network: nn.Module, x: Tensor) -> Tensor:
    """network(x) with gradients for x, but none for the network's parameters, which another phase trains."""
    return functional_call(network, {name: value.detach() for name, value in network.named_parameters()}, (x,))


def prior(x: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
    """Codes z ~ N(0, I), (B, dim), as many as there are images x (B, …)."""
    return noise_like(x.new_empty(x.shape[0], dim), generator)


# -- models without an encoder --------------------------------------------------------------------------------------------


class GAN(DecoderModel):
    """A generator G of images from codes z ~ N(0, I), and a discriminator D, which a subclass trains by its phases.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: of the networks.
        norm: normalisation of the discriminator.
    """

    groups: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    settings: AdversarialSettings

    def __init__(self, shape: Sequence[int], settings: AdversarialSettings, norm: Norm = "batch") -> None:
        super().__init__(check_image_shape(shape), settings)
        self.decoder = decoder(shape, settings)
        self.discriminator = discriminator(shape, settings, norm)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"generator": G, "discriminator": D}."""
        return {
            "generator": list(self.decoder.parameters()),
            "discriminator": list(self.discriminator.parameters()),
        }

    def generated(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images G(z), z ~ N(0, I), as many as there are images x (B, C, H, W)."""
        return self.decoder(prior(x, self.settings.latent_dim, generator))
