"""A flow of one number: splines between affine maps, all functions of the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow import MLP, Flow
from glf_fast.reference import Spline

__all__ = ["UnivariateFlow"]


class UnivariateFlow(Flow):
    """`steps` times x → spline(e^s·x + t) on (B, 1). A coupling flow needs two columns, one to condition the other.

    An MLP of the context makes s, t and the splines' parameters of all steps; without a context these are parameters.

    Args:
        steps: K.
        hidden: widths of the MLP's zero to eight hidden layers.
        context_dim: columns of the context; 0 for none.
        spline: bins and box of the splines.

    Example:
        >>> flow = UnivariateFlow(steps=2, hidden=(16,), context_dim=3)
        >>> flow.log_prob(torch.zeros(5, 1), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, steps: int, hidden: tuple[int, ...], context_dim: int = 0, spline: Spline | None = None) -> None:
        super().__init__((1,), context_dim)
        self.steps, self.spline = steps, Spline() if spline is None else spline
        width = steps * (2 + self.spline.columns)
        self.numbers = MLP(context_dim, hidden, width) if context_dim else nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, 1) → z (B, 1), logdet (B,)."""
        return self._through("x", x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, 1) → x (B, 1), logdet (B,)."""
        return self._through("z", z, context, inverse=True)

    def _through(self, name: str, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        self._check_event(name, x)
        context = self._expand_context(context, len(x))
        found = self.numbers.expand(len(x), -1) if isinstance(self.numbers, nn.Parameter) else self.numbers(context)
        steps = found.unflatten(1, (self.steps, -1)).unbind(1)
        logdet = x.new_zeros(len(x))
        for step in reversed(steps) if inverse else steps:
            log_scale, shift, parameters = step.split([1, 1, self.spline.columns], 1)
            log_scale = 2 * torch.tanh(log_scale / 2)
            if not inverse:
                x = x * log_scale.exp() + shift
            x, change = ops.spline(x, parameters[:, None], self.spline, inverse=inverse, event_dims=1)
            if inverse:
                x = (x - shift) * (-log_scale).exp()
            logdet = logdet + change + (-log_scale if inverse else log_scale)[:, 0]
        return x, logdet
