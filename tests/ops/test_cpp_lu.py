"""Determinants and inverses in C++ by LAPACK's scaled residuals, and the layers and flows made of them."""

from collections.abc import Iterator

import linear_zoo
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import CouplingFlow, InvertibleLinear, backends, ops, use_backend

pytestmark = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def on_cpp() -> Iterator[None]:
    """Every test runs on the kernels."""
    threads = torch.get_num_threads()
    with use_backend("cpp"):
        yield
    torch.set_num_threads(threads)


def layers(*batch: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """permutation, sign, [lower, upper, log_diag(, log_scale, bias)]; NaN where nothing may be read."""
    g = torch.Generator().manual_seed(dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    order = torch.rand(*batch, dim, generator=g).argsort(-1)
    sign = normal(dim).sign()
    unread = torch.full((dim, dim), float("nan"), dtype=torch.float64)
    lower = torch.where(torch.ones(dim, dim).tril(-1).bool(), normal(dim, dim) / dim**0.5, unread)
    upper = torch.where(torch.ones(dim, dim).triu(1).bool(), normal(dim, dim) / dim**0.5, unread)
    floats = [lower, upper, 0.3 * normal(dim)] + [0.3 * normal(dim) for _ in range(2)]
    return order, sign.to(dtype), [t.to(dtype).requires_grad_() for t in floats]


def assemble(op, made, need_inverse: bool) -> tuple[Tensor, ...]:
    order, sign, (lower, upper, log_diag, *actnorm) = made
    out = op(order, lower, upper, log_diag, sign, *actnorm, need_inverse=need_inverse)
    return tuple(t for t in out if t is not None)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9))


def test_plu_gradients_are_zero_outside_the_triangles() -> None:
    made = layers(4, dim=21)
    lower, upper = torch.autograd.grad(sum(t.sum() for t in assemble(ops.plu_assemble, made, True)), made[2][:2])
    assert torch.equal(lower, lower.tril(-1)) and torch.equal(upper, upper.triu(1))
    assert (lower != 0).sum() == (upper != 0).sum() == 4 * 21 * 10


def test_plu_inverse_is_the_inverse() -> None:
    for dim in (1, 2, 7, 20, 64, 192):
        for dtype in DTYPES:
            A, A_inv, _, logabsdet = assemble(ops.plu_assemble, layers(3, dim=dim, dtype=dtype), True)
            A, A_inv = A.detach(), A_inv.detach()
            assert linear_zoo.inverse_residual(A, A_inv) < linear_zoo.LIMIT
            # Not of torch, whose determinants of more than 160 columns are wrong at times (docs/traps.md).
            assert error(logabsdet.detach(), torch.from_numpy(np.linalg.slogdet(A.double().numpy())[1])) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 128, 129, 192])
def test_the_zoo_by_scaled_residuals(dim: int, dtype: torch.dtype) -> None:
    named = linear_zoo.zoo(dim, dtype)
    if dtype == torch.float32 and dim > 128:
        del named["growth"]  # U reaches 2^(D−1) there: beyond float32
    batch = torch.stack(list(named.values()))
    sign, logabsdet, inverse, info = ops.slogdet_inverse(batch)
    assert not info.any() and inverse.dtype == dtype
    for i, (name, matrix) in enumerate(named.items()):
        exact = torch.linalg.slogdet(matrix.double())
        # log|det| moves by what rounding of A moves it: D ε cond(A).
        tolerance = dim * torch.finfo(dtype).eps * float(torch.linalg.cond(matrix.double())) * 10
        if tolerance < 0.1 and name != "growth":
            assert linear_zoo.inverse_residual(matrix, inverse[i]) < linear_zoo.LIMIT, name
            assert sign[i] == exact.sign, name
            assert abs(logabsdet[i].double() - exact.logabsdet) <= tolerance + abs(exact.logabsdet) * 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 40])
