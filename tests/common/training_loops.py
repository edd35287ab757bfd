"""Training loops around a flow: a plain one, and the calls that Lightning and accelerate make, in their order.

A loop takes a density, what wraps it, batches, and whether to compute in bfloat16; it yields after every step of the optimizer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["LOOPS", "RATE", "Density", "Loop", "alone"]

Wrap = Callable[[nn.Module], nn.Module]
Loop = Callable[[nn.Module, Wrap, Sequence[Tensor], bool], Iterator[None]]
RATE = 1e-2
_LONGEST = 1.0  # norm of a gradient
_ACCUMULATED = 2  # batches for one step


class Density(nn.Module):
    """−log p, the way in which DistributedDataParallel reaches a flow."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)

    def training_step(self, x: Tensor) -> Tensor:
        """The `forward` of a LightningModule."""
        return self(x).mean()


def alone(module: nn.Module) -> nn.Module:
    """The wrapper of one process."""
    return module


def plain(density: nn.Module, wrap: Wrap, batches: Sequence[Tensor], low: bool) -> Iterator[None]:
    optimizer, wrapped = torch.optim.SGD(density.parameters(), RATE), wrap(density)
    for x in batches:
        optimizer.zero_grad()
        wrapped(x).mean().backward()
        nn.utils.clip_grad_norm_(density.parameters(), _LONGEST)
        optimizer.step()
        yield


def lightning(density: nn.Module, wrap: Wrap, batches: Sequence[Tensor], low: bool) -> Iterator[None]:
    """A look at the validation set first; `forward` redirected to `training_step`; autocast around the wrapper; a closure."""
    wrapped, forward = wrap(density), density.forward
    optimizer = torch.optim.SGD(density.parameters(), RATE)
    scaler = torch.amp.GradScaler(batches[0].device.type, init_scale=2.0**10, enabled=low)

    def redirected(*arguments: Tensor) -> Tensor:
        density.forward = forward
        return density.training_step(*arguments)

    def closure(x: Tensor, first: bool, last: bool) -> None:
        density.forward = redirected
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            loss = wrapped(x) / _ACCUMULATED
        if first:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        if last:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(density.parameters(), _LONGEST)

    density.eval()
    with torch.no_grad():
        wrapped(batches[-1])
    density.train()
    for i, x in enumerate(batches):
        last = (i + 1) % _ACCUMULATED == 0
        compute = functools.partial(closure, x, i % _ACCUMULATED == 0, last)
        if not last:
            with _no_sync(wrapped):
                compute()
        elif low:
            compute()
            scaler.step(optimizer)
            scaler.update()
            yield
        else:
            optimizer.step(compute)
            yield


def accelerate(density: nn.Module, wrap: Wrap, batches: Sequence[Tensor], low: bool) -> Iterator[None]:
    """The optimizer before the wrapper, autocast inside of it, and results in float32; gradients set to zero after a step."""
    optimizer, forward = torch.optim.SGD(density.parameters(), RATE), density.forward
    scaler = torch.amp.GradScaler(batches[0].device.type, init_scale=2.0**10)
    if low:
        inside = torch.autocast(batches[0].device.type, torch.bfloat16)(forward)
        density.forward = lambda *arguments: inside(*arguments).float()
    wrapped = wrap(density)
    for i, x in enumerate(batches):
        last = (i + 1) % _ACCUMULATED == 0
        with contextlib.nullcontext() if last else _no_sync(wrapped):
            scaler.scale(wrapped(x).mean() / _ACCUMULATED).backward()
        if last:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(wrapped.parameters(), _LONGEST)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            yield


def _no_sync(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


LOOPS: dict[str, Loop] = {"plain": plain, "lightning": lightning, "accelerate": accelerate}
