"""Flows for aspire (https://aspire.readthedocs.io), which it needs: `Aspire(…, flow_backend="glf_fast")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as torch_api
import torch
import zuko
from aspire.flows.torch.flows import ZukoFlow
from aspire.history import FlowHistory
from torch import Tensor, nn

from glf_fast.fitting import fit
from glf_fast.integrations.whole_zuko import batch_size_of, coupling_flow, integer, stacked, whole

__all__ = ["FusedFlow"]

OWN: dict[str, Callable[..., nn.Module]] = {"CouplingFlow": coupling_flow}


class FusedFlow(ZukoFlow):
    """aspire's `ZukoFlow`, the same flow with the same initial weights, as one flow of glf_fast, whose training runs in C++.

    Args:
        dims: number of dimensions.
        flow_class: name of a flow of zuko, or function that makes one, as for `ZukoFlow`; or "CouplingFlow", that of glf_fast.
        data_transform, seed, device, dtype: as for `ZukoFlow`.
        **kwargs: arguments of the flow.

    Raises:
        ValueError: an unknown name, or a flow that cannot be replaced as a whole, with the reason (use `flow_backend="zuko"`).
    """

    def __init__(
        self,
        dims: int,
        flow_class: str | Callable[..., nn.Module] = "MAF",
        data_transform: Any = None,
        seed: int = 1234,
        device: str = "cpu",
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(flow_class, str):
            if flow_class not in OWN and not hasattr(zuko.flows, flow_class):
                raise ValueError(f"flow_class must be the name of a flow of zuko, or CouplingFlow; got {flow_class!r}")
            flow_class = OWN.get(flow_class, flow_class)
        # What aspire saved and gives back: numbers and widths are arrays, and the flow's arguments are under "kwargs".
        kwargs |= kwargs.pop("kwargs", {})
        kwargs = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in kwargs.items()}
        super().__init__(dims, flow_class, data_transform, seed, device, dtype, **kwargs)

    @property
    def flow(self) -> Any:
        """The flow of zuko, of which all transforms are replaced."""
        return self._flow

    @flow.setter
    def flow(self, flow: nn.Module) -> None:
        # aspire compiles the flow here; one fused operation has nothing to gain from that.
        self._flow = flow.to(device=self.device, dtype=self.dtype)
        self._whole = whole(self._flow)

    def fit(
        self,
        x: Any,
        n_epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 500,
        validation_fraction: float = 0.2,
        clip_grad: float | None = None,
        lr_annealing: bool = False,
        patience: int | None = None,
    ) -> FlowHistory:
        """Fit the flow to samples (N, D) by maximum likelihood, as `ZukoFlow.fit`, with the arguments of that.

        The batches of an epoch are of one size, at most `batch_size`, and an annealed learning rate falls with each step.

        Raises:
            ValueError: arguments out of their ranges, NaN or infinity in the samples.
            FloatingPointError: the loss is not finite; the flow is as it was before that step.
        """
        z = self.fit_data_transform(torch.as_tensor(x).clone().to(self.device, self.dtype))
        held_out = max(1, round(validation_fraction * len(z))) if validation_fraction else 0
        result = fit(
            stacked(self._whole), z, epochs=integer(n_epochs), batch_size=batch_size_of(len(z) - held_out, batch_size), lr=lr,
            clip=clip_grad, validation=validation_fraction, patience=integer(patience),
            schedule="cosine" if lr_annealing else None, seed=int(torch.randint(2**31, ())),
        )  # fmt: skip
        self.flow.eval()
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        return FlowHistory(training_loss=result.training_loss, validation_loss=result.validation_loss)

    @torch.no_grad()
    def sample(self, n_samples: int, xp: Any = None) -> Any:
        """n samples (n, D)."""
        return _out(self.inverse_rescale(self._whole.sample(n_samples))[0], xp)

    @torch.no_grad()
    def sample_and_log_prob(self, n_samples: int, xp: Any = None) -> tuple[Any, Any]:
        """n samples (n, D), and log p of each (n,), in one pass."""
        z, log_prob = self._whole.distribution().rsample_and_log_prob((n_samples,))
        x, logdet = self.inverse_rescale(z)
        return _out(x, xp), _out(log_prob - logdet, xp)

    @torch.no_grad()
    def log_prob(self, x: Any, xp: Any = None) -> Any:
        """log p(x) in nats, (n,), of x (n, D); without gradients, for which aspire has no use."""
        z, logdet = self.rescale(torch.as_tensor(x, dtype=self.dtype, device=self.device))
        return _out(self._whole.log_prob(z) + logdet, xp)

    @torch.no_grad()
    def forward(self, x: Any, xp: Any = None) -> tuple[Any, Any]:
        """Noise z (n, D) of x (n, D), and log|det ∂z/∂x| (n,)."""
        z, rescaled = self.rescale(torch.as_tensor(x, dtype=self.dtype, device=self.device))
        z, logdet = self._whole(z)
        return _out(z, xp), _out(logdet + rescaled, xp)

    @torch.no_grad()
    def inverse(self, z: Any, xp: Any = None) -> tuple[Any, Any]:
        """Samples x (n, D) of noise z (n, D), and log|det ∂x/∂z| (n,)."""
        x, logdet = self._whole.inverse(torch.as_tensor(z, dtype=self.dtype, device=self.device))
        x, rescaled = self.inverse_rescale(x)
        return _out(x, xp), _out(logdet + rescaled, xp)


def _out(tensor: Tensor, xp: Any) -> Any:
    """The tensor as an array of another library."""
    return tensor if xp is None or xp is torch_api else xp.asarray(tensor.cpu().numpy())
