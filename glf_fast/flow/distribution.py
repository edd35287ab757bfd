"""Flows as torch.distributions: a `Distribution` of the data, and a `Transform` of a base distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from glf_fast import ops
from glf_fast.flow.base import Flow, any_parameter
from glf_fast.flow.embedded import Embedded
from glf_fast.ops.backends import ordinary
from glf_fast.ops.checks import check_tensors

__all__ = ["FlowDistribution", "FlowTransform"]


class FlowDistribution(Distribution):
    """The distribution p(x | context) of a flow, one for each row of the context. `Flow.distribution` returns it.

    Args:
        flow: the flow; its parameters get gradients from `log_prob` and `rsample`.
        context: (*batch_shape, *flow.context_shape), or None where the flow has no context; then batch_shape is ().

    Shapes are those of torch.distributions: `log_prob` takes values that broadcast with (*batch_shape, *event_shape);
    `sample(s)` and `rsample(s)` return (*s, *batch_shape, *event_shape).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 — torch's own attribute; the context is any real vector
    has_rsample = True

    def __init__(self, flow: Flow, context: Tensor | None = None, validate_args: bool | None = None) -> None:
        _check_context(flow, context)
        self.flow = flow
        self.context = context
        batch_shape = torch.Size() if context is None else _batch(flow, context)
        super().__init__(batch_shape, torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real vectors (or images)."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same distribution(s) with a larger batch shape; the context is not copied."""
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)
        new.flow = self.flow
        batch_shape = torch.Size(batch_shape)
        new.context = None if self.context is None else self.context.expand(*batch_shape, *self.flow.context_shape)
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of the shape to which `value` broadcasts, without the event dimensions."""
        check_tensors(value=value)
        if self._validate_args:
            self._validate_sample(value)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        flow, rows, context, batch = _rows(self.flow, value, self.context)
        return flow.log_prob(rows, context).reshape(batch)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples F⁻¹(u), u ~ N(0, I), through which gradients reach the flow and the context."""
        return self._draw(sample_shape)[1]

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Samples as from `rsample`, and their `log_prob`, in one pass."""
        z, x, logdet = self._draw(sample_shape)
        return x, self._base(z) - logdet

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shapes(self.flow)}, batch_shape={tuple(self.batch_shape)})"

    def _draw(self, sample_shape: Any) -> tuple[Tensor, Tensor, Tensor]:
        like = any_parameter(self.flow)
        z = torch.randn(self._extended_shape(torch.Size(sample_shape)), device=like.device, dtype=like.dtype)
        return z, *_by_rows(self.flow, z, self.context, inverse=True)

    def _base(self, z: Tensor) -> Tensor:
        dims = tuple(range(-len(self.event_shape), 0))
        return -0.5 * (z.square().sum(dims) + math.prod(self.event_shape) * math.log(2 * math.pi))


class FlowTransform(Transform):
    """The map from base noise to data, for torch's and pyro's `TransformedDistribution`.

    `t(z)` is `flow.inverse(z)`, and `t.inv(x)` is `flow(x)`, both without the log-determinant.
    This is torch's direction, the opposite of a flow's `forward`. `log_abs_det_jacobian(z, x)` is log|det ∂x/∂z|.

    With `cache_size=1`, the default, the last pair of noise and data is cached with its log-determinant. `log_prob` then costs
    one pass, or no pass for the sample just drawn. The cached pair is used only in the opposite direction, and only while the
    values of the flow, the context and the pair are unchanged. To detect any change, copies of these values are kept and
    compared; on a GPU the comparison waits for the device.

    Args:
        flow: the flow.
        context: (*batch_shape, *flow.context_shape), or None. A base distribution with a smaller batch is expanded to the
            context, as torch's own transforms expand it to their parameters: every row gets noise of its own.
        cache_size: 0 or 1.

    Example:
        >>> flow = CouplingFlow(dim=3, steps=2, hidden=(16,))
        >>> noise = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> data = torch.distributions.TransformedDistribution(noise, [FlowTransform(flow)])
        >>> data.log_prob(data.rsample((5,))).shape
        torch.Size([5])
    """

    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        _check_context(flow, context)
        self.flow = flow
        self.context = context
        self.domain = self.codomain = constraints.independent(constraints.real, len(flow.event_shape))
        self._forget()

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """A transform of the same flow and context with this cache size."""
        return self if cache_size == self._cache_size else FlowTransform(self.flow, self.context, cache_size)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise → data."""
        if self._made_by_inverse and self._holds(noise=x):
            return self._pair[1]  # type: ignore[index]
        y, logdet = _by_rows(self.flow, x, self.context, inverse=True)
        self._keep(x, y, logdet, by_inverse=False)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        """Data → noise."""
        if not self._made_by_inverse and self._holds(data=y):
            return self._pair[0]  # type: ignore[index]
        x, logdet = _by_rows(self.flow, y, self.context, inverse=False)
        self._keep(x, y, -logdet, by_inverse=True)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det ∂y/∂x| of the noise x and the data y, in the shape of the batch."""
        if self._holds(noise=x, data=y):
            return self._pair[2]  # type: ignore[index]
        return _by_rows(self.flow, x, self.context, inverse=True)[1]

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the data for noise of this shape; its batch dimensions broadcast with the context's."""
        shape, event = torch.Size(shape), torch.Size(self.flow.event_shape)
        batch = shape[: len(shape) - len(event)]
        if shape[len(batch) :] != event:
            raise ValueError(f"a shape must end in the flow's event shape {tuple(event)}; got {tuple(shape)}")
        given = torch.Size() if self.context is None else _batch(self.flow, self.context)
        return torch.broadcast_shapes(batch, given) + event

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the noise for data of this shape; the same as `forward_shape`."""
        return self.forward_shape(shape)

    def __repr__(self) -> str:
        given = "" if self.context is None else f", batch_shape={tuple(_batch(self.flow, self.context))}"
        return f"FlowTransform({_shapes(self.flow)}{given})"

    # -- the last pair -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._pair: tuple[Tensor, Tensor, Tensor] | None = None  # noise, data, log-determinant
        self._made_by_inverse = False
        self._recorded: list[bool] = []  # for each tensor, whether gradients were recorded
        self._values: list[Tensor] = []  # copies of the pair and of all tensors on which it depends

    def _keep(self, noise: Tensor, data: Tensor, logdet: Tensor, *, by_inverse: bool) -> None:
        if self._cache_size and ordinary():  # else there are no values to compare
            tensors = self._tensors(noise, data)
            self._pair, self._made_by_inverse, self._recorded = (noise, data, logdet), by_inverse, _recorded(tensors)
            self._values = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]

    def _holds(self, noise: Tensor | None = None, data: Tensor | None = None) -> bool:
        pair = self._pair
        if pair is None or not (noise is None or noise is pair[0]) or not (data is None or data is pair[1]):
            return False
        tensors = self._tensors(pair[0], pair[1])
        same_places = [t.device for t in tensors] == [v.device for v in self._values]
        return same_places and _recorded(tensors) == self._recorded and ops.identical(tensors, self._values)

    def _tensors(self, noise: Tensor, data: Tensor) -> list[Tensor]:
        context = [] if self.context is None else [self.context]
        return [noise, data, *context, *self.flow.parameters(), *self.flow.buffers()]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pair": None, "_values": []}


def _recorded(tensors: list[Tensor]) -> list[bool]:
    return [torch.is_grad_enabled() and t.requires_grad for t in tensors]


def _check_context(flow: Flow, context: Tensor | None) -> None:
    check_tensors(context=context)
    shape = flow.context_shape
    if (context is None) != (not shape) or (context is not None and context.shape[-len(shape) :] != shape):
        given = None if context is None else tuple(context.shape)
        if not shape:
            raise ValueError(f"the flow takes no context, because it has context_dim=0; got {given}")
        raise ValueError(f"the flow needs a context of shape (…, {', '.join(map(str, shape))}); got {given}")


def _batch(flow: Flow, context: Tensor) -> torch.Size:
    """The context's shape without that of one context."""
    return context.shape[: context.ndim - len(flow.context_shape)]


