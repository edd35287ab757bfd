"""Classes that are not quite the libraries' released ones: other releases, copies, subclasses, and odd attributes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.distributions as nd
import nflows.flows
import nflows.transforms as nt
import normflows as nf
import pytest
import torch
import zuko
from library_flows import log_prob, shake
from nflows_couplings import Net
from torch import Tensor, nn

from glf_fast import accelerate, convert

DIM = 4


def subnet(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_in, 6), nn.ReLU(), nn.Linear(6, n_out))


# -- FrEIA after release 0.2 -------------------------------------------------------------------------------------------


class AllInOneBlock(fm.AllInOneBlock):
    """With the indices of a hard permutation in place of its matrix."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        order = self.w_perm.flatten(1).argmax(1)
        self.w_perm = nn.Parameter(order, requires_grad=False)
        self.w_perm_inv = nn.Parameter(order.argsort(), requires_grad=False)
        self.permute_function = lambda x, order: x[:, order]


class ActNorm(fm.ActNorm):
    """With a buffer that says whether it has seen data."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        del self.init_on_next_batch
        self.register_buffer("is_initialized", torch.tensor(False))

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        if not self.is_initialized:
            self.scale.data.fill_(0.3)
            self.is_initialized.fill_(True)
        logdet = (self.scale.sum() * x[0][0, 0].numel()).repeat(len(x[0]))
        y = (x[0] - self.bias) / self.scale.exp() if rev else x[0] * self.scale.exp() + self.bias
        return [y], -logdet if rev else logdet


class GraphINN(ff.GraphINN):
    """With conditions as pairs of a node and the index of its output."""

    def __init__(self, nodes: list[Any]) -> None:
        super().__init__(nodes)
        for node in self.node_list:
            node.conditions = [(c, 0) for c in node.conditions]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        pairs = {node: node.conditions for node in self.node_list}
        try:
            for node, conditions in pairs.items():
                node.conditions = [c for c, _ in conditions]
            return super().forward(*arguments, **options)
        finally:
            for node, conditions in pairs.items():
                node.conditions = conditions


@pytest.mark.parametrize("shape", [(DIM,), (DIM, 3, 5)])
@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}])
def test_hard_permutations_as_indices(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    net = subnet if len(shape) == 1 else lambda n_in, n_out: nn.Conv2d(n_in, n_out, 1)
    inn = ff.SequenceINN(*shape)
    for _ in range(2):
        inn.append(AllInOneBlock, subnet_constructor=net, **options)
        inn.append(ActNorm)
    shake(inn, 0.2)
    report = accelerate(fresh := copy.deepcopy(inn))
    assert (
        report and str(report).count("an ActNorm has not been initialised") == 2
    )  # the blocks are replaced, one by one
    x = torch.randn(6, *shape)
    wanted = inn(x)  # starts them
    for flow in (inn, fresh):
        flow(x)
        assert accelerate(flow) or flow is fresh
        for got, want in zip(flow(x), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_graphs_with_conditions_as_pairs() -> None:
    nodes = [ff.InputNode(DIM, name="in")]
    condition = ff.ConditionNode(3)
    for _ in range(2):
        nodes.append(ff.Node(nodes[-1], fm.GLOWCouplingBlock, {"subnet_constructor": subnet}, conditions=condition))
    inn = shake(GraphINN([*nodes, condition, ff.OutputNode(nodes[-1])]), 0.2)
    x, c = torch.randn(5, DIM), torch.randn(5, 3)
    wanted = inn(x, c=[c])
    converted = convert(copy.deepcopy(inn))
    torch.testing.assert_close(converted(x, c), wanted)


# -- copies and subclasses ---------------------------------------------------------------------------------------------


def copied_class(kind: type, module: str, old: str = "", new: str = "") -> type:
    """The class of the same source text, with `new` for `old`, in another module."""
    source = inspect.getsource(kind)
    assert old in source
    source = source.replace(old, new) if old else source
    names = {**vars(inspect.getmodule(kind)), "__name__": module}
    exec(compile(source, module, "exec"), names)
    return names[kind.__name__]


class Empty(nt.AffineCouplingTransform):
    pass


class Same(nt.AdditiveCouplingTransform):
    """With a constructor of its own."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask, lambda n_in, n_out: Net(n_in, n_out, (6,)))


