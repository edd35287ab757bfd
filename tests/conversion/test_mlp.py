"""Reading networks: what is an MLP, in whatever way it is written, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glf_fast.conversion.activations import named_activation, one_activation
from glf_fast.conversion.layers import FIXED, FROZEN, TRAINED, Conditioner, NamedActivation, Unfusable
from glf_fast.conversion.mlp import (
    read_bounded_mlp,
    read_mlp,
    scale_outputs,
    select_inputs,
    select_outputs,
    separate,
    widen_inputs,
    without_shift,
)
from glf_fast.reference import mlp


class Functional(nn.Module):
    """Activations as functions and methods, the inputs concatenated, a branch on None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat([x, context], dim=-1)
        return self.c(F.relu(self.b(self.a(x).relu())))


class Dropped(nn.Module):
    """Dropout as a function."""

    def __init__(self, p: float = 0.3, *, always: bool = False, never: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Linear(3, 5), nn.Linear(5, 6), p
        self.always, self.never = always, never

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), self.p, self.always or (self.training and not self.never)))


class ByMode(nn.Module):
    """A hidden layer whose activation is given the mode."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(3, 4), nn.Linear(4, 2), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x), self.training))


class Activated(nn.Module):
    """An activation as a function with arguments."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(3, 5), nn.Linear(5, 6), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))


class Checked(nn.Module):
    """Compares shapes, as nflows' MLP does, and gives rows the shape that they have."""

    def __init__(self, context: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 6)
        self.context = context

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None and not self.context:
            raise ValueError("takes no context")
        if x.shape[1:] != torch.Size([3]):
            raise ValueError("another shape")
        assert x.shape[1] == 3
        return self.b(torch.relu(self.a(x.reshape(-1, np.prod([3]))))).view(-1, 6)


class Bounded(nn.Module):
    """s·tanh(y/s), or a multiple of y."""

    def __init__(self, bound: float = 2.0, *, tanh: bool = True) -> None:
        super().__init__()
        self.body, self.bound, self.tanh = sequential(nn.ReLU()), bound, tanh

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.bound * torch.tanh(y / self.bound) if self.tanh else y * self.bound


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))) + x)


