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

    That is float32 or float64 throughout, or under autocast a float32 x with parameters in half precision, which libraries
    compute in float32 from the softmax on.
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
    """
    width = sum(part.shape[-1] for part in parts)
    shape = (*parts[0].shape[:-1], width)
    if ordinary():  # compilers and transforms of functions do not follow `_base`
        base = parts[0]._base
        if base is not None and base.is_contiguous() and _columns(base, shape, parts) and _connected(base, parts):
            return base.view(shape)
    return torch.cat(parts, -1)


def _columns(base: Tensor, shape: tuple[int, ...], parts: tuple[Tensor, ...]) -> bool:
    """Whether the parts are the columns of `base` in that shape."""
    whole = torch.Size(shape)
    if base.numel() != whole.numel():
        return False
    strides = tuple(whole[i + 1 :].numel() for i in range(len(whole)))
    offset = base.storage_offset()
    for part in parts:
        if part._base is not base or part.dtype != base.dtype or part.storage_offset() != offset:
            return False
        if any(n > 1 and a != b for n, a, b in zip(part.shape, part.stride(), strides, strict=True)):
            return False
        offset += part.shape[-1]
    return True


def _connected(base: Tensor, parts: tuple[Tensor, ...]) -> bool:
    """Whether gradients may go to `base` instead of the parts: all would arrive there, and nobody waits on the way."""
    if not base.requires_grad or not torch.is_grad_enabled():
        return True
    return all(part.grad_fn is not None and not part._backward_hooks and not part.retains_grad for part in parts)
