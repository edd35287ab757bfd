"""What `fast_splines` replaces, where, and that whole models of nflows, normflows, sbi and zuko stay what they are."""

import copy
import inspect
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
import zuko
from nflows.nn.nets import ResidualNet
from nflows.transforms.splines import rational_quadratic as of_nflows
from normflows.utils import splines as of_normflows
from sbi.neural_nets.net_builders.flow import build_nsf
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from glf_fast.integrations import fast_splines, splines

BOX, LINE = "rational_quadratic_spline", "unconstrained_rational_quadratic_spline"
OWN = [vars(of_nflows)[LINE]]  # the module's own name of it would be replaced, too


def names_in(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name != "__warningregistry__"}


@pytest.fixture(autouse=True)
def _all_back() -> Iterator[None]:
    """Every test leaves the libraries as they are."""
    before = [names_in(module) for module in (of_nflows, nflows.transforms.splines, of_normflows)]
    constructor = MonotonicRQSTransform.__init__
    yield
    assert [names_in(module) for module in (of_nflows, nflows.transforms.splines, of_normflows)] == before
    assert MonotonicRQSTransform.__init__ is constructor


# -- what is replaced --------------------------------------------------------------------------------------------------


def equal(theirs: list[Tensor], ours: list[Tensor]) -> None:
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def module(monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> Any:
    made = types.ModuleType(name)
    exec(compile(code, name, "exec"), vars(made))
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_copies_and_other_names_are_replaced_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    code = inspect.getsource(of_nflows)
    copied = module(monkeypatch, "glasflow.nflows.transforms.splines.rational_quadratic", code)
    changed = module(monkeypatch, "other.splines", code.replace("derivatives = min_d", "derivatives = 2 * min_d"))
    aliased = module(monkeypatch, "analysis", f"from {of_nflows.__name__} import {LINE} as spline")
    before = [dict(vars(m)) for m in (copied, changed, aliased)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced = fast_splines()
        for names, name in ((copied, BOX), (copied, LINE), (aliased, "spline"), (nflows.transforms.splines, LINE)):
            assert vars(names)[name] is not (OWN[0] if names is not copied else before[0][name])
        assert vars(changed) == before[1] and f"{copied.__name__}.{LINE}" in replaced.replaced
        assert f"other.splines.{LINE}" not in repr(replaced) and f"zuko.transforms.{splines.transforms.NAME}" in repr(
            replaced
        )
        late = module(monkeypatch, "late", f"from {of_nflows.__name__} import {LINE}")
        replaced.undo()
        replaced.undo()
    assert [dict(vars(m)) for m in (copied, changed, aliased)] == before
    assert vars(late)[LINE] is OWN[0]
    assert repr(replaced) == "<fast_splines: nothing replaced>"


def test_blocks_may_be_nested_and_end_in_any_order() -> None:
    def now() -> bool:
        return vars(of_nflows)[LINE] is not OWN[0]

    with fast_splines() as outer:
        with fast_splines(), outer, outer:
            assert now()
        assert now()
        inner = fast_splines()
    assert now()
    inner.undo()
    assert not now()
    with pytest.raises(ZeroDivisionError), outer:
        assert now()
        _ = 1 / 0
    assert not now()


def test_without_a_library_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splines, "sys", types.SimpleNamespace(modules={"odd": None, "torch": torch}))
    with pytest.warns(UserWarning, match="import the library first") as caught, fast_splines():
        pass
    assert caught[0].filename == __file__


def test_a_spline_coupling_of_nflows_compiles_to_one_graph() -> None:
    layer = nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, 0]), partial(ResidualNet, hidden_features=8, num_blocks=1), num_bins=4, tails="linear"
    )
    flow = nflows.flows.Flow(layer, nflows.distributions.StandardNormal([2]))
    x = torch.randn(6, 2)
    theirs = flow.log_prob(x)
    torch._dynamo.reset()
    with fast_splines():
        ours = torch.compile(flow.log_prob, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(ours, theirs)


def test_transforms_of_zuko_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(MonotonicRQSTransform):
        def _call(self, x: Tensor) -> Tensor:
            return self.horizontal[..., 0]

    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 3, n, generator=random, dtype=torch.float64, requires_grad=True) for n in (8, 8, 7)]
    x = torch.randn(5, 3, generator=random, dtype=torch.float64)
    early, k = MonotonicRQSTransform(*parts), torch.tensor([[2, 3, 4]] * 5)
    with fast_splines():
        fast, mine = MonotonicRQSTransform(*parts), Mine(*parts)
        with torch.no_grad():
            frozen = MonotonicRQSTransform(*parts)
            assert fast(x).requires_grad is False
        assert type(early) is not type(fast) and type(mine) is Mine and isinstance(fast, MonotonicRQSTransform)
        equal([early(x)], [fast(x)])
        torch.testing.assert_close(mine(x), early.horizontal[..., 0])
        single = fast(x.float())  # of no dtype that is covered
    assert not frozen(x).requires_grad and single.dtype == torch.float64
    assert fast(x).requires_grad and fast.inv(x).requires_grad and repr(fast) == repr(early) and fast.bins == 8
    with torch.no_grad():
        knots = fast.horizontal, fast.vertical, fast.derivatives
    assert all(tensor.requires_grad for tensor in knots)
    equal([early.horizontal, early.vertical, early.derivatives, *early.bin(k)[1:]], [*knots, *fast.bin(k)[1:]])
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(other) is MonotonicRQSTransform
        equal([early(x).detach()], [other(x)])


