"""The independent critic: a Wasserstein distance of images from held-out images, by a network trained for the purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast import seeds
from glf_fast.errors import UserError
from glf_fast.images import to_float
from glf_fast.metrics.estimates import Estimate, TooFew

__all__ = ["BATCH", "STEPS", "critic_distance"]

# A minute for three critics on two cores of a processor for images of 28 or 32 pixels.
STEPS, BATCH = 300, 64
PENALTY = 10.0
_CHUNK = 500


def critic_distance(images: Tensor, held_out: Tensor, *, seed: int = 0, steps: int = STEPS) -> Estimate:
    """An estimate of the Wasserstein-1 distance of uint8 images (N, C, H, W) from uint8 images that no model was trained on.

    E D(x) − E D(x̂) on the second halves of both sets, x held out, by a critic D that is trained on the first halves to make it
    large, with the gradient penalty 10·E(‖∇D‖ − 1)² between pairs (Gulrajani et al., arXiv:1704.00028, equation 3). A fresh
    critic on held-out images sees what the critic of a training run does not: samples that are copies of training images, or
    that only this critic takes for real (Danihelka et al., arXiv:1705.05263; Rosca et al., arXiv:1706.04987, section 5).

    The distance has a meaning only between two others: that of real training images (the floor), and that of noise. Pixels are
    in [0, 1]. It is a lower bound by a small network and few steps, so it may be compared only with distances by the same
    network, steps, number and size of images; it may be below zero. The interval is ± 1.96 standard errors over the images of
    the second halves, for this critic.

    Args:
        seed: seed of the critic's weights and batches.
        steps: training steps of 64 images of either set.

    Raises:
        UserError: images of different shapes.
        TooFew: fewer than four images in a set.
    """
    if images.shape[1:] != held_out.shape[1:]:
        raise UserError(
            f"the critic needs images of one shape; got {tuple(images.shape[1:])} and {tuple(held_out.shape[1:])}"
        )
    if min(len(images), len(held_out)) < 4:
        raise TooFew(f"the critic needs at least four images of either set; got {len(images)} and {len(held_out)}")
    device = held_out.device
    (fake, fake_rest), (real, real_rest) = ((x.to(device)[0::2], x.to(device)[1::2]) for x in (images, held_out))
    critic = _critic(held_out.shape[1:], seed).to(device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    random = seeds.generator(seed, "critic")
    with torch.enable_grad():
        for _ in range(steps):
            x, y = (
                to_float(half[torch.randint(len(half), (BATCH,), generator=random).to(device)]) for half in (real, fake)
            )
            between = torch.rand(BATCH, 1, 1, 1, generator=random).to(device)
            z = torch.lerp(x, y, between).requires_grad_()
            values = critic(torch.cat([x, y, z]))[:, 0]
            [gradient] = torch.autograd.grad(values[2 * BATCH :].sum(), z, create_graph=True)
            penalty = PENALTY * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
            loss = values[BATCH : 2 * BATCH].mean() - values[:BATCH].mean() + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    a, b = _values(critic, real_rest), _values(critic, fake_rest)
    value = float(a.mean() - b.mean())
    error = 1.96 * float((a.var() / len(a) + b.var() / len(b)).sqrt()) if min(len(a), len(b)) > 1 else None
    return Estimate(value, None if error is None else (value - error, value + error))


def _critic(shape: tuple[int, ...] | torch.Size, seed: int) -> nn.Module:
    """Three convolutions that halve the image, one that keeps it, a linear layer; no batch norm, as the penalty needs."""
    layers: list[nn.Module] = []
    channels, height, width = shape
    for i, width_out in enumerate((16, 32, 32, 32)):
        stride = 2 if i < 3 else 1
        layers += [nn.Conv2d(channels, width_out, 3, stride, padding=1), nn.LeakyReLU(0.2)]
        channels, height, width = width_out, -(-height // stride), -(-width // stride)
    critic = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, 1))
    random = seeds.generator(seed, "critic weights")
    with torch.no_grad():
        for module in critic.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                scale = (2 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(scale * torch.randn(module.weight.shape, generator=random))
                assert module.bias is not None
                module.bias.zero_()
    return critic


@torch.no_grad()
def _values(critic: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([critic(to_float(part))[:, 0] for part in images.split(_CHUNK)]).double()
