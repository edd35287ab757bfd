"""Several coupling flows of one shape that run together: in one call of the kernels, with one set of parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.assembled import AssembledMaps
from glf_fast.flow.base import any_parameter
from glf_fast.flow.coupling_flow import CouplingFlow
from glf_fast.flow.moments import active_processes
from glf_fast.ops.checks import check_integer, check_tensors
from glf_fast.reference import log_normal

__all__ = ["FlowEnsemble"]


class FlowEnsemble(nn.Module):
    """E coupling flows of one shape, each with parameters of its own.

    Every parameter is stored stacked, (E·K, …): the kernels take all flows in one call, which splits them over the processor's
    threads, and an optimizer sees as few tensors as one flow has. What it computes is what the flows would compute one by one.
    Where no kernel takes several flows, they run one after the other.

    For ensembles of estimators, sweeps over seeds, mixtures, and the channels of importance samplers. It is no `Flow`, since it
    has E outputs, and is trained in a loop: `-ensemble.log_prob(x).mean(1).sum()` is the sum of the flows' losses.

    Args:
        members: E.
        dim, steps, *arguments, **options: the arguments of `CouplingFlow`. Every flow starts from random values of its own.

    Example:
        >>> ensemble = FlowEnsemble(3, dim=5, steps=4, hidden=(64, 64))
        >>> x = torch.randn(10, 5)
        >>> ensemble.log_prob(x).shape, ensemble.sample(7).shape
        (torch.Size([3, 10]), torch.Size([3, 7, 5]))
        >>> len(ensemble), ensemble.mixture_log_prob(x).shape
        (3, torch.Size([10]))
    """

    def __init__(self, members: int, dim: int, steps: int = 8, *arguments: Any, **options: Any) -> None:
        check_integer("members", members, 1)
        check_integer("steps", steps, 1)
        super().__init__()
        self.members = members
        self._flows = CouplingFlow(
            dim, members * steps, *arguments, **options
        )  # the parameters of all steps, not a flow
        self._flows._maps = AssembledMaps(members)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"members": self.members, **self._flows.config, "steps": self._flows.config["steps"] // self.members}

    @classmethod
    def from_flows(cls, flows: Sequence[CouplingFlow]) -> FlowEnsemble:
        """The ensemble of these flows; values are copied, and what is frozen stays so.

        Raises:
            TypeError, ValueError: there is no flow, or one that is no `CouplingFlow`, or that differs from the first one in its
                configuration, dtype, device or mode, or that has parametrized or pruned tensors.
        """
        flows = list(flows)
        for i, flow in enumerate(flows):
            if not isinstance(flow, CouplingFlow):
                raise TypeError(f"an ensemble is made of CouplingFlows; flow {i} is a {type(flow).__name__}")
            facts, wanted = _facts(flow), _facts(flows[0])
            for name, value in facts.items():
                if value != wanted[name]:
                    raise ValueError(f"flow {i} has {name}={value!r} but flow 0 has {wanted[name]!r}")
        if not flows:
            raise ValueError("an ensemble has one or more flows; got none")
        made = cls(len(flows), **flows[0].config).to(any_parameter(flows[0]))
        states = [_complete(flow, flows) for flow in flows]
        for i, state in enumerate(states):
            if missing := made._flows.state_dict().keys() - state.keys():
                raise ValueError(
                    f"flow {i} has no tensor {min(missing)}: it is parametrized or pruned; make that permanent first"
                )
        made._flows.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        for name, parameter in made._flows.named_parameters():
            parameter.requires_grad_(any(flow.get_parameter(name).requires_grad for flow in flows))
        return made.train(flows[0].training)

    # -- the flows as functions ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise by all flows: z (E, B, D) and logdet (E, B).

        Args:
            x: (B, D), the same for all flows, or (E, B, D).
            context: (E, B, C), (B, C) for all flows, or (C,) for all rows of them.
        """
        x, context = self._rows("x", x, context)
        self._begin(x, context)
        A, _, c, logabsdet, (weights, biases) = self._tensors(need_inverse=False)
        flows = self._flows
        options = flows._dropping() if flows.training and flows.config["dropout"] else flows._options
        z, logdet = ops.coupling_flow(
            x, A, c, weights, biases, context, members=self.members, row_scales=flows._only_scales(), **options
        )
        return self._each(z), self._each(logdet) + logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data by all flows: x (E, B, D) and logdet (E, B) of z (B, D) or (E, B, D); context as in `forward`."""
        z, context = self._rows("z", z, context)
        _, A_inv, c, logabsdet, (weights, biases) = self._tensors(need_inverse=True)
        assert A_inv is not None
        flows = self._flows
        options = flows._dropping() if flows.training and flows.config["dropout"] else flows._options
        x, logdet = ops.coupling_flow_inverse(z, A_inv, c, weights, biases, context, members=self.members, **options)
        return self._each(x), self._each(logdet) - logabsdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p_e(x) in nats (E, B), of every flow e; arguments as in `forward`."""
        z, logdet = self(x, context)
        return log_normal(z.flatten(0, 1)).view_as(logdet) + logdet

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples of every flow (E, n, D); arguments as in `Flow.sample`, context as in `forward`."""
        if n < 0:
            raise ValueError(f"n must be ≥ 0; got {n}")
        if temperature < 0:
            raise ValueError(f"temperature must be ≥ 0; got {temperature}")
        like = any_parameter(self)
        shape = (self.members, n, *self._flows.event_shape)
        noise = torch.randn(shape, device=like.device, dtype=like.dtype, generator=generator)
        return self.inverse(temperature * noise, context)[0]

    # -- as one mixture ------------------------------------------------------------------------------------------------

    def mixture_log_prob(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """log Σ_e w_e p_e(x) in nats (B,).

        Args:
            x: (B, D).    context: (B, C) or (C,).
            weights: w (E,), positive or zero, of any sum; equal ones if None.
        """
        self._check_mixture("x", x, context)
        log_prob = self.log_prob(x, context)
        largest = log_prob.detach().amax(0)
        largest = largest.where(largest.isfinite(), 0)
        # Not the logsumexp of log w, whose gradient at w = 0 is NaN.
        return (self._weights(weights)[:, None] * (log_prob - largest).exp()).sum(0).log() + largest

    @torch.no_grad()
    def mixture_sample(
        self,
        n: int,
        context: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples (n, D) of the same mixture, each of one flow; context is (n, C) or (C,).

        The flows run on as many rows as the most frequent of them needs.
        """
        if n < 0:
            raise ValueError(f"n must be ≥ 0; got {n}")
        like = any_parameter(self)
        if not n:
            return like.new_zeros(0, *self._flows.event_shape)
        self._check_mixture("the samples", like.new_zeros(n, 0), context)
        chosen = torch.multinomial(self._weights(weights), n, replacement=True, generator=generator)
        count = chosen.bincount(minlength=self.members)
        order = chosen.argsort(stable=True)
        place = torch.empty_like(chosen)  # of each sample among those of its flow
        place[order] = torch.arange(n, device=chosen.device) - (count.cumsum(0) - count)[chosen[order]]
        rows = (self.members, int(count.max()))
        if context is not None and context.ndim == 2:
            given = context.new_zeros(*rows, context.shape[1])
            given[chosen, place] = context
            context = given
        noise = torch.randn(
            (*rows, *self._flows.event_shape), device=like.device, dtype=like.dtype, generator=generator
        )
        return self.inverse(noise, context)[0][chosen, place]

    def _check_mixture(self, name: str, x: Tensor, context: Tensor | None) -> None:
        """Raise ValueError unless x and the context are those of one density."""
        check_tensors(**{name.split()[-1]: x}, context=context)
        if x.ndim != 2:
            raise ValueError(f"{name} of a mixture must have shape (batch, dim); got {tuple(x.shape)}")
        if context is not None and context.ndim == 3:
            raise ValueError(
                f"the context of a mixture must be (batch, context_dim) or (context_dim,); got {tuple(context.shape)}"
            )

    def _weights(self, weights: Tensor | None) -> Tensor:
        like = any_parameter(self)
        if weights is None:
            return like.new_full((self.members,), 1 / self.members)
        check_tensors(weights=weights)
        if weights.shape != (self.members,) or not bool(
            (weights >= 0).all() and weights.isfinite().all() and weights.any()
        ):
            raise ValueError(f"weights must be {self.members} finite numbers ≥ 0 that are not all 0; got {weights}")
        w = weights.to(like)
        return w / w.sum()

    # -- the single flows ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.members

    def __getitem__(self, index: int) -> CouplingFlow:
        """Flow `index` alone, a copy."""
        index = operator.index(index)
        if not -self.members <= index < self.members:
            raise IndexError(f"this ensemble has {self.members} flows; got index {index}")
        steps = self._flows.config["steps"] // self.members
        made = CouplingFlow(**{**self._flows.config, "steps": steps}).to(any_parameter(self))
        own = slice(index % self.members * steps, (index % self.members + 1) * steps)
        made.load_state_dict({name: tensor[own] for name, tensor in self._flows.state_dict().items()})
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(self._flows.get_parameter(name).requires_grad)
        return made.train(self.training)

    def __iter__(self) -> Iterator[CouplingFlow]:
        return (self[i] for i in range(self.members))

    # -- what a call begins with ---------------------------------------------------------------------------------------

    def _rows(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as (E·B, D) and the context as (E·B, C)."""
        E, D, C = self.members, *self._flows.event_shape, self._flows.context_dim
        check_tensors(**{name: x}, context=context)
        if x.ndim == 2:
            x = x.expand(E, *x.shape)
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (E, D):
            raise ValueError(f"{name} must have shape (batch, {D}) or ({E}, batch, {D}); got {tuple(x.shape)}")
        B = x.shape[1]
        if context is None and C:
            raise ValueError(f"these flows are conditional: give a context of shape {(E, B, C)}, {(B, C)} or {(C,)}")
        if context is not None:
            if not C or context.shape not in ((E, B, C), (B, C), (C,)):
                wanted = f"{(E, B, C)}, {(B, C)} or {(C,)}" if C else "none, because context_dim is 0"
                raise ValueError(f"the context must have shape {wanted}; got {tuple(context.shape)}")
            context = context.expand(E, B, C).flatten(0, 1)
        return x.flatten(0, 1), context

    def _begin(self, x: Tensor, context: Tensor | None) -> None:
        """Give ActNorms their start where this is the first training batch: each flow's from its own rows."""
        flow = self._flows
        if not flow._started and self.training and (len(x) >= 2 * self.members or active_processes() is not None):
            flow._start(x, context, self.members)

    def _tensors(
        self, *, need_inverse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]:
        """A, A⁻¹, c (E·K, …), Σ log|det A| of each flow (E, 1), and the networks' tensors."""
        networks = self._flows._mlp()
        A, A_inv, c, logabsdets = self._flows._affine(networks[0][0].dtype, need_inverse=need_inverse)
        return A, A_inv, c, logabsdets.view(self.members, 1), networks  # of one flow a number

    def _each(self, tensor: Tensor) -> Tensor:
        """(E·B, …) as (E, B, …)."""
        return tensor.unflatten(0, (self.members, len(tensor) // self.members))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"{type(self).__name__}({shown})"


def _facts(flow: CouplingFlow) -> dict[str, Any]:
    """Properties that all flows of an ensemble share."""
    like = any_parameter(flow)
    return {**flow.config, "dtype": like.dtype, "device": like.device, "training": flow.training}


def _complete(flow: CouplingFlow, flows: Sequence[CouplingFlow]) -> dict[str, Tensor]:
    """The flow's state, with factors and frozen entries of every parameter of which one of the flows has some."""
    state = flow.state_dict()
    for name, parameter in flow.named_parameters():
        flat = name.replace(".", "_")
        trained = [other.get_parameter(name).requires_grad for other in flows if name in dict(other.named_parameters())]
        if any(flat in other.factors for other in flows):
            factor = state.get(f"factors.{flat}.factor", torch.ones_like(parameter))
            state[f"factors.{flat}.factor"] = factor.expand_as(parameter)
        if any(flat in other.held for other in flows) or len(set(trained)) > 1:
            state.setdefault(f"held.{flat}.value", flow._effective(flat, parameter).detach())
            state.setdefault(f"held.{flat}.trained", torch.ones_like(parameter))
            if not parameter.requires_grad:  # and another flow's is trained: all of this one's entries are frozen
                state[f"held.{flat}.value"] = flow._effective(flat, parameter).detach()
                state[f"held.{flat}.trained"] = torch.zeros_like(parameter)
    return state
