"""Flows beyond the whole-flow kernels: step by step, with the elementwise kernel, interpreted."""

import itertools

import pytest
import torch

from glf_fast import ops, use_backend
from glf_fast.kernels.launch import count_launches

pytestmark = pytest.mark.usefixtures("interpreted")


# Too many columns, too wide, too many layers, no hidden layer at all.
@pytest.mark.parametrize(("dim", "hidden"), [(258, (8,)), (6, (520,)), (6, (8,) * 5), (6, ())])
@pytest.mark.parametrize("op", [ops.coupling_flow, ops.coupling_flow_inverse])
@pytest.mark.parametrize("add_first", [False, True])
def test_layered_flows_match_the_float64_reference(op, dim: int, hidden: tuple[int, ...], add_first: bool) -> None:
    g = torch.Generator().manual_seed(0)
    steps, batch, context_dim = 2, 5, 3

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()

    widths = [dim - dim // 2 + context_dim, *hidden, 2 * (dim // 2)]
    sizes = list(itertools.pairwise(widths))
    x, context, c = normal(batch, dim), normal(batch, context_dim), normal(steps, dim)
    A = torch.eye(dim, dtype=torch.float64).add(normal(steps, dim, dim, scale=0.3 / dim**0.5)).detach().requires_grad_()
    weights = [normal(steps, a, b, scale=a**-0.5) for a, b in sizes]
    biases = [normal(steps, b) for _, b in sizes]
    inputs = (x, A, c, context, *weights, *biases)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        x, A, c, context, *layers = leaves
        out = op(x, A, c, layers[: len(sizes)], layers[len(sizes) :], context, log_scale="glow", add_first=add_first)
        return [*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])]

    with use_backend("reference"):
        exact = run(torch.float64)
    with count_launches() as launches:
        found = run(torch.float32)
    assert launches == ["coupling_kernel"] * steps + ["coupling_backward_kernel"] * steps
    for ours, theirs in zip(found, exact, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-5
