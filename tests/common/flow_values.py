"""Random flows, and an operation's values with the gradients of a fixed combination of them, to compare implementations by."""

import itertools

import torch
from torch import Tensor

from glf_fast import Spline, ops, reference, use_backend

__all__ = ["DIRECTIONS", "check_bayesflows_scale", "compare", "derivatives", "error", "run", "run_op", "tensors"]

DIRECTIONS = {"forward": "coupling_flow", "inverse": "coupling_flow_inverse"}


def tensors(
    batch: int, K: int, D: int, C: int, hidden: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0,
    coupling: str = "affine", network: str = "mlp", spline: Spline | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """x, A, c, context, W₀ …, b₀ …; `hidden`, `coupling`, `network` and `spline` as in CouplingFlow."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g)

    columns = (spline or Spline()).columns if coupling == "spline" else reference.COUPLINGS[coupling].columns
    shapes = list(itertools.pairwise([D - D // 2 + C, *hidden, columns * (D // 2)]))
    if network == "residual":
        block = [(hidden[0], hidden[0])] * 2 + [(C, hidden[0])] * (C > 0)
        shapes = [shapes[0], *block * len(hidden), shapes[-1]]
    stack = (K, 2) if coupling == "separate" else (K,)
    A = (torch.linalg.qr(normal(K, D, D)).Q + 0.1 * normal(K, D, D) / D).contiguous()
    weights = [normal(*stack, n, m) / n**0.5 for n, m in shapes]
    if coupling == "spline":
        weights[-1] *= 0.2  # parameters of 1 make slopes of 1e-3 and 1e3: what is rebuilt from outputs loses as much
    biases = [0.3 * normal(*stack, n) for _, n in shapes]
    made = [normal(batch, D), A, normal(K, D), normal(batch, C) if C else None, *weights, *biases]
    return [None if t is None else t.to(dtype).requires_grad_() for t in made]


def run_op(op, values: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of op(*values), and the gradients of a fixed combination of them.

    The reference's logdet of additive couplings is a constant, 0, which has none.
    """
    outputs = op(*values)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, dtype=torch.float64, generator=g).to(t.dtype) for t in outputs]
    varying, grads = zip(*((t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad), strict=True)
    found = torch.autograd.grad(varying, [t for t in values if t is not None and t.requires_grad], grads)
    return *(t.detach() for t in outputs), *found


def derivatives(op, values: list[Tensor | None]) -> list[Tensor]:
    """Gradients of each output of op(*values) alone, and derivatives of a fixed combination of all outputs' gradients."""
    leaves = [t for t in values if t is not None and t.requires_grad]
    outputs = op(*values)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, dtype=t.dtype, generator=g) for t in outputs]
    alone = [
        torch.autograd.grad(t, leaves, grad, retain_graph=True, allow_unused=True)
        for t, grad in zip(outputs, grads, strict=True)
    ]
    first = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    combined = sum((torch.randn(t.shape, dtype=t.dtype, generator=g) * t).sum() for t in first)
    second = torch.autograd.grad(combined, leaves, allow_unused=True)
    pairs = [pair for found in (*alone, second) for pair in zip(found, leaves, strict=True)]
    return [torch.zeros_like(leaf) if found is None else found for found, leaf in pairs]


def run(op, values: list[Tensor | None], **options) -> tuple[Tensor, ...]:
    """The same of a flow: output, logdet, gradients."""

    def flow(x, A, c, context, *layers):
        return op(x, A, c, layers[: len(layers) // 2], layers[len(layers) // 2 :], context, **options)

    return run_op(flow, values)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-6))


def compare(values: list[Tensor | None], direction: str, limit: float, reversible: bool = False, **options) -> None:
    """Output, logdet and every gradient against the reference on the same numbers in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in values]
    want = run(getattr(reference, DIRECTIONS[direction]), exact, **options)
    got = run(getattr(ops, DIRECTIONS[direction]), values, **options, reversible=reversible)
    for mine, truth in zip(got, want, strict=True):
        assert mine.dtype == values[0].dtype and mine.shape == truth.shape
        assert error(mine, truth) <= limit


def check_bayesflows_scale() -> None:
    """Scales, log-scales and slopes on the backend in use: no worse than PyTorch's own functions in float32."""
    sizes = torch.logspace(-8, 6, 400)
    u = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])

    def evaluate(u: Tensor, *, inverse: bool) -> list[Tensor]:
        u = u.unsqueeze(1).requires_grad_()  # one number a row, whose logdet is ℓ
        one, zero = torch.ones_like(u), torch.zeros_like(u)
        w, logdet = ops.affine_coupling(one, u, zero, log_scale="bayesflow", inverse=inverse)
        (slope,) = torch.autograd.grad(logdet.sum(), u)
        return [w.detach().flatten(), logdet.detach(), slope.flatten()]

    for inverse in (False, True):
        mine = evaluate(u, inverse=inverse)
        with use_backend("reference"):
            plain, exact = (evaluate(a, inverse=inverse) for a in (u, u.double()))
        for i, (got, theirs, truth) in enumerate(zip(mine, plain, exact, strict=True)):
            size = truth.abs().clamp(min=1) if i == 1 else truth.abs()  # ℓ passes 0
            errors = [((a.double() - truth).abs() / size).max().item() for a in (got, theirs)]
            assert errors[0] <= max(errors[1], 5e-7), (inverse, i, errors)
        far = torch.tensor([float("nan"), float("inf"), -float("inf")])
        got, _, _ = evaluate(far, inverse=inverse)
        with use_backend("reference"):
            theirs, _, _ = evaluate(far, inverse=inverse)
        torch.testing.assert_close(got, theirs, equal_nan=True)