def sequential(
    *activations: nn.Module, widths: tuple[int, ...] = (3, 5, 4, 6), dropout: float = 0.0, before: bool = False
) -> nn.Sequential:
    """A chain with a dropout behind each activation, or `before` it."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        between = [activations[i % len(activations)], *[nn.Dropout(dropout)] * bool(dropout)]
        layers += [nn.Linear(widths[i], widths[i + 1]), *(reversed(between) if before else between)]
    return nn.Sequential(*(layers[:-2] if dropout else layers[:-1]))


def outputs(read: Conditioner, x: Tensor) -> Tensor:
    return mlp(x, read.weights, read.biases, read.activation.name, read.activation.constant)


def normalised(bias: bool = True, **options: bool) -> nn.Sequential:
    """Batch norms behind the first two layers, which have seen a batch; in eval mode."""
    network = nn.Sequential(
        nn.Linear(3, 5, bias), nn.BatchNorm1d(5, **options), nn.Tanh(), nn.Linear(5, 4, bias), nn.Dropout(0.0),
        nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 6),
    )  # fmt: skip
    network(3 * torch.randn(20, 3) + 1)
    for module in network:
        if isinstance(module, nn.BatchNorm1d) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    return network.eval()


NETWORKS = {
    **{kind.__name__: (lambda kind=kind: sequential(kind())) for kind in (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.ELU)},
    "leaky": lambda: sequential(nn.LeakyReLU()),
    "leaky-0.2": lambda: sequential(nn.LeakyReLU(0.2)),
    "elu-0.5": lambda: sequential(nn.ELU(0.5)),
    "hardswish": lambda: sequential(nn.Hardswish()),
    "softplus": lambda: sequential(nn.Softplus()),
    "mish": lambda: sequential(nn.Mish()),
    "functional-leaky": lambda: Activated(lambda h: F.leaky_relu(h, 0.2, True)),
    "functional-elu": lambda: Activated(lambda h: F.elu(h, alpha=0.5)),
    "functional-softplus": lambda: Activated(lambda h: F.softplus(h, beta=1, threshold=20)),
    "functional-mish": lambda: Activated(lambda h: F.mish(F.dropout(h, 0.0))),
    "leaky-0": lambda: sequential(nn.LeakyReLU(0.0)),
    "one-activation-twice": lambda: sequential(*[nn.ReLU()] * 2),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Tanh()), nn.Dropout(0.0), nn.Linear(5, 6)
    ),
    "functional": Functional,
    "functional-dropout": lambda: Dropped().eval(),
    "dropouts": lambda: sequential(nn.ReLU(), dropout=0.3).eval(),
    "dropouts-before": lambda: sequential(nn.LeakyReLU(), dropout=0.3, before=True).eval(),
    "functional-dropout-of-nothing": lambda: Dropped(0.0),
    "compiled": lambda: torch.compile(Functional(), backend="eager"),
    "compiled-inside": lambda: nn.Sequential(
        torch.compile(nn.Linear(3, 5), backend="eager"), nn.ReLU(), nn.Linear(5, 6)
    ),
    "checked": Checked,
    "checked-without-context": lambda: Checked(context=False),
    "no-hidden": lambda: nn.Linear(3, 6),
    "no-hidden-in-a-module": lambda: nn.Sequential(nn.Linear(3, 6)),
    "eight-hidden": lambda: sequential(nn.ReLU(), widths=(3, 5, 4, 3, 2, 6, 5, 4, 3, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_are_mlps(name: str) -> None:
    network = NETWORKS[name]().double()
    x = torch.randn(7, 3, dtype=torch.float64)
    read = read_mlp(network)
    torch.testing.assert_close(outputs(read, x), network(x))
    assert all((roles == TRAINED).all() for roles in read.roles)
    bias_free = {i for i, roles in enumerate(read.bias_roles) if (roles == FIXED).all()}
    assert read.dropout == (0.3 if name in ("functional-dropout", "dropouts", "dropouts-before") else 0.0)
    assert not read.lost and not read.active
    assert bias_free == ({1} if name in ("functional", "compiled") else set())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_in_eval_mode_is_in_the_linear_layers(bias: bool, affine: bool) -> None:
    network = normalised(bias, affine=affine).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    read = read_mlp(network)
    assert read.normalised and not read_mlp(sequential(nn.ReLU())).normalised
    out = outputs(read, x)
    torch.testing.assert_close(out, network(x))
    parameters = list(network.parameters())
    wanted, got = (torch.autograd.grad(y.square().sum(), parameters) for y in (network(x), out))
    torch.testing.assert_close(got, wanted)


def test_batch_norm_is_trained_with_its_linear_layer_or_frozen_with_it() -> None:
    network = normalised().requires_grad_(False)
    assert all((roles == FROZEN).all() for roles in (*read_mlp(network).roles, *read_mlp(network).bias_roles))
    network[1].requires_grad_(True)
    with pytest.raises(Unfusable, match="only some of its parameters are trained"):
        read_mlp(network)
    norm = nn.BatchNorm1d(3)
    twice = nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), nn.Linear(3, 3), norm, nn.ReLU(), nn.Linear(3, 2)).eval()
    with pytest.raises(Unfusable, match="more than once"):
        read_mlp(twice)


@pytest.mark.parametrize(
    ("network", "bound"),
    [
        (Bounded, 2.0),
        (lambda: Bounded(0.7), 0.7),
        (lambda: nn.Sequential(sequential(nn.ReLU()), nn.Tanh()), 1.0),
        (lambda: Bounded(0.1, tanh=False), None),
        (lambda: Bounded(-3.0, tanh=False), None),
        (lambda: sequential(nn.ReLU()), None),
    ],
)
def test_a_bound_and_factors_behind_the_last_layer(network, bound: float | None) -> None:
    network = network().double()
    x = torch.randn(7, 3, dtype=torch.float64)
    read, found = read_bounded_mlp(network)
    y = outputs(read, x) * read.factors
    assert found == bound
    torch.testing.assert_close(y if bound is None else bound * torch.tanh(y / bound), network(x))
    parameters = list(network.parameters())
    assert torch.equal(read.weights[-1].abs(), parameters[-2].T.abs()), "a factor stays outside of the weights"


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: nn.Sequential(Bounded(), nn.Tanh()), "is not linear →"),
        (lambda: Bounded(-2.0), "multiplies its outputs by"),
        (lambda: Bounded(float("inf"), tanh=False), "multiplies its outputs by"),
    ],
)
def test_bounds_that_are_not_covered(network, reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        read_bounded_mlp(network())


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: sequential(nn.ReLU(), widths=(3,) * 11), "9 hidden layers; zero to eight are covered"),
        (lambda: sequential(nn.ReLU(), nn.Tanh()), "different activations: relu, tanh"),
        (
            lambda: sequential(nn.LeakyReLU(0.2), nn.LeakyReLU()),
            r"different activations: leaky_relu \(0.01\), leaky_relu \(0.2\)",
        ),
        (
            lambda: sequential(nn.LeakyReLU(-0.2)),
            "leaky_relu with negative_slope -0.2; finite numbers above 0 are covered",
        ),
        (lambda: sequential(nn.ELU(0.0)), "elu with alpha 0.0; finite numbers above 0"),
        (lambda: Activated(lambda h: F.elu(h, float("nan"))), "elu with alpha nan"),
        (lambda: Activated(lambda h: F.gelu(h, approximate="tanh")), "GELU by tanh"),
        (lambda: Activated(lambda h: F.leaky_relu(h, h.mean())), "is not a chain|with negative_slope"),
        (lambda: Activated(F.celu), "the activation 'celu' is not covered"),
        (lambda: sequential(nn.GELU("tanh")), "GELU by tanh"),
        (lambda: sequential(nn.Softplus(2.0)), "Softplus with beta 2.0 and threshold 20"),
        (lambda: Activated(lambda h: F.softplus(h, 1, 30)), "Softplus with beta 1 and threshold 30"),
        (lambda: sequential(nn.CELU()), "CELU.* is neither"),
        (lambda: nn.Sequential(*sequential(nn.ReLU()), nn.Tanh()), "ends with tanh"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), "is not linear →"),
        (lambda: normalised().train(), "batch norm takes the statistics of each batch; in eval mode"),
        (lambda: normalised(track_running_stats=False), "takes the statistics of each batch"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(),
            "no linear layer",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval(),
            "no linear layer",
        ),
        (
            # What is dropped before the norm is not 0 behind it.
            lambda: nn.Sequential(
                nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)
            ).eval(),
            "no linear layer",
        ),
        (
            lambda: ByMode(lambda h, training: F.leaky_relu(h, negative_slope=0.5 if training else 0.1)),
            "something else in",
        ),
        (lambda: ByMode(lambda h, training: F.dropout(F.relu(h), p=0.5 if training else 0.1)), "something else in"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2)), "LayerNorm"),
        (
            lambda: sequential(nn.Tanh(), dropout=0.5, before=True),
            r"dropout \(p = 0.5\) is active; convert the flow in",
        ),
        (lambda: Dropped(always=True), r"dropout \(p = 0.3\) is active in every mode"),
        (lambda: Dropped(always=True).eval(), r"dropout \(p = 0.3\) is active in every mode"),
        (Skip, "Skip is not a chain"),
        (lambda: sequential(*[nn.ReLU()], widths=(3, 3, 3)).append(nn.ReLU()), "is not linear →"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "has parametrizations"),
    ],
)
def test_networks_that_are_not(network, reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        read_mlp(network())


def test_activations_are_read_with_their_constants() -> None:
    """Modules and functions that compute the same are equal, so that their layers are stacked together."""
    for equal in (
        (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), partial(F.leaky_relu, negative_slope=0.2)),
        (nn.LeakyReLU(), F.leaky_relu),
        (nn.ReLU(), nn.LeakyReLU(0), F.relu, torch.relu),
        (nn.ELU(), F.elu, partial(F.elu, alpha=1)),
        (nn.Softplus(), F.softplus, partial(F.softplus, beta=1)),
        (nn.Mish(), F.mish),
    ):
        assert len({named_activation(activation) for activation in equal}) == 1
    assert named_activation(nn.LeakyReLU()) != named_activation(nn.LeakyReLU(0.2))
    assert one_activation("it", []) == NamedActivation("relu")
    for activation in (partial(torch.add, 1), nn.CELU(), torch.sin):
        with pytest.raises(Unfusable, match="is not covered"):
            named_activation(activation)
    with pytest.raises(Unfusable, match="differ in depth or activation"):
        separate(read_mlp(sequential(nn.LeakyReLU(0.2))), read_mlp(sequential(nn.LeakyReLU(0.1))))


@pytest.mark.parametrize(
    "network",
    [
        Dropped,
        lambda: sequential(nn.GELU(), dropout=0.3),
        lambda: sequential(nn.ReLU(), dropout=0.3, before=True),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.3),
                              nn.Linear(3, 2)),
    ],
)  # fmt: skip
def test_dropout_that_a_fused_network_has(network) -> None:
    for training in (True, False):
        read = read_mlp(network().train(training))
        assert (read.dropout, read.active, read.lost) == (0.3, training, 0.0)


@pytest.mark.parametrize(
    ("network", "p"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.3), sequential(nn.ReLU(), dropout=0.3)), 0.3),
        (lambda: nn.Sequential(sequential(nn.ReLU(), dropout=0.3), nn.Dropout(0.3)), 0.3),
        (lambda: sequential(nn.Tanh(), dropout=0.3, before=True), 0.3),
        (lambda: sequential(nn.ReLU(), nn.ReLU(), widths=(3, 5, 4, 3, 6)).insert(2, nn.Dropout(0.3)), 0.3),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Dropout(0.3), nn.Tanh(), nn.Linear(3, 2)), 0.3),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.2), nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.3),
                               nn.Linear(3, 2)), 0.3),
        (lambda: sequential(nn.ReLU(), dropout=1.0), 1.0),
        (lambda: Dropped(never=True), 0.0),
    ],
)  # fmt: skip
def test_dropout_that_is_lost(network, p: float) -> None:
    read = read_mlp(network().eval())
    assert (read.dropout, read.active, read.lost) == (0.0, False, p)
    if p:
        with pytest.raises(Unfusable, match="is active; convert the flow in eval mode"):
            read_mlp(network())
    frozen = network()
    for module in frozen.modules():
        module.training = not isinstance(module, nn.Dropout)  # dropout in another mode than its network
    assert read_mlp(frozen).lost == p


def test_two_networks_with_dropout() -> None:
    a, b, c = (read_mlp(sequential(nn.ReLU(), dropout=p).eval()) for p in (0.3, 0.3, 0.2))
    assert separate(a, b).dropout == 0.3 and not separate(a, b).lost
    assert separate(a, c).dropout == 0 and separate(a, c).lost == 0.3
    active = read_mlp(sequential(nn.ReLU(), dropout=0.3))
    assert separate(active, read_mlp(sequential(nn.ReLU(), dropout=0.3))).active
    for other in (a, c, read_mlp(sequential(nn.ReLU()))):
        with pytest.raises(Unfusable, match=r"dropout \(p = 0.3\) is active; convert the flow in eval mode"):
            separate(active, other)


def test_a_layer_used_twice_and_hooks_are_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(Unfusable, match="more than once"):
        read_mlp(nn.Sequential(layer, nn.ReLU(), layer))
    network = sequential(nn.ReLU())
    network[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(Unfusable, match="forward hooks"):
        read_mlp(network)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.randn_like(x) if self.training else x)


def test_networks_that_do_something_else_in_training_mode_are_refused() -> None:
    noisy = Noisy().eval()
    with pytest.raises(Unfusable, match="Noisy does something else in training mode"):
        read_mlp(noisy)
    assert not any(part.training for part in noisy.modules())


def test_selecting_and_joining() -> None:
    torch.manual_seed(0)
    u, t = sequential(nn.Tanh(), widths=(5, 4, 3)).double(), sequential(nn.Tanh(), widths=(5, 7, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    t[0].requires_grad_(False)
    both = separate(read_mlp(u), read_mlp(t))
    out = outputs(both, x)
    torch.testing.assert_close(out, torch.cat([u(x), t(x)], 1))
    trained = [(roles == TRAINED).sum() for roles in both.roles]
    assert trained == [5 * 4, 4 * 3 + 7 * 3]
    assert both.bias_roles[0].tolist() == [[TRAINED] * 4 + [FIXED] * 3, [FROZEN] * 7]
    assert (both.separate, both.n_in, both.n_out) == (True, 5, 6)

    order = torch.tensor([2, 0, 1])
    chosen = select_outputs(both, order)
    torch.testing.assert_close(
        mlp(x, chosen.weights, chosen.biases, "tanh"), torch.cat([u(x)[:, order], t(x)[:, order]], 1)
    )
    pair = select_outputs(read_mlp(u), order[:2])
    torch.testing.assert_close(mlp(x, pair.weights, pair.biases, "tanh"), u(x)[:, order[:2]])
    for net, factors, wanted in (
        (both, (3.0, -1.0), torch.cat([3 * u(x), -t(x)], 1)),
        (pair, (3.0, 2.0), u(x)[:, order[:2]] * torch.tensor([3.0, 2.0])),
        (pair, (-1.0,), -u(x)[:, order[:2]]),
    ):
        scaled = scale_outputs(net, *factors)
        out_scaled = scaled.factors.flatten() * mlp(x, scaled.weights, scaled.biases, "tanh")
        torch.testing.assert_close(out_scaled, wanted)
        assert torch.equal(scaled.weights[-1].abs(), net.weights[-1].abs())  # a size that optimizers see
    wider = widen_inputs(both, 3, (2, 0), 4)
    given = torch.cat([x[:, :3], x[:, 4:], torch.randn(6, 1).double(), x[:, 3:4], torch.randn(6, 1).double()], 1)
    torch.testing.assert_close(mlp(given, wider.weights, wider.biases, "tanh"), out)
    assert not wider.roles[0][:, [4, 6]].any()
    fewer = select_inputs(read_mlp(t), torch.tensor([4, 1]))
    masked = torch.zeros_like(x).index_copy(1, torch.tensor([1, 4]), x[:, [1, 4]])
    torch.testing.assert_close(mlp(x[:, [4, 1]], fewer.weights, fewer.biases, "tanh"), t(masked))
    fixed = without_shift(read_mlp(t))
    torch.testing.assert_close(
        mlp(x, fixed.weights, fixed.biases, "tanh"), torch.cat([t(x), torch.zeros(6, 3).double()], 1)
    )
    assert (fixed.roles[-1][:, :3] == TRAINED).all() and (fixed.roles[-1][:, 3:] == FIXED).all()

    with pytest.raises(Unfusable, match="share parameters"):
        separate(read_mlp(u), read_mlp(u))
    with pytest.raises(Unfusable, match="differ in depth"):
        separate(read_mlp(u), read_mlp(sequential(nn.Tanh())))
    with pytest.raises(Unfusable, match="numbers of columns"):
        separate(read_mlp(u), read_mlp(sequential(nn.Tanh(), widths=(5, 4, 2))))
