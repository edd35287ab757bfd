"""nflows' compositions that no flow of nflows holds: in flow classes of a user's own, and alone."""

from __future__ import annotations

import copy

import nflows.transforms as nt
import pytest
import torch
from nflows.nn.nets import ConvResidualNet
from nflows_couplings import Net, alternating
from torch import Tensor, nn

from glf_fast import accelerate

DIM = 5


def composition() -> nn.Module:
    torch.manual_seed(0)
    inner = nt.CompositeTransform([nt.RandomPermutation(DIM), nt.LULinear(DIM)])
    return nt.CompositeTransform([*alternating(DIM, 2), inner, *alternating(DIM, 1), nt.Sigmoid()])


class Own(nn.Module):
    """A flow class of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self._transform = composition()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform.inverse(z)


class Counting(nt.CompositeTransform):
    """A composition that does something else."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(inputs, context)
        return z, logdet * len(self._transforms)


@pytest.mark.parametrize("make", [Own, composition])
def test_a_composition_without_a_flow_is_replaced(make) -> None:
    original = make()
    fast = copy.deepcopy(original)
    report = accelerate(fast)
    assert [r.couplings for r in report.replaced] == [3] and len(report.left) == 1, report  # the sigmoid stays
    x = torch.randn(7, DIM)
    for wanted, got in zip(original(x), fast(x), strict=True):
        torch.testing.assert_close(got, wanted)
    z = torch.rand(7, DIM)
    for wanted, got in zip(original.inverse(z), fast.inverse(z), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not accelerate(fast)


def images() -> nn.Module:
    net = lambda n_in, n_out: ConvResidualNet(n_in, n_out, 4)  # noqa: E731
    return nt.CompositeTransform([nt.AffineCouplingTransform(torch.tensor([1, -1, 1, -1]), net)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (images, "not in a flow whose layers can be replaced"),
        (lambda: nt.CompositeTransform([nt.LULinear(4)]), "not in a flow whose layers can be replaced"),
        (lambda: Counting(list(alternating(DIM))), "Counting has its own forward"),
        (lambda: nn.ModuleList(alternating(DIM)), "not in a flow whose layers can be replaced"),
    ],
)
def test_other_compositions_stay(make, reason: str) -> None:
    original = make()
    before = copy.deepcopy(original.state_dict())
    report = accelerate(original)
    assert not report and reason in str(report)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_a_network_that_a_context_is_concatenated_to() -> None:
    transform = nt.CompositeTransform(list(alternating(DIM, 2, lambda n_in, n_out: Net(n_in + 3, n_out))))
    fast = copy.deepcopy(transform)
    assert accelerate(fast)
    x, c = torch.randn(4, DIM), torch.randn(4, 3)
    torch.testing.assert_close(fast(x, c)[0], transform(x, c)[0])
