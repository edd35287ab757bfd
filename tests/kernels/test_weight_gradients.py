"""The backward's gradients of parameters in one launch of a CUDA kernel, on the host, against Triton's products and float64."""

from collections.abc import Iterator

import pytest
import torch
from flow_values import DIRECTIONS, error, run, tensors
from host_launches import launcher
from pairs import pairs
from torch import Tensor

from glf_fast import Spline, ops, reference
from glf_fast.kernels import portions as dividing
from glf_fast.kernels.launch import count_launches
from glf_fast.kernels.weight_gradients import InOneLaunch
from glf_fast.ops import row_products
from glf_fast.ops.row_products import cupy as cupy_products

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def one_launch(host_kernels, monkeypatch) -> Iterator[list[list[int]]]:
    """glf_fast::row_products runs on the host, as CuPy launches it; each call's operands."""
    seen: list[list[int]] = []

    def row_products_here(x, g, operands, products, sums, accumulate, parts) -> None:
        seen.append(operands)
        cupy_products.row_products(x, g, operands, products, sums, accumulate, parts)

    monkeypatch.setattr(cupy_products, "launch", launcher(host_kernels, lambda threads, shared: None))
    monkeypatch.setattr(row_products, "ready", lambda x: x.dtype == torch.float32)
    with torch.library._scoped_library("glf_fast", "IMPL") as library:
        library.impl("row_products", row_products_here, "CPU")
        yield seen


