"""The gradients of a phase over several processes: DistributedDataParallel, and batch norms of whole batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from glf_fast import distributed
from glf_fast.models import GenerativeModel
from glf_fast.models.whole_batch import divided, whole

__all__ = ["average_statistics", "communication", "share_statistics", "wrapped"]


def wrapped(model: GenerativeModel, stage: int, phase: int) -> DistributedDataParallel:
    """The losses of a phase, as a function of (x, generator, index, labels), whose gradients are averaged over all processes.

    Only the parameters that the phase moves are communicated.
    """
    # A phase may leave some of its parameters out, but always the same ones.
    return DistributedDataParallel(_Phase(model, stage, phase), gradient_as_bucket_view=True, static_graph=True)


def communication(model: GenerativeModel, stage: int, device: torch.device, seconds: float) -> str:
    """A line for the user if more than half of a step of so many seconds is communication, by a measurement; else ""."""
    moved = {
        p for phase in model.stages()[stage].phases for name in phase.moves for p in model.parameter_groups()[name]
    }
    count = sum(p.numel() for p in moved)
    shared = sum(isinstance(norm, _Shared) for norm in _norms(model))
    gradients = distributed.all_reduce_seconds(count, device)
    statistics = 2 * shared * distributed.all_reduce_seconds(1, device) if shared else 0.0  # forward and backward
    if gradients + statistics <= seconds / 2:
        return ""
    return (
        f"communication takes {min(1, (gradients + statistics) / seconds):.0%} of a step of {1e3 * seconds:.3g} ms (sums of "
        f"{count:,} gradients {1e3 * gradients:.3g} ms, statistics of {shared} batch norms {1e3 * statistics:.3g} ms): use "
        f"fewer processes or a larger --batch-size{', or --local-batch-norm' if shared else ''}"
    )


class _Phase(nn.Module):
    """A phase's losses, of which one alone has gradients; its parameters are those that the phase moves."""

    def __init__(self, model: GenerativeModel, stage: int, phase: int) -> None:
        super().__init__()
        self._call, self._at = (
            (model,),
            (stage, phase),
        )  # in a tuple, so that its other parameters are not this module's
        this, groups = model.stages()[stage].phases[phase], model.parameter_groups()
        self.minimises = this.minimises
        self.moved = nn.ParameterList([p for name in this.moves for p in groups[name] if p.requires_grad])

    def forward(self, x: Tensor, generator: torch.Generator, *given: Tensor | None) -> dict[str, Tensor]:
        """The losses of x, the part of a batch that this process has, with its index and labels."""
        found = self._call[0](x, generator, *self._at, *given)
        return {name: loss if name == self.minimises else loss.detach() for name, loss in found.items()}


# -- batch norms ----------------------------------------------------------------------------------------------------------


def share_statistics(model: nn.Module) -> None:
    """Let the batch norms of a model, from now on, use mean and variance of whole batches inside of DistributedDataParallel.

    torch's SyncBatchNorm does the same on GPUs alone, and cannot be differentiated twice, as gradient penalties need it.
    """
    for norm in _norms(model):
        kind = type(norm)
        norm.__class__ = type(f"Shared{kind.__name__}", (_Shared, kind), {})


class _Shared(_BatchNorm):
    """A batch norm whose statistics are those of the batches of all processes, which have equally many items."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not divided():
            return super().forward(x)
        self._check_input_dim(x)
        dims = [d for d in range(x.ndim) if d != 1]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            variance, mean = torch.var_mean(wide, dims, correction=0)
            means, variances = whole(torch.stack([mean, variance])[None]).unbind(1)
            mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
            self._remember(mean.detach(), variance.detach(), len(means) * x.numel() // x.shape[1])
            shape = (1, -1, *(1,) * (x.ndim - 2))
            scale = (variance + self.eps).rsqrt()
            y = (wide - mean.view(shape)) * (scale if self.weight is None else scale * self.weight).view(shape)
            return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), step)
        self.running_var.lerp_((variance * (count / max(count - 1, 1))).to(self.running_var), step)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give the running statistics of all batch norms their means over the processes, of which each has seen its own items."""
    kept = [b for norm in _norms(model) for b in (norm.running_mean, norm.running_var) if b is not None]
    if kept:
        averaged = distributed.mean(torch.cat(kept))
        for buffer, values in zip(kept, averaged.split([len(b) for b in kept]), strict=True):
            buffer.copy_(values)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
