"""CouplingFlow: stacked parameters, layers, the data-dependent start, its density, its errors."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from glf_fast import (
    MLP,
    ActNorm,
    AffineCoupling,
    CouplingFlow,
    InvertibleLinear,
    ResidualNet,
    SeparateNetworks,
    SequentialFlow,
)
from glf_fast.flow.coupling_flow import COUPLINGS
from glf_fast.flow.linear import assemble
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, fold_actnorm, permutation_matrix


def shaken(flow: CouplingFlow, scale: float = 0.3) -> CouplingFlow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


@settings(max_examples=40, deadline=None)
@given(
    dim=st.integers(2, 9),
    steps=st.integers(1, 4),
    networks=st.one_of(
        st.tuples(st.just("mlp"), st.sampled_from(COUPLINGS), st.lists(st.integers(1, 12), min_size=1, max_size=4)),
        st.tuples(
            st.just("residual"),
            st.sampled_from([name for name in COUPLINGS if name != "separate"]),
            st.builds(lambda width, blocks: [width] * blocks, st.integers(1, 12), st.integers(1, 5)),
        ),
    ),
    context_dim=st.integers(0, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    log_scale=st.sampled_from(sorted(LOG_SCALES)),
    add_first=st.booleans(),
    linear=st.sampled_from(["plu", "dense", "permutation"]),
    actnorm=st.booleans(),
    batch=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_stacked_flow_and_its_layers_are_the_same_map(seed, batch, networks, **arguments) -> None:
    arguments |= dict(zip(("network", "coupling", "hidden"), networks, strict=True))
    if arguments["coupling"] == "spline":  # these mean nothing to it, and its layers do not keep them
        arguments |= {"log_scale": "tanh", "add_first": False}
    torch.manual_seed(seed)
    flow = shaken(CouplingFlow(**arguments).double().eval())
    x = torch.randn(batch, flow.config["dim"], dtype=torch.float64)
    context = torch.randn(batch, flow.context_dim, dtype=torch.float64) if flow.context_dim else None
    z, logdet = flow(x, context)
    # An unbounded scale may make 10¹⁴⁴ of 1, and 10⁻²⁰, of which the inverse finds no digit.
    assume(z.numel() == 0 or (z.abs().max() < 1e4 and logdet.abs().max() < 20))
    layers = flow.to_layers()
    for other in (layers, CouplingFlow.from_layers(layers)):
        z_other, logdet_other = other(x, context)
        torch.testing.assert_close(z_other, z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logdet_other, logdet, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other.inverse(z, context)[0], x, rtol=1e-6, atol=1e-6)
    assert CouplingFlow.from_layers(layers).config == flow.config


@pytest.mark.parametrize(("hidden", "network"), [((8, 9), "mlp"), ((8, 8), "residual")])
def test_configuration_rebuilds_the_flow(hidden, network: str) -> None:
    options = {"network": network, "log_scale": "softclip", "add_first": True, "linear": "dense"}
    flow = shaken(CouplingFlow(5, 2, hidden, 2, **options))
    again = CouplingFlow(**flow.config)
    again.load_state_dict(flow.state_dict())
    x, context = torch.randn(3, 5), torch.randn(3, 2)
    assert torch.equal(again.eval()(x, context)[0], flow.eval()(x, context)[0])
    assert flow.config["log_scale_constant"] == 1e-3, (
        "the constant is spelled out, so that a new default cannot change it"
    )


def test_a_new_flow_is_its_linear_part() -> None:
    torch.manual_seed(0)  # how far float32 is from a rotation depends on it
    flow = CouplingFlow(6, 3, (16,), actnorm=False).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    z, logdet = flow(x)
    torch.testing.assert_close(z.norm(dim=1), x.norm(dim=1))  # three random rotations
    torch.testing.assert_close(logdet, torch.zeros_like(logdet), atol=1e-7, rtol=0)  # stored in float32 at first


def test_first_training_batch_sets_every_actnorm_once() -> None:
    torch.manual_seed(1)
    flow = shaken(CouplingFlow(4, 3, (8,)))
    layers = flow.to_layers()
    x = 5 * torch.randn(256, 4) + 3
    assert not flow.actnorm_initialized.any()
    flow.eval()(x)
    assert not flow.actnorm_initialized.any(), "evaluation must not start it"
    flow.train()(x[:1])
    assert not flow.actnorm_initialized.any(), "one row has no variance"
    z, _ = flow(x)
    assert flow.actnorm_initialized.all()
    torch.testing.assert_close(layers.train()(x)[0], z, rtol=1e-4, atol=1e-4)
    h = (x + flow.actnorm_bias[0]) * flow.actnorm_log_scale[0].exp()
    torch.testing.assert_close(h.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    before = flow.actnorm_bias.clone()
    flow(x + 100)
    assert torch.equal(flow.actnorm_bias, before)


@pytest.mark.parametrize(
    "make", [lambda: CouplingFlow(4, 2, (8,)), lambda: ActNorm(4)], ids=["CouplingFlow", "ActNorm"]
)
def test_a_loaded_start_is_never_repeated(make) -> None:
    first = make()
    first(3 * torch.randn(64, 4) + 1)
    second = make()
    second.load_state_dict(first.state_dict())
    second.train()(torch.randn(64, 4) + 50)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = make()
    fresh.load_state_dict(make().state_dict())
    fresh.train()(3 * torch.randn(64, 4) + 1)
    assert any((a != b).any() for a, b in zip(fresh.parameters(), make().parameters(), strict=True)), (
        "not started: starts"
    )


def test_start_happens_inside_a_compiled_training_step() -> None:
    torch.compiler.reset()
    flow = CouplingFlow(4, 2, (8,))
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    x = 5 * torch.randn(64, 4) + 3
    z, logdet = compiled(x)
    (z.square().sum() - logdet.sum()).backward()
    assert flow.actnorm_initialized.all()
    torch.testing.assert_close(flow(x)[0], z, rtol=1e-5, atol=1e-5)
    assert flow.actnorm_bias.grad is not None


def test_constant_features_do_not_explode() -> None:
    flow = CouplingFlow(4, 2, (8,))
    x = torch.randn(64, 4)
    x[:, 1] = 7.0
    z, _ = flow(x)
    x[:, 1] += 1e-3
    assert (flow(x)[0] - z).abs().max() < 0.1


def test_compiled_with_inductor() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(5, 2, (8,), context_dim=2)).eval()
    compiled = torch.compile(flow, fullgraph=True)
    for batch in (8, 13, 7):  # the second size makes the graph dynamic, the third must fit it
        x, context = torch.randn(batch, 5), torch.randn(batch, 2)
        z, logdet = flow(x, context)
        z_compiled, logdet_compiled = compiled(x, context)
        torch.testing.assert_close(z_compiled, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logdet_compiled, logdet, rtol=1e-4, atol=1e-5)


def test_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(2, 3, (8, 8)).double().eval(), 0.2)
    side = torch.linspace(-12, 12, 801, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    mass = flow.log_prob(points).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(mass.item() - 1) < 1e-3


def test_learns_a_density_it_can_sample() -> None:
    """A ring: far from normal, so that only working couplings, gradients and log-determinants reach its entropy."""
    torch.manual_seed(0)

    def ring(n: int) -> torch.Tensor:
        angle, radius = 2 * math.pi * torch.rand(n), 2 + 0.1 * torch.randn(n)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    flow = CouplingFlow(2, 8, (32, 32), activation="tanh")
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, 500)
    for _ in range(500):
        optimizer.zero_grad()
        flow.log_prob(ring(256)).mean().neg().backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    entropy = math.log(2 * math.pi * 2) + 0.5 * math.log(2 * math.pi * math.e * 0.1**2)  # of the ring: 1.65 nats
    gaussian = math.log(2 * math.pi * math.e * 2)  # of the best normal distribution: 3.53 nats
    cross_entropy = -flow.log_prob(ring(4000)).mean().item()
    assert entropy - 0.05 < cross_entropy < entropy + 0.5 < gaussian
    radius = flow.sample(4000).norm(dim=1)
    assert abs(radius.mean().item() - 2) < 0.15
    assert radius.std().item() < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 1}, "dim must be at least 2"),
        ({"steps": 0}, "steps must be ≥ 1; got 0"),
        ({"steps": 2.0}, "steps must be an int; got 2.0"),
        ({"dim": 4.0}, "dim must be an int; got 4.0"),
        ({"hidden": (8, 8.5)}, r"hidden\[1\] must be an int; got 8.5"),
        ({"hidden": (8, 0)}, "hidden must be zero to eight widths"),
        ({"hidden": (8,) * 9}, "hidden must be zero to eight widths"),
        ({"network": "residual", "hidden": ()}, "each of one to five blocks"),
        ({"context_dim": -1}, "context_dim must be ≥ 0"),
        ({"activation": "rleu"}, "activation must be one of 'relu'"),
        ({"log_scale": "tahn"}, "log_scale must be one of 'tanh'"),
        ({"coupling": "nice"}, "coupling must be one of 'affine', 'separate', 'additive', 'spline'; got 'nice'"),
        ({"network": "resnet"}, "network must be one of 'mlp', 'residual'; got 'resnet'"),
        ({"network": "residual", "hidden": (8, 9)}, "one width ≥ 1 for each of one to five blocks"),
        ({"network": "residual", "hidden": (8,) * 6}, "each of one to five blocks"),
        ({"network": "residual", "coupling": "separate"}, "coupling='separate' has two MLPs; got network='residual'"),
        ({"linear": "lu"}, "linear must be one of 'plu', 'dense', 'permutation'; got 'lu'"),
    ],
)
def test_wrong_arguments_name_themselves(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        CouplingFlow(**{"dim": 4, "steps": 2, "hidden": (8,), **arguments})


def test_wrong_inputs_name_themselves() -> None:
    flow, conditional = CouplingFlow(4, 2, (8,)), CouplingFlow(4, 2, (8,), context_dim=3)
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, dim\) = \(any, 4\); got \(5, 3\)"):
        flow(x[:, :3])
    with pytest.raises(ValueError, match=r"z must have shape \(batch, dim\) = \(any, 4\); got \(4,\)"):
        flow.inverse(x[0])
    with pytest.raises(TypeError, match=r"x must be floating-point; got torch\.int64"):
        flow(x.long())
    with pytest.raises(TypeError, match=r"x is torch\.float64 but the flow is torch\.float32"):
        flow(x.double())
    with pytest.raises(TypeError, match=r"keep the flow in float32 and run it under torch\.autocast"):
        CouplingFlow(4, 2, (8,)).bfloat16()(x)
    with pytest.raises(ValueError, match="this flow is conditional"):
        conditional(x)
    with pytest.raises(ValueError, match="context_dim=0 but a context"):
        flow(x, x)
    with pytest.raises(ValueError, match=r"context must have shape \(5, 3\) or \(3,\); got \(4, 3\)"):
        conditional(x, torch.randn(4, 3))
    with pytest.raises(ValueError, match="n must be ≥ 0"):
        flow.sample(-1)
    with pytest.raises(ValueError, match="temperature must be ≥ 0"):
        flow.sample(1, temperature=-1.0)


def test_half_precision_input_is_widened() -> None:
    flow = CouplingFlow(4, 2, (8,)).eval()
    x = torch.randn(5, 4).bfloat16()
    assert torch.equal(flow(x)[0], flow(x.float())[0])


def test_from_layers_names_the_layer_that_does_not_fit() -> None:
    def step(**options) -> list[nn.Module]:
        return [ActNorm(4), InvertibleLinear(4), AffineCoupling(4, MLP(2, [8], 4), **options)]

    def stack(*layers: nn.Module) -> None:
        CouplingFlow.from_layers(SequentialFlow(layers, (4,)))

    with pytest.raises(ValueError, match="layer 2 has flip=True"):
        stack(*step(flip=True))
    with pytest.raises(ValueError, match="layer 1 is AffineCoupling; a CouplingFlow has InvertibleLinear there"):
        stack(ActNorm(4), step()[2], step()[1])
    with pytest.raises(ValueError, match="layer 2 has a Linear as conditioner"):
        stack(ActNorm(4), InvertibleLinear(4), AffineCoupling(4, nn.Linear(2, 4)))
    unequal = SeparateNetworks(MLP(2, [8], 2), MLP(2, [9], 2))
    with pytest.raises(ValueError, match=r"layer 2 has a SeparateNetworks as conditioner; .* an MLP or two equal ones"):
        stack(ActNorm(4), InvertibleLinear(4), AffineCoupling(4, unequal))
    for gated in ({"context_dim": 3}, {}):  # the flow has no context, and the network none that it passes
        net = ResidualNet(2, [8], 4, **gated)
        with pytest.raises(ValueError, match=r"layer 2 has .* or a ResidualNet with the flow's context"):
            stack(ActNorm(4), InvertibleLinear(4), AffineCoupling(4, net, pass_context=not gated))
    shared = MLP(2, [8], 2)
    with pytest.raises(ValueError, match="layer 2 has a SeparateNetworks as conditioner"):
        stack(ActNorm(4), InvertibleLinear(4), AffineCoupling(4, SeparateNetworks(shared, shared)))
    with pytest.raises(ValueError, match="step 1 has log_scale='glow' but step 0 has 'tanh'"):
        stack(*step(), *step(log_scale="glow"))
    with pytest.raises(ValueError, match="4 layers cannot be split into equal steps of 3"):
        stack(*step(), ActNorm(4))


def fused_step(flow: CouplingFlow) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), 0.1, fused=True)
    flow.log_prob(torch.randn(16, 4)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def through_data(flow: CouplingFlow) -> None:
    for parameter in flow.parameters():
        parameter.data.add_(0.1)


def loaded(flow: CouplingFlow) -> None:
    flow.load_state_dict(shaken(CouplingFlow(4, 2, (8,))).state_dict())


@pytest.mark.parametrize("change", [fused_step, through_data, loaded, CouplingFlow.double])
@torch.no_grad()
def test_evaluation_follows_every_way_in_which_parameters_change(change) -> None:
    """Fused optimizers and writes through .data leave version counters as they are."""
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(4, 2, (8,))).eval()
    x = torch.randn(5, 4)
    before = flow(x)[0], flow.inverse(x)[0]
    with torch.enable_grad():
        change(flow)
    dtype = next(flow.parameters()).dtype
    layers = flow.to_layers()
    for after, expected, old in zip(
        (flow(x.to(dtype)), flow.inverse(x.to(dtype))),
        (layers(x.to(dtype)), layers.inverse(x.to(dtype))),
        before,
        strict=True,
    ):
        torch.testing.assert_close(after[0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[1], expected[1], rtol=1e-4, atol=1e-5)
        assert (after[0] != old).any()


@torch.no_grad()
def test_evaluation_follows_a_parametrized_weight() -> None:
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(4, 2, (8,), linear="dense")).eval()
    nn.utils.parametrizations.orthogonal(flow, "linear_weight")
    x = torch.randn(5, 4)
    before = flow(x)[0]
    flow.parametrizations["linear_weight"].original.data.add_(0.3)
    layers = flow.to_layers()
    assert (flow(x)[0] != before).any()
    torch.testing.assert_close(flow(x), layers(x))


@pytest.mark.parametrize("linear", ["plu", "dense", "permutation"])
def test_training_follows_a_frozen_linear_part_that_changes(linear: str) -> None:
    """What is frozen is assembled once: until it changes, is trained, or was assembled where no gradient can follow."""
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(4, 2, (8,), linear=linear, actnorm=linear != "permutation"))
    flow.log_prob(torch.randn(16, 4))  # ActNorms have started
    frozen = [p for name, p in flow.named_parameters() if not name.startswith("mlp")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    x = torch.randn(5, 4)
    with torch.inference_mode():
        flow.eval().log_prob(x)

    def check() -> None:
        layers = flow.to_layers()
        torch.testing.assert_close(flow.log_prob(x), layers.log_prob(x), rtol=1e-4, atol=1e-4)
        flow.zero_grad()
        flow.log_prob(x).sum().backward()
        layers.log_prob(x).sum().backward()
        last = list(layers.layers)[-1].conditioner.linears()[-1]
        torch.testing.assert_close(flow.mlp_weights[-1].grad[-1].T, last.weight.grad, rtol=1e-3, atol=1e-4)
        assert all(p.grad is None for p in frozen)

    for training in (False, True, True):
        flow.train(training)
        check()
    if linear == "permutation":
        flow.linear_permutation.data.copy_(flow.linear_permutation.flip(-1))
    for parameter in frozen:
        parameter.data.add_(0.1)
    check()
    for parameter in frozen:
        parameter.requires_grad_()
    flow.log_prob(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in frozen)


def test_tangents_of_a_frozen_linear_part_are_not_lost() -> None:
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(4, 2, (8,), linear="dense", actnorm=False).double()).requires_grad_(False)
    x, W, tangent = torch.randn(5, 4).double(), flow.linear_weight, torch.randn(2, 4, 4).double()
    plain = flow.log_prob(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(W.detach(), tangent)
        out = torch.func.functional_call(flow, {"linear_weight": dual}, (x,))[1]
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    step = 1e-6
    ends = [torch.func.functional_call(flow, {"linear_weight": W + h * tangent}, (x,))[1] for h in (step, -step)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow.log_prob(x), plain)


@pytest.mark.parametrize("actnorm", [True, False])
def test_maps_of_permutations_have_the_reference_s_derivatives(actnorm: bool) -> None:
    torch.manual_seed(0)
    permutation = torch.stack([torch.randperm(5) for _ in range(3)])
    P = permutation_matrix(permutation, torch.float64)
    vectors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2 * actnorm)]

    def run(*vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return assemble("permutation", {"permutation": permutation}, torch.float64, *vectors)

    expected = fold_actnorm(P.mT, P, P.new_zeros(3), *(vectors or (None, None)))
    for found, wanted in zip(run(*vectors), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert assemble("permutation", {"permutation": permutation}, torch.float64, need_inverse=False)[1] is None
    if actnorm:
        assert torch.autograd.gradcheck(run, vectors) and torch.autograd.gradgradcheck(run, vectors)


@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("linear", ["plu", "dense", "permutation"])
@torch.no_grad()
def test_affine_maps_come_as_the_kernels_want_them(linear: str, actnorm: bool) -> None:
    """Contiguous: anything else would be refused, explained and copied at every call."""
    flow = CouplingFlow(5, 3, (8,), linear=linear, actnorm=actnorm).eval()
    assert all(t.is_contiguous() for t in flow._affine(torch.float32, need_inverse=True))


@torch.no_grad()
def test_kept_maps_are_those_of_real_tensors() -> None:
    """Fake tensors, which have no values, are neither kept nor compared with."""
    flow, x = shaken(CouplingFlow(4, 2, (8,))).eval(), torch.randn(5, 4)
    for _ in range(2):
        z = flow(x)[0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert flow(x)[0].shape == (5, 4)
        assert torch.equal(flow(x)[0], z)


@torch.no_grad()
def test_pruned_and_parametrized_layers_are_read_in_their_order() -> None:
    flow, x = shaken(CouplingFlow(4, 2, (4, 4))).eval(), torch.randn(5, 4)
    prune.custom_from_mask(flow.mlp_weights, "0", torch.rand_like(flow.mlp_weights[0]) < 0.5)
    nn.utils.parametrize.register_parametrization(flow.mlp_biases, "1", nn.Tanh())
    z = flow(x)[0]
    plain = CouplingFlow(4, 2, (4, 4)).eval()
    for name, parameter in plain.named_parameters():
        if name == "mlp_weights.0":
            parameter.copy_(flow.mlp_weights[0])
        elif name == "mlp_biases.1":
            parameter.copy_(flow.mlp_biases[1])
        else:
            parameter.copy_(flow.get_parameter(name))
    for name in ("linear_sign", "linear_permutation"):
        plain.get_buffer(name).copy_(flow.get_buffer(name))
    torch.testing.assert_close(plain(x)[0], z)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_second_derivatives_of_both_directions(coupling: str) -> None:
    torch.manual_seed(0)
    flow = shaken(CouplingFlow(4, 2, (8,), coupling=coupling, activation="tanh").double().eval())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for run in (flow, flow.inverse):
        assert torch.autograd.gradgradcheck(lambda x, run=run: run(x), (x,))


def test_the_memory_format_of_images_means_nothing_to_a_flow() -> None:
    flow = CouplingFlow(4, 2, (4, 4), coupling="separate").to(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in flow.parameters())
