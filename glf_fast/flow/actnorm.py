"""ActNorm: a scale and a shift per channel that start where the first batch says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.moments import active_processes, moments, not_traced, refuse_shards
from glf_fast.ops.checks import check_channels, check_state
from glf_fast.reference import log_normal

__all__ = ["ActNorm", "data_dependent_start", "find_far", "set_by_another_process"]

# In standard deviations of the output. Folded into a matrix behind it, an ActNorm that takes a mean of 2 σ away makes float32
# errors of log_prob 1.1 times as large (of samples 1.4 times), one of 100 σ ten times.
_FAR = 2.0


def data_dependent_start(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """log-scale s and bias b (D,) with which (x + b)·e^s has mean 0 and variance 1 in every channel of x (B, D, …).

    Inside of DistributedDataParallel, of the batches of all processes together. None where they have no variance, of one value.

    A channel that does not vary (σ ≤ 1e-6, a dead unit or an image border) keeps scale 1: dividing by its σ would amplify
    the first sample that differs a million times.
    """
    found = moments(x)
    if found is None:
        return None
    mean, std = found
    return -torch.where(std > 1e-6, std, torch.ones_like(std)).log(), -mean


def set_by_another_process(initialized: Tensor, log_scale: Tensor, bias: Tensor) -> bool:
    """Whether another process has set these ActNorms, whose values DistributedDataParallel has brought here.

    Raises RuntimeError where it has brought the flags alone, because the other process went on without this one.
    """
    return active_processes() is not None and _set_elsewhere(initialized, log_scale, bias)


@not_traced
def _set_elsewhere(initialized: Tensor, log_scale: Tensor, bias: Tensor) -> bool:
    if not initialized.all():
        return False
    if not (log_scale.any() or bias.any()):
        raise RuntimeError(
            "one process has given ActNorms their start by itself: call the DistributedDataParallel in all processes, not the "
            "module inside of it in one, or send a first batch through the module before wrapping it"
        )
    return True


class ActNorm(nn.Module):
    """y = (x + b)·e^s per channel; log|det J| = pixels·Σ s.   Glow (arXiv:1807.03039), section 3.1.

    b and s start at zero and are set by the first batch of two or more values that passes `forward` in training mode, so
    that y has zero mean and unit variance. The buffer `initialized` records it: a loaded or copied module never starts again.
    `far` says whether that start, or a loaded state, moves the data so far that x·e^s + b·e^s loses digits of (x + b)·e^s;
    flows with layers that may be folded find it again in `train` and `eval`, see `find_far`.

    Vectors (B, D) or images (B, D, H, W); O(B·D) both ways.
    """

    initialized: Tensor
    far = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        # 0 or 1: tools that average buffers cannot subtract bools.
        self.register_buffer("initialized", torch.zeros(()))
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
        refuse_shards(self)
        if not set_by_another_process(self.initialized, self.log_scale, self.bias):
            found = data_dependent_start(x)
            if found is None:
                return
            done = self.initialized > 0  # in an averaged copy of a flow
            for parameter, value in zip((self.log_scale, self.bias), found, strict=True):
                parameter.copy_(torch.where(done, parameter, value))
            self.initialized.fill_(1)
        self._started = True
        if not torch.compiler.is_compiling():  # which stops at what a tensor's value decides
            self.far = self._is_far()

    def _is_far(self) -> bool:
        return bool((self.bias * self.log_scale.exp()).detach().abs().max() > _FAR)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + b)·e^s and its logdet (B,); the context is not used."""
        x = self._begin(x)
        y = (x + self._channels(self.bias, x)) * self._channels(self.log_scale.exp(), x)
        return y, self._logdet(x)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log N(y; 0, I) + log|det J| in nats, (B,): the density of a flow that ends here. The context is not used."""
        if isinstance(x, Tensor) and x.ndim != 2:
            y, logdet = self(x)
            return log_normal(y) + logdet
        return ops.actnorm_log_prob(self._begin(x), self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z·e^−s − b and its logdet (B,)."""
        z = self._check("z", z)
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
        x = self._check("x", x)
        if self.starts_next() and (x.numel() >= 2 * self.dim or active_processes() is not None):
            self._start(x)
        return x

    def _check(self, name: str, x: Tensor) -> Tensor:
        check_channels(name, x, self.dim)
        return check_state(name, x, self.bias)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.dim}, initialized={self._started}"


@torch.no_grad()
def find_far(layers: Iterable[nn.Module]) -> None:
    """Find `far` of all ActNorms among the layers again: values may have been set by hand, averaged or broadcast since.

    A GPU is waited for once, however many there are: one by one, the ActNorms of a Glow would make it wait 96 times a step.
    """
    norms = [layer for layer in layers if isinstance(layer, ActNorm) and layer.bias.device.type != "meta"]
    plain: list[ActNorm] = []
    for norm in norms:
        if type(norm.bias) is nn.Parameter:
            plain.append(norm)
        else:  # such as the shards of `fully_shard`
            norm.far = norm._is_far()
    if plain:
        shifts = torch._foreach_mul([n.bias for n in plain], torch._foreach_exp([n.log_scale for n in plain]))
        largest = [shift.to(shifts[0]) for shift in torch._foreach_norm(shifts, float("inf"))]
        for norm, far in zip(plain, (torch.stack(largest) > _FAR).tolist(), strict=True):
            if norm.far != far:  # a module's attributes are slow to set
                norm.far = far
