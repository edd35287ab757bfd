"""The interface of nflows' `Flow`: for code that calls `flow.log_prob(inputs, context)`. Needs no nflows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import glf_fast.flow

__all__ = ["Flow"]


class Flow(nn.Module):
    """A flow of glf_fast with the method names and shapes of `nflows.flows.Flow`.

    Args:
        flow: the flow. One without context ignores a context, but for the number of samples, as nflows' flows do.

    Unlike flows of nflows, it may be called: `forward` is `log_prob`, so DistributedDataParallel and torch.compile can wrap it.
    Code that reads the parts of nflows' flows finds them: `_transform`, `_distribution` and `_embedding_net`.
    """

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The same as `log_prob`."""
        return self.log_prob(inputs, context)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(inputs | context) in nats, (B,), of inputs (B, …) and context (B, C)."""
        return self.flow.log_prob(inputs, self._given(context))

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Samples (n, …) without context, or (M, n, …) with a context (M, C): n samples for each row of the context.

        Args:
            batch_size: greatest number of samples (of the n) to draw at a time.
        """
        sizes = [num_samples] if batch_size is None else _chunks(num_samples, batch_size)
        return torch.cat([self._draw(n, context)[0] for n in sizes], 0 if context is None else 1)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`sample`, and log p of each sample, (n,) or (M, n), in one pass."""
        return self._draw(num_samples, context)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise z (B, …) of the inputs (B, …)."""
        return self.flow(inputs, self._given(context))[0]

    def mean(self, context: Tensor | None = None) -> Tensor:
        """Raise NotImplementedError, as the mean of nflows' flows does: it has no formula."""
        raise NotImplementedError(
            "the mean of a flow has no formula; average samples: flow.sample(1000, context).mean(-2)"
        )

    @property
    def _transform(self) -> _Transform:
        return _Transform(self)

    @property
    def _distribution(self) -> _StandardNormal:
        return _StandardNormal(self.flow)

    @property
    def _embedding_net(self) -> nn.Module:
        """None of its own: the flow's `forward` takes the context as it is given."""
        return nn.Identity()

    def _given(self, context: Tensor | None) -> Tensor | None:
        """The context, for a flow that takes one."""
        return context if self.flow.context_shape else None

    def _draw(self, n: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = self._given(context)
        shape = (n,) if context is None or given is not None else (n, len(context))
        samples, log_prob = self.flow.distribution(given).rsample_and_log_prob(shape)
        return (samples, log_prob) if context is None else (samples.transpose(0, 1), log_prob.T)


class _Transform(nn.Module):
    """The flow's map as a transform of nflows: `t(x, context=c)` → z, logdet (B,), and `t.inverse`."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise."""
        return self.flow.flow(inputs, self.flow._given(context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data."""
        return self.flow.flow.inverse(inputs, self.flow._given(context))


class _StandardNormal:
    """N(0, I) of the flow's shape, as `nflows.distributions.StandardNormal`."""

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        self._shape = torch.Size(flow.event_shape)
        self._like = next(flow.parameters(), torch.empty(0))

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """(B,) of noise (B, …)."""
        zero = inputs.new_zeros(())
        return Normal(zero, zero + 1, validate_args=False).log_prob(inputs).flatten(1).sum(1)

    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Noise (n, …), or (M, n, …) with a context of M rows."""
        rows = (num_samples,) if context is None else (len(context), num_samples)
        return torch.randn(*rows, *self._shape, device=self._like.device, dtype=self._like.dtype)


def _chunks(n: int, size: int) -> list[int]:
    if size < 1:
        raise ValueError(f"batch_size must be ≥ 1; got {size}")
    return [size] * (n // size) + ([n % size] if n % size or not n else [])