@pytest.mark.parametrize("count", [0, 1, 7, 10_000])
def test_batches_of_every_size(count: int, dim: int, dtype: torch.dtype) -> None:
    count = min(count, 500) if dim > 16 else count
    torch.set_num_threads(2)
    A = torch.randn(count, dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    sign, logabsdet, inverse, info = ops.slogdet_inverse(A)
    assert sign.shape == logabsdet.shape == info.shape == (count,) and inverse.shape == A.shape
    if count:
        assert linear_zoo.inverse_residual(A, inverse) < 30
        assert torch.equal(sign.double(), torch.linalg.slogdet(A.double()).sign)
    # One matrix gives the same alone as among others, and at any number of threads.
    torch.set_num_threads(1)
    again = ops.slogdet_inverse(A)
    for mine, other in zip((sign, logabsdet, inverse, info), again, strict=True):
        assert torch.equal(mine, other)
    if count:
        assert torch.equal(ops.slogdet_inverse(A[-1])[2], inverse[-1])


@pytest.mark.parametrize("dim", [1, 2, 5, 16, 17, 70])
def test_singular_matrices_and_nan(dim: int) -> None:
    A = torch.eye(dim).repeat(5, 1, 1)
    A[1, -1, -1] = 0
    A[2] = 0
    A[3, dim // 2, 0] = float("nan")
    sign, logabsdet, inverse, info = ops.slogdet_inverse(A)
    assert torch.equal(sign[[0, 1, 2, 4]], torch.tensor([1.0, 0, 0, 1]))
    assert torch.equal(logabsdet[[0, 1, 2, 4]], torch.tensor([0.0, -torch.inf, -torch.inf, 0]))
    assert info.tolist()[:3] == [0, dim, 1] and info[4] == 0
    assert logabsdet[3].isnan() and inverse[3].isnan().any()
    assert torch.equal(inverse[4], torch.eye(dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 5, 15, 16, 17])
def test_determinants_beyond_the_range_of_numbers(dim: int, dtype: torch.dtype) -> None:
    limits, inf = torch.finfo(dtype), torch.inf
    sizes = torch.tensor([limits.max, -limits.tiny, limits.smallest_normal * limits.eps, -1.999, 0.501], dtype=dtype)
    diagonals = torch.stack([sizes[torch.arange(i, i + dim) % 5] for i in range(5)] + [s.expand(dim) for s in sizes])
    sign, logabsdet, _, info = ops.slogdet_inverse(torch.diag_embed(diagonals))
    logarithms = diagonals.double().abs().log()
    assert torch.equal(sign, diagonals.sign().prod(-1)) and not info.any()
    # In double the expected sum is rounded, too, at the size of its terms.
    rounding = 4 * dim * limits.eps + torch.finfo(torch.float64).eps * logarithms.abs().sum(-1)
    assert ((logabsdet - logarithms.sum(-1)).abs() <= rounding + 4 * limits.eps * logarithms.sum(-1).abs()).all()
    # A zero, infinity and NaN at the end, where no elimination multiplies them.
    ends = torch.ones(5, dim, dtype=dtype)
    ends[:, -1] = torch.tensor([-0.0, inf, -inf, float("nan"), -1.0], dtype=dtype)
    sign, logabsdet, _, info = ops.slogdet_inverse(torch.diag_embed(ends))
    assert sign.tolist() == [0, 1, -1, 0, -1] and info.tolist() == [dim, 0, 0, 0, 0]
    expected = torch.tensor([-inf, inf, inf, float("nan"), 0], dtype=dtype)
    assert torch.equal(logabsdet.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dim", [1, 4, 18])
def test_dense_gradcheck(batch: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(*batch, dim, dim, dtype=torch.float64) + 2 * torch.eye(dim)
    W.requires_grad_()

    def run(W: Tensor) -> tuple[Tensor, ...]:
        return ops.slogdet_inverse(W)[1:3]

    assert gradcheck(run, (W,), fast_mode=True) and gradgradcheck(run, (W,), fast_mode=True)


def test_strided_matrices() -> None:
    W = torch.randn(6, 5, 5, dtype=torch.float64)
    for view in (W.mT, W[::2], W[:, ::2, ::2]):
        assert error(ops.slogdet_inverse(view)[2], torch.linalg.inv(view)) < 1e-10


def test_opcheck() -> None:
    A = torch.randn(3, 5, 5)
    torch.library.opcheck(torch.ops.glf_fast.slogdet_inverse.default, (A,))


@pytest.mark.parametrize("linear", ["plu", "dense"])
def test_a_compiled_layer_is_the_same(linear: str) -> None:
    torch.manual_seed(0)
    layer, x = InvertibleLinear(6, linear=linear), torch.randn(4, 6)

    def both(x: Tensor) -> tuple[Tensor, ...]:
        z, logdet = layer(x)
        return (*layer.inverse(z), logdet)

    want = both(x)
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    (gradient,) = torch.autograd.grad(got[0].sum() + got[2].sum(), [next(layer.parameters())])
    (expected,) = torch.autograd.grad(want[0].sum() + want[2].sum(), [next(layer.parameters())])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_600_000_right_hand_sides(inverse: bool) -> None:
    A = torch.randn(2, 3, 3, dtype=torch.float64)
    _, logabsdet, A_inv, _ = ops.slogdet_inverse(A)
    c = torch.randn(3, dtype=torch.float64)
    x = torch.randn(600_000, 3, dtype=torch.float64)
    for rows, pixels in ((x, 1), (x.T.reshape(1, 3, 600, 1000), 600_000)):
        matrix = A_inv[1] if inverse else A[1]
        y, logdet = ops.invertible_linear(rows, matrix, c, logabsdet[1], inverse=inverse)
        want = (x - c) @ matrix if inverse else x @ matrix + c
        assert error(y.reshape(3, -1).T if pixels > 1 else y, want) < 1e-14
        torch.testing.assert_close(logdet, (-pixels if inverse else pixels) * logabsdet[1].expand(len(rows)))


@pytest.mark.parametrize("linear", ["plu", "dense"])
def test_a_flow_is_the_same_as_with_the_reference(linear: str) -> None:
    torch.manual_seed(0)
    flow = CouplingFlow(9, 3, (16,), linear=linear).double()
    x = torch.randn(30, 9, dtype=torch.float64)
    flow(x)
    found = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            z, logdet = flow(x)
            back, _ = flow.inverse(x)  # of x, not z: a round trip has no gradient
            loss = (z**2).sum() - logdet.sum() + (back**3).sum()
            found.append([z, logdet, back, *torch.autograd.grad(loss, list(flow.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        assert error(mine.detach(), theirs.detach()) < 1e-9
