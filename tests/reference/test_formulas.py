"""The reference against formulas and libraries that share no code with it."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from nflows.nn.nets import resnet
from torch import Tensor

from glf_fast import reference


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u))


FORMULAS = {
    "tanh": lambda u, s=2.0: s * math.tanh(u / s),
    "exp": lambda u: u,
    "glow": lambda u, s=2.0: math.log(sigmoid(u + s)),
    "nflows": lambda u, eps=1e-3: math.log(sigmoid(u + 2) + eps),
    "atan": lambda u, s=2.0: s * 0.636 * math.atan(u),
    "softclip": lambda u, m=1e-3: u / (1 + abs(u / math.log(m))),
    "jet": lambda u: math.log(2 * sigmoid(u)),
    "softplus": lambda u, eps=1e-3: math.log(math.log(1 + math.exp(u)) + eps),
    "clamp": lambda u: min(max(u, -5.0), 3.0),
    "bayesflow": lambda u: math.log(math.log1p(math.exp(math.asinh(u) + math.log(math.e - 1)))),
}
# Beyond these, whatever u is, no log-scale goes (None: unbounded on that side).
BOUNDS = {
    "tanh": (-2.0, 2.0),
    "glow": (None, 0.0),
    "nflows": (math.log(1e-3), math.log(1.001)),
    "atan": (-2.0, 2.0),
    "softclip": (math.log(1e-3), -math.log(1e-3)),
    "jet": (None, math.log(2)),
    "softplus": (math.log(1e-3), None),
    "clamp": (-5.0, 3.0),
    "bayesflow": (None, None),
}


def test_every_log_scale_has_a_formula_here() -> None:
    assert FORMULAS.keys() == reference.LOG_SCALES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_log_scale_values(name: str) -> None:
    u = [-7.0, -2.5, -0.3, 0.0, 0.1, 1.7, 6.0]
    got = reference.log_scale(torch.tensor(u, dtype=torch.float64), name)
    np.testing.assert_allclose(got, [FORMULAS[name](v) for v in u], rtol=1e-12, atol=1e-15)
    if reference.LOG_SCALES[name] is not None:
        got = reference.log_scale(torch.tensor(u, dtype=torch.float64), name, 0.4)
        np.testing.assert_allclose(got, [FORMULAS[name](v, 0.4) for v in u], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", BOUNDS)
def test_log_scale_bounds_and_gradients_survive_large_inputs(name: str) -> None:
    u = torch.tensor([-1e4, -90.0, 90.0, 1e4], requires_grad=True)
    ell = reference.log_scale(u, name)
    low, high = BOUNDS[name]
    assert ell.isfinite().all()
    assert low is None or (ell >= low - 1e-5).all()
    assert high is None or (ell <= high + 1e-5).all()
    ell.sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("add_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
def test_affine_coupling_by_hand(shape: tuple[int, ...], add_first: bool) -> None:
    torch.manual_seed(0)
    v, u, t = torch.randn(3, *shape, dtype=torch.float64)
    w, logdet = reference.affine_coupling(v, u, t, log_scale="exp", add_first=add_first)
    V, T, scale = v.numpy(), t.numpy(), np.exp(u.numpy())
    expected = (V + T) * scale if add_first else V * scale + T
    np.testing.assert_allclose(w, expected, rtol=1e-13)
    np.testing.assert_allclose(logdet, u.numpy().reshape(shape[0], -1).sum(1), rtol=1e-12)
    back, logdet_back = reference.affine_coupling(w, u, t, log_scale="exp", add_first=add_first, inverse=True)
    np.testing.assert_allclose(back, v, rtol=1e-10)
    np.testing.assert_allclose(logdet_back, -logdet, rtol=1e-13)


def test_mlp_is_a_chain_of_linears() -> None:
    torch.manual_seed(0)
    linears = [torch.nn.Linear(3, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)]
    x = torch.randn(7, 3)
    expected = linears[2](F.silu(linears[1](F.silu(linears[0](x)))))
    got = reference.mlp(x, [layer.weight.T for layer in linears], [layer.bias for layer in linears], "silu")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_residual_is_the_network_of_nflows(context_dim: int, blocks: int, activation: str) -> None:
    torch.manual_seed(0)
    options = {"context_features": context_dim or None, "num_blocks": blocks, "activation": getattr(F, activation)}
    net = resnet.ResidualNet(3, 4, 6, **options).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, context = torch.randn(7, 3).double(), torch.randn(7, context_dim).double() if context_dim else None
    inner = [m for b in net.blocks for m in (*b.linear_layers, *([b.context_layer] if context_dim else []))]
    linears = [net.initial_layer, *inner, net.final_layer]
    h = x if context is None else torch.cat([x, context], 1)
    got = reference.residual(h, [m.weight.T for m in linears], [m.bias for m in linears], context, activation)
    torch.testing.assert_close(got, net(x, context), rtol=1e-13, atol=1e-13)


def plu_parameters(K: int, D: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    real = {"dtype": torch.float64, "generator": g}
    return {
        "permutation": torch.stack([torch.randperm(D, generator=g) for _ in range(K)]),
        "lower": torch.randn(K, D, D, **real) / D,
        "upper": torch.randn(K, D, D, **real) / D,
        "log_diag": 0.3 * torch.randn(K, D, **real),
        "sign": torch.randn(K, D, **real).sign(),
        "log_scale": 0.3 * torch.randn(K, D, **real),
        "bias": torch.randn(K, D, **real),
    }


@pytest.mark.parametrize("D", [1, 2, 3, 8, 33])
def test_plu_assemble_is_the_product_of_its_factors(D: int) -> None:
    p = plu_parameters(3, D)
    A, A_inv, c, logabsdet = reference.plu_assemble(**p)
    for k in range(3):
        n = {name: tensor[k].numpy() for name, tensor in p.items()}
        L = np.tril(n["lower"], -1) + np.eye(D)
        U = np.triu(n["upper"], 1) + np.diag(n["sign"] * np.exp(n["log_diag"]))
        P = np.zeros((D, D))
        P[np.arange(D), n["permutation"]] = 1
        W = P @ L @ U
        np.testing.assert_allclose(A[k], np.diag(np.exp(n["log_scale"])) @ W, atol=1e-12)
        np.testing.assert_allclose(A_inv[k] @ A[k], np.eye(D), atol=1e-9)
        np.testing.assert_allclose(c[k], (n["bias"] * np.exp(n["log_scale"])) @ W, atol=1e-12)
        np.testing.assert_allclose(logabsdet[k], np.linalg.slogdet(A[k])[1], atol=1e-10)
    # ActNorm, then the linear layer, by their definitions.
    x = torch.randn(5, D, dtype=torch.float64)
    without, _, zero, _ = reference.plu_assemble(**{**p, "log_scale": None, "bias": None})
    assert not zero.any()
    expected = ((x + p["bias"][1]) * p["log_scale"][1].exp()) @ without[1]
    torch.testing.assert_close(x @ A[1] + c[1], expected)


def test_plu_reads_only_the_strict_triangles() -> None:
    p = plu_parameters(2, 6)
    expected = reference.plu_assemble(**p)
    p["lower"] += torch.triu(torch.full((6, 6), 1e3, dtype=torch.float64))
    p["upper"] += torch.tril(torch.full((6, 6), 1e3, dtype=torch.float64))
    for got, want in zip(reference.plu_assemble(**p), expected, strict=True):
        assert torch.equal(got, want)


def test_plu_undoes_scipys_decomposition() -> None:
    W = np.random.default_rng(0).normal(size=(7, 7))
    P, L, U = scipy.linalg.lu(W)
    d = np.diag(U)
    A, A_inv, _, logabsdet = reference.plu_assemble(
        torch.from_numpy(P.argmax(1)), torch.from_numpy(L), torch.from_numpy(U),
        torch.from_numpy(np.log(np.abs(d))), torch.from_numpy(np.sign(d)),
    )  # fmt: skip
    np.testing.assert_allclose(A, W, atol=1e-12)
    np.testing.assert_allclose(A_inv, np.linalg.inv(W), atol=1e-10)
    np.testing.assert_allclose(logabsdet, np.linalg.slogdet(W)[1], atol=1e-12)


def test_slogdet_inverse_and_its_gradients() -> None:
    torch.manual_seed(0)
    W = torch.randn(4, 5, 5, dtype=torch.float64, requires_grad=True)
    sign, logabsdet, inverse, info = reference.slogdet_inverse(W)
    determinants = np.linalg.det(W.detach().numpy())
    np.testing.assert_allclose(sign, np.sign(determinants))
    np.testing.assert_allclose(logabsdet.detach().numpy(), np.log(np.abs(determinants)), rtol=1e-10)
    np.testing.assert_allclose((inverse @ W).detach().numpy(), np.broadcast_to(np.eye(5), (4, 5, 5)), atol=1e-10)
    assert not info.any()
    g, G = torch.randn(4, dtype=torch.float64), torch.randn(4, 5, 5, dtype=torch.float64)
    ((g * logabsdet).sum() + (G * inverse).sum()).backward()
    inverse = inverse.detach()
    expected = g.view(4, 1, 1) * inverse.mT - inverse.mT @ G @ inverse.mT
    torch.testing.assert_close(W.grad, expected)


def test_singular_matrices_are_reported_not_raised() -> None:
    W = torch.zeros(2, 3, 3)
    W[1] = torch.eye(3)
    sign, logabsdet, _, info = reference.slogdet_inverse(W)
    assert sign.tolist() == [0, 1]
    assert logabsdet.tolist() == [-math.inf, 0]
    assert info[0] > 0
    assert info[1] == 0


def test_permutation_matrix_moves_rows() -> None:
    order = torch.tensor([2, 0, 3, 1])
    M = torch.arange(8.0).view(4, 2)
    torch.testing.assert_close(reference.permutation_matrix(order, torch.float32) @ M, M[order])


def test_invertible_linear_on_images_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    W, c = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y, logdet = reference.invertible_linear(x, W, c, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(y, F.conv2d(x, W.T[:, :, None, None], c))
    assert logdet.tolist() == pytest.approx([0.7 * 15] * 2)
    back, logdet_back = reference.invertible_linear(
        y, torch.linalg.inv(W), c, torch.tensor(0.7, dtype=torch.float64), inverse=True
    )
    torch.testing.assert_close(back, x)
    assert logdet_back.tolist() == pytest.approx([-0.7 * 15] * 2)


@pytest.mark.parametrize("add_first", [False, True])
def test_coupling_flow_by_hand(add_first: bool) -> None:
    """Two steps in numpy, from the formulas of the docstring."""
    rng = np.random.default_rng(0)
    D, C, H, B = 5, 2, 4, 3
    A, c = rng.normal(size=(2, D, D)), rng.normal(size=(2, D))
    W1, b1 = rng.normal(size=(2, 3 + C, H)), rng.normal(size=(2, H))
    W2, b2 = rng.normal(size=(2, H, 4)), rng.normal(size=(2, 4))
    x, context = rng.normal(size=(B, D)), rng.normal(size=(B, C))
    z, logdet = x, np.zeros(B)
    for k in range(2):
        y = z @ A[k] + c[k]
        raw = np.maximum(np.concatenate([y[:, :3], context], 1) @ W1[k] + b1[k], 0) @ W2[k] + b2[k]
        ell, t = 2 * np.tanh(raw[:, :2] / 2), raw[:, 2:]
        v = (y[:, 3:] + t) * np.exp(ell) if add_first else y[:, 3:] * np.exp(ell) + t
        z, logdet = np.concatenate([y[:, :3], v], 1), logdet + ell.sum(1)
    tensors = [torch.from_numpy(a) for a in (A, c, W1, W2, b1, b2, context)]
    A_, c_, W1_, W2_, b1_, b2_, context_ = tensors
    got, got_logdet = reference.coupling_flow(
        torch.from_numpy(x), A_, c_, [W1_, W2_], [b1_, b2_], context_, add_first=add_first
    )
    np.testing.assert_allclose(got, z, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(got_logdet, logdet, rtol=1e-11, atol=1e-11)
    back, back_logdet = reference.coupling_flow_inverse(
        got, torch.linalg.inv(A_), c_, [W1_, W2_], [b1_, b2_], context_, add_first=add_first
    )
    np.testing.assert_allclose(back, x, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(back_logdet, -logdet, rtol=1e-8, atol=1e-8)


def test_two_networks_and_additive_couplings_by_hand() -> None:
    rng = np.random.default_rng(0)
    D, H, B = 5, 4, 3
    A, c, x = np.eye(D)[None], np.zeros((1, D)), rng.normal(size=(B, D))
    W1, b1 = rng.normal(size=(1, 2, 3, H)), rng.normal(size=(1, 2, H))
    W2, b2 = rng.normal(size=(1, 2, H, 2)), rng.normal(size=(1, 2, 2))
    u, t = (np.maximum(x[:, :3] @ W1[0, i] + b1[0, i], 0) @ W2[0, i] + b2[0, i] for i in range(2))
    x_, A_, c_, *layers = (torch.from_numpy(a) for a in (x, A, c, W1, W2, b1, b2))
    for coupling, layers_, z, logdet in (
        ("separate", layers, np.concatenate([x[:, :3], x[:, 3:] * np.exp(u) + t], 1), u.sum(1)),
        ("additive", [layer[:, 1] for layer in layers], np.concatenate([x[:, :3], x[:, 3:] + t], 1), np.zeros(B)),
    ):
        options = {"coupling": coupling, "log_scale": "exp"}
        got, got_logdet = reference.coupling_flow(x_, A_, c_, layers_[:2], layers_[2:], **options)
        np.testing.assert_allclose(got, z, rtol=1e-12)
        np.testing.assert_allclose(got_logdet, logdet, rtol=1e-12)
        back, back_logdet = reference.coupling_flow_inverse(got, A_, c_, layers_[:2], layers_[2:], **options)
        np.testing.assert_allclose(back, x, rtol=1e-12)
        np.testing.assert_allclose(back_logdet, -logdet, rtol=1e-12)


def test_affine_maps_keep_their_precision_under_autocast() -> None:
    p = {name: t.float() if t.is_floating_point() else t for name, t in plu_parameters(2, 6).items()}
    expected = reference.plu_assemble(**p)
    W = torch.randn(2, 6, 6)
    folded = reference.fold_actnorm(W, None, W[:, 0, 0], p["log_scale"], p["bias"])[2]
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(reference.plu_assemble(**p), expected, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(reference.fold_actnorm(W, None, W[:, 0, 0], p["log_scale"], p["bias"])[2], folded)
