"""Flows of public projects that use normflows."""

from __future__ import annotations

from functools import partial
from typing import Any

import normflows as nf
import torch
from torch import Tensor, nn

from bench.projects.project import Project, Sizes

__all__ = ["PROJECTS"]


def _masked(
    sizes: Sizes, columns: int, steps: int, *hidden: int, actnorm: bool = True, scaled: bool = True, integers: bool = False,
    every: int = 1, options: dict[str, Any] | None = None,
) -> list[nn.Module]:  # fmt: skip
    """Couplings of every second column in turn, two networks each, with an ActNorm behind every one, or behind `every` few."""
    mask = torch.tensor([int(i % 2 == 0) for i in range(columns)])
    mask = mask if integers else mask.float()
    layers: list[nn.Module] = []
    for k in range(sizes.steps(steps)):
        t = nf.nets.MLP([columns, *hidden, columns])
        s = nf.nets.MLP([columns, *hidden, columns], **(options or {})) if scaled else None
        layers.append(nf.flows.MaskedAffineFlow(1 - mask if k % 2 else mask, t, s))
        if actnorm and k % every == every - 1:
            layers.append(nf.flows.ActNorm(columns))
    return layers


def _flow(columns: int, layers: list[nn.Module], base: nn.Module | None = None) -> nn.Module:
    return nf.NormalizingFlow(base or nf.distributions.DiagGaussian(columns, trainable=False), layers)


def _vae_real_nvp(sizes: Sizes) -> nn.Module:
    flow = _flow(40, _masked(sizes, 40, 40, actnorm=False))
    for parameter in flow.parameters():  # with PyTorch's start forty such steps overflow
        nn.init.normal_(parameter, std=0.01)
    return flow


def _glow(sizes: Sizes) -> nn.Module:
    """Three scales of four steps each."""
    levels, bases = [], []
    for i in range(3):
        channels = 3 * 2 ** (3 + 1 - i)
        blocks = [nf.flows.GlowBlock(channels, sizes(256)) for _ in range(sizes.steps(4))]
        levels.append([*blocks, nf.flows.Squeeze()])
        shape = (48, 4, 4) if i == 0 else (3 * 2 ** (3 - i), 32 // 2 ** (3 - i), 32 // 2 ** (3 - i))
        bases.append(nf.distributions.ClassCondDiagGaussian(shape, 10))
    return _Classes(nf.MultiscaleFlow(bases, levels, [nf.flows.Merge(), nf.flows.Merge()]))


class _Classes(nn.Module):
    """A class-conditional flow, with a class for each row in turn."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.classes: Any = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.classes.log_prob(x, torch.arange(len(x), device=x.device) % 10)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        return self.classes.sample(n, torch.arange(n, device=next(self.parameters()).device) % 10)


def _blocks(
    sizes: Sizes, columns: int, steps: int, hidden: list[int], mixing: Any, *, actnorm: bool = False, scale_map: str = "exp",
    **options: Any,
) -> list[nn.Module]:  # fmt: skip
    passive = (columns + 1) // 2
    layers: list[nn.Module] = []
    for _ in range(sizes.steps(steps)):
        net = nf.nets.MLP([passive, *hidden, 2 * (columns - passive)], **options)
        layers += [nf.flows.AffineCouplingBlock(net, scale_map=scale_map), mixing()]
        layers += [nf.flows.ActNorm(columns)] if actnorm else []
    return layers


def _fab(columns: int, sizes: Sizes) -> nn.Module:
    hidden = [sizes(10 * columns)] * 2
    mixing = partial(nf.flows.InvertibleAffine, columns)
    return _flow(columns, _blocks(sizes, columns, 5, hidden, mixing, actnorm=True, init_zeros=True))


def _boltzmann(output: str | None, sizes: Sizes) -> nn.Module:
    options = {"output_fn": output, "output_scale": 3.0} if output else {}
    return _flow(60, _masked(sizes, 60, 10, *[sizes(128)] * 3, every=2, options=options))


def _statistics(sizes: Sizes) -> nn.Module:
    mixing = partial(nf.flows.Permute, 256, mode="swap")
    layers = _blocks(sizes, 256, 32, [512], mixing, scale_map="sigmoid")
    return _flow(256, layers, nf.distributions.DiagGaussian(256))


def _tabular(sizes: Sizes) -> nn.Module:
    layers = _masked(sizes, 5, 20, *[sizes(128)] * 3)
    return _flow(5, layers, nf.distributions.GaussianMixture(3, 5))


def _conditional(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(sizes.steps(4)):
        layers.append(nf.flows.AutoregressiveRationalQuadraticSpline(2, 2, sizes(128), num_context_channels=4))
        layers.append(nf.flows.LULinearPermute(2))
    return nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), layers)


class _Walked(nn.Module):
    """A list of layers that its own code walks through, the layers' forward being data → noise."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.flows: Any = nn.ModuleList(layers)

    def log_prob(self, x: Tensor) -> Tensor:
        logdet = x.new_zeros(len(x))
        for flow in self.flows:
            x, own = flow(x)
            logdet = logdet + own
        return logdet - 0.5 * x.square().sum(1)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 40)
        logdet = x.new_zeros(n)
        for flow in reversed(self.flows):
            x, own = flow.inverse(x)
            logdet = logdet + own
        return x, logdet


