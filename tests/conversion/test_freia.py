"""FrEIA's networks, converted: every block, clamp and permutation, conditions, chains as graphs, refusals."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import nn

from glf_fast.conversion import ConversionError, convert
from glf_fast.conversion.accelerate import accelerate
from glf_fast.conversion.freia import LIBRARY
from glf_fast.conversion.layers import Coupling, Dense, Diagonal, Kept, Permutation
from glf_fast.conversion.reading import read_flow

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning"),  # FrEIA's OrthogonalTransform
    pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning"),  # a network without inputs
]

# What is kept in float32: soft permutations are orthogonal, and stored inverses are inverses, to that alone.
FLOAT32 = 2e-6


@pytest.fixture
def library(tools):
    """Conditions are parts of the context, by the widths that `conditions` says."""

    def split(inn, context):
        if context is None:
            return []
        widths = {0: context.shape[1]} if not hasattr(inn, "widths") else inn.widths
        parts = dict(zip(sorted(widths), context.split([widths[i] for i in sorted(widths)], 1), strict=True))
        return [parts.get(i) for i in range(1 + max(parts))]

    def log_prob(inn, x, context):
        z, jac = inn(x, c=split(inn, context))
        return jac - 0.5 * z.square().sum(1) - 0.5 * x.shape[1] * np.log(2 * np.pi)

    return tools.Library(LIBRARY, log_prob, lambda inn, z, context: inn(z, c=split(inn, context), rev=True)[0])


@pytest.fixture(autouse=True)
def numpy_seed():
    np.random.seed(0)  # FrEIA's permutations


def subnet(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 14), nn.SiLU(), nn.Linear(14, 9), nn.SiLU(), nn.Linear(9, n_out))


def net(**arguments):
    return {"subnet_constructor": subnet, **arguments}


def sequence(dim, *blocks):
    """SequenceINN of (class, arguments) pairs, or of (class, arguments, condition's index, its width)."""
    inn = ff.SequenceINN(dim)
    inn.widths = {}
    for kind, arguments, *condition in blocks:
        if condition:
            index, width = condition
            inn.widths[index] = width
            arguments = {**arguments, "cond": index, "cond_shape": (width,)}
        inn.append(kind, **arguments)
    if not inn.widths:
        del inn.widths
    return inn


PERMUTE = (fm.PermuteRandom, {})


def subnet_of(activation, depth):
    """A constructor of networks with so many hidden layers."""

    def make(n_in, n_out):
        widths = [n_in, *[9] * depth, n_out]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation)]
        return nn.Sequential(*layers[:-1])

    return make


