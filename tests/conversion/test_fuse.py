"""Fusing layer lists made by hand: the same map, the same gradients, and nothing trained that was not."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.layers import (
    FROZEN,
    TRAINED,
    Conditioner,
    Coupling,
    Dense,
    Diagonal,
    Kept,
    Layer,
    NamedActivation,
    Permutation,
)
from glf_fast.conversion.padded import Padded
from glf_fast.flow import CouplingFlow, Flow, Inverse, SequentialFlow
from glf_fast.flow.coupling_flow import COUPLINGS
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, NETWORKS, affine_coupling


@dataclass
class Maker:
    """Random layers; `parameters` collects every leaf that was made to be trained."""

    dim: int
    context_dim: int = 0

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = []

    def leaf(self, *shape: int, trained: bool = True) -> Tensor:
        tensor = 0.3 * torch.randn(*shape, dtype=torch.float64)
        if trained:
            self.parameters.append(tensor.requires_grad_())
        return tensor

    def permutation(self) -> Permutation:
        return Permutation(torch.randperm(self.dim))

    def diagonal(self, trained: bool = True) -> Diagonal:
        return Diagonal(self.leaf(self.dim, trained=trained), self.leaf(self.dim, trained=trained), trained)

    def dense(self, trained: bool = True, regular: bool = True, shift: bool = True) -> Dense:
        W = torch.linalg.qr(torch.randn(self.dim, self.dim, dtype=torch.float64))[0]
        W = W + 0.1 * self.leaf(self.dim, self.dim, trained=trained)
        s = self.leaf(self.dim, trained=trained) if shift else torch.zeros(self.dim, dtype=torch.float64)
        return Dense(W, s, trained, regular)

    def coupling(
        self,
        passive: int | None = None,
        hidden: tuple[int, ...] = (7, 5),
        trained: bool = True,
        kind: str = "affine",
        blocks: int = 0,
        given_context: bool = True,
        **options,
    ) -> Coupling:
        """With `blocks` a residual network of the first of the hidden widths."""
        P = self.dim - self.dim // 2 if passive is None else passive
        order = torch.randperm(self.dim)
        T = self.dim - P
        C = self.context_dim if given_context else 0
        shapes = list(itertools.pairwise([P + C, *hidden, (2 if kind == "affine" else 1) * T]))
        if blocks:
            H = hidden[0]
            shapes = [(P + C, H), *[(H, H), (H, H), *[(C, H)] * (C > 0)] * blocks, (H, shapes[-1][1])]
        stack = (2,) if kind == "separate" else ()
        weights = [self.leaf(*stack, a, b, trained=trained) for a, b in shapes]
        biases = [self.leaf(*stack, b, trained=trained) for _, b in shapes]
        role = TRAINED if trained else FROZEN
        masks = [torch.full_like(w, role, dtype=torch.uint8) for w in weights]
        bias_masks = [torch.full_like(b, role, dtype=torch.uint8) for b in biases]
        defaults = {"log_scale": "tanh", "log_scale_constant": None, "add_first": False, "activation": "tanh"}
        options = {**defaults, **options}
        factors = 0.5 + torch.rand_like(biases[-1], requires_grad=False)
        conditioner = Conditioner(
            weights, biases, masks, bias_masks, factors, NamedActivation(options.pop("activation")), blocks=blocks
        )
        return Coupling(order[:P], order[P:], conditioner, **options)


def apply(layers: list[Layer], x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What layers mean: data → noise and the log-determinant, one by one."""
    logdet = x.new_zeros(len(x))
    for layer in layers:
        if isinstance(layer, Permutation):
            x, ldj = x[:, layer.order], 0.0
        elif isinstance(layer, Diagonal):
            x, ldj = x * layer.log_scale.exp() + layer.shift, layer.log_scale.sum()
        elif isinstance(layer, Dense):
            x, ldj = x @ layer.W + layer.shift, torch.linalg.slogdet(layer.W)[1]
        elif isinstance(layer, Kept):
            x, ldj = layer.module(x, context)
        else:
            c, p, v = layer.conditioner, x[:, layer.passive], x[:, layer.transformed]
            given = context if layer.context_dim() else None
            h = p if given is None else torch.cat([p, given], 1)
            *weights, last = c.weights
            weights, biases = [*weights, last * c.factors.unsqueeze(-2)], [*c.biases[:-1], c.biases[-1] * c.factors]
            raw = NETWORKS[c.network](h, weights, biases, given, c.activation.name, c.activation.constant, None)
            if raw.shape == v.shape:  # additive
                v, ldj = v - raw if layer.undo else v + raw, 0.0
            else:
                u, t = raw.chunk(2, 1)
                options = {"log_scale": layer.log_scale, "log_scale_constant": layer.log_scale_constant}
                v, ldj = affine_coupling(v, u, t, add_first=layer.add_first, inverse=layer.undo, **options)
            x = x.index_copy(1, layer.transformed, v)
        logdet = logdet + ldj
    return x, logdet


