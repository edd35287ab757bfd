"""What must hold for every flow of the registry."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import jacrev

from glf_fast import Flow


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Agreement relative to the larger of 1 and |b|."""
    assert a.shape == b.shape
    assert ((a - b).abs() <= tolerance * b.abs().clamp_min(1)).all(), (a - b).abs().max()


def check_parameter_gradients(flow: Flow) -> None:
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        triangle_of_one = name.endswith(("lower", "upper")) and parameter.shape[-1] == 1
        assert triangle_of_one or parameter.grad.abs().max() > 0, name


def test_round_trip_and_opposite_log_determinants(case) -> None:
    flow = case.flow.double()
    x, *context = case.inputs(7, torch.float64)
    z, logdet = flow(x, *context)
    x_back, logdet_back = flow.inverse(z, *context)
    assert z.shape == x.shape
    assert logdet.shape == logdet_back.shape == (7,)
    close(x_back, x, 1e-8)
    close(logdet_back, -logdet, 1e-8)
    y, _ = flow.inverse(x, *context)
    close(flow(y, *context)[0], x, 1e-8)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_determinant_is_that_of_the_jacobian(case, direction: str) -> None:
    flow = case.flow.double()
    x, *context = case.inputs(3, torch.float64)
    run = flow.inverse if direction == "inverse" else flow
    _, logdet = run(x, *context)
    for i in range(len(x)):
        row = [c[i : i + 1] for c in context]
        jacobian = jacrev(lambda v, row=row: run(v.view(1, *flow.event_shape), *row)[0].flatten())(x[i].flatten())
        close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, 1e-9)


def test_gradients_reach_every_parameter(case) -> None:
    x, *context = case.inputs(16)
    case.flow.log_prob(x.requires_grad_(), *context).mean().neg().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    check_parameter_gradients(case.flow)


def test_gradients_reach_every_parameter_through_the_inverse(case) -> None:
    z, *context = case.inputs(16)
    x, logdet = case.flow.inverse(z.requires_grad_(), *context)
    (x.square().sum() + logdet.square().sum()).backward()
    check_parameter_gradients(case.flow)


def test_state_dict_through_safetensors_restores_the_flow(case, tmp_path: Path) -> None:
    inputs = case.inputs(4)
    expected = case.flow.log_prob(*inputs)
    save_file(case.flow.state_dict(), tmp_path / "flow.safetensors")
    other: Flow = case.make()
    other.load_state_dict(load_file(tmp_path / "flow.safetensors"))
    close(other.eval().log_prob(*inputs), expected, 0)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(case, copy_of) -> None:
    inputs = case.inputs(4)
    expected = case.flow.log_prob(*inputs)
    other = copy_of(case.flow)
    close(other.log_prob(*inputs), expected, 0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    close(case.flow.log_prob(*inputs), expected, 0)


def test_compiles_to_one_graph_with_equal_values_and_gradients(structure) -> None:
    case = structure
    torch.compiler.reset()
    case.flow.double()
    inputs = case.inputs(6, torch.float64)
    inputs[0].requires_grad_()
    case.flow.log_prob(*inputs).sum().backward()
    expected = case.flow.log_prob(*inputs).detach()
    gradients = [parameter.grad.clone() for parameter in case.flow.parameters()]
    case.flow.zero_grad()
    # aot_eager traces forward and backward as inductor does, without the minutes of C++ compilation.
    compiled = torch.compile(case.flow, fullgraph=True, backend="aot_eager")

    def log_prob() -> torch.Tensor:
        z, logdet = compiled(*inputs)
        return logdet - 0.5 * z.square().flatten(1).sum(1)

    constant = log_prob().detach() - expected
    close(constant, constant.mean().expand_as(constant), 1e-10)
    log_prob().sum().backward()
    for parameter, gradient in zip(case.flow.parameters(), gradients, strict=True):
        close(parameter.grad, gradient, 1e-9)


def test_float32_is_close_to_float64(case) -> None:
    inputs = case.inputs(32)
    z, logdet = case.flow(*inputs)
    z64, logdet64 = copy.deepcopy(case.flow).double()(*(tensor.double() for tensor in inputs))
    assert z.dtype == logdet.dtype == torch.float32
    assert (z - z64).norm() <= 2e-6 * z64.norm()
    assert (logdet - logdet64).norm() <= 2e-6 * (logdet64.norm() + len(logdet) ** 0.5)


def test_empty_batches_single_rows_and_strides(case) -> None:
    x, *context = case.inputs(5)
    z, logdet = case.flow(x, *context)
    empty_z, empty_logdet = case.flow(x[:0], *(c[:0] for c in context))
    assert empty_z.shape == (0, *case.flow.event_shape)
    assert empty_logdet.shape == (0,)
    one_z, one_logdet = case.flow(x[2:3], *(c[2:3] for c in context))
    close(one_z, z[2:3], 1e-5)
    close(one_logdet, logdet[2:3], 1e-5)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() <= len(strided)
    close(case.flow(strided, *context)[0], z, 1e-6)
    if x.ndim == 4:
        close(case.flow(x.contiguous(memory_format=torch.channels_last), *context)[0], z, 1e-5)


def test_nan_and_inf_stay_in_their_row(case) -> None:
    x, *context = case.inputs(4)
    z, logdet = case.flow(x, *context)
    bad = x.clone()
    bad[1] = torch.nan
    bad[3] = torch.inf
    z_bad, logdet_bad = case.flow(bad, *context)
    assert z_bad[1].isnan().any()
    assert not z_bad[3].isfinite().all()
    close(z_bad[[0, 2]], z[[0, 2]], 1e-5)
    close(logdet_bad[[0, 2]], logdet[[0, 2]], 1e-5)


def test_autocast_keeps_the_state_in_float32(case) -> None:
    inputs = case.inputs(16)
    z, _ = case.flow(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        z_low, logdet_low = case.flow(*inputs)
        x_low, _ = case.flow.inverse(z_low, *inputs[1:])
    assert z_low.dtype == logdet_low.dtype == x_low.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % a product; a few of them in a row.
    assert (z_low - z).norm() <= 0.1 * z.norm()
    # The same rounded network is evaluated both ways, so the round trip does not see the rounding.
    assert (x_low - inputs[0]).norm() <= 0.05 * inputs[0].norm()


def test_samples_follow_the_generator_and_the_temperature(case) -> None:
    context = [torch.randn(case.flow.context_shape)] if case.flow.context_shape else []
    draws = [case.flow.sample(6, *context, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].shape == (6, *case.flow.event_shape)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert case.flow.sample(0, *context).shape == (0, *case.flow.event_shape)
    cold = case.flow.sample(3, *context, temperature=0.0)
    close(cold[0], cold[1], 1e-6)
    mode = case.flow(cold, *(c.expand(3, *c.shape) for c in context))[0]
    assert mode.abs().max() < 1e-4


def test_repr_is_a_readable_tree(case) -> None:
    text = repr(case.flow)
    assert type(case.flow).__name__ in text
    assert " at 0x" not in text
    assert "lambda" not in text
