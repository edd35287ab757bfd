"""nflows: couplings over masks, ActNorm, and linear layers of LU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.cases import FlowCase, ImageCase
from bench.libraries.density import Density, Library, NetOfBoth, convolutions, mlp

__all__ = ["NFLOWS"]


def _density(layers: Iterable[nn.Module], shape: Sequence[int]) -> Density:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    flow = Flow(CompositeTransform(layers), StandardNormal(shape))

    def sample(n: int, context: Tensor | None) -> Tensor:
        # With a context, one sample for each of its rows: (n, 1, D).
        return flow.sample(n) if context is None else flow.sample(1, context)[:, 0]

    return Density(flow, lambda x, c: flow.log_prob(x, context=c), sample)


def _flow(case: FlowCase, device: str) -> Density:
    """ActNorm, LULinear and coupling: all that we do."""
    from nflows import transforms

    def net(n_in: int, n_out: int) -> nn.Module:
        return NetOfBoth(mlp((n_in + case.context_dim, *case.hidden, n_out), zero_last=True), case.hidden[-1])

    mask = torch.zeros(case.dim)
    mask[case.dim - case.dim // 2 :] = 1
    coupling = (
        partial(
            transforms.PiecewiseRationalQuadraticCouplingTransform, num_bins=case.bins, tails="linear", tail_bound=5.0
        )
        if case.bins
        else transforms.AffineCouplingTransform
    )
    layers: list[nn.Module] = []
    for _ in range(case.steps):
        linear = transforms.LULinear(case.dim, identity_init=True)
        layers += [transforms.ActNorm(case.dim), linear, coupling(mask, net)]
    return _density(layers, [case.dim])


def _of(kind: str, mask: Callable[[FlowCase, int], Tensor], case: FlowCase) -> Density:
    from nflows import transforms

    net = lambda n_in, n_out: NetOfBoth(mlp((n_in, *case.hidden, n_out)), case.hidden[-1])  # noqa: E731
    return _density([getattr(transforms, kind)(mask(case, k), net) for k in range(case.steps)], [case.dim])


def _alternating(case: FlowCase, k: int) -> Tensor:
    return (torch.arange(case.dim) + k) % 2


def _random(case: FlowCase, k: int) -> Tensor:
    return torch.randperm(case.dim) < case.dim // 2


def _images(case: ImageCase) -> Density:
    from nflows import transforms

    C = case.shape[0]
    net = lambda n_in, n_out: NetOfBoth(convolutions(n_in, n_out, case.width), case.width)  # noqa: E731
    layers: list[nn.Module] = []
    for k in range(case.steps):
        layers += [transforms.ActNorm(C), transforms.OneByOneConvolution(C)]
        layers += [transforms.AffineCouplingTransform((torch.arange(C) + k) % 2, net)]
    return _density(layers, case.shape)


NFLOWS = Library(
    "nflows",
    _flow,
    {
        "AffineCouplingTransform, alternating": partial(_of, "AffineCouplingTransform", _alternating),
        "AffineCouplingTransform, random masks": partial(_of, "AffineCouplingTransform", _random),
        "AdditiveCouplingTransform": partial(_of, "AdditiveCouplingTransform", _alternating),
    },
    {"ActNorm, OneByOneConvolution, AffineCouplingTransform": _images},
)
