"""The oracle of all readers: what a list of layers means, applied layer by layer as its definition says."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.layers import Coupling, Dense, Diagonal, Kept, Layer, Permutation
from glf_fast.conversion.reading import Reading
from glf_fast.flow import Flow
from glf_fast.reference import log_scale, mlp


def _coupling(layer: Coupling, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    net = layer.conditioner
    h = x[:, layer.passive]
    if context is not None and net.weights[0].shape[-2] > h.shape[1]:
        h = torch.cat([h, context], 1)
    raw = mlp(h, net.weights, net.biases, net.activation)
    v = x[:, layer.transformed]
    if raw.shape == v.shape:  # additive
        ell, t = torch.zeros_like(raw), raw
    else:
        u, t = raw.chunk(2, 1)
        ell = log_scale(u, layer.log_scale, layer.log_scale_constant)
    if inverse != layer.undo:
        w = v * torch.exp(-ell) - t if layer.add_first else (v - t) * torch.exp(-ell)
        ell = -ell
    else:
        w = (v + t) * torch.exp(ell) if layer.add_first else v * torch.exp(ell) + t
    return x.index_copy(1, layer.transformed, w), ell.sum(1)


def _apply(layer: Layer, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    none = x.new_zeros(len(x))
    if isinstance(layer, Permutation):
        return x[:, layer.order.argsort() if inverse else layer.order], none
    if isinstance(layer, Diagonal):
        if inverse:
            return (x - layer.shift) * torch.exp(-layer.log_scale), none - layer.log_scale.sum()
        return x * torch.exp(layer.log_scale) + layer.shift, none + layer.log_scale.sum()
    if isinstance(layer, Dense):
        logabsdet = torch.linalg.slogdet(layer.W)[1]
        if inverse:
            return torch.linalg.solve(layer.W, x - layer.shift, left=False), none - logabsdet
        return x @ layer.W + layer.shift, none + logabsdet
    if isinstance(layer, Kept):
        return layer.module.inverse(x, context) if inverse else layer.module(x, context)
    return _coupling(layer, x, context, inverse=inverse)


class Oracle:
    """A reading's layers as they are defined; differentiable with respect to the library's parameters."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for layer in self.layers:
            x, ldj = _apply(layer, x, context, inverse=False)
            logdet = logdet + ldj
        return x, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(len(z))
        for layer in reversed(self.layers):
            z, ldj = _apply(layer, z, context, inverse=True)
            logdet = logdet + ldj
        return z, logdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        z, logdet = self.forward(x, context)
        return logdet - 0.5 * z.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def _check_reading(flow: nn.Module, reading: Reading, *, tolerance: float = 1e-9) -> None:
    """The layers' log_prob, its gradients for input and every parameter, and the inverse are the library's."""
    oracle = Oracle(reading.layers)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    context = None if not reading.context_shape else torch.randn(16, *reading.context_shape).double()
    for scale in (0.3, 1.0, 3.0):
        x = (scale * torch.randn(16, *reading.event_shape).double()).requires_grad_()
        ours, theirs = oracle.log_prob(x, context), reading.log_prob(x, context)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        weight = torch.randn(16).double()
        grads = [
            torch.autograd.grad(weight @ lp, [x, *parameters], retain_graph=True, allow_unused=True)
            for lp in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            if a is None or b is None:  # what one leaves out, the other finds to be without influence
                assert not any(g is not None and bool(g.any()) for g in (a, b))
            else:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))
    with torch.no_grad():
        z = torch.randn(16, *reading.event_shape).double()
        x, logdet = oracle.inverse(z, context)
        if reading.inverse is not None:
            torch.testing.assert_close(x, reading.inverse(z, context), rtol=tolerance, atol=tolerance)
        back, ldj = oracle.forward(x, context)
        torch.testing.assert_close(back, z, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(ldj, -logdet, rtol=1e-7, atol=1e-7)
    _check_fused(flow, reading, tolerance=10 * tolerance)


def _check_fused(flow: nn.Module, reading: Reading, *, tolerance: float = 1e-8) -> Flow:
    """The fused flow's log_prob, inverse, and its gradients taken back to the library's parameters, in float64."""
    context_dim = sum(reading.context_shape)
    fused, sources = fuse(reading.layers, reading.event_shape, (context_dim,) if context_dim else ())
    context = torch.randn(16, context_dim).double() if context_dim else None
    x, weight = torch.randn(16, *reading.event_shape).double().requires_grad_(), torch.randn(16).double()
    ours, theirs = fused.log_prob(x, context), reading.log_prob(x, context)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        z = torch.randn(16, *reading.event_shape).double()
        expected = Oracle(reading.layers).inverse(z, context)
        for got, want in zip(fused.inverse(z, context), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    parameters = [p for p in flow.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(weight @ theirs, [x, *parameters], retain_graph=True, allow_unused=True)
    sources = [(p, value) for p, value, _ in sources if p.requires_grad]
    kept = [p for p in parameters if any(p is q for q in fused.parameters())]
    grad_x, *grads = torch.autograd.grad(
        weight @ ours, [x, *(p for p, _ in sources), *kept], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(grad_x, wanted[0], rtol=tolerance, atol=tolerance * float(wanted[0].abs().max()))
    found = {id(p): g for p, g in zip(kept, grads[len(sources) :], strict=True)}
    rest = [p for p in parameters if id(p) not in found]
    values = [(value, g) for (_, value), g in zip(sources, grads, strict=False) if value.requires_grad]
    back = (
        torch.autograd.grad([v for v, _ in values], rest, [g for _, g in values], retain_graph=True, allow_unused=True)
        if rest
        else ()
    )
    found |= {id(p): g for p, g in zip(rest, back, strict=True)}
    for p, want in zip(parameters, wanted[1:], strict=True):
        got = found[id(p)]
        got, want = (torch.zeros_like(p) if g is None else g for g in (got, want))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, float(want.abs().max())))
    return fused


def _randomize(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Every floating parameter moved away from where it starts, in float64; fixed ones stay."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(scale * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return module


@pytest.fixture
def check_reading():
    return _check_reading


@pytest.fixture
def check_fused():
    return _check_fused


@pytest.fixture
def randomize():
    return _randomize
