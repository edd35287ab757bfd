"""Density estimators for sbi (https://sbi-dev.github.io/sbi), which it needs: `NPE(density_estimator=maf())` or
`coupling_flow()`, `NLE(density_estimator=maf_likelihood())` or `coupling_likelihood()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from sbi.utils.sbiutils import standardizing_net, z_score_parser, z_standardization
from torch import Tensor, nn
from torch.distributions import Distribution

from glf_fast.flow import AutoregressiveFlow, CouplingFlow, FlowDistribution, SequentialFlow
from glf_fast.integrations.sbi_training import train
from glf_fast.integrations.unconstrained import Unconstrained

__all__ = ["FlowEstimator", "coupling_flow", "coupling_likelihood", "maf", "maf_likelihood", "train"]

START = 4096  # number of pairs (θ, x) from which the ActNorms are initialised
# What sbi's own maf has beside its sizes.
MAF = {"log_scale": "softplus", "context_layer": True}


def coupling_flow(
    *,
    steps: int = 12,
    hidden: Sequence[int] = (50, 50),
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    prior: Distribution | None = None,
    embedding_net: nn.Module | None = None,
    **options: Any,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    """A builder of estimators of q(θ | x), for the argument `density_estimator` of sbi's NPE. For NLE: `coupling_likelihood`.

    Args:
        steps, hidden, **options: arguments of `glf_fast.CouplingFlow`.
        z_score_theta, z_score_x: "independent", "structured", or "none": how θ and x are standardised by the training
            simulations. The standardisation is fixed afterwards, and part of the estimator. For θ also
            "transform_to_unconstrained": θ is first mapped from the support of `prior` to all of ℝᴰ, so that the posterior is 0
            outside of the support and sbi rejects no sample.
        prior: prior of θ for "transform_to_unconstrained"; `sbi.neural_nets.posterior_nn` calls it x_dist.
        embedding_net: network that maps standardised x (B, …) to the context (B, C). If None, the context is x, which must be a
            vector. The network itself is trained, as sbi trains it. When the builder is called again, as for retraining from
            scratch, it takes a copy of the network as the network was at first.
    """
    return _Builder(
        CouplingFlow, ("theta", "x"), {"theta": z_score_theta, "x": z_score_x}, prior, embedding_net,
        {"steps": steps, "hidden": tuple(hidden), **options},
    )  # fmt: skip


def coupling_likelihood(
    *,
    steps: int = 12,
    hidden: Sequence[int] = (50, 50),
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    embedding_net: nn.Module | None = None,
    **options: Any,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    """A builder of estimators of q(x | θ), for the argument `density_estimator` of sbi's NLE.

    The arguments are those of `coupling_flow`, but that x must be a vector of two or more columns, and that the
    `embedding_net` maps θ to the context.
    """
    return _Builder(
        CouplingFlow, ("x", "theta"), {"theta": z_score_theta, "x": z_score_x}, None, embedding_net,
        {"steps": steps, "hidden": tuple(hidden), **options},
    )  # fmt: skip


def maf(
    *,
    steps: int = 5,
    hidden: Sequence[int] = (50, 50, 50),
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    prior: Distribution | None = None,
    embedding_net: nn.Module | None = None,
    **options: Any,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    """A builder of masked autoregressive estimators of q(θ | x), for the argument `density_estimator` of sbi's NPE.

    By default a flow of the kind and size of sbi's own "maf": five transforms, each with a masked network of three hidden
    layers of 50 tanh units, to the first of which the context is added. Between the transforms the order of the features is
    reversed, where sbi draws permutations, which may leave it as it is.

    Args:
        steps, hidden, **options: arguments of `glf_fast.AutoregressiveFlow`. `transform="spline"` is the kind of sbi's
            "maf_rqs", for which `spline={"bins": 10, "low": -3.0, "high": 3.0}` has its bins and box.
        z_score_theta, z_score_x, prior, embedding_net: as in `coupling_flow`.
    """
    return _Builder(
        AutoregressiveFlow, ("theta", "x"), {"theta": z_score_theta, "x": z_score_x}, prior, embedding_net,
        {"steps": steps, "hidden": tuple(hidden), **MAF, **options},
    )  # fmt: skip


def maf_likelihood(
    *,
    steps: int = 5,
    hidden: Sequence[int] = (50, 50, 50),
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    embedding_net: nn.Module | None = None,
    **options: Any,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    """A builder of masked autoregressive estimators of q(x | θ), for the argument `density_estimator` of sbi's NLE.

    The arguments are those of `maf`, but that x must be a vector, and that the `embedding_net` maps θ to the context.
    """
    return _Builder(
        AutoregressiveFlow, ("x", "theta"), {"theta": z_score_theta, "x": z_score_x}, None, embedding_net,
        {"steps": steps, "hidden": tuple(hidden), **MAF, **options},
    )  # fmt: skip


class _Builder:
    """Makes estimators of the density of simulations `names[0]` given `names[1]`, by flows of one kind, on the CPU."""

    def __init__(
        self,
        kind: type[CouplingFlow | AutoregressiveFlow],
        names: tuple[str, str],
        z_scores: dict[str, str | None],
        prior: Distribution | None,
        embedding_net: nn.Module | None,
        options: dict[str, Any],
    ) -> None:
        self.kind, self.names, self.z_scores, self.prior, self.options = kind, names, z_scores, prior, options
        self.embedding_net = nn.Identity() if embedding_net is None else embedding_net
        self._untrained: nn.Module | None = None  # the network as it was when the first estimator was made

    def __call__(self, theta: Tensor, x: Tensor) -> FlowEstimator:
        """The estimator for simulations theta (N, …) and x (N, …)."""
        of, given = self.names
        values, condition = (theta, x) if of == "theta" else (x, theta)
        self._check_columns(values)
        standardise, structured = self._z_score(given)
        network = self._network()
        if standardise:
            network = nn.Sequential(standardizing_net(condition, structured), network)
        with torch.no_grad():
            context = network.eval()(condition[:START])
        network.train()
        if context.ndim != 2:
            raise ValueError(
                f"{given} has shape {tuple(condition.shape)} and becomes a context of shape {tuple(context.shape)}, but a "
                f"context must have shape (batch, columns); give an embedding_net that maps {given} to vectors"
            )
        dim = values.shape[1]
        layers: list[nn.Module] = []
        free = values
        if of == "theta" and self.z_scores[of] == "transform_to_unconstrained":
            layers.append(self._unconstrained(values))
            free = layers[0](values)[0]
        standardise, structured = self._z_score(of)
        if standardise:
            mean, std = z_standardization(free, structured)
            layers.append(_Standardise(mean.expand(dim), std.expand(dim)))
        layers.append(self.kind(dim, context_dim=context.shape[1], **self.options))
        flow = SequentialFlow(layers, (dim,), context.shape[1])
        with torch.no_grad():  # initialises the ActNorms; the first call by sbi would do it with two rows
            flow(values[:START], context)
        made = FlowEstimator(flow, values.shape[1:], condition.shape[1:], network, of)
        return made._expecting(values, condition)

    def _check_columns(self, values: Tensor) -> None:
        """Raise ValueError if this kind of flow has no density of these simulations; warn if it has normal ones alone."""
        of, shape = self.names[0], tuple(values.shape)
        what = "parameter" if of == "theta" else "column"
        spline = f"{'maf' if of == 'theta' else 'maf_likelihood'}(transform='spline')"
        if self.kind is CouplingFlow and (values.ndim != 2 or shape[1] < 2):
            raise ValueError(
                f"a coupling flow is a density of vectors of two or more {what}s; {of} has shape {shape}: use {spline} for "
                f"one {what}"
            )
        if values.ndim != 2 or shape[1] < 1:
            raise ValueError(f"an autoregressive flow is a density of vectors; {of} has shape {shape}")
        if shape[1] == 1 and self.kind is AutoregressiveFlow and self.options.get("transform") != "spline":
            warnings.warn(
                f"of one {what}, affine transforms make normal distributions alone: use {spline}", stacklevel=3
            )

    def _network(self) -> nn.Module:
        """The embedding net for a new estimator."""
        if self._untrained is None:
            self._untrained = deepcopy(self.embedding_net)
            return self.embedding_net
        return deepcopy(self._untrained)

    def _z_score(self, name: str) -> tuple[bool, bool]:
        """Whether to standardise theta or x, and whether all columns alike."""
        kind = self.z_scores[name]
        if kind == "transform_to_unconstrained" and name == self.names[0] == "theta":
            kind = "independent"  # of what is unconstrained
        if kind not in ("independent", "structured", "none", None):
            raise ValueError(f"z_score_{name} must be 'independent', 'structured' or 'none'; got {kind!r}")
        return z_score_parser(kind)

    def _unconstrained(self, theta: Tensor) -> Unconstrained:
        """The map of θ from the prior's support."""
        if self.prior is None:
            raise ValueError("z_score_theta='transform_to_unconstrained' needs the prior; pass prior=…")
        layer = Unconstrained.of(self.prior, theta.shape[1]).to(theta)
        outside = ~layer(theta)[1].isfinite()
        if outside.any():
            raise ValueError(f"{int(outside.sum())} of {len(theta)} simulated θ are outside the prior's support")
        return layer


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


