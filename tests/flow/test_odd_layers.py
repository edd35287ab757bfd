"""Layers that a folding flow must treat with care: watched, replaced, set by hand, loaded, with networks of their own ways."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glf_fast import ActNorm, AffineCoupling, GlowFlow, InvertibleLinear, SequentialFlow
from glf_fast.flow import FixedLinear


class Views(nn.Module):
    """A network that takes the pixels of an image as they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * 256, 4 * 256)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.view(len(h), -1)).view(-1, 4, 16, 16)


def by_layers(flow: SequentialFlow, x: Tensor) -> Tensor:
    for layer in flow.layers:
        x, _ = layer(x)
    return x


def test_a_network_may_view_its_input() -> None:
    torch.manual_seed(0)
    flow = SequentialFlow([InvertibleLinear(4), AffineCoupling(4, Views()), InvertibleLinear(4)], (4, 16, 16))
    x = torch.randn(3, 4, 16, 16)
    for _ in range(2):
        z, _ = flow(x)
        torch.testing.assert_close(z, by_layers(flow, x))
        torch.testing.assert_close(flow.inverse(z)[0], x, atol=1e-4, rtol=1e-4)


def test_calls_that_are_watched_or_replaced_happen() -> None:
    flow = SequentialFlow([ActNorm(4), InvertibleLinear(4), InvertibleLinear(4)], (4,)).eval()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        flow(torch.randn(3, 4))
    finally:
        handle.remove()
    assert seen == ["ActNorm", "InvertibleLinear", "InvertibleLinear", "SequentialFlow"]
    flow.layers[0].forward = lambda x, context=None: (0 * x, x.new_zeros(len(x)))  # type: ignore[method-assign]
    assert not flow(torch.randn(3, 4))[0].any()


@pytest.mark.parametrize("how", ["by hand", "averaged", "compiled"])
def test_far_normalisations_keep_their_digits_however_they_were_set(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4) + 1e4
    flow = SequentialFlow([ActNorm(4), InvertibleLinear(4)], (4,))
    if how == "averaged":
        average = torch.optim.swa_utils.AveragedModel(flow, use_buffers=False)
        flow(x)
        average.update_parameters(flow)
        flow = average.module
    elif how == "compiled":
        torch.compiler.reset()
        torch.compile(flow, backend="eager")(x)
    else:
        with torch.no_grad():
            flow.layers[0].bias.copy_(-x.mean(0))
    flow.eval()
    exact = by_layers(copy.deepcopy(flow).double(), x.double())
    assert (flow(x)[0].double() - exact).abs().max() < 1e-5 * exact.abs().max()


class Operations(TorchDispatchMode):
    """Names of the operations that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_setting_the_mode_reads_all_actnorms_at_once() -> None:
    """Trainers call train() before every step: a GPU must not wait for each ActNorm."""
    flow = GlowFlow((1, 8, 8), 2, 4, 4)
    flow(torch.randn(9, 1, 8, 8))
    with torch.no_grad():
        flow.layers[1].bias.fill_(100.0)
    with Operations() as operations:
        flow.train()
    assert len(operations.names) < 16 and not any("_local_scalar_dense" in name for name in operations.names)
    assert [layer.far for layer in flow.layers if isinstance(layer, ActNorm)] == [True] + 7 * [False]


def test_a_fixed_matrix_in_float64_does_not_keep_an_inverse_in_float32() -> None:
    torch.manual_seed(0)
    coarse, fine = FixedLinear(torch.randn(6, 6)), FixedLinear(torch.eye(6).double())
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    assert (fine.inverse(fine(x)[0])[0] - x).abs().max() < 1e-12


def test_the_mask_of_another_coupling_is_refused() -> None:
    def coupling(mask: str) -> AffineCoupling:
        return AffineCoupling(5, nn.Linear(3, 4), mask=[m == "1" for m in mask])

    with pytest.raises(RuntimeError, match="has the mask of another coupling"):
        coupling("01001").load_state_dict(coupling("10100").state_dict())
    coupling("01001").load_state_dict(coupling("01001").state_dict())
