"""Rational-quadratic splines: the reference against the paper's properties, the kernels against the reference in float64."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from flow_values import derivatives, error, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import MLP, Spline, SplineCoupling, backends, ops, reference, use_backend
from glf_fast.reference import PARAMETRIZATIONS, TAILS

KINDS = [Spline(tails=tails, parametrization=form) for tails, form in itertools.product(TAILS, PARAMETRIZATIONS)]


def name(kind: Spline) -> str:
    return f"{kind.parametrization}-{kind.tails}"


@pytest.fixture(params=["cpp", "reference"])
def backend(request) -> Iterator[str]:
    if not backends()[request.param].startswith("ready"):
        pytest.skip(backends()[request.param])
    with use_backend(request.param):
        yield request.param


def values(rows: int, columns: int, kind: Spline, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x in and around the box, and parameters."""
    g = torch.Generator().manual_seed(seed)
    size = kind.high - kind.low
    x = kind.low + size * (1.2 * torch.rand(rows, columns, dtype=torch.float64, generator=g) - 0.1)
    parameters = spread * torch.randn(rows, columns, kind.columns, dtype=torch.float64, generator=g)
    return [x.requires_grad_(), parameters.requires_grad_()]


def of(kind: Spline, inverse: bool = False, op=ops.spline):
    """As a function of x and the parameters: y, and log-derivatives summed over rows."""
    if op is ops.spline:
        return lambda x, parameters: op(x, parameters, kind, inverse=inverse, event_dims=1)

    def plain(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = reference.spline(x, parameters, kind, inverse=inverse)
        return y, log_slope.sum(1)

    return plain


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    bins=st.integers(2, 32),
    low=st.sampled_from([0.0, -1.0, -5.0]),
    size=st.sampled_from([1.0, 4.0, 12.0]),
    rows=st.sampled_from([0, 1, 3, 8, 17, 600]),
    columns=st.sampled_from([1, 2, 7]),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
    scale=st.sampled_from([1.0, 0.14]),
    inverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_float64_reference(
    kind, bins, low, size, rows, columns, spread, scale, inverse, seed
) -> None:
    if not backends()["cpp"].startswith("ready"):
        pytest.skip(backends()["cpp"])
    kind = kind._replace(bins=bins, low=low, high=low + size, scale=scale)
    exact = values(rows, columns, kind, spread, seed)
    want = run_op(of(kind, inverse, reference.spline), exact)
    with use_backend("cpp"):
        for mine, truth in zip(run_op(of(kind, inverse), exact), want, strict=True):
            assert mine.shape == truth.shape and error(mine, truth) < 1e-9
        single = [t.detach().float().requires_grad_() for t in exact]
        got = run_op(of(kind, inverse), single)
    # Of the same rounded numbers; derivatives jump at knots, and a number next to one may be found on its other side.
    rounded = [t.detach().double().requires_grad_() for t in single]
    want, plain = (run_op(of(kind, inverse, reference.spline), given) for given in (rounded, single))
    for mine, theirs, truth in zip(got[:2], plain[:2], want[:2], strict=True):
        assert mine.dtype == torch.float32 and error(mine, truth) <= max(
            4 * error(theirs, truth), 1e-5
        )  # sums of few may cancel
    for mine, theirs, truth in zip(got[2:], plain[2:], want[2:], strict=True):
        assert error(mine, truth) <= max(4 * error(theirs, truth), 1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_float32_is_as_good_as_plain_pytorch(kind: Spline) -> None:
    """On average over many splines: their knots are compensated sums."""
    if not backends()["cpp"].startswith("ready"):
        pytest.skip(backends()["cpp"])
    for bins, inverse in itertools.product((3, 8, 32), (False, True)):
        kind = kind._replace(bins=bins)
        single = [t.detach().float() for t in values(20_000, 1, kind)]
        truth = of(kind, inverse, reference.spline)(*(t.double() for t in single))
        theirs = of(kind, inverse, reference.spline)(*single)
        with use_backend("cpp"):
            mine = of(kind, inverse)(*single)
        for a, b, t in zip(mine, theirs, truth, strict=True):
            assert (a - t).abs().mean() <= 1.05 * (b - t).abs().mean(), (bins, inverse)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_the_log_derivative_is_autograd_s_and_the_inverse_undoes_it(kind: Spline, backend: str) -> None:
    x, parameters = (t.detach() for t in values(400, 3, kind))
    x.requires_grad_()
    y, log_slope = ops.spline(x, parameters, kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert error(log_slope, slope.log()) < 1e-10
    again, log_back = ops.spline(y, parameters, kind, inverse=True)
    assert (again - x).abs().max() < 1e-10 and (log_slope + log_back).abs().max() < 1e-9
    outside = (x < kind.low) | (x > kind.high)
    assert outside.any() and torch.equal(y[outside], x[outside]) and not log_slope[outside].any()


def test_parameters_of_zero_are_the_identity(backend: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for kind in KINDS:
        y, log_slope = ops.spline(x, torch.zeros(101, kind.columns, dtype=torch.float64), kind)
        identity = (y - x).abs().max() < 1e-12 and log_slope.abs().max() < 1e-12
        assert identity == PARAMETRIZATIONS[kind.parametrization].identity_at_zero


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_first_and_second_derivatives(kind: Spline, backend: str) -> None:
    for inverse in (False, True):
        # Of four bins, whose formulas do not depend on their number, and away from knots, where second derivatives jump.
        given_ = values(2, 3, kind._replace(bins=4), 0.5, seed=3)
        op = of(kind._replace(bins=4), inverse)
        assert gradcheck(op, given_)
        assert gradgradcheck(op, given_, fast_mode=True)
        want = derivatives(of(kind._replace(bins=4), inverse, reference.spline), given_)
        for mine, truth in zip(derivatives(op, given_), want, strict=True):
            assert error(mine, truth) < 1e-9


def test_knots_ends_and_huge_parameters(backend: str) -> None:
    """On a knot both bins say the same; at the ends the box and the tails do; a softmax of 1e4 overflows nowhere."""
    for kind in KINDS:
        kind = kind._replace(bins=4)
        parameters = torch.zeros(5, kind.columns, dtype=torch.float64)
        x = torch.linspace(kind.low, kind.high, 5, dtype=torch.float64)  # the knots of equal bins
        y, log_slope = ops.spline(x, parameters, kind)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)  # equal heights, whatever the slopes
        assert log_slope.isfinite().all()
        for huge in (1e4, -1e4):
            one = torch.zeros(4, kind.columns, dtype=torch.float32)
            one[:, [0, kind.bins, 2 * kind.bins]] = huge
            at = torch.linspace(-4.9, 4.9, 4, dtype=torch.float32)
            y, _ = ops.spline(at, one, kind)
            assert y.isfinite().all() and (y.abs() <= 5).all()


def test_nan_and_inf_pass_through(backend: str) -> None:
    kind = Spline(bins=3)
    x = torch.tensor([0.3, math.nan, math.inf, -math.inf, -0.7]).requires_grad_()
    parameters = torch.randn(5, kind.columns)
    parameters[4, 2] = math.nan
    parameters.requires_grad_()
    y, log_slope = ops.spline(x, parameters, kind)
    assert y[0].isfinite() and y[1].isnan() and y[2] == math.inf and y[3] == -math.inf and y[4].isnan()
    assert not log_slope[1:4].any() and log_slope[4].isnan()
    _, grad = torch.autograd.grad(y[:1].sum() + log_slope[:1].sum(), (x, parameters))
    assert grad[0].any() and not grad[1:4].any()


def test_any_leading_shape_and_precision(backend: str) -> None:
    kind = Spline(bins=5)
    x, parameters = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, kind.columns)
    y, whole = ops.spline(x, parameters, kind)
    assert y.shape == whole.shape == x.shape
    for dims in range(5):
        summed = ops.spline(x, parameters, kind, event_dims=dims)[1]
        assert summed.shape == x.shape[: 4 - dims]
        torch.testing.assert_close(summed, whole.flatten(4 - dims).sum(-1) if dims else whole)
    torch.testing.assert_close(ops.spline(x.mT, parameters.transpose(2, 3), kind)[0], y.mT)
    torch.testing.assert_close(ops.spline(x, parameters[0, 0, 0], kind)[0][0, 0, 0], y[0, 0, 0])  # one for all rows
    half = ops.spline(x.bfloat16(), parameters.bfloat16(), kind)
    assert half[0].dtype == half[1].dtype == torch.float32
    assert ops.spline(x[0, 0, 0, 0], parameters[0, 0, 0, 0], kind)[0].shape == ()
    assert ops.spline(x[:0], parameters[:0], kind, event_dims=3)[1].shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    x, parameters = torch.zeros(3, 2), torch.zeros(3, 2, 23)
    for wrong, message in (
        ((x, parameters[..., :22], Spline()), r"have x's shape and 23 numbers .* \(3, 2, 23\); got \(3, 2, 22\)"),
        ((x, parameters[:2], Spline()), r"got \(2, 2, 23\)"),
        ((x, parameters, Spline(bins=1)), "bins must be 2 to 32, an int; got 1"),
        ((x, parameters, Spline(bins=33)), "bins must be 2 to 32, an int; got 33"),
        ((x, parameters, Spline(low=1.0, high=1.0)), "low < high <= 1e6; got low=1.0, high=1.0"),
        ((x, parameters, Spline(tails="free")), "tails must be one of 'linear', 'circular', 'none'; got 'free'"),
        ((x, parameters, Spline(parametrization="tfp")), "parametrization must be one of"),
        ((x, parameters, Spline(min_width=0.2)), "min_width of 8 bins must be at least 0 and less than 1/8; got 0.2"),
        ((x, parameters, Spline(min_derivative=1.0)), "min_derivative must be between 0 and 1; got 1.0"),
        ((x, parameters, Spline(parametrization="zuko", min_height=0.1)), "'zuko' has no min_height; got 0.1"),
        ((x, parameters, Spline(bins=8.0)), r"an int; got 8\.0"),
        ((x, parameters, Spline(low="a")), "low must be a number; got 'a'"),
        ((x, parameters, Spline(tails=["linear"])), "tails must be a name"),
        ((x, parameters, Spline(min_derivative=0.0)), "min_derivative must be between 0 and 1; got 0.0"),
        ((x, parameters, Spline(scale=0.0)), "scale must be positive; got 0.0"),
        ((x, parameters, {"bins": 8}), r"must be a glf_fast\.Spline"),
        ((x.int(), parameters, Spline()), "x must be floating-point"),
        ((x, parameters.double(), Spline()), "parameters is torch.float64 but the rest is torch.float32"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            ops.spline(*wrong)
    with pytest.raises(ValueError, match="event_dims must be between 0 and x's 2 dimensions; got 3"):
        ops.spline(x, parameters, Spline(), event_dims=3)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((7,), "channels"),
        ((7,), "booleans"),
        ((6, 4, 4), "channels"),
        ((6, 4, 4), "booleans"),
        ((6, 4, 4), "checkerboard"),
    ],
)
def test_layers_have_any_conditioner(shape: tuple[int, ...], mask: str) -> None:
    torch.manual_seed(0)
    C, kind = shape[0], Spline(bins=3)
    T = C if mask == "checkerboard" else C // 2 if mask == "channels" else 2
    P = C if mask == "checkerboard" else C - T
    booleans = [i in (1, 4) for i in range(C)] if mask == "booleans" else mask
    net = MLP(P, [9], T * kind.columns) if len(shape) == 1 else torch.nn.Conv2d(P, T * kind.columns, 3, padding=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = SplineCoupling(C, net, spline=kind, mask=booleans).double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    z, logdet = layer(x)
    back, logdet_back = layer.inverse(z)
    assert (back - x).abs().max() < 1e-9 and (logdet + logdet_back).abs().max() < 1e-9
    jacobian = torch.func.jacrev(lambda x: layer(x[None])[0][0].flatten())(x[0]).flatten(1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[0])


def test_compiles_to_one_graph(backend: str) -> None:
    kind = Spline(bins=3)
    x, parameters = (t.detach().requires_grad_() for t in values(4, 2, kind))

    def loss(x: Tensor, parameters: Tensor) -> Tensor:
        y, logdet = ops.spline(x, parameters, kind, event_dims=1)
        return (y.square().sum(1) + logdet).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    want, got = (torch.autograd.grad(f(x, parameters), (x, parameters)) for f in (loss, compiled))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12
