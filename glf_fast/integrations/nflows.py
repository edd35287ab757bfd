"""The interface of nflows' `Flow`: for code that calls `flow.log_prob(inputs, context)`. Needs no nflows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import glf_fast.flow

__all__ = ["Flow"]


class Flow(nn.Module):
    """A flow of glf_fast with the method names and shapes of `nflows.flows.Flow`.

    Args:
        flow: the flow.

    Unlike flows of nflows, it may be called: `forward` is `log_prob`, so DistributedDataParallel and torch.compile can wrap it.
    """

    def __init__(self, flow: glf_fast.flow.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The same as `log_prob`."""
        return self.log_prob(inputs, context)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(inputs | context) in nats, (B,), of inputs (B, …) and context (B, C)."""
        return self.flow.log_prob(inputs, context)

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
        return self.flow(inputs, context)[0]

    def _draw(self, n: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        samples, log_prob = self.flow.distribution(context).rsample_and_log_prob((n,))
        return (samples, log_prob) if context is None else (samples.transpose(0, 1), log_prob.T)


def _chunks(n: int, size: int) -> list[int]:
    if size < 1:
        raise ValueError(f"batch_size must be ≥ 1; got {size}")
    return [size] * (n // size) + ([n % size] if n % size or not n else [])