class Cubic(nn.Module):
    """A layer that nothing fuses: x + x³ elementwise, with a trained factor; its inverse by Newton's method."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.a * x**3, torch.log1p(3 * self.a * x**2).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(60):
            x = x - (x + self.a * x**3 - z) / (1 + 3 * self.a * x**2)
        return x, -torch.log1p(3 * self.a * x**2).sum(1)


def check(maker: Maker, layers: list[Layer], batch: int = 6) -> Flow:
    """The fused flow is the same map both ways, and its gradients, taken back to the leaves, are the layers'."""
    D, C = maker.dim, maker.context_dim
    flow, sources = fuse(layers, (D,), (C,) if C else ())
    x = torch.randn(batch, D, dtype=torch.float64)
    context = torch.randn(batch, C, dtype=torch.float64) if C else None
    z, logdet = apply(layers, x, context)
    fused_z, fused_logdet = flow(x, context)
    near = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(fused_z, z, **near)
    torch.testing.assert_close(fused_logdet, logdet, **near)
    back, back_logdet = flow.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_logdet, -logdet, rtol=1e-6, atol=1e-6)

    weigh = torch.randn_like(z)
    leaves = maker.parameters
    wanted = torch.autograd.grad((z * weigh).sum() + logdet.sum(), leaves, allow_unused=True, retain_graph=True)
    trained = [(p, value) for p, value, _ in sources if p.requires_grad]
    gradients = torch.autograd.grad((fused_z * weigh).sum() + fused_logdet.sum(), [p for p, _ in trained])
    pairs = [(value, g) for (_, value), g in zip(trained, gradients, strict=True) if value.requires_grad]
    got = torch.autograd.grad(
        [v for v, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, retain_graph=True
    )
    for leaf, g, w in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(leaf) if g is None else g, w, rtol=1e-7, atol=1e-7)
    check_that_nothing_else_is_trained(flow, sources, leaves)
    return flow


def check_that_nothing_else_is_trained(flow: Flow, sources: list, leaves: list[Tensor]) -> None:
    """Every entry that an optimizer may change is one that moves when the library's parameters move."""
    names = {id(p): name for name, p in flow.named_parameters()}
    for parameter, value, _ in sources:
        if not parameter.requires_grad:
            continue
        name = names[id(parameter)]
        trained = torch.ones_like(value, dtype=torch.bool)
        path = name.split(".")
        for i in range(len(path)):
            owner = flow.get_submodule(".".join(path[:i]))
            if isinstance(owner, CouplingFlow) and "_".join(path[i:]) in owner.held:
                trained = owner.held["_".join(path[i:])].trained > 0
        if name.endswith("lower"):
            trained = trained.tril(-1)
        if name.endswith("upper"):
            trained = trained.triu(1)
        v = torch.zeros_like(value, requires_grad=True)  # J·tangent by differentiating vᵀJ
        grads = torch.autograd.grad(value, leaves, v, create_graph=True, allow_unused=True)
        used = [g for g in grads if g is not None and g.requires_grad]
        (moved,) = torch.autograd.grad(used, v, [torch.randn_like(g) for g in used], retain_graph=True)
        assert bool((moved != 0)[trained].all()), name