def both(values: list[Tensor | None], direction: str, one_launch: list[list[int]], **options) -> None:
    """Outputs and gradients are those of Triton's own products, and as near to float64."""
    op = getattr(ops, DIRECTIONS[direction])
    before = len(one_launch)
    got = run(op, values, **options)
    assert len(one_launch) > before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_products, "ready", lambda x: False)
        with count_launches() as launched:
            own = run(op, values, **options)
    assert "sums_kernel" in launched
    exact = [None if t is None else t.detach().double().requires_grad_() for t in values]
    options.pop("reversible", None)
    truth = run(getattr(reference, DIRECTIONS[direction]), exact, **options)
    for mine, other, best in zip(got, own, truth, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert error(mine, other) < 2e-6
        assert error(mine, best) < max(2 * error(other, best), 2e-6)


@pytest.mark.parametrize(
    ("hidden", "context_dim", "direction", "reversible"),
    pairs([(9,), (70, 20), (5, 40, 18), (16, 17, 34, 3)], [0, 17], [*DIRECTIONS], [False, True]),
)
def test_every_depth(one_launch, hidden: tuple[int, ...], context_dim: int, direction: str, reversible: bool) -> None:
    values = tensors(19, 2, 7, context_dim, hidden, torch.float32)
    both(values, direction, one_launch, activation="silu", reversible=reversible)
    assert all(operands == [0] * (len(hidden) + 2) for operands in one_launch)


@pytest.mark.parametrize("coupling", ["separate", "additive"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_other_couplings(one_launch, direction: str, coupling: str) -> None:
    both(tensors(5, 2, 5, 2, (9,), torch.float32, coupling=coupling), direction, one_launch, coupling=coupling)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_splines(one_launch, direction: str) -> None:
    spline = Spline(bins=4)
    values = tensors(19, 1, 6, 2, (17,), torch.float32, coupling="spline", spline=spline)
    both(values, direction, one_launch, coupling="spline", spline=spline)


@pytest.mark.parametrize("reversible", [False, True])
def test_in_portions_of_rows_and_steps(one_launch, monkeypatch, reversible: bool) -> None:
    """Steps of their own, and rows that are added to those before."""
    monkeypatch.setattr(dividing, "WORKSPACE_BYTES", 1)
    for direction in DIRECTIONS:
        both(tensors(20, 2, 5, 2, (9, 9), torch.float32), direction, one_launch, reversible=reversible)
    assert len(one_launch) == 2 * 4  # 16 rows and one step each


def test_the_density(one_launch) -> None:
    """With the gradient of log|det A|, which has a sum alone."""
    x, A, c, context, *layers = tensors(19, 2, 6, 3, (8, 9), torch.float32)
    leaves = [x, A, c, context, *layers]
    logabsdet = torch.linalg.slogdet(A.detach()).logabsdet.sum().requires_grad_()

    def gradients() -> list[Tensor]:
        density = ops.coupling_flow_log_prob(x, A, c, logabsdet, layers[:3], layers[3:], context)
        return [*torch.autograd.grad((density * torch.arange(19.0)).sum(), [*leaves, logabsdet])]

    got = gradients()
    assert one_launch == [[0] * 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_products, "ready", lambda x: False)
        own = gradients()
    for mine, other in zip(got, own, strict=True):
        assert error(mine, other) < 2e-6


def test_one_launch_and_no_sums(one_launch) -> None:
    values = tensors(19, 2, 7, 3, (9, 17), torch.float32)
    with count_launches() as launched:
        run(ops.coupling_flow, values)
    assert launched.count("flow_backward_kernel") == 1 and "sums_kernel" not in launched and one_launch == [[0] * 4]


def test_results_repeat_exactly(one_launch) -> None:
    values = tensors(40, 2, 7, 3, (9, 17), torch.float32)
    assert all(map(torch.equal, run(ops.coupling_flow, values), run(ops.coupling_flow, values)))


def test_precisions_are_those_of_the_products(one_launch) -> None:
    values = tensors(19, 2, 7, 3, (9, 17), torch.float32)
    full = run(ops.coupling_flow, values)
    try:
        torch.set_float32_matmul_precision("high")
        found = run(ops.coupling_flow, values)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert one_launch == [[0] * 4, [1] * 4]
    errors = [error(mine, other) for mine, other in zip(found, full, strict=True)]
    assert max(errors) < 1e-3 and errors[3] > 1e-6  # of ∂A, whose product is rounded here


def test_workspaces_of_bf16(one_launch) -> None:
    """The interpreter has no bf16 products; gradients made of such a workspace alone."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    steps, rows, dim, width = 3, 40, 5, 16
    hidden, slopes = normal(2, 2, rows, 3 * width).bfloat16()
    pairs_of = [
        (normal(2, rows, dim), normal(2, rows, dim)),
        (hidden[..., 2 * width : 2 * width + 3], slopes[..., :9]),
        (hidden[..., :9], slopes[..., 2 * width : 2 * width + 4]),
    ]
    parameters = [torch.empty(steps, x.shape[2], g.shape[2]) for x, g in pairs_of]
    grad_logdet = normal(rows)
    made = InOneLaunch(parameters, {}, True, ("tf32x3", "bf16"))
    for first, count in ((0, 16), (16, 24)):
        here = slice(first, first + count)
        portion = [(x[:, here], g[:, here]) for x, g in pairs_of]
        made.add(portion, slopes[:, here], grad_logdet[here], 1, accumulate=first > 0)
    assert one_launch == [[0, 2, 2, 0]] * 2
    results = made.results()
    found = [results.matrix, *results.weights]
    for product, total, (x, g) in zip(found, [results.offset, *results.biases], pairs_of, strict=True):
        assert error(product[1:], x.double().mT @ g.double()) < 1e-6
        assert error(total[1:], g.double().sum(1)) < 1e-6
    assert error(results.logabsdet[1:], grad_logdet.double().sum().expand(2)) < 1e-6


def test_opcheck(one_launch) -> None:
    """What is written is what the schema says, also for torch.compile."""
    x, g = torch.randn(2, 20, 3), torch.randn(2, 20, 5)
    results = ([torch.zeros(2, 3, 5)], [torch.zeros(2, 5)])
    for accumulate in (False, True):
        arguments = ([x], [g], [0], *results, accumulate, 1)
        torch.library.opcheck(
            torch.ops.glf_fast.row_products.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
