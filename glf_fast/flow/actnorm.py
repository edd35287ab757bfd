"""ActNorm: a scale and a shift per channel that start where the first batch says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.ops.checks import check_shape, check_state
from glf_fast.reference import log_normal

__all__ = ["ActNorm", "data_dependent_start"]

# In standard deviations of the output. Folded into a matrix behind it, an ActNorm that takes a mean of 2 σ away makes float32
# errors of log_prob 1.1 times as large (of samples 1.4 times), one of 100 σ ten times.
_FAR = 2.0


def data_dependent_start(x: Tensor) -> tuple[Tensor, Tensor]:
    """log-scale s and bias b (D,) with which (x + b)·e^s has mean 0 and variance 1 in every channel of x (B, D, …).

    A channel that does not vary (σ ≤ 1e-6, a dead unit or an image border) keeps scale 1: dividing by its σ would amplify
    the first sample that differs a million times.
    """
    rows = x.detach().movedim(1, -1).flatten(0, -2)
    std = rows.std(0, correction=0)
    return -torch.where(std > 1e-6, std, torch.ones_like(std)).log(), -rows.mean(0)


class ActNorm(nn.Module):
    """y = (x + b)·e^s per channel; log|det J| = pixels·Σ s.   Glow (arXiv:1807.03039), section 3.1.

    b and s start at zero and are set by the first batch of two or more values that passes `forward` in training mode, so
    that y has zero mean and unit variance. The buffer `initialized` records it: a loaded or copied module never starts again.
    `far` says whether that start, or a loaded state, moves the data so far that x·e^s + b·e^s loses digits of (x + b)·e^s.

    Vectors (B, D) or images (B, D, H, W); O(B·D) both ways.
    """

    initialized: Tensor
    far = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("initialized", torch.tensor(False))
        # The same as a Python bool: reading the buffer would synchronise with the GPU at every step and break graph capture.
        self._started = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.bias.device.type != "meta":
            self._started = bool(self.initialized)
            self.far = self._is_far()

    def starts_next(self) -> bool:
        """Whether the next `forward` sets scale and shift from its input: their values are not known before."""
        return self.training and not self._started

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        log_scale, bias = data_dependent_start(x)
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)
        self.initialized.fill_(True)
        self._started = True
        if not torch.compiler.is_compiling():  # which stops at what a tensor's value decides
            self.far = self._is_far()

    def train(self, mode: bool = True) -> ActNorm:
        """Set the mode, and find `far` again: values may have been set by hand, averaged or broadcast since."""
        super().train(mode)
        if self.bias.device.type != "meta":
            self.far = self._is_far()
        return self

    def _is_far(self) -> bool:
        return bool((self.bias * self.log_scale.exp()).detach().abs().max() > _FAR)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + b)·e^s and its logdet (B,); the context is not used."""
        x = self._begin(x)
        y = (x + self._channels(self.bias, x)) * self._channels(self.log_scale.exp(), x)
        return y, self._logdet(x)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log N(y; 0, I) + log|det J| in nats, (B,): the density of a flow that ends here. The context is not used."""
        if x.ndim != 2:
            y, logdet = self(x)
            return log_normal(y) + logdet
        return ops.actnorm_log_prob(self._begin(x), self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z·e^−s − b and its logdet (B,)."""
        z = self._check(z)
        x = z * self._channels(torch.exp(-self.log_scale), z) - self._channels(self.bias, z)
        return x, -self._logdet(z)

    # Vectors need neither views nor a factor: each is an operation, and a node of autograd, of a few microseconds.
    def _channels(self, vector: Tensor, x: Tensor) -> Tensor:
        return vector if x.ndim == 2 else vector.view(self.dim, *(1,) * (x.ndim - 2))

    def _logdet(self, x: Tensor) -> Tensor:
        logdet = self.log_scale.sum()
        return (logdet if x.ndim == 2 else x.shape[2:].numel() * logdet).expand(len(x))

    def _begin(self, x: Tensor) -> Tensor:
        """Check x, and start from it if it is the first training batch."""
        x = self._check(x)
        if self.starts_next() and x.numel() >= 2 * self.dim:
            self._start(x)
        return x

    def _check(self, x: Tensor) -> Tensor:
        check_shape("x", x, (None, self.dim, *(None,) * (x.ndim - 2)), "(batch, dim, …)")
        return check_state("x", x, self.bias)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.dim}, initialized={self._started}"
