"""FrEIA on images, converted: every block, conditions, down-samplings, and vectors behind a Flatten."""

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import nn

from glf_fast import AffineCoupling, CouplingFlow, convert
from glf_fast.conversion import ConversionError
from glf_fast.conversion.freia import LIBRARY


@pytest.fixture(autouse=True)
def _seed_numpy():
    """FrEIA's permutations and rotations are numpy's and scipy's."""
    np.random.seed(0)


@pytest.fixture
def library(tools):
    def log_prob(inn, x, context):
        z, jac = inn(x, c=None if context is None else [context])
        return jac - 0.5 * (z.flatten(1).square().sum(1) + z[0].numel() * np.log(2 * np.pi))

    def inverse(inn, z, context):
        return inn(z.reshape(-1, *inn.shapes[-1]), c=None if context is None else [context], rev=True)[0]

    # Fixed matrices have inverses, and log-determinants, that were computed in float32.
    return tools.Library(LIBRARY, log_prob, inverse, tolerance=3e-5, rounded=rounded)


def rounded(inn):
    """log|det| of fixed matrices that FrEIA does not count: they are kept in float32, and its rotations are called exact."""
    missed = 0.0
    for module, (_, *pixels) in zip(inn.module_list, inn.shapes, strict=False):
        if isinstance(module, fm.Fixed1x1Conv):
            missed += np.prod(pixels) * (torch.slogdet(module.M.flatten(1))[1] - module.logDetM).item()
        elif isinstance(module, fm.AllInOneBlock) and not module.reverse_pre_permute:
            missed += np.prod(pixels) * torch.slogdet(module.w_perm.flatten(1))[1].item()
    return missed


BLOCKS = {
    "GLOW": (fm.GLOWCouplingBlock, {}),
    "GLOW, uneven": (fm.GLOWCouplingBlock, {"split_len": 1, "clamp_activation": "TANH"}),
    "RNVP": (fm.RNVPCouplingBlock, {"clamp": 1.0, "clamp_activation": "SIGMOID"}),
    "NICE": (fm.NICECouplingBlock, {}),
    "OneSided": (fm.AffineCouplingOneSided, {"clamp_activation": "TANH"}),
    "AllInOne": (fm.AllInOneBlock, {}),
    "AllInOne, soft": (fm.AllInOneBlock, {"permute_soft": True, "reverse_permutation": True}),
    "AllInOne, exp": (fm.AllInOneBlock, {"global_affine_type": "EXP", "affine_clamping": 1.0}),
}


def network(name, shape, net, condition=None):
    kind, options = BLOCKS[name]
    C = shape[0]
    inn = ff.SequenceINN(*shape)
    given = {} if condition is None else {"cond": 0, "cond_shape": condition}
    for _ in range(2):
        inn.append(fm.ActNorm)
        inn.append(fm.Fixed1x1Conv, M=torch.linalg.qr(torch.randn(C, C))[0] + 0.1 * torch.eye(C))
        inn.append(kind, subnet_constructor=net, **options, **given)
        inn.append(fm.PermuteRandom)
    inn(torch.randn(20, *shape), c=None if condition is None else [torch.randn(20, *condition)])
    return inn


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 4, 3)])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block(name, shape, library, tools):
    converted = tools.prove(library, tools.shake_images(network(name, shape, tools.conv_net)), shape)
    one_sided = name.startswith(("AllInOne", "OneSided"))
    assert sum(isinstance(module, AffineCoupling) for module in converted.modules()) == (2 if one_sided else 4)


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 7, 5)])
def test_float32_is_as_close_to_the_truth_as_the_library(shape, library, tools):
    """One ratio scatters, by a factor of 2 at two channels: their mean may not be above 1 by much."""

    def build(seed, name):
        torch.manual_seed(seed)
        np.random.seed(seed)
        return tools.shake_images(network(name, shape, tools.conv_net))

    names = ["GLOW", "NICE", "AllInOne", "AllInOne, soft"] * 4
    tools.as_close(library, [build(seed, name) for seed, name in enumerate(names)], shape, most=1.1)


@pytest.mark.parametrize("name", ["GLOW", "RNVP", "NICE", "AllInOne"])
def test_conditions_that_are_images(name, library, tools):
    tools.prove(library, tools.shake_images(network(name, (4, 3, 5), tools.conv_net, (2, 3, 5))), (4, 3, 5), (2, 3, 5))


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 7), nn.ReLU(), nn.Linear(7, n_out))


