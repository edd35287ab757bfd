"""Flows of public projects that use FrEIA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch
from torch import nn

from bench.projects.freia_modules import OldGraph, SplineBlock, UShaped, convolutions
from bench.projects.project import Project, Sizes, networks

__all__ = ["PROJECTS"]


def _twice_as_wide(n_in: int, n_out: int) -> nn.Module:
    """One hidden layer of twice the input's width."""
    return networks(2 * n_in)(n_in, n_out)


def _graph(
    shape: Iterable[int], blocks: Iterable[tuple[type, dict[str, Any]]], condition: int = 0, on: type | None = None
) -> ff.GraphINN:
    """Blocks in a row; those of the class `on` are given the condition."""
    nodes = [ff.InputNode(*shape)]
    conditions = [ff.ConditionNode(condition)] if condition else []
    for kind, options in blocks:
        given = {"conditions": conditions} if condition and kind is on else {}
        nodes.append(ff.Node(nodes[-1], kind, options, **given))
    return ff.GraphINN([*nodes, *conditions, ff.OutputNode(nodes[-1])])


def _alternating(n: int, block: type, options: dict[str, Any], *, first: bool = False) -> list[tuple[type, dict]]:
    """n blocks and random permutations, the permutations `first` or last."""
    found = []
    for seed in range(n):
        pair = [(block, options), (fm.PermuteRandom, {"seed": seed})]
        found += pair[::-1] if first else pair
    return found


def _cflow(columns: int, condition: int, sizes: Sizes) -> nn.Module:
    inn = ff.SequenceINN(columns)
    given = {"cond": 0, "cond_shape": (condition,)} if condition else {}
    for _ in range(sizes.steps(8)):
        inn.append(
            fm.AllInOneBlock, **given, subnet_constructor=_twice_as_wide, affine_clamping=1.9,
            global_affine_type="SOFTPLUS", permute_soft=True,
        )  # fmt: skip
    return inn


def _copy_of(kind: type, module: str) -> type:
    """A copy of a class as another package holds it."""
    return type(kind.__name__, kind.__bases__, {**vars(kind), "__module__": module})


def _anomalib_cflow(sizes: Sizes) -> nn.Module:
    inn = _cflow(128, 128, sizes)
    copied = _copy_of(fm.AllInOneBlock, "anomalib.models.components.flow.all_in_one_block")
    for block in cast(Any, inn).module_list:
        block.__class__ = copied
    return inn


def _fastflow(sizes: Sizes) -> nn.Module:
    inn = ff.SequenceINN(64, 16, 16)
    for k in range(sizes.steps(8)):
        inn.append(
            fm.AllInOneBlock,
            subnet_constructor=convolutions(*[(3, 3), (1, 1)][k % 2]),
            affine_clamping=2.0,
            permute_soft=False,
        )
    return inn


def _anomalib_fastflow(sizes: Sizes) -> nn.Module:
    inn = _fastflow(sizes)
    copied = _copy_of(fm.AllInOneBlock, "anomalib.models.components.flow.all_in_one_block")
    for block in cast(Any, inn).module_list:
        block.__class__ = copied
    return inn


CALO = 373  # columns of a shower: voxels and energies


def _caloinn(sizes: Sizes, dropout: float = 0.0) -> nn.Module:
    subnet = networks(256, 256, activation=nn.LeakyReLU, dropout=dropout)
    options = {"subnet_constructor": subnet, "affine_clamping": 5.0, "global_affine_init": 0.92}
    return _graph([CALO], [(fm.AllInOneBlock, options)] * sizes.steps(10), 1, fm.AllInOneBlock)


def _caloinn_splines(kind: str, sizes: Sizes) -> nn.Module:
    subnet = networks(sizes(256), sizes(256), activation=nn.LeakyReLU)
    return _graph([40], [(SplineBlock, {"subnet_constructor": subnet, "kind": kind})] * sizes.steps(4), 1, SplineBlock)


def _bdimnna(sizes: Sizes) -> nn.Module:
    options = {"subnet_constructor": networks(sizes(512), sizes(512)), "clamp": 2.0}
    return _graph([8], _alternating(sizes.steps(8), fm.GLOWCouplingBlock, options))


def _boltzmann(sizes: Sizes) -> nn.Module:
    options = {"subnet_constructor": networks(*[sizes(128)] * 3), "clamp": 2.0}
    return _graph([6], [(fm.ActNorm, {}), *[(fm.RNVPCouplingBlock, options)] * sizes.steps(12)])


def _gin_10d(block: type, sizes: Sizes) -> nn.Module:
    return _graph([10], _alternating(sizes.steps(8), block, {"subnet_constructor": networks(10, 10), "clamp": 2.0}))