class _BoundedMLP(nn.Module):
    """An MLP whose output is at most 2."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, columns)
        )

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * torch.tanh(self.body(x) / 2.0)


def _bounded(sizes: Sizes) -> nn.Module:
    mask = torch.tensor([1.0, 0.0] * 4)
    layers = [
        nf.flows.MaskedAffineFlow(
            1 - mask if k % 2 else mask, nf.nets.MLP([8, *[sizes(64)] * 2, 8]), _BoundedMLP(8, sizes(64))
        )
        for k in range(sizes.steps(8))
    ]
    return _flow(8, layers)


PROJECTS = [
    Project(
        "normflows examples, Real NVP, reverse KL",
        "normflows",
        "64 masked affine couplings of 2 columns, 2 networks of 4, ActNorms",
        lambda sizes: _flow(2, _masked(sizes, 2, 64, 4)),
        (2,),
        20,
        loss="reverse",
        double=True,
    ),
    Project(
        "normflows examples, Real NVP, 32 layers",
        "normflows",
        "the same of 32 couplings",
        lambda sizes: _flow(2, _masked(sizes, 2, 32, 4)),
        (2,),
        20,
        loss="reverse",
        double=True,
    ),
    Project(
        "normflows examples, augmented flow",
        "normflows",
        "32 masked affine couplings of 4 columns, 2 networks of 16, ActNorms",
        lambda sizes: _flow(4, _masked(sizes, 4, 32, 16)),
        (4,),
        20,
        loss="reverse",
        double=True,
    ),
    Project(
        "normflows examples, image",
        "normflows",
        "32 masked affine couplings of 2 columns, integer masks, 2 networks of 2 × 4",
        lambda sizes: _flow(2, _masked(sizes, 2, 32, 4, 4, actnorm=False, integers=True)),
        (2,),
        32,
        double=True,
    ),
    Project(
        "normflows examples, Glow",
        "normflows",
        "3 scales of 4 GlowBlocks of 256 channels, class-conditional base",
        _glow,
        (3, 32, 32),
        16,
        other=frozenset({"Invertible1x1Conv"}),
    ),
    Project(
        "normflows examples, VAE, RealNVP",
        "normflows",
        "40 masked affine couplings of 40 columns, networks without a hidden layer",
        _vae_real_nvp,
        (40,),
        64,
    ),
    Project(
        "normflows examples, vae.py",
        "normflows",
        "10 masked affine couplings of 40 columns, walked by a class of its own",
        lambda sizes: _Walked(_masked(sizes, 40, 10, actnorm=False)),
        (40,),
        256,
        left="not in a flow whose layers can be replaced",
        why="its own code walks through the layers",
    ),
    Project(
        "normflows examples, conditional flow",
        "normflows",
        "4 autoregressive splines of 2 columns, residual 2 × 128, context 4",
        _conditional,
        (2,),
        128,
        (4,),
        left="gates",
        why="a context gates its masked networks",
        how="`fast_splines()`: its splines alone",
    ),
    Project(
        "boltzmann-generators",
        "normflows",
        "10 masked affine couplings of 60 columns, 3 × 128, ActNorm behind every second",
        partial(_boltzmann, None),
        (60,),
        256,
    ),
    Project(
        "boltzmann-generators, tanh",
        "normflows",
        "the same with scales bounded by 3·tanh",
        partial(_boltzmann, "tanh"),
        (60,),
        256,
    ),
    Project(
        "fab-torch",
        "normflows",
        "5 AffineCouplingBlocks of 8 columns, 2 × 80, InvertibleAffine, ActNorm",
        partial(_fab, 8),
        (8,),
        256,
        loss="reverse",
        other=frozenset({"InvertibleAffine"}),
    ),
    Project(
        "fab-torch, Gaussian mixture",
        "normflows",
        "the same of 2 columns, 2 × 20",
        partial(_fab, 2),
        (2,),
        128,
        loss="reverse",
        other=frozenset({"InvertibleAffine"}),
    ),
    Project(
        "CoTFlow with exp",
        "normflows",
        "8 AffineCouplingBlocks of 16 columns, 2 × 64, permutations",
        lambda sizes: _flow(16, _blocks(sizes, 16, 8, [sizes(64)] * 2, partial(nf.flows.Permute, 16, mode="swap"))),
        (16,),
        128,
    ),
    Project(
        "feature-statistics flow",
        "normflows",
        "32 AffineCouplingBlocks of 256 columns, sigmoid, 512, swaps",
        _statistics,
        (256,),
        256,
    ),
    Project(
        "tabular flow",
        "normflows",
        "20 masked affine couplings of 5 columns, 3 × 128, ActNorms, base of 3 Gaussians",
        _tabular,
        (5,),
        512,
    ),
    Project(
        "NICE by MaskedAffineFlow",
        "normflows",
        "8 additive couplings of 16 columns, 2 × 64",
        lambda sizes: _flow(16, _masked(sizes, 16, 8, *[sizes(64)] * 2, actnorm=False, scaled=False)),
        (16,),
        256,
    ),
    Project(
        "a bounded scale network",
        "normflows",
        "8 masked affine couplings of 8 columns, 2 × 64, log-scale 2·tanh(u/2)",
        _bounded,
        (8,),
        256,
    ),
]