@pytest.mark.parametrize("seed", range(40))
def test_random_lists_of_layers(seed: int) -> None:
    """Any sequence of affine layers, couplings of any split, size and kind, and kept layers, trained or not."""
    torch.manual_seed(seed)
    draw = lambda n: int(torch.randint(n, ()))  # noqa: E731
    maker = Maker(2 + draw(6), draw(3))
    kinds = [
        {
            "log_scale": sorted(LOG_SCALES)[draw(len(LOG_SCALES))],
            "activation": sorted(ACTIVATIONS)[draw(len(ACTIVATIONS))],
            "add_first": bool(draw(2)),
            "undo": bool(draw(2)),
            "kind": COUPLINGS[draw(len(COUPLINGS))],
        }
        for _ in range(2)
    ]
    for kind in kinds:
        kind["log_scale_constant"] = LOG_SCALES[kind["log_scale"]]
    layers: list[Layer] = []
    for _ in range(9):
        trained = bool(draw(4))
        match draw(8):
            case 0:
                layers.append(maker.permutation())
            case 1 | 2:
                layers.append(maker.diagonal(trained))
            case 3:
                layers.append(maker.dense(trained, regular=bool(draw(2)), shift=bool(draw(2))))
            case 4 if not draw(3):
                layers.append(Kept(Cubic(), "of its own kind"))
            case _:
                hidden = (1 + draw(9), 1 + draw(9))
                layers.append(maker.coupling(1 + draw(maker.dim - 1), hidden, trained, **kinds[draw(2)]))
    check(maker, layers)


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("log_scale", sorted(LOG_SCALES))
@pytest.mark.parametrize("dim", [4, 5])
def test_one_segment_of_uneven_splits_is_one_padded_flow(log_scale: str, dim: int, kind: str) -> None:
    """The columns added are passive in some steps and transformed in others, and add nothing to the log-determinant."""
    maker = Maker(dim, 2)
    options = {"log_scale": log_scale, "log_scale_constant": LOG_SCALES[log_scale], "kind": kind}
    layers = [maker.coupling(P, **options) for P in (1, dim - 1, 2, 1)]
    flow = check(maker, layers)
    assert isinstance(flow, (SequentialFlow, Padded))
    padded = flow if isinstance(flow, Padded) else flow.layers[0]
    assert padded.flow.config["steps"] == 4
    assert padded.flow.event_shape == (max(2 * (dim - 1), 2),)


def test_a_coupling_given_the_context_alone() -> None:
    maker = Maker(3, 2)
    check(maker, [maker.coupling(0), maker.coupling(2)])


def test_residual_networks_of_several_widths_are_one_run() -> None:
    """A network without the flow's context gets gates of 1; MLPs, and another number of blocks, are other runs."""
    maker = Maker(5, 2)
    gated, plain = maker.coupling(2, (9,), blocks=2), maker.coupling(3, (6,), blocks=2, given_context=False)
    flow = check(maker, [gated, maker.dense(), plain, maker.coupling(), maker.coupling(blocks=1)])
    configs = [m.config for m in flow.modules() if isinstance(m, CouplingFlow)]
    found = [(c["network"], c["steps"], c["hidden"]) for c in configs]
    assert found == [("residual", 2, (9, 9)), ("mlp", 1, (7, 5)), ("residual", 1, (7,))]


def test_glow_steps_become_one_coupling_flow_with_plu() -> None:
    maker = Maker(6)
    layers: list[Layer] = []
    for _ in range(3):
        coupling = maker.coupling()
        coupling = Coupling(torch.arange(3), torch.arange(3, 6), coupling.conditioner, "tanh", 2.0, False)
        layers += [maker.diagonal(), maker.dense(shift=False), coupling]
    flow = check(maker, layers)
    assert isinstance(flow, CouplingFlow)
    assert flow.config["linear"] == "plu" and flow.config["actnorm"] and not flow.held


def test_permutations_alone_between_couplings_train_no_linear_layer() -> None:
    maker = Maker(7)
    flow = check(maker, [maker.coupling(), maker.permutation(), maker.coupling(), maker.permutation()])
    assert isinstance(flow, SequentialFlow)
    stacked, permutation = flow.layers
    assert stacked.config["linear"] == "permutation" and not stacked.config["actnorm"] and not stacked.held
    assert not list(permutation.parameters())