def _shapes(flow: Flow) -> str:
    """Description of the flow for a repr."""
    return f"{type(flow).__name__}, event_shape={flow.event_shape}"


def _rows(flow: Flow, value: Tensor, context: Tensor | None) -> tuple[Flow, Tensor, Tensor | None, torch.Size]:
    """Value (…, *event_shape) and context (…, *context_shape), broadcast and flattened to rows.

    Returns:
        The flow to call, rows (B, *event_shape), contexts (B, *context_shape) or None, and the batch shape of the result.
    """
    check_tensors(value=value)
    if isinstance(flow, Embedded) and context is not None:  # once for each context, not for each sample
        return _rows(flow.flow, value, flow.embed(context))
    event = flow.event_shape
    if value.shape[value.ndim - len(event) :] != event:
        raise ValueError(f"a value must have shape (…, {', '.join(map(str, event))}); got {tuple(value.shape)}")
    batch = value.shape[: value.ndim - len(event)]
    if context is not None:
        batch = torch.broadcast_shapes(batch, _batch(flow, context))
        context = context.expand(*batch, *flow.context_shape).reshape(-1, *flow.context_shape)
    return flow, value.expand(*batch, *event).reshape(-1, *event), context, batch


def _by_rows(flow: Flow, value: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """The flow over any leading dimensions: output (…, *event_shape), logdet (…)."""
    flow, rows, context, batch = _rows(flow, value, context)
    out, logdet = flow.inverse(rows, context) if inverse else flow(rows, context)
    return out.reshape(*batch, *flow.event_shape), logdet.reshape(batch)
