"""Affine coupling layer with any conditioner network, for vectors and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.ops.checks import check_log_scale, check_shape
from glf_fast.reference import LOG_SCALES

__all__ = ["AffineCoupling"]


class AffineCoupling(nn.Module):
    """z = [p, v·e^f(u) + t] with (p, v) = x split by channels and (u, t) = conditioner([p, context]); log|det J| = Σ f(u).

    RealNVP (arXiv:1605.08803), eqs. 4–6. The conditioner runs once in either direction.

    Args:
        dim: channels D of the input (B, D) or (B, D, H, W); at least 2. p has P = D − D//2 channels, v has T = D//2.
        conditioner: any network from (B, P + C, …) to (B, 2·T, …), u first, then t; to (B, T, …), t alone, if `additive`.
        additive: z_v = v + t, NICE (arXiv:1410.8516): no scale, logdet 0. The options below mean nothing then.
        log_scale, log_scale_constant: name and constant of f, see `glf_fast.reference.log_scale`.
        add_first: z_v = (v + t)·e^f(u), as in Glow (arXiv:1807.03039).
        flip: the first T channels are transformed, given the last P.

    Example:
        >>> coupling = AffineCoupling(6, MLP(3, [32], 6))
        >>> z, logdet = coupling(torch.zeros(4, 6))
        >>> z.shape, logdet.shape
        (torch.Size([4, 6]), torch.Size([4]))
    """

    def __init__(
        self,
        dim: int,
        conditioner: nn.Module,
        *,
        additive: bool = False,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__()
        check_log_scale(log_scale, log_scale_constant)
        if dim < 2:
            raise ValueError(
                f"a coupling needs at least two channels, one to condition on and one to change; got dim={dim}"
            )
        self.dim = dim
        self.conditioner = conditioner
        self.additive = additive
        self.log_scale = log_scale
        self.log_scale_constant = LOG_SCALES[log_scale] if log_scale_constant is None else log_scale_constant
        self.add_first = add_first
        self.flip = flip

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D, …) → z like x, logdet (B,)."""
        return self._couple(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D, …) → x like z, logdet (B,)."""
        return self._couple(z, context, inverse=True)

    def _couple(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_shape("x", x, (None, self.dim, *(None,) * (x.ndim - 2)), "(batch, dim, …)")
        transformed = self.dim // 2
        if self.flip:
            v, p = x[:, :transformed], x[:, transformed:]
        else:
            p, v = x[:, : self.dim - transformed], x[:, self.dim - transformed :]
        h = p
        if context is not None:
            pixels = context.view(*context.shape, *(1,) * (x.ndim - context.ndim)).expand(-1, -1, *x.shape[2:])
            h = torch.cat([p, pixels.to(p.dtype)], 1)
        raw = self.conditioner(h)
        columns, meaning = (1, "dim//2") if self.additive else (2, "2·(dim//2)")
        wanted = (len(x), columns * transformed, *x.shape[2:])
        check_shape("the conditioner's output", raw, wanted, f"(batch, {meaning}, …)")
        if self.additive:
            dtype = torch.promote_types(x.dtype, torch.float32)
            t, v = raw.to(dtype), v.to(dtype)
            w, logdet = v - t if inverse else v + t, v.new_zeros(len(v))
        else:
            u, t = raw.chunk(2, 1)
            w, logdet = ops.affine_coupling(
                v,
                u,
                t,
                log_scale=self.log_scale,
                log_scale_constant=self.log_scale_constant,
                add_first=self.add_first,
                inverse=inverse,
            )
        p = p.to(w.dtype)
        return torch.cat([w, p] if self.flip else [p, w], 1), logdet

    def extra_repr(self) -> str:
        """Shown by repr."""
        flip = ", flip=True" * self.flip
        if self.additive:
            return f"{self.dim}, additive=True{flip}"
        constant = "" if self.log_scale_constant is None else f"({self.log_scale_constant:g})"
        return f"{self.dim}, log_scale={self.log_scale}{constant}{', add_first=True' * self.add_first}{flip}"
