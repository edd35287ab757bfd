"""Buffers of indices, kept from tools that average weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glf_fast.flow.moments import active_processes
from glf_fast.ops.backends import ordinary

__all__ = ["Indices"]


class Indices:
    """The values that a buffer of indices (…, N) should have: no index twice in a row, all below `bound`.

    Tools that average weights average such a buffer, too: `AveragedModel(flow, use_buffers=True)` computes 0.9·i + 0.1·i in
    float32 and cuts it off, to i − 1 for one index of three. `check` sets an averaged buffer back to the values before.

    A buffer is looked at only after somebody has written to it, which its version counter tells without waiting for a GPU.

    Args:
        name: the buffer's, for errors.
        buffer: with values that are right.
        bound: the number of indices; N if None.
    """

    def __init__(self, name: str, buffer: Tensor, bound: int | None = None) -> None:
        self.name = name
        self.bound = buffer.shape[-1] if bound is None else bound
        self.seen: Tensor | None = None
        self.version: int | None = None  # of `seen` when it was looked at; None if torch does not count
        self.right: Tensor | None = None
        self.check(buffer)

    def check(self, buffer: Tensor, signs: Tensor | None = None) -> Tensor:
        """The buffer, with its right values again if they were averaged.

        Args:
            signs: ±1 that belong to the indices. An average of different flows shows in them.

        Raises:
            ValueError: values that are neither indices nor averages of the right ones.
        """
        if torch.compiler.is_compiling():
            return buffer
        if buffer is not self.seen or (self.version is not None and self.version != buffer._version):
            with torch._C._DisableFuncTorch():  # a transform would not let a tensor from outside be set back
                self._look(buffer, signs)
        return buffer

    def load(self, buffer: Tensor, errors: list[str]) -> None:
        """Take the values of a buffer that was loaded; adds to `errors` what is wrong with them."""
        self.seen = self.right = None
        try:
            self.check(buffer)
        except ValueError as error:
            errors.append(str(error))

    def __deepcopy__(self, memo: dict[int, Any]) -> Indices:
        if self.seen is not None:
            self.check(self.seen)
        other = Indices.__new__(Indices)
        other.__dict__.update(self.__dict__, seen=None)  # which is looked at when the copy is first used
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}

    @torch.no_grad()
    def _look(self, buffer: Tensor, signs: Tensor | None) -> None:
        # DistributedDataParallel writes to all buffers at each forward, what the first process has.
        if buffer.device.type == "meta" or active_processes() is not None or _captures(buffer):
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(buffer) or not ordinary(transforms=True):
            return
        found, right = buffer.detach().to("cpu", copy=True), self.right
        if right is not None and right.shape == found.shape and _averaged(found, right):
            buffer.copy_(right)
        elif _distinct(found, self.bound):
            self.right = found
        else:
            raise ValueError(
                f"{self.name} holds an index twice, or one out of range: {found.flatten().tolist()[:16]}. Did a tool that "
                "averages weights average it? Average parameters alone (AveragedModel with use_buffers=False), or load the "
                "state of a flow that was not averaged"
            )
        if signs is not None:
            _round(self.name, signs)
        self.seen, self.version = buffer, None if buffer.is_inference() else buffer._version


def _round(name: str, signs: Tensor) -> None:
    """Set signs to exactly ±1. Averages of one flow miss that by rounding, all by the same: 3·10⁻⁴ with a decay of 0.9999."""
    size = signs.abs()
    if size.max() - size.min() > 1e-5:
        raise ValueError(
            f"the signs beside {name} are no longer 1 and -1: a tool has averaged the states of different flows. Average "
            "again, beginning with a copy of the flow that is trained"
        )
    if size.max() != 1:
        signs.copy_(signs.sign())


def _averaged(found: Tensor, right: Tensor) -> bool:
    """Whether some of these are the right ones, cut off: less by one, or, as float32 has 24 bits, by some more of thousands."""
    lost = right - found
    return bool(lost.any()) and bool(((lost >= 0) & (lost <= 1 + right // 256)).all())


def _distinct(found: Tensor, bound: int) -> bool:
    in_order = found.sort(-1).values
    return bool((in_order.diff() > 0).all() and ((found >= 0) & (found < bound)).all())


def _captures(buffer: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must not wait for the GPU."""
    return buffer.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
