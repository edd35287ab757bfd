"""The two Glows that most code on GitHub copies, by their classes' names and formulas: they are in no package.

One has a `Glow` of `blocks`, each with steps in a list `flows` (rosinality's glow-pytorch). The other has a `FlowNet`, whose
`layers` are `FlowStep`s between squeezes and splits (chaiyujin's glow-pytorch, and y0ast's Glow-PyTorch, made from it).
`accelerate` alone replaces their steps: squeezes, splits and learned Gaussians are parts of their classes' own code, which
stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import Chain, Part, put_in_list
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.layers import (
    Bijection,
    ConversionError,
    Dense,
    Diagonal,
    Layer,
    Permutation,
    Piece,
    Scale,
    Unfusable,
    check_started,
    trained_together,
)
from glf_fast.conversion.library import FusedLayer, Library
from glf_fast.reference import log_normal

__all__ = ["LIBRARIES"]


# -- steps, first to last: ActNorm, 1 × 1 convolution or permutation, coupling ------------------------------------------------


def _flow(part: Part) -> list[Layer]:
    """y = scale·(x + loc), y = W x, and (v + t)·σ(u + 2) with outputs [u | t], or v + t."""
    norm, conv, coupling = part.module.actnorm, part.module.invconv, part.module.coupling
    check_started(bool(norm.initialized))
    scale, loc = norm.scale.flatten(), norm.loc.flatten()
    if not bool((scale > 0).all()):
        raise Unfusable("a scale of its ActNorm is not positive")
    weight = conv.calc_weight() if hasattr(conv, "calc_weight") else conv.weight
    return [
        Diagonal(scale.log(), scale * loc, trained_together(norm.scale, norm.loc)),
        _convolution(conv, weight, regular=hasattr(conv, "calc_weight")),
        _coupling(part, coupling.net, "ut" if coupling.affine else "t"),
    ]


def _flow_step(part: Part) -> list[Layer]:
    """y = (x + bias)·e^logs, y = W x or a permutation, and (v + t)·σ(u + 2) with outputs t₀, u₀, t₁, u₁, …, or v + t."""
    step = part.module
    network = step.f if hasattr(step, "f") else step.block
    logs, bias = step.actnorm.logs.flatten(), step.actnorm.bias.flatten()
    kind, modules = _permutation(step)
    mixing: Piece
    if kind == "invconv":
        weight = modules.get_weight(logs.new_zeros(1, len(logs), 1, 1), False)[0]
        mixing = _convolution(modules, weight, regular=not hasattr(modules, "weight"))
    else:
        mixing = Permutation(torch.as_tensor(modules.indices, device=logs.device).long())
    return [
        Diagonal(logs, bias * logs.exp(), trained_together(step.actnorm.logs, step.actnorm.bias)),
        mixing,
        _coupling(part, network, "tutu" if step.flow_coupling == "affine" else "t"),
    ]


def _check_inited(norm: Any) -> None:
    """Raise ConversionError for a FlowStep's ActNorm unless it is `inited`: the next batch would overwrite its values.

    No state_dict has this attribute, so that it is False after a checkpoint has been loaded.
    """
    if not norm.inited and bool(norm.bias.any() or norm.logs.any()):
        raise ConversionError(
            "an ActNorm's `inited` is False, as after loading a checkpoint: call set_actnorm_init() of its Glow, or set "
            "`inited` to True, before accelerate"
        )
    check_started(bool(norm.inited))


def _convolution(module: nn.Module, weight: Tensor, *, regular: bool) -> Dense:
    W = weight.flatten(1).T
    return Dense(W, W.new_zeros(len(W)), trained_together(*module.parameters()), regular)


def _coupling(part: Part, network: nn.Module, layout: str) -> Layer:
    passive, transformed = torch.arange(part.shape[0], device=next(network.parameters()).device).chunk(2)
    declared = partial(DeclaredCoupling, passive, transformed, network, layout, context="none")
    return (declared() if layout == "t" else declared(Scale("glow", 2.0), add_first=True)).read(part)


def _permutation(step: Any) -> tuple[str, Any]:
    """The function that mixes the channels of a FlowStep, by name."""
    names = ("invconv", "shuffle", "reverse")
    return next((name, getattr(step, name)) for name in names if hasattr(step, name))


def _prepare(copied: nn.Module) -> None:
    """Let copies of FlowSteps call their own permutations, and invert matrices in float64.

    y0ast's FlowStep has a function `flow_permutation` that holds the step which it was made in; chaiyujin's has a name, which
    stays. chaiyujin's inverse matrices end in float32.
    """
    for step in (module for module in copied.modules() if hasattr(module, "flow_coupling")):
        if callable(getattr(step, "flow_permutation", None)):
            step.flow_permutation = partial(_permuted, step)  # type: ignore[assignment]
        if hasattr(conv := getattr(step, "invconv", None), "get_weight"):
            conv.get_weight = partial(_weight, conv)  # type: ignore[union-attr]


def _permuted(step: Any, z: Tensor, logdet: Tensor, rev: bool) -> Any:
    kind, module = _permutation(step)
    return module(z, logdet, rev) if kind == "invconv" else (module(z, rev), logdet)


def _weight(conv: Any, input: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    weight, logdet = type(conv).get_weight(conv, input, False)
    return weight.flatten(1).inverse()[:, :, None, None] if reverse else weight, logdet


# -- fused steps in the place of theirs, and their steps as layers of this project --------------------------------------


class _FusedFlow(FusedLayer):
    """A run of steps of a list `flows`."""

    def reverse(self, output: Tensor) -> Tensor:
        """Noise → data: (B, C, H, W) → the same."""
        return super().inverse(output)[0]


class _FusedStep(FusedLayer):
    """A run of FlowSteps: adds to the log-determinant that it is given."""

    def forward(self, input: Tensor, logdet: Any = None, reverse: bool = False) -> Any:
        """(B, C, H, W) → the same, and logdet + its own; noise → data if `reverse`."""
        out, own = super().inverse(input) if reverse else super().forward(input)
        return out, None if logdet is None else logdet + own


class _KeptFlow(Bijection):
    """One step of a list `flows`."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.step = part.module

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if inverse:
            x = self.step.reverse(x)
        y, logdet = self.step(x)
        return (x, x.new_zeros(len(x)) - logdet) if inverse else (y, x.new_zeros(len(x)) + logdet)


