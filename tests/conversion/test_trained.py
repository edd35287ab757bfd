"""What is trained, and in which mode: as in the original, or refused, or said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import nflows.distributions
import normflows as nf
import pytest
import torch
import zuko
from nflows import transforms as T
from nflows.distributions.normal import DiagonalNormal
from nflows.flows import Flow
from nflows_couplings import Net, alternating
from torch import Tensor, nn

import glf_fast
from glf_fast.conversion import ConversionError, convert, mlp
from glf_fast.conversion import normflows as reader
from glf_fast.conversion.accelerate import accelerate
from glf_fast.conversion.layers import TRAINED


def flow(*layers: nn.Module, base: type = nflows.distributions.StandardNormal) -> Flow:
    first, last = alternating(4)
    return Flow(T.CompositeTransform([first, *layers, last]), base([4]))


def partly(layer: nn.Module, *frozen: str) -> nn.Module:
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def started(kind: type) -> nn.Module:
    layer = kind(4)
    layer(torch.randn(64, 4))
    return layer.eval()


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: partly(T.LULinear(4), "lower_entries", "upper_entries", "unconstrained_upper_diag"),
        lambda: partly(T.LULinear(4), "bias"),
        lambda: partly(started(T.ActNorm), "shift"),
        lambda: partly(started(T.ActNorm), "log_scale"),
        lambda: partly(started(T.BatchNorm), "unconstrained_weight"),
    ],
    ids=["LU bias", "LU matrix", "ActNorm scale", "ActNorm shift", "BatchNorm bias"],
)
def test_partly_frozen_layers_stay_as_they_are(make: Callable[[], nn.Module]) -> None:
    original = flow(layer := make())
    frozen = {name: p.clone() for name, p in layer.named_parameters() if not p.requires_grad}
    model = copy.deepcopy(original)
    report = accelerate(model)
    converted = convert(original)
    for made in (converted, model):
        (kept,) = [m for m in made.modules() if type(m) is type(layer)]
        for p in (p for p in made.parameters() if p.requires_grad):
            p.data.add_(1.0)
        assert all(torch.equal(kept.get_parameter(name), value) for name, value in frozen.items())
    assert "only some of its parameters are trained" in str(report)


def test_partly_frozen_bases_are_refused() -> None:
    base = flow(base=DiagonalNormal)
    base._distribution.mean_.requires_grad_(False)
    with pytest.raises(ConversionError, match="DiagonalNormal: only some of its parameters"):
        convert(base)
    made = zuko.flows.RealNVP(4)
    made.base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(4), torch.ones(4))
    next(made.base.parameters()).requires_grad_(False)
    with pytest.raises(ConversionError, match="only some of its parameters"):
        convert(made)


def test_what_would_train_too_much_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that fill up the narrower one of two networks, read as trained."""
    masked = lambda k: nf.flows.MaskedAffineFlow(  # noqa: E731
        (torch.arange(4) % 2 == k).float(), nf.nets.MLP([4, 8, 4]), nf.nets.MLP([4, 6, 4])
    )
    original = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [masked(0), masked(1)])
    convert(original)
    true = mlp._pair

    def all_trained(a: Tensor, b: Tensor) -> Tensor:
        joined = true(a, b)
        return torch.full_like(joined, TRAINED) if joined.dtype == torch.uint8 else joined

    monkeypatch.setattr(mlp, "_pair", all_trained)
    with pytest.raises(ConversionError, match=r"would train what is frozen in the original \(.*mlp_weights"):
        convert(original)