def _gin_emnist(block: type, sizes: Sizes) -> nn.Module:
    def level(n: int, net: Callable[[int, int], nn.Module]) -> list[tuple[type, dict]]:
        return _alternating(sizes.steps(n), block, {"subnet_constructor": net, "clamp": 2.0})

    blocks = [
        (fm.IRevNetDownsampling, {}), *level(4, convolutions(3, 3, 3, width=16)),
        (fm.IRevNetDownsampling, {}), *level(4, convolutions(3, 3, 3, width=32)),
        (fm.Flatten, {}), *level(2, networks(sizes(392), sizes(392))),
    ]  # fmt: skip
    return _graph([1, 28, 28], blocks)


def _ikflow(sizes: Sizes) -> nn.Module:
    limits = torch.tensor([2.9, 1.8, 2.9, 3.1, 2.9, 3.8, 2.9])
    options = {
        "subnet_constructor": networks(*[1024] * 3, activation=nn.LeakyReLU),  # at every size: it stays for its width
        "clamp": 2.5,
        "split_len": 3,
    }
    blocks = [(fm.FixedLinearTransform, {"M": (1 / limits).diag(), "b": torch.zeros(7)})]
    return _graph(
        [7],
        [*blocks, *_alternating(sizes.steps(12), fm.GLOWCouplingBlock, options, first=True)],
        8,
        fm.GLOWCouplingBlock,
    )


def _eight_modes(sizes: Sizes) -> nn.Module:
    options = {"subnet_constructor": networks(sizes(512)), "clamp": 2.0}
    return _graph([16], _alternating(sizes.steps(8), fm.GLOWCouplingBlock, options))


def _mnist_cinn(sizes: Sizes) -> nn.Module:
    options = {"subnet_constructor": networks(sizes(512)), "clamp": 1.0}
    blocks = [(fm.Flatten, {}), *_alternating(sizes.steps(20), fm.GLOWCouplingBlock, options, first=True)]
    flow = _graph([1, 28, 28], blocks, 10, fm.GLOWCouplingBlock)
    # As the project starts them: with PyTorch's start log p is −10¹², and float32 has no digit of it.
    for parameter in flow.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)
    return flow


def _tdm(sizes: Sizes) -> nn.Module:
    subnet = networks(*[sizes(32)] * 2, activation=nn.SELU)
    return _graph([16], [(fm.RNVPCouplingBlock, {"subnet_constructor": subnet})] * 3)


def _recipes(sizes: Sizes) -> nn.Module:
    subnet = networks(*[sizes(128)] * 2, dropout=0.1)
    options = {"subnet_constructor": subnet, "clamp": 2.0}
    return _graph([12], _alternating(sizes.steps(6), fm.GLOWCouplingBlock, options), 6, fm.GLOWCouplingBlock)


