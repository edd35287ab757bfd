"""Glow's networks: the processor's kernels against the reference."""

import pytest
import torch
from torch import Tensor

from glf_fast import backends, ops, reference, use_backend

# batch, channels, height, width, hidden, outputs
SHAPES = [
    (3, 3, 14, 14, 64, 4),
    (2, 1, 1, 1, 1, 1),
    (5, 2, 1, 7, 9, 3),
    (1, 5, 3, 2, 17, 8),
    (4, 7, 5, 5, 40, 23),
    (0, 2, 4, 4, 8, 2),
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    B, C, H, W, N, outputs = shape
    sizes = [(B, C, H, W), (N, C + 1, 3, 3), (N,), (N,), (N, N, 1, 1), (N,), (N,), (outputs, N, 3, 3), (outputs, 3, 3)]
    sizes += [(outputs,), (outputs,)]
    return [(0.5 * torch.randn(size, dtype=dtype)).requires_grad_() for size in sizes]


@pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason="the processor kernels are not built here")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], last: bool) -> None:
    """In either order of memory, in float64 to rounding and in float32 as near to it as the reference."""
    given = arguments(shape, torch.float64)
    grad = torch.randn(shape[0], shape[-1], *shape[2:4], dtype=torch.float64)
    exact = reference.glow_network(*given, 3.0)
    exact_grads = torch.autograd.grad(exact, given, grad)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x, *rest = (t.detach().to(dtype).requires_grad_() for t in given)
        if last:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        with use_backend("cpp"):
            out = ops.glow_network(x, *rest, 3.0)
        grads = torch.autograd.grad(out, (x, *rest), grad.to(dtype))
        for found, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert found.shape == wanted.shape and found.dtype == dtype
            assert (found - wanted).norm() <= tolerance * max(1.0, wanted.norm())


def test_second_derivatives() -> None:
    given = arguments((2, 2, 3, 3, 4, 2), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *t: ops.glow_network(*t, 3.0), given, fast_mode=True)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (3, 3, 14), r"x must have shape \(batch, channels, height, width\)"),
        (1, (64, 3, 3, 3), r"first must have shape \(N, channels \+ 1, 3, 3\) = \(64, 4, 3, 3\)"),
        (6, (63,), "second_bias must have shape"),
        (8, (4, 1, 1), "edge must have shape"),
    ],
)
def test_wrong_shapes_are_named(index: int, shape: tuple[int, ...], message: str) -> None:
    given = arguments(SHAPES[0], torch.float32)
    given[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        ops.glow_network(*given, 3.0)
