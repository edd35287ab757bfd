"""Space to depth: blocks of pixels become channels."""

from __future__ import annotations

from torch import Tensor, nn

from glf_fast.ops.checks import check_choice, check_integer, check_tensors

__all__ = ["Squeeze"]

ORDERS = ("channels", "pixels")


class Squeeze(nn.Module):
    """(B, C, H, W) → (B, C·f², H/f, W/f): each block of f × f pixels becomes one pixel; a permutation, logdet 0.

    RealNVP (arXiv:1605.08803), section 3.6.

    Args:
        factor: f.
        order: what pixel (i, j) of channel c becomes. "channels": channel c·f² + i·f + j, as in Glow, nflows, normflows and
            `torch.nn.PixelUnshuffle`, so that the first half of the channels holds the first half of c. "pixels": channel
            (i·f + j)·C + c, as in TensorFlow's `space_to_depth`, so that it holds half of every block.

    Example:
        >>> squeeze = Squeeze()
        >>> z, logdet = squeeze(torch.arange(4.0).view(1, 1, 2, 2))
        >>> z.flatten()
        tensor([0., 1., 2., 3.])
    """

    def __init__(self, factor: int = 2, *, order: str = "channels") -> None:
        super().__init__()
        check_integer("factor", factor, 2)
        check_choice("order", order, ORDERS)
        self.factor = factor
        self.order = order

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, H, W) → (C·f², H/f, W/f); raises ValueError where H or W is no multiple of f."""
        f = self.factor
        if len(shape) != 3 or shape[1] % f or shape[2] % f:
            raise ValueError(
                f"Squeeze needs images (channels, height, width) whose sides are multiples of {f}; got {shape}"
            )
        return shape[0] * f * f, shape[1] // f, shape[2] // f

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, C, H, W) → (B, C·f², H/f, W/f) and its logdet (B,), 0; the context is not used."""
        check_tensors(x=x)
        channels, height, width = self.output_shape(tuple(x.shape[1:]))
        f = self.factor
        blocks = x.unflatten(3, (width, f)).unflatten(2, (height, f))  # (B, C, H/f, i, W/f, j)
        # The order of memory stays.
        rows = blocks.permute(0, 2, 4, 1, 3, 5) if self.order == "channels" else blocks.permute(0, 2, 4, 3, 5, 1)
        if _channels_last(x):
            return rows.reshape(len(x), height, width, channels).movedim(-1, 1), x.new_zeros(len(x))
        return rows.movedim((1, 2), (4, 5)).reshape(len(x), channels, height, width), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, C·f², H, W) → (B, C, H·f, W·f) and its logdet (B,), 0; the context is not used."""
        check_tensors(z=z)
        f = self.factor
        if z.ndim != 4 or z.shape[1] % (f * f):
            raise ValueError(f"z must have shape (batch, a multiple of {f * f}, height, width); got {tuple(z.shape)}")
        channels, height, width = z.shape[1] // (f * f), z.shape[2] * f, z.shape[3] * f
        if self.order == "channels":
            blocks = z.unflatten(1, (channels, f, f)).permute(0, 1, 4, 2, 5, 3)  # (B, C, H, i, W, j)
        else:
            blocks = z.unflatten(1, (f, f, channels)).permute(0, 3, 4, 1, 5, 2)
        if _channels_last(z):
            return blocks.movedim(1, -1).reshape(len(z), height, width, channels).movedim(-1, 1), z.new_zeros(len(z))
        return blocks.reshape(len(z), channels, height, width), z.new_zeros(len(z))

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.factor}" + f", order={self.order!r}" * (self.order != "channels")


def _channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1
