"""The losses of the last steps, kept on the device until they are needed, so that no step waits for the device."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from glf_fast import distributed
from glf_fast.errors import UserError
from glf_fast.training import checkpoint

__all__ = ["LossLog"]


class LossLog:
    """A collection of the losses of steps; a step may lack some of the losses.

    Args:
        remedy: what to do if a loss is not finite.    capacity: number of steps between two calls of `flush`.
    """

    def __init__(self, remedy: str, capacity: int = 50) -> None:
        self.remedy, self.capacity = remedy, capacity
        self._steps: list[dict[str, Tensor]] = []

    @property
    def full(self) -> bool:
        """Whether `flush` must be called before the next `add`."""
        return len(self._steps) == self.capacity

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of one step, scalars on the device."""
        self._steps.append(losses)

    def flush(self, images: int, batch_size: int, last: Path) -> dict[str, float]:
        """Means of the losses since the last flush; waits for the device.

        Raises:
            UserError: a loss was not finite. The message names the loss, the step and the last good checkpoint.
        """
        steps, self._steps = self._steps, []
        names = list(dict.fromkeys(name for step in steps for name in step))
        # All losses are transferred at once.
        losses = [loss.float() for step in steps for loss in step.values()]
        flat = distributed.mean(torch.stack(losses)).tolist() if losses else []  # there are none if all phases rest
        values = iter(flat)
        rows = [dict(zip(step, values, strict=False)) for step in steps]
        for back, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
            if not all(map(math.isfinite, row.values())):
                at = images - back * batch_size
                terms = ", ".join(f"{name} = {value:.4g}" for name, value in row.items())
                kept = (
                    f"the last good checkpoint is {last}" if checkpoint.exists(last) else "there is no checkpoint yet"
                )
                raise UserError(
                    f"the loss is not finite at step {at // batch_size} ({at} images): {terms}; {kept}; {self.remedy}"
                )
        means = {}
        for name in names:
            column = [row[name] for row in rows if name in row]
            means[name] = sum(column) / len(column)
        return means
