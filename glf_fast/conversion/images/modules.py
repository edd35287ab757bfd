"""What layers on images become: couplings with a network of the library, and affine maps of the channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow import ActNorm, InvertibleLinear
from glf_fast.flow.linear import LINEAR_TENSORS, assemble

__all__ = ["ChannelCoupling", "ChannelMap", "FixedLinear", "OnChannels"]


_TURNED = 64  # pixels


class ChannelCoupling(nn.Module):
    """[p, w] or [w, p] of [p, v] or [v, p]: w is v·e^f(u) + t, with (u, t) = network(p, context); log|det J| = Σ f(u).

    Args:
        network: (p (B, P, …), context or None) → u and t, (B, T, …) each; u = None leaves e^f(u) out.
        passive, transformed: P and T, in channels. `flip`: those that are transformed come first.
        log_scale, log_scale_constant, add_first: see `glf_fast.AffineCoupling`. `undo`: data → noise is the inverse.
    """

    def __init__(
        self,
        network: nn.Module,
        passive: int,
        transformed: int,
        *,
        log_scale: str,
        log_scale_constant: float | None = None,
        add_first: bool = False,
        undo: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.passive, self.transformed = passive, transformed
        self.log_scale, self.log_scale_constant = log_scale, log_scale_constant
        self.add_first, self.undo, self.flip = add_first, undo, flip

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, P + T, …) → z like x, logdet (B,)."""
        return self._couple(x, context, inverse=self.undo)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, P + T, …) → x like z, logdet (B,)."""
        return self._couple(z, context, inverse=not self.undo)

    def _couple(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        # The gradient of a split is one copy; that of two slices is two buffers of zeros, two copies and a sum.
        if self.flip:
            v, p = x.split([self.transformed, self.passive], 1)
        else:
            p, v = x.split([self.passive, self.transformed], 1)
        u, t = self.network(p, context)
        if u is None:
            w = v - t if inverse else v + t
            logdet = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        else:
            w, logdet = ops.affine_coupling(
                v, u, t, log_scale=self.log_scale, log_scale_constant=self.log_scale_constant,
                add_first=self.add_first, inverse=inverse,
            )  # fmt: skip
        return torch.cat([w, p] if self.flip else [p, w], 1), logdet

    def extra_repr(self) -> str:
        """Shown by repr."""
        options = "".join(f", {name}=True" for name in ("add_first", "undo", "flip") if getattr(self, name))
        return f"{self.passive}, {self.transformed}, log_scale={self.log_scale}{options}"


class FixedLinear(nn.Module):
    """y = x W over the channels, with a W (C, C) that nobody trains: its inverse and determinant are made once."""

    linear = "fixed"
    weight: Tensor
    weight_inverse: Tensor
    logabsdet: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_inverse", torch.linalg.inv(weight))
        self.register_buffer("logabsdet", torch.linalg.slogdet(weight)[1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x W and its logdet (B,); the context is not used."""
        return ops.invertible_linear(x, self.weight, self.weight.new_zeros(len(self.weight)), self.logabsdet)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z W⁻¹ and its logdet (B,)."""
        offset = self.weight.new_zeros(len(self.weight))
        return ops.invertible_linear(z, self.weight_inverse, offset, self.logabsdet, inverse=True)


class ChannelMap(nn.Module):
    """An ActNorm and the 1 × 1 convolution behind it, which `OnChannels` applies as one product: ((x + b)·e^s) W."""

    def __init__(self, actnorm: ActNorm, linear: InvertibleLinear | FixedLinear) -> None:
        super().__init__()
        self.actnorm = actnorm
        self.linear = linear


def _assembled(
    maps: Sequence[ChannelMap], *, inverse: bool
) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], list[Tensor]]:
    """A, or A⁻¹ if `inverse`, and c of each map x A + c, and numbers whose sum is Σ log|det A|.

    Those of one kind are made together: ten operations, and ten nodes for the backward, not ten for each.
    """
    assembled: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    logabsdets: list[Tensor] = []
    for kind in sorted({map_.linear.linear for map_ in maps}):
        alike = [map_ for map_ in maps if map_.linear.linear == kind]
        A, A_inv, c, logabsdet = _alike(kind, alike, inverse=inverse)
        matrices = A_inv if inverse else A
        assert matrices is not None
        assembled |= zip(alike, zip(matrices.unbind(), c.unbind(), strict=True), strict=True)
        logabsdets.append(logabsdet.sum())
    return assembled, logabsdets


def _alike(kind: str, maps: Sequence[ChannelMap], *, inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """A (K, C, C), A⁻¹ if `inverse`, c (K, C) and log|det A| (K,) of K maps of one kind."""
    actnorms, linears = [map_.actnorm for map_ in maps], [map_.linear for map_ in maps]
    log_scale, bias = _stacked(actnorms, "log_scale"), _stacked(actnorms, "bias")
    if kind == "fixed":
        W_inv = _stacked(linears, "weight_inverse") if inverse else None
        return ops.fold_actnorm(_stacked(linears, "weight"), W_inv, _stacked(linears, "logabsdet"), log_scale, bias)
    tensors = {name: _stacked(linears, name) for name in LINEAR_TENSORS[kind]}
    return assemble(kind, tensors, log_scale.dtype, log_scale, bias, need_inverse=inverse)


def _stacked(modules: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([getattr(module, name) for module in modules])


class OnChannels(nn.Module):
    """Layers on images, one after the other; a context of any kind is handed to all of them.

    On a processor they work on images whose channels lie together, and give them back as they came: convolutions of 64
    channels on 16 × 16 pixels, and with them the whole flow, take a tenth less time so, with and without the backward.
    On 4 × 4 pixels they gain nothing.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, C, …) → z like x, logdet (B,)."""
        return self._run(iter(self.layers), x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, C, …) → x like z, logdet (B,)."""
        return self._run(reversed(self.layers), z, context, inverse=True)

    def _run(
        self, layers: Iterator[nn.Module], x: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        turned = x.device.type == "cpu" and x.ndim == 4 and x.shape[2:].numel() >= _TURNED and x.is_contiguous()
        if turned:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        maps, logabsdets = _assembled(
            [layer for layer in self.layers if isinstance(layer, ChannelMap)], inverse=inverse
        )
        pixels = x.shape[2:].numel() * (-1 if inverse else 1)
        logdets = [(pixels * logabsdet).expand(len(x)) for logabsdet in logabsdets]
        for layer in layers:
            if layer in maps:
                x = ops.channel_map(x, *maps[layer], inverse=inverse)
            else:
                x, ldj = layer.inverse(x, context) if inverse else layer(x, context)  # type: ignore[operator]
                logdets.append(ldj)
        if not logdets:
            logdets = [x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))]
        logdet = torch.stack(logdets).sum(0)
        return x.contiguous() if turned else x, logdet
