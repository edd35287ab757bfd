"""Flows and training for nessai (https://nessai.readthedocs.io), which it needs.

`FlowSampler(model, flow_proposal_class="glf_fast")` finds them by the entry point in pyproject.toml.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from nessai.flowmodel import FlowModel
from nessai.flows.base import BaseFlow
from nessai.flows.utils import reset_permutations, silu
from nessai.proposal.flowproposal import FlowProposal
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows
from glf_fast.fitting.fused import FusedSteps, why_not
from glf_fast.flow import CouplingFlow, Flow
from glf_fast.reference import log_normal

logger = logging.getLogger("nessai.glf_fast")  # below nessai's, so that a run's log has what it says

__all__ = ["FusedFlowModel", "FusedFlowProposal", "NessaiFlow", "coupling_flow"]

# glf_fast's names of what nessai names, or hands over as functions, of its networks and of its linear layers.
ACTIVATIONS: dict[Any, str] = {"relu": "relu", "tanh": "tanh", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= {F.relu: "relu", F.tanh: "tanh", torch.tanh: "tanh", silu: "silu"}
NETWORKS = {"resnet": "residual", "mlp": "mlp"}
LINEAR = {"lu": "plu", "permutation": "permutation"}


def coupling_flow(
    n_inputs: int,
    n_neurons: int,
    n_blocks: int,
    n_layers: int,
    *,
    net: str = "resnet",
    linear_transform: str = "lu",
    activation: str | Callable[[Tensor], Tensor] = "relu",
    context_features: int | None = None,
    **options: Any,
) -> NessaiFlow:
    """A flow for nessai's `flow_config={"flow": coupling_flow}`, of the kind and size of nessai's own "realnvp".

    Affine couplings with the scale of nflows, residual networks, and linear layers with LU factors in between. An ActNorm in
    each step, which starts from the first batch, takes the place of the batch norms: what is trained is then what is sampled
    from.

    Args:
        n_inputs, n_neurons, n_blocks, n_layers: nessai's: dimensions, units of a hidden layer, couplings, and residual blocks
            of a network, or its hidden layers if `net="mlp"`.
        net: "resnet" or "mlp".
        linear_transform: "lu" or "permutation".
        activation: "relu", "tanh", "silu" or "swish", or the function that nessai makes of the name.
        context_features: columns of a condition.
        **options: further arguments of `glf_fast.CouplingFlow`: `coupling="spline"` is nessai's "nsf" with splines of the same
            kind, for which `spline={"bins": 8, "low": -5.0, "high": 5.0}` has its bins and box.

    Raises:
        ValueError: fewer than two dimensions, unknown names, or options that this flow has not, such as a mask.
    """
    for name, value, known in (("net", net, NETWORKS), ("linear_transform", linear_transform, LINEAR)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'relu', 'tanh', 'silu' or 'swish'; got {activation!r}")
    for name in ("mask", "distribution", "pre_transform"):
        if options.pop(name, None) is not None:
            raise ValueError(f"this flow has no {name}; leave it out of flow_config, or use nessai's own flows")
    for name in ("batch_norm_between_layers", "batch_norm_within_layers"):
        if options.pop(name, None):
            raise ValueError(f"this flow has no {name}, but ActNorms; leave it out of flow_config")
    options["dropout"] = options.pop("dropout_probability", 0.0)
    chosen = {"network": NETWORKS[net], "activation": ACTIVATIONS[activation], "linear": LINEAR[linear_transform]}
    if options.get("coupling") != "spline":
        chosen["log_scale"] = "nflows"
    hidden = (n_neurons,) * n_layers
    return NessaiFlow(
        partial(_near_permutations, n_inputs, n_blocks, hidden, context_features or 0, **chosen | options)
    )


def _near_permutations(*args: Any, **options: Any) -> CouplingFlow:
    """A flow whose linear layers start as permutations, as nessai's do. From the random rotations of Glow, flows this small and
    trained on a few thousand rows end 0.03 nats worse in four dimensions.
    """
    flow = CouplingFlow(*args, **options)
    if flow.config["linear"] == "plu":
        with torch.no_grad():
            for name in ("lower", "upper", "log_diag"):
                getattr(flow, f"linear_{name}").zero_()
            flow.linear_sign.fill_(1)  # type: ignore[operator]
    return flow


class NessaiFlow(BaseFlow):
    """A flow of glf_fast with the methods that nessai calls.

    Args:
        build: function that makes the flow; it is called again where nessai resets the weights or the permutations.
    """

    def __init__(self, build: Callable[[], Flow]) -> None:
        super().__init__()
        self._build = build
        self.flow = build()

    def apply(self, fn: Callable[[nn.Module], object]) -> NessaiFlow:
        """Apply a function to this module alone: nessai resets flows so, and the flow's parts have no resets of their own."""
        if fn is reset_permutations:  # which knows nflows' layers alone
            self.reset_linear()
        else:
            fn(self)
        return self

    def reset_parameters(self) -> None:
        """Set all but the linear layers to new initial values, as nessai does; ActNorms start again from the next batch."""
        self._renew(linear=False)

    def reset_linear(self) -> None:
        """Draw the linear layers and permutations anew, and keep all else."""
        self._renew(linear=True)

    def _renew(self, linear: bool) -> None:
        """Set the linear layers, or all but these, to new initial values."""
        new = self._build().to(next(self.flow.parameters())).state_dict()
        chosen = {name: value for name, value in new.items() if name.startswith("linear_") == linear}
        self.flow.load_state_dict(self.flow.state_dict() | chosen)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise z (B, D) of x (B, D), and log|det ∂z/∂x| (B,)."""
        return self.flow(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, D) of noise z (B, D), and log|det ∂x/∂z| (B,)."""
        return self.flow.inverse(z, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,)."""
        return self.flow.log_prob(x, context)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """n samples (n, D)."""
        return self.flow.sample(n, context)

    def sample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n samples (n, D), and log p of each (n,), in one pass."""
        z = self.sample_latent_distribution(n)
        x, logdet = self.flow.inverse(z, context)
        return x, log_normal(z) - logdet

    def forward_and_log_prob(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise z (B, D) of x (B, D), and log p(x) (B,), in one pass."""
        z, logdet = self.flow(x, context)
        return z, log_normal(z) + logdet

    def sample_latent_distribution(self, n: int, context: Tensor | None = None) -> Tensor:
        """Noise (n, D), from N(0, I)."""
        like = next(self.flow.parameters())
        return torch.randn(n, *self.flow.event_shape, device=like.device, dtype=like.dtype)

    def base_distribution_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log N(z; 0, I) in nats, (B,)."""
        return log_normal(z)

    def freeze_transform(self) -> None:
        """Keep all parameters as they are in training."""
        self.flow.requires_grad_(False)

    def unfreeze_transform(self) -> None:
        """Train all parameters."""
        self.flow.requires_grad_(True)


class FusedFlowModel(FlowModel):
    """nessai's training of a flow, with the steps of an epoch in C++ where the flow is a `NessaiFlow` on a processor.

    The batches, the optimizer AdamW, the limit of the gradient, validation and early stopping are nessai's. Another optimizer,
    a dataloader, weights, or conditions leave the steps to nessai. An epoch ends before a step whose loss or gradient is not
    finite: its loss is NaN, and a warning is logged. Validation decides, as always, which weights are used.
    """

    def _train(
        self,
        train_data: Any,
        noise_scale: float | None = 0.0,
        is_dataloader: bool = False,
        weighted: bool = False,
        is_conditional: bool = False,
    ) -> float:
        steps = None if is_dataloader or weighted or is_conditional else self._fused_steps(train_data, noise_scale)
        if steps is None:
            return super()._train(train_data, noise_scale, is_dataloader, weighted, is_conditional)
        self.model.train()
        losses: list[float] = []
        rate = self._optimiser.param_groups[0]["lr"]
        order = torch.randperm(len(train_data))
        whole = len(order) // self._batch_size * self._batch_size
        wrong = ""
        for batches in (order[:whole].view(-1, self._batch_size), order[None, whole:]):
            while batches.numel():
                found, wrong = steps.run(batches, [rate] * len(batches))
                losses += found
                if wrong:
                    logger.warning(
                        f"The {wrong} of the flow is not finite; this epoch of training ends before that step. Lower lr in "
                        "training_config, or set clip_grad_norm"
                    )
                    break
                batches = batches[len(found) :]
            if wrong:
                break
        self.end_iteration()
        if self.training_config["annealing"]:
            self._optimiser.zero_grad()
            self._optimiser.step()  # nothing, without gradients: a scheduler wants to have seen a step
            self.scheduler.step()
        return math.nan if wrong else math.fsum(losses) / len(losses)

    def _fused_steps(self, rows: Tensor, noise_scale: float | None) -> FusedSteps | None:
        """The steps on these rows in C++; None where they cannot be."""
        flow: Any = getattr(self.model, "flow", None)
        if not isinstance(self.model, NessaiFlow) or type(self._optimiser) is not torch.optim.AdamW:
            return None
        group = self._optimiser.param_groups[0]
        if group["amsgrad"] or group["maximize"] or why_not(flow, self._batch_size):
            return None
        if noise_scale:
            rows = rows + noise_scale * torch.randn_like(rows)
        clip = self.training_config["clip_grad_norm"] or math.inf
        return FusedSteps(flow, self._optimiser, Rows(rows, None, None), clip)


class FusedFlowProposal(FlowProposal):
    """nessai's `FlowProposal` with `coupling_flow` and `FusedFlowModel`: `FlowSampler(model, flow_proposal_class="glf_fast")`.

    A flow that `flow_config` names, by "flow" or "ftype", is used instead of `coupling_flow`.
    """

    _FlowModelClass = FusedFlowModel

    def update_flow_config(self) -> None:
        """Set what nessai cannot know: the number of inputs, and the flow unless one is given."""
        self.flow_config = dict(self.flow_config)  # type: ignore[has-type]  # a copy: the caller's stays as it is
        super().update_flow_config()
        config: Mapping[str, Any] = self.flow_config
        if config.get("flow") is None and config.get("ftype") is None:
            self.flow_config["flow"] = coupling_flow
