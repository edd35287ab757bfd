"""What every converted flow on images is put through."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import Flow, accelerate, convert


@dataclass
class Library:
    """How to call a library's flow: `log_prob(flow, x, context)`, and `inverse(flow, z, context)` from N(0, I) noise of the
    data's shape. `rounded(flow)`: what its log_prob misses in float64, too, of constants that it keeps in float32.
    """

    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    inverse: Callable[[Any, Tensor, Tensor | None], Tensor]
    tolerance: float = 1e-9
    rounded: Callable[[Any], float] = lambda flow: 0.0


def conv_net(n_in: int, n_out: int) -> nn.Module:
    """3 × 3 and 1 × 1, so that a pixel sees its neighbours."""
    return nn.Sequential(nn.Conv2d(n_in, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, n_out, 3, padding=1))


def shake(flow: nn.Module, std: float = 0.05) -> nn.Module:
    """Random weights: fresh ones are too small, or zero, to tell a wrong formula."""
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return flow


def prove(library: Library, flow: nn.Module, shape: tuple[int, int, int], context_shape: tuple[int, ...] = ()) -> Flow:
    """`convert(flow)` is `flow` in all that one can do with it; returns it in the flow's dtype."""

    def draw(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(n, *shape, dtype=dtype)
        return x, torch.randn(n, *context_shape, dtype=dtype) if context_shape else None

    before = {name: value.clone() for name, value in flow.state_dict().items()}
    converted = convert(flow)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    assert converted.event_shape == shape and converted.context_shape == context_shape

    exact = copy.deepcopy(flow).double()
    ours = convert(copy.deepcopy(exact))
    x, context = draw(6, torch.float64)
    x.requires_grad_()
    log_p, log_q = library.log_prob(exact, x, context), ours.log_prob(x, context)
    tolerance = {"rtol": library.tolerance, "atol": library.tolerance}
    torch.testing.assert_close(log_q, log_p, **tolerance)
    wanted, got = (torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (log_p, log_q))
    torch.testing.assert_close(got, wanted, **tolerance)
    _same_gradients_of_networks(exact, ours, log_p, log_q, tolerance)
    z = torch.randn_like(x)
    torch.testing.assert_close(ours.inverse(z, context)[0], library.inverse(exact, z.clone(), context), **tolerance)
    back, back_logdet = ours.inverse(ours(x, context)[0], context)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back_logdet, -ours(x, context)[1], rtol=1e-7, atol=1e-7)
    one = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda a: ours(a[None], one)[0][0].flatten(), x[0].detach())
    logdet = torch.linalg.slogdet(jacobian.flatten(1))[1]
    torch.testing.assert_close(logdet, ours(x[:1], one)[1][0].detach(), rtol=1e-5, atol=1e-5)
    channels_last = x.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.log_prob(channels_last, context), log_q, rtol=1e-9, atol=1e-9)

    _close_to_truth(library, flow, converted, exact, *draw(300, torch.float32))
    _saved_and_copied(converted, *draw(3, torch.float32))
    _trains(copy.deepcopy(converted), *draw(32, torch.float32))
    return converted


def _same_gradients_of_networks(exact: nn.Module, ours: Flow, log_p: Tensor, log_q: Tensor, tolerance: Any) -> None:
    """Convolutions and linear layers stay what they are: their gradients are compared one by one."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    theirs = [p for m in exact.modules() if isinstance(m, kinds) for p in m.parameters() if p.requires_grad]
    mine = [p for m in ours.modules() if isinstance(m, kinds) for p in m.parameters() if p.requires_grad]
    assert len(theirs) == len(mine) > 0
    wanted = torch.autograd.grad(log_p.sum(), theirs)
    got = torch.autograd.grad(log_q.sum(), mine, retain_graph=True)
    key = lambda g: (tuple(g.shape), round(g.norm().item(), 6))  # noqa: E731
    for a, b in zip(sorted(got, key=key), sorted(wanted, key=key), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def _close_to_truth(
    library: Library, low: nn.Module, converted: Flow, exact: nn.Module, x: Tensor, context: Tensor | None
) -> None:
    """In float32, as near to float64's log_prob as the library's own."""
    ours, theirs, last_digit = float32_errors(library, low, converted, exact, x, context)
    assert ours <= max(1.25 * theirs, last_digit), f"float32 errors: ours {ours:.3g}, the library's {theirs:.3g}"


@torch.no_grad()
def float32_errors(
    library: Library, low: nn.Module, converted: Flow, exact: nn.Module, x: Tensor, context: Tensor | None
) -> tuple[float, float, float]:
    """Median errors of log_prob, ours and the library's, and what one unit in the last place of it is."""
    truth = library.log_prob(exact, x.double(), None if context is None else context.double()) + library.rounded(exact)
    ours = (converted.log_prob(x, context) - truth).abs().median().item()
    theirs = (library.log_prob(low, x, context) - truth).abs().median().item()
    return ours, theirs, torch.finfo(torch.float32).eps * truth.abs().median().item()


def _saved_and_copied(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    flow = copy.deepcopy(flow).eval()  # a network may draw, or count, in training mode
    z = flow(x, context)[0]
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, context)[0], z)
    other = shake(copy.deepcopy(flow))
    assert not torch.equal(other(x, context)[0], z)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x, context)[0], z)


def _trains(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    flow.train()
    trained = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(5):
        loss = -flow.log_prob(x + 0.5, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert all(p.grad is not None for p in trained)


def accelerated(flow: nn.Module) -> tuple[nn.Module, nn.Module, Any]:
    """The flow, changed; a copy of what it was in float64; the report."""
    original = copy.deepcopy(flow).double()
    networks = {id(m) for m in flow.modules() if isinstance(m, nn.Conv2d)}
    report = accelerate(flow)
    assert {id(m) for m in flow.modules() if isinstance(m, nn.Conv2d)} == networks, "networks are the originals"
    return flow, original, report


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="prove_images")
def _prove() -> Callable[..., Flow]:
    return prove


@pytest.fixture(name="conv_net")
def _conv_net() -> Callable[..., nn.Module]:
    return conv_net


@pytest.fixture(name="shake")
def _shake() -> Callable[..., nn.Module]:
    return shake


@pytest.fixture(name="accelerated")
def _accelerated() -> Callable[..., Any]:
    return accelerated


@pytest.fixture(name="ImageLibrary")
def _library() -> type[Library]:
    return Library


@pytest.fixture(name="float32_errors")
def _float32_errors() -> Callable[..., tuple[float, float, float]]:
    return float32_errors
