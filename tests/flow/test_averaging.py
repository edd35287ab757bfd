"""Tools that average buffers with the weights: a flow stays the bijection that it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from glf_fast import MLP, AffineCoupling, CouplingFlow, Flow, InvertibleLinear, SequentialFlow, rnvp_flow, use_backend
from glf_fast.conversion.padded import Padded

from .conftest import holding

D = 64


def padded() -> Padded:
    """A flow on 70 columns, of which the data have 64; what the added ones hold must come back at its place."""
    order = torch.randperm(70)
    flow = SequentialFlow([InvertibleLinear(70, linear="permutation", permutation=order)], (70,))
    return Padded(flow, D, order)


FLOWS: dict[str, Callable[[], Flow]] = {
    "plu": lambda: CouplingFlow(D, 2, (4,)),
    "dense": lambda: CouplingFlow(D, 2, (4,), linear="dense"),
    "permutation": lambda: CouplingFlow(D, 2, (4,), linear="permutation"),
    "held": lambda: holding(CouplingFlow(D, 2, (4,)), "actnorm_bias", "linear_upper"),
    "layers": lambda: CouplingFlow(D, 2, (4,)).to_layers(),
    "alone": lambda: SequentialFlow([InvertibleLinear(D, linear="permutation")], (D,)),
    "mask": lambda: SequentialFlow([AffineCoupling(D, MLP(32, [4], 64), mask=torch.arange(D) % 2 == 0)], (D,)),
    "folded mask": lambda: SequentialFlow(
        [InvertibleLinear(D), AffineCoupling(D, MLP(32, [4], 64), mask=torch.arange(D) % 2 == 0), InvertibleLinear(D)],
        (D,),
    ),
    "rnvp": lambda: rnvp_flow(D, blocks=2, hidden=4),
    "padded": padded,
}


def of_states(average: nn.Module, model: nn.Module) -> None:
    """As tools do that walk through state_dict (timm's ModelEmaV2)."""
    with torch.no_grad():
        for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * new)


def averaging(**options: Callable) -> Callable[[Flow], tuple[nn.Module, Callable[[Flow], None]]]:
    def make(flow: Flow) -> tuple[nn.Module, Callable[[Flow], None]]:
        averaged = swa_utils.AveragedModel(flow, use_buffers=True, **options)
        return averaged.module, averaged.update_parameters

    return make


def by_state(flow: Flow) -> tuple[nn.Module, Callable[[Flow], None]]:
    average = copy.deepcopy(flow)
    return average, lambda model: of_states(average, model)


TOOLS = {
    "ema, all at once": averaging(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
    "ema of 0.9999": averaging(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9999)),
    "ema, one by one": averaging(avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    "mean": averaging(),
    "states": by_state,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", FLOWS)
def test_an_averaged_flow_is_the_flow(name: str, tool: str) -> None:
    torch.manual_seed(0)
    flow, x = FLOWS[name]().double(), torch.randn(30, D, dtype=torch.float64)
    flow(x)  # ActNorms have started, and batch norms moved
    average, update = TOOLS[tool](flow)
    flow.eval(), average.eval()  # once: an average is often used again without
    for _ in range(3):
        for _ in range(5):
            update(flow)
        with torch.no_grad():
            torch.testing.assert_close(average.log_prob(x), flow.log_prob(x))
            torch.testing.assert_close(average.inverse(average(x)[0])[0], x, rtol=1e-6, atol=1e-6)
    for _ in range(5):
        update(flow)
    for key, value in average.state_dict().items():
        if not value.is_floating_point() and "num_batches" not in key:
            assert torch.equal(value, flow.state_dict()[key]), key
    other = FLOWS[name]().double()
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.eval().log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("name", ["plu", "permutation", "rnvp", "layers", "padded"])
def test_compiled_and_transformed_averages_are_the_flow(name: str) -> None:
    torch.manual_seed(0)
    flow, x = FLOWS[name]().double(), torch.randn(5, D, dtype=torch.float64)
    flow(x)
    wanted = flow.eval().log_prob(x).detach()
    average, update = TOOLS["ema, all at once"](flow)
    for transformed in (False, True):
        for _ in range(5):
            update(flow)
        if transformed:
            found = torch.func.vmap(lambda row: average.log_prob(row[None])[0])(x)
        else:
            found = torch.compile(average.eval().log_prob, backend="eager")(x)
        torch.testing.assert_close(found.detach(), wanted)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_of_different_flows_are_told_by_their_signs(decay: float) -> None:
    torch.manual_seed(0)
    average, other = (CouplingFlow(16, 2, (4,), actnorm=False).eval() for _ in range(2))
    x = torch.randn(3, 16)
    average(x)
    with torch.no_grad():
        for mean, new in zip(average.buffers(), other.buffers(), strict=True):
            mean.copy_(decay * mean + (1 - decay) * new)
    with pytest.raises(ValueError, match=r"averaged the states of different flows|averages weights average it"):
        average(x)


def test_an_average_that_was_made_before_the_first_batch_does_not_start_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    for make in (lambda: CouplingFlow(4, 2, (8,)), lambda: CouplingFlow(4, 2, (8,)).to_layers()):
        flow = make()
        for use_buffers in (False, True):
            average = swa_utils.AveragedModel(flow, use_buffers=use_buffers)
            flow(3 * x + 2)
            average.update_parameters(flow)
            before = [p.clone() for p in average.module.parameters()]
            average(x)
            assert all(map(torch.equal, before, average.module.parameters()))
            flow = make()


@pytest.mark.parametrize("make", [lambda: CouplingFlow(D, 2, (4,)), FLOWS["alone"]])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_mean_of_two_permutations_is_an_error_that_names_averages(make: Callable[[], Flow], backend: str) -> None:
    torch.manual_seed(0)
    one, x = make().eval(), torch.randn(3, D)
    average = swa_utils.AveragedModel(one, use_buffers=True)
    average.update_parameters(one)
    average.update_parameters(make())
    with pytest.raises(ValueError, match="averages weights average it"), use_backend(backend):
        average.module(x)
    with pytest.raises(ValueError, match="averages weights average it"):
        average.module.state_dict()
    other, state = make(), one.state_dict()
    key = next(key for key in state if key.endswith("permutation"))
    state[key] = state[key] // 2
    with pytest.raises(RuntimeError, match="averages weights average it"):
        other.load_state_dict(state)


def test_new_permutations_are_taken() -> None:
    """By loading, by writing, by another device or dtype: only averages are undone."""
    torch.manual_seed(0)
    flow = CouplingFlow(6, 2, (8,), linear="permutation", actnorm=False).eval()
    x = torch.randn(4, 6)
    flow(x)
    for write in (
        lambda order: order.copy_(order.flip(-1)),
        lambda order: order.data.copy_(order.roll(1, -1)),
        lambda order: order.sub_(1).remainder_(6),
    ):
        with torch.no_grad():
            write(flow.linear_permutation)
        wanted = flow.linear_permutation.clone()
        torch.testing.assert_close(flow(x), flow.to_layers()(x))
        assert torch.equal(flow.linear_permutation, wanted)
    assert torch.equal(flow.double()(x.double())[0].float(), flow.float()(x)[0])
    with torch.inference_mode():
        inside = CouplingFlow(6, 2, (8,)).eval()
        inside(x)
    with torch.no_grad():
        inside(x)