# name → blocks of one of two steps; what they become
CASES = {
    "GLOW": ([(fm.GLOWCouplingBlock, net()), PERMUTE], "4"),
    "GLOW tanh": ([(fm.GLOWCouplingBlock, net(clamp_activation="TANH", clamp=1.3)), PERMUTE], "4"),
    "GLOW sigmoid": ([(fm.GLOWCouplingBlock, net(clamp_activation="SIGMOID"))], "4"),
    "GLOW tanh callable": ([(fm.GLOWCouplingBlock, net(clamp_activation=torch.tanh, clamp=0.7))], "4"),
    "GLOW atan callable": ([(fm.GLOWCouplingBlock, net(clamp_activation=lambda u: 0.6 * torch.atan(u / 3)))], "4"),
    "GLOW linear callable": ([(fm.GLOWCouplingBlock, net(clamp_activation=lambda u: 0.2 * u))], "4"),
    "LeakyReLU of another slope": ([(fm.GLOWCouplingBlock, net(subnet_constructor=subnet_of(nn.LeakyReLU(0.2), 2)))], "4"),
    "Mish": ([(fm.AllInOneBlock, net(subnet_constructor=subnet_of(nn.Mish(), 2)))], "2"),
    "no hidden layer": ([(fm.RNVPCouplingBlock, net(subnet_constructor=nn.Linear))], "4"),
    "six hidden layers": ([(fm.AllInOneBlock, net(subnet_constructor=subnet_of(nn.Softplus(), 6)))], "2"),
    "uneven": ([(fm.GLOWCouplingBlock, net(split_len=1)), (fm.RNVPCouplingBlock, net(split_len=0.3))], "2 2 2 2"),
    "RNVP": ([(fm.RNVPCouplingBlock, net(clamp=1.5)), PERMUTE], "4"),
    "NICE": ([(fm.NICECouplingBlock, net()), (fm.PermuteRandom, {"seed": 3})], "4"),
    "one-sided": ([(fm.AffineCouplingOneSided, net(clamp=0.7)), PERMUTE], "2"),
    "AllInOne": ([(fm.AllInOneBlock, net())], "2"),
    "AllInOne soft": ([(fm.AllInOneBlock, net(permute_soft=True, affine_clamping=1.5))], "2"),
    "AllInOne sigmoid": ([(fm.AllInOneBlock, net(global_affine_type="SIGMOID", global_affine_init=0.9))], "2"),
    "AllInOne exp": ([(fm.AllInOneBlock, net(global_affine_type="EXP", global_affine_init=1.2))], "2"),
    "AllInOne reversed": ([(fm.AllInOneBlock, net(reverse_permutation=True))], "2"),
    "AllInOne reversed, soft": ([(fm.AllInOneBlock, net(reverse_permutation=True, permute_soft=True))], "2"),
    "one condition": ([(fm.AllInOneBlock, net(), 0, 3), (fm.GLOWCouplingBlock, net(), 0, 3)], "1 2 1 2"),
    "two of three conditions": (
        [(fm.GLOWCouplingBlock, net(), 2, 3), (fm.AllInOneBlock, net()), (fm.AllInOneBlock, net(), 0, 2)],
        "2 2 2 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dim", [4, 7])
@pytest.mark.parametrize("name", CASES)
def test_every_block(name, dim, library, tools):
    blocks, outline = CASES[name]
    inn = tools.shake(sequence(dim, *blocks, *blocks), 0.1)
    context = sum(getattr(inn, "widths", {}).values())
    tools.prove(replace(library, tolerance=FLOAT32) if "soft" in name else library, inn, dim, context, outline)


def test_float32_is_as_close_to_the_truth(library, tools):
    flows = [sequence(6, *blocks, *blocks) for blocks, _ in CASES.values() if len(blocks[0]) == 2]
    tools.as_close(library, [tools.shake(flow) for flow in flows], (6,), most=1.05)


def test_soft_permutations(tools):
    """Their matrices are orthogonal to float32 only, while the library takes their log-determinants for 0."""
    inn = tools.shake(sequence(6, *CASES["AllInOne soft"][0] * 2), 0.1).double()
    converted = convert(inn)
    x = torch.randn(40, 6).double()
    z, logdet = converted(x)
    torch.testing.assert_close(z, inn(x)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(converted.inverse(z)[0], x, rtol=1e-9, atol=1e-9)  # the library's is 1e-7 off
    jacobian = torch.func.jacrev(lambda a: inn(a[None])[0][0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[0].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("formula", ["released", "newer"])
def test_all_in_one_formula_is_asked_of_the_object(formula, monkeypatch, library, tools):
    """Up to 0.2 the clamp is c·tanh(u), later c·tanh(u/c), without a trace in the state_dict."""

    def newer(self, x, a, rev=False):
        a = a * 0.1
        ell = self.clamp * torch.tanh(a[:, : x.shape[1]] / self.clamp)
        if rev:
            return (x - a[:, x.shape[1] :]) * torch.exp(-ell), -ell.sum(1)
        return x * torch.exp(ell) + a[:, x.shape[1] :], ell.sum(1)

    if formula == "newer":
        monkeypatch.setattr(fm.AllInOneBlock, "_affine", newer)
    inn = tools.shake(sequence(5, (fm.AllInOneBlock, net(affine_clamping=1.7))), 0.5).double()
    coupling = next(layer for layer in read_flow(LIBRARY, inn).layers if isinstance(layer, Coupling))
    assert coupling.log_scale == "tanh" and coupling.log_scale_constant == pytest.approx(1.7)
    tools.same_map(library, inn, torch.randn(16, 5).double(), None)


def test_wide_blocks_keep_their_networks(library, tools):
    """On a processor the kernels' dense product would cost more than the blocks do; a gather costs nothing."""

    def wide(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 2 * n_in), nn.ReLU(), nn.Linear(2 * n_in, n_out))

    inn = sequence(512, *[(fm.AllInOneBlock, {"subnet_constructor": wide, "affine_clamping": 1.9}, 0, 8)] * 2)
    tools.shake(inn, 0.02)
    x, c = torch.randn(9, 512), torch.randn(9, 8)
    fast, converted = copy.deepcopy(inn), convert(inn)
    (replaced,) = accelerate(fast).replaced
    assert replaced.into["AffineCoupling"] == 2
    z, logdet = inn(x, c=[c])
    for got in (fast(x, c=[c]), converted(x, c)):
        torch.testing.assert_close(got, (z, logdet), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(z, c=[c], rev=True)[0], x, rtol=1e-4, atol=1e-4)
    networks = [block.subnet for block in inn]
    assert (
        sum(p.numel() for p in fast.parameters()) == sum(p.numel() for n in networks for p in n.parameters()) + 4 * 512
    )
    blocks = sequence(512, *[(fm.AllInOneBlock, {"subnet_constructor": wide, "permute_soft": True})])
    with pytest.raises(ConversionError, match="on a processor is slower"):  # that matrix is none to be saved
        convert(blocks)


def test_fixed_layers(library, tools):
    inn = sequence(
        4,
        (fm.FixedLinearTransform, {"M": torch.randn(4, 4) + 2 * torch.eye(4), "b": torch.randn(4)}),
        (fm.HouseholderPerm, {"n_reflections": 3, "fixed": True}),
        (fm.GLOWCouplingBlock, net()),
        (fm.OrthogonalTransform, {}),
        (fm.HouseholderPerm, {"n_reflections": 2}),
        (fm.LearnedElementwiseScaling, {"init_scale": 1.4}),
        (fm.FixedLinearTransform, {"M": torch.randn(4, 4) + 2 * torch.eye(4)}),
    )
    tools.shake(inn, 0.05).double()
    for i in (3, 4, 5):
        inn[i].requires_grad_(False)
    with torch.no_grad():  # what its correction does after so many steps
        inn[3].weights.copy_(torch.linalg.qr(torch.randn(4, 4).double())[0])
    reading = read_flow(LIBRARY, inn)
    kinds = [type(layer) for layer in reading.layers]
    assert kinds == [Dense, Dense, Coupling, Coupling, Dense, Dense, Diagonal, Dense]
    assert not any(layer.trained for layer in reading.layers if isinstance(layer, Dense | Diagonal))
    tools.same_map(replace(library, tolerance=FLOAT32), inn, torch.randn(16, 4).double(), None)


def test_actnorm_of_both_releases(library, tools):
    inn = sequence(5, (fm.ActNorm, {}), (fm.GLOWCouplingBlock, net()))
    with pytest.raises(ConversionError, match="has not been initialised"):
        convert(inn)
    inn(2 + 3 * torch.randn(50, 5))
    tools.prove(library, tools.shake(inn, 0.1), 5, outline="2")

    class ActNorm(nn.Module):  # (x − loc)/e^log_scale
        def __init__(self):
            super().__init__()
            self.dims_in, self.dims_c, self.init_on_next_batch = [(5,)], [], False
            self.log_scale, self.loc = (nn.Parameter(torch.randn(1, 5)) for _ in range(2))

        def forward(self, x, rev=False, jac=True):
            if rev:
                return (x[0] * self.log_scale.exp() + self.loc,), self.log_scale.sum().expand(len(x[0]))
            return ((x[0] - self.loc) / self.log_scale.exp(),), -self.log_scale.sum().expand(len(x[0]))

    ActNorm.__module__ = "FrEIA.modules.invertible_resnet"
    inn.module_list[0] = ActNorm()
    assert isinstance(read_flow(LIBRARY, inn).layers[0], Diagonal)
    tools.same_map(library, inn.double(), torch.randn(16, 5).double(), None)


def test_graph_that_is_a_chain(library, tools):
    start, first, second = ff.InputNode(5), ff.ConditionNode(2), ff.ConditionNode(3)
    a = ff.Node(start, fm.GLOWCouplingBlock, net(), conditions=[second, first])
    b = ff.Node(a, fm.PermuteRandom, {})
    c = ff.Node(b, fm.RNVPCouplingBlock, net(), conditions=first)
    inn = tools.shake(ff.GraphINN([start, first, second, a, b, c, ff.OutputNode(c)]), 0.1)
    inn.widths = {0: 2, 1: 3}
    tools.prove(library, inn, 5, 5, "2 2")


def test_graph_that_branches_is_refused():
    start = ff.InputNode(6)
    split = ff.Node(start, fm.Split, {})
    left = ff.Node(split.out0, fm.PermuteRandom, {})
    joined = ff.Node([left.out0, split.out1], fm.Concat, {})
    inn = ff.GraphINN([start, split, left, joined, ff.OutputNode(joined)])
    with pytest.raises(ConversionError, match="does not follow"):
        convert(inn)
    report = accelerate(inn)
    assert not report and "(Split): no kernel covers" in str(report)


def test_trained_checkpoint(library, tools):
    def build():
        return sequence(5, (fm.ActNorm, {}), (fm.AllInOneBlock, net()), (fm.AllInOneBlock, net(permute_soft=True)))

    inn = tools.trained(library, build, torch.randn(256, 5).cumsum(1))
    tools.prove(replace(library, tolerance=FLOAT32), inn, 5, outline="2")


def test_kept_blocks_get_their_own_conditions(library, tools):
    inn = sequence(
        4,
        (fm.GLOWCouplingBlock, net(), 0, 2),
        (fm.GINCouplingBlock, net(), 1, 3),
        (fm.ConditionalAffineTransform, net(), 1, 3),
        (fm.HouseholderPerm, {"n_reflections": 2}),
        (fm.AllInOneBlock, net(gin_block=True)),
        (fm.AllInOneBlock, net(learned_householder_permutation=2)),
        PERMUTE,
    )
    reading = read_flow(LIBRARY, tools.shake(inn, 0.1))
    assert [type(layer) for layer in reading.layers] == [Coupling, Coupling, *[Kept] * 5, Permutation]
    reasons = " ".join(layer.reason for layer in reading.layers if isinstance(layer, Kept))
    for part in ("module_list.1 (GINCouplingBlock)", "module_list.3", "gin_block=True", "Householder reflections"):
        assert part in reasons
    tools.same_map(library, inn.double(), torch.randn(16, 4).double(), torch.randn(16, 5).double())


def test_frozen_reflections_are_fused(library, tools):
    """Trained ones are kept: a matrix of ours would not stay a product of reflections."""
    inn = tools.shake(sequence(4, *[(fm.AllInOneBlock, net(learned_householder_permutation=2))] * 2), 0.1)
    with pytest.raises(ConversionError, match="Householder reflections are trained"):
        convert(inn)
    for block in inn:
        block.vk_householder.requires_grad_(False)
    tools.prove(replace(library, tolerance=FLOAT32), inn, 4, outline="2")


def test_matrix_that_is_not_orthogonal_is_kept():
    """The library takes its log-determinant for 0 all the same; a matrix of ours would give the true one."""
    inn = sequence(4, (fm.OrthogonalTransform, {})).requires_grad_(False)
    inn[0].weights.mul_(1.1)
    (kept,) = read_flow(LIBRARY, inn).layers
    assert isinstance(kept, Kept) and "not orthogonal" in kept.reason


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        (fm.GLOWCouplingBlock, net(clamp_activation=lambda u: torch.sin(u)), "clamp_activation is none"),
        (fm.GLOWCouplingBlock, net(split_len=5), "leaves one half empty"),
        (fm.RNVPCouplingBlock, {"subnet_constructor": subnet_of(nn.ReLU(), 9)}, "9 hidden layers"),
        (fm.OrthogonalTransform, {}, "freeze it"),
        (fm.AllInOneBlock, net(gin_block=True), "gin_block=True"),
    ],
)
def test_reasons_of_blocks_that_are_kept(kind, arguments, reason):
    with pytest.raises(ConversionError, match=rf"layer that can be fused\. module_list\.0 .*{reason}"):
        convert(sequence(5, (kind, arguments)))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (fm.Reshape, {"output_dims": (2, 2)}, "only images become another shape"),
        (fm.IResNetLayer, {}, "random estimate"),
    ],
)
def test_refusals_name_the_layer(kind, arguments, message):
    with pytest.raises(ConversionError, match=rf"module_list\.0 \({kind.__name__}\): .*{message}"):
        convert(sequence(4, (kind, arguments)))


@pytest.mark.parametrize("base", [ff.SequenceINN, ff.GraphINN])
def test_classes_made_of_the_library_s_are_read(base):
    kind = type("Mine", (base,), {})
    if base is ff.SequenceINN:
        inn = kind(4)
        inn.append(fm.GLOWCouplingBlock, **net())
    else:
        start = ff.InputNode(4)
        block = ff.Node(start, fm.GLOWCouplingBlock, net())
        inn = kind([start, block, ff.OutputNode(block)])
    x = torch.randn(5, 4)
    torch.testing.assert_close(convert(inn)(x)[0], inn(x)[0])
    wanted = inn(x)[0]
    assert accelerate(inn)
    torch.testing.assert_close(inn(x)[0], wanted)