class Other(nt.AffineCouplingTransform):
    """A copy that scales by half as much."""

    def _scale_and_shift(self, params: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = super()._scale_and_shift(params)
        return scale / 2, shift


def of_nflows(kind: type, flow: type = nflows.flows.Flow) -> nn.Module:
    masks = [torch.tensor([(-1) ** (i + k) for i in range(DIM)]) for k in range(3)]
    make = [lambda n_in, n_out: Net(n_in, n_out, (6,))] * (kind is not Same)
    return flow(nt.CompositeTransform([kind(mask, *make) for mask in masks]), nd.StandardNormal([DIM]))


def of_freia(kind: type, sequence: type = ff.SequenceINN) -> nn.Module:
    inn = sequence(DIM)
    for _ in range(3):
        inn.append(kind, subnet_constructor=subnet)
    return inn


def of_normflows(kind: type, flow: type = nf.NormalizingFlow) -> nn.Module:
    return flow(nf.distributions.DiagGaussian(DIM), [kind(nf.nets.MLP([2, 6, 4])) for _ in range(3)])


def of_zuko(kind: type, flow: type = zuko.flows.Flow) -> nn.Module:
    layers = zuko.flows.RealNVP(DIM, transforms=3, hidden_features=(6,)).transform.transforms
    for layer in layers:
        layer.__class__ = kind
    return flow(layers, zuko.flows.RealNVP(DIM).base)


class EmptyBlock(nf.flows.AffineCouplingBlock):
    pass


class EmptyTransform(zuko.flows.GeneralCouplingTransform):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_nflows(Empty),
        lambda: of_nflows(Same),
        lambda: of_nflows(copied_class(nt.AffineCouplingTransform, "mine.layers")),
        lambda: of_nflows(Empty, copied_class(nflows.flows.Flow, "fork.nflows.flows.base")),
        lambda: of_nflows(Empty, copied_class(nflows.flows.Flow, "mine.flows")),
        lambda: of_freia(copied_class(fm.AllInOneBlock, "anomaly.flow.all_in_one_block")),
        lambda: of_freia(fm.GLOWCouplingBlock, copied_class(ff.SequenceINN, "vendored.FrEIA.framework.sequence_inn")),
        lambda: of_normflows(EmptyBlock),
        lambda: of_normflows(EmptyBlock, copied_class(nf.NormalizingFlow, "mine.core")),
        lambda: of_zuko(EmptyTransform),
    ],
)
def test_copies_and_empty_subclasses_are_replaced(make: Any) -> None:
    flow = shake(make(), 0.2)
    x = torch.randn(7, DIM)
    wanted = log_prob(flow, x)
    converted = convert(copy.deepcopy(flow)) if not hasattr(flow, "module_list") else None
    report = accelerate(flow)
    assert report and sum(r.couplings for r in report.replaced) >= 3, report
    torch.testing.assert_close(log_prob(flow, x), wanted, rtol=1e-4, atol=1e-4)
    if converted is not None:
        torch.testing.assert_close(converted.log_prob(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_nflows(Other), "no kernel covers this kind of layer"),
        (
            lambda: of_nflows(copied_class(nt.AffineCouplingTransform, "mine", "scale + shift", "scale + 2 * shift")),
            "differs",
        ),
        (
            lambda: of_normflows(
                nf.flows.AffineCouplingBlock,
                copied_class(nf.NormalizingFlow, "mine.core", "log_q += log_det", "log_q += log_det / len(self.flows)"),
            ),
            "it is no copy of the class whose name it has",
        ),
    ],
)
def test_what_computes_something_else_stays(make: Any, reason: str) -> None:
    flow = shake(make(), 0.2)
    x = torch.randn(7, DIM)
    wanted = flow.log_prob(x)
    report = accelerate(flow)
    assert not report and reason in str(report)
    assert torch.equal(flow.log_prob(x), wanted)


# -- odd attributes ----------------------------------------------------------------------------------------------------


class Raising:
    """A layer that raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copies ask for these
            raise AttributeError(name)
        raise RuntimeError("nothing can be asked of it")

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


ODD = (None, "odd", torch.empty(0), 2.5, Raising())


def spoiled(layer: nn.Module, name: str, value: Any) -> None:
    for names in (layer._parameters, layer._buffers, layer._modules):
        names.pop(name, None)
    layer.__dict__[name] = value


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: of_nflows(nt.AffineCouplingTransform), lambda flow: flow._transform._transforms),
        (lambda: of_freia(fm.AllInOneBlock), lambda flow: flow.module_list),
        (lambda: of_freia(fm.GLOWCouplingBlock), lambda flow: flow.module_list),
        (lambda: of_normflows(nf.flows.AffineCouplingBlock), lambda flow: flow.flows),
        (lambda: of_zuko(zuko.flows.GeneralCouplingTransform), lambda flow: flow.transform.transforms),
    ],
)
def test_odd_attributes_are_a_reason_to_leave_a_layer(make: Any, layers: Any) -> None:
    """accelerate never raises, and a flow whose layer has become odd computes, or fails, as before."""
    whole = shake(make(), 0.2)
    x = torch.randn(5, DIM)
    first = layers(whole)[0]
    places = [
        (path, name)
        for path, module in first.named_modules()
        if not type(module).__module__.startswith("torch.")
        for name in (*module._parameters, *module._buffers, *module._modules, *vars(module))
        if not name.startswith("_") and name != "training"
    ]
    assert len(places) >= 4
    for i, (path, name) in enumerate(places):
        flow = copy.deepcopy(whole)
        value = ODD[i % len(ODD)]
        spoiled(layers(flow)[0].get_submodule(path), name, value)
        try:
            wanted = log_prob(flow, x)
        except Exception:
            wanted = None
        state = {key: t.clone() for key, t in flow.state_dict().items()}
        report = accelerate(flow)
        if wanted is not None:
            torch.testing.assert_close(log_prob(flow, x), wanted, rtol=1e-4, atol=1e-4)
        if not report:
            assert report.left, (name, value)
            assert all(torch.equal(t, state[key]) for key, t in flow.state_dict().items())
