"""The parameters of splines as libraries pass them, three tensors, for `ops.spline`, which takes one."""

from __future__ import annotations

import torch
from torch import Tensor

from glf_fast.ops.backends import ordinary

__all__ = ["covered", "joined"]

FULL = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)


def covered(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `ops.spline` has the precision that a library has with these tensors, on one device.

    That is float32 or float64 throughout, or under autocast a float32 x with parameters in half precision: the spline is then
    computed in float32, as the libraries do on a GPU from the softmax on, and more exactly than they do on a processor.
    """
    dtype, device = parameters[0].dtype, parameters[0].device
    if x.device != device or any(p.dtype != dtype or p.device != device for p in parameters):
        return False
    if x.dtype == dtype:
        return dtype in FULL
    return x.dtype == torch.float32 and dtype in HALF and torch.is_autocast_enabled(device.type)


def joined(*parts: Tensor) -> Tensor:
    """The parts (…, n₁), (…, n₂) … as one tensor (…, n₁ + n₂ + …).

    Without a copy where the parts are all columns of one contiguous tensor, in order, as where a library has sliced the output
    of its network. It does not matter if the slices were changed in place: the tensor under a view has the history of it.
    Gradients then go to that tensor: slices that are to keep theirs, or have hooks, are concatenated.
    """
    base = parts[0]._base
    if base is not None and ordinary():  # compilers and transforms of functions do not follow `_base`
        whole = _whole(base, parts)
        if whole is not None:
            return whole
    return torch.cat(parts, -1)


def _whole(base: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
    """The tensor `base` in the shape in which the parts are its columns, if they are."""
    first, offset = parts[0], base.storage_offset()
    stride = first.stride()
    for part in parts:
        if part._base is not base or part.stride() != stride or part.storage_offset() != offset:
            return None
        offset += part.shape[-1]
    batch, width = first.shape[:-1], offset - base.storage_offset()
    if base.numel() != batch.numel() * width or base.dtype != first.dtype or not base.is_contiguous():
        return None
    if not _connected(base, parts):
        return None
    whole = base.view(*batch, width)
    return whole if whole.stride() == stride else None


def _connected(base: Tensor, parts: tuple[Tensor, ...]) -> bool:
    """Whether gradients may go to `base` instead of the parts: all would arrive there, and nobody waits on the way."""
    if not base.requires_grad or not torch.is_grad_enabled():
        return True
    return all(part.grad_fn is not None and not part._backward_hooks and not part.retains_grad for part in parts)
