"""Glow: what is particular to it, and the backward that rebuilds activations."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glf_fast import ActNorm, AffineCoupling, GlowFlow, InvertibleLinear, SequentialFlow
from glf_fast.flow import GlowNetwork


def moved(flow: nn.Module, by: float = 0.1) -> nn.Module:
    """The flow with nothing left at its trivial start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return flow


def dropout(given: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(8, outputs, 1))


def masked(reversible: bool) -> SequentialFlow:
    layers: list[nn.Module] = []
    for mask in ("checkerboard", [True, False, True], [False, True, True]):
        given, outputs = (3, 6) if mask == "checkerboard" else (1, 4)
        layers += [ActNorm(3), InvertibleLinear(3), AffineCoupling(3, dropout(given, outputs), mask=mask)]
    return SequentialFlow(layers, (3, 4, 4), reversible=reversible)


FLOWS: dict[str, Callable[[bool], SequentialFlow]] = {
    "glow": lambda reversible: GlowFlow((3, 8, 8), 2, 3, 8, reversible=reversible),
    "openai, context": lambda reversible: GlowFlow(
        (1, 8, 8), 2, 1, 8, context_dim=3, log_scale="glow", add_first=True, linear="dense", reversible=reversible
    ),
    "additive": lambda reversible: GlowFlow((5, 4, 4), 1, 2, 8, coupling="additive", reversible=reversible),
    "dropout": lambda reversible: GlowFlow((1, 8, 8), 1, 3, network=dropout, reversible=reversible),
    "realnvp": lambda reversible: GlowFlow((1, 8, 8), 2, 2, 8, masks="realnvp", context_dim=2, reversible=reversible),
    "masks": masked,
}


