"""The base of all couplings: the division of the input, the conditioner, the order of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.flow.linear import InvertibleLinear
from glf_fast.flow.masks import ChannelHalves, Checkerboard
from glf_fast.ops.checks import check_channels, check_shape, check_tensors

__all__ = ["Coupling"]


class Coupling(nn.Module):
    """z_v = f(v; conditioner([p, context])), z_p = p, with x in two parts (p, v): what couplings of all kinds are.

    The conditioner runs once in either direction, and makes n numbers for each v.

    | `mask`         | v is                             | the conditioner is given                      | and returns         |
    |----------------|----------------------------------|-----------------------------------------------|---------------------|
    | "channels"     | the last T = D//2 channels       | p (B, D − T, …)                               | (B, n·T, …)         |
    | D booleans     | the T channels that are True     | p (B, D − T, …)                               | (B, n·T, …)         |
    | "checkerboard" | every second pixel, (0, 1) first | x (B, D, H, W) with zeros in the places of v  | (B, n·D, H, W)      |

    Args:
        dim: channels D of the input (B, D) or (B, D, H, W); at least 2, unless pixels are masked.
        conditioner: any network from [p, context] (B, P + C, …). On a processor images may come in `torch.channels_last`
            order, in which convolutions are faster.
        mask: how x is divided, see the table.
        flip: the other way round: the first T channels given the last D − T; the channels that are False; the other pixels.
        undo: data → noise is the inverse of f.
        pass_context: call conditioner(p, context), for a network with a use of its own for contexts of any shape. Without it
            the context, (B, C) or (B, C, H, W), becomes further channels of p.
    """

    _views = False  # the conditioner fails on images in channels_last order

    def __init__(
        self,
        dim: int,
        conditioner: nn.Module,
        *,
        mask: str | Sequence[bool] | Tensor,
        flip: bool,
        undo: bool,
        pass_context: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.conditioner = conditioner
        self.flip = flip
        self.undo = undo
        self.pass_context = pass_context
        self.mask = mask if isinstance(mask, str) else tuple(map(bool, mask))
        self._halves: ChannelHalves | None = None
        # Channels that do not lie together are brought together. A `SequentialFlow` leaves that to matrices before and behind.
        self.order: InvertibleLinear | None = None
        self.restore: InvertibleLinear | None = None
        if mask == "checkerboard":
            return
        transformed = _transformed(dim, self.mask, flip)
        T = sum(transformed)
        v_first = transformed == tuple(sorted(transformed, reverse=True))
        self._halves = ChannelHalves(*((T, dim - T) if v_first else (dim - T, T)), v_first=v_first)
        if not v_first and transformed != tuple(sorted(transformed)):
            order = sorted(range(dim), key=lambda channel: transformed[channel])
            restore = sorted(range(dim), key=lambda channel: order[channel])
            self.order, self.restore = (
                InvertibleLinear(dim, linear="permutation", permutation=channels) for channels in (order, restore)
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D, …) → z like x, logdet (B,)."""
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D, …) → x like z, logdet (B,)."""
        return self._run(z, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.order is None or self.restore is None:
            return self.couple(x, context, inverse=inverse)
        z, logdet = self.couple(self.order(x)[0], context, inverse=inverse)
        return self.restore(z)[0], logdet

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        saved = state_dict.get(f"{prefix}order.permutation")
        if (
            saved is not None
            and self.order is not None
            and not torch.equal(saved.cpu(), self.order.get_buffer("permutation").cpu())
        ):
            errors.append(f"{prefix or 'the coupling'} has the mask of another coupling")

    def couple(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """`forward`, or `inverse`, of channels that `order` has brought together, and left in that order."""
        check_channels("x", x, self.dim)
        parts = self.parts(x)
        p, v = parts.divide(x)
        w, logdet = self.transform(v, self.conditioned(p, context, parts.outputs), parts, inverse=inverse != self.undo)
        return parts.join(p.to(w.dtype), w), logdet

    def parts(self, x: Tensor) -> ChannelHalves | Checkerboard:
        """How x (B, D, …) is divided into p and v."""
        return Checkerboard(x, even=self.flip) if self._halves is None else self._halves

    @property
    def columns(self) -> int:
        """Numbers n that the conditioner makes for each v."""
        raise NotImplementedError

    def transform(
        self, v: Tensor, raw: Any, parts: ChannelHalves | Checkerboard, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """w like v, in float32 or better, and logdet (B,), of the conditioner's output, of which `parts.of_v` is v's part."""
        raise NotImplementedError

    def conditioned(self, p: Tensor, context: Tensor | None, channels: int) -> Any:
        """The conditioner's output for so many channels."""
        if not self.pass_context and context is not None:
            check_tensors(context=context)
            pixels = context.view(*context.shape, *(1,) * (p.ndim - context.ndim)).expand(-1, -1, *p.shape[2:])
            p = torch.cat([p, pixels.to(p.dtype)], 1)
        rest = (context,) if self.pass_context else ()
        try:
            raw = self.conditioner(p.contiguous() if self._views else p, *rest)
        except RuntimeError as error:
            if p.is_contiguous() or "view size is not compatible" not in str(error):
                raise
            self._views = True  # from now on
            raw = self.conditioner(p.contiguous(), *rest)
        if not isinstance(raw, tuple):
            wanted = (len(p), self.columns * channels, *p.shape[2:])
            factor = "" if self.columns == 1 else f"{self.columns}·"
            check_shape("the conditioner's output", raw, wanted, f"(batch, {factor}channels, …)")
        return raw

    def formula(self) -> str:
        """The map of v, as repr shows it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shown by repr."""
        mask = self.mask if isinstance(self.mask, str) else "".join("1" if is_v else "0" for is_v in self.mask)
        mask = "" if mask == "channels" else f", mask={mask}"
        names = ("flip", "undo", "pass_context")
        return f"{self.dim}, {self.formula()}{mask}" + "".join(
            f", {name}=True" for name in names if getattr(self, name)
        )


def _transformed(dim: int, mask: str | tuple[bool, ...], flip: bool) -> tuple[bool, ...]:
    """For each channel whether it is transformed."""
    if isinstance(mask, tuple):
        if len(mask) != dim or len(set(mask)) < 2:
            raise ValueError(f"mask must be {dim} booleans, some True and some False; got {mask}")
        return tuple(is_v != flip for is_v in mask)
    if mask != "channels":
        raise ValueError(f'mask must be "channels", "checkerboard" or {dim} booleans; got {mask!r}')
    if dim < 2:
        raise ValueError(
            f"a coupling needs at least two channels, one to condition on and one to change; got dim={dim}"
        )
    first, last = (dim // 2, dim - dim // 2) if flip else (dim - dim // 2, dim // 2)
    return (flip,) * first + (not flip,) * last
