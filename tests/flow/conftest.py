"""The registry of flow constructors that every general test walks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from glf_fast import (
    MLP,
    ActNorm,
    AffineCoupling,
    AutoregressiveFlow,
    CouplingFlow,
    FixedLinear,
    Flow,
    GlowFlow,
    Inverse,
    InvertibleLinear,
    SequentialFlow,
    Split,
    Squeeze,
    rnvp_flow,
)
from glf_fast.flow import Embedded
from glf_fast.reference import ACTIVATIONS, LOG_SCALES

IMAGE = (5, 2, 3)


def conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, n_out, 1))


def alone(layer: nn.Module, shape: tuple[int, ...], context_dim: int = 0) -> SequentialFlow:
    return SequentialFlow([layer], shape, context_dim)


class Conditioned(nn.Module):
    """A network with a use of its own for a vector of context."""

    def __init__(self, n_in: int, n_out: int, columns: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Linear(columns, n_out)

    def forward(self, p: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t, u = (self.body(p) + self.head(context)[:, :, None, None]).tanh().chunk(2, 1)
        return u, t


def coupling_step(channels: int, context_dim: int = 0) -> list[nn.Module]:
    network = conv(channels - channels // 2 + context_dim, 2 * (channels // 2))
    coupling = AffineCoupling(channels, network, add_first=True, log_scale_constant=0.5)
    return [ActNorm(channels), InvertibleLinear(channels), coupling]


def multiscale(context_dim: int = 0) -> SequentialFlow:
    """Three scales of images (1, 8, 4), in both orders of pixels; the third is what is left."""
    first = AffineCoupling(1, conv(1 + context_dim, 2), mask="checkerboard", log_scale_constant=0.5)
    layers = [
        first,
        Squeeze(),
        *coupling_step(4, context_dim),
        Split(4, context_dim=context_dim, log_scale_constant=0.5),
    ]
    layers += [Squeeze(order="pixels"), FixedLinear(torch.eye(8) + 0.1 * torch.randn(8, 8)), Split(8, learned=False)]
    layers += coupling_step(4, context_dim)
    return SequentialFlow(layers, (1, 8, 4), context_dim)


def affine_runs() -> SequentialFlow:
    """Affine layers of all kinds in several orders, some of which have no matrix among them."""
    reverse = lambda: InvertibleLinear(5, linear="permutation", permutation=range(5)[::-1])  # noqa: E731
    matrix = lambda: FixedLinear(torch.eye(5) + 0.2 * torch.randn(5, 5))  # noqa: E731
    runs = [
        [reverse(), ActNorm(5), ActNorm(5), InvertibleLinear(5), ActNorm(5), reverse(), matrix()],
        [matrix(), ActNorm(5)],
        [ActNorm(5), reverse()],
        [matrix(), ActNorm(5)],
    ]
    masks: list[Any] = ["channels", [1, 0, 0, 1, 0], [0, 1, 0, 1, 0], "channels"]
    couplings = [AffineCoupling(5, conv(3, 4), mask=mask, log_scale_constant=0.3) for mask in masks]
    return SequentialFlow([layer for run, c in zip(runs, couplings, strict=True) for layer in (*run, c)], IMAGE)


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
    "coupling-no-hidden": lambda: CouplingFlow(5, 2, (), context_dim=2),
    "coupling-eight-hidden": lambda: CouplingFlow(4, 2, (6,) * 8, activation="mish"),
    "coupling-separate-no-hidden": lambda: CouplingFlow(5, 2, (), coupling="separate"),
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
    "coupling-residual": lambda: CouplingFlow(5, 2, (8, 8), network="residual"),
    "coupling-residual-context": lambda: CouplingFlow(5, 2, (8,), context_dim=2, network="residual"),
    "coupling-held": lambda: holding(CouplingFlow(5, 2, (8,)), "actnorm_bias", "linear_upper", "mlp_weights.1"),
    "autoregressive": lambda: AutoregressiveFlow(5, 3, (9, 8)),
    "autoregressive-no-hidden": lambda: AutoregressiveFlow(4, 2, (), 2),
    "autoregressive-constant": lambda: AutoregressiveFlow(3, 2, (6,) * 6, activation="elu", activation_constant=0.5),
    "autoregressive-context": lambda: AutoregressiveFlow(4, 2, (8,), 2, context_layer=True, log_scale="softplus"),
    "autoregressive-residual": lambda: AutoregressiveFlow(
        5, 2, (8,), 2, network="residual", linear="plu", actnorm=True
    ),
    "autoregressive-spline": lambda: AutoregressiveFlow(3, 2, (8,), transform="spline", linear="dense"),
    "autoregressive-inverse": lambda: Inverse(AutoregressiveFlow(4, 2, (8,), linear="permutation")),
    "inverse": lambda: Inverse(CouplingFlow(5, 2, (8,), context_dim=2)),
    "log-scale-constant": lambda: CouplingFlow(4, 2, (8,), log_scale_constant=0.7),
    "activation-constant": lambda: CouplingFlow(4, 2, (8,), activation="leaky_relu", activation_constant=0.2),
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
    "affine-coupling-image-context-image": lambda: SequentialFlow(
        [AffineCoupling(5, conv(5, 4), undo=True)], IMAGE, context_shape=(2, *IMAGE[1:])
    ),
    "affine-coupling-pass-context": lambda: SequentialFlow(
        [AffineCoupling(5, Conditioned(3, 4, 2), pass_context=True, undo=True, add_first=True)], IMAGE, 2
    ),
    "mask-vectors": lambda: alone(AffineCoupling(5, MLP(2, [8], 6), mask=[1, 0, 0, 1, 1], log_scale="glow"), (5,)),
    "mask-vectors-flip": lambda: alone(
        AffineCoupling(5, MLP(3, [8], 2), mask=[1, 0, 0, 1, 1], flip=True, additive=True), (5,)
    ),
    "mask-image": lambda: alone(AffineCoupling(5, conv(3, 4), mask=torch.arange(5) % 2 == 1), IMAGE),
    "mask-image-flip": lambda: alone(
        AffineCoupling(5, conv(2, 3), mask=torch.arange(5) % 2 == 1, flip=True, additive=True), IMAGE
    ),
    "checkerboard": lambda: alone(AffineCoupling(2, conv(2, 4), mask="checkerboard", log_scale="glow"), (2, 3, 4)),
    "checkerboard-flip": lambda: alone(
        AffineCoupling(1, conv(1, 1), mask="checkerboard", flip=True, additive=True), (1, 3, 5)
    ),
    "linear-fixed": lambda: alone(FixedLinear(torch.randn(5, 5)), (5,)),
    "linear-fixed-image": lambda: alone(FixedLinear(torch.randn(5, 5)), IMAGE),
    "squeeze": lambda: alone(Squeeze(), (3, 4, 6)),
    "squeeze-pixels": lambda: alone(Squeeze(3, order="pixels"), (2, 3, 6)),
    "split": lambda: alone(Split(5), IMAGE),
    "split-context": lambda: alone(Split(5, context_dim=2), IMAGE, 2),
    "glow-step": lambda: SequentialFlow([ActNorm(5), InvertibleLinear(5), AffineCoupling(5, conv(3, 4))], IMAGE),
    "glow-steps-large": lambda: SequentialFlow([*coupling_step(2), *coupling_step(2)], (2, 8, 9)),
    "affine-runs": affine_runs,
    "multiscale": multiscale,
    "multiscale-nested": lambda: SequentialFlow([alone(Squeeze(), (1, 8, 4)), Inverse(multiscale())], (1, 8, 4)),
    "multiscale-embedded": lambda: Inverse(
        SequentialFlow([Embedded(multiscale(8), nn.Flatten(), (2, 2, 2))], (1, 8, 4), context_shape=(2, 2, 2))
    ),
    "glowflow": lambda: GlowFlow((1, 4, 4), 2, 1, 6),
    "glowflow-realnvp": lambda: GlowFlow((1, 4, 2), 1, 2, 4, masks="realnvp"),
    "glowflow-openai": lambda: GlowFlow(
        (3, 4, 2), 1, 1, 4, context_dim=2, linear="dense", log_scale="glow", add_first=True
    ),
    "glowflow-additive": lambda: GlowFlow((1, 4, 4), 2, 1, coupling="additive", linear="permutation", network=conv),
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
        return (x, torch.randn(n, *self.flow.context_shape, dtype=dtype)) if self.flow.context_shape else (x,)


@pytest.fixture(params=FLOWS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


# Cases whose graph is that of another case, but for numbers (widths, depths, the side of a mask, an order of pixels), or a part
# of it: "glow-step" is in "glow-steps-large", and the scales of "multiscale-nested" are those of "multiscale-embedded", which
# goes the same way, with a context.
SAME_GRAPH = {
    *("coupling-odd", "coupling-dim2", "coupling-context1", "coupling-deep", "coupling-residual", "linear-dim1"),
    *("affine-coupling-flip", "mask-vectors-flip", "mask-image-flip", "checkerboard-flip", "squeeze-pixels"),
    *("rnvp-odd", "glow-step", "multiscale-nested"),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.long if name in SAME_GRAPH else [])
        for name in FLOWS
        if not name.startswith(("activation-", "log-scale-", "glowflow-"))
    ]
)
def structure(request: pytest.FixtureRequest) -> Case:
    """Cases with graphs of their own: the name of an activation or a log-scale is a constant in that of "coupling", and the
    layers of "glowflow-…" are compiled by themselves."""
    return Case(request.param)
