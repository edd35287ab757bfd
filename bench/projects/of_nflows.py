"""Flows of public projects that use nflows, or a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import nflows.distributions as nd
import nflows.transforms as nt
import torch
import torch.nn.functional as F
from nflows.flows import Flow, SimpleRealNVP
from nflows.nn.nets import MLP, ConvResidualNet, ResidualNet
from torch import Tensor, nn

from bench.projects.project import Project, Sizes

__all__ = ["PROJECTS"]

Net = Callable[[int, int], nn.Module]


class _ContextMLP(nn.Module):
    """An MLP on [x, context], as users write it."""

    def __init__(self, n_in: int, n_out: int, hidden: Sequence[int], context: int = 0) -> None:
        super().__init__()
        widths = [n_in + context, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], n_out))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.body(x if context is None else torch.cat([x, context], 1))


class _FlowableMLP(MLP):
    """nflows' MLP with the context beside its input."""

    def __init__(self, n_in: int, n_out: int, hidden: Sequence[int], context: int) -> None:
        super().__init__((n_in + context,), (n_out,), hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x if context is None else torch.cat([x, context], -1))


class _MLP(MLP):
    """nflows' MLP as a layer's network, which is called with a context that may be None."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("takes no context")
        return super().forward(x)


class _OwnFlow(nn.Module):
    """A flow class of a project's own around nflows' layers."""

    def __init__(self, transform: nn.Module, distribution: nn.Module) -> None:
        super().__init__()
        self._transform: Any = transform
        self._distribution: Any = distribution

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transform(x, context=context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        z, logdet = self._transform(x, context=context)
        return self._distribution.log_prob(z) + logdet

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """n samples; with contexts, n of each."""
        if context is None:
            return self._transform.inverse(self._distribution.sample(n))[0]
        z = self._distribution.sample(n * len(context))
        return self._transform.inverse(z, context=context.repeat_interleave(n, 0))[0].unflatten(0, (-1, n))


def _mask(columns: int, first: int, every: int = 2) -> Tensor:
    """1 in each column that is transformed: every second one, or fourth, from `first` on."""
    return torch.tensor([1 if i % every == first else -1 for i in range(columns)])


def _flow(layers: Iterable[nn.Module], columns: int, kind: type = Flow) -> nn.Module:
    return kind(nt.CompositeTransform(list(layers)), nd.StandardNormal([columns]))


def _residual(width: int, context: int | None = None, *, batch_norm: bool = False) -> Net:
    def net(n_in: int, n_out: int) -> nn.Module:
        return ResidualNet(n_in, n_out, width, context, num_blocks=2, use_batch_norm=batch_norm)

    return net


def _mlp(*hidden: int) -> Net:
    return lambda n_in, n_out: _MLP((n_in,), (n_out,), list(hidden))


def _lu(columns: int) -> nn.Module:
    return nt.CompositeTransform([nt.RandomPermutation(columns), nt.LULinear(columns, identity_init=True)])


def _strong_lens(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(sizes.steps(12)):
        layers.append(nt.ActNorm(8))
        mask = _mask(8, k % 4, 4) * (1 if k % 2 else -1)
        layers.append(
            nt.AffineCouplingTransform(mask, lambda n_in, n_out: _ContextMLP(n_in, n_out, [sizes(128)] * 3, 256))
        )
    return _flow(layers, 8)


def _vae_latents(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(sizes.steps(6)):
        coupling = nt.AffineCouplingTransform(
            _mask(64, k % 2), lambda n_in, n_out: _ContextMLP(n_in, n_out, [sizes(256)] * 2)
        )
        layers += [coupling, nt.RandomPermutation(64)]
    return _flow(layers, 64)


def _quantum(sizes: Sizes) -> nn.Module:
    tanh = partial(_MLP, activation=torch.tanh)
    net: Net = lambda n_in, n_out: tanh((n_in,), (n_out,), [sizes(256)] * 3)  # noqa: E731
    return _flow((nt.AffineCouplingTransform(_mask(3, k % 2), net) for k in range(sizes.steps(8))), 3)


def _glow_mnist(sizes: Sizes) -> nn.Module:
    """Two scales of eight steps."""
    whole = nt.MultiscaleCompositeTransform(2)
    shape: tuple[int, ...] = (1, 28, 28)
    for _ in range(2):
        C, H, W = shape[0] * 4, shape[1] // 2, shape[2] // 2
        steps: list[nn.Module] = [nt.SqueezeTransform()]
        for k in range(sizes.steps(8)):
            net: Net = lambda n_in, n_out: ConvResidualNet(n_in, n_out, sizes(16), num_blocks=2)  # noqa: E731
            steps += [nt.ActNorm(C), nt.OneByOneConvolution(C), nt.AffineCouplingTransform(_mask(C, k % 2), net)]
        shape = whole.add_transform(nt.CompositeTransform([*steps, nt.OneByOneConvolution(C)]), (C, H, W)) or ()
    return Flow(whole, nd.StandardNormal([784]))


def _real_nvp(
    sizes: Sizes, columns: int, steps: int, net: Callable[[Sizes], Net], kind: type, *, between: bool = False,
    actnorm: bool = False, linear: bool = True,
) -> nn.Module:  # fmt: skip
    """Affine couplings with alternating masks, LU layers before them, and batch norm behind or ActNorm before them."""
    layers: list[nn.Module] = []
    for k in range(sizes.steps(steps)):
        layers += [nt.ActNorm(columns)] if actnorm else []
        layers += [_lu(columns)] if linear else []
        layers.append(nt.AffineCouplingTransform(_mask(columns, k % 2), net(sizes)))
        layers += [nt.BatchNorm(columns)] if between else []
    return _flow(layers, columns, kind)


def _lfi_gw(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(sizes.steps(15)):
        coupling = nt.PiecewiseRationalQuadraticCouplingTransform(
            _mask(15, k % 2), lambda n_in, n_out: ResidualNet(n_in, n_out, sizes(512), 200, activation=F.elu, num_blocks=2),
            num_bins=8, tails="linear", tail_bound=1.0,
        )  # fmt: skip
        layers.append(nt.CompositeTransform([_lu(15), coupling]))
    return _flow([*layers, _lu(15)], 15)


def _standardized(columns: int, layers: Iterable[nn.Module]) -> nn.Module:
    shift, scale = torch.randn(columns), 0.5 + torch.rand(columns)
    return _flow([nt.PointwiseAffineTransform(shift, scale), *layers], columns)


def _sbi_nsf(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(sizes.steps(5)):
        coupling = nt.PiecewiseRationalQuadraticCouplingTransform(
            _mask(5, k % 2), _residual(sizes(50), 8), num_bins=10, tails="linear", tail_bound=3.0
        )
        layers += [coupling, nt.LULinear(5, identity_init=True)]
    return _standardized(5, layers)


def _sbi_maf(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(sizes.steps(5)):
        made = nt.MaskedAffineAutoregressiveTransform(
            5, sizes(50), 8, num_blocks=2, use_residual_blocks=False, activation=torch.tanh
        )
        layers += [made, nt.RandomPermutation(5)]
    return _standardized(5, layers)


def _conditional_nice(sizes: Sizes) -> nn.Module:
    """Its base has a mean and a variance for each context."""
    net: Net = lambda n_in, n_out: _FlowableMLP(n_in, n_out, [sizes(128)] * 3, 6)  # noqa: E731
    layers = [nt.AdditiveCouplingTransform(_mask(10, k % 2), net) for k in range(sizes.steps(4))]
    base = nd.ConditionalDiagonalNormal([10], nn.Linear(6, 20))
    return Flow(nt.CompositeTransform(layers), base)


def _residual_couplings(context: int, sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(sizes.steps(5)):
        layers += [nt.AffineCouplingTransform(_mask(8, k % 2), _residual(sizes(64), context or None)), _lu(8)]
    return _flow(layers, 8)


def _residual_net(sizes: Sizes) -> Net:
    return _residual(sizes(32))


def _two_layers(sizes: Sizes) -> Net:
    return _mlp(sizes(32), sizes(32))


LU = frozenset({"LULinear"})
PROJECTS = [
    Project(
        "strong-lens flow",
        "nflows",
        "12 affine couplings of 8 columns with masks 3 : 1, ActNorms, 3 × 128, context 256",
        _strong_lens,
        (8,),
        256,
        (256,),
        other=frozenset({"ActNorm"}),
    ),
    Project(
        "VAE latents, RealNVP",
        "nflows",
        "6 affine couplings of 64 columns, random permutations, 2 × 256",
        _vae_latents,
        (64,),
        256,
    ),
    Project("quantum Boltzmann flow", "nflows", "8 affine couplings of 3 columns, 3 × 256, Tanh", _quantum, (3,), 512),
    Project(
        "quantum Boltzmann flow, score loss",
        "nflows",
        "the same, differentiated twice",
        _quantum,
        (3,),
        512,
        how="leave it: kernels have first derivatives alone",
        loss="score",
    ),
    Project(
        "Glow on MNIST",
        "nflows",
        "2 scales of 8 steps: ActNorm, 1 × 1 convolution, affine coupling, residual convolutions of 16",
        _glow_mnist,
        (1, 28, 28),
        32,
        other=frozenset({"ActNorm", "OneByOneConvolution"}),
    ),
    Project(
        "nessai RealNVP",
        "nflows",
        "6 affine couplings of 6 columns, residual 2 × 32, LU layers, batch norm between",
        partial(_real_nvp, columns=6, steps=6, net=_residual_net, kind=Flow, between=True),
        (6,),
        1000,
        other=LU,
        how="`accelerate`; nessai's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "nessai RealNVP, MLP",
        "nflows",
        "the same with MLPs of 2 × 32",
        partial(_real_nvp, columns=6, steps=6, net=_two_layers, kind=Flow, between=True),
        (6,),
        1000,
        other=LU,
        how="`accelerate`; nessai's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "nessai RealNVP in its own class, eval",
        "nflows",
        "the first, in a flow class of its own, as it samples",
        partial(_real_nvp, columns=6, steps=6, net=_residual_net, kind=_OwnFlow, between=True),
        (6,),
        1000,
        training=False,
        other=LU | {"BatchNorm"},
        how="`accelerate`; nessai's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "nessai RealNVP, MLP, in its own class, eval",
        "nflows",
        "the second, in a flow class of its own, as it samples",
        partial(_real_nvp, columns=6, steps=6, net=_two_layers, kind=_OwnFlow, between=True),
        (6,),
        1000,
        training=False,
        other=LU | {"BatchNorm"},
        how="`accelerate`; nessai's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "nessai RealNVP, MLP, ActNorm, in its own class",
        "nflows",
        "the second with ActNorm, in a flow class of its own",
        partial(_real_nvp, columns=6, steps=6, net=_two_layers, kind=_OwnFlow, actnorm=True),
        (6,),
        1000,
        other=LU | {"ActNorm"},
        how="`accelerate`; nessai's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "glasflow RealNVP, conditional",
        "nflows",
        "4 affine couplings of 5 columns, residual 2 × 32, context 3, a class of its own",
        partial(_real_nvp, columns=5, steps=4, net=lambda sizes: _residual(sizes(32), 3), kind=_OwnFlow, linear=False),
        (5,),
        1000,
        (3,),
    ),
    Project(
        "nflows SimpleRealNVP",
        "nflows",
        "5 affine couplings of 8 columns, residual 2 × 64",
        lambda sizes: SimpleRealNVP(8, sizes(64), sizes.steps(5), 2),
        (8,),
        256,
    ),
    Project(
        "nflows SimpleRealNVP, batch norms",
        "nflows",
        "the same with batch norm between and within the layers",
        lambda sizes: SimpleRealNVP(
            8, sizes(64), sizes.steps(5), 2, batch_norm_within_layers=True, batch_norm_between_layers=True
        ),
        (8,),
        256,
        left="ResidualNet with batch norm is not covered",
        why="no kernel has the batch norm of a residual network",
    ),
    Project(
        "lfi-gw",
        "nflows",
        "15 spline couplings of 15 columns, residual 2 × 512, ELU, LU layers, context 200",
        _lfi_gw,
        (15,),
        512,
        (200,),
        other=LU,
    ),
    Project(
        "sbibm nsf",
        "nflows",
        "5 spline couplings of 5 columns, 10 bins, residual 2 × 50, LU layers, context 8",
        _sbi_nsf,
        (5,),
        200,
        (8,),
        other=LU,
        how="`accelerate` in sbi's builder: see [sbi](#sbi)",
    ),
    Project(
        "sbibm maf",
        "nflows",
        "5 affine autoregressive layers of 5 columns, 2 × 50, Tanh, permutations, context 8",
        _sbi_maf,
        (5,),
        200,
        (8,),
        how="`accelerate` in sbi's builder: see [sbi](#sbi)",
    ),
    Project(
        "ConditionalNICE",
        "nflows",
        "4 additive couplings of 10 columns, 3 × 128 of an own MLP class, base of the context",
        _conditional_nice,
        (10,),
        256,
        (6,),
    ),
    Project(
        "residual couplings (10 public files)",
        "nflows",
        "5 affine couplings of 8 columns, residual 2 × 64, LU layers",
        partial(_residual_couplings, 0),
        (8,),
        256,
        other=LU,
    ),
    Project(
        "residual couplings with a context",
        "nflows",
        "the same with a context of 10",
        partial(_residual_couplings, 10),
        (8,),
        256,
        (10,),
        other=LU,
    ),
]
