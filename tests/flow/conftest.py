"""The registry of flow constructors that every general test walks."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from glf_fast import (
    MLP,
    ActNorm,
    AffineCoupling,
    CouplingFlow,
    Flow,
    Inverse,
    InvertibleLinear,
    SequentialFlow,
    rnvp_flow,
)
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

IMAGE = (5, 2, 3)


def conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, n_out, 1))


def alone(layer: nn.Module, shape: tuple[int, ...], context_dim: int = 0) -> SequentialFlow:
    return SequentialFlow([layer], shape, context_dim)


def holding(flow: CouplingFlow, *parameters: str) -> CouplingFlow:
    """The flow with half of the entries of these parameters held, at values that are not zero."""
    for name in parameters:
        nn.init.normal_(flow.get_parameter(name), std=0.2)
        flow.hold(name, torch.rand_like(flow.get_parameter(name)) < 0.5)
    return flow


FLOWS: dict[str, Callable[[], Flow]] = {
    "coupling": lambda: CouplingFlow(6, 3, (16, 16)),
    "coupling-odd": lambda: CouplingFlow(5, 2, (16,)),
    "coupling-dim2": lambda: CouplingFlow(2, 3, (8, 8)),
    "coupling-context": lambda: CouplingFlow(5, 2, (12, 9), context_dim=3),
    "coupling-context1": lambda: CouplingFlow(4, 2, (8,), context_dim=1),
    "coupling-deep": lambda: CouplingFlow(4, 2, (8, 12, 16, 8), add_first=True, log_scale="glow"),
    "coupling-dense": lambda: CouplingFlow(5, 2, (8,), linear="dense"),
    "coupling-permutation": lambda: CouplingFlow(5, 3, (8,), linear="permutation"),
    "coupling-bare": lambda: CouplingFlow(5, 3, (8,), linear="permutation", actnorm=False),
    "coupling-no-actnorm": lambda: CouplingFlow(4, 2, (8,), actnorm=False),
    **{
        f"log-scale-{name}{'-add-first' * add_first}": (
            lambda name=name, add_first=add_first: CouplingFlow(4, 2, (8,), log_scale=name, add_first=add_first)
        )
        for name in LOG_SCALES
        for add_first in (False, True)
    },
    "coupling-separate": lambda: CouplingFlow(5, 2, (8, 9), context_dim=2, coupling="separate"),
    "coupling-additive": lambda: CouplingFlow(5, 2, (8, 9), context_dim=2, coupling="additive"),
    "coupling-held": lambda: holding(CouplingFlow(5, 2, (8,)), "actnorm_bias", "linear_upper", "mlp_weights.1"),
    "inverse": lambda: Inverse(CouplingFlow(5, 2, (8,), context_dim=2)),
    "log-scale-constant": lambda: CouplingFlow(4, 2, (8,), log_scale_constant=0.7),
    **{f"activation-{name}": (lambda name=name: CouplingFlow(4, 2, (8, 8), activation=name)) for name in ACTIVATIONS},
    "layers": lambda: CouplingFlow(5, 2, (8,), context_dim=2).to_layers(),
    "nested": lambda: SequentialFlow([CouplingFlow(4, 1, (8,)), InvertibleLinear(4), CouplingFlow(4, 1, (8,))], (4,)),
    "actnorm": lambda: alone(ActNorm(5), (5,)),
    "actnorm-image": lambda: alone(ActNorm(5), IMAGE),
    **{
        f"linear-{kind}{'-image' * (len(shape) == 3)}": (
            lambda kind=kind, shape=shape: alone(InvertibleLinear(5, linear=kind), shape)
        )
        for kind in ("plu", "dense", "permutation")
        for shape in ((5,), IMAGE)
    },
    "linear-dim1": lambda: alone(InvertibleLinear(1), (1,)),
    "affine-coupling": lambda: alone(AffineCoupling(5, MLP(3, [8], 4)), (5,)),
    "affine-coupling-flip": lambda: alone(AffineCoupling(5, MLP(3, [8], 4), flip=True), (5,)),
    "affine-coupling-additive": lambda: alone(AffineCoupling(5, MLP(3, [8], 2), additive=True), (5,)),
    "affine-coupling-context": lambda: alone(AffineCoupling(5, MLP(5, [8], 4)), (5,), 2),
    "affine-coupling-image": lambda: alone(AffineCoupling(5, conv(3, 4), add_first=True, log_scale="glow"), IMAGE),
    "affine-coupling-image-additive": lambda: alone(AffineCoupling(5, conv(3, 2), additive=True, flip=True), IMAGE),
    "affine-coupling-image-context": lambda: alone(AffineCoupling(5, conv(5, 4)), IMAGE, 2),
    "glow-step": lambda: SequentialFlow([ActNorm(5), InvertibleLinear(5), AffineCoupling(5, conv(3, 4))], IMAGE),
    "rnvp": lambda: rnvp_flow(6, blocks=2, hidden=8),
    "rnvp-odd": lambda: rnvp_flow(5, blocks=1, hidden=8),
}


class Case:
    """A fresh flow with nothing left at its trivial start, and inputs for it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.make = FLOWS[name]
        self.flow = self.make()
        with torch.no_grad():
            for parameter in self.flow.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for buffer_name, buffer in self.flow.named_buffers():
                if buffer_name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
                if buffer_name.endswith("running_mean"):
                    buffer.normal_()
        self.flow.eval()

    def inputs(self, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        x = torch.randn(n, *self.flow.event_shape, dtype=dtype)
        return (x, torch.randn(n, self.flow.context_dim, dtype=dtype)) if self.flow.context_dim else (x,)


@pytest.fixture(params=FLOWS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)
