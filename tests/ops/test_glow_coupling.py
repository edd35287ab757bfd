"""Couplings with Glow's network as one operation: the processor's kernels against the two operations one after the other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import AffineCoupling, backends, ops, use_backend
from glf_fast.flow import GlowNetwork

# batch, P, T, height, width, hidden
SHAPES = [
    (3, 2, 2, 14, 14, 64),
    (2, 1, 1, 1, 1, 1),
    (5, 2, 1, 1, 7, 9),
    (1, 3, 4, 3, 2, 17),
    (4, 7, 12, 5, 5, 40),
    (9, 5, 3, 4, 4, 33),
    (0, 2, 2, 4, 4, 8),
]
needs_kernels = pytest.mark.skipif(
    not backends()["cpp"].startswith("ready"), reason="the processor kernels are not built here"
)


def arguments(shape: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    B, P, T, H, W, N = shape
    sizes = [(B, P + T, H, W), (N, P + 1, 3, 3), (N,), (N,), (N, N, 1, 1), (N,), (N,), (2 * T, N, 3, 3), (2 * T, 3, 3)]
    sizes += [(2 * T,), (2 * T,)]
    return [(0.3 * torch.randn(size, dtype=torch.float64)).requires_grad_() for size in sizes]


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"v_first": True, "inverse": True},
        {"v_first": True, "add_first": True, "log_scale": "glow"},
        {"inverse": True, "add_first": True, "log_scale": "softclip", "log_scale_constant": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    given = arguments(shape)
    grads = torch.randn_like(given[0]), torch.randn(shape[0], dtype=torch.float64)
    with use_backend("reference"):
        exact = ops.glow_coupling(*given, 3.0, **options)
    exact_grads = torch.autograd.grad(exact, given, grads)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for order in (torch.contiguous_format, torch.channels_last):
            x, *rest = (t.detach().to(dtype).requires_grad_() for t in given)
            x = x.detach().contiguous(memory_format=order).requires_grad_()
            with use_backend("cpp"):
                outputs = ops.glow_coupling(x, *rest, 3.0, **options)
            found = torch.autograd.grad(outputs, (x, *rest), [g.to(dtype) for g in grads])
            for mine, truth in zip((*outputs, *found), (*exact, *exact_grads), strict=True):
                assert mine.shape == truth.shape and mine.dtype == dtype
                difference, size = (float(t.detach().norm()) for t in (mine - truth, truth))
                assert difference <= tolerance * max(1.0, size)


def test_second_derivatives() -> None:
    given = arguments((2, 2, 1, 3, 3, 4))
    assert torch.autograd.gradgradcheck(lambda *t: ops.glow_coupling(*t, 3.0), given, fast_mode=True)


@needs_kernels
def test_torch_compile_sees_one_operation() -> None:
    x, *parameters = (t.detach().float() for t in arguments(SHAPES[0]))
    pixels = x.movedim(1, -1).contiguous()
    numbers = 3.0, False, 0, 2.0, False, False
    library = torch.ops.glf_fast
    torch.library.opcheck(library.cpu_glow_coupling.default, (pixels, parameters, *numbers))
    y, logdet, made = library.cpu_glow_coupling.default(pixels, parameters, *numbers)
    torch.library.opcheck(library.cpu_glow_coupling_backward.default, (y, logdet, pixels, made, parameters, *numbers))
    with pytest.raises(RuntimeError, match="outputs do not fit the images"):
        library.cpu_glow_coupling.default(pixels[..., :2].contiguous(), parameters, *numbers)
    coupling = AffineCoupling(4, GlowNetwork(2, 4, 16))
    coupling(x)
    compiled = torch.compile(coupling, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), coupling(x), strict=True))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (3, 4, 14), r"x must have shape \(batch, channels, height, width\)"),
        (0, (3, 5, 14, 14), r"first must have shape \(N, channels \+ 1, 3, 3\) = \(64, 4, 3, 3\)"),
        (7, (3, 64, 3, 3), "first must have shape"),
        (9, (3,), r"bias must have shape \(outputs,\)"),
    ],
)
def test_wrong_shapes_are_named(index: int, shape: tuple[int, ...], message: str) -> None:
    given = arguments(SHAPES[0])
    given[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        ops.glow_coupling(*given, 3.0)


def test_an_odd_number_of_outputs_is_refused() -> None:
    x, *rest = arguments((3, 3, 1, 4, 4, 8))
    rest[6], rest[7] = torch.zeros(3, 8, 3, 3, dtype=torch.float64), torch.zeros(3, 3, 3, dtype=torch.float64)
    rest[8] = rest[9] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the network's outputs must be 2·T"):
        ops.glow_coupling(x, *rest, 3.0)


class Doubled(AffineCoupling):
    """A coupling with a formula of its own."""

    def transform(self, v: Tensor, raw: Any, parts: Any, *, inverse: bool) -> tuple[Tensor, Tensor]:
        w, logdet = super().transform(v, raw, parts, inverse=inverse)
        return 2 * w, logdet + v[0].numel() * math.log(2)


def test_a_subclass_keeps_its_own_formula() -> None:
    x = torch.randn(3, 4, 6, 6)
    network = GlowNetwork(2, 4, 16)
    plain, doubled = AffineCoupling(4, network)(x)[0], Doubled(4, network)(x)[0]
    assert torch.allclose(doubled[:, 2:], 2 * plain[:, 2:]) and torch.equal(doubled[:, :2], x[:, :2])


@pytest.mark.parametrize("started", [False, True])
def test_a_network_of_other_sizes_is_refused(started: bool) -> None:
    network = GlowNetwork(2, 6, 16)
    if started:
        network(torch.randn(3, 2, 6, 6))
    with pytest.raises((ValueError, RuntimeError)):
        AffineCoupling(5, network)(torch.randn(3, 5, 6, 6))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_outputs_keep_their_order_and_may_be_changed_in_place(order: torch.memory_format) -> None:
    x = torch.randn(3, 4, 6, 6).contiguous(memory_format=order).requires_grad_()
    coupling = AffineCoupling(4, GlowNetwork(2, 4, 16))
    z, logdet = coupling(x)
    assert z.is_contiguous(memory_format=order)
    z.mul_(2)
    logdet.add_(1)
    y = ops.channel_map(x, torch.eye(4), torch.ones(4))
    y.add_(1)
    (z.sum() + y.sum()).backward()
    assert torch.allclose(x.grad, torch.full_like(x, 3.0))  # type: ignore[arg-type]
    with torch.no_grad():
        assert coupling(x)[0].is_contiguous(memory_format=order)


def test_images_without_pixels() -> None:
    x = torch.zeros(2, 4, 0, 7)
    coupling = AffineCoupling(4, GlowNetwork(2, 4, 16)).eval()
    z, logdet = coupling(x)
    assert z.shape == x.shape and torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize("flip", [False, True])
def test_a_watched_network_is_called(flip: bool) -> None:
    """A layer gives the same with the operation and with a network that has a hook, which the operation would not call."""
    torch.manual_seed(0)
    coupling = AffineCoupling(5, GlowNetwork(3, 4, 16), flip=flip).double()
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    coupling(x)
    with torch.no_grad():
        for p in coupling.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z, logdet = coupling(x)
    calls: list[nn.Module] = []
    coupling.conditioner.register_forward_hook(lambda module, args, output: calls.append(module))
    again, logdet_again = coupling(x)
    assert calls == [coupling.conditioner]
    assert torch.allclose(z, again, atol=1e-12) and torch.allclose(logdet, logdet_again, atol=1e-12)
    assert torch.allclose(coupling.inverse(z)[0], x, atol=1e-10)
