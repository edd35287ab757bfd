"""normflows: couplings of blocks, ActNorm and permutations, without a context; couplings of splines, with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import FlowCase, ImageCase
from bench.libraries.density import Density, Library, NetOfBoth, mlp

__all__ = ["NORMFLOWS"]


def _density(layers: Iterable[nn.Module], shape: int | Sequence[int]) -> Density:
    import normflows as nf

    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(shape, trainable=False), [*layers])
    return Density(model, lambda x, _: model.log_prob(x), lambda n, _: model.sample(n)[0])


def _flow(case: FlowCase, device: str) -> Density:
    """ActNorm, coupling, and a fixed shuffle where we have a learned matrix."""
    import normflows as nf

    if case.bins:
        return _splines(case)
    passive, transformed = case.dim - case.dim // 2, case.dim // 2
    flows: list[nn.Module] = []
    for _ in range(case.steps):
        net = nf.nets.MLP([passive, *case.hidden, 2 * transformed], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(case.dim, mode="shuffle")]
        flows += [nf.flows.ActNorm(case.dim)]
    return _density(flows, case.dim)


class _Coupling(nn.Module):
    """A coupling as normflows' CoupledRationalQuadraticSpline holds it: from data to noise is forward."""

    def __init__(self, coupling: nn.Module) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.coupling.inverse(z, context)  # type: ignore[operator]

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.coupling(x, context)


def _splines(case: FlowCase) -> Density:
    """Coupling and a fixed shuffle: its ActNorm takes no context.

    The coupling inside CoupledRationalQuadraticSpline, with our MLP in place of the residual network, which would make another
    size, and without splines of the passive half.
    """
    import normflows as nf
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    def net(n_in: int, n_out: int) -> nn.Module:
        return NetOfBoth(mlp((n_in + case.context_dim, *case.hidden, n_out), zero_last=True), case.hidden[-1])

    mask = torch.arange(case.dim) >= case.dim - case.dim // 2
    flows: list[nn.Module] = []
    for _ in range(case.steps):
        coupling = PiecewiseRationalQuadraticCoupling(mask, net, num_bins=case.bins, tails="linear", tail_bound=5.0)
        flows += [_Coupling(coupling), nf.flows.Permute(case.dim, mode="shuffle")]
    model = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(case.dim, trainable=False), flows)
    return Density(model, model.log_prob, lambda n, context: model.sample(n, context)[0])


def _of(layers: Callable[[FlowCase, int], Iterable[nn.Module]], case: FlowCase) -> Density:
    return _density((layer for k in range(case.steps) for layer in layers(case, k)), case.dim)


def _masked(case: FlowCase, k: int) -> list[nn.Module]:
    from normflows.flows import MaskedAffineFlow

    mask = (torch.arange(case.dim) + k) % 2.0
    return [MaskedAffineFlow(mask, *(mlp((case.dim, *case.hidden, case.dim)) for _ in range(2)))]


def _block(case: FlowCase, k: int, mix: str = "Permute", **options: Any) -> list[nn.Module]:
    from normflows import flows

    transformed = case.dim // 2
    outputs = 2 * transformed if options.get("scale", True) else transformed
    coupling = flows.AffineCouplingBlock(mlp((case.dim - transformed, *case.hidden, outputs)), **options)
    return [coupling, flows.Permute(case.dim, "swap") if mix == "Permute" else flows.LULinearPermute(case.dim)]


def _images(case: ImageCase) -> Density:
    import normflows as nf

    return _density((nf.flows.GlowBlock(case.shape[0], case.width) for _ in range(case.steps)), case.shape)


NORMFLOWS = Library(
    "normflows",
    _flow,
    {
        "AffineCouplingBlock, Permute": partial(_of, _block),
        "AffineCouplingBlock, LULinearPermute": partial(_of, partial(_block, mix="LU")),
        "AffineCouplingBlock, additive": partial(_of, partial(_block, scale=False)),
        "MaskedAffineFlow, two networks": partial(_of, _masked),
    },
    {"GlowBlock": _images},
    refuses=lambda case: (
        "normflows' AffineCouplingBlock takes no context" if case.context_dim and not case.bins else ""
    ),
)
