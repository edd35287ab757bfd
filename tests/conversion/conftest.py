"""What every converted flow is put through, whatever library it comes from."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import Flow
from glf_fast.conversion import convert


@dataclass
class Library:
    """How to call a library's flow: `log_prob(flow, x, context)`, and `inverse(flow, z, context)` from N(0, I) noise."""

    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    inverse: Callable[[Any, Tensor, Tensor | None], Tensor] | None


def shake(flow: nn.Module, std: float = 0.15) -> nn.Module:
    """Random weights: fresh ones are too small, or zero, to tell a wrong formula."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return flow


def prove(library: Library, flow: nn.Module, dim: int, context_dim: int = 0) -> Flow:
    """`convert(flow)` is `flow` in all that one can do with it; returns it in the flow's dtype."""
    draw = lambda n, dtype: (  # noqa: E731
        torch.randn(n, dim, dtype=dtype),
        torch.randn(n, context_dim, dtype=dtype) if context_dim else None,
    )
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    converted = convert(flow)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original has changed"
    parameter = next(flow.parameters())
    assert {p.dtype for p in converted.parameters()} == {parameter.dtype}
    assert converted.training == flow.training

    # The same map in float64: density, its gradient, samples.
    exact, exact_converted = copy.deepcopy(flow).double(), convert(copy.deepcopy(flow).double())
    x, context = draw(32, torch.float64)
    x.requires_grad_()
    log_p, log_q = library.log_prob(exact, x, context), exact_converted.log_prob(x, context)
    torch.testing.assert_close(log_q, log_p, rtol=1e-9, atol=1e-9)
    (wanted,), (got,) = (torch.autograd.grad(value.sum(), x) for value in (log_p, log_q))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
    z = torch.randn_like(x)
    if library.inverse is not None:
        torch.testing.assert_close(
            exact_converted.inverse(z, context)[0], library.inverse(exact, z, context), rtol=1e-7, atol=1e-7
        )
    back, back_logdet = exact_converted.inverse(*_swap(exact_converted(x, context), context))
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back_logdet, -exact_converted(x, context)[1], rtol=1e-7, atol=1e-7)
    jacobian = torch.func.jacrev(lambda a: exact_converted(a[None], None if context is None else context[:1])[0][0])
    torch.testing.assert_close(
        torch.linalg.slogdet(jacobian(x[0].detach()))[1],
        exact_converted(x, context)[1][0].detach(),
        rtol=1e-7,
        atol=1e-7,
    )

    ours, theirs = float32_errors(library, flow, dim, context_dim)
    # The same sums in another order: with two columns the medians differ by up to a fifth either way, and all of an error
    # may be in the last digit of log_prob. All flows of a library together are compared without these allowances.
    last_digit = torch.finfo(torch.float32).eps * log_p.abs().median().item()
    assert ours <= max(1.25 * theirs, last_digit), f"float32 errors: ours {ours:.3g}, the library's {theirs:.3g}"

    saved_and_copied(converted, *draw(5, parameter.dtype))
    if dim % 2:  # seconds each: once per kind of flow
        compiles(converted, *draw(5, parameter.dtype))
    trains(copy.deepcopy(converted), *draw(256, parameter.dtype))
    return converted


def float32_errors(library: Library, flow: nn.Module, dim: int, context_dim: int = 0) -> tuple[float, float]:
    """How far log_prob in float32 is from float64's, ours and the library's: medians over many samples.

    Of medians, because in flows as steep as these a few samples carry all of the mean square.
    """
    x = torch.randn(4096, dim)
    context = torch.randn(4096, context_dim) if context_dim else None
    with torch.no_grad():
        low = copy.deepcopy(flow).float()
        double = copy.deepcopy(flow).double()
        truth = library.log_prob(double, x.double(), None if context is None else context.double())
        ours, theirs = convert(low).log_prob(x, context), library.log_prob(low, x, context)
    return (ours - truth).abs().median().item(), (theirs - truth).abs().median().item()


def _swap(output: tuple[Tensor, Tensor], context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return output[0], context


def saved_and_copied(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """Pickles, copies, state_dict into a copy with other values."""
    z = flow(x, context)[0]
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    other = copy.deepcopy(flow)
    assert torch.equal(other(x, context)[0], z)
    assert torch.equal(torch.load(file, weights_only=False)(x, context)[0], z)
    shake(other)
    assert not torch.equal(other(x, context)[0], z)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x, context)[0], z)


def compiles(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """One graph for torch.compile."""
    torch._dynamo.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), flow.log_prob(x, context))


def trains(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """Adam lowers the loss, gradients reach every parameter that is trained, and what is held stays."""
    flow.train()
    held = {name: buffer.clone() for name, buffer in flow.named_buffers() if name.endswith(".value")}
    trained = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(6):
        loss = -flow.log_prob(2 * x + 1, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert all(p.grad is not None for p in trained)
    state = flow.state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    for module in flow.modules():
        for name, part in getattr(module, "held", {}).items():
            path, _, index = name.rpartition("_")
            p = getattr(module, path)[int(index)] if index.isdigit() else getattr(module, name)
            assert p.grad is None or not p.grad[~part.trained].any(), f"{name}: a gradient where nothing is trained"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="prove")
def _prove() -> Callable[..., Flow]:
    return prove


@pytest.fixture(name="float32_errors")
def _float32_errors() -> Callable[..., tuple[float, float]]:
    return float32_errors


@pytest.fixture(name="shake")
def _shake() -> Callable[..., nn.Module]:
    return shake


@pytest.fixture(name="Library")
def _library() -> type[Library]:
    return Library
