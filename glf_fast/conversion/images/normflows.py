"""Reads normflows' layers on images, and `NormalizingFlow`s of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.images.networks import Outputs, WithoutContext
from glf_fast.conversion.images.reshaped import Reshaped
from glf_fast.conversion.layers import Dense, Diagonal, Kept, Layer, NetworkCoupling, Unfusable
from glf_fast.conversion.normflows import KeptLayer, check_initialised, named_layers
from glf_fast.conversion.normflows import read_layer as read_layer_on_vectors
from glf_fast.conversion.reading import ConversionError, Reading, read_each, trained_together

__all__ = ["level_shapes", "read", "read_layer"]

Shape = tuple[int, ...]


def read(flow: Any, device: str = "cpu") -> Reading:
    """The layers of a `NormalizingFlow` on images, data → noise; its base stays, unless it is N(0, I)."""
    base = flow.q0
    named = list(named_layers(flow.flows))
    noise = tuple(base.shape)
    shapes = level_shapes([module for _, module in named], noise)
    event_shape = shapes[0] if shapes else noise
    of = {id(module): shape for (_, module), shape in zip(named, shapes, strict=True)}
    layers = read_each(named, lambda module: read_layer(module, of[id(module)]), KeptLayer, device, [base])
    standard = StandardBase(base)
    if not standard.is_identity():
        layers.append(Kept(standard, "q0 stays"))
    if event_shape != noise:
        layers.append(Kept(Reshaped(noise, event_shape), "noise has the data's shape"))

    def inverse(z: Tensor, context: Tensor | None) -> Tensor:
        return flow.forward(standard.inverse(z.reshape(-1, *noise))[0])

    return Reading(
        layers=layers,
        event_shape=event_shape,
        log_prob=lambda x, context: flow.log_prob(x),
        inverse=inverse,
    )


def level_shapes(modules: Iterable[nn.Module], noise: Shape) -> list[Shape]:
    """Shape of what each module is given, data → noise, by that of what the last one returns."""
    shapes: list[Shape] = []
    C, H, W = noise
    for module in reversed(list(modules)):
        if type(module).__name__ == "Squeeze":
            C, H, W = C // 4, 2 * H, 2 * W
        shapes.insert(0, (C, H, W))
    return shapes


class StandardBase(nn.Module):
    """A normal base distribution with a mean and a scale, as the map to N(0, I)."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        kind = type(base).__name__
        if kind not in ("DiagGaussian", "GlowBase") or getattr(base, "class_cond", False):
            raise ConversionError(f"q0 ({kind}): the base must be a DiagGaussian, or a GlowBase without classes")
        if base.temperature is not None:
            raise ConversionError(f"q0 ({kind}): temperature is {base.temperature}; set it to None")
        self.base = base

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x − μ)/σ and its logdet (B,)."""
        mean, log_scale = self._moments()
        return (x - mean) * torch.exp(-log_scale), self._logdet(x, -log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """μ + σ·z and its logdet (B,)."""
        mean, log_scale = self._moments()
        return mean + log_scale.exp() * z, self._logdet(z, log_scale)

    def is_identity(self) -> bool:
        """Whether it is N(0, I), and stays that."""
        trained = any(p.requires_grad for p in self.base.parameters())
        moved = any(bool(moment.any()) for moment in self._moments())
        return not (trained or moved)

    def _moments(self) -> tuple[Tensor, Tensor]:
        base = self.base
        if type(base).__name__ == "DiagGaussian":
            return base.loc, base.log_scale
        factor = base.logscale_factor
        return base.loc * torch.exp(factor * base.loc_logs), base.log_scale * torch.exp(factor * base.log_scale_logs)

    @staticmethod
    def _logdet(x: Tensor, log_scale: Tensor) -> Tensor:
        return log_scale.expand(len(x), *x.shape[1:]).flatten(1).sum(1)


def read_layer(module: nn.Module, shape: Shape) -> list[Layer]:
    """One layer on images (C, H, W), data → noise; raises Unfusable."""
    reader = _READERS.get(type(module).__name__)
    if reader is None or not type(module).__module__.startswith("normflows."):
        raise Unfusable("no kernel covers this kind of layer on images")
    return reader(module, shape[0])


def _affine_coupling_block(module: Any, C: int) -> list[Layer]:
    split, coupling, _ = module.flows
    half = C - C // 2
    channels = torch.arange(C)
    if split.mode == "channel":
        passive, transformed = channels[:half], channels[half:]
    elif split.mode == "channel_inv":
        transformed, passive = channels[:half], channels[half:]
    else:
        raise Unfusable(f"split_mode {split.mode!r} does not split channels")
    if not len(passive) or not len(transformed):
        raise Unfusable("one channel is too few for a coupling")
    check_initialised(coupling.param_map)
    network = WithoutContext(coupling.param_map)
    if not coupling.scale:
        return [NetworkCoupling(passive, transformed, Outputs(network, "t"), "exp", None, add_first=False, undo=True)]
    if coupling.scale_map not in _SCALE_MAPS:
        raise Unfusable(f"scale_map {coupling.scale_map!r} is not covered")
    log_scale, constant, undo = _SCALE_MAPS[coupling.scale_map]
    outputs = Outputs(network, "tutu", factor_t=1.0 if undo else -1.0)
    return [NetworkCoupling(passive, transformed, outputs, log_scale, constant, add_first=not undo, undo=undo)]


# scale_map → log-scale, its constant, and whether data → noise is (v − t)·e^−f(u) and not (v − t)·e^f(u).
_SCALE_MAPS: dict[str, tuple[str, float | None, bool]] = {
    "exp": ("exp", None, True),
    "sigmoid": ("glow", 2.0, False),
    "sigmoid_inv": ("glow", 2.0, True),
}


def _affine_const_flow(module: Any, C: int) -> list[Layer]:
    if tuple(module.s.shape) != (1, C, 1, 1):
        raise Unfusable(f"its shape {tuple(module.s.shape[1:])} is not one number for each of {C} channels")
    check_initialised(module)
    s, t = module.s.view(-1), module.t.view(-1)
    return [Diagonal(-s, -t * torch.exp(-s), trained_together(module.s, module.t))]


def _invertible_1x1_conv(module: Any, C: int) -> list[Layer]:
    W = (module._assemble_W() if module.use_lu else module.W).T  # conv2d multiplies columns
    return [Dense(W, W.new_zeros(C), trained_together(*module.parameters()), regular=module.use_lu)]


_READERS: dict[str, Callable[[Any, int], list[Layer]]] = {
    "ActNorm": _affine_const_flow,
    "AffineConstFlow": _affine_const_flow,
    "AffineCouplingBlock": _affine_coupling_block,
    "Invertible1x1Conv": _invertible_1x1_conv,
    "Permute": read_layer_on_vectors,
}
