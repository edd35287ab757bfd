"""The masked autoregressive flow: its Jacobian, nflows' own with the same weights, and what its constructor takes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from glf_fast import AutoregressiveFlow, CouplingFlow, Inverse, Spline, use_backend


def random_flow(*args: Any, **options: Any) -> AutoregressiveFlow:
    torch.manual_seed(0)
    flow = AutoregressiveFlow(*args, **options).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


KINDS: dict[str, dict[str, Any]] = {
    "affine": {},
    "softplus": {"log_scale": "softplus", "hidden": (20,), "activation": "relu"},
    "spline": {"transform": "spline", "spline": {"bins": 5}, "hidden": (9, 9, 9, 9)},
    "residual": {"network": "residual", "hidden": (15, 15), "context_dim": 2},
    "skip": {"network": "skip", "hidden": (15, 15), "context_dim": 2},
    "context": {"context_dim": 3},
    "context-layer": {"context_dim": 3, "context_layer": True, "activation": "elu"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_one_step_has_a_triangular_jacobian_with_the_diagonal_of_its_log_determinant(dim: int, kind: str) -> None:
    flow = random_flow(dim, 1, **KINDS[kind])
    x, context = torch.randn(1, dim).double(), torch.randn(1, flow.context_dim).double() if flow.context_dim else None
    J = jacobian(lambda v: flow(v, context)[0], x)[0, :, 0]
    assert (J.triu(1) == 0).all() and (J.diagonal() > 0).all()
    torch.testing.assert_close(J.diagonal().log().sum(), flow(x, context)[1][0], rtol=1e-10, atol=1e-10)
    if kind == "affine":
        assert (J[torch.ones(dim, dim).tril(-1) > 0] != 0).all(), "every feature sees all before it"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 63])
def test_inverse_undoes_forward(dim: int, kind: str) -> None:
    flow = random_flow(dim, 3, linear="reverse" if dim == 63 else "plu", **KINDS[kind])
    with torch.no_grad():
        for bias in flow.mlp_biases:  # 0.3 a weight is much for 63 features
            bias.mul_(0.3)
        for weight in flow.mlp_weights:
            weight.mul_(0.3)
    x, context = torch.randn(20, dim).double(), torch.randn(20, flow.context_dim).double() if flow.context_dim else None
    z, logdet = flow(x, context)
    back, back_logdet = flow.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back_logdet, -logdet, rtol=1e-10, atol=1e-10)


def of_nflows(
    transforms: list[nn.Module], dim: int, hidden: int, context_dim: int, **options: Any
) -> AutoregressiveFlow:
    """Ours with the weights of nflows' transforms, whose hidden units are sorted by their degrees."""
    nets = [transform.autoregressive_net for transform in transforms]
    residual = nets[0].use_residual_blocks
    weights, biases, degrees = [], [], []
    for net in nets:
        masked = [net.initial_layer]
        for block in net.blocks:
            masked += list(block.linear_layers) if residual else [block.linear]
        orders = [torch.arange(dim), *(layer.degrees.argsort(stable=True) for layer in masked)]
        degrees.append([range(1, dim + 1), *(layer.degrees.sort()[0].tolist() for layer in masked)])
        W = [layer.weight[o][:, i].T for layer, i, o in zip(masked, orders, orders[1:], strict=False)]
        b = [layer.bias[o] for layer, o in zip(masked, orders[1:], strict=False)]
        if residual and context_dim:
            for i, block in enumerate(net.blocks):
                own = block.context_layer
                W[2 * i + 1] = torch.cat([own.weight[orders[1]].T, W[2 * i + 1]])
                b[2 * i + 1] = b[2 * i + 1] + own.bias[orders[1]]
        W.append(net.final_layer.weight[:, orders[-1]].T)
        b.append(net.final_layer.bias)
        if context_dim:
            W.append(net.context_layer.weight[orders[1]].T)
            b.append(net.context_layer.bias[orders[1]])
        weights.append(W), biases.append(b)
    flow = AutoregressiveFlow(
        dim, len(nets), (hidden,) * (len(nets[0].blocks) + (not residual)), context_dim, degrees=degrees,
        context_layer=context_dim > 0, network="residual" if residual else "mlp", **options,
    ).double()  # fmt: skip
    with torch.no_grad():
        for own, theirs in ((flow.mlp_weights, weights), (flow.mlp_biases, biases)):
            for parameter, of_steps in zip(own, zip(*theirs, strict=True), strict=True):
                parameter.copy_(torch.stack(of_steps))
    return flow.eval()


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("kind", ["plain", "random", "residual", "spline"])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_nflows_transforms_are_these(dim: int, kind: str, context_dim: int) -> None:
    nflows = pytest.importorskip("nflows.transforms")
    torch.manual_seed(0)
    common = {
        "features": dim, "hidden_features": 50, "context_features": context_dim or None, "num_blocks": 2,
        "use_residual_blocks": kind == "residual", "random_mask": kind == "random", "activation": torch.tanh,
    }  # fmt: skip
    if kind == "spline":
        make = lambda: nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(  # noqa: E731
            num_bins=6, tails="linear", tail_bound=3.0, **common
        )
        options = {"transform": "spline", "spline": Spline(6, -3.0, 3.0, parametrization="nflows")}
    else:
        make = lambda: nflows.MaskedAffineAutoregressiveTransform(**common)  # noqa: E731
        options = {"log_scale": "softplus"}
    reverse = nflows.ReversePermutation(dim)
    transforms = [make().double() for _ in range(3)]
    with torch.no_grad():
        for transform in transforms:
            for parameter in transform.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = nflows.CompositeTransform([transforms[0], reverse, transforms[1], reverse, transforms[2]])
    flow = of_nflows(transforms, dim, 50, context_dim, **options)
    x, context = torch.randn(20, dim).double(), torch.randn(20, context_dim).double() if context_dim else None
    for ours, wanted in (
        (flow(x, context), theirs(x, context)),
        (flow.inverse(x, context), theirs.inverse(x, context)),
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_an_inverse_autoregressive_flow_learns_by_reverse_kl() -> None:
    """exp(x) has a mean of 2 under N(0.5, 0.62²) or so: the flow samples, and its gradient goes through the inverse."""
    torch.manual_seed(0)
    flow = Inverse(AutoregressiveFlow(3, 2, (16,), linear="reverse"))
    mean, optimizer = torch.tensor([1.0, -2.0, 0.5]), torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(150):
        x, logdet = flow.inverse(torch.randn(64, 3))
        loss = (0.5 * ((x - mean) / 0.5).square().sum(1) - logdet).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = flow.sample(2000)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.15)
    torch.testing.assert_close(x.std(0), torch.full((3,), 0.5), rtol=0, atol=0.15)


