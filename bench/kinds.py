"""The kinds of layers in docs/drop-in.md's table, each as a flow of its library at the size of a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import Provider, mlp
from bench.cases import FlowCase

__all__ = ["KINDS"]


def _of_normflows(layers: Callable[[FlowCase, int], Iterable[nn.Module]], case: FlowCase) -> Provider:
    import normflows as nf

    flows = [layer for k in range(case.steps) for layer in layers(case, k)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(case.dim, trainable=False), flows)
    return Provider("normflows", flow, lambda x, _: flow.log_prob(x), lambda n, _: flow.sample(n)[0], "cpu")


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


def _of_nflows(kind: str, mask: Callable[[FlowCase, int], Tensor], case: FlowCase) -> Provider:
    from nflows import distributions, flows, transforms

    class Net(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.layers = mlp((n_in, *case.hidden, n_out))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.layers(x)

    layers = [getattr(transforms, kind)(mask(case, k), Net) for k in range(case.steps)]
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([case.dim]))
    return Provider("nflows", flow, lambda x, _: flow.log_prob(x), lambda n, _: flow.sample(n), "cpu")


def _alternating(case: FlowCase, k: int) -> Tensor:
    return (torch.arange(case.dim) + k) % 2


def _random(case: FlowCase, k: int) -> Tensor:
    return torch.randperm(case.dim) < case.dim // 2


def _of_zuko(name: str, case: FlowCase) -> Provider:
    import zuko

    flow = getattr(zuko.flows, name)(case.dim, transforms=case.steps, hidden_features=case.hidden)
    return Provider("zuko", flow, lambda x, _: flow().log_prob(x), lambda n, _: flow().sample((n,)), "cpu")


def _of_freia(name: str, case: FlowCase, couplings: int = 2, **options: Any) -> Provider:
    """Of as many blocks of `couplings` couplings as make the case's steps."""
    import FrEIA.framework
    import FrEIA.modules

    inn = FrEIA.framework.SequenceINN(case.dim)
    for _ in range(case.steps // couplings):
        net = lambda n_in, n_out: mlp((n_in, *case.hidden, n_out))  # noqa: E731
        inn.append(getattr(FrEIA.modules, name), subnet_constructor=net, **options)

    def log_prob(x: Tensor, _: Tensor | None) -> Tensor:
        z, logdet = inn(x)
        return logdet - 0.5 * (z.square().sum(1) + case.dim * math.log(2 * math.pi))

    return Provider("FrEIA", inn, log_prob, lambda n, _: inn(torch.randn(n, case.dim), rev=True)[0], "cpu")


KINDS: dict[str, Callable[[FlowCase], Provider]] = {
    "normflows AffineCouplingBlock, Permute": partial(_of_normflows, _block),
    "normflows AffineCouplingBlock, LULinearPermute": partial(_of_normflows, partial(_block, mix="LU")),
    "normflows AffineCouplingBlock, additive": partial(_of_normflows, partial(_block, scale=False)),
    "normflows MaskedAffineFlow, two networks": partial(_of_normflows, _masked),
    "nflows AffineCouplingTransform, alternating": partial(_of_nflows, "AffineCouplingTransform", _alternating),
    "nflows AffineCouplingTransform, random masks": partial(_of_nflows, "AffineCouplingTransform", _random),
    "nflows AdditiveCouplingTransform": partial(_of_nflows, "AdditiveCouplingTransform", _alternating),
    "zuko RealNVP": partial(_of_zuko, "RealNVP"),
    "zuko NICE": partial(_of_zuko, "NICE"),
    "FrEIA GLOWCouplingBlock": partial(_of_freia, "GLOWCouplingBlock"),
    "FrEIA RNVPCouplingBlock": partial(_of_freia, "RNVPCouplingBlock"),
    "FrEIA NICECouplingBlock": partial(_of_freia, "NICECouplingBlock"),
    "FrEIA AllInOneBlock, soft permutation": partial(_of_freia, "AllInOneBlock", couplings=1, permute_soft=True),
}
