"""The rows that a flow is fitted to: checked, divided into rows for training and for validation, and put into order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from glf_fast import seeds
from glf_fast.flow import Embedded, Flow
from glf_fast.flow.base import any_parameter
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.ops.checks import check_floating, check_tensors

__all__ = ["Dataset", "Rows", "checked_rows", "checked_weights", "dataset"]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set, on any device.

    Attributes:
        x: (N, *event_shape). context: (N, *context_shape), or None.
        weights: (N,), of the rows' losses; None where all are 1.
    """

    x: Tensor
    context: Tensor | None
    weights: Tensor | None

    def pick(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows at these indices, on the device of `like`."""
        index = index.to(self.x.device)
        x, context, weights = (
            None if t is None else t[index].to(like.device) for t in (self.x, self.context, self.weights)
        )
        assert x is not None
        return x, context, weights


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to validate on.

    Attributes:
        rows, train: all rows, and the indices of those to train on, whose weights have a mean of 1.
        held_out, validation: the rows that have those to validate on, and their indices; none, if there is no validation.
    """

    rows: Rows
    train: Tensor
    held_out: Rows
    validation: Tensor

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """The rows of each batch of an epoch (steps, batch_size), which depend on seed and epoch alone.

        Rows that do not fill a batch are left out, other ones in each epoch.
        """
        shuffled = torch.randperm(len(self.train), generator=seeds.generator(seed, "order", epoch))
        steps = len(self.train) // batch_size
        return self.train[shuffled[: steps * batch_size]].view(steps, batch_size)

    def digest(self) -> str:
        """SHA-256 of all rows."""
        found = hashlib.sha256()
        others = () if self.held_out.x is self.rows.x else (self.held_out.x, self.held_out.context)
        for t in (self.rows.x, self.rows.context, self.rows.weights, *others):
            found.update(repr(None if t is None else (t.dtype, tuple(t.shape))).encode())
            if t is not None:
                found.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


def dataset(
    flow: Flow,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor | None,
    validation: float | tuple[Tensor, Tensor | None],
    seed: int,
) -> Dataset:
    """The data set of these arguments of `fit`.

    Raises:
        ValueError, TypeError: what does not fit the flow, is not finite, or is empty.
    """
    x, context = checked_rows(flow, x, context, "")
    if weights is not None:
        weights = checked_weights(weights, len(x))
    if isinstance(validation, tuple | list):
        if len(validation) != 2:
            raise ValueError(f"validation rows must be a pair (x, context or None); got {len(validation)} items")
        held_out = Rows(*checked_rows(flow, *validation, "validation "), weights=None)
        train, kept = torch.arange(len(x)), torch.arange(len(held_out.x))
    elif not isinstance(validation, int | float):
        raise TypeError(
            "validation must be a fraction of the rows, or a pair of tensors (x, context or None); got "
            f"{type(validation).__name__}"
        )
    else:
        if not 0 <= validation < 1:
            raise ValueError(f"validation must be a fraction of the rows from 0 to below 1; got {validation}")
        n = max(1, round(validation * len(x))) if validation else 0
        if n == len(x):
            raise ValueError(f"validation={validation} leaves no row of {len(x)} to train on")
        shuffled = torch.randperm(len(x), generator=seeds.generator(seed, "validation"))
        train, kept = shuffled[n:], shuffled[:n]
        held_out = Rows(x, context, weights)
    rows = Rows(x, context, None if weights is None else _of_mean_one(weights, train))
    if held_out.weights is not None and len(kept) and not held_out.weights[kept.to(held_out.weights.device)].any():
        raise ValueError("weights are 0 for all rows held out for validation: hold out more, or give validation rows")
    return Dataset(rows, train, held_out, kept)


def checked_rows(flow: Flow, x: Tensor, context: Tensor | None, of: str) -> tuple[Tensor, Tensor | None]:
    """x and context without gradients, finite and of the flow's shapes."""
    like = any_parameter(flow)
    wanted = [(f"{of}x", x, flow.event_shape)]
    if flow.context_shape and context is None:
        raise ValueError(f"this flow is conditional: give a {of}context of shape (rows, {_shape(flow.context_shape)})")
    if context is not None:
        if not flow.context_shape:
            raise ValueError(f"this flow takes no context, but a {of}context was given")
        wanted.append((f"{of}context", context, flow.context_shape))
    for name, tensor, shape in wanted:
        check_tensors(**{name: tensor})
        if tensor.ndim != 1 + len(shape) or tensor.shape[1:] != shape or not len(tensor):
            raise ValueError(f"{name} must have shape (rows, {_shape(shape)}); got {tuple(tensor.shape)}")
        if len(tensor) != len(x):
            raise ValueError(f"{of}x has {len(x)} rows but {name} has {len(tensor)}")
        if tensor is x or isinstance(flow, StackedFlow):  # embeddings take contexts of any dtype
            check_floating(name, tensor)
            if tensor.dtype != like.dtype and tensor.dtype.itemsize >= 4:
                raise TypeError(
                    f"{name} is {tensor.dtype} but the flow is {like.dtype}: convert one of them with .to()"
                )
        if tensor is not x and isinstance(flow, Embedded):
            continue  # a network may know what to do with NaN
        if not (finite := tensor.detach().isfinite().flatten(1).all(1)).all():
            row = int((~finite).int().argmax())
            raise ValueError(
                f"{name} has NaN or infinity in {int((~finite).sum())} of {len(x)} rows, first in row {row}"
            )
    return x.detach(), None if context is None else context.detach()


def checked_weights(weights: Tensor, rows: int) -> Tensor:
    """Weights of so many rows without gradients, finite and not negative."""
    check_tensors(weights=weights)
    check_floating("weights", weights)
    if weights.shape != (rows,):
        raise ValueError(f"weights must have shape (rows,) = ({rows},); got {tuple(weights.shape)}")
    if not weights.isfinite().all() or (weights < 0).any():
        raise ValueError("weights must be finite and ≥ 0")
    return weights.detach()


def _of_mean_one(weights: Tensor, train: Tensor) -> Tensor:
    """The weights times a factor, so that their mean over the rows to train on is 1."""
    total = weights[train.to(weights.device)].double().sum()
    if total <= 0:
        raise ValueError("weights are 0 for all rows to train on")
    return (weights.double() * (len(train) / total)).to(weights.dtype)


def _shape(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
