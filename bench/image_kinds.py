"""Glow's step on images (ActNorm, 1 × 1 convolution, coupling with a convolutional network) in each library that has it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.baselines import Provider
from bench.cases import ImageCase

__all__ = ["IMAGE_KINDS"]


def _network(n_in: int, n_out: int, width: int) -> nn.Sequential:
    """Glow's: 3 × 3, 1 × 1 and 3 × 3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(n_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, n_out, 3, padding=1),
    )


def _normflows(case: ImageCase) -> Provider:
    import normflows as nf

    flows = [nf.flows.GlowBlock(case.shape[0], case.width) for _ in range(case.steps)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(case.shape, trainable=False), flows)
    return Provider("normflows", flow, lambda x, _: flow.log_prob(x), lambda n, _: flow.sample(n)[0], "cpu")


def _nflows(case: ImageCase) -> Provider:
    from nflows import distributions, flows, transforms

    C = case.shape[0]

    class Net(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.layers = _network(n_in, n_out, case.width)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.layers(x)

    layers = [
        layer
        for k in range(case.steps)
        for layer in (
            transforms.ActNorm(C),
            transforms.OneByOneConvolution(C),
            transforms.AffineCouplingTransform((torch.arange(C) + k) % 2, Net),
        )
    ]
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal(case.shape))
    return Provider("nflows", flow, lambda x, _: flow.log_prob(x), lambda n, _: flow.sample(n), "cpu")


def _freia(case: ImageCase) -> Provider:
    """Its all-in-one block has a fixed rotation in place of the 1 × 1 convolution."""
    import FrEIA.framework
    import FrEIA.modules

    inn = FrEIA.framework.SequenceINN(*case.shape)
    for _ in range(case.steps):
        net = lambda n_in, n_out: _network(n_in, n_out, case.width)  # noqa: E731
        inn.append(FrEIA.modules.AllInOneBlock, subnet_constructor=net, permute_soft=True)

    def log_prob(x: Tensor, _: Tensor | None) -> Tensor:
        z, logdet = inn(x)
        return logdet - 0.5 * (z.square().flatten(1).sum(1) + math.prod(case.shape) * math.log(2 * math.pi))

    return Provider("FrEIA", inn, log_prob, lambda n, _: inn(torch.randn(n, *case.shape), rev=True)[0], "cpu")


IMAGE_KINDS: dict[str, Callable[[ImageCase], Provider]] = {
    "normflows GlowBlock": _normflows,
    "nflows ActNorm, OneByOneConvolution, AffineCouplingTransform": _nflows,
    "FrEIA AllInOneBlock, soft permutation": _freia,
}
