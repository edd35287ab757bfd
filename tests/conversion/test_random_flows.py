"""Flows put together at random, of every layer that is covered, with odd and even widths, masks and networks."""

import itertools

import FrEIA.framework as ff
import FrEIA.modules as fm
import normflows as nf
import numpy as np
import pytest
import torch
from torch import nn

from glf_fast.conversion import freia, normflows
from glf_fast.conversion.reading import read_flow

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")

ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.ELU]


def random_net(rng):
    """A network constructor: depth, widths and activation are its own."""
    activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
    hidden = rng.integers(1, 14, size=rng.integers(1, 5)).tolist()

    def build(n_in, n_out):
        widths = [n_in, *hidden]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation())]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], n_out))

    return build


def random_normflows_layer(dim, rng):
    net, half = random_net(rng), dim - dim // 2
    kind = rng.integers(8)
    if kind <= 1:
        scale, mode = bool(rng.integers(4)), ["channel", "channel_inv"][rng.integers(2)]
        p, t = (half, dim - half) if mode == "channel" else (dim - half, half)
        maps = ["exp", "sigmoid", "sigmoid_inv"]
        return nf.flows.AffineCouplingBlock(net(p, 2 * t if scale else t), scale, maps[rng.integers(3)], mode)
    if kind <= 3:
        mask = torch.tensor(rng.permutation(dim) < rng.integers(1, dim)).float()
        nets = [net(dim, dim), net(dim, dim)]
        missing = rng.integers(4)
        if missing < 2:
            nets[missing] = None
        return nf.flows.MaskedAffineFlow(mask, *nets)
    if kind == 4:
        return nf.flows.AffineConstFlow((dim,))
    if kind == 5:
        return nf.flows.LULinearPermute(dim, identity_init=False)
    if kind == 6:
        return nf.flows.InvertibleAffine(dim, use_lu=bool(rng.integers(2)))
    return nf.flows.Permute(dim, ["shuffle", "swap"][rng.integers(2)])


def random_freia_layer(dim, rng):
    net = random_net(rng)
    kind = rng.integers(7)
    condition = {"cond": 0, "cond_shape": (2,)} if rng.integers(2) else {}
    clamp = {"clamp": rng.uniform(0.5, 3), "clamp_activation": ["ATAN", "TANH", "SIGMOID"][rng.integers(3)]}
    split = {"split_len": int(rng.integers(1, dim))}
    if kind == 0:
        return fm.GLOWCouplingBlock, {"subnet_constructor": net, **condition, **clamp, **split}
    if kind == 1:
        return fm.RNVPCouplingBlock, {"subnet_constructor": net, **condition, **clamp, **split}
    if kind == 2:
        return fm.NICECouplingBlock, {"subnet_constructor": net, **condition, **split}
    if kind == 3:
        return fm.AffineCouplingOneSided, {"subnet_constructor": net, **condition, **clamp, **split}
    if kind == 4:
        return fm.AllInOneBlock, {
            "subnet_constructor": net,
            "affine_clamping": rng.uniform(0.5, 3),
            "global_affine_type": ["SIGMOID", "SOFTPLUS", "EXP"][rng.integers(3)],
            "global_affine_init": rng.uniform(0.5, 1.5),
            "reverse_permutation": bool(rng.integers(2)),
            **condition,
        }
    if kind == 5:
        return fm.FixedLinearTransform, {"M": torch.eye(dim) + 0.3 * torch.randn(dim, dim), "b": torch.randn(dim)}
    return fm.PermuteRandom, {}


def check(library, flow, dim, tools, tolerance):
    """As `same_map`, with the library called as the conversion calls it."""
    reading = read_flow(library, tools.shake(flow, 0.1).double())
    called = tools.Library(library, lambda flow, x, context: reading.log_prob(x, context), None, tolerance)
    context = torch.randn(16, *reading.context_shape).double() if reading.context_shape else None
    tools.same_map(called, flow, torch.randn(16, dim).double(), context)


@pytest.mark.parametrize("seed", range(25))
def test_normflows(seed, tools):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dim = int(rng.integers(2, 10))
    layers = [random_normflows_layer(dim, rng) for _ in range(rng.integers(1, 7))]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=bool(rng.integers(2))), layers)
    check(normflows.LIBRARY, flow, dim, tools, 1e-8)


@pytest.mark.parametrize("seed", range(25))
def test_freia(seed, tools):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)
    dim = int(rng.integers(2, 10))
    inn = ff.SequenceINN(dim)
    for _ in range(rng.integers(1, 6)):
        kind, arguments = random_freia_layer(dim, rng)
        inn.append(kind, **arguments)
    # What a FixedLinearTransform stores of its inverse and log-determinant is float32.
    check(freia.LIBRARY, inn, dim, tools, 1e-6)
