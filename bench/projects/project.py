"""The description of a public project's flow, and how a flow of each library is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SMALL", "TRUE_SIZE", "Project", "Sizes", "Wrapped", "networks"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The largest sizes that are built. Larger ones of a project are reduced to them."""

    widest: int
    deepest: int

    def __call__(self, width: int) -> int:
        """The width of a hidden layer that has this one in the project."""
        return min(width, self.widest)

    def steps(self, number: int) -> int:
        """The number of layers of a kind, of which the project has so many."""
        return min(number, self.deepest)


TRUE_SIZE = Sizes(1 << 30, 1 << 30)
SMALL = Sizes(16, 2)  # for tests


class Wrapped(nn.Module):
    """A user's model with a flow in it."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow


@dataclass(frozen=True)
class Project:
    """A flow of a public project: its layers, widths, masks, permutations, activations and batch size, none of its code.

    name: the project, and which of its flows.
    library: the one that its layers come from.
    about: the flow in a line.
    build: makes it, given `Sizes`. The noise of its permutations comes from the seed.
    shape, context: of one sample and of one context; () for none.
    batch: rows of a training step.
    left: a part of the report's reason where `accelerate` replaces nothing; "" where it replaces the flow, in whole or in part.
    why: that reason in the words of a table.
    how: what to call, if not `accelerate` alone.
    loss: "forward" is −mean log p of data, "reverse" the Kullback-Leibler divergence of samples from N(0, I), "score" the mean
        square of ∂ log p / ∂x, which is differentiated twice.
    noise: shape of a sample's noise, where it differs from `shape` (FrEIA).
    double: it is trained in float64.
    training: it is in training mode when it is accelerated; some layers are read in eval mode alone.
    dropout: a fused flow drops other units in training mode than the original does with the same seed.
    other: classes of layers that may be fused with other parameters, so that an optimizer takes other steps.
    """

    name: str
    library: str
    about: str
    build: Callable[[Sizes], nn.Module]
    shape: Shape
    batch: int
    context: Shape = ()
    left: str = ""
    why: str = ""
    how: str = ""
    loss: str = "forward"
    noise: Shape = ()
    double: bool = False
    training: bool = True
    dropout: bool = False
    other: frozenset[str] = field(default_factory=frozenset)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the data."""
        return torch.float64 if self.double else torch.float32

    def made(self, sizes: Sizes = TRUE_SIZE, seed: int = 0) -> nn.Module:
        """The flow, from a seed, with its data-dependent starts done and its parameters a little off their initial values."""
        torch.manual_seed(seed)
        flow = self.build(sizes).to(self.dtype).train()
        with torch.no_grad():
            x, context = self.inputs(64)
            self.log_prob(flow, x, context)
            for p in flow.parameters():
                if p.requires_grad and p.is_floating_point():
                    p.add_(0.02 * torch.randn_like(p))
        return flow.train(self.training)

    def inputs(self, n: int) -> tuple[Tensor, Tensor | None]:
        """n samples and contexts, inside of (0, 1) for flows that start with a logit."""
        shapes = (self.shape, self.context) if self.context else (self.shape,)
        x, *context = (torch.randn(n, *shape, dtype=self.dtype) for shape in shapes)
        return x, context[0] if context else None

    def log_prob(self, flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        """log p (n,)."""
        return _CALLS[self.library][0](getattr(flow, "flow", flow), x, context)

    def sample(self, flow: nn.Module, n: int, context: Tensor | None) -> Tensor:
        """n samples, of n contexts if there are any; noise comes from torch's generator."""
        noise = None
        if self.library == "FrEIA":
            device = next(flow.parameters()).device
            noise = torch.randn(n, *(self.noise or self.shape), dtype=self.dtype, device=device)
        return _CALLS[self.library][1](getattr(flow, "flow", flow), n, context, noise)

    def loss_of(self, flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        """The loss of a training step."""
        if self.loss == "reverse":
            y, log_q = flow.sample(len(x))  # type: ignore[operator]
            return (log_q + 0.5 * y.square().sum(1)).mean()
        if self.loss == "score":
            x = x.requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(flow, x, context).sum(), x, create_graph=True)
            return score.square().sum(1).mean()
        return -self.log_prob(flow, x, context).mean()


def _of_freia(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    z, jac = flow(x) if context is None else flow(x, c=[context])
    return jac - 0.5 * z.flatten(1).square().sum(1)


def _sample_of_freia(flow: Any, n: int, context: Tensor | None, noise: Any) -> Tensor:
    return (flow(noise, rev=True) if context is None else flow(noise, c=[context], rev=True))[0]


def _of_nflows(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x) if context is None else flow.log_prob(x, context=context)


def _sample_of_nflows(flow: Any, n: int, context: Tensor | None, noise: Any) -> Tensor:
    return flow.sample(n) if context is None else flow.sample(1, context=context)[:, 0]


def _of_normflows(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x) if context is None else flow.log_prob(x, context)


def _sample_of_normflows(flow: Any, n: int, context: Tensor | None, noise: Any) -> Tensor:
    return (flow.sample(n) if context is None else flow.sample(n, context))[0]


def _of_zuko(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    return flow(context).log_prob(x)


def _sample_of_zuko(flow: Any, n: int, context: Tensor | None, noise: Any) -> Tensor:
    return flow(context).sample((n,) if context is None else ())


_CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "FrEIA": (_of_freia, _sample_of_freia),
    "nflows": (_of_nflows, _sample_of_nflows),
    "normflows": (_of_normflows, _sample_of_normflows),
    "zuko": (_of_zuko, _sample_of_zuko),
}


def networks(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0) -> Any:
    """A constructor of MLPs (columns in, columns out) with these hidden layers."""

    def net(n_in: int, n_out: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(n_in, width), *([nn.Dropout(dropout)] * bool(dropout)), activation()]
            n_in = width
        return nn.Sequential(*layers, nn.Linear(n_in, n_out))

    return net
