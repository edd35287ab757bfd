"""What every flow is: an invertible map with a log-determinant, and the density that it makes of a normal distribution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glf_fast.ops.checks import check_tensors
from glf_fast.reference import log_normal

if TYPE_CHECKING:
    from glf_fast.flow.distribution import FlowDistribution

__all__ = ["Flow", "any_parameter"]


def any_parameter(module: nn.Module) -> Tensor:
    """A parameter of a module, for device and dtype; an empty tensor of torch's defaults where there is none."""
    for parameter in module.parameters():
        return parameter
    for part in module.modules():  # the replicas of nn.DataParallel have copies in place of their parameters
        for copy in getattr(part, "_former_parameters", {}).values():
            return copy
    return torch.empty(0)


class Flow(nn.Module):
    """A density p(x) = N(z; 0, I)·|det ∂z/∂x| with z = forward(x).

    Subclasses implement `forward` (data → noise) and `inverse` (noise → data). Both take (B, *event_shape) and an optional
    context, and return (output, logdet) with logdet (B,) = log|det J| of the direction just applied.

    Args:
        event_shape: shape of one sample, (D,) or (C, H, W).
        context_dim: columns of the context, 0 for none.
        context_shape: of one context, in place of `context_dim`, where it is not a vector.
    """

    def __init__(
        self, event_shape: tuple[int, ...], context_dim: int = 0, *, context_shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.context_shape = ((context_dim,) if context_dim else ()) if context_shape is None else tuple(context_shape)
        self.context_dim = math.prod(self.context_shape) if self.context_shape else 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *event_shape) → z like x, logdet (B,)."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *event_shape) → x like z, logdet (B,)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) = log N(z; 0, I) + logdet in nats, (B,)."""
        z, logdet = self(x, context)
        return log_normal(z) + logdet

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n samples (n, *event_shape): the inverse of `temperature`·N(0, I).

        Args:
            n: how many; 0 is allowed.
            context: (n, context_dim), one row a sample, or (context_dim,) for all of them.
            temperature: standard deviation of the noise; below 1 trades variety for typicality.
            generator: source of the noise, on the flow's device; the global one if None.
        """
        if n < 0:
            raise ValueError(f"n must be ≥ 0; got {n}")
        if temperature < 0:
            raise ValueError(f"temperature must be ≥ 0; got {temperature}")
        like = any_parameter(self)
        # Even generator=None keeps torch.compile from making n dynamic.
        source: Any = {} if generator is None else {"generator": generator}
        noise = torch.randn((n, *self.event_shape), device=like.device, dtype=like.dtype, **source)
        return self.inverse(noise if temperature == 1 else temperature * noise, context)[0]

    def distribution(self, context: Tensor | None = None, validate_args: bool | None = None) -> FlowDistribution:
        """p(x | context) as a torch.distributions.Distribution: `log_prob`, `sample`, `rsample`, `expand`.

        Args:
            context: (*batch_shape, context_dim): one distribution for each row; None for a flow without context.
            validate_args: check the arguments of its methods, as torch does it; torch's default if None.
        """
        from glf_fast.flow.distribution import FlowDistribution  # which is about flows: it imports this file

        return FlowDistribution(self, context, validate_args)

    def _check_event(self, name: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            check_tensors(**{name: x})
        if x.shape[1:] != self.event_shape:
            wanted = ", ".join(map(str, self.event_shape))
            raise ValueError(f"{name} must have shape (batch, {wanted}); got {tuple(x.shape)}")

    def _expand_context(self, context: Any, batch: int) -> Tensor | None:
        """The context as (batch, *context_shape): checked, and one row repeated for all samples."""
        one = self.context_shape
        if context is None:
            if one:
                raise ValueError(f"this flow is conditional: give a context of shape {(batch, *one)} or {one}")
            return None
        if not isinstance(context, Tensor):
            check_tensors(context=context)
        if not one:
            raise ValueError(f"this flow has context_dim=0 but a context of shape {tuple(context.shape)} was given")
        if context.shape == one:
            return context.expand(batch, *one)
        if context.shape != (batch, *one):
            raise ValueError(f"context must have shape {(batch, *one)} or {one}; got {tuple(context.shape)}")
        return context