AIO = frozenset({"AllInOneBlock"})
PROJECTS = [
    Project(
        "cflow-ad, 128 features",
        "FrEIA",
        "8 AllInOneBlock, soft permutations, condition 128, one hidden layer of 2 × its input",
        partial(_cflow, 128, 128),
        (128,),
        256,
        (128,),
        other=AIO,
    ),
    Project(
        "cflow-ad, 256 features",
        "FrEIA",
        "the same of 256 columns",
        partial(_cflow, 256, 128),
        (256,),
        256,
        (128,),
        other=AIO,
    ),
    Project(
        "cflow-ad, without a condition",
        "FrEIA",
        "the same of 128 columns, no condition",
        partial(_cflow, 128, 0),
        (128,),
        256,
        other=AIO,
    ),
    Project(
        "anomalib CFLOW",
        "FrEIA",
        "cflow-ad's flow of a copied AllInOneBlock",
        _anomalib_cflow,
        (128,),
        256,
        (128,),
        how="`accelerate`; see below",
        other=AIO,
    ),
    Project(
        "FastFlow",
        "FrEIA",
        "8 AllInOneBlock on (64, 16, 16), convolutions 3 × 3 and 1 × 1",
        _fastflow,
        (64, 16, 16),
        32,
        other=AIO,
    ),
    Project(
        "anomalib FastFlow",
        "FrEIA",
        "FastFlow's flow of a copied AllInOneBlock",
        _anomalib_fastflow,
        (64, 16, 16),
        32,
        how="`accelerate`; see below",
        other=AIO,
    ),
    Project(
        "anomalib U-Flow",
        "FrEIA",
        "AllInOneBlocks on three scales, with splits and concatenations",
        lambda sizes: UShaped(),
        (32 * 16 + 12 * 64 + 8 * 256,),
        16,
        how="`accelerate`; see below",
        other=AIO,
    ),
    Project(
        "DifferNet",
        "FrEIA",
        "8 GLOW couplings and permutations of 768 columns, 3 × 2048, in its own copy of an old FrEIA",
        lambda sizes: OldGraph(768, sizes.steps(8), networks(*[sizes(2048)] * 3)),
        (768,),
        96,
        left="There is no flow",
        why="classes of its own, in a copy of an old FrEIA",
    ),
    Project(
        "CaloINN, affine",
        "FrEIA",
        "10 AllInOneBlock of 373 columns, hard permutations, 2 × 256, LeakyReLU, condition 1",
        _caloinn,
        (CALO,),
        512,
        (1,),
        other=AIO,
    ),
    Project(
        "CaloINN, affine, dropout 0.1",
        "FrEIA",
        "the same with dropout",
        partial(_caloinn, dropout=0.1),
        (CALO,),
        512,
        (1,),
        other=AIO,
    ),
    Project(
        "CaloINN, rational-quadratic",
        "FrEIA",
        "blocks of its own with rational-quadratic splines of 10 bins",
        partial(_caloinn_splines, "rational_quadratic"),
        (40,),
        512,
        (1,),
        left="no kernel covers this kind of layer",
        why="blocks of its own",
    ),
    Project(
        "CaloINN, cubic",
        "FrEIA",
        "blocks of its own with cubic splines of 10 bins",
        partial(_caloinn_splines, "cubic"),
        (40,),
        512,
        (1,),
        left="no kernel covers this kind of layer",
        why="blocks of its own",
    ),
    Project("BDIMNNA INN", "FrEIA", "8 GLOW couplings and permutations of 8 columns, 2 × 512", _bdimnna, (8,), 1024),
    Project(
        "Boltzmann RNVP",
        "FrEIA",
        "an ActNorm and 12 RNVP couplings of 6 columns, 3 × 128",
        _boltzmann,
        (6,),
        256,
        other=frozenset({"ActNorm"}),
    ),
    Project(
        "GIN 10d, glow",
        "FrEIA",
        "8 GLOW couplings and permutations of 10 columns, 2 × 10",
        partial(_gin_10d, fm.GLOWCouplingBlock),
        (10,),
        1000,
    ),
    Project(
        "GIN 10d, gin",
        "FrEIA",
        "the same of GIN couplings",
        partial(_gin_10d, fm.GINCouplingBlock),
        (10,),
        1000,
        left="no kernel covers this kind of layer",
        why="GIN subtracts the mean of the log-scales",
    ),
    Project(
        "GIN EMNIST, glow",
        "FrEIA",
        "4 + 4 convolutional and 2 dense GLOW couplings with permutations",
        partial(_gin_emnist, fm.GLOWCouplingBlock),
        (1, 28, 28),
        240,
        noise=(784,),
    ),
    Project(
        "GIN EMNIST, gin",
        "FrEIA",
        "the same of GIN couplings",
        partial(_gin_emnist, fm.GINCouplingBlock),
        (1, 28, 28),
        240,
        noise=(784,),
        left="no kernel covers this kind of layer",
        why="GIN subtracts the mean of the log-scales",
    ),
    Project(
        "ikflow",
        "FrEIA",
        "12 permutations and GLOW couplings of 3 and 4 columns, 3 × 1024, LeakyReLU, condition 8",
        _ikflow,
        (7,),
        128,
        (8,),
        left="whose products take all time",
        why="layers of 1,024 × 1,024, whose products take all time, fused or not",
    ),
    Project(
        "analyzing_inverse_problems, 8 modes",
        "FrEIA",
        "8 GLOW couplings and permutations of 16 columns, 512",
        _eight_modes,
        (16,),
        1600,
    ),
    Project(
        "conditional_INNs, MNIST",
        "FrEIA",
        "20 permutations and GLOW couplings of 784 columns, 512, condition 10",
        _mnist_cinn,
        (1, 28, 28),
        512,
        (10,),
        noise=(784,),
        left="which on a processor is slower",
        why="as fast fused as by itself: 784 columns are gathered, but matrices are made and read in each pass",
    ),
    Project(
        "TDM",
        "FrEIA",
        "3 RNVP couplings of 16 columns, 2 × 32, SELU",
        _tdm,
        (16,),
        512,
    ),
    Project(
        "FrEIA recipes, cINN with dropout",
        "FrEIA",
        "6 GLOW couplings and permutations of 12 columns, 2 × 128, dropout 0.1",
        _recipes,
        (12,),
        256,
        (6,),
        dropout=True,
    ),
]
