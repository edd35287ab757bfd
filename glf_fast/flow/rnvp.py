"""The flow of the GLF paper's released code: two-sided RealNVP blocks between fixed random permutations."""

from __future__ import annotations

import torch
from torch import nn

from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.flow.linear import InvertibleLinear
from glf_fast.flow.mlp import SeparateNetworks
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.ops.checks import check_integer

__all__ = ["rnvp_flow"]


def _network(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.ReLU(), nn.BatchNorm1d(hidden),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.BatchNorm1d(hidden),
        nn.Linear(hidden, n_out),
    )  # fmt: skip


def rnvp_flow(dim: int, blocks: int = 4, hidden: int = 64, clamp: float = 2.0, seed: int = 0) -> SequentialFlow:
    """The GLF paper's flow (arXiv:1905.10485, released code): blocks of a two-sided RealNVP coupling and a permutation.

    A block updates the first half from the second, then the second from the new first, with ℓ = clamp·0.636·atan(u) and four
    networks Linear–ReLU–BatchNorm–Linear–ReLU–BatchNorm–Linear, so 4 blocks are 8 one-sided couplings and 16 networks.
    All trainable parameters start as 0.05·N(0, 1), the gains of the batch norms included; permutation k has seed `seed` + k.

    In training mode the batch norms couple the samples of a batch. Only in eval mode is the inverse exact and the density
    valid.

    Args:
        dim: D ≥ 2.    blocks: number of two-sided couplings.
        hidden: width of the networks; 64 suits 20 latent dimensions, 256 suits 64.
        clamp: bound of the log-scales.    seed: seed of the first permutation.
    """
    check_integer("blocks", blocks, 1)
    check_integer("hidden", hidden, 1)
    layers: list[nn.Module] = []
    for k in range(blocks):
        for flip in (True, False):
            transformed = dim // 2
            networks = SeparateNetworks(*(_network(dim - transformed, hidden, transformed) for _ in range(2)))
            layers.append(AffineCoupling(dim, networks, log_scale="atan", log_scale_constant=clamp, flip=flip))
        permutation = InvertibleLinear(dim, linear="permutation")
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(seed + k))
        permutation.get_buffer("permutation").copy_(order)
        layers.append(permutation)
    flow = SequentialFlow(layers, (dim,))
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.05)
    return flow