def test_undone_couplings_become_the_inverse_of_a_flow() -> None:
    glow = {"log_scale": "glow", "log_scale_constant": 2.0}
    maker = Maker(6)
    flow = check(maker, [maker.coupling(undo=True, **glow), maker.dense(), maker.coupling(undo=True, **glow)])
    assert isinstance(flow, Inverse)


def mixed(kind: str = "affine") -> tuple[Maker, list[Layer]]:
    """One segment with everything that is held: widths, splits, a frozen coupling, steps without ActNorm."""
    maker = Maker(5, 1)
    options = {"log_scale": "exp", "kind": kind}
    return maker, [
        maker.diagonal(),
        maker.coupling(2, (3, 8), **options),
        maker.dense(),
        maker.coupling(3, (9, 2), **options),
        maker.coupling(1, (4, 4), trained=False, **options),
    ]


@pytest.mark.parametrize("kind", COUPLINGS)
def test_held_entries_stay_whatever_the_optimizer_does(kind: str) -> None:
    torch.manual_seed(0)
    maker, layers = mixed(kind)
    flow = check(maker, layers).float()
    before = {name: buffer.clone() for name, buffer in flow.named_buffers() if name.endswith(".value")}
    assert before
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    x, context = torch.randn(64, 5), torch.randn(64, 1)
    losses = []
    for _ in range(20):
        loss = -flow.log_prob(x, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stacked = next(m for m in flow.modules() if isinstance(m, CouplingFlow))
    weights, biases = stacked._mlp()
    effective = {f"mlp_weights_{i}": w for i, w in enumerate(weights)} | {
        f"mlp_biases_{i}": b for i, b in enumerate(biases)
    }
    for name, tensor in effective.items():
        held = stacked.held[name]
        assert torch.equal(tensor[held.trained == 0], held.value[held.trained == 0])
    # The columns added are still zeros that cost nothing: the map is the one of the five columns.
    z, logdet = flow(x, context)
    with torch.no_grad():
        assert torch.equal(flow(x, context)[0], z), "no gradient, same values"
    jacobian = torch.func.vmap(torch.func.jacrev(lambda a, c: flow(a[None], c[None])[0][0]))(x[:4], context[:4])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[:4], rtol=1e-3, atol=1e-3)


def test_flows_with_held_entries_are_saved_copied_pickled_and_compiled() -> None:
    maker, layers = mixed()
    flow = check(maker, layers)
    x, context = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    z = flow(x, context)[0]
    stacked = next(m for m in flow.modules() if isinstance(m, CouplingFlow))
    with torch.no_grad():  # what is held is not the parameter's value
        for parameter in stacked.parameters():
            parameter.mul_(torch.where(torch.rand_like(parameter) < 2, 1.0, 0.0))
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for other in (copy.deepcopy(flow), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, context)[0], z)
    rebuilt = CouplingFlow(**stacked.config).double()
    rebuilt.load_state_dict(stacked.state_dict())
    wide = torch.randn(3, stacked.event_shape[0], dtype=torch.float64)
    assert torch.equal(rebuilt.eval()(wide, context)[0], stacked.eval()(wide, context)[0])
    for p in rebuilt.parameters():
        torch.nn.init.normal_(p)
    held = rebuilt.held["mlp_weights_0"]
    frozen = held.trained == 0
    assert torch.equal(held(rebuilt.mlp_weights[0])[frozen], stacked.held["mlp_weights_0"].value[frozen])
    layers_again = stacked.to_layers()
    torch.testing.assert_close(layers_again(wide, context)[0], stacked(wide, context)[0])


def test_hold_refuses_a_mask_of_another_shape() -> None:
    flow = CouplingFlow(4, 2, (3,))
    with pytest.raises(ValueError, match=r"linear_upper's shape \(2, 4, 4\)"):
        flow.hold("linear_upper", torch.ones(4, 4, dtype=torch.bool))


def test_undone_couplings_with_odd_log_scale_need_no_inverse() -> None:
    maker = Maker(6)
    flow = check(maker, [maker.coupling(undo=True), maker.coupling(undo=False, add_first=True)])
    assert isinstance(flow, SequentialFlow) and isinstance(flow.layers[0], CouplingFlow)
    assert flow.layers[0].config["steps"] == 2 and flow.layers[0].config["add_first"]
