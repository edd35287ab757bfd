"""Values and gradients of the kernels against the reference in float64, on a GPU or, with TRITON_INTERPRET=1, without one."""

import glf_fast_kernels as flows
import pytest
import torch
from glf_fast_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compared(function, exact, *operands: torch.Tensor) -> None:
    """Results and gradients of a function of float32 operands beside those of the exact one in float64."""
    found = []
    for run, dtype in ((function, torch.float32), (exact, torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in operands]
        y, logdet = run(*leaves)
        loss = (y**2).sum() + (logdet * torch.arange(len(logdet), device=DEVICE)).sum()
        found.append([y, logdet, *torch.autograd.grad(loss, leaves)])
    for kernel, correct in zip(*found, strict=True):
        torch.testing.assert_close(kernel.double(), correct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("log_scale", flows.LOG_SCALES)
def test_affine_coupling(log_scale: str, inverse: bool) -> None:
    torch.manual_seed(0)
    options = {"log_scale": log_scale, "inverse": inverse}
    compared(
        lambda *x: flows.affine_coupling(*x, **options),
        lambda *x: reference.affine_coupling(*x, **options),
        *torch.randn(3, 5, 7),
    )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", ["linear", "circular", "none"])
def test_spline(tails: str, inverse: bool) -> None:
    torch.manual_seed(0)
    options = flows.Spline(bins=5, tails=tails, low=-2.0, high=2.0)

    def exact(x: torch.Tensor, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, logarithms = reference.spline(x, parameters, options, inverse=inverse)
        return y, logarithms.sum(1)

    compared(
        lambda x, parameters: flows.spline(x, parameters, options, inverse=inverse),
        exact,
        1.5 * torch.rand(6, 3) - 0.7,
        torch.randn(6, 3, options.columns),
    )


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="log_scale must be one of"):
        flows.affine_coupling(x, x, x, log_scale="sigmoid")
    with pytest.raises(ValueError, match="one shape"):
        flows.affine_coupling(x, x, x[:1])
    with pytest.raises(TypeError, match="floating-point"):
        flows.affine_coupling(x, x, x.int())
    with pytest.raises(ValueError, match="parameters"):
        flows.spline(x, x, flows.Spline())
    with pytest.raises(TypeError, match="float32 or float64"):
        flows.spline(x.half(), x.half(), flows.Spline())
