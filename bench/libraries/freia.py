"""FrEIA: invertible networks of coupling blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import FlowCase, ImageCase
from bench.libraries.density import Density, Library, convolutions, mlp, standard_normal

__all__ = ["FREIA"]


def _density(
    block: str,
    shape: Sequence[int],
    number: int,
    net: Callable[[int, int], nn.Module],
    device: str = "cpu",
    **options: Any,
) -> Density:
    """So many blocks."""
    import FrEIA.framework
    import FrEIA.modules

    inn = FrEIA.framework.SequenceINN(*shape)
    for _ in range(number):
        inn.append(getattr(FrEIA.modules, block), subnet_constructor=net, **options)

    def conditions(context: Tensor | None) -> list[Tensor] | None:
        return None if context is None else [context]

    def log_prob(x: Tensor, context: Tensor | None) -> Tensor:
        z, logdet = inn(x, c=conditions(context))
        return logdet + standard_normal(z)

    def sample(n: int, context: Tensor | None) -> Tensor:
        return inn(torch.randn(n, *shape, device=device), c=conditions(context), rev=True)[0]

    return Density(inn, log_prob, sample)


def _flow(case: FlowCase, device: str) -> Density:
    """AllInOneBlock: actnorm and coupling, with a fixed permutation where we have a learned matrix."""
    C = case.context_dim
    net = partial(_net, case, zero_last=True)
    condition = {"cond": 0, "cond_shape": (C,)} if C else {}
    return _density("AllInOneBlock", [case.dim], case.steps, net, device, **condition)


def _net(case: FlowCase, n_in: int, n_out: int, zero_last: bool = False) -> nn.Module:
    return mlp((n_in, *case.hidden, n_out), zero_last=zero_last)


def _of(block: str, case: FlowCase, couplings: int = 2, **options: Any) -> Density:
    """A flow of as many blocks of `couplings` couplings as make the case's steps."""
    return _density(block, [case.dim], case.steps // couplings, partial(_net, case), **options)


def _images(case: ImageCase) -> Density:
    """Its all-in-one block has a fixed rotation in place of the 1 × 1 convolution."""
    net = partial(convolutions, width=case.width)
    return _density("AllInOneBlock", case.shape, case.steps, net, permute_soft=True)


FREIA = Library(
    "FrEIA",
    _flow,
    {
        "GLOWCouplingBlock": partial(_of, "GLOWCouplingBlock"),
        "RNVPCouplingBlock": partial(_of, "RNVPCouplingBlock"),
        "NICECouplingBlock": partial(_of, "NICECouplingBlock"),
        "AllInOneBlock, soft permutation": partial(_of, "AllInOneBlock", couplings=1, permute_soft=True),
    },
    {"AllInOneBlock, soft permutation": _images},
    refuses=lambda case: "FrEIA 0.2 has no splines" if case.bins else "",
)