@pytest.mark.parametrize("down", [fm.IRevNetDownsampling, fm.HaarDownsampling])
def test_down_samplings_and_vectors(down, library, tools):
    """The noise is a vector; ours has the data's shape. What stands behind the Flatten is fused as vectors are."""
    inn = ff.SequenceINN(3, 4, 6)
    inn.append(fm.AllInOneBlock, subnet_constructor=tools.conv_net)
    inn.append(down)
    inn.append(fm.GLOWCouplingBlock, subnet_constructor=tools.conv_net)
    inn.append(fm.Flatten)
    for _ in range(2):
        inn.append(fm.GLOWCouplingBlock, subnet_constructor=mlp)
        inn.append(fm.PermuteRandom)
    converted = tools.prove(library, tools.shake_images(inn), (3, 4, 6))
    names = [type(layer).__name__ for layer in converted.layers]
    names = [name for name in names if name in ("AffineCoupling", "KeptBlock", "CouplingFlow")]
    assert names[:6] == ["AffineCoupling", "KeptBlock", "AffineCoupling", "AffineCoupling", "KeptBlock", "CouplingFlow"]


def graph(net, *, vectors):
    """Images with an image as condition, then perhaps vectors with a vector."""
    image, vector = ff.ConditionNode(2, 4, 6), ff.ConditionNode(3)
    nodes = [ff.InputNode(4, 4, 6)]
    for _ in range(2):
        block = ff.Node(
            nodes[-1], fm.AllInOneBlock, {"subnet_constructor": net, "permute_soft": True}, conditions=image
        )
        nodes += [block, ff.Node(block, fm.PermuteRandom, {})]
    if vectors:
        nodes.append(ff.Node(nodes[-1], fm.Flatten, {}))
        nodes += [ff.Node(nodes[-1], fm.GLOWCouplingBlock, {"subnet_constructor": mlp}, conditions=vector)]
        nodes += [ff.Node(nodes[-1], fm.PermuteRandom, {})]
    return ff.GraphINN([*nodes, image, *([vector] if vectors else []), ff.OutputNode(nodes[-1])])


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("kind", ["graph", "sequence"])
def test_in_place(kind, vectors, tools):
    x, c = torch.randn(6, 4, 4, 6), [torch.randn(6, 2, 4, 6), torch.randn(6, 3)][: 1 + vectors]
    if kind == "graph":
        inn = graph(tools.conv_net, vectors=vectors)
    else:
        inn = ff.SequenceINN(4, 4, 6)
        for _ in range(2):
            inn.append(fm.AllInOneBlock, subnet_constructor=tools.conv_net, cond=0, cond_shape=(2, 4, 6))
            inn.append(fm.PermuteRandom)
        if vectors:
            inn.append(fm.Flatten)
            inn.append(fm.GLOWCouplingBlock, subnet_constructor=mlp, cond=1, cond_shape=(3,))
    inn, original, report = tools.accelerated(tools.shake_images(inn))
    assert [[name for name, n in r.into.items() if n and name != "affine"] for r in report.replaced] == [
        ["AffineCoupling"],
        ["CouplingFlow"],
    ][: 1 + vectors]
    assert any(isinstance(m, CouplingFlow) for m in inn.modules()) == vectors
    z, jac = inn(x, c=c)
    wanted, wanted_jac = original(x.double(), c=[a.double() for a in c])
    torch.testing.assert_close(z, wanted.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jac, wanted_jac.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(inn(z, c=c, rev=True)[0], x, rtol=1e-4, atol=1e-3)
    if kind == "sequence":
        assert inn.shapes[0] == (4, 4, 6) and inn.shapes[-1] == tuple(z.shape[1:])
        assert len(inn.conditions) == len(inn.module_list)
    (z.square().sum() - jac.sum()).backward()
    assert all(p.grad is not None for p in inn.parameters() if p.requires_grad)


def test_conditions_of_two_kinds_are_no_one_context(tools):
    with pytest.raises(ConversionError, match=r"condition 1 of shape \(3,\) does not fit.*accelerate"):
        convert(graph(tools.conv_net, vectors=True))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (fm.GINCouplingBlock, {}, "no kernel covers this kind of layer on images"),
        (fm.AllInOneBlock, {"gin_block": True}, "subtracts the mean"),
        (fm.GLOWCouplingBlock, {"split_len": 0}, "leaves one half empty"),
        (fm.GLOWCouplingBlock, {"clamp_activation": torch.sin}, "none of those that are covered"),
    ],
)
def test_refusals(kind, options, message, tools):
    inn = ff.SequenceINN(4, 3, 3)
    inn.append(
        kind, subnet_constructor=tools.conv_net if "split_len" not in options else lambda a, b: nn.Identity(), **options
    )
    with pytest.raises(ConversionError, match=f"module_list.0.*{message}"):
        convert(inn)


def test_trained_checkpoint(library, tools):
    build = lambda: network("AllInOne", (4, 4, 4), tools.conv_net)  # noqa: E731
    tools.prove(library, tools.trained(library, build, torch.randn(64, 4, 4, 4).cumsum(1)), (4, 4, 4))