def results(flow: SequentialFlow, *, inverse: bool) -> list[Tensor]:
    """Output, log-determinant and all gradients of a pass in training mode."""
    torch.manual_seed(2)
    x = torch.randn(6, *flow.event_shape, dtype=torch.float64).requires_grad_()
    context = torch.randn(6, flow.context_dim, dtype=torch.float64).requires_grad_() if flow.context_dim else None
    out, logdet = flow.inverse(x, context) if inverse else flow(x, context)
    after = torch.rand(1)
    (out.square().sum() + (logdet * torch.arange(6)).sum()).backward()
    assert torch.rand(1) != after, "random numbers go on behind the backward"
    given = [x] if context is None else [x, context]
    gradients = [t.grad for t in (*given, *flow.parameters())]
    flow.zero_grad()
    return [out.detach(), logdet.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_rebuilt_activations_give_the_gradients_of_kept_ones(name: str, inverse: bool) -> None:
    flows = []
    for reversible in (False, True):
        torch.manual_seed(0)
        flows.append(FLOWS[name](reversible).double())
    for moment in ("the data-dependent start", "later"):
        plain, rebuilt = (results(flow, inverse=inverse) for flow in flows)
        assert len(plain) == len(rebuilt) > 10
        for a, b in zip(plain, rebuilt, strict=True):
            assert (a - b).norm() <= 1e-7 * max(1, a.norm()), moment
        for flow in flows:
            moved(flow, 0.03)


def shared(coupling: nn.Module) -> nn.Module:
    layers = [ActNorm(4), coupling, InvertibleLinear(4), coupling]
    return SequentialFlow(layers, (4,), reversible=True)


class Counting(nn.Module):
    """A conditioner that is another one each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.runs * self.linear(x)


def changed(flow: nn.Module) -> None:
    with torch.no_grad():
        flow.layers[1].conditioner.linear.weight.add_(0.3)


def changed_buffer(flow: nn.Module) -> None:
    flow.layers[1].conditioner.runs.add_(1)


@pytest.mark.parametrize(
    ("conditioner", "between", "message"),
    [
        (Counting, changed, "modified by an inplace operation"),
        (Counting, changed_buffer, "modified by an inplace operation"),
        (Counting, lambda flow: None, "changes its own parameters or buffers when it runs"),
    ],
)
def test_a_backward_of_other_networks_is_refused(
    conditioner: Callable[[], nn.Module], between: Callable[[nn.Module], None], message: str
) -> None:
    flow = shared(AffineCoupling(4, conditioner()))
    loss = flow.log_prob(torch.randn(5, 4)).sum()
    between(flow)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_functional_call_is_refused_where_gradients_would_be_lost() -> None:
    flow = shared(AffineCoupling(4, nn.Linear(2, 4)))
    given = {name: p.detach().clone().requires_grad_() for name, p in flow.named_parameters()}
    out, logdet = torch.func.functional_call(flow, given, (torch.randn(5, 4),))
    with pytest.raises(RuntimeError, match="functional_call"):
        (out.sum() + logdet.sum()).backward()


@pytest.mark.parametrize("training", [False, True])
def test_modes_shared_layers_and_random_numbers_are_those_of_the_forward(training: bool) -> None:
    """Dropout in a network in training mode, inside of a flow in either mode, and the mode changed before the backward."""
    found = []
    for reversible in (False, True):
        torch.manual_seed(0)
        conditioner = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        flow = shared(AffineCoupling(4, conditioner)).double()
        flow.reversible = reversible
        flow.train(training)
        conditioner.train()
        loss = flow.log_prob(torch.randn(5, 4, dtype=torch.float64)).sum()
        flow.eval()
        loss.backward()
        assert not any(module.training for module in flow.modules())
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-9 * found[0].norm()


def saved_bytes(steps: int, reversible: bool, network: Callable[[int, int], nn.Module] | None = None) -> int:
    """Bytes of the activations that a forward keeps for its backward."""
    flow = GlowFlow((1, 8, 8), 2, steps, 16, network=network, reversible=reversible)
    x, found = torch.randn(16, 1, 8, 8), {}
    flow(x)
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) == len(x) and tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = -flow.log_prob(x).mean()
    loss.backward()
    return sum(found.values())


def test_memory_does_not_grow_with_the_steps() -> None:
    kept, rebuilt = ([saved_bytes(steps, reversible) for steps in (2, 12)] for reversible in (False, True))
    assert rebuilt[0] == rebuilt[1]
    assert kept[1] > 4 * kept[0] > 8 * rebuilt[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_rebuilt_activations(dtype: torch.dtype) -> None:
    """In float32, and with networks alone rounded to bfloat16: the state stays float32, so that it can be rebuilt."""
    found = []
    for reversible in (False, True):
        torch.manual_seed(0)
        flow = moved(GlowFlow((1, 8, 8), 2, 8, 8, reversible=reversible), 0.01)
        x = torch.randn(16, 1, 8, 8)
        flow(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = -flow.log_prob(1.5 * x + 0.3).mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * found[0].norm()


def test_a_start_that_changes_nothing_but_the_channels() -> None:
    """Zero convolutions: the flow of a Gaussian source is linear, and log_prob has its entropy."""
    torch.manual_seed(0)
    flow = GlowFlow((1, 8, 8), 2, 4, 8)
    x = 3 * torch.randn(500, 1, 8, 8)
    flow(x)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 9)
    bits = -flow.eval().log_prob(3 * torch.randn(500, 1, 8, 8)).mean() / (64 * math.log(2))
    assert bits.item() == pytest.approx(entropy, abs=0.03)


def test_the_border_is_seen() -> None:
    network = moved(GlowNetwork(2, 3, 4)).eval()
    out = network(torch.zeros(1, 2, 6, 6))
    assert not torch.allclose(out[..., 0, 0], out[..., 3, 3]) and torch.allclose(out[..., 2, 2], out[..., 3, 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlowFlow((1, 28, 28), 3, 1, 4), r"multiples of 2\^levels = 8; got \(1, 28, 28\)"),
        *(
            (
                lambda options=options: GlowFlow(**{"image_shape": (1, 8, 8), "levels": 1, "steps": 1, **options}),
                message,
            )
            for options, message in (
                ({"image_shape": (28, 28)}, r"image_shape must be \(channels, height, width\) .* got \(28, 28\)"),
                ({"image_shape": 28}, "image_shape must be"),
                ({"image_shape": (1, 8, 0)}, "image_shape must be"),
                ({"image_shape": (1, 8.0, 8)}, "image_shape must be"),
                ({"levels": 0}, "levels must be ≥ 1; got 0"),
                ({"levels": 2.0}, "levels must be an int; got 2.0"),
                ({"levels": True}, "levels must be an int; got True"),
                ({"steps": "2"}, "steps must be an int; got '2'"),
                ({"width": 2.5}, "width must be an int; got 2.5"),
                ({"context_dim": -1}, "context_dim must be ≥ 0; got -1"),
                ({"gain_factor": float("nan")}, "gain_factor must be a number, 0 or more; got nan"),
                ({"coupling": "additive", "log_scale": "glow"}, "has no scale, so leave log_scale"),
                ({"coupling": "additive", "log_scale_constant": 1.0}, "has no scale, so leave log_scale"),
                ({"coupling": "additive", "add_first": True}, "has no scale, so leave log_scale"),
            )
        ),
        (lambda: GlowNetwork(2, 0, 4), "channels_out must be ≥ 1; got 0"),
        *(
            (lambda options=options: GlowFlow((1, 8, 8), 1, **{"steps": 2, "masks": "realnvp", **options}), message)
            for options, message in (
                ({"linear": "dense"}, "no 1 × 1 convolutions, so leave linear out; got 'dense'"),
                ({"linear": "plu"}, "no 1 × 1 convolutions, so leave linear out; got 'plu'"),
                ({"steps": 1}, "steps must be at least 2, and should be even"),
            )
        ),
        (lambda: GlowFlow((1, 8, 8), 1, 1, 4, linear=""), "linear must be one of"),
        (
            lambda: GlowFlow((1, 8, 8), masks="checkerboard"),
            "masks must be one of 'channels', 'realnvp'; got 'checkerboard'",
        ),
        (lambda: GlowFlow((1, 8, 8), coupling="spline"), "coupling must be one of 'affine', 'additive'; got 'spline'"),
        (
            lambda: GlowFlow((1, 4, 4), 1, 1, network=lambda i, o: nn.Sequential(nn.BatchNorm2d(i)), reversible=True),
            "the BatchNorm2d in layers.3.conditioner.0 would update its running statistics twice",
        ),
        *(
            (lambda net=net: GlowFlow((1, 4, 4), 1, 1, network=net, reversible=True), f"layers.3.conditioner{message}")
            for net, message in (
                (lambda i, o: nn.InstanceNorm2d(i, track_running_stats=True), " would update its running statistics"),
                (lambda i, o: nn.utils.spectral_norm(nn.Conv2d(i, o, 1)), " would take another step of its power iter"),
                (
                    lambda i, o: nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, o, 1)),
                    ".parametrizations.weight.0 would take another step of its power iteration",
                ),
            )
        ),
        (lambda: GlowFlow((1, 4, 4), 1, 1, 4, context_dim=2)(torch.zeros(1, 1, 4, 4)), "this flow is conditional"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_matrices_are_cached_as_long_as_their_values_stay() -> None:
    flow = moved(GlowFlow((1, 8, 8), 2, 2, 4)).eval()
    x = torch.randn(3, 1, 8, 8)

    def both() -> list[Tensor]:
        with torch.no_grad():
            return [*flow(x), *flow.inverse(x)]

    first, again = both(), both()
    assert all(map(torch.equal, first, again)) and set(flow._products._cached) == {False, True}
    with torch.no_grad():
        flow.layers[2].lower.data.mul_(1.5)  # type: ignore[union-attr, operator]
    changed, fresh = both(), copy.deepcopy(flow)
    assert not fresh._products._cached and not torch.equal(changed[0], first[0])
    with torch.no_grad():
        assert all(map(torch.equal, changed, [*fresh(x), *fresh.inverse(x)]))
    with torch.inference_mode():
        flow(x)
    flow.log_prob(x).sum().backward()