class FlowEstimator(ConditionalDensityEstimator):
    """Estimator of q(θ | x) with sbi's interface: shapes (samples, batch, …), `input` for θ and `condition` for x.

    In an estimator of a likelihood q(x | θ), θ and x have changed places, here and below.

    Args:
        flow: density of θ given the context.
        input_shape, condition_shape: shapes of one θ and one x.
        embedding_net: network that maps x (B, …) to the context (B, C), standardisation included. It runs once for each x, for
            any number of samples.
        of: "theta", or "x" of an estimator of a likelihood.
    """

    def __init__(
        self, flow: SequentialFlow, input_shape: torch.Size, condition_shape: torch.Size, embedding_net: nn.Module,
        of: str = "theta",
    ) -> None:  # fmt: skip
        super().__init__(flow, input_shape, condition_shape)
        self.of = of
        self._embedding_net = embedding_net
        self._expected: tuple[Tensor, Tensor] | None = None

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
        self._check_places(input)
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

    def _expecting(self, values: Tensor, condition: Tensor) -> FlowEstimator:
        """The estimator, which from the first loss on knows whether sbi takes it for what it is."""
        if self.input_shape == self.condition_shape:
            self._expected = values, condition
        return self

    def _check_places(self, input: Tensor) -> None:
        """Raise ValueError where NLE trains an estimator of a posterior, or NPE one of a likelihood.

        Both call a builder with (θ, x) and differ in what they give to the estimator alone. Where θ and x have one shape, the
        first loss tells by the values of the simulations.
        """
        swapped = input.shape[-1:] != self.input_shape and input.shape[-1:] == self.condition_shape
        if self._expected is not None:
            # By all columns: θ and x may share some.
            own, others = (
                all(torch.isin(input[..., i].cpu(), values[:, i]).all() for i in range(values.shape[1]))
                for values in self._expected
            )
            swapped = bool(others and not own)
            if own != others:  # rows held out are in neither
                self._expected = None
        if swapped:
            self.check_of("x" if self.of == "theta" else "theta")

    def check_of(self, wanted: str) -> None:
        """Raise ValueError unless this is an estimator of `wanted`, "theta" for NPE or "x" for NLE."""
        if self.of != wanted:
            raise ValueError(
                "θ and x have changed places: NPE takes coupling_flow() or maf(), estimators of q(θ | x), and NLE takes "
                "coupling_likelihood() or maf_likelihood(), estimators of q(x | θ)"
            )

    def _posterior(self, condition: Tensor) -> FlowDistribution:
        assert isinstance(self.net, SequentialFlow)
        return self.net.distribution(self._context(condition), validate_args=False)

    def _context(self, condition: Tensor) -> Tensor:
        """Contexts (…, C) of x (…, *condition_shape)."""
        self._check_condition_shape(condition)
        batch = condition.shape[: condition.ndim - len(self.condition_shape)]
        context = self._embedding_net(condition.reshape(-1, *self.condition_shape))
        return context.reshape(*batch, context.shape[-1])
