"""A density estimator for sbi: `NPE(density_estimator=coupling_flow())`. Needs sbi (https://sbi-dev.github.io/sbi)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from sbi.utils.sbiutils import standardizing_net, z_score_parser, z_standardization
from torch import Tensor, nn
from torch.distributions import Distribution

from glf_fast.flow import CouplingFlow, FlowDistribution, SequentialFlow
from glf_fast.integrations.unconstrained import Unconstrained

__all__ = ["CouplingFlowEstimator", "coupling_flow"]

START = 4096  # number of pairs (θ, x) from which the ActNorms are initialised


def coupling_flow(
    *,
    steps: int = 12,
    hidden: Sequence[int] = (50, 50),
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    prior: Distribution | None = None,
    embedding_net: nn.Module | None = None,
    **options: Any,
) -> Callable[[Tensor, Tensor], CouplingFlowEstimator]:
    """A builder of estimators of q(θ | x), for the argument `density_estimator` of sbi's NPE.

    Args:
        steps, hidden, **options: arguments of `glf_fast.CouplingFlow`.
        z_score_theta, z_score_x: "independent", "structured", or "none": how θ and x are standardised by the training
            simulations. The standardisation is fixed afterwards, and part of the estimator. For θ also
            "transform_to_unconstrained": θ is first mapped from the support of `prior` to all of ℝᴰ, so that the posterior is 0
            outside of the support and sbi rejects no sample.
        prior: prior of θ for "transform_to_unconstrained"; `sbi.neural_nets.posterior_nn` calls it x_dist.
        embedding_net: network that maps standardised x (B, …) to the context (B, C). If None, the context is x, which must be a
            vector. The network is copied: the trained copy is `estimator.embedding_net`, and retraining from scratch starts
            from the network given here.
    """
    return partial(
        _build, steps=steps, hidden=tuple(hidden), z_score_theta=z_score_theta, z_score_x=z_score_x, prior=prior,
        embedding_net=nn.Identity() if embedding_net is None else embedding_net, **options,
    )  # fmt: skip


def _build(
    theta: Tensor,
    x: Tensor,
    *,
    z_score_theta: str | None,
    z_score_x: str | None,
    prior: Distribution | None,
    embedding_net: nn.Module,
    **options: Any,
) -> CouplingFlowEstimator:
    """The estimator for simulations theta (N, D) and x (N, …), on the CPU."""
    if theta.ndim != 2 or theta.shape[1] < 2:
        raise ValueError(
            "a coupling flow is a density of vectors of two or more parameters; "
            f"theta has shape {tuple(theta.shape)}: use sbi's 'nsf' or 'mdn' for one parameter"
        )
    network = deepcopy(embedding_net)  # retraining from scratch must start from an untrained network
    standardise, structured = _z_score("z_score_x", z_score_x)
    if standardise:
        network = nn.Sequential(standardizing_net(x, structured), network)
    with torch.no_grad():
        context = network.eval()(x[:START])
    network.train()
    if context.ndim != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and becomes a context of shape {tuple(context.shape)}, but a context must have "
            "shape (batch, columns); give an embedding_net that maps x to vectors"
        )
    dim = theta.shape[1]
    layers: list[nn.Module] = []
    free = theta
    if z_score_theta == "transform_to_unconstrained":
        if prior is None:
            raise ValueError("z_score_theta='transform_to_unconstrained' needs the prior; pass coupling_flow(prior=…)")
        layers.append(Unconstrained.of(prior, dim).to(theta))
        free, logdet = layers[0](theta)
        if not logdet.isfinite().all():
            raise ValueError(
                f"{int((~logdet.isfinite()).sum())} of {len(theta)} simulated θ are outside the prior's support"
            )
        z_score_theta = "independent"
    standardise, structured = _z_score("z_score_theta", z_score_theta)
    if standardise:
        mean, std = z_standardization(free, structured)
        layers.append(_Standardise(mean.expand(dim), std.expand(dim)))
    layers.append(CouplingFlow(dim, context_dim=context.shape[1], **options))
    flow = SequentialFlow(layers, (dim,), context.shape[1])
    with torch.no_grad():  # initialises the ActNorms; the first call by sbi would do it with two rows
        flow(theta[:START], context)
    return CouplingFlowEstimator(flow, theta.shape[1:], x.shape[1:], network)


def _z_score(name: str, kind: str | None) -> tuple[bool, bool]:
    if kind not in ("independent", "structured", "none", None):
        raise ValueError(f"{name} must be 'independent', 'structured' or 'none'; got {kind!r}")
    return z_score_parser(kind)


class _Standardise(nn.Module):
    """The fixed map z = (x − mean)/std, (B, D); its logdet is a constant."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("logdet", -std.log().sum())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # x·(1/std) − mean/std would lose the digits of a large mean.
        return (x - self.get_buffer("mean")) / self.get_buffer("std"), self.get_buffer("logdet")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.get_buffer("mean"), z, self.get_buffer("std")), -self.get_buffer("logdet")


