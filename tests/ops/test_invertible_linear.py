"""Linear layers applied to vectors and images: values, gradients, order of memory, against the float64 reference."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import ops, reference, use_backend

SHAPES = [
    (5, 7),
    (0, 7),
    (4, 6, 5, 7),
    (4, 24, 3, 3),
    (0, 3, 4, 4),
    (3, 1, 2, 2),
    (2, 3, 40),
    (2, 3, 2, 3, 4),
    (2, 5, 0, 4),
    (4, 6, 8, 9),
    (2, 40, 9, 8),
    (0, 3, 8, 8),
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, order: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    dim = shape[1]
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    if order == "channels-last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    if order == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    matrix = torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=g) / dim**0.5
    others = [matrix, torch.randn(dim, generator=g), torch.randn((), generator=g)]
    return [t.requires_grad_() for t in (x.detach(), *(t.to(dtype) for t in others))]


def everything(op, inputs: list[Tensor], inverse: bool) -> list[Tensor]:
    y, logdet = op(*inputs, inverse=inverse)
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, logdet)]
    return [y, logdet, *torch.autograd.grad([y, logdet], inputs, weights)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", ["contiguous", "channels-last", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, order: str, inverse: bool) -> None:
    inputs = arguments(shape, dtype, order)
    exact = everything(reference.invertible_linear, [t.detach().double().requires_grad_() for t in inputs], inverse)
    found = everything(ops.invertible_linear, inputs, inverse)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, truth in zip((t.detach() for t in found), (t.detach() for t in exact), strict=True):
        assert mine.shape == truth.shape and mine.dtype == dtype
        assert (mine.double() - truth).norm() <= limit * max(float(truth.norm()), 1e-3)
    if order == "channels-last" and len(shape) == 4 and found[0].numel() and shape[1] > 1:
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    if order == "contiguous" and len(shape) == 4 and shape[2] * shape[3] >= 2 * shape[1]:
        assert found[0].is_contiguous()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3, 2), (2, 3, 1, 2)])
def test_derivatives_of_both_orders(shape: tuple[int, ...], inverse: bool) -> None:
    inputs = arguments(shape, torch.float64, "contiguous")
    assert gradcheck(lambda *t: ops.invertible_linear(*t, inverse=inverse), inputs)
    assert gradgradcheck(lambda *t: ops.invertible_linear(*t, inverse=inverse), inputs)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4, 4), (2, 12, 2, 2)])
def test_full_precision_under_autocast_and_when_compiled(shape: tuple[int, ...]) -> None:
    inputs = arguments(shape, torch.float32, "contiguous")
    want = everything(ops.invertible_linear, inputs, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = ops.invertible_linear(*inputs)
    assert y.dtype == torch.float32 and torch.equal(y, want[0])
    compiled = torch.compile(ops.invertible_linear, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(everything(compiled, inputs, False), want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_reference_runs_where_it_is_asked_for_and_under_function_transforms() -> None:
    inputs = [t.detach() for t in arguments((2, 3, 4, 4), torch.float32, "contiguous")]
    with use_backend("reference"):
        y, _ = ops.invertible_linear(*inputs)
    assert torch.equal(y, reference.invertible_linear(*inputs)[0])
    mapped = torch.vmap(lambda x: ops.invertible_linear(x[None], *inputs[1:])[0][0])(inputs[0])
    torch.testing.assert_close(mapped, y)