def test_gradients_are_those_of_the_reference_in_both_directions() -> None:
    flow = random_flow(5, 3, (12, 12), context_dim=2, linear="plu", actnorm=True)
    x, context = torch.randn(9, 5).double(), torch.randn(9, 2).double()
    found = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            (flow.log_prob(x, context).sum() + flow.inverse(x, context)[0].square().sum()).backward()
        found.append([p.grad.clone() for p in flow.parameters()])
        flow.zero_grad()
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["residual", "context", "context-layer"])
def test_one_context_for_all_rows_is_part_of_the_biases(kind: str) -> None:
    flow = random_flow(4, 2, **KINDS[kind])
    z, context = torch.randn(70, 4).double(), torch.randn(flow.context_dim).double()
    with torch.no_grad():
        for got, wanted in zip(flow.inverse(z, context), flow.inverse(z, context.repeat(70, 1)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("context", [torch.tensor([1, 2]), torch.ones(2)])
def test_one_context_is_checked_for_few_and_for_many_rows(context: torch.Tensor) -> None:
    flow = AutoregressiveFlow(4, 2, (8,), context_dim=2).double()
    for rows in (3, 70):
        with torch.no_grad(), pytest.raises(TypeError, match="context"):
            flow.inverse(torch.randn(rows, 4).double(), context)


def test_degrees_survive_averaging_and_copies() -> None:
    """What units see are integers that no tool may average, as AveragedModel does with buffers."""
    flow = random_flow(4, 2, (8,))
    averaged = torch.optim.swa_utils.AveragedModel(flow, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(flow)
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(averaged.module.log_prob(x), flow.log_prob(x))
    assert copy.deepcopy(flow)._fan_in.keys() == {torch.device("cpu")}


@pytest.mark.parametrize("linear", ["reverse", "permutation", "plu", "dense"])
def test_a_state_has_all_that_a_flow_of_other_degrees_differs_in(linear: str) -> None:
    drawn = [[[[1, 2, 3], degrees]] * 2 for degrees in ([0, 1, 1, 2], [1, 1, 2, 2])]
    saved, loaded = (random_flow(3, 2, (4,), linear=linear, degrees=degrees) for degrees in drawn)
    usual = random_flow(3, 2, (4,), linear=linear)
    x, state = torch.randn(5, 3).double(), saved.state_dict()
    averaged = {**state, "_extra_state": 0.9 * state["_extra_state"] + 0.1 * state["_extra_state"]}
    for flow, given in ((loaded, state), (usual, averaged)):
        assert not torch.equal(flow.log_prob(x), saved.log_prob(x))
        flow.load_state_dict(given)
        assert torch.equal(flow.log_prob(x), saved.log_prob(x))
    other = random_flow(3, 2, (4,), linear=linear, degrees=drawn[1]).state_dict()["_extra_state"]
    with pytest.raises(ValueError, match="not of flows with different masks"):
        usual.load_state_dict({**state, "_extra_state": (state["_extra_state"] + other) / 2})
    del state["_extra_state"]  # a file of a flow that did not save it
    saved.load_state_dict(state)


def test_a_flow_starts_as_the_identity_but_for_its_maps() -> None:
    x = torch.randn(5, 4)
    z, logdet = AutoregressiveFlow(4, 1, (8,))(x)
    assert torch.equal(z, x) and (logdet == 0).all()


WRONG: dict[str, dict[str, Any]] = {
    "dim must be ≥ 1": {"dim": 0},
    "hidden must be 0 to 8 widths": {"hidden": (8, 0)},
    "hidden must be a sequence": {"hidden": 50},
    "must have one width": {"network": "residual", "hidden": (8, 9)},
    "transform must be one of": {"transform": "cubic"},
    "linear must be one of": {"linear": "none"},
    "activation must be one of": {"activation": "sine"},
    'spline is for transform="spline"': {"spline": Spline()},
    "context_layer=True is for": {"context_layer": True},
    "steps must be ≥ 1": {"steps": 0},
    "degrees must be, for each of 5 steps": {"degrees": [[[1, 2, 3]]]},
    "degrees must be sorted": {"steps": 1, "hidden": (2,), "degrees": [[[1, 2, 3], [2, 1]]]},
    "degrees must be whole numbers: .*; got 3": {"degrees": 3},
    "degrees must be whole numbers": {"steps": 1, "hidden": (2,), "degrees": [[[1, 2, 3], [1, 1.5]]]},
    "must not shrink": {
        "steps": 1, "hidden": (2,), "network": "residual", "degrees": [[[1, 2, 3], [2, 2], [1, 1], [1, 1]]],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AutoregressiveFlow(**{"dim": 3, **WRONG[message]})


@pytest.mark.parametrize("kind", [AutoregressiveFlow, CouplingFlow])
def test_sizes_are_whole_numbers(kind: type) -> None:
    for name, value in (("dim", 3.0), ("dim", "3"), ("steps", 2.0), ("context_dim", 1.5)):
        with pytest.raises(ValueError, match=f"^{name} must be an int; got {value!r}"):
            kind(**{"dim": 3, name: value})
    with pytest.raises(ValueError, match=r"^hidden\[1\] must be an int; got 5.5"):
        kind(3, hidden=(5, 5.5))
    with pytest.raises(ValueError, match=r"^hidden\[0\] must be an int; got '5'"):
        kind(3, hidden="50")


def test_repr_is_short() -> None:
    degrees = [[range(1, 101), [1] * 50, [1] * 50]] * 3
    assert len(repr(AutoregressiveFlow(100, 3, degrees=degrees))) < 800


def test_a_flow_of_other_degrees_is_autoregressive() -> None:
    """Two groups of features, as couplings have them: those of a group do not see each other."""
    degrees = [[[1, 1, 2, 2, 2], [1] * 8]]
    flow = random_flow(5, 1, (8,), degrees=degrees)
    x = torch.randn(1, 5).double()
    J: Tensor = jacobian(lambda v: flow(v)[0], x)[0, :, 0]
    assert (J[:2, :2] - J[:2, :2].diag().diag() == 0).all() and (J[2:, 2:] - J[2:, 2:].diag().diag() == 0).all()
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)