class _KeptStep(_KeptFlow):
    """One FlowStep."""

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.step(x, x.new_zeros(len(x)), inverse)


# -- where they are -----------------------------------------------------------------------------------------------------


def _blocks(glow: Any) -> list[Chain]:
    """One chain for the steps of each block. The number of channels is read from the block's first ActNorm."""
    chains = []
    for i, block in enumerate(glow.blocks):
        norm = next((step.actnorm for step in block.flows if hasattr(step, "actnorm")), None)
        if norm is not None:
            side = 2 ** (len(glow.blocks) - i)  # any that can be halved as often
            shape = (norm.loc.shape[1], side, side)
            parts = [Part(f"blocks.{i}.flows.{j}", step, shape) for j, step in enumerate(block.flows)]
            chains.append(Chain(parts, partial(put_in_list, block, "flows", list(block.flows))))
    if not chains:
        raise ConversionError("none of its blocks has a step with an ActNorm; fused steps have none")
    return chains


def _layers(net: Any) -> list[Chain]:
    """All layers: those that are no FlowSteps stay between them."""
    names = [type(layer).__name__ for layer in net.layers]
    norms = [layer.actnorm for layer in net.layers if hasattr(layer, "actnorm")]
    if not norms:
        raise ConversionError("none of its layers is a step with an ActNorm; fused steps have none")
    for norm in norms:  # before any comparison: until it is `inited`, y0ast's ActNorm cannot be called in eval mode
        _check_inited(norm)
    C, side = norms[0].bias.shape[1] // 4, 2 ** (1 + names.count("SqueezeLayer"))
    parts = []
    for i, layer in enumerate(net.layers):
        parts.append(Part(f"layers.{i}", layer, (C, side, side)))
        if names[i] == "SqueezeLayer":
            C, side = 4 * C, side // 2
        elif names[i] == "Split2d":
            C //= 2
    return [Chain(parts, partial(put_in_list, net, "layers", list(net.layers)))]


def _block_density(glow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """log p of images made of x (B, 4·C, H, W), the shape of what the first step is given."""
    log_p, logdet, _ = glow(x.reshape(len(x), x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3]))
    return x.new_zeros(len(x)) + log_p + logdet


def _net_density(net: Any, x: Tensor, context: Tensor | None) -> Tensor:
    z, logdet = net(x, x.new_zeros(len(x)))
    return log_normal(z) + logdet


LIBRARIES: tuple[Library, ...] = (
    Library(
        package="glow_of_blocks", hosts=("Glow",), marks=("blocks",), chains=_blocks, log_prob=_block_density,
        kept=_KeptFlow, fused=lambda fused, parts: _FusedFlow(fused), on_images={"Flow": _flow},
    ),
    Library(
        package="glow_of_steps", hosts=("FlowNet",), marks=("layers", "output_shapes"), chains=_layers,
        log_prob=_net_density, kept=_KeptStep, fused=lambda fused, parts: _FusedStep(fused),
        on_images={"FlowStep": _flow_step}, prepare=_prepare,
    ),
)  # fmt: skip