class CouplingFlowEstimator(ConditionalDensityEstimator):
    """Estimator of q(θ | x) with sbi's interface: shapes (samples, batch, …), `input` for θ and `condition` for x.

    Args:
        flow: density of θ given the context.
        input_shape, condition_shape: shapes of one θ and one x.
        embedding_net: network that maps x (B, …) to the context (B, C), standardisation included. It runs once for each x, for
            any number of samples.
    """

    def __init__(
        self, flow: SequentialFlow, input_shape: torch.Size, condition_shape: torch.Size, embedding_net: nn.Module
    ) -> None:
        super().__init__(flow, input_shape, condition_shape)
        self._embedding_net = embedding_net

    @property
    def embedding_net(self) -> nn.Module:
        """The network that maps x to the context."""
        return self._embedding_net

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """log q(θ | x) in nats, (samples, batch), of θ (*samples, batch, D) and x (*samples, batch, …), samples optional."""
        self._check_input_shape(input)
        samples = input if input.ndim > 2 else input[None]
        return self._posterior(condition).log_prob(samples)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """−log q(θ | x), (batch,), of θ (batch, D) and x (batch, …), or one x for all."""
        self._check_input_shape(input)
        context = self._context(condition)
        return -self.net.log_prob(input, context if len(context) == len(input) else context.expand(len(input), -1))

    def sample(self, sample_shape: Any, condition: Tensor, **kwargs: Any) -> Tensor:
        """Samples θ (*sample_shape, batch, D) given x (batch, …)."""
        return self._posterior(condition).rsample(sample_shape)

    def sample_and_log_prob(self, sample_shape: Any, condition: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Samples as from `sample`, and their log q (*sample_shape, batch), in one pass."""
        return self._posterior(condition).rsample_and_log_prob(sample_shape)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """The noise of θ (*batch, D) given x (*batch, …): for sbi's diagnostics."""
        context = self._context(condition)
        batch = torch.broadcast_shapes(input.shape[:-1], context.shape[:-1])
        rows = input.expand(*batch, -1).reshape(-1, input.shape[-1])
        context = context.expand(*batch, context.shape[-1]).reshape(len(rows), context.shape[-1])
        return self.net(rows, context)[0].reshape(*batch, rows.shape[-1])

    def _posterior(self, condition: Tensor) -> FlowDistribution:
        assert isinstance(self.net, SequentialFlow)
        return self.net.distribution(self._context(condition), validate_args=False)

    def _context(self, condition: Tensor) -> Tensor:
        """Contexts (…, C) of x (…, *condition_shape)."""
        self._check_condition_shape(condition)
        batch = condition.shape[: condition.ndim - len(self.condition_shape)]
        context = self._embedding_net(condition.reshape(-1, *self.condition_shape))
        return context.reshape(*batch, context.shape[-1])