def test_fresh_flows_with_last_layers_of_zero_are_read_by_their_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where u = 0, every log-scale is 0: the comparison must look elsewhere, too."""
    blocks = [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], init_zeros=True)) for _ in range(2)]
    original = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), blocks)
    convert(original)
    monkeypatch.setitem(reader._SCALE_MAPS, "exp", ("tanh", 1.0, True))
    assert not accelerate(copy.deepcopy(original))
    with pytest.raises(ConversionError, match="log_prob differs"):
        convert(original)


def test_a_network_shared_with_the_embedding_stays_one() -> None:
    shared = nn.Linear(3, 3)

    class Sharing(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.body = nn.Sequential(shared, nn.Tanh(), nn.Linear(3, n_out))

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.body(x)

    layers = [
        T.AffineCouplingTransform(torch.tensor([-1, -1, -1, 1]), Sharing),
        T.AffineCouplingTransform(torch.tensor([1, -1, -1, -1]), lambda a, b: Net(a + 3, b)),
    ]
    original = Flow(T.CompositeTransform(layers), nflows.distributions.StandardNormal([4]), shared)
    converted = convert(original)
    assert len({id(p) for p in original.parameters()}) == len(
        {id(p) for p in converted.parameters() if p.requires_grad}
    )
    linears = [m for m in converted.modules() if isinstance(m, nn.Linear) and m.weight.shape == (3, 3)]
    assert len(linears) == 1


# -- modes -------------------------------------------------------------------------------------------------------------


def test_dropout_that_training_loses_is_said() -> None:
    """One of two hidden layers has dropout."""
    couplings = alternating(4, 2, partial(Net, hidden=(8, 8), dropout=0.3))
    original = Flow(T.CompositeTransform(couplings), nflows.distributions.StandardNormal([4]))
    with pytest.raises(ConversionError, match=r"dropout \(p = 0.3\) is active; convert the flow in eval mode"):
        convert(original)
    original.eval()
    with pytest.warns(UserWarning, match=r"does not apply Dropout \(p = 0.3\) in training mode"):
        converted = convert(original)
    x = torch.randn(3, 4)
    torch.testing.assert_close(converted.train().log_prob(x), original.log_prob(x))
    report = accelerate(original)
    assert report.replaced[
        0
    ].lost == "Dropout (p = 0.3)" and "no longer applies Dropout (p = 0.3) in training mode" in str(report)
    with pytest.warns(UserWarning, match="does not apply BatchNorm in training mode"):
        convert(flow(started(T.BatchNorm)))


def test_modes_of_kept_modules_stay() -> None:
    embedding = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    options = {"context_features": 3, "dropout_probability": 0.5, "activation": nn.functional.celu}
    layer = T.MaskedAffineAutoregressiveTransform(4, 8, **options).eval()
    original = Flow(
        T.CompositeTransform([*alternating(4, 2, lambda a, b: Net(a + 3, b)), layer]),
        nflows.distributions.StandardNormal([4]), embedding,
    )  # fmt: skip
    original.train()
    embedding.eval(), layer.eval()
    converted = convert(original)
    x, context = torch.randn(6, 4), torch.randn(6, 5)
    mean = embedding[1].running_mean.clone()
    assert converted.training
    torch.testing.assert_close(converted.log_prob(x, context), original.log_prob(x, context), rtol=1e-4, atol=1e-4)
    assert torch.equal(converted.embedding[1].running_mean, mean)


def test_inference_mode_does_not_matter() -> None:
    made = {"zuko": zuko.flows.RealNVP(4, 2), "nflows": flow(T.RandomPermutation(4))}
    for original in made.values():
        with torch.inference_mode():
            converted = convert(original)
        given = (torch.randn(5, 2),) if original is made["zuko"] else ()
        converted.log_prob(torch.randn(5, 4), *given).sum().backward()
        assert all(p.grad is not None for p in converted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "make", [lambda flow: flow if accelerate(flow) else None, convert], ids=["accelerate", "convert"]
)
def test_a_flow_that_was_frozen_may_be_unfrozen(make: Callable[[nn.Module], nn.Module]) -> None:
    """What is padded, or was never a parameter, stays what it is: else log_prob is no density any more."""
    torch.manual_seed(0)
    original = zuko.flows.RealNVP(3, transforms=2, hidden_features=(8,))  # 1 column of 3: padded
    original.double().requires_grad_(False)
    fast = make(copy.deepcopy(original)).requires_grad_(True)
    log_prob = fast.log_prob if isinstance(fast, glf_fast.Flow) else lambda x: fast().log_prob(x)
    optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], 1e-2)
    before = log_prob(torch.zeros(1, 3).double())
    for _ in range(50):
        loss = -log_prob(torch.randn(64, 3).double()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(log_prob(torch.zeros(1, 3).double()), before)
    forward = fast if isinstance(fast, glf_fast.Flow) else lambda x: fast.transform().call_and_ladj(x)
    x = torch.randn(5, 3).double()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: forward(row[None])[0][0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], forward(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_and_left(dtype: torch.dtype) -> None:
    original = zuko.flows.RealNVP(4).to(dtype)
    with pytest.raises(ConversionError, match="run it under"):
        convert(original)
    report = accelerate(original)
    assert not report and "under torch.autocast" in str(report)
    assert original().log_prob(torch.randn(3, 4, dtype=dtype)).shape == (3,)
