"""An inference network of BayesFlow 2, on Keras' torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from bayesflow.networks import InferenceNetwork
from bayesflow.utils import layer_kwargs, weighted_mean
from bayesflow.utils.serialization import serializable, serialize
from keras.layers import TorchModuleWrapper
from torch import Tensor

import glf_fast.flow
from glf_fast.ops.checks import check_integer

__all__ = ["CouplingFlow"]

# As bayesflow's CouplingFlow has it, where hardswish is called hard_silu.
_LIKE_BAYESFLOW: dict[str, Any] = {
    "log_scale": "bayesflow",
    "activation": "hardswish",
    "dropout": 0.05,
    "linear": "permutation",
}


@serializable("glf_fast.integrations.bayesflow")
class CouplingFlow(InferenceNetwork):
    """`glf_fast.CouplingFlow` as an inference network: `BasicWorkflow(inference_network=CouplingFlow(), …)`.

    It is what bayesflow's own `CouplingFlow` is by default, in kind and size: affine couplings with its scale that transform
    both halves of the parameters in turn, given the conditions, behind ActNorms, and a random permutation before each pair. All
    of them run in one call. Networks have its activation and its dropout. Other than there, each coupling of a pair has its
    ActNorm, which starts from the first batch.

    Args:
        depth: number of pairs of couplings; the flow has twice as many steps.
        widths: of the hidden layers of each network.
        base_distribution: as bayesflow's networks have it.
        options: further arguments of `glf_fast.CouplingFlow`, which are numbers and names, such as `coupling="spline"` or
            `linear="plu"`, trained linear layers in place of the permutations.
        **kwargs: arguments of a Keras layer, such as `name`.

    Raises:
        RuntimeError: Keras runs on another backend than torch.
        ValueError: fewer than two parameters, or a depth below 1.
    """

    def __init__(
        self,
        depth: int = 6,
        widths: Sequence[int] = (128, 128),
        base_distribution: str | keras.Layer = "normal",
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "torch":
            raise RuntimeError(
                f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=torch before the first import of keras"
            )
        check_integer("depth", depth, 1)
        super().__init__(base_distribution=base_distribution, **kwargs)
        self.depth = depth
        self.widths = tuple(widths)
        self.options = _LIKE_BAYESFLOW | dict(options or {})  # all of them, so that a saved network stays what it is

    def build(self, xz_shape: Sequence[int], conditions_shape: Sequence[int] | None = None) -> None:
        """Make the flow, for parameters (…, D) and conditions (…, C)."""
        if self.built:
            return
        context_dim = 0 if conditions_shape is None else conditions_shape[-1]
        flow = glf_fast.flow.CouplingFlow(xz_shape[-1], 2 * self.depth, self.widths, context_dim, **self.options)
        if flow.config["linear"] == "permutation":
            _swap_halves(flow)
        self.wrapper = TorchModuleWrapper(flow)  # through which Keras finds the parameters, and saves the state
        self.base_distribution.build(xz_shape)

    @property
    def flow(self) -> glf_fast.flow.CouplingFlow:
        """The flow, once the network is built."""
        return self.wrapper.module

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as Keras saves them."""
        own = {
            "depth": self.depth,
            "widths": list(self.widths),
            "base_distribution": self.base_distribution,
            "options": self.options,
        }
        return {**layer_kwargs(super().get_config()), **serialize(own)}

    def _forward(
        self, x: Tensor, conditions: Tensor | None = None, density: bool = False, training: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        z, logdet = self._run(self._flow_in(training), x, conditions)
        return (z, self.base_distribution.log_prob(z) + logdet) if density else z

    def _inverse(
        self, z: Tensor, conditions: Tensor | None = None, density: bool = False, training: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, logdet = self._run(self._flow_in(training).inverse, z, conditions)
        return (x, self.base_distribution.log_prob(z) - logdet) if density else x

    def compute_metrics(
        self,
        x: Tensor,
        conditions: Tensor | None = None,
        sample_weight: Tensor | None = None,
        stage: str = "training",
        **_: Any,
    ) -> dict[str, Tensor]:
        """The loss, the mean of −log q(x | conditions) in nats; outside of training also the `inference_metrics` of `compile`.

        Those compare a sample for each condition with x. bayesflow's own networks leave them out.
        """
        _, log_density = self(x, conditions=conditions, density=True, training=stage == "training")
        found = {"loss": weighted_mean(-log_density, sample_weight)}
        if stage != "training" and self.metrics:
            samples = self.sample(tuple(x.shape[:-1]), conditions=conditions)
            found |= {metric.name: metric(samples, x) for metric in self.metrics}
        return found

    def _flow_in(self, training: bool) -> glf_fast.flow.CouplingFlow:
        if self.flow.training != bool(training):
            self.flow.train(bool(training))
        return self.flow

    @staticmethod
    def _run(
        direction: Callable[..., tuple[Tensor, Tensor]], x: Tensor, conditions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A direction on a batch of any shape: x (…, D), conditions (…, C) → (…, D), log-determinant (…)."""
        batch = x.shape[:-1]
        if conditions is not None and conditions.shape[:-1] != batch:
            raise ValueError(
                f"conditions must have the leading shape of the parameters, {tuple(batch)}; got {tuple(conditions.shape)}"
            )
        y, logdet = direction(x.flatten(0, -2), None if conditions is None else conditions.flatten(0, -2))
        return y.reshape(x.shape), logdet.reshape(batch)


def _swap_halves(flow: glf_fast.flow.CouplingFlow) -> None:
    """Make every second permutation one that swaps the halves, so that a pair of couplings transforms all columns.

    Of an odd number all but one, and the next pair another one.
    """
    (dim,) = flow.event_shape
    flow.get_buffer("linear_permutation")[1::2] = torch.arange(dim).roll(dim - dim // 2)
