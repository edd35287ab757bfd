"""Reads FrEIA's modules on images, and networks in which there are such modules: the rest may be on vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from glf_fast.conversion import freia
from glf_fast.conversion.clamps import LogScale
from glf_fast.conversion.freia import all_in_one, halves, log_scale, read_actnorm, read_permutation
from glf_fast.conversion.freia_blocks import Seen, block_shape
from glf_fast.conversion.images.networks import Beside, Joined, Outputs, WithoutContext
from glf_fast.conversion.layers import Dense, Layer, NetworkCoupling, Unfusable
from glf_fast.conversion.reading import Reading

__all__ = ["read", "read_layer"]


def read(inn: Any, device: str = "cpu") -> Reading:
    """The layers of a `SequenceINN`, or of a `GraphINN` that is a chain, that starts with images; data → N(0, I)."""
    return freia.read(inn, device, read_layer)


def read_layer(module: nn.Module, seen: Seen) -> list[Layer]:
    """One module's layers, data → noise, on images (C, H, W) or vectors; raises Unfusable."""
    shape = block_shape(module)
    if len(shape) == 1:
        return freia.read_layer(module, seen)
    reader = _READERS.get(type(module).__name__)
    if reader is None or not type(module).__module__.startswith("FrEIA."):
        raise Unfusable("no kernel covers this kind of layer on images")
    if len(shape) != 3:
        raise Unfusable(f"it works on {module.dims_in}, not on one image")
    return reader(module, seen)


def _glow(module: Any, seen: Seen) -> list[Layer]:
    first, second = halves(module)
    scale = log_scale(module)
    return [
        _coupling(second, first, _given(module.subnet2, module, seen), scale),
        _coupling(first, second, _given(module.subnet1, module, seen), scale),
    ]


def _rnvp(module: Any, seen: Seen) -> list[Layer]:
    first, second = halves(module)
    scale = log_scale(module)
    nets = [
        _given(net, module, seen) for net in (module.subnet_s2, module.subnet_t2, module.subnet_s1, module.subnet_t1)
    ]
    return [_coupling(second, first, Beside(*nets[:2]), scale), _coupling(first, second, Beside(*nets[2:]), scale)]


def _nice(module: Any, seen: Seen) -> list[Layer]:
    first, second = halves(module)
    return [
        NetworkCoupling(p, t, Outputs(_given(net, module, seen), "t"), "exp", None, add_first=False)
        for p, t, net in ((second, first, module.F), (first, second, module.G))
    ]


def _one_sided(module: Any, seen: Seen) -> list[Layer]:
    first, second = halves(module)
    return [_coupling(first, second, _given(module.subnet, module, seen), log_scale(module))]


def _all_in_one(module: Any, seen: Seen) -> list[Layer]:
    parts = all_in_one(module)
    network = _given(module.subnet, module, seen)
    coupling = _coupling(parts.passive, parts.transformed, network, parts.scale, parts.shift_factor)
    return [*parts.before, coupling, *parts.after]


def _fixed_1x1_conv(module: Any, seen: Seen) -> list[Layer]:
    if module.M.requires_grad:
        raise Unfusable("its matrix is trained, away from the inverse that it has stored")
    W = module.M.flatten(1).T  # conv2d multiplies columns
    return [Dense(W, W.new_zeros(len(W)), trained=False, regular=False)]


_READERS: dict[str, Callable[[Any, Seen], list[Layer]]] = {
    "ActNorm": lambda module, seen: read_actnorm(module),
    "AffineCouplingOneSided": _one_sided,
    "AllInOneBlock": _all_in_one,
    "Fixed1x1Conv": _fixed_1x1_conv,
    "GLOWCouplingBlock": _glow,
    "NICECouplingBlock": _nice,
    "PermuteRandom": lambda module, seen: read_permutation(module),
    "RNVPCouplingBlock": _rnvp,
}


def _given(network: nn.Module, module: Any, seen: Seen) -> nn.Module:
    """The network with what the module gives to it: the passive channels, and those of its conditions."""
    if not module.dims_c:
        return WithoutContext(network)
    return Joined(network, None if seen.columns == tuple(range(seen.width)) else seen.columns)


def _coupling(
    passive: Tensor, transformed: Tensor, network: nn.Module, scale: LogScale, shift_factor: float = 1.0
) -> NetworkCoupling:
    outputs = Outputs(network, "ut", scale.factor, shift_factor)
    return NetworkCoupling(passive, transformed, outputs, scale.name, scale.constant, add_first=False)
