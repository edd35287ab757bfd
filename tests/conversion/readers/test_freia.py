"""FrEIA networks are read as the layers that they are: values, gradients of every parameter, inverse; or refused."""

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import nn

from glf_fast.conversion import ConversionError
from glf_fast.conversion.freia import LIBRARY
from glf_fast.conversion.layers import Coupling, Dense, Diagonal, Kept, Permutation
from glf_fast.conversion.reading import read_flow

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning"),  # FrEIA's OrthogonalTransform
    pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning"),  # a network without inputs
]


def subnet(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 9), nn.SiLU(), nn.Linear(9, 6), nn.SiLU(), nn.Linear(6, n_out))


def sequence(dim, *blocks):
    """SequenceINN of (class, arguments) pairs, each with its own condition if `cond` is among the arguments."""
    inn = ff.SequenceINN(dim)
    for kind, arguments in blocks:
        inn.append(kind, **arguments)
    return inn


def net(**arguments):
    return {"subnet_constructor": subnet, **arguments}


def rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim).double())[0]


BLOCKS = {
    "glow": lambda: [(fm.GLOWCouplingBlock, net())],
    "glow tanh": lambda: [(fm.GLOWCouplingBlock, net(clamp_activation="TANH", clamp=1.3))],
    "glow sigmoid": lambda: [(fm.GLOWCouplingBlock, net(clamp_activation="SIGMOID"))],
    "glow callable": lambda: [(fm.GLOWCouplingBlock, net(clamp_activation=lambda u: 2 / np.pi * torch.atan(u / 3)))],
    "glow linear callable": lambda: [(fm.GLOWCouplingBlock, net(clamp_activation=lambda u: 0.2 * u))],
    "rnvp": lambda: [(fm.RNVPCouplingBlock, net()), (fm.PermuteRandom, {})],
    "nice": lambda: [(fm.NICECouplingBlock, net()), (fm.PermuteRandom, {"seed": 3})],
    "one-sided": lambda: [(fm.AffineCouplingOneSided, net(clamp=0.7)), (fm.PermuteRandom, {})],
    "uneven split": lambda: [(fm.GLOWCouplingBlock, net(split_len=1)), (fm.RNVPCouplingBlock, net(split_len=0.3))],
    "all in one": lambda: [(fm.AllInOneBlock, net())],
    "all in one soft": lambda: [(fm.AllInOneBlock, net(permute_soft=True, affine_clamping=1.5))],
    "all in one sigmoid": lambda: [(fm.AllInOneBlock, net(global_affine_type="SIGMOID", global_affine_init=0.8))],
    "all in one exp": lambda: [(fm.AllInOneBlock, net(global_affine_type="EXP", global_affine_init=1.2))],
    "all in one reversed": lambda: [(fm.AllInOneBlock, net(reverse_permutation=True))],
    "all in one reversed soft": lambda: [(fm.AllInOneBlock, net(reverse_permutation=True, permute_soft=True))],
    "one condition": lambda: [(fm.AllInOneBlock, net(cond=0, cond_shape=(3,)))],
    "one of two conditions": lambda: [
        (fm.GLOWCouplingBlock, net(cond=2, cond_shape=(3,))),
        (fm.AllInOneBlock, net()),
        (fm.AllInOneBlock, net(cond=0, cond_shape=(2,))),
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dim", [4, 5, 7])
def test_reading_is_the_network(name, dim, check_reading, randomize):
    torch.manual_seed(dim)
    np.random.seed(dim)
    inn = randomize(sequence(dim, *BLOCKS[name](), *BLOCKS[name]()))
    reading = read_flow(LIBRARY, inn)
    assert not any(isinstance(layer, Kept) for layer in reading.layers)
    # A soft permutation is orthogonal to float32 only, and its log-determinant is taken to be 0.
    check_reading(inn, reading, tolerance=2e-6 if "soft" in name else 1e-9)


@pytest.mark.parametrize("formula", ["released", "newer"])
def test_all_in_one_formula_is_asked_of_the_object(formula, monkeypatch, check_reading, randomize):
    """Up to 0.2 the clamp is c·tanh(u), later c·tanh(u/c), without a trace in the state_dict."""

    def newer(self, x, a, rev=False):
        a = a * 0.1
        ell = self.clamp * torch.tanh(a[:, : x.shape[1]] / self.clamp)
        if rev:
            return (x - a[:, x.shape[1] :]) * torch.exp(-ell), -ell.sum(1)
        return x * torch.exp(ell) + a[:, x.shape[1] :], ell.sum(1)

    if formula == "newer":
        monkeypatch.setattr(fm.AllInOneBlock, "_affine", newer)
    torch.manual_seed(0)
    inn = randomize(sequence(5, (fm.AllInOneBlock, net(affine_clamping=1.7))), 2.0)
    reading = read_flow(LIBRARY, inn)
    coupling = next(layer for layer in reading.layers if isinstance(layer, Coupling))
    assert coupling.log_scale == "tanh" and coupling.log_scale_constant == pytest.approx(1.7)
    check_reading(inn, reading)


def test_fixed_layers(check_reading, randomize):
    torch.manual_seed(0)
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
    randomize(inn, 0.05)
    for i in (3, 4, 5):
        inn[i].requires_grad_(False)
    with torch.no_grad():
        inn[3].weights.copy_(rotation(4))  # what its correction does after so many steps
    reading = read_flow(LIBRARY, inn)
    kinds = [type(layer) for layer in reading.layers]
    assert kinds == [Dense, Dense, Coupling, Coupling, Dense, Dense, Diagonal, Dense]
    assert not any(layer.trained for layer in reading.layers if isinstance(layer, Dense | Diagonal))
    check_reading(inn, reading, tolerance=2e-6)  # stored inverses and log-determinants are float32


def test_actnorm_of_both_releases(check_reading, randomize):
    torch.manual_seed(0)
    inn = sequence(5, (fm.ActNorm, {}), (fm.GLOWCouplingBlock, net()))
    with pytest.raises(ConversionError, match="has not been initialised"):
        read_flow(LIBRARY, inn)
    inn(2 + 3 * torch.randn(50, 5))
    randomize(inn)
    check_reading(inn, read_flow(LIBRARY, inn))

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
    inn.module_list[0] = ActNorm().double()
    reading = read_flow(LIBRARY, inn)
    assert isinstance(reading.layers[0], Diagonal)
    check_reading(inn, reading)


def test_graph_that_is_a_chain(check_reading, randomize):
    torch.manual_seed(0)
    start, first, second = ff.InputNode(6), ff.ConditionNode(2), ff.ConditionNode(3)
    a = ff.Node(start, fm.GLOWCouplingBlock, net(), conditions=[second, first])
    b = ff.Node(a, fm.PermuteRandom, {})
    c = ff.Node(b, fm.RNVPCouplingBlock, net(), conditions=first)
    inn = randomize(ff.GraphINN([start, first, second, a, b, c, ff.OutputNode(c)]))
    reading = read_flow(LIBRARY, inn)
    assert reading.context_shape == (5,) and sum(isinstance(layer, Coupling) for layer in reading.layers) == 4
    check_reading(inn, reading)


def test_graph_that_branches_is_refused():
    start = ff.InputNode(6)
    split = ff.Node(start, fm.Split, {})
    left = ff.Node(split.out0, fm.PermuteRandom, {})
    joined = ff.Node([left.out0, split.out1], fm.Concat, {})
    with pytest.raises(ConversionError, match="does not follow"):
        read_flow(LIBRARY, ff.GraphINN([start, split, left, joined, ff.OutputNode(joined)]))


def test_trained_checkpoint_is_loaded_before_it_is_read(tmp_path, check_reading):
    torch.manual_seed(0)

    def build():
        return sequence(5, *[(fm.ActNorm, {}), (fm.AllInOneBlock, net()), (fm.AllInOneBlock, net(permute_soft=True))])

    inn = build()
    optimizer = torch.optim.Adam([p for p in inn.parameters() if p.requires_grad], 1e-2)
    for _ in range(20):
        z, jac = inn(torch.randn(64, 5).cumsum(1))
        optimizer.zero_grad()
        (0.5 * z.square().sum(1) - jac).mean().backward()
        optimizer.step()
    torch.save(inn.state_dict(), tmp_path / "inn.pt")
    loaded = build()
    loaded.load_state_dict(torch.load(tmp_path / "inn.pt"))
    check_reading(loaded.double(), read_flow(LIBRARY, loaded), tolerance=2e-6)


def test_kept_blocks_get_their_own_conditions(check_reading, randomize):
    torch.manual_seed(0)
    inn = sequence(
        4,
        (fm.GLOWCouplingBlock, net(cond=0, cond_shape=(2,))),
        (fm.GINCouplingBlock, net(cond=1, cond_shape=(3,))),
        (fm.ConditionalAffineTransform, net(cond=1, cond_shape=(3,))),
        (fm.HouseholderPerm, {"n_reflections": 2}),
        (fm.AllInOneBlock, net(gin_block=True)),
        (fm.AllInOneBlock, net(learned_householder_permutation=2)),
        (fm.PermuteRandom, {}),
    )
    randomize(inn)
    reading = read_flow(LIBRARY, inn)
    assert [type(layer) for layer in reading.layers] == [Coupling, Coupling, *[Kept] * 5, Permutation]
    reasons = " ".join(layer.reason for layer in reading.layers if isinstance(layer, Kept))
    for part in ("module_list.1 (GINCouplingBlock)", "module_list.3", "gin_block=True", "Householder reflections"):
        assert part in reasons
    check_reading(inn, reading)


def test_matrix_that_is_not_orthogonal_is_kept():
    """The library takes its log-determinant for 0 all the same; a matrix of ours would give the true one."""
    inn = sequence(4, (fm.OrthogonalTransform, {})).requires_grad_(False)
    inn[0].weights.mul_(1.1)
    (kept,) = read_flow(LIBRARY, inn).layers
    assert isinstance(kept, Kept) and "not orthogonal" in kept.reason


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ((fm.GLOWCouplingBlock, net(clamp_activation=lambda u: torch.sin(u))), "clamp_activation is none"),
        ((fm.GLOWCouplingBlock, net(split_len=5)), "leaves one half empty"),
        ((fm.RNVPCouplingBlock, {"subnet_constructor": nn.Linear}), "0 hidden layers"),
        ((fm.OrthogonalTransform, {}), "freeze it"),
    ],
)
def test_reasons_of_blocks_that_are_kept(block, reason):
    (kept,) = read_flow(LIBRARY, sequence(5, block)).layers
    assert isinstance(kept, Kept) and reason in kept.reason and "module_list.0" in kept.reason


@pytest.mark.parametrize(
    ("shape", "block", "message"),
    [
        ((4,), (fm.Reshape, {"output_dims": (2, 2)}), "only images become another shape"),
        ((4,), (fm.IResNetLayer, {}), "random estimate"),
    ],
)
def test_refusals_name_the_layer(shape, block, message):
    inn = ff.SequenceINN(*shape)
    inn.append(block[0], **block[1])
    with pytest.raises(ConversionError, match=message):
        read_flow(LIBRARY, inn)
