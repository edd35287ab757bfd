"""Channels that are factored out of a multi-scale flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.ops.checks import check_tensors

__all__ = ["Split"]


class Split(nn.Module):
    """Factors the last D//2 channels of images (B, D, H, W) out of a `SequentialFlow`: layers behind it see the others alone.

    What is factored out, v, is standardised by a learned prior, v ~ N(μ, σ²) with log σ = f(u) and (u, μ) = conv([p, context]),
    p the channels that go on: Glow (arXiv:1807.03039), released code. So it is noise of N(0, I) like all the rest, and
    z = [p, (v − μ)/σ] has as many numbers as x. The convolution (3 × 3) starts at zero: μ = 0, σ = 1.

    Any other prior is an `AffineCoupling` with `undo=True` in front of a `Split` that is not learned.

    Args:
        dim: D, at least 2.
        learned: False leaves v as it is: the prior is N(0, I).
        context_dim: channels or columns of a context that the prior depends on, too, such as a class; 0 for none, and then
            a context that comes is not used.
        log_scale, log_scale_constant: name and constant of f, see `glf_fast.reference.log_scale`. Glow's is "exp", log σ = u,
            which nothing bounds.
    """

    def __init__(
        self,
        dim: int,
        *,
        learned: bool = True,
        context_dim: int = 0,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"a split needs at least two channels, one to go on and one to factor out; got dim={dim}")
        if context_dim and not learned:
            raise ValueError(f"a prior that is not learned takes no context; got context_dim={context_dim}")
        self.sizes = (dim - dim // 2, dim // 2)
        self.context_dim = context_dim
        self.prior: AffineCoupling | None = None
        if learned:
            convolution = nn.Conv2d(self.sizes[0] + context_dim, 2 * self.sizes[1], 3, padding=1)
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.prior = AffineCoupling(
                dim, convolution, log_scale=log_scale, log_scale_constant=log_scale_constant, undo=True
            )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless this is the shape (D, H, W) of images that can be split; of vectors, too, if not learned."""
        dim = sum(self.sizes)
        if not shape or shape[0] != dim or (self.prior is not None and len(shape) != 3):
            wanted = f"({dim}, …)" if self.prior is None else f"({dim}, height, width)"
            raise ValueError(f"a split of {dim} channels needs {name} of shape {wanted} per sample; got {shape}")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, D, H, W) → [p, (v − μ)/σ] like x, logdet (B,)."""
        check_tensors(x=x)
        self.check("x", tuple(x.shape[1:]))
        return _unchanged(x) if self.prior is None else self.prior(x, self._used(x, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, D, H, W) → [p, μ + σ·v] like z, logdet (B,)."""
        check_tensors(z=z)
        self.check("z", tuple(z.shape[1:]))
        return _unchanged(z) if self.prior is None else self.prior.inverse(z, self._used(z, context))

    def _used(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context, if the prior depends on one."""
        if not self.context_dim:
            return None
        if context is None:
            raise ValueError(f"this prior is conditional: give a context of {self.context_dim} columns or channels")
        check_tensors(context=context)
        vectors, images = (len(x), self.context_dim), (len(x), self.context_dim, *x.shape[2:])
        if context.shape not in (vectors, images):
            raise ValueError(f"context must have shape {vectors} or {images}; got {tuple(context.shape)}")
        return context

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{sum(self.sizes)}" + ", learned=False" * (self.prior is None)


def _unchanged(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
