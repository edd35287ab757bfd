"""Flows of public projects that use zuko."""

from __future__ import annotations

import torch
import zuko
from torch import nn

from bench.projects.project import Project, Sizes, Wrapped

__all__ = ["PROJECTS"]


def _wrapped(sizes: Sizes) -> nn.Module:
    """The flow with its linear layers replaced by those of the user's."""
    flow = zuko.flows.NICE(16, 8, transforms=sizes.steps(4), hidden_features=[sizes(64)] * 2)
    for transform in flow.transform.transforms:
        for i, layer in enumerate(transform.hyper):
            if hasattr(layer, "weight"):
                new = nn.Linear(layer.in_features, layer.out_features)
                nn.init.orthogonal_(new.weight)
                transform.hyper[i] = new
    return Wrapped(flow)


def _tutorial(sizes: Sizes) -> nn.Module:
    """A logit, couplings, and a rotation between them."""
    lazy, transforms = zuko.lazy, zuko.transforms
    couplings = [
        zuko.flows.GeneralCouplingTransform(3, 4, mask=torch.arange(3) % 2 == k, hidden_features=[sizes(64)] * 2)
        for k in range(2)
    ]
    base = lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(3), torch.ones(3), buffer=True)
    steps = [
        lazy.UnconditionalTransform(transforms.SoftclipTransform, 10.0),
        couplings[0],
        lazy.UnconditionalTransform(transforms.RotationTransform, torch.randn(3, 3)),
        couplings[1],
    ]
    return zuko.flows.Flow(steps, base)


def _in_a_box(sizes: Sizes) -> nn.Module:
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.BoxUniform, -30 * torch.ones(4), 30 * torch.ones(4), buffer=True
    )
    flow = zuko.flows.RealNVP(4, 2, transforms=sizes.steps(4), hidden_features=[sizes(64)] * 2)
    return zuko.flows.Flow(flow.transform.transforms, base)


def _one_feature(sizes: Sizes) -> nn.Module:
    return zuko.flows.RealNVP(1, 1, transforms=sizes.steps(3), hidden_features=[sizes(128)] * 2)


PROJECTS = [
    Project(
        "HEP unfolding, zuko NICE",
        "zuko",
        "3 affine couplings of 5 columns, 3 × 128",
        lambda sizes: zuko.flows.NICE(5, 0, transforms=sizes.steps(3), hidden_features=[sizes(128)] * 3),
        (5,),
        512,
    ),
    Project(
        "Bayesian experimental design, zuko NICE",
        "zuko",
        "5 affine couplings of 4 columns, 2 × 64, context 8",
        lambda sizes: zuko.flows.NICE(4, 8, transforms=sizes.steps(5), hidden_features=[sizes(64)] * 2),
        (4,),
        256,
        (8,),
    ),
    Project(
        "conformal prediction, zuko RealNVP",
        "zuko",
        "3 affine couplings of 2 columns, 2 × 128, context 1",
        lambda sizes: zuko.flows.RealNVP(2, 1, transforms=sizes.steps(3), hidden_features=[sizes(128)] * 2),
        (2,),
        256,
        (1,),
    ),
    Project(
        "conformal prediction, one feature",
        "zuko",
        "the same of one column, which its context alone transforms",
        _one_feature,
        (1,),
        256,
        (1,),
    ),
    Project(
        "zuko NICE with its own linear layers",
        "zuko",
        "4 affine couplings of 16 columns, 2 × 64, context 8, in a module",
        _wrapped,
        (16,),
        256,
        (8,),
    ),
    Project(
        "aspire, zuko RealNVP",
        "zuko",
        "3 affine couplings of 8 columns, 2 × 64",
        lambda sizes: zuko.flows.RealNVP(8, 0, transforms=sizes.steps(3), hidden_features=[sizes(64)] * 2),
        (8,),
        512,
        how="`accelerate`, before `flow.compile()`; aspire's plug-in: [samplers](#nessai-pocomc-and-aspire)",
    ),
    Project(
        "lampe NPE, zuko NICE",
        "zuko",
        "3 affine couplings of 4 columns, 3 × 64, ELU, context 8",
        lambda sizes: zuko.flows.NICE(
            4, 8, transforms=sizes.steps(3), hidden_features=[sizes(64)] * 3, activation=nn.ELU
        ),
        (4,),
        256,
        (8,),
    ),
    Project(
        "lampe NPE, MAF",
        "zuko",
        "3 autoregressive layers of 4 columns, 3 × 64, ELU, context 8: lampe's default",
        lambda sizes: zuko.flows.MAF(
            4, 8, transforms=sizes.steps(3), hidden_features=[sizes(64)] * 3, activation=nn.ELU
        ),
        (4,),
        256,
        (8,),
    ),
    Project(
        "lampe NPE, NSF",
        "zuko",
        "the same with splines of 8 bins",
        lambda sizes: zuko.flows.NSF(
            4, 8, transforms=sizes.steps(3), hidden_features=[sizes(64)] * 3, activation=nn.ELU
        ),
        (4,),
        256,
        (8,),
    ),
    Project(
        "zuko's tutorial",
        "zuko",
        "a soft clip, two affine couplings of 3 columns, a rotation; 2 × 64, context 4",
        _tutorial,
        (3,),
        256,
        (4,),
    ),
    Project(
        "zuko couplings over a box",
        "zuko",
        "4 affine couplings of 4 columns, 2 × 64, context 2, uniform base",
        _in_a_box,
        (4,),
        256,
        (2,),
    ),
    Project(
        "zuko RealNVP with LayerNorm",
        "zuko",
        "3 affine couplings of 6 columns, 2 × 64, normalize=True",
        lambda sizes: zuko.flows.RealNVP(
            6, 0, transforms=sizes.steps(3), hidden_features=[sizes(64)] * 2, normalize=True
        ),
        (6,),
        256,
        left="LayerNorm() is neither",
        why="no kernel has LayerNorm",
    ),
]
