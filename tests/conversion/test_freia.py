"""FrEIA's networks, converted: every block, clamp and permutation, conditions, chains as graphs, refusals."""

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import nn

from glf_fast import CouplingFlow
from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate


@pytest.fixture
def library(Library):
    def log_prob(inn, x, context):
        z, jac = inn(x, c=[context])
        return jac - 0.5 * z.square().sum(1) - 0.5 * x.shape[1] * np.log(2 * np.pi)

    return Library(log_prob, lambda inn, z, context: inn(z, c=[context], rev=True)[0])


@pytest.fixture(autouse=True)
def numpy_seed():
    np.random.seed(0)  # FrEIA's permutations


def subnet(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 14), nn.ReLU(), nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, n_out))


def shaken(inn, std=0.1):
    with torch.no_grad():
        for p in inn.parameters():
            if p.requires_grad:  # permutations and fixed matrices are parameters, too
                p.add_(std * torch.randn_like(p))
    return inn


def network(dim, kind, steps=3, permute=True, **arguments):
    inn = ff.SequenceINN(dim)
    for _ in range(steps):
        inn.append(kind, subnet_constructor=subnet, **arguments)
        if permute:
            inn.append(fm.PermuteRandom)
    return shaken(inn)


BLOCKS = {
    "GLOW": (fm.GLOWCouplingBlock, {}),
    "GLOW tanh": (fm.GLOWCouplingBlock, {"clamp_activation": "TANH", "clamp": 1.2}),
    "GLOW sigmoid": (fm.GLOWCouplingBlock, {"clamp_activation": "SIGMOID"}),
    "GLOW callable": (fm.GLOWCouplingBlock, {"clamp_activation": torch.tanh, "clamp": 0.7}),
    "GLOW uneven": (fm.GLOWCouplingBlock, {"split_len": 1}),
    "RNVP": (fm.RNVPCouplingBlock, {"clamp": 1.5}),
    "NICE": (fm.NICECouplingBlock, {}),
    "one-sided": (fm.AffineCouplingOneSided, {}),
    "AllInOne": (fm.AllInOneBlock, {}),
    "AllInOne sigmoid": (fm.AllInOneBlock, {"global_affine_type": "SIGMOID", "global_affine_init": 0.9}),
    "AllInOne exp, reversed": (fm.AllInOneBlock, {"global_affine_type": "EXP", "reverse_permutation": True}),
}


@pytest.mark.parametrize("dim", [4, 7])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block, dim, prove, library):
    kind, arguments = BLOCKS[block]
    converted = prove(library, network(dim, kind, **arguments), dim)
    assert sum(isinstance(module, CouplingFlow) for module in converted.modules()) == 1


@pytest.mark.parametrize("block", ["GLOW", "AllInOne"])
def test_conditions(block, prove, library):
    kind, arguments = BLOCKS[block]
    inn = network(5, kind, cond=0, cond_shape=(3,), **arguments)
    prove(library, inn, 5, context_dim=3)


def test_soft_permutations():
    """Their matrices are orthogonal to float32 only, while the library takes their log-determinants for 0."""
    inn = network(6, fm.AllInOneBlock, permute=False, permute_soft=True).double()
    converted = convert(inn)
    x = torch.randn(40, 6).double()
    z, jac = inn(x)
    got, logdet = converted(x)
    torch.testing.assert_close(got, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logdet, jac, rtol=0, atol=1e-5)
    torch.testing.assert_close(converted.inverse(z)[0], x, rtol=1e-9, atol=1e-9)  # the library's is 1e-7 off
    jacobian = torch.func.jacrev(lambda a: inn(a[None])[0][0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[0].detach(), rtol=1e-9, atol=1e-9)


def test_graph_that_is_a_chain(prove, library):
    start, condition = ff.InputNode(5), ff.ConditionNode(2)
    a = ff.Node(start, fm.GLOWCouplingBlock, {"subnet_constructor": subnet}, conditions=condition)
    b = ff.Node(a, fm.PermuteRandom, {})
    c = ff.Node(b, fm.GLOWCouplingBlock, {"subnet_constructor": subnet})
    inn = shaken(ff.GraphINN([start, condition, a, b, c, ff.OutputNode(c)]))
    prove(library, inn, 5, context_dim=2)


def test_trained_checkpoint(tmp_path):
    def build():
        inn = ff.SequenceINN(5)
        for _ in range(3):
            inn.append(fm.ActNorm)
            inn.append(fm.AllInOneBlock, subnet_constructor=subnet)
        return inn

    inn, x = build(), torch.randn(256, 5).cumsum(1)
    optimizer = torch.optim.Adam([p for p in inn.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        z, jac = inn(x)
        optimizer.zero_grad()
        (0.5 * z.square().sum(1) - jac).mean().backward()
        optimizer.step()
    torch.save(inn.state_dict(), tmp_path / "inn.pt")
    loaded = build()
    loaded.load_state_dict(torch.load(tmp_path / "inn.pt"))
    z, logdet = convert(loaded)(x)
    wanted, jac = inn(x)
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logdet, jac, rtol=1e-4, atol=1e-4)


def test_frozen_reflections_are_fused():
    """Trained ones are kept: a matrix of ours would not stay a product of reflections."""
    inn = network(4, fm.AllInOneBlock, steps=2, permute=False, learned_householder_permutation=2)
    with pytest.raises(ConversionError, match="Householder reflections are trained"):
        convert(inn)
    for block in inn:
        block.vk_householder.requires_grad_(False)
    converted = convert(inn)
    x = torch.randn(30, 4)
    for got, wanted in zip(converted(x), inn(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_hybrid_with_a_volume_preserving_block():
    inn = ff.SequenceINN(4)
    for kind in (fm.GLOWCouplingBlock, fm.GINCouplingBlock, fm.GLOWCouplingBlock):
        inn.append(kind, subnet_constructor=subnet)
    converted = convert(shaken(inn))
    assert sum(isinstance(module, CouplingFlow) for module in converted.modules()) == 2
    x = torch.randn(30, 4)
    for got, wanted in zip(converted(x), inn(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(ConversionError, match="gin_block=True"):
        convert(network(4, fm.AllInOneBlock, gin_block=True))
    inn = network(4, fm.GLOWCouplingBlock)
    inn.append(fm.ActNorm)
    with pytest.raises(ConversionError, match="has not been initialised"):
        convert(inn)
    images = ff.SequenceINN(3, 8, 8)
    images.append(fm.PermuteRandom)
    with pytest.raises(ConversionError, match="no coupling that can be fused"):
        convert(images)


@pytest.mark.parametrize("base", [ff.SequenceINN, ff.GraphINN])
def test_classes_made_of_the_library_s_are_read(base: type) -> None:
    kind = type("Mine", (base,), {})
    net = lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, 8), nn.ReLU(), nn.Linear(8, n_out))  # noqa: E731
    if base is ff.SequenceINN:
        inn = kind(4)
        inn.append(fm.GLOWCouplingBlock, subnet_constructor=net)
    else:
        start = ff.InputNode(4)
        block = ff.Node(start, fm.GLOWCouplingBlock, {"subnet_constructor": net})
        inn = kind([start, block, ff.OutputNode(block)])
    x = torch.randn(5, 4)
    torch.testing.assert_close(convert(inn)(x)[0], inn(x)[0])
    wanted = inn(x)[0]
    assert accelerate(inn)
    torch.testing.assert_close(inn(x)[0], wanted)
