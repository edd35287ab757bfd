"""The spline kernels, interpreted, against the float64 reference: every formula, edge and precision."""

import itertools
from functools import partial

import pytest
import torch
from flow_values import derivatives
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from glf_fast import ops, use_backend
from glf_fast.kernels.launch import count_launches, launch
from glf_fast.kernels.spline import constants, spline_backward_kernel, spline_kernel, splines_backward, splines_forward
from glf_fast.reference import PARAMETRIZATIONS, TAILS, Spline

pytestmark = pytest.mark.usefixtures("interpreted")
BINS = (2, 5, 10, 32)
# Every pair of parametrization and tails in both directions, with the numbers of bins in turn.
FORMULAS = [
    (*kind, BINS[(i + i // 6) % 4]) for i, kind in enumerate(itertools.product(PARAMETRIZATIONS, TAILS, (False, True)))
]
BOTH = ("linear", "nflows", False), ("circular", "zuko", True), ("none", "madnis", True)


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def drawn(options: Spline, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x, some of it outside the box, and parameters, in float64."""
    g = torch.Generator().manual_seed(seed)
    middle, half = (options.low + options.high) / 2, (options.high - options.low) / 2
    x = middle + 0.7 * half * torch.randn(rows, columns, dtype=torch.float64, generator=g)
    return x, torch.randn(rows, columns, options.columns, dtype=torch.float64, generator=g)


def passes(
    backend: str, x: Tensor, parameters: Tensor, options: Spline, inverse: bool, event_dims: int = 1
) -> list[Tensor]:
    """y, logdet, ∂x and ∂parameters, with gradients that are not in order."""
    leaves = [t.detach().requires_grad_() for t in (x, parameters)]
    with use_backend(backend):
        out = ops.spline(*leaves, options, inverse=inverse, event_dims=event_dims)
        g = torch.Generator().manual_seed(5)
        grads = [torch.randn((*t.shape, 2), generator=g)[..., 0].to(t.dtype) for t in out]
        found = torch.autograd.grad(out, leaves, grads)
    return [*(t.detach() for t in out), *found]


@pytest.mark.parametrize(("parametrization", "tails", "inverse", "bins"), FORMULAS)
def test_every_formula(parametrization: str, tails: str, inverse: bool, bins: int) -> None:
    options = Spline(bins, -1.5, 3.0, tails, parametrization, scale=0.7)
    x, parameters = drawn(options, 4, 6)
    exact = passes("reference", x, parameters, options, inverse)
    with count_launches() as launches:
        ours = passes("triton", x, parameters, options, inverse)
    assert launches == ["spline_kernel", "spline_backward_kernel"]
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.shape == truth.shape and error(mine, truth) < 1e-12
    # In float32, with an error of the plain formulas' size.
    plain, single = (passes(name, x.float(), parameters.float(), options, inverse) for name in ("reference", "triton"))
    for mine, other, truth in zip(single, plain, exact, strict=True):
        assert mine.dtype == torch.float32 and error(mine, truth) < 5e-7 + 5 * error(other, truth)


@pytest.mark.parametrize(("tails", "parametrization", "inverse"), BOTH)
def test_knots_and_ends_of_the_box(tails: str, parametrization: str, inverse: bool) -> None:
    """Equal bins, whose knots are exact numbers: x at every knot, at both ends, next to all, and outside."""
    options = Spline(8, -4.0, 4.0, tails, parametrization, min_width=0.0 if parametrization == "zuko" else None)
    knots = torch.arange(-5, 6, dtype=torch.float64)
    beside = [torch.nextafter(knots, knots + by) for by in (-1, 1)]
    x = torch.cat([knots, *beside, torch.tensor([-1e300, 1e300, 0.3], dtype=torch.float64)])[None]
    parameters = torch.zeros(*x.shape, options.columns, dtype=torch.float64)
    parameters[..., 16:] = torch.randn(
        options.columns - 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    exact = passes("reference", x, parameters, options, inverse, 0)
    for mine, truth in zip(passes("triton", x, parameters, options, inverse, 0), exact, strict=True):
        # Either bin may have a knot: y, y' and the knot's own slope agree, other gradients belong to one of them.
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
    outside = (x < -4) | (x > 4)
    assert torch.equal(exact[0][outside], x[outside]) and not exact[3][outside].any()


@pytest.mark.parametrize(("shape", "event_dims"), [((3, 1), 1), ((2, 40), 1), ((1, 150), 1), ((5, 2, 3), 2), ((7,), 0)])
def test_rows_of_any_length(shape: tuple[int, ...], event_dims: int) -> None:
    """Several rows in a program, one, and several programs in a row."""
    options = Spline(3, tails="none")
    x, parameters = (t.view(*shape, *t.shape[2:]) for t in drawn(options, 1, torch.Size(shape).numel()))
    exact = passes("reference", x, parameters, options, False, event_dims)
    ours = passes("triton", x, parameters, options, False, event_dims)
    again = passes("triton", x, parameters, options, False, event_dims)
    for mine, repeated, truth in zip(ours, again, exact, strict=True):
        assert error(mine, truth) < 1e-13 and torch.equal(mine, repeated)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batches_and_rows(shape: tuple[int, int]) -> None:
    options = Spline(4)
    y, logdet, grad_x, grad_parameters = passes("triton", *drawn(options, *shape), options, True)
    assert y.shape == grad_x.shape == shape and grad_parameters.shape == (*shape, 11)
    assert torch.equal(logdet, torch.zeros(shape[0], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which the interpreter computes with
@pytest.mark.parametrize(("tails", "parametrization", "inverse"), BOTH)
def test_huge_and_bad_numbers_are_the_reference_s(tails: str, parametrization: str, inverse: bool) -> None:
    options = Spline(4, -2.0, 2.0, tails, parametrization)
    x, parameters = drawn(options, 1, 3 + 4 * options.columns)
    x.clamp_(-1.9, 1.9)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for i in range(options.columns):
        parameters[0, 3 + 4 * i : 7 + 4 * i, i] = torch.tensor([torch.nan, 1e4, -1e4, -torch.inf])
    with use_backend("reference"):
        exact = ops.spline(x, parameters, options, inverse=inverse)
    for mine, truth in zip(ops.spline(x, parameters, options, inverse=inverse), exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10, equal_nan=True)
    finite = exact[1].isfinite()[..., None].expand_as(parameters)
    grads = [passes(name, x, parameters, options, inverse, 0)[3] for name in ("triton", "reference")]
    torch.testing.assert_close(*(g[finite].nan_to_num() for g in grads), rtol=1e-7, atol=1e-9)


def test_derivatives_of_both_orders() -> None:
    """As the reference's, which are PyTorch's own."""
    for tails, parametrization, inverse in BOTH:
        options = Spline(3, tails=tails, parametrization=parametrization)
        leaves = [t.requires_grad_() for t in drawn(options, 2, 2)]
        call = partial(ops.spline, options=options, inverse=inverse)
        ours = derivatives(call, leaves)
        with use_backend("reference"):
            exact = derivatives(call, leaves)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_opcheck() -> None:
    options = Spline(3)
    x, parameters = (t.float() for t in drawn(options, 2, 3))
    arguments = (x, parameters, options.prepared().numbers(), False)
    checks = ("test_schema", "test_faketensor")  # gradients are registered outside the op, in an autograd.Function
    torch.library.opcheck(torch.ops.glf_fast.triton_spline.default, arguments, test_utils=checks)
    gradients = torch.ops.glf_fast.triton_spline.default(*arguments)
    backward = torch.ops.glf_fast.triton_spline_backward.default
    torch.library.opcheck(backward, (*gradients, *arguments), test_utils=checks)


def test_compiles_in_one_graph_with_sizes_that_change() -> None:
    torch.compiler.reset()
    options = Spline(3, parametrization="zuko")
    count = CompileCounterWithBackend("aot_eager")
    run = partial(ops.spline, options=options, event_dims=1)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    compilations = []
    for rows in (3, 5, 7):
        x, parameters = (t.requires_grad_() for t in drawn(options, rows, 2))
        for ours, theirs in zip(compiled(x, parameters), run(x, parameters), strict=True):
            torch.testing.assert_close(ours, theirs)
        compilations.append(count.frame_count)
    assert compilations[0] == compilations[-1], "the first graph serves all sizes"


def test_numbers_beyond_2_to_the_31_are_reached() -> None:
    """Rows of 2²⁹ columns, of which the kernels are told to compute the first two: all memory between them is never touched."""
    options, columns = Spline(2), 1 << 29
    near = [t.float() for t in drawn(options, 2, 2)]
    numbers = options.prepared().numbers()
    near_grads = torch.randn(2, 2), torch.randn(2)
    wanted = [*splines_forward(*near, numbers, False), *splines_backward(*near_grads, *near, numbers, False)]

    def far(shape: tuple[int, ...], content: Tensor | None = None) -> Tensor:
        """Two rows so far apart, begun by the content."""
        row = columns * torch.Size(shape[2:]).numel()
        strides = (row, 5, 1) if len(shape) == 3 else (row, 1)
        made = torch.empty(0).set_(torch.UntypedStorage(4 * (row + 16)), 0, shape, strides)
        return made if content is None else made.copy_(content)

    x, parameters, grad_y = (far(t.shape, t) for t in (*near, near_grads[0]))
    y, logdet, grad_x, grad_parameters = far((2, 2)), torch.empty(2), far((2, 2)), far((2, 2, 5))
    made = {"SPLINE": constants(numbers), "INVERSE": False, "BM": 1, "BC": 2, "num_warps": 1}
    sizes = (2, columns, 1)
    launch(spline_kernel, 2, x, x, parameters, y, logdet, *sizes, **made)
    launch(spline_backward_kernel, 2, x, grad_y, near_grads[1], x, parameters, grad_x, grad_parameters, *sizes, **made)
    for mine, truth in zip((y, logdet, grad_x, grad_parameters), wanted, strict=True):
        assert torch.equal(mine, truth)