# -- whole models ------------------------------------------------------------------------------------------------------


def nflows_residual(batch_norm: bool, context: int = 3) -> Any:
    """A flow as that of dingo: residual networks with batch norm, LU layers with permutations."""

    def network(inputs: int, outputs: int) -> ResidualNet:
        return ResidualNet(inputs, outputs, 16, context, num_blocks=2, use_batch_norm=batch_norm)

    layers = []
    for i in range(2):
        mask = nflows.utils.create_alternating_binary_mask(4, even=i % 2 == 0)
        layers += [
            nflows.transforms.RandomPermutation(4),
            nflows.transforms.LULinear(4, identity_init=True),
            nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, network, num_bins=8, tails="linear", tail_bound=1.0, apply_unconditional_transform=True
            ),
        ]
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), nflows.distributions.StandardNormal([4]))


def nflows_autoregressive() -> Any:
    layer = nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        4, 16, context_features=3, tails="linear", tail_bound=2.0
    )
    return nflows.flows.Flow(layer, nflows.distributions.StandardNormal([4]))


def of_normflows_flow(kind: str, *options: Any) -> Any:
    layers = [getattr(normflows.flows, kind)(4, 1, 16, *options) for _ in range(2)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), layers)


# name → how to make it, log p(x), and samples, where they are cheap
MODELS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "sbi nsf": (
        lambda: build_nsf(torch.randn(50, 4), torch.randn(50, 3), hidden_features=16, num_transforms=2),
        lambda flow, x, c: flow.log_prob(x[None], c)[0],
        lambda flow, c: flow.sample((3,), c),
    ),
    "nflows with batch norm": (
        lambda: nflows_residual(True), lambda flow, x, c: flow.log_prob(x, c), lambda flow, c: flow.sample(3, c)
    ),
    "nflows autoregressive": (
        nflows_autoregressive, lambda flow, x, c: flow.log_prob(x, c), lambda flow, c: flow.sample(3, c)
    ),
    "normflows coupling": (
        lambda: of_normflows_flow("CoupledRationalQuadraticSpline"),
        lambda flow, x, c: flow.log_prob(x), lambda flow, c: flow.sample(9)[0],
    ),
    "normflows circular coupling": (
        lambda: of_normflows_flow("CircularCoupledRationalQuadraticSpline", [0, 3]),
        lambda flow, x, c: flow.log_prob(x), lambda flow, c: flow.sample(9)[0],
    ),
    "normflows autoregressive": (
        lambda: of_normflows_flow("AutoregressiveRationalQuadraticSpline"),
        lambda flow, x, c: flow.log_prob(x), lambda flow, c: flow.sample(9)[0],
    ),
    "normflows circular autoregressive": (
        lambda: of_normflows_flow("CircularAutoregressiveRationalQuadraticSpline", [1]),
        lambda flow, x, c: flow.log_prob(x), lambda flow, c: flow.sample(9)[0],
    ),
    "zuko coupling": (
        lambda: zuko.flows.NSF(4, 3, transforms=2, passes=2, hidden_features=(16,)),
        lambda flow, x, c: flow(c).log_prob(x), lambda flow, c: flow(c).sample((3,)),
    ),
    "zuko autoregressive": (
        lambda: zuko.flows.NSF(4, 3, transforms=2, hidden_features=(16,)),
        lambda flow, x, c: flow(c).log_prob(x), lambda flow, c: flow(c).rsample((3,)),
    ),
    "zuko circular": (
        lambda: zuko.flows.NCSF(4, 3, transforms=2, hidden_features=(16,)),
        lambda flow, x, c: flow(c).log_prob(x.clamp(-3, 3)), lambda flow, c: flow(c).rsample_and_log_prob((3,))[1],
    ),
}  # fmt: skip


@pytest.fixture
def _float64() -> Iterator[None]:
    """nflows draws noise in the default precision, whatever the flow's own is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")  # nflows 0.14
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", MODELS)
def test_models_train_and_sample_as_before(name: str) -> None:
    make, log_prob, sample = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # away from the identity, at which many start
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def run(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        found = []
        for _ in range(20):
            x, c = 2 * torch.randn(30, 4), torch.randn(30, 3)
            loss = -log_prob(model, x, c).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        model.eval()
        with torch.no_grad():
            found += [log_prob(model, x, c), sample(model, c[:3])]
        return [*found, *(parameter.detach() for parameter in model.parameters())]

    theirs = run(copy.deepcopy(model))
    with fast_splines():
        ours = run(model)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)
