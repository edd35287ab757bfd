"""Linear layers that are not trained, behind ActNorms that are: known once, and gradients of the scales alone."""

import math

import pytest
import torch

from glf_fast import CouplingFlow, InvertibleLinear, SequentialFlow, use_backend


@pytest.mark.parametrize("linear", ["dense", "permutation"])
def test_actnorms_are_trained_behind_fixed_linear_layers(linear: str) -> None:
    """Matrices are known once, until they change. 34 columns are more than those that kernels multiply in any case."""
    torch.manual_seed(0)
    flow = CouplingFlow(34, 2, (8,), linear=linear).double()
    for parameter in flow.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(20, 34).double()
    flow.log_prob(x)
    if linear == "dense":
        flow.linear_weight.requires_grad_(False)

    def gradients() -> list[torch.Tensor]:
        flow.zero_grad()
        z, logdet = flow(x)
        (flow.log_prob(x).sum() + z.square().sum() + 2 * logdet.sum()).backward()
        return [p.grad.clone() for p in flow.parameters() if p.requires_grad]

    for _ in range(2):
        found = gradients()
        with use_backend("reference"):
            torch.testing.assert_close(found, gradients())
        if linear == "dense":
            flow.linear_weight.data.mul_(1.1)


@pytest.mark.parametrize("linear", ["dense", "permutation"])
@pytest.mark.parametrize("shift", [-52.0, -45.0, 44.5])
def test_tiny_and_huge_scales_behind_fixed_linear_layers(linear: str, shift: float) -> None:
    """Squares of e^−52 and e^44.5 are no float32 numbers."""
    torch.manual_seed(0)
    flow = CouplingFlow(6, 1, (8,), linear=linear)
    if linear == "dense":
        flow.linear_weight.requires_grad_(False)
    flow(torch.randn(20, 6))
    flow.actnorm_log_scale.data.fill_(shift)
    flow.actnorm_bias.data.zero_()
    x = torch.randn(20, 6) * math.exp(-shift)

    def gradient() -> torch.Tensor:
        flow.zero_grad()
        flow.log_prob(x).sum().backward()
        return flow.actnorm_log_scale.grad.clone()

    found = gradient()
    with use_backend("reference"):
        torch.testing.assert_close(found, gradient(), rtol=1e-3, atol=1e-2)


def test_a_logdet_that_is_changed_in_place_changes_no_other() -> None:
    layer = InvertibleLinear(4, linear="dense").requires_grad_(False)
    with torch.no_grad():
        layer.weight.mul_(2)
        for flow in (layer, SequentialFlow([layer], (4,)).eval()):
            x, before = torch.randn(1, 4), flow(torch.randn(3, 4))[1][:1].clone()
            flow(x)[1].add_(5)
            assert torch.equal(flow(x)[1], before)


def test_a_fixed_linear_layer_can_be_swapped() -> None:
    """By conversions that keep the parameter and swap its tensor, which weak references forbid."""
    flow = CouplingFlow(4, 2, (8,), linear="dense")
    flow.linear_weight.requires_grad_(False)
    flow.log_prob(torch.randn(20, 4))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        flow.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert flow.log_prob(torch.randn(20, 4).double()).dtype == torch.float64
